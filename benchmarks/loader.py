"""The training loader: tokens per second on one core, start-up, memory, stalls and the share of real tokens.

    python benchmarks/loader.py --rounds 5
    python benchmarks/loader.py --only start

Synthetic documents of the paper's shape: a caption of some 30 ids and an image of 1,024, K in {0, 1, 2}. 10,000 of
them are distinct; a larger store repeats them by links to the same files. So what is read is in the page cache, and
times are those of the processor, not of disks. All runs on one core. Results go to
`benchmarks/results/loader_cpu.json`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from measure import interleaved, ratio, record

from rac3.artifacts.arrays import Rows, create_array, write_shard
from rac3.batches.groups import GroupBuilder
from rac3.batches.loader import BatchConfig, BatchStream, StreamState
from rac3.batches.packing import PackedBatch
from rac3.documents.document import Document, Image, Text
from rac3.documents.store import NARROW, DocumentStore, TokenizedDocument, pack_ids
from rac3.tokens.vocabulary import Vocabulary

RESULTS = Path(__file__).parent / "results" / "loader_cpu.json"
PACKAGES = ("rac3", "grain", "array-record", "numpy", "tensorstore")
VOCABULARY = Vocabulary(50_272, 8192)
SHARD = 10_000  # documents that are distinct
NEIGHBORS_SHARD = 65_536
QUERIES, DEPTH = 2, 8
TOKENS = 2**21  # of one pass of a timed loop, including padding


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["speed", "start", "stalls", "share"])
    parser.add_argument("--start-of", type=Path, help=argparse.SUPPRESS)  # one measurement, in its own process
    options = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if options.start_of:
        print(json.dumps(start(options.start_of)))
        return
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))["results"] if options.only else {}
    with tempfile.TemporaryDirectory() as folder:
        measures: dict[str, Callable[[], Any]] = {
            "speed": lambda: speed(write_store(Path(folder) / "small", 2 * SHARD), options.rounds),
            "start": lambda: starts(Path(folder)),
            "stalls": lambda: stalls(write_store(Path(folder) / "stalls", 1_000_000)),
            "share": lambda: shares(write_store(Path(folder) / "share", 1_000_000)),
        }
        for name, measure in measures.items():
            if options.only in (None, name):
                results[name] = measure()
                print(name, json.dumps(results[name], indent=2))
    RESULTS.write_text(record("python benchmarks/loader.py", PACKAGES, results, cores_used=1), encoding="utf-8")


# A store of synthetic documents.


def write_store(folder: Path, documents: int) -> Path:
    """Documents and neighbors. Files of all shards are links to those of the first."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    items = [synthetic(rng) for _ in range(SHARD)]
    packed = [pack_ids(item, NARROW) for item in items]
    (folder / "000000.u2").write_bytes(b"".join(packed))
    shards = documents // SHARD
    for number in range(1, shards):
        os.link(folder / "000000.u2", folder / f"{number:06d}.u2")
    sizes = np.array([len(each) for each in packed])
    ends = np.cumsum(np.tile(sizes, shards))
    np.save(folder / "id_starts.npy", np.concatenate([[0], ends]))
    np.save(folder / "id_shards.npy", np.arange(shards) * sizes.sum())
    lengths = np.array([sum(map(len, item.ids)) + 4 for item in items], np.int32)
    np.save(folder / "lengths.npy", np.tile(lengths, shards))
    shape = (documents, QUERIES, DEPTH)
    array = create_array(folder / "ids", shape, "int64", NEIGHBORS_SHARD, 16 * 2**10)
    first = min(NEIGHBORS_SHARD, documents)
    write_shard(array, 0, rng.integers(0, documents, (first, QUERIES, DEPTH)))
    for number in range(1, -(-documents // NEIGHBORS_SHARD)):
        path = folder / "ids" / "c" / str(number) / "0" / "0"
        path.parent.mkdir(parents=True)
        os.link(folder / "ids" / "c" / "0" / "0" / "0", path)
    return folder


def synthetic(rng: np.random.Generator) -> TokenizedDocument:
    text = rng.integers(0, 50_272, 1 + rng.poisson(29)).astype(np.int32)
    image = rng.integers(0, 8192, 1024).astype(np.int32)
    return TokenizedDocument(Document("0", (Text("x"), Image(b"x")), {}), (text, image))


def stream(folder: Path, row_length: int, rows: int, hosts: int = 1, read_threads: int = 1) -> BatchStream:
    config = BatchConfig(row_length=row_length, rows=rows, read_threads=read_threads)
    builder = GroupBuilder(VOCABULARY, config.masking, config.retrieved_weight)
    return BatchStream(config, 0, DocumentStore(folder), Rows(folder / "ids"), builder, hosts)


# Tokens per second.


def speed(folder: Path, rounds: int) -> dict[str, Any]:
    """Ours against grain alone, which reads the same ids, a document at a time, and builds nothing.

    `grain` reads our files; `grain, array_record` the same bytes as records of `array_record` files. Where other
    programs share the core, seconds of its time are what can be compared.
    """
    made = {row: stream(folder, row, TOKENS // row // 8).batches(StreamState()) for row in (4096, 16_384)}
    bare = {"grain": _OurFiles(folder), "grain, array_record": _records(folder)}
    documents = TOKENS // 1058
    passes: dict[str, Callable[[], int]] = {
        f"rows of {row}": partial(_batches, batches, 8) for row, batches in made.items()
    }
    passes |= {name: partial(_bare, source, documents) for name, source in bare.items()}
    real = {name: each() for name, each in passes.items()}
    busy: dict[str, list[float]] = {name: [] for name in passes}

    def watched(name: str) -> int:
        started = time.process_time()
        read = passes[name]()
        busy[name].append(time.process_time() - started)
        return read

    times = interleaved({name: partial(watched, name) for name in passes}, rounds)
    busy = {name: each[1:] for name, each in busy.items()}  # without the first, as the others
    found: dict[str, Any] = {}
    for what, seconds in (("tokens_per_second", times), ("tokens_per_cpu_second", busy)):
        rates = {name: [real[name] / each for each in seconds[name]] for name in passes}
        found[what] = {
            name: {"median": round(statistics.median(each)), "min": round(min(each)), "max": round(max(each))}
            for name, each in rates.items()
        }
        found[f"{what}, times grain's"] = {
            name: {peer: ratio(rates[name], rates[peer]) for peer in bare} for name in rates if name not in bare
        }
    return found


def _batches(batches: Iterator[tuple[PackedBatch, StreamState]], count: int) -> int:
    return sum(int((batch.segments > 0).sum()) for batch, _ in islice(batches, count))


class _OurFiles:
    """The bytes of the ids of each document, as training reads them."""

    def __init__(self, folder: Path) -> None:
        self.store = DocumentStore(folder)

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> Any:
        return self.store.tokens(int(index))


def _records(folder: Path) -> Any:
    from array_record.python.array_record_module import ArrayRecordWriter
    from grain.sources import ArrayRecordDataSource

    path, source = folder / "ids.array_record", DocumentStore(folder)
    writer = ArrayRecordWriter(str(path), "group_size:1")
    data, starts = (folder / "000000.u2").read_bytes(), source.column("id_starts")[: SHARD + 1].tolist()
    for start, stop in pairwise(starts):
        writer.write(data[start:stop])
    writer.close()
    return ArrayRecordDataSource([str(path)])


def _bare(source: Any, documents: int) -> int:
    import grain

    shuffled = grain.MapDataset.source(source).shuffle(seed=0)[:documents]
    for _ in shuffled.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=16)):
        pass
    return documents * 1058


# Start-up and memory.


def starts(folder: Path) -> list[dict[str, Any]]:
    """Of the paper's batches, as one of 32 hosts; each in its own process."""
    found = []
    for documents in (1_000_000, 10_000_000):
        path = write_store(folder / str(documents), documents)
        runs = []
        for _ in range(3):
            command = [sys.executable, __file__, "--start-of", str(path)]
            runs.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        median = {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}
        found.append({"documents": documents, **median})
    return found


def start(folder: Path) -> dict[str, float]:
    """Seconds to open the stream, to plan a block, and to the first batch; megabytes that the process grew by."""
    warm = stream(folder, 16_384, 8)
    warm.row(warm.plan(0), 0)  # imports, and the first calls of libraries
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak is counted from here
    before = _peak_bytes()
    started = time.perf_counter()
    made = stream(folder, 16_384, 1024, hosts=32)
    opened = time.perf_counter()
    batches = made.batches(StreamState())
    next(batches)
    first = time.perf_counter()
    grown = _peak_bytes() - before
    del batches
    planning = time.perf_counter()
    plan = made.plan(123_456)
    planned = time.perf_counter() - planning
    return {
        "open_seconds": opened - started,
        "first_batch_seconds": first - started,
        "plan_seconds": planned,
        "groups_of_a_block": float(sum(map(len, plan.rows))),
        "peak_megabytes": grown / 1e6,
    }


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


# Stalls.


def stalls(folder: Path) -> dict[str, Any]:
    """Waits for batches over three blocks: as fast as they come, and with pauses of twice that time."""
    made = stream(folder, 16_384, 32, read_threads=4)
    count = 3 * made.block_batches
    batches = made.batches(StreamState())
    list(islice(batches, 8))
    flat = _waits(batches, count, 0.0)
    pace = 2 * sum(flat) / count
    paced = _waits(batches, count, pace)
    return {
        "batches_of_a_block": made.block_batches,
        "batches": count,
        "as_fast_as_they_come": {"mean_ms": round(1e3 * sum(flat) / count, 1), "max_ms": round(1e3 * max(flat), 1)},
        "with_a_pause": {"pause_ms": round(1e3 * pace, 1), "max_wait_ms": round(1e3 * max(paced), 1)},
    }


def _waits(batches: Iterator[Any], count: int, pace: float) -> list[float]:
    waits = []
    for _ in range(count):
        started = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - started)
        time.sleep(pace)
    return waits


# Padding.


def shares(folder: Path) -> dict[str, float]:
    """Real tokens of all, over the first block of rows of each length."""
    found = {}
    for row in (4096, 16_128, 16_384, 32_768):
        plan = stream(folder, row, 1024).plan(0)
        real = sum(int(plan.groups.lengths[groups].sum()) for groups in plan.rows)
        found[str(row)] = round(real / (len(plan.rows) * row), 4)
    return found


if __name__ == "__main__":
    main()
