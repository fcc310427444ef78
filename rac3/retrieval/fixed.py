"""Documents named by a person instead of retrieved ones (paper, sections 5.2 and 5.3)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from rac3.config import InputError
from rac3.retrieval.memory import Memory, MemoryPart
from rac3.retrieval.retriever import Queries, no_candidates


@dataclass(frozen=True)
class Fixed:
    """The documents with these keys, in this order, for every query.

    A key is looked up in every part of the memory, "PART:KEY" only in that part: memory:00000/000000017.
    """

    keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.keys)) < len(self.keys):
            raise InputError(f"retriever.keys={' '.join(self.keys)} names a document twice; name each one once")

    @property
    def num_neighbors(self) -> int:
        return len(self.keys)

    def build(self, part: MemoryPart, folder: Path) -> None:
        """Write nothing: documents are looked up by key. Raises InputError: there are no keys."""
        self._require_keys()

    def open(self, part: MemoryPart, folder: Path) -> "FixedIndex":
        """Raises InputError: there are no keys."""
        self._require_keys()
        return FixedIndex(np.array([_row(part, key) for key in self.keys]))

    def _require_keys(self) -> None:
        if not self.keys:
            raise InputError("retriever.keys names no document; give --retriever.keys KEY ..., or use retriever:none")

    def check(self, memory: Memory) -> None:
        """Raise InputError unless each key belongs to exactly one document."""
        for key in self.keys:
            names = [part.name for part in memory.parts if _row(part, key) >= 0]
            parts = " and ".join(part.name for part in memory.parts)
            if not names:
                raise InputError(f"retriever.keys: no document of {parts} has the key {key!r}; use one of theirs")
            if len(names) > 1:
                raise InputError(
                    f"retriever.keys: {' and '.join(names)} have a document {key!r}; use {names[0]}:{key}, for example"
                )


@dataclass(frozen=True)
class FixedIndex:
    rows: Int[np.ndarray, " keys"]  # -1 for the documents of other parts

    def search(self, queries: Queries, k: int) -> tuple[Float[np.ndarray, "queries k"], Int[np.ndarray, "queries k"]]:
        """Minus the index of each document in the keys (not a similarity), and its row."""
        scores, rows = no_candidates(len(queries), k)
        places = np.flatnonzero(self.rows >= 0)[:k]
        scores[:, : len(places)], rows[:, : len(places)] = -places, self.rows[places]
        return scores, rows


def _row(part: MemoryPart, key: str) -> int:
    """The row of the document with this key; -1 if the part has none."""
    name, colon, rest = key.partition(":")
    try:
        return part.keys.index(rest if colon and name == part.name else key)
    except ValueError:
        return -1
