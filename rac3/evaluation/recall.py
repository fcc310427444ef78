"""Retrieval recall: does what comes back show what the query shows?"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int


def recall_at(
    k: int, neighbors: Int[np.ndarray, "queries depth"], query_entities: Sequence[str], memory_entities: Sequence[str]
) -> float:
    """Share of the queries with a document of their own entity among the first `k` neighbors (-1 is none)."""
    hits = [
        any(number >= 0 and memory_entities[number] == entity for number in row[:k].tolist())
        for row, entity in zip(neighbors, query_entities, strict=True)
    ]
    return float(np.mean(hits))


def pair_recall_at(
    k: int, queries: Float[np.ndarray, "documents embed"], answers: Float[np.ndarray, "documents embed"]
) -> float:
    """Share of the queries whose own answer (same row) is among the `k` answers of the highest inner product."""
    scores = queries @ answers.T
    own = np.diagonal(scores)[:, None]
    return float(((scores > own).sum(1) < k).mean())
