"""A file of prompts that is killed three times and resumed: are its files those of a run that was not?

    rac3 quickstart
    python benchmarks/bulk.py runs/quickstart [--prompts 200] [--seed 0] [--json FILE]

The prompts draw, caption, infill, classify and score, in turn, with documents of the test split. `rac3 generate RUN
--prompts FILE --out DIR` answers them once without interruption. Into another folder it is killed (SIGKILL) a random
moment after each of three random numbers of answers, perhaps while it starts, and started again with the same command.
Every picture of the two folders is then compared byte by byte, and every answer; its scores, probabilities and
similarities may differ by rounding, since prompts that are left are in a batch of another size. Exit code 1 if anything
differs by more than 1e-5.

`kills`: answers in the file when the command was killed. `files` and `bytes`: what was compared. `seconds`: of the
uninterrupted command, and of the four others together. `numbers`: those in the answers, with six digits;
`other_numbers`: those of them that differ, by `largest_difference` at most.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import record, seconds

import rac3
from rac3.answering import AT_ONCE
from rac3.stages.generate import ANSWERS

PACKAGES = ("rac3", "jax", "jaxlib", "flax", "numpy", "scann")
KILLS = 3
LONGEST_DELAY = 0.3  # seconds


def prompts(run: Path, count: int, folder: Path) -> list[dict[str, Any]]:
    """Prompts of the five tasks in turn; their pictures are written into the folder."""
    model = rac3.load(run)
    split = model.documents("test")
    texts = []
    for number, item in enumerate(split.many(range(min(count, len(split))))):
        texts.append(item.document.text)
        (folder / f"{number}.png").write_bytes(item.document.images[0].data)
    side = model.images.resolution
    mask = ",".join(map(str, (side // 4, side // 4, 3 * side // 4, 3 * side // 4)))
    lines = []
    for number in range(count):
        own, other = number % len(texts), (number + 7) % len(texts)
        image, text = f"{own}.png", texts[own]
        labels = [f"{image}={text}", f"{other}.png={texts[other]}"]
        tasks: list[dict[str, Any]] = [
            {"prompt": text, "seed": number, "samples": 1},
            {"image": image, "seed": number, "samples": 1},
            {"task": "infill_image", "image": image, "mask": mask, "prompt": text, "seed": number, "samples": 1},
            {"task": "classify", "image": image, "labels": labels},
            {"task": "score", "image": image, "prompt": text},
        ]
        lines.append(tasks[number % len(tasks)])
    return lines


def answered(out: Path) -> int:
    """Whole lines of the file of answers."""
    path = out / ANSWERS
    return path.read_bytes().count(b"\n") if path.exists() else 0


def killed(command: list[str], out: Path, least: int, delay: float) -> int:
    """Kills the command a delay after it has so many answers; how many there are then."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while answered(out) < least and process.poll() is None:
            time.sleep(0.002)
        time.sleep(delay)
        if process.poll() is not None:
            raise SystemExit(f"the command ended by itself, with exit code {process.returncode}; give more --prompts")
        process.kill()
    return answered(out)


def content(folder: Path) -> tuple[dict[str, Any], list[float]]:
    """Every file, the answers with 0 for each of their numbers; and these."""
    files: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    numbers: list[float] = []

    def found(text: str) -> float:
        numbers.append(float(text))
        return 0.0

    records = [json.loads(line, parse_float=found) for line in files[ANSWERS].splitlines()]
    return files | {ANSWERS: records}, numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished workdir")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    most = options.prompts - AT_ONCE  # the answers to the last prompts come all at once
    if most < KILLS:
        parser.error(f"--prompts {options.prompts} are drawn together; give at least {AT_ONCE + KILLS}")
    rng = random.Random(options.seed)
    moments = sorted(rng.sample(range(1, most + 1), KILLS))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = prompts(options.run, options.prompts, folder)
        file, whole, part = folder / "prompts.jsonl", folder / "whole", folder / "part"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

        def generate(out: Path) -> list[str]:
            rac3_command = str(Path(sys.executable).with_name("rac3"))
            return [rac3_command, "generate", str(options.run), "--prompts", str(file), "--out", str(out)]

        def run(out: Path) -> None:
            subprocess.run(generate(out), check=True, capture_output=True)

        uninterrupted = seconds(lambda: run(whole))
        started = time.perf_counter()
        kills = [killed(generate(part), part, least, rng.uniform(0, LONGEST_DELAY)) for least in moments]
        run(part)
        resumed = time.perf_counter() - started
        size = sum(path.stat().st_size for path in whole.iterdir())
        (expected, numbers), (found, others) = content(whole), content(part)
    same = found == expected and len(numbers) == len(others)
    apart = [abs(a - b) for a, b in zip(numbers, others, strict=False) if a != b]
    results = {
        "prompts": options.prompts,
        "seed": options.seed,
        "kills": kills,
        "files": len(expected),
        "bytes": size,
        "seconds": {"uninterrupted": round(uninterrupted, 1), "killed": round(resumed, 1)},
        "same_pictures_and_texts": same,
        "numbers": len(numbers),
        "other_numbers": len(apart),
        "largest_difference": round(max(apart, default=0.0), 6),
    }
    print(json.dumps(results, indent=2))
    if options.json:
        command = " ".join(["python benchmarks/bulk.py", *sys.argv[1:]])
        options.json.write_text(record(command, PACKAGES, results), encoding="utf-8")
    sys.exit(0 if same and max(apart, default=0.0) < 1e-5 else 1)


if __name__ == "__main__":
    main()
