"""Baseline retrievers: random documents, and none."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from rac3.config import InputError
from rac3.retrieval.memory import MemoryPart
from rac3.retrieval.retriever import Needs, Queries, check_num_neighbors, no_candidates, search_only


@dataclass(frozen=True)
class Random:
    """Uniformly random documents, without replacement, for any query (the ablation of C.3).

    The draw is a pure function of (seed, part name, query key). Its cost does not depend on the size of the memory.

    It is uniform over several parts, too. Suppose that each document rings after an independent Exp(1) time: the first
    k to ring are a uniform draw, in uniformly random order. Each part simulates its first k rings, and the score is
    minus the time, so merging parts by score takes the first k rings of the whole memory: a uniform draw from the
    union, however unequal the parts.
    """

    num_neighbors: int = search_only(16)
    seed: int = search_only(0)

    def __post_init__(self) -> None:
        check_num_neighbors(self.num_neighbors)

    def build(self, part: MemoryPart, folder: Path) -> None:
        """Write nothing."""

    def needs(self, documents: int, width: int) -> Needs:
        """Next to nothing."""
        return Needs()

    def open(self, part: MemoryPart, folder: Path) -> "RandomIndex":
        return RandomIndex(self.seed, part.name, len(part))


@dataclass(frozen=True)
class RandomIndex:
    seed: int
    part_name: str
    size: int  # documents in the part

    def search(self, queries: Queries, k: int) -> tuple[Float[np.ndarray, "queries k"], Int[np.ndarray, "queries k"]]:
        """Minus the ring times (see `Random`; not similarities), and the rows that ring.

        The first j of k neighbors are the result of a search for j.
        """
        scores, rows = no_candidates(len(queries), k)
        drawn = min(k, self.size)
        if len(queries) == 0 or drawn == 0:
            return scores, rows
        uniform = self._uniform(queries, drawn)
        taken = rows[:, :drawn]
        for i in range(drawn):
            # The t-th row not taken yet, t uniform: step over the taken ones in ascending order.
            t = (uniform[:, i, 0] * (self.size - i)).astype(np.int64)
            for earlier in np.sort(taken[:, :i], axis=1).T:
                t += t >= earlier
            taken[:, i] = t
        # The gap until the next of n documents rings is Exp(n).
        gaps = -np.log1p(-uniform[:, :, 1]) / (self.size - np.arange(drawn))
        scores[:, :drawn] = -np.cumsum(gaps, axis=1)
        return scores, rows

    def _uniform(self, queries: Queries, count: int) -> Float[np.ndarray, "queries count 2"]:
        """Numbers in [0, 1) from a hash of (seed, part, key): equal on every machine and in every batch."""
        digests = (
            hashlib.shake_128(f"{self.seed}\0{self.part_name}\0{key}".encode()).digest(16 * count)
            for key in queries.keys
        )
        bits = np.frombuffer(b"".join(digests), "<u8").reshape(len(queries), count, 2)
        return (bits >> np.uint64(11)) * 2.0**-53


@dataclass(frozen=True)
class NoRetriever:
    """Retrieves nothing: the vanilla CM3 baseline (section 4.1)."""

    num_neighbors: int = search_only(0)

    def __post_init__(self) -> None:
        if self.num_neighbors != 0:
            raise InputError(
                f"retriever.num_neighbors={self.num_neighbors} is not 0, but retriever:none retrieves nothing; "
                "use 0, or another retriever"
            )

    def build(self, part: MemoryPart, folder: Path) -> None:
        """Write nothing."""

    def open(self, part: MemoryPart, folder: Path) -> "NoIndex":
        return NoIndex()


@dataclass(frozen=True)
class NoIndex:
    def search(self, queries: Queries, k: int) -> tuple[Float[np.ndarray, "queries k"], Int[np.ndarray, "queries k"]]:
        """An empty result. `k` is 0 if it is `NoRetriever.num_neighbors`."""
        return no_candidates(len(queries), k)
