"""The retriever protocols, which any dataclass may satisfy, and the search over all parts of a memory."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Float, Int

from rac3.config import InputError
from rac3.retrieval.memory import Memory, MemoryPart


@dataclass(frozen=True, eq=False)
class Queries:
    """A batch of queries, each as a key, an embedding and a text. A retriever uses the ones it needs.

    Raises:
      InputError: the three differ in length, or an embedding contains NaN or infinity.
    """

    keys: Sequence[str]  # names of the queries, which seed random choices
    embeddings: Float[np.ndarray, "queries embed"]  # norm 1
    texts: Sequence[str]  # "" for an image-only query

    def __post_init__(self) -> None:
        if not len(self.keys) == len(self.embeddings) == len(self.texts):
            raise InputError(
                f"queries have {len(self.keys)} keys, {len(self.embeddings)} embeddings and {len(self.texts)} texts; "
                "give one of each per query"
            )
        finite = np.isfinite(self.embeddings).all(axis=1)
        if not finite.all():
            raise InputError(
                f"the embedding of query {self.keys[int(np.argmin(finite))]!r} contains NaN or infinity; embed it again"
            )

    def __len__(self) -> int:
        return len(self.embeddings)


@runtime_checkable
class Index(Protocol):
    """One part of the memory, ready to be searched."""

    def search(self, queries: Queries, k: int) -> tuple[Float[np.ndarray, "queries k"], Int[np.ndarray, "queries k"]]:
        """The k best documents of the part for each query.

        Returns:
          scores: descending, comparable between the parts of a memory. An index over embeddings gives the inner
            products r(q, m) (section 3.2, equation 1). Any other score works too: `selection` computes its own
            similarities.
          rows: distinct rows of the part, best first. Score -inf and row -1 if the part has fewer than k documents.
        """
        ...


@runtime_checkable
class Retriever(Protocol):
    """The config of a retriever: any frozen dataclass with these three members. There is no registry."""

    @property
    def num_neighbors(self) -> int:
        """Candidates per query, from which selection picks."""
        ...

    def build(self, part: MemoryPart, folder: Path) -> None:
        """Write the index of one part into an empty folder, which may be renamed later. Writing nothing is fine."""
        ...

    def open(self, part: MemoryPart, folder: Path) -> Index:
        """The index that `build` wrote for this part."""
        ...


def search_only(default: Any) -> Any:
    """A dataclass field that does not affect `build`: changing it keeps existing indexes valid."""
    return field(default=default, metadata={"search_only": True})


def search_only_fields(retriever: Any) -> set[str]:
    """The names of the `search_only` fields."""
    return {each.name for each in fields(retriever) if each.metadata.get("search_only")}


@dataclass(frozen=True)
class Needs:
    """The resources that the index of one part of a memory takes, by arithmetic.

    Attributes:
      build_bytes: host memory during the build.
      search_bytes: host memory during a search.
      device_bytes: memory on each accelerator during a search, at least.
      disk_bytes: size of its files.
      build_flops: FLOPs of the build.
      query_flops: FLOPs of a search per query.
      on_devices: the search runs on accelerators if there are any; else on CPU cores.
    """

    build_bytes: float = 0.0
    search_bytes: float = 0.0
    device_bytes: float = 0.0
    disk_bytes: float = 0.0
    build_flops: float = 0.0
    query_flops: float = 0.0
    on_devices: bool = False


@runtime_checkable
class Planned(Protocol):
    """A retriever that estimates its resources for `rac3 plan`. Optional for your own retriever."""

    def needs(self, documents: int, width: int) -> Needs:
        """The needs of the index of a part with this many documents, with vectors of this width."""
        ...


@runtime_checkable
class Tunable(Protocol):
    """A retriever that trades recall for speed at search time, for `rac3 evaluate --task retrieval`. Optional."""

    def efforts(self, documents: int) -> Mapping[str, Retriever]:
        """Named settings for a part with this many documents, from the least effort to the most.

        Each can open the indexes that this retriever has built.
        """
        ...


@runtime_checkable
class Adjustable(Protocol):
    """A retriever that finds more with another setting than `num_neighbors`. Optional."""

    def effort(self, documents: int) -> str:
        """The setting and its value for a part with this many documents, such as `retriever.search='nprobe=1'`; "" if
        none applies.
        """
        ...


@runtime_checkable
class Chosen(Protocol):
    """A retriever whose documents a person has named: all of them are shown, however alike they are."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the documents, in the order in which they are shown."""
        ...

    def check(self, memory: Memory) -> None:
        """Raises InputError: a key belongs to no document of the memory, or to several."""
        ...


