"""The contract of every retriever, and what each one promises in addition."""

import importlib.util
import subprocess
import sys
import threading
import types
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

import numpy as np
import pytest

from rac3.config import InputError
from rac3.retrieval.baselines import NoRetriever, Random
from rac3.retrieval.exact import Exact
from rac3.retrieval.faiss import Faiss
from rac3.retrieval.fixed import Fixed
from rac3.retrieval.memory import Memory, MemoryPart
from rac3.retrieval.retriever import (
    Chosen,
    Index,
    Planned,
    Queries,
    Retriever,
    Tunable,
    no_candidates,
    ranked,
    search_memory,
    search_only_fields,
)
from rac3.retrieval.scann import Scann, ScannIndex

EMBED = 15  # odd: ScaNN codes pairs of dimensions
ATOL = 4e-7  # two sums of 15 float32 products of unit vectors: 15 roundings of at most 2**-24 each way, and 4 x less


@dataclass(frozen=True)
class WordOverlap:
    """A retriever as a user would write it in a config: no base class, and no embeddings."""

    num_neighbors: int = 4

    def build(self, part: MemoryPart, folder: Path) -> None:
        pass

    def open(self, part: MemoryPart, folder: Path) -> "WordOverlapIndex":
        return WordOverlapIndex(part.texts)


@dataclass(frozen=True)
class WordOverlapIndex:
    texts: Sequence[str]

    def search(self, queries: Queries, k: int):
        scores, rows = no_candidates(len(queries), max(k, len(self.texts)))
        for q, query in enumerate(queries.texts):
            for row, text in enumerate(self.texts):
                scores[q, row], rows[q, row] = len(set(query.split()) & set(text.split())), row
        return ranked(scores, rows, k)


# Block sizes that do not divide the sizes below; trees that are searched in full, so that only codes approximate.
SEARCHERS = [
    Exact(),
    Exact(block_rows=37, query_rows=16),
    Exact(dtype="bfloat16"),
    Scann(),
    Scann(num_leaves=1, num_leaves_to_search=1),
    Scann(num_leaves=1, reorder_dtype="bfloat16"),
    Scann(num_leaves=1, reorder_dtype="int8"),
    Scann(num_leaves=1, reorder_dtype="none"),
]
if importlib.util.find_spec("faiss"):
    SEARCHERS += [
        Faiss(),
        Faiss(factory="HNSW16", search="efSearch=64"),
        Faiss(factory="SQ8"),  # codes that few documents can train
        Faiss(factory="IVF1,SQ8", search="nprobe=1"),
    ]
ALL = [*SEARCHERS, Random(), NoRetriever(), WordOverlap()]


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def embeddings(size: int, seed: int = 0) -> np.ndarray:
    """Unit vectors in a cone, as CLIP's are."""
    return unit(np.random.default_rng(seed).normal(size=(size, EMBED)) + 0.5)


def part_of(rows: np.ndarray, name: str = "train") -> MemoryPart:
    return MemoryPart(name, rows, [f"a photo of {row % 7}" for row in range(len(rows))])


def queries_of(rows: np.ndarray) -> Queries:
    return Queries([f"query {i}" for i in range(len(rows))], rows, [f"a photo of {i}" for i in range(len(rows))])


def index_of(retriever: Retriever, part: MemoryPart, folder: Path) -> Index:
    """Build into a folder that is renamed before it is opened, as artifacts are."""
    unfinished, finished = folder / f"{part.name}.partial", folder / part.name
    unfinished.mkdir()
    retriever.build(part, unfinished)
    unfinished.rename(finished)
    return retriever.open(part, finished)


@pytest.mark.parametrize("retriever", ALL, ids=str)
@pytest.mark.parametrize("size", [0, 1, 5, 16, 150])
def test_contract(retriever: Retriever, size: int, tmp_path: Path):
    assert isinstance(retriever, Retriever)
    index = index_of(retriever, part_of(embeddings(size)), tmp_path)
    assert isinstance(index, Index)
    for num_queries in (0, 1, 19):
        queries = queries_of(embeddings(num_queries, seed=1))
        for k in (0, 1, 4, 40):
            scores, rows = index.search(queries, k)
            assert scores.shape == rows.shape == (num_queries, k)
            assert scores.dtype == np.float32
            assert rows.dtype == np.int64
            found = rows >= 0
            assert (found.sum(axis=1) == (0 if isinstance(retriever, NoRetriever) else min(k, size))).all()
            assert (scores[~found] == -np.inf).all()
            assert (scores[:, :-1] >= scores[:, 1:]).all()
            assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in rows)
            assert (rows < size).all()


