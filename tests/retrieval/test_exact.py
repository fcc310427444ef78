"""Exact search against sorting all products, over tiles, blocks, devices and processes, in float32 and bfloat16."""

import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import rac3.retrieval.exact as exact
from rac3.retrieval.exact import Exact, ExactIndex
from rac3.retrieval.memory import MemoryPart
from rac3.retrieval.retriever import Queries

ROOT = Path(__file__).parents[2]
EMBED = 24
# Tiles of 4 queries x 64 documents, so that a small part has several tiles per block and several groups per tile.
SMALL_TILES = 4, 64


class Rows:
    """An array that records which rows are read."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows, self.asked = rows, []
        self.shape = rows.shape

    def __getitem__(self, rows):
        self.asked.append(range(len(self.rows))[rows])
        return self.rows[rows]


def grid(size: int, seed: int = 0) -> np.ndarray:
    """Multiples of 1/8 up to 1/4: products and sums are exact in any order and type, and there are ties everywhere."""
    return np.random.default_rng(seed).integers(-2, 3, (size, EMBED)).astype(np.float32) / 8


def cone(size: int, seed: int = 0) -> np.ndarray:
    """Unit vectors in a cone, as CLIP's are."""
    rows = np.random.default_rng(seed).normal(size=(size, EMBED)) + 0.5
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def part_of(rows) -> MemoryPart:
    return MemoryPart("train", rows, [""] * rows.shape[0])


def queries_of(rows: np.ndarray) -> Queries:
    return Queries([str(i) for i in range(len(rows))], rows, [""] * len(rows))


def index_of(retriever: Exact, rows) -> ExactIndex:
    return retriever.open(part_of(rows), Path("unused"))


