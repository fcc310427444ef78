"""From a command to a picture, and ten pictures of a caption ranked by CLIP: seconds, and where they go.

    rac3 quickstart
    python benchmarks/generate.py runs/quickstart [--prompt "..."] [--samples 1 4 10] [--rounds 5] [--json FILE]

`command`: `rac3 generate RUN`, from its start to the written pictures: the first time with an empty folder of compiled
programs, then the median of `--rounds` times with those kept, the numbers of samples interleaved.
`parts`: in one process with the model open, the most of `--samples` for one caption: seconds to retrieve, to draw ids,
to decode them to pictures and to rank these by CLIP. Nothing compiles while it is measured.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measure import record, seconds

PACKAGES = ("rac3", "jax", "jaxlib", "flax", "numpy", "scann")


def commands(run: Path, prompt: str, counts: list[int], rounds: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(Path(folder) / "programs")}

        def once(samples: int) -> float:
            out = Path(folder) / f"out-{time.monotonic_ns()}"
            options = ["--prompt", prompt, "--samples", str(samples), "--out", str(out)]
            command = [str(Path(sys.executable).with_name("rac3")), "generate", str(run), *options]
            return seconds(lambda: subprocess.run(command, check=True, env=environment, capture_output=True))

        first = once(counts[0])
        for samples in counts[1:]:
            once(samples)
        times: dict[int, list[float]] = {samples: [] for samples in counts}
        for _ in range(rounds):
            for samples in counts:
                times[samples].append(once(samples))
    rows: list[dict[str, Any]] = [{"samples": counts[0], "compiled": False, "seconds": round(first, 2)}]
    for samples, found in times.items():
        spread = {
            "seconds": round(statistics.median(found), 2),
            "min": round(min(found), 2),
            "max": round(max(found), 2),
        }
        rows.append({"samples": samples, "compiled": True, **spread})
    return rows


def parts(run: Path, prompt: str, samples: int, rounds: int) -> dict[str, Any]:
    import rac3

    model = rac3.load(run)
    spent: dict[str, float] = {}

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            result = call(*arguments, **options)
            result = list(result) if name == "draw" else result  # the engine gives its answers one by one
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - started
            return result

        return wrapped

    model.generate(prompt, samples=samples)  # opens and compiles everything
    for owner, method, name in (
        (model, "retrieve_many", "retrieve"),
        (model.engine, "run", "draw"),
        (model.images, "decode", "decode"),
        (model.encoder, "embed_images", "rank"),
    ):
        object.__setattr__(owner, method, timed(name, getattr(owner, method)))
    totals, shares = [], []
    for seed in range(1, rounds + 1):
        spent.clear()
        totals.append(seconds(lambda seed=seed: model.generate(prompt, samples=samples, seed=seed)))  # type: ignore[misc]
        shares.append(dict(spent))
    middle = {name: round(float(np.median([each[name] for each in shares])), 3) for name in shares[0]}
    return {"samples": samples, "seconds": round(statistics.median(totals), 3), **middle}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished workdir")
    parser.add_argument("--prompt", default="a fox on snow")
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 4, 10])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = {
        "command": commands(options.run, options.prompt, options.samples, options.rounds),
        "parts": parts(options.run, options.prompt, max(options.samples), options.rounds),
    }
    print(json.dumps(results, indent=2))
    if options.json:
        command = " ".join(["python benchmarks/generate.py", *sys.argv[1:]])
        options.json.write_text(record(command, PACKAGES, results), encoding="utf-8")


if __name__ == "__main__":
    main()