@pytest.mark.parametrize("retriever", SEARCHERS, ids=str)
def test_inner_products_agree_with_sorting_all_of_them(retriever: Retriever, tmp_path: Path):
    memory, queries = embeddings(300), queries_of(embeddings(50, seed=1))
    products = queries.embeddings @ memory.T
    scores, rows = index_of(retriever, part_of(memory), tmp_path).search(queries, 12)
    np.testing.assert_allclose(scores, np.take_along_axis(products, rows, axis=1), atol=ATOL)
    best = -np.sort(-products, axis=1)[:, :12]
    rounded = isinstance(retriever, Scann) and retriever.reorder_dtype in ("bfloat16", "int8")
    rounded = rounded or (isinstance(retriever, Faiss) and "SQ8" in retriever.factory)
    # int8 moves a product by at most half a step (0.6 / 127) times the query's L1 norm (3.9), so it may swap two
    # neighbors that lie within twice that; bfloat16 moves it less.
    np.testing.assert_allclose(scores, best, atol=0.02 if rounded else ATOL)
    assert (np.abs(scores - best) < ATOL).mean() > 0.9


@pytest.mark.parametrize("retriever", SEARCHERS, ids=str)
def test_zero_vectors_and_duplicates(retriever: Retriever, tmp_path: Path):
    rows = embeddings(120)
    rows[3] = rows[50] = rows[51] = rows[4]
    rows[7] = rows[119] = 0
    index = index_of(retriever, part_of(rows), tmp_path)
    found_scores, found = index.search(queries_of(rows[4:5]), 4)
    assert set(found[0]) == {3, 4, 50, 51}
    np.testing.assert_allclose(found_scores, np.ones((1, 4)), atol=ATOL)
    zero_scores, _ = index.search(queries_of(np.zeros((1, EMBED), np.float32)), 4)
    np.testing.assert_array_equal(zero_scores, np.zeros((1, 4)))
    all_zero = index_of(retriever, part_of(np.zeros((30, EMBED), np.float32), "zero"), tmp_path)
    np.testing.assert_array_equal(all_zero.search(queries_of(rows[:2]), 4)[0], np.zeros((2, 4)))


def test_exact_never_finds_the_padding_of_its_last_block(tmp_path: Path):
    rows = -np.abs(embeddings(9))  # every product is negative; a row of zeros would score higher
    scores, found = index_of(Exact(block_rows=8), part_of(rows), tmp_path).search(queries_of(-rows[:3]), 12)
    assert (np.sort(found, axis=1) == [-1, -1, -1, *range(9)]).all()
    assert (scores[:, :9] < 0).all()


@pytest.mark.parametrize("retriever", [Exact(), Scann()], ids=str)
def test_a_memory_in_parts_is_searched_as_one(retriever: Retriever, tmp_path: Path):
    # Multiples of 1/8: every sum is exact in any order, and there are ties everywhere, even across parts.
    rows = np.random.default_rng(0).integers(-2, 3, (200, EMBED)).astype(np.float32) / 8
    rows[150:160] = rows[10:20]
    queries = queries_of(rows[::5])
    whole = Memory((part_of(rows),))
    parts = Memory(tuple(part_of(r, name) for name, r in zip("abcd", np.split(rows, [3, 3, 120]), strict=True)))
    found = []
    for folder, memory in (("whole", whole), ("parts", parts)):
        (tmp_path / folder).mkdir()
        indexes = [index_of(retriever, part, tmp_path / folder) for part in memory.parts]
        found.append(search_memory(indexes, memory, queries, 9))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    order = np.argsort(-(queries.embeddings @ rows.T), axis=1, kind="stable")[:, :9]
    if isinstance(retriever, Exact):  # ScaNN may drop any document that ties for the last place
        np.testing.assert_array_equal(found[0][1], order)
        np.testing.assert_array_equal(found[1][1], order)


