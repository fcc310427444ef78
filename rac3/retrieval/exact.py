"""Exact maximum inner product search, on whatever devices JAX has."""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rac3.config import InputError
from rac3.retrieval.memory import MemoryPart
from rac3.retrieval.retriever import Queries, check_num_neighbors, no_candidates


@dataclass(frozen=True)
class Exact:
    """Every inner product is computed, in float32: the paper's search (section 3.2), and the reference for the rest.

    The memory streams through the device in blocks, so it may be larger than the device, and is read once per call
    of `search`: ask many queries at a time. Device memory: `query_rows` * `block_rows` * 4 bytes for the scores,
    two blocks of the memory, and all queries of the call.
    """

    num_neighbors: int = 16
    block_rows: int = 32_768  # documents per block
    query_rows: int = 1024  # queries that meet a block at once

    def __post_init__(self) -> None:
        check_num_neighbors(self.num_neighbors)
        for field, value in (("block_rows", self.block_rows), ("query_rows", self.query_rows)):
            if value < 1:
                raise InputError(f"retriever.{field}={value} is below 1; use at least 1, or thousands to be fast")

    def build(self, part: MemoryPart, folder: Path) -> None:
        """Writes nothing: the embeddings are the index."""

    def open(self, part: MemoryPart, folder: Path) -> "ExactIndex":
        return ExactIndex(self, part)


@dataclass(frozen=True)
class ExactIndex:
    config: Exact
    part: MemoryPart

    def search(self, queries: Queries, k: int) -> tuple[Float[np.ndarray, "queries k"], Int[np.ndarray, "queries k"]]:
        """Inner products (float32, descending; of equal ones the lower row first) and rows; see `Index.search`.

        Compiled once per part and k, for full batches of queries; a smaller batch is padded to a power of two, so
        that the calls of a session compile a handful of shapes rather than one each.
        """
        total, size = len(queries), len(self.part)
        if total == 0 or k == 0 or size == 0:
            return no_candidates(total, k)
        rows = min(self.config.query_rows, 1 << (total - 1).bit_length())
        starts = range(0, total, rows)
        batches = [jnp.asarray(_padded(queries.embeddings[start : start + rows], rows)) for start in starts]
        best = [(jnp.full((rows, k), -jnp.inf), jnp.full((rows, k), -1, jnp.int32)) for _ in starts]
        block_rows = min(self.config.block_rows, size)
        for start in range(0, size, block_rows):
            embeddings = self.part.read(slice(start, min(start + block_rows, size)))
            block = jax.device_put(_padded(embeddings, block_rows))
            # Dispatch runs ahead of the device: wait for the last block here, or the queue would hold the whole memory.
            jax.block_until_ready(best)
            best = [_search_block(*b, q, block, start, len(embeddings)) for b, q in zip(best, batches, strict=True)]
        scores = np.concatenate([np.asarray(scores) for scores, _ in best])[:total]
        found = np.concatenate([np.asarray(found) for _, found in best])[:total]
        return scores, found.astype(np.int64)


@jax.jit
def _search_block(
    best_scores: Float[Array, "queries k"],
    best_rows: Int[Array, "queries k"],
    queries: Float[Array, "queries embed"],
    block: Float[Array, "documents embed"],
    start: Int[Array, ""] | int,
    valid: Int[Array, ""] | int,
) -> tuple[Float[Array, "queries k"], Int[Array, "queries k"]]:
    """The best k of those found so far and of the block's first `valid` documents, whose rows begin at `start`."""
    scores = jnp.matmul(queries, block.T, precision=jax.lax.Precision.HIGHEST)
    scores = jnp.where(jnp.arange(block.shape[0]) < valid, scores, -jnp.inf)
    k = best_scores.shape[1]
    block_scores, block_rows = jax.lax.top_k(scores, min(k, block.shape[0]))
    block_rows = jnp.where(block_scores > -jnp.inf, block_rows + start, -1)
    # top_k keeps the first of equal scores, and what was found earlier has the lower rows.
    merged_rows = jnp.concatenate([best_rows, block_rows], axis=1)
    merged_scores, order = jax.lax.top_k(jnp.concatenate([best_scores, block_scores], axis=1), k)
    return merged_scores, jnp.take_along_axis(merged_rows, order, axis=1)


def _padded(rows: Float[np.ndarray, "rows embed"], size: int) -> Float[np.ndarray, "size embed"]:
    """`rows` as float32 with rows of zeros appended up to `size`."""
    return np.pad(np.asarray(rows, np.float32), ((0, size - len(rows)), (0, 0)))
