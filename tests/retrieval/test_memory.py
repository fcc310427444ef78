"""Parts, global ids, adding parts, and invalid embeddings."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from rac3.config import InputError
from rac3.documents.store import DocumentStore
from rac3.retrieval.memory import Memory, MemoryPart
from rac3.retrieval.open_memory import IndexedPart, OpenMemory
from rac3.retrieval.retriever import Queries, no_candidates
from rac3.retrieval.selection import Selection


def part(name: str, size: int, embed: int = 4, seed: int = 0) -> MemoryPart:
    embeddings = np.random.default_rng(seed).normal(size=(size, embed)).astype(np.float32)
    return MemoryPart(name, embeddings, [f"{name} {row}" for row in range(size)])


def test_a_global_id_is_the_offset_of_the_part_plus_the_row():
    parts = (part("a", 3, seed=1), part("empty", 0), part("b", 2, seed=2))
    memory = Memory(parts)
    assert len(memory) == 5
    np.testing.assert_array_equal(memory.offsets, [0, 3, 3, 5])
    rows = np.concatenate([np.asarray(p.embeddings) for p in parts])
    ids = np.array([[4, 0, -1], [2, 3, 4]])
    np.testing.assert_array_equal(memory.embeddings_of(ids)[ids >= 0], rows[ids[ids >= 0]])
    np.testing.assert_array_equal(memory.embeddings_of(ids)[0, 2], np.zeros(4))
    assert memory.embeddings_of(np.zeros((2, 0), np.int64)).shape == (2, 0, 4)


def test_appending_a_part_leaves_earlier_ids_as_they_were():
    first = Memory((part("a", 3),))
    second = Memory((*first.parts, part("b", 9, seed=1)))
    ids = np.arange(3)
    np.testing.assert_array_equal(first.embeddings_of(ids), second.embeddings_of(ids))


@pytest.mark.parametrize("outside", [-2, 3])
def test_an_id_outside_the_memory_raises(outside: int):
    with pytest.raises(IndexError, match=str(outside)):
        Memory((part("a", 3),)).embeddings_of(np.array([outside]))
    with pytest.raises(IndexError, match=str(outside)):
        Memory((part("a", 3),)).held(np.array([outside]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_embedding_that_is_not_finite_is_refused_by_its_row(value: float):
    broken = part("train", 10)
    embeddings = np.asarray(broken.embeddings).copy()
    embeddings[6, 1] = embeddings[8, 0] = value
    broken = MemoryPart("train", embeddings, broken.texts)
    for rows in (slice(4, 10), np.array([9, 6, 0])):
        with pytest.raises(InputError, match=r"'train'.*document 6 "):
            broken.read(rows)
    with pytest.raises(InputError, match="document 8 "):
        Memory((part("a", 2), broken)).embeddings_of(np.array([10]))
    assert broken.read(slice(0, 6)).shape == (6, 4)
    with pytest.raises(InputError, match="document 6 "):  # a part in host memory is checked as a whole
        Memory((broken,)).held(np.array([0]))


def test_inner_products_of_each_query_with_its_own_documents(monkeypatch: pytest.MonkeyPatch):
    memory = part("a", 30)
    queries = np.random.default_rng(1).normal(size=(7, 4)).astype(np.float32)
    rows = np.random.default_rng(2).integers(0, 30, (7, 5))
    rows[0, 4] = rows[5, 0] = rows[5, 1] = -1
    every = queries @ memory.read(slice(0, 30)).T
    wanted = np.where(rows < 0, -np.inf, np.take_along_axis(every, np.maximum(rows, 0), axis=1))
    for at_once in (2**26, 3 * 5 * 4 * 4, 1):  # bytes: all queries, three, one
        monkeypatch.setattr("rac3.retrieval.memory._GATHERED_BYTES", at_once)
        np.testing.assert_allclose(memory.inner_products(queries, rows), wanted, atol=1e-6)
    assert memory.inner_products(queries[:0], rows[:0]).shape == (0, 5)


def test_embeddings_may_stay_on_disk(tmp_path):
    import tensorstore

    embeddings = np.asarray(part("a", 7).embeddings)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path / "embeddings")}}
    store = tensorstore.open(spec, create=True, dtype="float32", shape=embeddings.shape).result()
    store[...] = embeddings
    lazy = MemoryPart("a", store, [""] * 7)
    np.testing.assert_array_equal(lazy.read(slice(2, 5)), embeddings[2:5])
    np.testing.assert_array_equal(lazy.read(np.array([6, 0, 6])), embeddings[[6, 0, 6]])
    held, places = Memory((lazy,)).held(np.array([[6, 0], [6, -1]]))
    assert len(held) == 2  # each once
    np.testing.assert_array_equal(held[places[:, 0]], embeddings[[6, 6]])


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="0 parts"):
        Memory(())
    with pytest.raises(InputError, match="its own name"):
        Memory((part("a", 1), part("a", 2)))
    with pytest.raises(InputError, match="width 5"):
        Memory((part("a", 1), part("b", 2, embed=5)))
    with pytest.raises(InputError, match="3 embeddings but 2 texts"):
        MemoryPart("a", np.zeros((3, 4), np.float32), ["", ""])
    with pytest.raises(InputError, match="3 embeddings but 2 keys"):
        MemoryPart("a", np.zeros((3, 4), np.float32), [""] * 3, ["x", "y"])
    hashes = np.zeros(3, np.uint64), np.zeros(2, np.uint64)
    with pytest.raises(InputError, match="3 embeddings but more or fewer hashes"):
        MemoryPart("a", np.zeros((3, 4), np.float32), [""] * 3, (), hashes)
    with pytest.raises(InputError, match="matrix"):
        MemoryPart("a", np.zeros(3, np.float32), [""] * 3)


def test_withdrawn_documents_and_copies_are_found_by_their_global_ids():
    """A part without hashes has no copies, and 0 means no hash."""
    embeddings = np.zeros((3, 4), np.float32)
    one = MemoryPart("one", embeddings, [""] * 3, (), (np.array([5, 0, 7], np.uint64), np.array([0, 9, 8], np.uint64)))
    bare = MemoryPart("bare", embeddings[:2], [""] * 2, withdrawn=np.array([1]))
    other_hashes = np.array([7, 0, 5], np.uint64), np.array([9, 0, 0], np.uint64)
    other = MemoryPart("other", embeddings, [""] * 3, (), other_hashes, np.array([0, 2]))
    memory = Memory((one, bare, other))
    np.testing.assert_array_equal(np.flatnonzero(memory.are_withdrawn(np.arange(-1, 8))) - 1, [4, 5, 7])
    every = np.tile(np.arange(-1, 8), (8, 1))
    copies = [set((np.flatnonzero(row) - 1).tolist()) for row in memory.duplicates(every, np.arange(8))]
    assert copies == [{0, 7}, {1, 5}, {2, 5}, set(), set(), {1, 2, 5}, set(), {0, 7}]
    assert not memory.duplicates(every[:1], np.array([-1])).any()


@dataclass(frozen=True)
class Asked:
    """A retriever, and its own index, that notes how many documents it is asked for."""

    num_neighbors: int
    asked: list[int] = field(default_factory=list)

    def build(self, part: MemoryPart, folder: Path) -> None: ...

    def open(self, part: MemoryPart, folder: Path) -> "Asked":
        return self

    def search(self, queries: Queries, k: int):
        self.asked.append(k)
        return no_candidates(len(queries), k)


@pytest.mark.parametrize(("wanted", "asked"), [(3, 3), (7, 7), (8, 7), (10**9, 7)])
def test_no_more_neighbors_are_asked_for_than_the_memory_has(wanted: int, asked: int, tmp_path: Path):
    retriever = Asked(wanted)
    parts = [IndexedPart(part(name, size), DocumentStore(tmp_path), tmp_path) for name, size in (("a", 5), ("b", 2))]
    queries = Queries(["q"], np.eye(1, 4, dtype=np.float32), [""])
    found = OpenMemory(parts, retriever, Selection(depth=4)).retrieve(queries, np.full(1, -1))
    assert retriever.asked == [asked, asked]
    assert found.ids.tolist() == [[-1] * 4]