@pytest.mark.parametrize("retriever", ALL, ids=str)
def test_search_memory_pads_a_small_memory(retriever: Retriever, tmp_path: Path):
    memory = Memory((part_of(embeddings(2), "a"), part_of(embeddings(0), "b"), part_of(embeddings(3, seed=2), "c")))
    indexes = [index_of(retriever, part, tmp_path) for part in memory.parts]
    scores, ids = search_memory(indexes, memory, queries_of(embeddings(4, seed=1)), 7)
    assert ids.shape == scores.shape == (4, 7)
    if not isinstance(retriever, NoRetriever):
        assert all(sorted(row[:5]) == list(range(5)) for row in ids)
        assert (scores[:, 5:] == -np.inf).all()
    assert (ids[:, 5:] == -1).all()


def test_scann_tree_recalls_what_exact_finds(tmp_path: Path):
    rng = np.random.default_rng(0)
    centers = 1.5 * rng.normal(size=(100, 32)) + 0.7
    memory = part_of(unit(centers[rng.integers(0, 100, 20_000)] + rng.normal(size=(20_000, 32))))
    queries = queries_of(memory.read(slice(0, 200)))
    assert Scann().leaves_for(len(memory)) == 424
    _, exact = Exact().open(memory, tmp_path).search(queries, 16)
    scores, found = index_of(Scann(), memory, tmp_path).search(queries, 16)
    recall = np.mean([len(set(a) & set(b)) / 16 for a, b in zip(exact, found, strict=True)])
    assert recall > 0.95
    products = np.einsum("qe,qke->qk", queries.embeddings, memory.read(found.ravel()).reshape(200, 16, 32))
    np.testing.assert_allclose(scores, products, atol=1e-6)


def test_scann_pads_where_the_leaves_it_searches_run_out(tmp_path: Path):
    memory = part_of(embeddings(400))
    retriever = Scann(num_leaves=40, num_leaves_to_search=1)
    scores, rows = index_of(retriever, memory, tmp_path).search(queries_of(embeddings(20, seed=1)), 300)
    assert (rows[:, -1] == -1).all()
    assert ((rows == -1) == (scores == -np.inf)).all()
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in rows)


def test_scann_searches_a_twentieth_of_the_leaves_and_reorders_128_unless_told():
    class Searcher:
        def search_batched_parallel(self, queries, final_num_neighbors, pre_reorder_num_neighbors, leaves_to_search):
            asked.append((final_num_neighbors, pre_reorder_num_neighbors, leaves_to_search))
            rows = np.tile(np.arange(final_num_neighbors, dtype=np.uint32), (len(queries), 1))
            return rows, np.ones(rows.shape, np.float32)

    part, asked = part_of(embeddings(500)), []
    for retriever, k, expected in (
        (Scann(), 16, (16, 128, None)),  # brute force: no leaves
        (Scann(num_leaves=81), 16, (16, 128, 5)),  # rounded up
        (Scann(num_leaves=7), 16, (16, 128, 1)),
        (Scann(num_leaves=81, num_leaves_to_search=9, reorder_num_neighbors=40), 16, (16, 40, 9)),
        (Scann(num_leaves=81), 300, (300, 300, 5)),
        (Scann(num_leaves=81, reorder_num_neighbors=900), 9, (9, 500, 5)),  # of 500 documents
        (Scann(num_leaves=81, reorder_dtype="none"), 16, (128, 128, 5)),  # scored here
    ):
        scores, rows = ScannIndex(retriever, part, Searcher()).search(queries_of(embeddings(2)), k)
        assert rows.shape == scores.shape == (2, k)
        assert asked.pop() == expected
    assert Scann().leaves_for(19_999) is None
    assert Scann().leaves_for(20_000) == 424  # 3 times the square root
    assert Scann(num_leaves=50).leaves_for(100) == 50


