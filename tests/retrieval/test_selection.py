"""Redundancy avoidance against a plain Python walk through the ranked lists."""

import tracemalloc

import numpy as np
import pytest

from rac3.config import InputError
from rac3.retrieval import selection as selection_module
from rac3.retrieval.memory import Memory, MemoryPart
from rac3.retrieval.selection import Dropped, Selection, select


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def memory_of(*parts: np.ndarray) -> Memory:
    return Memory(tuple(MemoryPart(str(i), rows, [""] * len(rows)) for i, rows in enumerate(parts)))


def walk(config: Selection, query: np.ndarray, ids: np.ndarray, rows: np.ndarray, main: int, hashes, withdrawn):
    """The oracle: section 3.2 to the letter, without the documents that training must not see."""
    taken: list[int] = []
    dropped = dict.fromkeys(Dropped._fields, 0)
    limit = config.max_similarity if config.max_similarity < 1 else np.inf
    for i in ids:
        if len(taken) == config.depth or i < 0:
            break
        if i in withdrawn:
            dropped["withdrawn"] += 1
        elif i == main:
            dropped["main_document"] += 1
        elif main >= 0 and any(column[i] == column[main] != 0 for column in hashes):
            dropped["duplicate"] += 1
        elif main >= 0 and rows[main] @ rows[i] > limit:
            dropped["similar_to_main"] += 1
        elif query @ rows[i] > limit:
            dropped["similar_to_query"] += 1
        elif any(rows[i] @ rows[j] > limit for j in taken):
            dropped["redundant"] += 1
        else:
            taken.append(int(i))
    return taken, list(dropped.values())


@pytest.mark.parametrize("seed", range(20))
def test_select_agrees_with_the_plain_walk(seed: int, monkeypatch):
    monkeypatch.setattr(selection_module, "_QUERIES_AT_ONCE", 3)  # several steps, the last one partial
    monkeypatch.setattr(selection_module, "HELD_BYTES", 4 * 8 * 100)  # ten queries with nine candidates
    monkeypatch.setattr(selection_module, "_RANKS_AT_ONCE", (2, 3, 64)[seed % 3])  # in turn, or all at once
    rng = np.random.default_rng(seed)
    documents, queries, candidates = int(rng.integers(10, 60)), int(rng.integers(1, 30)), int(rng.integers(1, 10))
    # Few clusters, so that every rule fires often.
    rows = unit(rng.normal(size=(4, 8))[rng.integers(0, 4, documents)] + 0.25 * rng.normal(size=(documents, 8)))
    config = Selection(max_similarity=float(rng.choice([0.5, 0.8, 0.9, 1.0])), depth=int(rng.integers(1, 7)))
    main = rng.integers(-1, documents, queries)
    query = unit(rows[main] + 0.2 * rng.normal(size=(queries, 8)))
    ids = np.stack([rng.permutation(documents)[:candidates] for _ in range(queries)])
    ids[np.arange(candidates) >= rng.integers(0, candidates + 1, queries)[:, None]] = -1
    hashes = rng.integers(0, 30, (2, documents)).astype(np.uint64)  # of texts and of images; 0 is none
    withdrawn = np.flatnonzero(rng.random(documents) < 0.1)
    cut = int(rng.integers(0, documents))
    pieces = (np.arange(cut), np.arange(cut, documents)) if seed % 2 else (np.arange(documents),)
    parts = [
        MemoryPart(str(part[:1]), rows[part], [""] * len(part), (), tuple(hashes[:, part]), np.flatnonzero(gone))
        for part in pieces
        for gone in [np.isin(part, withdrawn)]
    ]

    found = select(config, query, ids, Memory(tuple(parts)), main)

    assert found.ids.shape == found.scores.shape == (queries, config.depth)
    expected = [walk(config, q, i, rows, m, hashes, withdrawn) for q, i, m in zip(query, ids, main, strict=True)]
    for q, (taken, _) in enumerate(expected):
        assert found.ids[q].tolist() == taken + [-1] * (config.depth - len(taken))
        np.testing.assert_allclose(found.scores[q, : len(taken)], rows[taken] @ query[q], atol=1e-6)  # 8 float32 terms
        assert (found.scores[q, len(taken) :] == -np.inf).all()
    assert list(found.dropped) == np.sum([dropped for _, dropped in expected], axis=0).tolist()


