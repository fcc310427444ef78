"""The features of EfficientNet-Lite0 that the linear image tower projects, computed once for a fit."""

from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from rac3.clip.efficientnet import installed_weights, torch_place
from rac3.clip.linear import IMAGES, Features
from rac3.devices.batches import DeviceBatches
from rac3.documents.document import Picture, pixels_of
from rac3.weights.port import port
from rac3.weights.torch_file import read_state_dict

BATCH = 32  # pictures that EfficientNet reads at once


def trunk_params(image_size: int) -> dict[str, Any]:
    """EfficientNet-Lite0 up to its features, from the installed package.

    Raises:
      InputError: it is not installed, or its file is damaged.
    """
    file = installed_weights()
    pixels = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    ours = jax.eval_shape(Features().init, jax.random.key(0), pixels)["params"]
    ignored = r".*num_batches_tracked|_fc\..*"
    return port(ours, read_state_dict(file), torch_place, where=f"weights {str(file)!r}", ignored=ignored)


def features_of(
    images: Sequence[Picture], trunk: dict[str, Any], image_size: int
) -> Float[np.ndarray, "images channel"]:
    """The features of pictures, as `LinearTowers.encode_image` computes them."""
    batches = DeviceBatches(BATCH)
    placed = jax.device_put(trunk, batches.replicated)
    mean, deviation = np.array(IMAGES.mean, np.float32) * 255, np.array(IMAGES.std, np.float32) * 255

    @jax.jit
    def apply(params: PyTree, pixels: Array) -> Array:
        return cast(Array, Features().apply({"params": params}, (pixels - mean) / deviation))

    def prepare(rows: Int[np.ndarray, " batch"]) -> np.ndarray:
        return np.stack(batches.each(lambda row: IMAGES.square(pixels_of(images[row]), image_size), rows.tolist()))

    return np.concatenate([*batches.run(np.arange(len(images)), prepare, lambda pixels: apply(placed, pixels))])