def test_scann_builds_its_tree_as_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By the arguments of ScaNN's builder."""
    pybind = pytest.importorskip("scann").scann_ops_pybind
    builder, made = pybind.builder, []
    monkeypatch.setattr(pybind, "builder", lambda *arguments: made.append(builder(*arguments)) or made[-1])
    tree = {"num_leaves": 30, "num_leaves_to_search": 4, "spherical": False, "soar_lambda": 1.25}
    codes = {"dimensions_per_block": 3, "anisotropic_quantization_threshold": 0.35}
    memory = part_of(embeddings(300))
    Scann(**tree, **codes, reorder_num_neighbors=77, reorder_dtype="bfloat16").build(memory, tmp_path)
    Scann(num_leaves=30).build(memory, tmp_path)
    Scann().build(memory, tmp_path)
    told, plain, brute_force = (each.params for each in made)  # to which ScaNN adds its own
    assert (tree | {"training_sample_size": 100_000}).items() <= told["tree"].items()
    assert codes.items() <= told["score_ah"].items()
    assert {"77", "ReorderType.BFLOAT16"} <= {str(value) for value in told["reorder"].values()}
    tree |= {"num_leaves_to_search": 2, "spherical": True, "soar_lambda": None}
    assert tree.items() <= plain["tree"].items()
    assert {"dimensions_per_block": 2, "anisotropic_quantization_threshold": 0.2}.items() <= plain["score_ah"].items()
    assert {"128", "ReorderType.FLOAT32"} <= {str(value) for value in plain["reorder"].values()}
    assert brute_force.keys() == {"score_bf"}
    assert {each.distance_measure for each in made} == {"dot_product"}


def test_scann_trains_a_large_tree_on_forty_documents_per_leaf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pybind = pytest.importorskip("scann").scann_ops_pybind
    builder, made = pybind.builder, []

    def watched(*arguments):
        made.append(builder(*arguments))
        made[0].build = lambda: types.SimpleNamespace(serialize=lambda *_, **__: None)  # the tree would take seconds
        return made[0]

    monkeypatch.setattr(pybind, "builder", watched)
    Scann(num_leaves=3000).build(part_of(embeddings(3000)), tmp_path)
    assert made[0].params["tree"]["training_sample_size"] == 120_000


def test_scann_checks_its_leaves(tmp_path: Path):
    with pytest.raises(InputError, match=r"retriever\.num_leaves=4000 .* 1000 documents .* at most 1000, about 95"):
        Scann(num_leaves=4000).build(part_of(embeddings(1000)), tmp_path)
    with pytest.raises(InputError, match="num_leaves_to_search=9 exceeds"):
        Scann(num_leaves=8, num_leaves_to_search=9)
    with pytest.raises(InputError, match="reorder_num_neighbors=8 is below"):
        Scann(num_neighbors=16, reorder_num_neighbors=8)
    with pytest.raises(InputError, match="num_leaves=0"):
        Scann(num_leaves=0)
    with pytest.raises(InputError, match="soar_lambda=-1"):
        Scann(soar_lambda=-1.0)


@pytest.mark.parametrize("reorder_dtype", ["float32", "none"])
def test_scann_with_soar_has_two_leaves_for_a_document(reorder_dtype, tmp_path: Path):
    memory, queries = part_of(embeddings(2000)), queries_of(embeddings(300, seed=1))
    _, exact = Exact().open(memory, tmp_path).search(queries, 10)
    recalls = []
    for number, soar in enumerate((None, 1.5)):
        (tmp_path / str(number)).mkdir()
        retriever = Scann(num_leaves=40, num_leaves_to_search=3, soar_lambda=soar, reorder_dtype=reorder_dtype)
        scores, found = index_of(retriever, memory, tmp_path / str(number)).search(queries, 10)
        assert all(len(set(row)) == len(row) for row in found[(found >= 0).all(1)])
        np.testing.assert_allclose(scores, memory.inner_products(queries.embeddings, found), atol=ATOL)
        recalls.append(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, found, strict=True)]))
    assert recalls[1] > recalls[0]