def test_memory_does_not_grow_with_the_square_of_the_candidates():
    """The inner products of 2,000 candidates of 256 queries with each other are 4 GB."""
    rows = unit(np.random.default_rng(0).normal(size=(2000, 4)))
    ids = np.tile(np.arange(2000), (256, 1))
    tracemalloc.start()
    found = select(Selection(max_similarity=0.99, depth=3), rows[:256], ids, memory_of(rows), np.full(256, -1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found.ids >= 0).all()
    assert peak < 200e6


def test_the_main_document_is_never_selected_even_without_a_limit():
    rows = unit(np.random.default_rng(0).normal(size=(30, 8)))
    ranked = np.argsort(-(rows @ rows.T), axis=1)
    found = select(Selection(max_similarity=1.0, depth=8), rows, ranked, memory_of(rows), np.arange(30))
    assert not (found.ids == np.arange(30)[:, None]).any()
    assert (found.ids >= 0).all()
    assert found.dropped == Dropped(0, 30, 0, 0, 0, 0)


def test_near_duplicates_are_taken_once_and_kept_with_a_limit_of_1():
    row = unit(np.array([[1.0, 2.0, 3.0]]))
    rows = np.repeat(row, 5, axis=0)
    query = unit(np.array([[3.0, 2.0, 1.0]]))
    ids, exclude = np.arange(5)[None], np.array([-1])
    assert select(Selection(depth=3), query, ids, memory_of(rows), exclude).ids.tolist() == [[0, -1, -1]]
    kept = select(Selection(max_similarity=1.0, depth=3), row, ids, memory_of(rows), exclude)
    assert kept.ids.tolist() == [[0, 1, 2]]
    many = unit(np.random.default_rng(0).normal(size=(50, 8)))
    assert (np.vecdot(many, many) > 1).any()  # by rounding
    pairs = np.arange(100).reshape(2, 50).T  # each document and its copy
    kept = select(
        Selection(max_similarity=1.0, depth=2), many, pairs, memory_of(np.tile(many, (2, 1))), np.full(50, -1)
    )
    np.testing.assert_array_equal(kept.ids, pairs)


def test_a_similarity_of_just_the_limit_is_allowed():
    """Inner products of 0.5 and 0 are exact in binary. Each rule is tested alone, at the limit and above it."""
    half, rest = 0.5, float(np.sqrt(0.75))
    query, near_query = [1.0, 0, 0, 0], [half, rest, 0, 0]
    main, near_main = [0, 0, 1.0, 0], [0, 0, half, rest]
    first, near_first = [0, 1.0, 0, 0], [0, half, 0, -rest]
    rows = np.array([near_query, main, near_main, first, near_first], np.float32)
    asked = np.array([query], np.float32)
    for candidates in ([0], [2], [3, 4]):  # near the query, the main document, a selected one
        ids = np.array([candidates])
        for limit, kept in (
            (half, len(candidates)),
            (np.nextafter(np.float32(half), np.float32(0)), len(candidates) - 1),
        ):
            config = Selection(max_similarity=float(limit), depth=2)
            found = select(config, asked, ids, memory_of(rows), np.array([1]))
            assert found.ids[0].tolist() == candidates[:kept] + [-1] * (2 - kept), (candidates, limit)


def test_no_queries_and_no_candidates():
    memory = memory_of(np.zeros((3, 4), np.float32))
    empty = select(Selection(), np.zeros((0, 4), np.float32), np.zeros((0, 5), np.int64), memory, np.zeros(0, np.int64))
    assert empty.ids.shape == (0, 8)
    nothing = select(
        Selection(depth=2), np.zeros((3, 4), np.float32), np.zeros((3, 0), np.int64), memory, np.zeros(3, np.int64)
    )
    assert nothing.ids.tolist() == [[-1, -1]] * 3
    assert nothing.dropped == Dropped(0, 0, 0, 0, 0, 0)


def test_the_limit_of_the_paper():
    """Section 3.2: a candidate above 0.9 is dropped."""
    rows = np.array([[cosine, np.sqrt(1 - cosine**2), 0] for cosine in (0.89, 0.91)], np.float32)
    rows[1, 1:] = rows[1, :0:-1]  # away from the other
    found = select(Selection(), np.array([[1, 0, 0]], np.float32), np.array([[1, 0]]), memory_of(rows), np.array([-1]))
    assert found.ids.tolist() == [[0] + [-1] * 7]


def test_limits_are_checked():
    for limit in (0.0, 1.1, float("nan")):
        with pytest.raises(InputError, match="max_similarity"):
            Selection(max_similarity=limit)
    with pytest.raises(InputError, match=r"selection\.depth=0"):
        Selection(depth=0)
