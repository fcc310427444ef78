"""The memory: the documents that a retriever searches, in parts. Adding a part rebuilds no other."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64
from numpy.typing import ArrayLike

from rac3.config import InputError

_GATHERED_BYTES = 2**24  # of embeddings that each thread of `inner_products` holds


@runtime_checkable
class EmbeddingRows(Protocol):
    """float [documents, embed], indexed by a slice or array of rows: a NumPy array, a memory map or a tensorstore."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice | np.ndarray, /) -> ArrayLike: ...


@dataclass(frozen=True, eq=False)
class MemoryPart:
    """The documents of one split: row i of `embeddings`, `texts` and `keys` is document i.

    Raises:
      InputError: `embeddings` is not a matrix, or the fields differ in length.
    """

    name: str  # of the split; unique within a memory
    embeddings: EmbeddingRows  # [documents, embed]: mixed-modal embeddings of norm 1 (or 0, to match nothing)
    texts: Sequence[str]  # may be lazy: read on access
    keys: Sequence[str] = ()  # unique within the part; may be left out if no retriever needs them
    hashes: tuple[UInt64[np.ndarray, " documents"], ...] = ()  # of texts, and of images: equal for copies; 0 is none
    withdrawn: Int[np.ndarray, " rows"] | None = None  # documents that must not be retrieved

    def __post_init__(self) -> None:
        if len(self.embeddings.shape) != 2:
            raise InputError(
                f"memory part {self.name!r} has embeddings of shape {tuple(self.embeddings.shape)}; "
                "give a matrix [documents, embed]"
            )
        if len(self.texts) != len(self):
            raise InputError(
                f"memory part {self.name!r} has {len(self)} embeddings but {len(self.texts)} texts; give one each"
            )
        if len(self.keys) not in (0, len(self)):
            raise InputError(
                f"memory part {self.name!r} has {len(self)} embeddings but {len(self.keys)} keys; give one each"
            )
        if any(len(column) != len(self) for column in self.hashes):
            raise InputError(
                f"memory part {self.name!r} has {len(self)} embeddings but more or fewer hashes; give one each"
            )

    def __len__(self) -> int:
        return self.embeddings.shape[0]

    @property
    def embed_dim(self) -> int:
        return self.embeddings.shape[1]

    def read(self, rows: slice | Int[np.ndarray, " rows"]) -> Float[np.ndarray, "rows embed"]:
        """Read rows of the embeddings as float32 into host memory.

        Every retriever reads them here, so none can search a NaN: depending on the index, it would outrank every score
        or silently lose the document.

        Args:
          rows: a slice with step 1, or row ids in [0, len(self)).

        Raises:
          InputError: a row contains NaN or infinity.
        """
        block = np.ascontiguousarray(self.embeddings[rows], dtype=np.float32)
        if not np.isfinite(block.sum(axis=1)).all() and not (finite := np.isfinite(block).all(axis=1)).all():
            bad = int(np.argmin(finite))
            row = (rows.start or 0) + bad if isinstance(rows, slice) else rows[bad]
            raise InputError(
                f"memory part {self.name!r}: the embedding of document {row} contains NaN or infinity; "
                "embed that document again, or reject it"
            )
        return block

    def inner_products(
        self, queries: Float[np.ndarray, "queries embed"], rows: Int[np.ndarray, "queries candidates"]
    ) -> Float[np.ndarray, "queries candidates"]:
        """Inner products of each query with its own documents, in float32; -inf for the row -1.

        Raises:
          InputError: an embedding contains NaN or infinity.
        """
        products = np.empty(rows.shape, np.float32)
        at_once = max(1, _GATHERED_BYTES // max(4 * rows.shape[1] * self.embed_dim, 1))

        def fill(start: int) -> None:
            some = slice(start, start + at_once)
            held, places = self.held(np.maximum(rows[some], 0))
            for found, own, query in zip(products[some], places, queries[some], strict=True):
                np.vecdot(held[own], query, out=found)

        with ThreadPoolExecutor(os.cpu_count()) as threads:  # NumPy gathers and multiplies without the GIL
            list(threads.map(fill, range(0, len(rows), at_once)))
        return np.where(rows < 0, np.float32(-np.inf), products)

    def held(
        self, rows: Int[np.ndarray, "*rows"]
    ) -> tuple[Float[np.ndarray, "documents embed"], Int[np.ndarray, "*rows"]]:
        """Embeddings in host memory that include those of `rows`, and the index of each row in them.

        The whole part if its embeddings are a float32 array in memory; else the distinct rows, read from disk.

        Raises:
          InputError: one of the returned embeddings contains NaN or infinity.
        """
        if type(self.embeddings) is np.ndarray and self.embeddings.dtype == np.float32:  # a memory map is on disk
            return self._all, rows
        distinct, places = np.unique(rows, return_inverse=True)
        return self.read(distinct), places.reshape(rows.shape)

    @cached_property
    def _all(self) -> Float[np.ndarray, "documents embed"]:
        return self.read(slice(0, len(self)))


@dataclass(frozen=True, eq=False)
class Memory:
    """The parts of a memory, in the order they were added.

    The global id of a document is its part's offset plus its row, so adding a part changes no existing id or index.

    Raises:
      InputError: no parts, two parts with the same name, or embeddings of different widths.
    """

    parts: tuple[MemoryPart, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise InputError("the memory has 0 parts; give at least one")
        names = [part.name for part in self.parts]
        if len(set(names)) < len(names):
            raise InputError(f"the memory's parts are named {', '.join(names)}; give each its own name")
        for part in self.parts:
            if part.embed_dim != self.embed_dim:
                raise InputError(
                    f"memory part {part.name!r} has embeddings of width {part.embed_dim}, but "
                    f"{names[0]!r} has {self.embed_dim}; embed both with the same encoder"
                )

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @property
    def embed_dim(self) -> int:
        return self.parts[0].embed_dim

    @property
    def offsets(self) -> Int[np.ndarray, " parts_plus_1"]:
        """The global id of each part's first document, then the size of the memory."""
        return np.cumsum([0, *(len(part) for part in self.parts)], dtype=np.int64)

    def duplicates(
        self, ids: Int[np.ndarray, "n candidates"], of: Int[np.ndarray, " n"]
    ) -> Bool[np.ndarray, "n candidates"]:
        """Which documents `ids` have the text or image of their row's document in `of`; False for the id -1."""
        found = np.zeros(ids.shape, bool)
        for kind in range(max(len(part.hashes) for part in self.parts)):
            theirs, own = self._hashes(kind, ids.ravel()).reshape(ids.shape), self._hashes(kind, of)
            found |= (theirs == own[:, None]) & (theirs != 0)
        return found

    def are_withdrawn(self, ids: Int[np.ndarray, "*ids"]) -> Bool[np.ndarray, "*ids"]:
        """Which documents must not be retrieved."""
        found = np.zeros(ids.shape, bool)
        for part, offset in zip(self.parts, self.offsets[:-1], strict=True):
            if part.withdrawn is not None and len(part.withdrawn):
                found |= np.isin(ids, part.withdrawn + offset)
        return found

    def _hashes(self, kind: int, ids: Int[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
        """Hashes of these documents; 0 for the id -1 and for parts without hashes."""
        hashes = np.zeros(len(ids), np.uint64)
        for part, offset in zip(self.parts, self.offsets[:-1], strict=True):
            here = np.flatnonzero((ids >= offset) & (ids < offset + len(part)))
            if here.size and kind < len(part.hashes):
                hashes[here] = part.hashes[kind][ids[here] - offset]
        return hashes

    def held(
        self, ids: Int[np.ndarray, "*ids"]
    ) -> tuple[Float[np.ndarray, "documents embed"], Int[np.ndarray, "*ids"]]:
        """Embeddings in host memory that include those of `ids`, and the index of each id in them; any for the id -1.

        Raises:
          IndexError, InputError: as `embeddings_of`.
        """
        self._check(ids)
        if len(self.parts) == 1 and len(self):
            return self.parts[0].held(np.maximum(ids, 0))
        distinct, places = np.unique(ids, return_inverse=True)
        return self.embeddings_of(distinct), places.reshape(ids.shape)

    def embeddings_of(self, ids: Int[np.ndarray, "*ids"]) -> Float[np.ndarray, "*ids embed"]:
        """Embeddings of the documents with these global ids, float32; zeros for the id -1 (no document).

        Raises:
          IndexError: an id is below -1 or not below the size of the memory.
          InputError: one of the embeddings contains NaN or infinity.
        """
        self._check(ids)
        flat = ids.ravel()
        if flat.size and flat.min() >= 0 and len(self.parts) == 1:
            return self.parts[0].read(flat).reshape(*ids.shape, self.embed_dim)
        embeddings = np.zeros((flat.size, self.embed_dim), np.float32)
        part_of = np.searchsorted(self.offsets, flat, side="right") - 1  # -1 for the id -1
        for number, (part, offset) in enumerate(zip(self.parts, self.offsets[:-1], strict=True)):
            here = np.flatnonzero(part_of == number)
            if here.size:
                embeddings[here] = part.read(flat[here] - offset)
        return embeddings.reshape(*ids.shape, self.embed_dim)

    def _check(self, ids: Int[np.ndarray, "*ids"]) -> None:
        if ids.size and (ids.min() < -1 or ids.max() >= len(self)):
            raise IndexError(f"document ids {ids.min()} to {ids.max()} are not all in [-1, {len(self)})")
