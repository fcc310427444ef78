"""The quickstart's claims, checked with several seeds, each with its own world.

    python benchmarks/quickstart_seeds.py --workdir DIR [--seeds 0 1 2 3] [--out FILE.json]

Runs `rac3 run` once per seed in a new process, prints a table, and writes all figures with the date, the hardware and
the versions. Exit code 1 if a claim fails for any seed. Takes 11 minutes of CPU time per seed.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from measure import hardware

CONFIG = """from rac3.configs.quickstart import get_config as quickstart


def get_config():
    return quickstart(seed={seed})
"""

CLAIMS = {
    "RA-CM3 draws at least 75% of the unseen entities in their settings": lambda f: (
        f["ra_cm3.joint_accuracy.unseen"] >= 0.75
    ),
    "RA-CM3 names at least 60% of them with their settings": lambda f: f["ra_cm3.joint_name_accuracy.unseen"] >= 0.6,
    "a copy shows at most 10%": lambda f: f["baselines.copied.joint_accuracy.unseen"] <= 0.1,
    "a copy names at most 10%": lambda f: f["baselines.copied.joint_name_accuracy.unseen"] <= 0.1,
    "a mean shows at most 10%": lambda f: f["baselines.mean.joint_accuracy.unseen"] <= 0.1,
    "CM3 at its best draws at most 10% of the entities": lambda f: f["cm3_best.entity_accuracy.unseen"] <= 0.1,
    "CM3 at its best names at most 10% of them": lambda f: f["cm3_best.name_accuracy.unseen"] <= 0.1,
    "the image perplexity is at most 0.65 of that of CM3 at its best": lambda f: (
        f["ra_cm3.perplexity.image"] <= 0.65 * f["cm3_best.perplexity.image"]
    ),
    "the text perplexity is at most 0.6 of that of CM3 at its best": lambda f: (
        f["ra_cm3.perplexity.text"] <= 0.6 * f["cm3_best.perplexity.text"]
    ),
    "recall at 2 is at least 0.8 by text": lambda f: f["retrieval.recall_at_2.text"] >= 0.8,
    "recall at 2 is at least 0.8 by image": lambda f: f["retrieval.recall_at_2.image"] >= 0.8,
    "with random documents RA-CM3 draws at most 10%": lambda f: f["ra_cm3_random.entity_accuracy.unseen"] <= 0.1,
    "under 6 GB of memory": lambda f: f["peak_gb"] is None or f["peak_gb"] < 6,
}
FIGURES = [
    *(
        f"{model}.{figure}"
        for model in ("ra_cm3", "cm3_best", "cm3", "ra_cm3_random")
        for figure in (
            "perplexity.image",
            "perplexity.text",
            "entity_accuracy.seen",
            "entity_accuracy.unseen",
            "joint_accuracy.seen",
            "joint_accuracy.unseen",
            "name_accuracy.unseen",
            "joint_name_accuracy.unseen",
        )
    ),
    "cm3_best.steps",
    *(
        f"baselines.{baseline}.{figure}.unseen"
        for baseline in ("copied", "mean", "reconstructed", "original")
        for figure in ("entity_accuracy", "joint_accuracy", "name_accuracy", "joint_name_accuracy")
    ),
    "retrieval.recall_at_2.text",
    "retrieval.recall_at_2.image",
]


def run(seed: int, workdir: Path) -> dict[str, Any]:
    """The figures of one seed; wall time and memory only if the run starts from scratch."""
    workdir.mkdir(parents=True, exist_ok=True)
    config, folder = workdir / f"seed_{seed}.py", workdir / f"seed_{seed}"
    fresh = not folder.exists()
    config.write_text(CONFIG.format(seed=seed), encoding="utf-8")
    command = [str(Path(sys.executable).with_name("rac3")), "run", str(config), "--workdir", str(folder)]
    started = time.monotonic()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"seed {seed}: the run failed with status {os.waitstatus_to_exitcode(status)}")
    wall = time.monotonic() - started
    metrics = json.loads((folder / "report" / "metrics.json").read_text(encoding="utf-8"))
    figures = {name: lookup(metrics, name) for name in FIGURES}
    figures["encoders"] = metrics["encoders"]
    figures["stages"] = metrics["stages"]
    figures["wall_seconds"] = round(wall, 1) if fresh else None
    figures["cpu_seconds"] = round(usage.ru_utime + usage.ru_stime, 1) if fresh else None
    figures["peak_gb"] = round(usage.ru_maxrss / 1e6, 2) if fresh else None
    figures["failed_claims"] = [claim for claim, holds in CLAIMS.items() if not holds(figures)]
    return figures


def lookup(metrics: dict[str, Any], name: str) -> Any:
    value: Any = metrics
    for part in name.split("."):
        value = value[part]
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results = {str(seed): run(seed, arguments.workdir) for seed in arguments.seeds}
    shown = [*FIGURES, "wall_seconds", "peak_gb"]
    print(f"{'':36}" + "".join(f"{'seed ' + seed:>10}" for seed in results))
    for name in shown:
        cells = [figures[name] for figures in results.values()]
        print(f"{name:36}" + "".join(f"{'-' if cell is None else f'{cell:.3f}':>10}" for cell in cells))
    for seed, figures in results.items():
        for claim in figures["failed_claims"]:
            print(f"seed {seed} FAILS: {claim}")
    if arguments.out:
        versions = json.loads(
            (arguments.workdir / f"seed_{arguments.seeds[0]}" / "report" / "metrics.json").read_text(encoding="utf-8")
        )["versions"]
        record = {
            "command": "python benchmarks/quickstart_seeds.py",
            "date": datetime.date.today().isoformat(),
            "hardware": hardware(),
            "versions": versions,
            "seeds": results,
        }
        arguments.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    sys.exit(any(figures["failed_claims"] for figures in results.values()))


if __name__ == "__main__":
    main()
