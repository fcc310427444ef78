"""The retrievers against FAISS: the same vectors, queries and cores, in interleaved runs.

    python benchmarks/retrieval.py [--only PART ...] [--rounds 5] [--kinds clip clusters] [--json FILE] [--small]

Needs the extra `faiss`. The parts, which can run separately:

    exact        `exact` in float32 and bfloat16 against FAISS Flat, and NumPy's product of the same matrices
    approximate  `scann`, and FAISS's IVF of 4-bit codes with refinement, each at the cheapest setting of a grid that
                 finds 99% of the true ten nearest, against each other and FAISS Flat
    memory       size of a `scann` index relative to the float32 vectors, by `reorder_dtype`, and its speed
    selection    `select`: 16 candidates per document, depth 8, with the vectors in memory and on disk
    growth       `exact`, `scann` and FAISS Flat over 10,000, 100,000 and 1,000,000 documents (`--growth-sizes`)

Our retrievers run as in rac3: `build` into a folder, `open`, `Index.search`. FAISS's IVF is our `faiss` retriever;
FAISS Flat is `IndexFlatIP.search` itself. All threads of all libraries run on the cores of this process; the machine
should be otherwise idle. Prints medians over interleaved rounds, with the extremes.

The vectors are synthetic, 768 wide, of norm 1, drawn from a fixed seed:

    clusters  a mixture of 1,000 Gaussians, for documents and queries
    clip      like CLIP images with texts as queries: all in a narrow cone around a common mean (the cosine of two
              documents is about 0.5, of two in the same of 1,000 clusters 0.9), mostly along few directions (the
              deviation along the i-th falls as i**-0.5), randomly rotated; a query is a document with noise, in its own
              cone (the cosine to a document is about 0.15)
"""

import argparse
import gc
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from measure import interleaved, ratio, record, seconds

from rac3.artifacts.arrays import Vectors
from rac3.retrieval.exact import Exact
from rac3.retrieval.faiss import Faiss
from rac3.retrieval.memory import Memory, MemoryPart
from rac3.retrieval.retriever import Index, Queries, Retriever
from rac3.retrieval.scann import Scann
from rac3.retrieval.selection import Selected, Selection, select

PACKAGES = ("rac3", "jax", "jaxlib", "numpy", "scann", "faiss-cpu", "tensorstore")
K = 10
RECALL = 0.99
REORDER_DTYPES = ("float32", "bfloat16", "int8", "none")

Row = dict[str, Any]


class Sizes(NamedTuple):
    documents: int
    queries: int
    width: int
    growth: tuple[int, ...]
    selected: int  # queries of `select`
    shard_rows: int  # of vectors on disk


FULL = Sizes(100_000, 1000, 768, (10_000, 100_000, 1_000_000), 100_000, 10_000)
SMALL = Sizes(21_000, 200, 64, (1000, 21_000), 2000, 10_000)


class Data(NamedTuple):
    kind: str
    documents: np.ndarray
    queries: np.ndarray

    @property
    def part(self) -> MemoryPart:
        return part_of(self.documents)

    @property
    def asked(self) -> Queries:
        return Queries([""] * len(self.queries), self.queries, [""] * len(self.queries))


def part_of(vectors: Any) -> MemoryPart:
    rng = np.random.default_rng(1)
    hashes = tuple(rng.integers(1, 2**63, len(vectors), np.uint64) for _ in range(2))  # no two documents are copies
    return MemoryPart("train", vectors, [""] * len(vectors), hashes=hashes)


def unit(rows: np.ndarray) -> np.ndarray:
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def data_of(kind: str, documents: int, queries: int, width: int) -> Data:
    make = {"clusters": clusters, "clip": clip_like}[kind]
    return Data(kind, *make(np.random.default_rng(0), documents, queries, width))


