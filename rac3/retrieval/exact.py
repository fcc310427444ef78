"""Exact maximum inner product search on all of JAX's devices."""

import functools
import threading
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from rac3.config import InputError
from rac3.retrieval.memory import MemoryPart
from rac3.retrieval.retriever import Needs, Queries, check_num_neighbors, no_candidates, search_only

_GROUP = 32  # documents per group; a group is examined only if its best score is high enough
_TILE_ON_CPU = 512, 16_384  # queries x documents scored at once: 32 MiB of scores
_TILE = 1024, 65_536
_HOST_BYTES = 2**30  # of a part's embeddings kept between searches, if the device is the host
_SEARCHING = threading.Lock()  # multi-device programs must reach every device in one order
_BY_DEVICE, _WHOLE = PartitionSpec("device"), PartitionSpec()


@dataclass(frozen=True)
class Exact:
    """Computes every inner product: the paper's search (section 3.2), and the reference for the other retrievers.

    The memory streams through the devices in blocks, each device taking a share of the documents, so it may be larger
    than all device memory. Each call of `search` reads it once: batch many queries. Blocks stay on the devices while
    half of their memory is free (1 GiB in total on CPU), and the next call reads only the others. A device also holds
    two blocks, `query_rows` queries, and the scores of a tile (0.3 GB; 34 MB on CPU).

    With several processes (`jax.distributed`), each reads and searches only its share of the documents. All processes
    must call `search` with the same queries in the same order, and all get the same result.

    `dtype="bfloat16"` scores in bfloat16 with float32 sums, then rescores the best `num_neighbors + overscan` documents
    of each block in float32. It is faster where the hardware multiplies bfloat16 faster, and equal to float32 unless
    rounding ranks a neighbor below `overscan` other documents.
    """

    num_neighbors: int = search_only(16)
    dtype: Literal["float32", "bfloat16"] = search_only("float32")
    overscan: int = search_only(8)
    block_rows: int = search_only(65_536)  # documents that a device reads and searches at once
    query_rows: int = search_only(1024)  # queries searched at once

    def __post_init__(self) -> None:
        check_num_neighbors(self.num_neighbors)
        if self.dtype not in ("float32", "bfloat16"):
            raise InputError(f"retriever.dtype={self.dtype!r} is unknown; use float32 or bfloat16")
        if self.overscan < 0:
            raise InputError(f"retriever.overscan={self.overscan} is negative; use 0 or more, such as 8")
        for field, value in (("block_rows", self.block_rows), ("query_rows", self.query_rows)):
            if value < 1:
                raise InputError(f"retriever.{field}={value} is below 1; use at least 1, and thousands for speed")

    def build(self, part: MemoryPart, folder: Path) -> None:
        """Write nothing: the embeddings are the index."""

    def open(self, part: MemoryPart, folder: Path) -> "ExactIndex":
        return ExactIndex(self, part)

    def needs(self, documents: int, width: int) -> Needs:
        """The memory streams: a process and each of its devices hold at least two blocks."""
        rows = min(self.block_rows, documents)
        bytes_each = {"float32": 4.0, "bfloat16": 2.0}[self.dtype]
        return Needs(
            search_bytes=8.0 * rows * width,
            device_bytes=2 * bytes_each * rows * width,
            query_flops=2.0 * documents * width,
            on_devices=True,
        )


Best = tuple[Array, Array]  # scores and rows of each device, [devices, queries, k]