@pytest.mark.parametrize("reorder_dtype", ["float32", "none"])
def test_scann_searches_one_index_with_as_much_effort_as_it_is_opened_for(reorder_dtype, tmp_path: Path):
    memory, queries = part_of(embeddings(2000)), queries_of(embeddings(300, seed=1))
    _, exact = Exact().open(memory, tmp_path).search(queries, 10)

    def recall(index: Index) -> float:
        scores, found = index.search(queries, 10)
        np.testing.assert_allclose(scores, memory.inner_products(queries.embeddings, found), atol=ATOL)
        return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, found, strict=True)]))

    for name, built in (("little", Scann(2, 40, 1, reorder_num_neighbors=2)), ("much", Scann(10, 40, 40))):
        retriever = replace(built, reorder_dtype=reorder_dtype)
        (tmp_path / name).mkdir()
        retriever.build(memory, tmp_path / name)
        efforts = [
            replace(retriever, num_leaves_to_search=leaves, reorder_num_neighbors=candidates)
            for leaves, candidates in ((1, 10), (1, 100), (5, 100), (40, 2000))
        ]
        recalls = [recall(effort.open(memory, tmp_path / name)) for effort in efforts]
        assert (np.diff(recalls) > 0).all(), recalls
        assert recalls[-1] == 1.0  # all leaves are searched, and all exact scores computed


@pytest.mark.parametrize(
    ("retriever", "least", "most"),
    [
        (Scann(num_leaves=40), "1 of 40 leaves", "40 of 40 leaves"),
        (Faiss(factory="IVF40,Flat", search="nprobe=5"), "nprobe=1", "nprobe=256"),
        (Faiss(factory="HNSW8"), "efSearch=1", "efSearch=256"),
    ],
)
def test_efforts_search_one_index_better_and_better(retriever, least: str, most: str, tmp_path: Path):
    if isinstance(retriever, Faiss):
        pytest.importorskip("faiss")
    memory, queries = part_of(embeddings(2000)), queries_of(embeddings(300, seed=1))
    _, exact = Exact().open(memory, tmp_path).search(queries, 10)
    assert isinstance(retriever, Tunable)
    retriever.build(memory, tmp_path)
    recalls = {}
    for name, setting in retriever.efforts(2000).items():
        _, found = setting.open(memory, tmp_path).search(queries, 10)
        recalls[name] = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, found, strict=True)])
    assert next(iter(recalls)) == least
    assert list(recalls)[-1] == most
    assert recalls[least] < 0.9 < 0.95 < recalls[most]
    assert not Scann().efforts(2000)
    assert not Faiss(factory="Flat").efforts(2000)


def test_scann_without_its_own_vectors_holds_only_the_codes(tmp_path: Path):
    memory = part_of(unit(np.random.default_rng(0).normal(size=(4000, 64))))
    retriever = Scann(num_leaves=20, reorder_dtype="none")
    retriever.build(memory, tmp_path)
    written = sum(file.stat().st_size for file in tmp_path.iterdir())
    codes, leaf_of_each, vectors = 4000 * 64 / 2, 4000 * 4, 4000 * 64 * 4
    assert retriever.needs(4000, 64).disk_bytes == codes
    assert codes + leaf_of_each <= written < codes + leaf_of_each + vectors / 40  # plus 20 centers and a codebook


def test_the_parts_are_searched_at_once():
    """Each search waits for the other; run one after the other, they would time out."""
    both = threading.Barrier(2)

    class Meets:
        def search(self, queries: Queries, k: int):
            both.wait(timeout=60)
            return np.ones((len(queries), k), np.float32), np.tile(np.arange(k), (len(queries), 1))

    memory = Memory((part_of(embeddings(3), "a"), part_of(embeddings(3), "b")))
    _, ids = search_memory([Meets(), Meets()], memory, queries_of(embeddings(2)), 2)
    assert (ids == [0, 1]).all()


@pytest.mark.parametrize("retriever", SEARCHERS, ids=str)
def test_nan_in_the_memory_is_refused(retriever: Retriever, tmp_path: Path):
    rows = embeddings(20)
    rows[13, 2] = np.nan
    with pytest.raises(InputError, match="document 13 "):
        index_of(retriever, part_of(rows), tmp_path).search(queries_of(rows[:1]), 2)
    with pytest.raises(InputError, match="query 13"):
        queries_of(rows)