def by_sorting(queries: np.ndarray, memory: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The oracle: score descending, then row ascending."""
    products = queries @ memory.T
    rows = np.argsort(-products, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(products, rows, axis=1), rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(("size", "block_rows"), [(33, 8), (2500, 130), (2500, 65_536)])
def test_ties_and_order_are_those_of_sorting(
    dtype: str, devices: int, size: int, block_rows: int, monkeypatch: pytest.MonkeyPatch
):
    some = jax.devices()[:devices]
    monkeypatch.setattr(jax, "devices", lambda: some)
    monkeypatch.setattr(exact, "_TILE_ON_CPU", SMALL_TILES)
    memory, queries = grid(size), grid(21, seed=1)
    index = index_of(Exact(dtype=dtype, block_rows=block_rows, query_rows=8), memory)
    assert index.mesh.size == devices
    for k in (1, 5, 50):
        scores, rows = index.search(queries_of(queries), k)
        wanted_scores, wanted = by_sorting(queries, memory, k)
        np.testing.assert_array_equal(rows[:, :size], wanted)
        np.testing.assert_array_equal(scores[:, :size], wanted_scores)
        assert (rows[:, size:] == -1).all()
        assert (scores[:, size:] == -np.inf).all()


def test_bfloat16_finds_what_float32_does_and_scores_it_in_float32(monkeypatch: pytest.MonkeyPatch):
    one = jax.devices()[:1]  # each device has its own candidates
    monkeypatch.setattr(jax, "devices", lambda: one)
    memory, queries = cone(3000), cone(100, seed=1)
    _, wanted = by_sorting(queries, memory, 10)
    scores, rows = index_of(Exact(dtype="bfloat16"), memory).search(queries_of(queries), 10)
    np.testing.assert_array_equal(rows, wanted)
    products = np.take_along_axis(queries.astype(np.float64) @ memory.T.astype(np.float64), rows, axis=1)
    np.testing.assert_allclose(scores, products, atol=EMBED * 2**-24)  # 2**-25 of rounding per product and per sum
    without = index_of(Exact(dtype="bfloat16", overscan=0), memory).search(queries_of(queries), 10)[1]
    assert 0.9 < np.mean([len(set(a) & set(b)) / 10 for a, b in zip(without, wanted, strict=True)]) < 1


def test_a_large_memory_streams_in_blocks_and_a_small_one_stays(monkeypatch: pytest.MonkeyPatch):
    rows, queries = Rows(grid(1000)), queries_of(grid(5, seed=1))
    run = 32  # documents per device in a block of 8 x 32
    index = index_of(Exact(block_rows=run), rows)
    first = index.search(queries, 3)
    assert max(len(asked) for asked in rows.asked) == run
    assert sorted(row for asked in rows.asked for row in asked) == list(range(1000))
    rows.asked.clear()
    np.testing.assert_array_equal(index.search(queries, 3)[1], first[1])
    assert rows.asked == []
    block_bytes = 8 * run * EMBED * 4
    monkeypatch.setattr(exact, "_HOST_BYTES", 2 * block_bytes)
    index = index_of(Exact(block_rows=run), rows)
    for read in (range(1000), range(2 * 8 * run, 1000)):  # two of the four blocks stay
        rows.asked.clear()
        np.testing.assert_array_equal(index.search(queries, 3)[1], first[1])
        assert sorted(row for asked in rows.asked for row in asked) == list(read)


def test_compiles_once_for_any_number_of_queries_and_blocks():
    index = index_of(Exact(block_rows=30, query_rows=8), grid(1000))
    index.search(queries_of(grid(5)), 3)
    compiled = exact._search_block._cache_size()
    for num_queries in (6, 8, 20, 64):
        index.search(queries_of(grid(num_queries)), 3)
    index_of(Exact(block_rows=30, query_rows=8), grid(900)).search(queries_of(grid(8)), 3)
    assert exact._search_block._cache_size() == compiled


def test_few_queries_are_padded_to_a_power_of_two_and_many_come_in_batches(monkeypatch: pytest.MonkeyPatch):
    search, asked = exact._search_block, []

    def noted(scores, rows, queries, *rest, **fields):
        asked.append(len(queries))
        return search(scores, rows, queries, *rest, **fields)

    monkeypatch.setattr(exact, "_search_block", noted)
    index = index_of(Exact(query_rows=8), grid(100))
    for number, batches in ((1, [1]), (3, [4]), (8, [8]), (20, [8, 8, 8])):
        asked.clear()
        assert index.search(queries_of(grid(number)), 3)[1].shape == (number, 3)
        assert asked == batches


WORKER = """
import sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import numpy as np
from rac3.config import InputError
from rac3.retrieval.exact import Exact
from test_exact import Rows, by_sorting, grid, index_of, queries_of

memory, queries = Rows(grid(3000)), grid(50, seed=1)
index = index_of(Exact(block_rows=256, dtype="bfloat16"), memory)
found = index.search(queries_of(queries), 7)
for ours, wanted in zip(found, by_sorting(queries, memory.rows, 7)):
    np.testing.assert_array_equal(ours, wanted)
print("rows read:", sum(len(asked) for asked in memory.asked))
try:
    index.search(queries_of(queries[jax.process_index():]), 7)
except InputError as error:
    print("differ:", error)
memory.rows[1000, 3] = np.nan
try:
    index_of(Exact(block_rows=256), memory).search(queries_of(queries), 7)
except InputError as error:
    print("broken:", error)
"""


def test_two_processes_search_a_share_each():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    paths = f"{ROOT}:{Path(__file__).parent}"
    flags = "--xla_force_host_platform_device_count=2"
    environment = {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-c", WORKER, address]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    workers = [subprocess.Popen([*command, str(number)], env=environment, **pipes) for number in range(2)]
    try:
        outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    # Blocks of 4 x 256 documents, half to each process: 512 + 512 + 512, and 512 + 512 + 440.
    assert "rows read: 1536" in outputs[0]
    assert "rows read: 1464" in outputs[1]
    assert all("differ: the processes of this run search for different queries" in output for output in outputs)
    assert "broken: the search failed in process 1" in outputs[0]
    assert "broken: memory part 'train': the embedding of document 1000 " in outputs[1]