class ExactIndex:
    """A part in blocks of `mesh.size * block_rows` documents; each device gets an equal run of each block."""

    def __init__(self, config: Exact, part: MemoryPart) -> None:
        self.config, self.part = config, part
        devices = jax.devices()
        self.mesh = Mesh(np.array(devices), ("device",), axis_types=(AxisType.Auto,))
        self.tile_queries, tile_rows = _TILE_ON_CPU if devices[0].platform == "cpu" else _TILE
        # Equal blocks whose size is rounded up by at most 1/32: little padding, and parts of similar sizes share
        # compiled programs.
        each = max(1, -(-len(part) // len(devices)))
        rows = -(-each // -(-each // config.block_rows))
        rows = min(_round_up(rows, 1 << max(0, rows.bit_length() - 6)), config.block_rows)
        self.tiles = -(-rows // tile_rows)
        self.block_rows = _round_up(rows, self.tiles * _GROUP)
        self._kept: dict[int, Array] = {}  # blocks that stay on the devices, by number

    def search(self, queries: Queries, k: int) -> tuple[Float[np.ndarray, "queries k"], Int[np.ndarray, "queries k"]]:
        """Inner products (float32, descending; ties by the lower row) and rows; see `Index.search`.

        Compiles once per block size and k for full batches of queries. Smaller batches are padded to powers of two, to
        compile few shapes.

        Raises:
          InputError: an embedding contains NaN or infinity, or the processes of a run search for different queries.
        """
        total = len(queries)
        if total == 0 or k == 0 or len(self.part) == 0:
            return no_candidates(total, k)
        with _SEARCHING:
            return self._search(queries, k)

    def _search(self, queries: Queries, k: int) -> tuple[Float[np.ndarray, "queries k"], Int[np.ndarray, "queries k"]]:
        _check_that_all_search_for(queries, k)
        best, failure = [], None
        try:
            best = self._search_own_rows(np.asarray(queries.embeddings, np.float32), k)
        except InputError as error:
            failure = error
        _check_that_none_failed(failure)
        merged = [_merge_devices(*each, mesh=self.mesh) for each in best]
        scores = np.concatenate([np.asarray(scores) for scores, _ in merged])[: len(queries)]
        rows = np.concatenate([np.asarray(rows) for _, rows in merged])[: len(queries)]
        return scores, rows.astype(np.int64)

    def _search_own_rows(self, queries: Float[np.ndarray, "queries embed"], k: int) -> list[Best]:
        """The best of each device's documents, per batch of queries; the last batch is padded."""
        wanted = min(self.config.query_rows, 1 << (len(queries) - 1).bit_length())
        tile = min(wanted, self.tile_queries)
        rows = _round_up(wanted, tile)
        padded = np.pad(queries, ((0, -len(queries) % rows), (0, 0)))
        batches = [self._put(batch, _WHOLE) for batch in padded.reshape(-1, rows, queries.shape[1])]
        shape = self.mesh.size, rows, k
        by_device = NamedSharding(self.mesh, _BY_DEVICE)
        empty = jnp.full(shape, -jnp.inf, device=by_device), jnp.full(shape, -1, jnp.int32, device=by_device)
        best: list[Best] = [empty for _ in batches]
        for number, block in enumerate(self._blocks()):
            waiting = best
            start = number * self.mesh.size * self.block_rows
            best = [
                _search_block(
                    *each, batch, block, start, len(self.part), mesh=self.mesh, tiles=self.tiles, query_rows=tile,
                    dtype=self.config.dtype, overscan=self.config.overscan if self.config.dtype == "bfloat16" else 0,
                )
                for each, batch in zip(best, batches, strict=True)
            ]  # fmt: skip
            # Dispatch runs ahead of the devices: without this wait, the queue would hold the whole memory.
            jax.block_until_ready(waiting)
        return best

    def _blocks(self) -> Iterator[Float[Array, "documents embed"]]:
        """The blocks, on the devices; the next one is read while the devices search this one."""
        kept = dict(self._kept)
        missing = [number for number in range(self._num_blocks) if number not in kept]
        with ThreadPoolExecutor(1, "read-block") as thread:
            ahead = deque(thread.submit(self._load, number) for number in missing[:1])
            for number in range(self._num_blocks):
                if number in kept:
                    yield kept[number]
                    continue
                block = ahead.popleft().result()
                missing.pop(0)
                ahead.extend(thread.submit(self._load, later) for later in missing[:1])
                if _has_room(block, len(self._kept)):
                    self._kept[number] = block
                yield block

    @property
    def _num_blocks(self) -> int:
        return -(-len(self.part) // (self.mesh.size * self.block_rows))

    def _load(self, number: int) -> Float[Array, "documents embed"]:
        """A block; each process reads its own devices' documents. Padded with copies of the last document."""
        start = number * self.mesh.size * self.block_rows

        def read(index: Any) -> np.ndarray:
            first = start + (index[0].start or 0)
            rows = self.part.read(slice(first, min(first + self.block_rows, len(self.part))))
            missing = self.block_rows - len(rows)
            return np.pad(rows, ((0, missing), (0, 0)), "edge" if len(rows) else "constant") if missing else rows

        shape = self.mesh.size * self.block_rows, self.part.embed_dim
        return jax.make_array_from_callback(shape, NamedSharding(self.mesh, _BY_DEVICE), read)

    def _put(self, array: np.ndarray, spec: PartitionSpec) -> Array:
        return jax.make_array_from_callback(array.shape, NamedSharding(self.mesh, spec), lambda index: array[index])


@functools.partial(jax.jit, static_argnames=("mesh", "tiles", "query_rows", "dtype", "overscan"))
def _search_block(
    best_scores: Float[Array, "devices queries k"],
    best_rows: Int[Array, "devices queries k"],
    queries: Float[Array, "queries embed"],
    block: Float[Array, "documents embed"],
    start: Int[Array, ""] | int,
    size: Int[Array, ""] | int,
    *,
    mesh: Mesh,
    tiles: int,
    query_rows: int,
    dtype: str,
    overscan: int,
) -> tuple[Float[Array, "devices queries k"], Int[Array, "devices queries k"]]:
    """Merge the best k so far with those of a block, which begins at row `start` of a part of `size` documents."""

    def on_device(best_scores, best_rows, queries, block, start, size):
        start = start + jax.lax.axis_index("device") * len(block)
        k, embed = best_scores.shape[-1], queries.shape[-1]
        by_tile = queries.reshape(-1, query_rows, embed)
        cast = by_tile.astype(dtype)
        shape = *by_tile.shape[:2], k + overscan

        def scan_tile(found, item):
            number, tile = item
            first = number * len(tile)
            tile = tile.astype(dtype)
            found = jax.lax.map(lambda x: _search_tile(x[0], x[1], x[2], tile, first, size - start), (*found, cast))
            return found, None

        empty = jnp.full(shape, -jnp.inf), jnp.zeros(shape, jnp.int32)
        found, _ = jax.lax.scan(scan_tile, empty, (jnp.arange(tiles), block.reshape(tiles, -1, embed)))
        if dtype != "float32":
            found = jax.lax.map(lambda x: _rescore(x[0], x[1], x[2], block), (*found, by_tile))
        scores, places = (x.reshape(-1, k + overscan) for x in found)
        rows = jnp.where(scores > -jnp.inf, start + places, -1)
        # top_k keeps the first of equal scores; earlier blocks have the lower rows.
        merged = _top(jnp.concatenate([best_scores[0], scores], 1), jnp.concatenate([best_rows[0], rows], 1), k)
        return merged[0][None], merged[1][None]

    specs = (_BY_DEVICE, _BY_DEVICE, _WHOLE, _BY_DEVICE, _WHOLE, _WHOLE)
    search = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=(_BY_DEVICE,) * 2, check_vma=False)
    return search(best_scores, best_rows, queries, block, jnp.int32(start), jnp.int32(size))


def _search_tile(
    scores: Float[Array, "queries candidates"],
    places: Int[Array, "queries candidates"],
    queries: Float[Array, "queries embed"],
    tile: Float[Array, "documents embed"],
    first: Int[Array, ""],
    size: Int[Array, ""],
) -> tuple[Float[Array, "queries candidates"], Int[Array, "queries candidates"]]:
    """Merge the best candidates so far with those of a tile, by score and then by position in the block.

    Sorting every row of scores would cost more than computing them. The best c documents of a tile are in the c groups
    with the highest maxima: for a document in any other group, these c maxima rank above it. So two short sorts are
    enough: of the groups' maxima, and of the documents in c groups. Groups are contiguous, so this holds for ties, too.
    Padding copies the last document, so it never raises the maximum of a group with documents.

    Args:
      first: position of the tile in its block.
      size: documents of the part from the start of the block on; later positions are padding.
    """
    products = jax.lax.dot_general(
        queries, tile, (((1,), (1,)), ((), ())), precision="highest", preferred_element_type=jnp.float32
    )
    products = products.reshape(len(queries), -1, _GROUP)
    groups, wanted = products.shape[1], scores.shape[1]
    best_of_each = jnp.where(first + jnp.arange(groups) * _GROUP < size, products.max(2), -jnp.inf)
    _, chosen = jax.lax.top_k(best_of_each, min(wanted, groups))
    chosen = jnp.sort(chosen, axis=1)
    near = jnp.take_along_axis(products, chosen[..., None], axis=1).reshape(len(queries), -1)
    near_places = (first + chosen[..., None] * _GROUP + jnp.arange(_GROUP)).reshape(near.shape)
    near = jnp.where(near_places < size, near, -jnp.inf)
    return _top(jnp.concatenate([scores, near], 1), jnp.concatenate([places, near_places], 1), wanted)


def _rescore(
    scores: Float[Array, "queries candidates"],
    places: Int[Array, "queries candidates"],
    queries: Float[Array, "queries embed"],
    block: Float[Array, "documents embed"],
) -> tuple[Float[Array, "queries candidates"], Int[Array, "queries candidates"]]:
    """Float32 scores of the candidates, sorted by position."""
    order = jnp.argsort(places, axis=1)
    scores, places = (jnp.take_along_axis(x, order, axis=1) for x in (scores, places))
    exact = jnp.einsum("qe,qce->qc", queries, block[places], precision="highest")
    return jnp.where(scores > -jnp.inf, exact, -jnp.inf), places


def _top(
    scores: Float[Array, "queries candidates"], rows: Int[Array, "queries candidates"], k: int
) -> tuple[Float[Array, "queries k"], Int[Array, "queries k"]]:
    best, order = jax.lax.top_k(scores, k)
    return best, jnp.take_along_axis(rows, order, axis=1)


@functools.partial(jax.jit, static_argnames="mesh")
def _merge_devices(
    scores: Float[Array, "devices queries k"], rows: Int[Array, "devices queries k"], *, mesh: Mesh
) -> tuple[Float[Array, "queries k"], Int[Array, "queries k"]]:
    """Merge the best of all devices of all processes; the result is replicated."""
    k = scores.shape[-1]
    everywhere = NamedSharding(mesh, _WHOLE)
    scores, rows = (jax.lax.with_sharding_constraint(x, everywhere) for x in (scores, rows))
    if mesh.size == 1:
        return scores[0], rows[0]
    scores, rows = (x.swapaxes(0, 1).reshape(x.shape[1], -1) for x in (scores, rows))
    below, rows = jax.lax.sort((-scores, rows), num_keys=2)  # each block spans all devices, so ties need the rows
    return -below[:, :k], rows[:, :k]


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _has_room(block: Array, kept: int) -> bool:
    """Whether a block may stay on its devices, in addition to `kept` others of this part."""
    stats = jax.local_devices()[0].memory_stats()
    if not stats:
        return (kept + 1) * block.nbytes <= _HOST_BYTES
    return stats["bytes_in_use"] <= stats["bytes_limit"] // 2


def _everywhere(value: int) -> Int[np.ndarray, " processes"]:
    """The `value` of each process."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(np.int32(value)))


def _check_that_all_search_for(queries: Queries, k: int) -> None:
    """Raise InputError in every process if their queries differ: the results would be mixed up."""
    if jax.process_count() > 1:
        embeddings = np.ascontiguousarray(queries.embeddings, np.float32)
        digest = zlib.crc32(f"{embeddings.shape} {k}".encode(), zlib.crc32(embeddings.tobytes()))
        if len(set(_everywhere(digest >> 1).tolist())) > 1:
            raise InputError(
                "the processes of this run search for different queries, but with retriever:exact each searches only "
                "its share of the memory; give all of them the same queries"
            )


def _check_that_none_failed(failure: InputError | None) -> None:
    """Raise this process's failure, or an error that names the failed process: else the others would wait forever."""
    failed = _everywhere(failure is not None) if jax.process_count() > 1 else np.zeros(0)
    if failure is not None:
        raise failure
    if failed.any():
        raise InputError(f"the search failed in process {int(np.argmax(failed))}; see the error of that process")
