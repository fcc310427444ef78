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

HELD_BYTES = 2**30  # of embeddings that are read from disk at once, each for all queries it is a candidate of
_QUERIES_AT_ONCE = 256  # by a thread: 13 MB of embeddings for 16 candidates of 768 dimensions


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
    exclude: Int[np.ndarray, " queries"],
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
    """`select` of queries whose candidates' embeddings are held at once."""
    ids = np.column_stack([candidate_ids, exclude]).astype(np.int64)
    held, places = memory.held(ids)
    taken, to_query = np.zeros(candidate_ids.shape, bool), np.zeros(candidate_ids.shape, np.float32)
    dropped = np.zeros((len(ids), len(Dropped._fields)), np.int64)
    workers = max(1, min(os.cpu_count() or 1, -(-len(ids) // _QUERIES_AT_ONCE)))

    def work(worker: int) -> None:
        # One buffer for all steps: new memory takes the kernel longer to hand out than this takes to fill.
        buffer = np.empty((min(_QUERIES_AT_ONCE, len(ids)), ids.shape[1], memory.embed_dim), np.float32)
        for start in range(worker * _QUERIES_AT_ONCE, len(ids), workers * _QUERIES_AT_ONCE):
            some = slice(start, start + _QUERIES_AT_ONCE)
            embeddings = buffer[: len(ids[some])]
            np.take(held, places[some], axis=0, out=embeddings, mode="clip")  # the mode that copies into `out` at once
            embeddings[ids[some] < 0] = 0
            queries = np.asarray(query_embeddings[some], np.float32)
            walked = _walk(selection, queries, embeddings, candidate_ids[some], memory, exclude[some])
            taken[some], to_query[some], dropped[some] = walked

    with ThreadPoolExecutor(workers) as threads:  # NumPy gathers and multiplies outside of Python's lock
        list(threads.map(work, range(workers)))
    order = np.argsort(~taken, axis=1, kind="stable")[:, : selection.depth]  # the taken ones first, in their order
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
) -> tuple[
    Bool[np.ndarray, "queries candidates"], Float[np.ndarray, "queries candidates"], Int[np.ndarray, "queries rules"]
]:
    """Which candidates are taken, all inner products with the query, and how many fell to each rule of `Dropped`.

    Vectorized over the queries: one step per place in the ranked list.
    """
    to_each_other = embeddings[:, :-1] @ embeddings.swapaxes(1, 2)
    to_main = to_each_other[:, :, -1]
    to_query = np.vecdot(embeddings[:, :-1], query_embeddings[:, None])
    is_withdrawn, is_duplicate = memory.are_withdrawn(candidate_ids), memory.duplicates(candidate_ids, exclude)
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
            (taken & (to_each_other[:, place, :-1] > limit)).any(axis=1),
        )
        for number, broken in enumerate(rules):
            dropped[:, number] += considered & broken
            considered &= ~broken
        taken[:, place] = considered
    return taken, to_query, dropped
