"""Arrays on disk: zarr3 by tensorstore, one file per shard of rows, in chunks that are read separately.

Each chunk is stored, whatever it holds, with its CRC-32C: reading one that is missing or changed is an error.

rows   0 ........ 65535 | 65536 ........ 131071 | 131072 ...
files  c/0/0            | c/1/0                 | c/2/0         each written at once, by one process
chunks ||||||||||||||||   ||||||||||||||||||||    |||||         128 KiB: the cost of reading one row
"""

import contextlib
import io
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from rac3.artifacts.files import damaged, refusal
from rac3.artifacts.workdir import write_atomic

CHUNK_BYTES = 128 * 2**10  # sequential reads want larger ones, random rows smaller ones
_ROWS_AT_ONCE = 256  # of scattered rows, each perhaps in its own chunk: 32 MB
WHOLE = {"store_data_equal_to_fill_value": True, "fill_missing_data_reads": False}  # how arrays are opened
SCALES = ".scales"  # of int8 vectors, next to them

VectorDtype = Literal["float32", "bfloat16", "int8"]


def create_array(
    path: Path, shape: tuple[int, ...], dtype: str, shard_rows: int, chunk_bytes: int = CHUNK_BYTES
) -> Any:
    """Create the tensorstore at `path`, or open it if it exists with this shape and type.

    Args:
      shard_rows: rows per file. Write with `write_shard`.
      chunk_bytes: at most this many bytes per chunk, unless one row is larger.
    """
    import tensorstore

    row_bytes = max(1, int(np.prod(shape[1:], initial=1)) * tensorstore.dtype(dtype).numpy_dtype.itemsize)
    limit = max(1, min(chunk_bytes // row_bytes, shard_rows))
    rows = next(rows for rows in range(limit, 0, -1) if shard_rows % rows == 0)  # chunks fill a shard exactly
    rest = [max(n, 1) for n in shape[1:]]
    little_endian, checksum = {"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}
    sharding = {
        "chunk_shape": [rows, *rest],
        "codecs": [little_endian, checksum],
        "index_codecs": [little_endian, checksum],
    }
    metadata = {
        "shape": list(shape),
        "data_type": dtype,
        "fill_value": 0,  # zarr asks for one
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard_rows, *rest]}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    return _open(path, WHOLE | {"metadata": metadata, "open": True, "create": True})


def write_shard(array: Any, number: int, rows: np.ndarray) -> None:
    """Write all rows of shard `number`, which is one file, at once.

    Raises:
      ValueError: `rows` are more or fewer than the shard has. A partial write would rewrite the whole file, and two
        processes that do so would lose each other's rows.
    """
    import tensorstore

    size = array.chunk_layout.write_chunk.shape[0]
    start, stop = number * size, min((number + 1) * size, array.shape[0])
    if len(rows) != stop - start:
        raise ValueError(f"shard {number} has {stop - start} rows, but {len(rows)} are given; give all of them")
    with _named(array.kvstore.path), tensorstore.Transaction() as transaction:
        array.with_transaction(transaction)[start:stop].write(rows).result()


def open_array(path: Path) -> Any:
    """Open the tensorstore at `path`.

    Raises:
      InputError: its `zarr.json` is missing or damaged.
    """
    array = _open(path, WHOLE | {"open": True})
    of_chunks = array.codec.to_json()["codecs"][-1].get("configuration", {}).get("codecs", [{}])
    if of_chunks[-1].get("name") == "crc32c":
        return array
    return _open(path, {"open": True})  # of an older version, which left out chunks that equal the fill value


def read_array(path: Path) -> np.ndarray:
    """Read the whole array."""
    return Rows(path)[:]


class Rows:
    """An array on disk. Indexing with rows reads only those."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _array(self) -> Any:
        return open_array(self.path)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._array.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        return _read(self._array, rows)


class Vectors(Rows):
    """Vectors on disk: stored in any `VectorDtype`, read as float32.

    int8 stores each row as codes -127..127 and a scale, the row's largest absolute value / 127.
    """

    @classmethod
    def create(cls, path: Path, shape: tuple[int, int], dtype: VectorDtype, shard_rows: int) -> "Vectors":
        """Create them, or open them if they exist with this shape and type."""
        create_array(path, shape, dtype, shard_rows)
        if dtype == "int8":
            create_array(_scales(path), shape[:1], "float32", shard_rows)
        return cls(path)

    @cached_property
    def _scales(self) -> Any:
        return open_array(_scales(self.path)) if self._array.dtype.name == "int8" else None

    def write_shard(self, number: int, vectors: Float[np.ndarray, "rows embed"]) -> None:
        """Write all rows of shard `number`, as `arrays.write_shard` does."""
        if self._scales is None:
            write_shard(self._array, number, vectors.astype(self._array.dtype.numpy_dtype))
            return
        scales = np.abs(vectors).max(1, initial=0) / 127
        codes = np.divide(vectors, scales[:, None], out=np.zeros_like(vectors), where=scales[:, None] > 0)
        write_shard(self._array, number, np.rint(codes).astype(np.int8))
        write_shard(self._scales, number, scales)

    def __getitem__(self, rows: slice | np.ndarray) -> Float[np.ndarray, "rows embed"]:
        stored = np.asarray(_read(self._array, rows), np.float32)
        return stored if self._scales is None else stored * _read(self._scales, rows)[:, None]


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a few named arrays as one .npz file, for `np.load`; it appears whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]  # of its stub: one of them might be called allow_pickle
    write_atomic(path, buffer.getvalue())


def _scales(path: Path) -> Path:
    return path.with_name(path.name + SCALES)


def _read(array: Any, rows: slice | np.ndarray) -> np.ndarray:
    """Index as NumPy does. In tensorstore, negative numbers and a stop past the end are errors."""
    if isinstance(rows, slice):
        start, stop, step = rows.indices(array.shape[0])
        if step != 1:
            raise ValueError(f"rows cannot be read in steps of {step}; use a step of 1")
        with _named(array.kvstore.path):
            return np.asarray(array[start : max(start, stop)].read().result())
    distinct, places = np.unique(rows, return_inverse=True)
    found = np.empty((len(distinct), *array.shape[1:]), array.dtype.numpy_dtype)
    for first in range(0, len(distinct), _ROWS_AT_ONCE):
        some = slice(first, first + _ROWS_AT_ONCE)
        with _named(array.kvstore.path):
            found[some] = array[distinct[some]].read().result()
    return found if np.array_equal(distinct, rows) else found[places]


def _open(path: Path, how: dict[str, Any]) -> Any:
    import tensorstore

    with _named(path):
        return tensorstore.open(
            {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path.absolute())}, **how}
        ).result()


@contextlib.contextmanager
def _named(path: Path | str) -> Iterator[None]:
    """Turns tensorstore's errors into ours: about what the operating system refuses, or about a damaged file."""
    try:
        yield
    except (ValueError, KeyError, OSError) as error:
        text = " ".join(str(error).split())
        named = re.search(r'local file "(.*?)"', text)
        file = Path(named[1] if named else path)
        if system := refusal(error, file):
            raise system from error
        if not re.match("NOT_FOUND|DATA_LOSS|FAILED_PRECONDITION|INVALID_ARGUMENT|OUT_OF_RANGE", text):
            raise
        if text.startswith("NOT_FOUND"):
            raise damaged(file, "is missing") from error
        reason = re.sub(r"\[(tensorstore_spec|source locations).*|.*local file \".*?\"[^:]*: ", "", text).strip()
        raise damaged(file, f"is damaged: {reason[:120]}") from error
