"""Model parameters on disk: one safetensors file, names joined by `/`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from rac3.config import InputError


def save_params(path: str | os.PathLike[str], params: Mapping[str, Any]) -> None:
    """Write nested parameters (dicts down to arrays) to `path`; a killed write leaves the old file."""
    from safetensors.numpy import save_file

    # not np.ascontiguousarray: it turns a scalar into a vector
    arrays = {name: np.asarray(array, order="C") for name, array in flatten_dict(params, sep="/").items()}
    partial = Path(f"{os.fspath(path)}.partial")
    save_file(arrays, partial)
    partial.replace(path)


def load_params(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `save_params` wrote, as nested dicts down to NumPy arrays, bit for bit.

    Raises:
      InputError: there is no such file, or it is truncated or not safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not Path(path).is_file():
        raise InputError(f"parameters {os.fspath(path)!r} do not exist; give a .safetensors file")
    try:
        arrays = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"parameters {os.fspath(path)!r} are truncated or not safetensors: {error}") from error
    return unflatten_dict(arrays, sep="/")