def clusters(rng: np.random.Generator, documents: int, queries: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    centers = rng.standard_normal((1000, width), np.float32)

    def draw(size: int) -> np.ndarray:
        rows = rng.standard_normal((size, width), np.float32)
        rows += centers[rng.integers(0, len(centers), size)]
        return unit(rows)

    return draw(documents), draw(queries)


def clip_like(rng: np.random.Generator, documents: int, queries: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    deviations = np.arange(1, width + 1, dtype=np.float32) ** -0.5
    deviations /= np.linalg.norm(deviations)
    rotation = np.linalg.qr(rng.standard_normal((width, width)))[0].astype(np.float32)
    document_mean = rotation[-1]  # almost no content lies along it; else a few documents would be near all queries
    query_mean = 0.35 * document_mean + 0.94 * rotation[-2]
    centers = rng.standard_normal((1000, width), np.float32) * (deviations * np.float32(0.75**0.5))

    def draw(size: int) -> np.ndarray:
        """The content of documents or queries: vectors of norm about 1."""
        rows = rng.standard_normal((size, width), np.float32) * (deviations * np.float32(0.25**0.5))
        rows += centers[rng.integers(0, len(centers), size)]
        return rows

    content = draw(documents)
    about = content[rng.integers(0, documents, queries)] + 0.5 * draw(queries)
    found = np.empty_like(content)
    for start in range(0, documents, 65_536):  # all at once would hold a million rows three times
        found[start : start + 65_536] = content[start : start + 65_536] @ rotation
    found += document_mean
    return unit(found), unit(about @ rotation + query_mean)


def built(retriever: Retriever, part: MemoryPart, folder: Path) -> tuple[Path, float]:
    """Build an index into a new folder; returns the folder and the seconds it took."""
    folder = Path(tempfile.mkdtemp(dir=folder))
    return folder, seconds(lambda: retriever.build(part, folder))


def search_of(index: Index, queries: Queries) -> Callable[[], Any]:
    return lambda: index.search(queries, K)


def flat_of(documents: np.ndarray) -> Any:
    import faiss

    index = faiss.IndexFlatIP(documents.shape[1])
    index.add(documents)
    return index


def flat_search_of(flat: Any, queries: np.ndarray) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    return lambda: flat.search(queries, K)


def product_of(data: Data) -> Callable[[], None]:
    """Computes all scores, in blocks that stay in the cache, without selecting any."""
    scores = np.empty((len(data.queries), 1024), np.float32)

    def product() -> None:
        for start in range(0, len(data.documents), scores.shape[1]):
            block = data.documents[start : start + scores.shape[1]]
            np.matmul(data.queries, block.T, out=scores[:, : len(block)])

    return product


def recall(found: tuple[np.ndarray, np.ndarray], true: tuple[np.ndarray, np.ndarray]) -> float:
    """The share of the true neighbors that were found."""
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found[1], true[1], strict=True)]))


def rate_row(name: str, data: Data, times: dict[str, list[float]], case: str, **more: Any) -> Row:
    """Queries per second of a case, and its speed relative to FAISS Flat."""
    size = len(data.queries)
    row = {"row": name, "case": case, "documents": len(data.documents), "kind": data.kind}
    row["queries_per_second"] = {
        "median": round(size / statistics.median(times[case]), 1),
        "min": round(size / max(times[case]), 1),
        "max": round(size / min(times[case]), 1),
    }
    if "flat" in times:
        row["over_flat"] = ratio(times["flat"], times[case])
    return show({**row, **more})


def show(row: Row) -> Row:
    """Print a row of the table, and return it."""

    def text(value: Any) -> str:
        if isinstance(value, dict) and "median" in value:
            return f"{value['median']:g} ({value['min']:g} to {value['max']:g})"
        if isinstance(value, dict):
            return " ".join(f"{name}={text(field)}" for name, field in value.items())
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    head = " ".join(f"{text(row[name]):12}" for name in ("row", "kind", "case") if name in row)
    rest = [f"{name} {text(value)}" for name, value in row.items() if name not in ("row", "kind", "case")]
    print(head, " | ".join(rest), sep="  ", flush=True)
    return row