def test_fixed_gives_the_named_documents_in_their_order(tmp_path: Path):
    def named(name: str, keys: list[str]) -> MemoryPart:
        return MemoryPart(name, embeddings(len(keys)), [""] * len(keys), keys)

    memory = Memory((named("train", ["a", "b", "c"]), named("empty", []), named("memory", ["d", "b", "x:y"])))
    queries = queries_of(embeddings(2))

    def found(*keys: str, k: int = 4) -> np.ndarray:
        retriever = Fixed(keys)
        retriever.check(memory)
        _, ids = search_memory([index_of(retriever, part, tmp_path) for part in memory.parts], memory, queries, k)
        for part in memory.parts:
            (tmp_path / part.name).rmdir()
        return ids

    assert (found("d", "a", "x:y") == [3, 0, 5, -1]).all()
    assert (found("memory:b", "c", "train:b") == [4, 2, 1, -1]).all()
    assert (found("c", "d", "a", k=2) == [2, 3]).all()
    for keys, says in ((("a", "e"), "no document of train and empty and memory has the key 'e'"), (("b",), "train:b")):
        with pytest.raises(InputError, match=says):
            Fixed(keys).check(memory)
    with pytest.raises(InputError, match="names no document"):
        Fixed().open(memory.parts[0], tmp_path)
    with pytest.raises(InputError, match="twice"):
        Fixed(("a", "a"))


@pytest.mark.parametrize(
    "retriever", [Exact(), Faiss(), Fixed(("a",)), NoRetriever(), Random(), Scann(), WordOverlap()], ids=repr
)
def test_fixed_alone_has_documents_that_a_person_has_named(retriever: Retriever):
    assert isinstance(retriever, Chosen) == isinstance(retriever, Fixed)


def test_queries_have_one_key_vector_and_text_each():
    for keys, texts in (("ab", "abc"), ("abc", "ab")):
        with pytest.raises(InputError, match=rf"{len(keys)} keys, 3 embeddings and {len(texts)} texts"):
            Queries(list(keys), embeddings(3), list(texts))
    assert len(Queries(["a"], embeddings(1), [""])) == 1


def test_random_is_uniform_over_the_union_of_unequal_parts(tmp_path: Path):
    sizes, k, draws = (2, 3, 15), 4, 20_000
    memory = Memory(tuple(part_of(embeddings(n), name) for n, name in zip(sizes, "abc", strict=True)))
    indexes = [index_of(Random(), part, tmp_path) for part in memory.parts]
    queries = queries_of(np.zeros((draws, EMBED), np.float32))
    _, ids = search_memory(indexes, memory, queries, k)
    for place in range(k):  # each document is equally likely at every rank
        counts = np.bincount(ids[:, place], minlength=20)
        chi_squared = ((counts - draws / 20) ** 2 / (draws / 20)).sum()
        assert chi_squared < 43.8  # 19 degrees of freedom: exceeded once in 1000 draws; the seed is fixed
    pairs = np.zeros((20, 20))
    np.add.at(pairs, (ids[:, 0], ids[:, 1]), 1)
    assert (np.diag(pairs) == 0).all()
    expected = draws / 380
    assert ((pairs[~np.eye(20, dtype=bool)] - expected) ** 2 / expected).sum() < 468  # 379 degrees, once in 1000


def test_random_is_a_function_of_the_seed_and_the_key_alone(tmp_path: Path):
    part = part_of(embeddings(1000))
    queries = queries_of(embeddings(30))
    index = index_of(Random(), part, tmp_path)
    scores, rows = index.search(queries, 10)
    one = Queries(queries.keys[7:8], embeddings(1, seed=5), ["other words"])
    np.testing.assert_array_equal(index.search(one, 10)[1], rows[7:8])
    np.testing.assert_array_equal(index.search(queries, 4)[1], rows[:, :4])
    assert (Random(seed=1).open(part, tmp_path).search(queries, 10)[1] != rows).mean() > 0.9
    assert (Random().open(part_of(embeddings(1000), "other"), tmp_path).search(queries, 10)[0] != scores).all()


def test_random_draws_from_150_million_without_visiting_them(tmp_path: Path):
    class Rows:
        shape = (150_000_000, EMBED)

        def __getitem__(self, rows):
            raise AssertionError("a random draw reads no embedding")

    class Texts(Sequence[str]):
        def __len__(self) -> int:
            return 150_000_000

        def __getitem__(self, item):
            return ""

    part = MemoryPart("train", Rows(), Texts())
    scores, rows = Random().open(part, tmp_path).search(queries_of(embeddings(500)), 16)
    assert abs(rows.mean() / 75e6 - 1) < 0.03  # 8000 uniform draws: 4.6 standard errors of 1 / sqrt(3 * 8000)
    assert (np.diff(scores, axis=1) < 0).all()


