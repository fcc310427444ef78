"""Arrays on disk: tensorstore zarr3, written and read by rows."""

from pathlib import Path
from typing import Any

import numpy as np

CHUNK_BYTES = 4 * 2**20


def create_array(path: Path, shape: tuple[int, ...], dtype: str, fill: int | float = 0) -> Any:
    """The tensorstore at `path`: made anew, or opened if it is there with this shape and type."""
    row_bytes = max(1, int(np.prod(shape[1:], initial=1)) * np.dtype(dtype).itemsize)
    rows = int(np.clip(CHUNK_BYTES // row_bytes, 1, max(shape[0], 1)))
    chunk = [rows, *[max(n, 1) for n in shape[1:]]]
    spec = _spec(path) | {
        "metadata": {
            "shape": list(shape),
            "data_type": dtype,
            "fill_value": fill,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        }
    }
    return _open(spec | {"open": True, "create": True})


def open_array(path: Path) -> Any:
    """The tensorstore at `path`, for reading: index it, then `.read().result()`."""
    return _open(_spec(path) | {"open": True})


def read_array(path: Path) -> np.ndarray:
    """The whole array."""
    return np.asarray(open_array(path).read().result())


def _spec(path: Path) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path.absolute())}}


def _open(spec: dict[str, Any]) -> Any:
    import tensorstore

    return tensorstore.open(spec).result()