def exact(sizes: Sizes, kinds: Sequence[str], rounds: int, folder: Path) -> Iterator[Row]:
    for kind in kinds:
        data = data_of(kind, sizes.documents, sizes.queries, sizes.width)
        flat = flat_search_of(flat_of(data.documents), data.queries)
        indexes = {f"exact {dtype}": Exact(dtype=dtype).open(data.part, folder) for dtype in ("float32", "bfloat16")}
        calls = {name: search_of(index, data.asked) for name, index in indexes.items()}
        times = interleaved({**calls, "flat": flat, "product": product_of(data)}, rounds)
        flops = 2 * data.documents.size * len(data.queries)
        for case in times:
            more: Row = {"gflops": round(flops / statistics.median(times[case]) / 1e9, 1)}
            if case in calls:
                more["recall"] = recall(calls[case](), flat())
            yield rate_row("exact", data, times, case, **more)


class Grid(NamedTuple):
    """A retriever that is built once and searched with every pair of two efforts."""

    retriever: Any
    setting: Callable[[int, int], dict[str, Any]]  # the fields of the retriever: leaves searched, candidates reordered
    candidates: tuple[int, ...]


class Found(NamedTuple):
    """The cheapest setting that reaches `RECALL`."""

    index: Index
    setting: dict[str, Any]
    recall: float
    seconds: float


LEAVES_SEARCHED = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