def test_word_overlap_ranks_by_text(tmp_path: Path):
    memory = Memory((part_of(embeddings(20), "a"), part_of(embeddings(20), "b")))
    indexes = [index_of(WordOverlap(), part, tmp_path) for part in memory.parts]
    scores, ids = search_memory(indexes, memory, queries_of(embeddings(2)), 4)
    np.testing.assert_array_equal(ids, [[0, 7, 14, 20], [1, 8, 15, 21]])
    np.testing.assert_array_equal(scores, np.full((2, 4), 4))


@pytest.mark.parametrize(
    ("scores", "rows", "message"),
    [
        (np.zeros((2, 1), np.float32), np.zeros((2, 1), np.int64), "pad with"),
        (np.zeros((2, 2), np.float32), np.array([[0, 1], [0, 5]]), "for a part of 5 documents"),
        (np.zeros((2, 2), np.float32), np.array([[0, 1], [0, -1]]), "-inf"),
        (np.full((2, 2), np.nan, np.float32), np.array([[0, 1], [0, 1]]), "NaN"),
    ],
)
def test_an_index_that_breaks_the_contract_is_named(scores: np.ndarray, rows: np.ndarray, message: str):
    class Broken:
        def search(self, queries: Queries, k: int):
            return scores, rows

    memory = Memory((part_of(embeddings(5)),))
    with pytest.raises(InputError, match=f"Broken.search .*{message}"):
        search_memory([Broken()], memory, queries_of(embeddings(2)), 2)


@pytest.mark.parametrize(
    ("retriever", "built"),
    [
        (Exact(), set()),
        (Random(), set()),
        (NoRetriever(), set()),
        (Fixed(), {"keys"}),
        (Faiss(), {"factory", "seed"}),
        (
            Scann(),
            {"num_leaves", "spherical", "soar_lambda", "dimensions_per_block", "anisotropic_quantization_threshold"}
            | {"reorder_dtype"},
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_an_index_is_built_from(retriever: Retriever, built: set[str]):
    """A new value of these fields needs a new index; any other field may change."""
    assert {each.name for each in fields(retriever)} - search_only_fields(retriever) == built


TREE = 14_080_000  # FLOPs: ten rounds of k-means over 500 documents, then each to its leaf; 20 products of 64 numbers


@pytest.mark.parametrize(
    ("retriever", "needs"),
    [
        # Two blocks of 500 vectors of 64 numbers of 4 bytes; a product and a sum per number.
        (Exact(), (0, 256_000, 256_000, 0, 0, 64_000)),
        (Exact(block_rows=100, dtype="bfloat16"), (0, 51_200, 25_600, 0, 0, 64_000)),
        (Scann(), (256_000, 128_000, 0, 128_000, 0, 64_000)),
        # 8 kB of codes, half a byte for two numbers; twice that in the file. A query: 20 centers, the codes of 100
        # documents, and 128 vectors.
        (
            Scann(num_leaves=20, num_leaves_to_search=4),
            (264_000, 136_000, 0, 144_000, TREE, 2 * 20 * 64 + 100 * 32 + 2 * 128 * 64),
        ),
        # Codes in two leaves per document, and vectors of one byte per number.
        (
            Scann(num_leaves=20, soar_lambda=1.5, reorder_dtype="int8", reorder_num_neighbors=16),
            (176_000, 48_000, 0, 64_000, TREE, 2 * 20 * 64 + 25 * 32 + 2 * 16 * 64),
        ),
        (Random(), (0, 0, 0, 0, 0, 0)),
    ],
    ids=str,
)
def test_what_an_index_of_500_documents_needs(retriever: Planned, needs: tuple[int, ...]):
    """Bytes to build, to search, per device and on disk; FLOPs to build and per query."""
    assert isinstance(retriever, Planned)
    found = retriever.needs(500, 64)
    assert astuple(found) == (*needs, isinstance(retriever, Exact))


@pytest.mark.parametrize("retriever", [Exact, Scann, Faiss, Random])
def test_num_neighbors_is_checked(retriever: type):
    with pytest.raises(InputError, match=r"retriever\.num_neighbors=0"):
        retriever(num_neighbors=0)
    with pytest.raises(InputError, match=r"retriever\.num_neighbors=2"):
        NoRetriever(num_neighbors=2)


def test_efforts_of_faiss_keep_the_other_parameters():
    settings = Faiss(factory="IVF40,PQ5", search="ht=2,nprobe=5").efforts(2000)
    assert {name: setting.search for name, setting in settings.items()} == {
        name: name for name in [f"nprobe={number},ht=2" for number in (1, 2, 4, 8, 16, 32, 64, 128, 256)]
    }


def test_faiss_trees_over_codes_recall_what_exact_finds(tmp_path: Path):
    pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    centers = 1.5 * rng.normal(size=(50, 32)) + 0.7
    memory = part_of(unit(centers[rng.integers(0, 50, 4000)] + rng.normal(size=(4000, 32))))
    queries = queries_of(memory.read(slice(0, 100)))
    _, exact = Exact().open(memory, tmp_path).search(queries, 10)
    recalls = []
    for number, reorder in enumerate((16, 200)):
        (tmp_path / str(number)).mkdir()
        retriever = Faiss(factory="IVF20,PQ8x4", search="nprobe=10", reorder_num_neighbors=reorder)
        scores, found = index_of(retriever, memory, tmp_path / str(number)).search(queries, 10)
        np.testing.assert_allclose(scores, memory.inner_products(queries.embeddings, found), atol=1e-6)
        recalls.append(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, found, strict=True)]))
    assert recalls[1] > max(0.9, recalls[0] + 0.1)  # exact scores repair the ranking by codes
    few = Faiss(factory="IVF20,Flat", search="nprobe=1")
    (tmp_path / "few").mkdir()
    scores, rows = index_of(few, memory, tmp_path / "few").search(queries, 1000)
    assert (rows[:, -1] == -1).all()
    assert ((rows == -1) == (scores == -np.inf)).all()