def check_num_neighbors(num_neighbors: int) -> None:
    """Raise InputError unless a retriever's `num_neighbors` is at least 1."""
    if num_neighbors < 1:
        raise InputError(
            f"retriever.num_neighbors={num_neighbors} is below 1; use at least 1, or retriever:none to retrieve nothing"
        )


def no_candidates(num_queries: int, k: int) -> tuple[Float[np.ndarray, "queries k"], Int[np.ndarray, "queries k"]]:
    """An empty search result: scores of -inf and rows of -1."""
    return np.full((num_queries, k), -np.inf, np.float32), np.full((num_queries, k), -1, np.int64)


def ranked(
    scores: Float[np.ndarray, "queries candidates"], ids: Int[np.ndarray, "queries candidates"], k: int
) -> tuple[Float[np.ndarray, "queries k"], Int[np.ndarray, "queries k"]]:
    """The k candidates (of at least k) with the highest scores, descending; ties by the lower id."""
    order = np.lexsort((ids, -scores), axis=-1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)


def search_memory(
    indexes: Sequence[Index], memory: Memory, queries: Queries, k: int
) -> tuple[Float[np.ndarray, "queries k"], Int[np.ndarray, "queries k"]]:
    """Search every part, each in its own thread, and merge by score.

    Args:
      indexes: one per part of `memory`, in its order.

    Returns:
      scores: float32, descending.
      ids: global ids, int64; ties by the lower id. Score -inf and id -1 if the memory has fewer than k documents.

    Raises:
      InputError: an index breaks the contract of `Index.search`.
    """
    if len(queries) == 0 or k == 0:
        return no_candidates(len(queries), k)
    if len(memory.parts) > 1 and jax.process_count() == 1:
        with ThreadPoolExecutor(min(len(memory.parts), os.cpu_count() or 1), "search-part") as threads:
            found = list(threads.map(lambda index: index.search(queries, k), indexes))
    else:  # processes may synchronize inside a search, so all must visit the parts in one order
        found = [index.search(queries, k) for index in indexes]
    all_scores, all_ids = [], []
    for (scores, rows), index, part, offset in zip(found, indexes, memory.parts, memory.offsets[:-1], strict=True):
        _check_found(scores, rows, (len(queries), k), index, part)
        all_scores.append(np.asarray(scores, np.float32))
        all_ids.append(np.where(rows < 0, -1, rows.astype(np.int64) + offset))
    return ranked(np.concatenate(all_scores, axis=1), np.concatenate(all_ids, axis=1), k)


def _check_found(scores: np.ndarray, rows: np.ndarray, shape: tuple[int, int], index: Index, part: MemoryPart) -> None:
    """Raise InputError if a user's index breaks the contract, before it puts a wrong neighbor into training."""
    name = f"{type(index).__name__}.search"
    if scores.shape != shape or rows.shape != shape:
        raise InputError(
            f"{name} returned scores {scores.shape} and rows {rows.shape} instead of [queries, k] = {shape}; "
            "pad with score -inf and row -1"
        )
    if rows.min() < -1 or rows.max() >= len(part):
        raise InputError(
            f"{name} returned rows {rows.min()} to {rows.max()} for a part of {len(part)} documents; "
            f"return rows from 0 to {len(part) - 1}, or -1 for none"
        )
    if np.isnan(scores).any() or (scores[rows < 0] != -np.inf).any():
        raise InputError(f"{name} returned NaN, or a row -1 whose score is not -inf; give rows of -1 the score -inf")