def grids(sizes: Sizes) -> dict[str, Grid]:
    width = sizes.width

    def scann(searched: int, reordered: int) -> dict[str, Any]:
        return {"num_leaves_to_search": searched, "reorder_num_neighbors": reordered}

    def faiss(searched: int, factor: int) -> dict[str, Any]:
        return {"search": f"nprobe={searched},k_factor_rf={factor}"}

    candidates = (20, 30, 40, 60, 80, 120, 160, 240, 320)
    found = {}
    for leaves in (round(sizes.documents**0.5), round(3 * sizes.documents**0.5)):
        for block in (2, 4):
            retriever = Scann(num_neighbors=K, num_leaves=leaves, dimensions_per_block=block)
            found[f"scann {leaves} leaves, {block} per code"] = Grid(retriever, scann, candidates)
        for codes in (f"PQ{width // 2}x4fs", f"PQ{width // 4}x4fsr"):
            factory = f"IVF{leaves},{codes},RFlat"
            factors = tuple(number // K for number in candidates)
            found[f"faiss {factory}"] = Grid(Faiss(num_neighbors=K, factory=factory), faiss, factors)
    return found


def cheapest(grid: Grid, data: Data, folder: Path, true: np.ndarray) -> Found | None:
    """The setting that is fastest, by the best of three calls; None if none reaches the recall."""
    part, best = data.part, None

    def tried(searched: int, reordered: int) -> Found:
        setting = grid.setting(searched, reordered)
        index = replace(grid.retriever, **setting).open(part, folder)
        reached = recall(index.search(data.asked, K), true)
        times = [seconds(search_of(index, data.asked)) for _ in range(3)] if reached >= RECALL else [math.inf]
        return Found(index, setting, reached, min(times))

    for searched in LEAVES_SEARCHED:
        if tried(searched, grid.candidates[-1]).recall < RECALL:
            continue
        enough = next(found for n in grid.candidates if (found := tried(searched, n)).recall >= RECALL)
        if best is not None and enough.seconds > 1.5 * best.seconds:
            break
        best = enough if best is None or enough.seconds < best.seconds else best
    return best


def approximate(sizes: Sizes, kinds: Sequence[str], rounds: int, folder: Path) -> Iterator[Row]:
    for kind in kinds:
        data = data_of(kind, sizes.documents, sizes.queries, sizes.width)
        flat = flat_search_of(flat_of(data.documents), data.queries)
        true, found, build = flat(), {}, {}
        for name, grid in grids(sizes).items():
            where, build[name] = built(grid.retriever, data.part, folder)
            best = cheapest(grid, data, where, true)
            if best is None:
                yield show({"row": "approximate", "kind": kind, "case": name, "recall": f"below {RECALL}"})
            else:
                found[name] = best
        calls = {name: search_of(best.index, data.asked) for name, best in found.items()}
        times = interleaved({**calls, "flat": flat}, rounds)
        peers = [name for name in found if name.startswith("faiss")]
        peer = min(peers, key=lambda name: statistics.median(times[name])) if peers else None
        for name, best in found.items():
            more: Row = {"recall": round(best.recall, 4), "setting": best.setting}
            if peer is not None:
                more["over_best_faiss"] = ratio(times[peer], times[name])
            yield rate_row("approximate", data, times, name, **more, build_seconds=round(build[name], 1))


def memory(sizes: Sizes, kinds: Sequence[str], rounds: int, folder: Path) -> Iterator[Row]:
    """One index per `reorder_dtype`, and one over four times as many documents, which shows what does not grow.

    Resident memory is that of a process that opens the index over vectors on disk.
    """
    data = data_of(kinds[0], sizes.documents, sizes.queries, sizes.width)
    flat = flat_search_of(flat_of(data.documents), data.queries)
    calls, taken = {}, {}
    for dtype in REORDER_DTYPES:
        where, share, retriever = stored(data, dtype, sizes, folder)
        case = f"scann {dtype}"
        taken[case] = share
        calls[case] = search_of(retriever.open(data.part, where), data.asked)
        if dtype == "none":
            vectors = Vectors(where.parent / "vectors")
            calls[f"{case}, on disk"] = search_of(retriever.open(part_of(vectors), where), data.asked)
    times, true = interleaved({**calls, "flat": flat}, rounds), flat()
    for case, call in calls.items():
        more: Row = {"recall": round(recall(call(), true), 4)}
        if case in taken:
            more["share_of_float32"] = taken[case]
        yield rate_row("memory", data, times, case, **more)
    del flat, calls
    larger = data_of(kinds[0], 4 * sizes.documents, sizes.queries, sizes.width)
    _, share, _ = stored(larger, "none", sizes, folder)
    row: Row = {"row": "memory", "kind": larger.kind, "case": "scann none", "documents": len(larger.documents)}
    yield show({**row, "share_of_float32": share})


def stored(data: Data, dtype: Any, sizes: Sizes, folder: Path) -> tuple[Path, dict[str, float], Scann]:
    """A `scann` index next to its vectors on disk, and its sizes as shares of theirs."""
    folder = Path(tempfile.mkdtemp(dir=folder))
    on_disk(data.documents, folder / "vectors", sizes.shard_rows)
    np.save(folder / "queries.npy", data.queries)
    leaves = round(len(data.documents) ** 0.5)
    retriever = Scann(num_neighbors=K, num_leaves=leaves, reorder_dtype=dtype)
    where, _ = built(retriever, data.part, folder)
    disk = sum(file.stat().st_size for file in where.iterdir())
    opened, searched = resident(dtype, leaves, where, folder)
    taken = {"disk": disk, "opened": opened, "searched": searched}
    return where, {name: round(size / data.documents.nbytes, 3) for name, size in taken.items()}, retriever


def on_disk(vectors: np.ndarray, path: Path, shard_rows: int) -> Vectors:
    stored = Vectors.create(path, vectors.shape, "float32", shard_rows)
    for number, start in enumerate(range(0, len(vectors), shard_rows)):
        stored.write_shard(number, vectors[start : start + shard_rows])
    return Vectors(path)


def resident(dtype: str, leaves: int, index: Path, folder: Path) -> tuple[int, int]:
    """Growth of a new process's resident memory, in bytes, when it opens an index, and when it has searched."""
    arguments = ["--opened", str(folder), str(index), dtype, str(leaves)]
    output = subprocess.run([sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    opened, searched = output.stdout.split()
    return int(opened), int(searched)


def report_resident(folder: Path, index: Path, dtype: str, leaves: int) -> None:
    """Measure and print it, in the new process. Searches a small part first, so that all libraries are initialized."""
    part = part_of(Vectors(folder / "vectors"))
    asked = np.load(folder / "queries.npy")
    queries = Queries([""] * len(asked), asked, [""] * len(asked))
    retriever = Scann(num_neighbors=K, num_leaves=leaves, reorder_dtype=dtype)
    small = replace(retriever, num_leaves=20)
    with tempfile.TemporaryDirectory() as temporary:
        first = part_of(part.read(slice(0, 1000)))
        small.build(first, Path(temporary))
        small.open(first, Path(temporary)).search(queries, K)
    before = resident_bytes()
    opened = retriever.open(part, index)
    after = resident_bytes()
    opened.search(queries, K)
    print(after - before, resident_bytes() - before)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def selection(sizes: Sizes, kinds: Sequence[str], rounds: int, folder: Path) -> Iterator[Row]:
    for kind in kinds:
        data = data_of(kind, sizes.documents, sizes.selected, sizes.width)
        retriever = Scann(num_neighbors=16, num_leaves=round(sizes.documents**0.5))
        where, _ = built(retriever, data.part, folder)
        _, ids = retriever.open(data.part, where).search(data.asked, 16)
        stored = on_disk(data.documents, where / "vectors", sizes.shard_rows)
        calls = {
            "in memory": select_of(data.queries, ids, Memory((data.part,))),
            "on disk": select_of(data.queries, ids, Memory((part_of(stored),))),
        }
        times = interleaved(calls, rounds)
        kept = int((calls["in memory"]().ids >= 0).sum()) / len(ids)
        for case in times:
            yield rate_row("selection", data, times, case, selected_per_query=kept)


def select_of(queries: np.ndarray, ids: np.ndarray, memory: Memory) -> Callable[[], Selected]:
    """Treats the second best candidate as the main document, so that there is one to skip."""
    return lambda: select(Selection(depth=8), queries, ids, memory, ids[:, 1])


def growth(sizes: Sizes, kinds: Sequence[str], rounds: int, folder: Path) -> Iterator[Row]:
    for size in sizes.growth:
        data = data_of(kinds[0], size, sizes.queries, sizes.width)
        scann = Scann(num_neighbors=K, num_leaves=round(size**0.5))
        where, scann_seconds = built(scann, data.part, folder)
        flat_seconds = seconds(lambda vectors=data.documents: flat_of(vectors))
        flat = flat_search_of(flat_of(data.documents), data.queries)
        calls = {
            "exact": search_of(Exact().open(data.part, folder), data.asked),
            "exact bfloat16": search_of(Exact(dtype="bfloat16").open(data.part, folder), data.asked),
            "scann": search_of(scann.open(data.part, where), data.asked),
        }
        times = interleaved({**calls, "flat": flat}, rounds)
        build = {"scann": scann_seconds, "flat": flat_seconds}
        for case in times:
            more: Row = {"recall": round(recall(calls[case](), flat()), 4)} if case in calls else {}
            yield rate_row("growth", data, times, case, **more, build_seconds=round(build.get(case, 0.0), 2))
        del data, flat, calls  # free them before the next size
        gc.collect()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    yield show({"row": "growth", "case": "peak", "kind": kinds[0], "resident_gb": round(peak, 1)})


PARTS = {part.__name__: part for part in (exact, approximate, memory, selection, growth)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", choices=("clip", "clusters"), default=["clip", "clusters"])
    parser.add_argument("--growth-sizes", type=int, nargs="+")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--opened", nargs=4, help=argparse.SUPPRESS)  # a child process that measures its memory
    arguments = parser.parse_args()
    if arguments.opened:
        folder, index, dtype, leaves = arguments.opened
        report_resident(Path(folder), Path(index), dtype, int(leaves))
        return
    import faiss

    faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))
    sizes = SMALL if arguments.small else FULL
    if arguments.growth_sizes:
        sizes = sizes._replace(growth=tuple(arguments.growth_sizes))
    rows = []
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            rows += PARTS[name](sizes, arguments.kinds, arguments.rounds, Path(folder))
    if arguments.json:
        command = f"python benchmarks/retrieval.py {' '.join(sys.argv[1:])}"
        arguments.json.write_text(record(command, PACKAGES, rows), encoding="utf-8")


if __name__ == "__main__":
    main()
