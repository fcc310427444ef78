"""100,000 damaged inputs: files of data and checkpoints, settings, command lines; each is read, rejected or refused.

    python benchmarks/fuzz.py
    python benchmarks/fuzz.py --cases 2000 --only tar,image
    python benchmarks/fuzz.py --only tar --repeat 1234        # one case again, with its traceback

`tests/fuzz` has the kinds of inputs and what is done to them. Each kind runs in its own process. A case that takes
more than 30 seconds of a processor, or 2 GB, is a fault, and so is every error but the two that the command turns into
one line. Ends with exit code 1 if there are faults. Results go to `benchmarks/results/fuzz_cpu.json`.
"""

import argparse
import collections
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
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
STUCK = 180  # seconds after a case without another one, after which a process is ended


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work(name: str, seeds: Iterable[int], log: Path) -> None:
    """Runs the cases of one kind, and writes a line of JSON for each."""
    from fuzz.kinds import KINDS, outcome

    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder, log.open("a", encoding="utf-8", buffering=1) as lines:
        case = KINDS[name](Path(folder))
        for seed in seeds:
            began, before = time.perf_counter(), peak()
            found: dict[str, Any] = {"seed": seed}
            try:
                found["outcome"] = outcome(case, seed)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                frame = traceback.extract_tb(error.__traceback__)[-1]
                line = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
                found |= {"outcome": "fault", "error": line, "where": f"{frame.name} in {Path(frame.filename).name}"}
            found |= {"seconds": time.perf_counter() - began, "bytes": peak() - before}
            if found["bytes"] > MEMORY:
                found |= {"outcome": "fault", "error": f"{found['bytes'] / 1e9:.1f} GB", "where": ""}
            lines.write(json.dumps(found) + "\n")


def run(name: str, cases: int, start: int) -> dict[str, Any]:
    """The cases of one kind, in their own processes: a case that ends its process, or hangs, is a fault too."""
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        while len(found) < cases:
            log = Path(folder) / "log"
            log.write_text("")
            first = start + len(found)
            command = [sys.executable, __file__, "--work", name, str(first), str(start + cases), str(log)]
            with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
                while process.poll() is None:
                    time.sleep(1)
                    if log.stat().st_size and time.time() - log.stat().st_mtime > STUCK:
                        process.kill()
            found += map(json.loads, log.read_text().splitlines())
            if len(found) < cases:
                line = f"the process ended with code {process.returncode}"
                fault = {"outcome": "fault", "error": line, "where": "", "seconds": 0, "bytes": 0}
                found.append({"seed": start + len(found), **fault})
    counts = collections.Counter(each["outcome"] for each in found)
    faults = [each for each in reversed(found) if each["outcome"] == "fault"]
    kinds = {(each["where"], each["error"].partition(":")[0]): each for each in faults}
    return {
        "cases": cases,
        **{key: counts[key] for key in ("read", "rejected", "refused", "fault")},
        "slowest_s": round(max(each["seconds"] for each in found), 2),
        "largest_rise_of_peak_memory_mb": round(max(each["bytes"] for each in found) / 1e6),
        "faults": [{key: each[key] for key in ("seed", "error", "where")} for each in kinds.values()][:EXAMPLES],
    }


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        name, first, end, log = sys.argv[2:]
        work(name, range(int(first), int(end)), Path(log))
        return
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
    with ThreadPoolExecutor(os.cpu_count()) as pool:
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
    command = f"python benchmarks/fuzz.py --cases {options.cases} --only {options.only} --seed {options.seed}"
    total = {
        key: sum(each[key] for each in ordered.values()) for key in ("cases", "read", "rejected", "refused", "fault")
    }
    options.out.write_text(record(command, PACKAGES, ordered, total=total), encoding="utf-8")
    print(json.dumps(total))
    sys.exit(1 if total["fault"] else 0)


if __name__ == "__main__":
    main()
