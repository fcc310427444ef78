"""Selection: from a ranked list of candidates to the documents that go into the context.

In training, the query comes from a document that is itself in the memory, the main document. Retrieving it, or another
document with its text or image, would teach the model to copy.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from rac3.config import InputError
from rac3.retrieval.memory import Memory

HELD_BYTES = 2**30  # of embeddings held at once; each is read once for all queries of a chunk
_QUERIES_AT_ONCE = 256  # per thread: 13 MB of embeddings for 16 candidates of 768 dimensions
_RANKS_AT_ONCE = 64  # more are walked in turn: the products of all with all would grow with their square
_THREAD_BYTES = 2**27  # of embeddings that each thread holds


@dataclass(frozen=True)
class Selection:
    """Redundancy avoidance (section 3.2), in training and at inference."""

    max_similarity: float = 0.9  # inner product with the query, main document or a selected one; 1: no limit
    depth: int = 8  # documents kept per query, from which each epoch draws K

    def __post_init__(self) -> None:
        if not 0 < self.max_similarity <= 1:
            raise InputError(
                f"selection.max_similarity={self.max_similarity} is not in (0, 1]; use 0.9, or 1 for no limit"
            )
        if self.depth < 1:
            raise InputError(f"selection.depth={self.depth} is below 1; use at least 1, about half of num_neighbors")


class Dropped(NamedTuple):
    """Candidates dropped before `depth` were selected, over all queries, by the first rule that applied."""

    withdrawn: int
    main_document: int
    duplicate: int  # another document with the text or image of the main document
    similar_to_main: int
    similar_to_query: int
    redundant: int  # similar to a document already selected


class Selected(NamedTuple):
    """The selected documents per query, in ranked order, padded with ids of -1 and scores of -inf."""

    ids: Int[np.ndarray, "queries depth"]  # global ids, int64
    scores: Float[np.ndarray, "queries depth"]  # inner products with the query, float32, for any retriever
    dropped: Dropped


def select(
    selection: Selection,
    query_embeddings: Float[np.ndarray, "queries embed"],
    candidate_ids: Int[np.ndarray, "queries candidates"],
    memory: Memory,
    exclude: Int[np.ndarray, " queries"],
) -> Selected:
    """Walk each ranked list from the top and select up to `selection.depth` documents (section 3.2, diversity).

    A candidate is dropped if it is withdrawn, if it is the main document or has its text or image, or if its inner
    product with the main document, the query, or a document already selected exceeds `max_similarity`. With a limit
    of 0.9:

      candidates : 7 (main document)  3 (0.95 to the query)  5 (0.8)  2 (0.7, but 0.92 to 5)  9 (0.6)
      selected   : 5 9 -1 ...

    Args:
      query_embeddings: the queries of the search.
      candidate_ids: global ids, best first, distinct per query; -1 for none.
      exclude: global id of the document that each query comes from; -1 if it is not in the memory.
    """
    at_once = max(1, HELD_BYTES // (4 * (candidate_ids.shape[1] + 1) * memory.embed_dim))
    pieces = [slice(start, start + at_once) for start in range(0, max(len(candidate_ids), 1), at_once)]
    chunks = [_select_some(selection, query_embeddings[p], candidate_ids[p], memory, exclude[p]) for p in pieces]
    return Selected(
        ids=np.concatenate([chunk.ids for chunk in chunks]),
        scores=np.concatenate([chunk.scores for chunk in chunks]),
        dropped=Dropped(*(sum(counts) for counts in zip(*(chunk.dropped for chunk in chunks), strict=True))),
    )


def _select_some(
    selection: Selection,
    query_embeddings: Float[np.ndarray, "queries embed"],
    candidate_ids: Int[np.ndarray, "queries candidates"],
    memory: Memory,
    exclude: Int[np.ndarray, " queries"],
) -> Selected:
    """`select` for queries whose candidates' embeddings fit into `HELD_BYTES`."""
    ids = np.column_stack([candidate_ids, exclude]).astype(np.int64)
    held, places = memory.held(ids)
    taken, to_query = np.zeros(candidate_ids.shape, bool), np.zeros(candidate_ids.shape, np.float32)
    dropped = np.zeros((len(ids), len(Dropped._fields)), np.int64)
    many = candidate_ids.shape[1]
    kept = min(selection.depth, many) if many > _RANKS_AT_ONCE else 0  # of earlier ranks, to compare with
    width = min(_RANKS_AT_ONCE, many) + 1
    most = _THREAD_BYTES // (4 * (width + kept) * max(memory.embed_dim, 1))
    at_once = max(1, min(_QUERIES_AT_ONCE, len(ids), most))
    workers = max(1, min(os.cpu_count() or 1, -(-len(ids) // at_once)))

    def work(worker: int) -> None:
        # One buffer for all steps: allocating a new one takes longer than filling it.
        buffer = np.empty(at_once * width * memory.embed_dim, np.float32)
        for start in range(worker * at_once, len(ids), workers * at_once):
            some = slice(start, start + at_once)
            queries = np.asarray(query_embeddings[some], np.float32)
            chosen = np.zeros((len(queries), kept, memory.embed_dim), np.float32)
            for first in range(0, many, _RANKS_AT_ONCE):
                ranks = slice(first, min(first + _RANKS_AT_ONCE, many))
                own, place = (np.column_stack([each[some, ranks], each[some, -1]]) for each in (ids, places))
                shape = *own.shape, memory.embed_dim
                embeddings = buffer[: math.prod(shape)].reshape(shape)
                np.take(held, place, axis=0, out=embeddings, mode="clip")  # this mode writes to `out` without a copy
                embeddings[own < 0] = 0
                before = taken[some].sum(axis=1)
                some_ids = candidate_ids[some, ranks]
                walked = _walk(selection, queries, embeddings, some_ids, memory, exclude[some], chosen, before)
                taken[some, ranks], to_query[some, ranks], of_rules = walked
                dropped[some] += of_rules
                if kept:
                    rows, columns = np.nonzero(walked[0])
                    slots = before[rows] + walked[0].cumsum(axis=1)[rows, columns] - 1
                    chosen[rows, slots] = embeddings[rows, columns]

    with ThreadPoolExecutor(workers) as threads:  # NumPy gathers and multiplies without the GIL
        list(threads.map(work, range(workers)))
    order = np.argsort(~taken, axis=1, kind="stable")[:, : selection.depth]  # the selected ones first, in ranked order
    is_document = np.take_along_axis(taken, order, axis=1)
    padding = ((0, 0), (0, selection.depth - order.shape[1]))
    chosen = np.where(is_document, np.take_along_axis(ids, order, axis=1), -1)
    scores = np.where(is_document, np.take_along_axis(to_query, order, axis=1), np.float32(-np.inf))
    return Selected(
        np.pad(chosen, padding, constant_values=-1),
        np.pad(scores, padding, constant_values=-np.inf),
        Dropped(*dropped.sum(axis=0).tolist()),
    )


def _walk(
    selection: Selection,
    query_embeddings: Float[np.ndarray, "queries embed"],
    embeddings: Float[np.ndarray, "queries candidates_and_main embed"],
    candidate_ids: Int[np.ndarray, "queries candidates"],
    memory: Memory,
    exclude: Int[np.ndarray, " queries"],
    chosen: Float[np.ndarray, "queries chosen embed"],
    before: Int[np.ndarray, " queries"],
) -> tuple[
    Bool[np.ndarray, "queries candidates"], Float[np.ndarray, "queries candidates"], Int[np.ndarray, "queries rules"]
]:
    """Which candidates are selected, their inner products with the query, and how many each rule of `Dropped` dropped.

    Vectorized over the queries: one step per rank.

    Args:
      chosen: the embeddings of those that were selected at better ranks; zeros for none.
      before: how many those are.
    """
    to_each_other = embeddings[:, :-1] @ embeddings.swapaxes(1, 2)
    to_main = to_each_other[:, :, -1]
    to_query = np.vecdot(embeddings[:, :-1], query_embeddings[:, None])
    is_withdrawn, is_duplicate = memory.are_withdrawn(candidate_ids), memory.duplicates(candidate_ids, exclude)
    # Rounding can make the inner product of equal unit vectors exceed 1; a limit of 1 must not drop them.
    limit = selection.max_similarity if selection.max_similarity < 1 else np.inf
    like_chosen = (embeddings[:, :-1] @ chosen.swapaxes(1, 2) > limit).any(axis=2)
    taken = np.zeros(candidate_ids.shape, bool)
    dropped = np.zeros((len(candidate_ids), len(Dropped._fields)), np.int64)
    for place in range(candidate_ids.shape[1]):
        ids = candidate_ids[:, place]
        considered = (ids >= 0) & (before + taken.sum(axis=1) < selection.depth)
        rules = (
            is_withdrawn[:, place],
            ids == exclude,
            is_duplicate[:, place],
            to_main[:, place] > limit,
            to_query[:, place] > limit,
            (taken & (to_each_other[:, place, :-1] > limit)).any(axis=1) | like_chosen[:, place],
        )
        for number, broken in enumerate(rules):
            dropped[:, number] += considered & broken
            considered &= ~broken
        taken[:, place] = considered
    return taken, to_query, dropped
