"""From a ranked list of candidates to the documents worth having in context.

In training the query is part of a document of the memory, the main document, which the model is to learn: neither it
nor a document that repeats its text or its image may come back, or the model learns to copy.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from rac3.config import InputError
from rac3.retrieval.memory import Memory

_QUERIES_AT_ONCE = 1024  # bounds the gathered embeddings: 50 MB for 16 candidates of 768 dimensions


@dataclass(frozen=True)
class Selection:
    """Redundancy avoidance (section 3.2), in training and at inference alike."""

    max_similarity: float = 0.9  # inner product, to the query, the main document or one taken; 1 keeps all but copies
    depth: int = 8  # documents kept per query: the pool from which training draws K anew in each epoch

    def __post_init__(self) -> None:
        if not 0 < self.max_similarity <= 1:
            raise InputError(
                f"selection.max_similarity={self.max_similarity} is not in (0, 1]; use 0.9, or 1 to skip none"
            )
        if self.depth < 1:
            raise InputError(f"selection.depth={self.depth} is below 1; use at least 1, about half of num_neighbors")


class Dropped(NamedTuple):
    """Candidates skipped on the way to `depth` documents, over all queries, each under the first rule it met."""

    withdrawn: int
    main_document: int
    duplicate: int  # of the main document: its text, or its image, under another key
    similar_to_main: int
    similar_to_query: int
    redundant: int  # similar to a document taken


class Selected(NamedTuple):
    """Documents per query in the order of the ranked list; ids of -1 and scores of -inf once there are no more."""

    ids: Int[np.ndarray, "queries depth"]  # global ids, int64
    scores: Float[np.ndarray, "queries depth"]  # inner product with the query, float32, whatever ranked the list
    dropped: Dropped


def select(
    selection: Selection,
    query_embeddings: Float[np.ndarray, "queries embed"],
    candidate_ids: Int[np.ndarray, "queries candidates"],
    memory: Memory,
    exclude: Int[np.ndarray, "queries"],
) -> Selected:
    """Walk each ranked list from the top and take up to `selection.depth` documents (section 3.2, diversity).

    A candidate is skipped if it is withdrawn, if it is the main document itself or has its text or image, or if its
    inner product with the main document, with the query, or with a document already taken exceeds `max_similarity`.
    With a limit of 0.9:

      candidates : 7 (main document)  3 (0.95 to the query)  5 (0.8)  2 (0.7, but 0.92 to 5)  9 (0.6)
      selected   : 5 9 -1 ...

    Args:
      query_embeddings: of the queries that were searched for.
      candidate_ids: global ids, best first, distinct per query; -1 for none.
      exclude: global id of the document that each query was made from; -1 if it is not in the memory.
    """
    starts = range(0, max(len(candidate_ids), 1), _QUERIES_AT_ONCE)

    def some(start: int) -> Selected:
        rows = slice(start, start + _QUERIES_AT_ONCE)
        return _select_some(selection, query_embeddings[rows], candidate_ids[rows], memory, exclude[rows])

    with ThreadPoolExecutor(os.cpu_count()) as threads:  # NumPy gathers and multiplies outside of Python's lock
        chunks = list(threads.map(some, starts))
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
    exclude: Int[np.ndarray, "queries"],
) -> Selected:
    """`select` of few queries: a walk over the first candidates, then over all of them where those did not suffice.

    What selection costs is to read embeddings, and most lists are full at `depth` or soon after.
    """
    shape, depth = candidate_ids.shape, selection.depth
    taken, to_query = np.zeros(shape, bool), np.zeros(shape, np.float32)
    dropped = np.zeros((shape[0], len(Dropped._fields)), np.int64)
    rows = np.arange(shape[0])
    for width in (min(depth + 2, shape[1]), shape[1]):
        walked = _walk(selection, query_embeddings[rows], candidate_ids[rows, :width], memory, exclude[rows])
        taken[rows, :width], to_query[rows, :width], dropped[rows] = walked
        if width == shape[1]:
            break
        rows = rows[(taken[rows].sum(axis=1) < depth) & (candidate_ids[rows, width] >= 0)]
    order = np.argsort(~taken, axis=1, kind="stable")[:, :depth]  # the taken ones first, in their order
    is_document = np.take_along_axis(taken, order, axis=1)
    padding = ((0, 0), (0, depth - order.shape[1]))
    ids = np.where(is_document, np.take_along_axis(candidate_ids, order, axis=1), -1).astype(np.int64)
    scores = np.where(is_document, np.take_along_axis(to_query, order, axis=1), np.float32(-np.inf))
    return Selected(
        np.pad(ids, padding, constant_values=-1),
        np.pad(scores, padding, constant_values=-np.inf),
        Dropped(*dropped.sum(axis=0).tolist()),
    )


def _walk(
    selection: Selection,
    query_embeddings: Float[np.ndarray, "queries embed"],
    candidate_ids: Int[np.ndarray, "queries candidates"],
    memory: Memory,
    exclude: Int[np.ndarray, "queries"],
) -> tuple[
    Bool[np.ndarray, "queries candidates"], Float[np.ndarray, "queries candidates"], Int[np.ndarray, "queries rules"]
]:
    """Which candidates are taken, all inner products with the query, and how many fell to each rule of `Dropped`.

    Vectorized over the queries: one step per place in the ranked list.
    """
    embeddings = memory.embeddings_of(candidate_ids)
    to_query = np.matmul(embeddings, np.asarray(query_embeddings, np.float32)[:, :, None])[:, :, 0]
    to_each_other = embeddings @ embeddings.swapaxes(1, 2)
    is_withdrawn, is_duplicate = memory.are_withdrawn(candidate_ids), memory.duplicates(candidate_ids, exclude)
    to_main = np.zeros_like(to_query)
    main = np.flatnonzero(exclude >= 0)
    if main.size:
        to_main[main] = np.matmul(embeddings[main], memory.embeddings_of(exclude[main])[:, :, None])[:, :, 0]
    # Rounding puts the inner product of equal unit vectors a little above 1, which must not be skipped at a limit of 1.
    limit = selection.max_similarity if selection.max_similarity < 1 else np.inf
    taken = np.zeros(candidate_ids.shape, bool)
    dropped = np.zeros((len(candidate_ids), len(Dropped._fields)), np.int64)
    for place in range(candidate_ids.shape[1]):
        ids = candidate_ids[:, place]
        considered = (ids >= 0) & (taken.sum(axis=1) < selection.depth)
        rules = (
            is_withdrawn[:, place],
            ids == exclude,
            is_duplicate[:, place],
            to_main[:, place] > limit,
            to_query[:, place] > limit,
            (taken & (to_each_other[:, place] > limit)).any(axis=1),
        )
        for number, broken in enumerate(rules):
            dropped[:, number] += considered & broken
            considered &= ~broken
        taken[:, place] = considered
    return taken, to_query, dropped
