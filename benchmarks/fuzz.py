"""100,000 damaged inputs: files of data and checkpoints, settings, command lines; each is read, rejected or refused.

    python benchmarks/fuzz.py
    python benchmarks/fuzz.py --cases 2000 --only tar,image
    python benchmarks/fuzz.py --only tar --repeat 1234        # one case again, with its traceback

`tests/fuzz` has the kinds of inputs and what is done to them. Each kind runs in a process of its own. A case that takes
more than 30 seconds or 2 GB is a fault, and so is every error but the two that the command turns into one line. Ends
with exit code 1 if there are faults. Results go to `benchmarks/results/fuzz_cpu.json`.
"""

import argparse
import collections
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from measure import record

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
RESULTS = Path(__file__).parent / "results" / "fuzz_cpu.json"
PACKAGES = ("rac3", "numpy", "pillow", "pyarrow", "pyyaml", "safetensors", "tokenizers", "torch", "transformers")
SHARES = {  # of the cases: fewer of what takes longer
    **{"tar": 20, "image": 20, "json": 10, "yaml": 8, "torch": 12, "safetensors": 10, "table": 8, "takedowns": 5},
    **{"tokenizer": 3, "clip": 1, "vqgan": 1, "config": 1, "command": 1, "workdir": 1},
}
MEMORY = 2e9  # bytes that the peak may rise in a case
EXAMPLES = 5  # faults of a kind that are listed


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(name: str, cases: int, start: int) -> dict[str, Any]:
    """The cases of one kind, with seeds from `start` on."""
    from fuzz.kinds import KINDS, outcome

    warnings.simplefilter("ignore")
    sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # libraries report damage there
    counts: collections.Counter[str] = collections.Counter(read=0, rejected=0, refused=0, fault=0)
    faults: list[dict[str, Any]] = []
    slowest, most = 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        case = KINDS[name](Path(folder))
        for seed in range(start, start + cases):
            began, before = time.perf_counter(), peak()
            try:
                counts[outcome(case, seed)] += 1
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                counts["fault"] += 1
                where = [
                    f"{frame.name} in {Path(frame.filename).name}"
                    for frame in traceback.extract_tb(error.__traceback__)
                ]
                line = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
                faults.append({"seed": seed, "error": line, "where": where[-1]})
            grown = peak() - before
            if grown > MEMORY:
                counts["fault"] += 1
                faults.append({"seed": seed, "error": f"{grown / 1e9:.1f} GB", "where": ""})
            slowest, most = max(slowest, time.perf_counter() - began), max(most, grown)
    first = {(fault["where"], fault["error"].partition(":")[0]): fault for fault in reversed(faults)}
    return {
        "cases": cases,
        **counts,
        "slowest_s": round(slowest, 2),
        "largest_rise_of_peak_memory_mb": round(most / 1e6),
        "faults": list(first.values())[:EXAMPLES],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000, help="of all kinds together")
    parser.add_argument("--only", default=",".join(SHARES), help="kinds, with commas between them")
    parser.add_argument("--seed", type=int, default=0, help="of the first case of each kind")
    parser.add_argument("--repeat", type=int, help="runs the case with this seed alone")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := set(names) - set(SHARES):
        parser.error(f"--only: {unknown.pop()!r} is unknown; use some of {', '.join(SHARES)}")
    if options.repeat is not None:
        from fuzz.kinds import KINDS, outcome

        with tempfile.TemporaryDirectory() as folder:
            for name in names:
                print(f"{name}: {outcome(KINDS[name](Path(folder)), options.repeat)}")
        return
    whole = sum(SHARES[name] for name in names)
    results: dict[str, Any] = {}
    context = multiprocessing.get_context("spawn")
    # A new process for each kind, so that one that a case kills is only missing from the results of its own kind.
    with ProcessPoolExecutor(os.cpu_count(), context, max_tasks_per_child=1) as pool:
        jobs = {pool.submit(run, name, -(-options.cases * SHARES[name] // whole), options.seed): name for name in names}
        for job in as_completed(jobs):
            found = results[jobs[job]] = job.result()
            print(
                f"{jobs[job]:<12}",
                *(f"{found[key]:>7} {key}" for key in ("cases", "read", "rejected", "refused", "fault")),
            )
            for fault in found["faults"]:
                print(
                    f"    --only {jobs[job]} --repeat {fault['seed']}: {fault['error']} ({fault['where']})", flush=True
                )
    ordered = {name: results[name] for name in names}
    command = f"python benchmarks/fuzz.py --cases {options.cases} --seed {options.seed}"
    total = {
        key: sum(each[key] for each in ordered.values()) for key in ("cases", "read", "rejected", "refused", "fault")
    }
    options.out.write_text(record(command, PACKAGES, ordered, total=total), encoding="utf-8")
    print(json.dumps(total))
    sys.exit(1 if total["fault"] else 0)


if __name__ == "__main__":
    main()
