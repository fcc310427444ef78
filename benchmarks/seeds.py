"""Shared by the benchmarks that check claims with several seeds: runs a config once per seed, in its own process."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from measure import record

PACKAGES = ("rac3", "jax", "flax", "numpy", "tensorstore", "array-record", "scann")
COSTS = ("wall_seconds", "cpu_seconds", "peak_gb")

Figures = dict[str, Any]
Claims = Mapping[str, Callable[[Figures], bool]]


def parser(doc: str, seeds: Sequence[int]) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--workdir", type=Path, required=True, help="takes a workdir for each seed")
    made.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    made.add_argument("--out", type=Path, help="takes all figures, as JSON")
    return made


def run(config: str, seed: int, workdir: Path, options: Sequence[str] = ()) -> tuple[dict[str, Any], Figures]:
    """Runs the config, or goes on with it: `metrics.json` of its report, and what it took.

    Args:
      config: the text of the config file.
      options: further ones of `rac3 run`.

    Returns:
      The cost is that of the process that did all of the work, of the same config and options; None where several
      processes shared it.

    Raises:
      SystemExit: the run failed, with code 2.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path, folder, costs = (workdir / f"seed_{seed}{end}" for end in (".py", "", "_cost.json"))
    fresh = not folder.exists()
    path.write_text(config, encoding="utf-8")
    command = [str(Path(sys.executable).with_name("rac3")), "run", str(path), "--workdir", str(folder), *options]
    started = time.monotonic()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        print(f"seed {seed}: the run failed with status {process.returncode}", file=sys.stderr)
        sys.exit(2)
    whose = [config, *options]
    if fresh:
        spent = (time.monotonic() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e6)
        cost = {name: round(value, 2) for name, value in zip(COSTS, spent, strict=True)}
        costs.write_text(json.dumps({"whose": whose, "cost": cost}), encoding="utf-8")
    metrics = json.loads((folder / "report" / "metrics.json").read_text(encoding="utf-8"))
    kept = json.loads(costs.read_text(encoding="utf-8")) if costs.exists() else {}
    return metrics, kept["cost"] if kept.get("whose") == whose else dict.fromkeys(COSTS)


def lookup(metrics: Mapping[str, Any], name: str) -> Any:
    """The value at `ra_cm3.perplexity.image` of nested mappings; None where there is no such thing."""
    value: Any = metrics
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def failed(claims: Claims, figures: Figures) -> list[str]:
    """The claims that do not hold, or whose figures are missing."""
    return [claim for claim, holds in claims.items() if not _holds(holds, figures)]


def _holds(holds: Callable[[Figures], bool], figures: Figures) -> bool:
    try:
        return holds(figures)
    except TypeError:  # of a comparison with None
        return False


def conclude(command: str, results: Mapping[str, Figures], names: Sequence[str], out: Path | None) -> None:
    """Prints a table of `names` by seed and the claims that fail, writes all figures, and exits: 1 if a claim fails."""
    width = max(map(len, names)) + 2
    print(f"{'':{width}}" + "".join(f"{'seed ' + seed:>10}" for seed in results))
    for name in names:
        cells = [figures[name] for figures in results.values()]
        print(f"{name:{width}}" + "".join(f"{'-' if cell is None else f'{cell:.3f}':>10}" for cell in cells))
    for seed, figures in results.items():
        for claim in figures["failed_claims"]:
            print(f"seed {seed} FAILS: {claim}")
    if out:
        out.write_text(record(command, PACKAGES, results), encoding="utf-8")
    sys.exit(any(figures["failed_claims"] for figures in results.values()))
