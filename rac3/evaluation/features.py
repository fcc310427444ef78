"""Features of pictures, over which sets of them are compared, by networks that were trained on ImageNet."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from rac3.clip import efficientnet
from rac3.clip.efficientnet import INSTALL, installed_weights, torch_place
from rac3.config import InputError
from rac3.devices.batches import DeviceBatches
from rac3.documents.document import Picture, pixels_of, prepare_image
from rac3.evaluation import inception
from rac3.weights.port import port
from rac3.weights.torch_file import read_state_dict

INSTALLED = "efficientnet-lite0"  # in place of a path: the file of the installed package
INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
BATCH = 32


class Embedded(NamedTuple):
    """Features of some pictures.

    Attributes:
      logits: of the classes that the network knows, before any bias that its score leaves out; None without such.
    """

    features: Float[np.ndarray, "images width"]
    logits: Float[np.ndarray, "images classes"] | None = None


@runtime_checkable
class ImageFeatures(Protocol):
    """What the distances between sets of pictures ask of a network.

    Attributes:
      name: what the Fréchet distance over these features is called; "FID" is that of the Inception alone.
    """

    @property
    def name(self) -> str: ...

    def embed(self, pictures: Sequence[Picture]) -> Embedded:
        """The middle square of each picture, whole."""
        ...


class Network:
    """A classifier trained on ImageNet, from its file; opened when it is first asked for something.

    Args:
      weights: the path of `pt_inception-2015-12-05-6726825d.pth` or `efficientnet-lite0-57934424.pth`, or
        `efficientnet-lite0` for that of the installed package.
      resolution: of pictures for the Inception, which itself resizes them as TensorFlow 1 did.

    Raises:
      InputError: there is no such file, it is damaged, or of another network.
    """

    def __init__(self, weights: str, resolution: int) -> None:
        self.file = weights_file(weights)
        self.resolution = resolution

    @property
    def name(self) -> str:
        return "FID" if self._is_inception else "FD (EfficientNet-Lite0)"

    def embed(self, pictures: Sequence[Picture]) -> Embedded:
        apply, batches = self._apply, DeviceBatches(BATCH)
        side = self.resolution if self._is_inception else efficientnet.SIDE
        width = inception.WIDTH if self._is_inception else efficientnet.WIDTH

        def prepare(rows: Int[np.ndarray, " batch"]) -> np.ndarray:
            return np.stack(batches.each(lambda row: prepare_image(pixels_of(pictures[row]), side), rows.tolist()))

        found = [*batches.run(np.arange(len(pictures)), prepare, apply)]
        both = np.concatenate(found) if found else np.zeros((0, width + 1), np.float32)
        return Embedded(both[:, :width], both[:, width:])

    @cached_property
    def _weights(self) -> dict[str, np.ndarray]:
        return read_state_dict(self.file)

    @cached_property
    def _is_inception(self) -> bool:
        return "Conv2d_1a_3x3.conv.weight" in self._weights

    @cached_property
    def _apply(self) -> Any:
        side = inception.SIDE if self._is_inception else efficientnet.SIDE
        model = inception.Inception() if self._is_inception else efficientnet.EfficientNetLite0()
        image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8)
        ours = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
        params = port(
            ours,
            self._weights,
            torch_place,
            where=f"weights {str(self.file)!r}",
            ignored=r".*num_batches_tracked",
            fix=f"give {INCEPTION_FILE} or efficientnet-lite0-57934424.pth",
        )
        placed = jax.device_put(params, DeviceBatches(1).replicated)
        jitted = jax.jit(model.apply)
        return lambda images: jitted({"params": placed}, images)


def weights_file(weights: str) -> Path:
    """The file of `Network`'s `weights`.

    Raises:
      InputError: there is none, or the package is not installed.
    """
    if weights != INSTALLED:
        if not Path(weights).is_file():
            raise InputError(
                f"evaluation.features={weights!r} is no file; give {INCEPTION_FILE}, or {INSTALLED!r} after `{INSTALL}`"
            )
        return Path(weights)
    return installed_weights()