def test_faiss_adds_a_large_part_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr("rac3.retrieval.faiss._BLOCK", 7)
    memory = embeddings(30)
    scores, rows = index_of(Faiss(), part_of(memory), tmp_path).search(queries_of(memory), 3)
    products = memory @ memory.T
    np.testing.assert_array_equal(rows, np.argsort(-products, axis=1)[:, :3])
    np.testing.assert_allclose(scores, np.take_along_axis(products, rows, axis=1), atol=ATOL)


def test_faiss_is_trained_on_a_sample_in_the_order_of_the_memory():
    faiss = pytest.importorskip("faiss")
    index = faiss.index_factory(8, "IVF2000,PQ8", faiss.METRIC_INNER_PRODUCT)
    rows = Faiss()._training_rows(1_000_000, index)
    assert len(rows) == 128_000
    assert (np.diff(rows) > 0).all()
    assert abs(rows.mean() / 500_000 - 1) < 0.01  # 6 standard errors of 1 / sqrt(3 * 128000)
    assert (Faiss(seed=1)._training_rows(1_000_000, index) != rows).any()
    np.testing.assert_array_equal(Faiss()._training_rows(70, index), np.arange(70))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"factory": "Tree"}, "'Tree' for 30 documents .*could not parse.* such as Flat"),
        ({"factory": "IVF40,Flat"}, "'IVF40,Flat' for 30 documents .*training points .30. should be"),
        ({"factory": "PQ4x4"}, "should be a multiple"),
        ({"factory": "Flat", "search": "nprobe=3"}, "search='nprobe=3' does not fit retriever.factory='Flat'"),
    ],
)
def test_what_faiss_refuses_costs_one_line(fields: dict[str, str], says: str, tmp_path: Path):
    pytest.importorskip("faiss")
    with pytest.raises(InputError, match=says) as error:
        Faiss(**fields).build(part_of(embeddings(30)), tmp_path)
    assert "\n" not in str(error.value)


def test_faiss_that_is_not_installed_costs_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InputError, match=r"cannot import the faiss package .*; pip install 'rac3\[faiss\]'"):
        Faiss().build(part_of(embeddings(30)), tmp_path)


def test_reading_a_config_does_not_import_scann():
    code = "import sys; from rac3.retrieval.scann import Scann; Scann(); sys.exit('scann' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
