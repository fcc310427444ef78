"""Few-shot classification by finished runs: accuracy by k, and whether RA-CM3 passes the claims.

    python benchmarks/few_shot.py WORKDIR [WORKDIR ...] [--out FILE.json]

Measures as `rac3 evaluate --task few-shot` does, on the held-out splits of each workdir. The claims are of the test
split's entities, which were not trained on, when each label is judged after its own demonstrations (`apart`): accuracy
with the fewest demonstrations and with the most, and that it is above that of both CM3. Exit code 1 if a claim fails.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from measure import record
from seeds import PACKAGES, failed

import rac3
from rac3.report.few_shot import few_shot_summary
from rac3.stages.evaluate import comparisons
from rac3.stages.evaluate_few_shot import evaluate_few_shot

Metrics = Mapping[str, Mapping[str, Any]]  # of each model, by split


def _by_k(metrics: Metrics, model: str) -> list[float]:
    return [*metrics[model]["test"]["apart"].values()]


CLAIMS = {
    "with one demonstration of each label RA-CM3 is right in at least 80%": lambda m: _by_k(m, "ra_cm3")[0] >= 0.8,
    "with the most of them in at least 92%": lambda m: _by_k(m, "ra_cm3")[-1] >= 0.92,
    "more of them never make it worse": lambda m: _by_k(m, "ra_cm3") == sorted(_by_k(m, "ra_cm3")),
    "for every k it is better than CM3": lambda m: all(
        ours > theirs
        for model in {"cm3", *m} - {"ra_cm3"}
        for ours, theirs in zip(_by_k(m, "ra_cm3"), _by_k(m, model), strict=True)
    ),
}


def measured(workdir: Path) -> dict[str, Any]:
    """The metrics of each model of a workdir, made or read."""
    runs = {run.model_name: run for run in comparisons(rac3.load(workdir)).values()}
    if not {"ra_cm3", "cm3"} <= runs.keys():
        raise SystemExit(f"{workdir} has {', '.join(runs)}; the claims are of RA-CM3 next to CM3")
    metrics = {name: evaluate_few_shot(run) for name, run in runs.items()}
    if not metrics["ra_cm3"]["test"]["questions"]:
        raise SystemExit(f"{workdir} has no entity with images both in the test split and in the memory")
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdirs", type=Path, nargs="+", metavar="WORKDIR", help="finished runs")
    parser.add_argument("--out", type=Path, help="takes all figures, as JSON")
    options = parser.parse_args()
    results = {}
    for workdir in options.workdirs:
        metrics = measured(workdir)
        results[workdir.name] = metrics | {"failed_claims": failed(CLAIMS, metrics)}
        print(f"{workdir.name}\n{few_shot_summary(metrics)}")
    for name, figures in results.items():
        for claim in figures["failed_claims"]:
            print(f"{name} FAILS: {claim}")
    if options.out:
        names = " ".join(results)
        options.out.write_text(record(f"python benchmarks/few_shot.py {names}", PACKAGES, results), encoding="utf-8")
    sys.exit(any(figures["failed_claims"] for figures in results.values()))


if __name__ == "__main__":
    main()
