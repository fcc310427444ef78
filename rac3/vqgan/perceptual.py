"""LPIPS (arXiv 1801.03924): how unlike two pictures look, by the features of a VGG16 that knows ImageNet.

    d(x, y) = sum over 5 layers of  mean over places of  w . (f(x) / |f(x)| - f(y) / |f(y)|)^2

The weights are the user's: torchvision's VGG16 and the linear layers w of LPIPS, in one file or in two.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rac3.config import InputError
from rac3.vqgan.model import Features, Images
from rac3.weights.torch_file import read_state_dict

LAYERS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""Convolutions of torchvision's `vgg16().features` by their index, up to each of the five ReLUs that LPIPS compares."""
CHANNELS = (64, 128, 256, 512, 512)
MIN_RESOLUTION = 16  # pixels: four poolings leave one
# mean and deviation of ImageNet's colors, over [-1, 1], as LPIPS rounds them
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)


@dataclass(frozen=True)
class PerceptualConfig:
    """The perceptual loss while a VQGAN is fitted; off without `weights`.

    Attributes:
      weights: the files of `torch.save` that together hold VGG16 and the linear layers, in any order: torchvision's
        `vgg16-397923af.pth` and the `vgg.pth` of LPIPS (of richzhang's package, or as taming-transformers
        downloads it), or the state dict of a whole LPIPS.
      weight: of the loss, beside `l1` and `l2`; 1 in taming-transformers.
    """

    weights: tuple[str, ...] = ()
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise InputError(f"perceptual.weight={self.weight} must be positive; leave perceptual.weights out instead")

    def files(self) -> list[Path]:
        """The files of `weights`.

        Raises:
          InputError: there is no such file.
        """
        files = [Path(path) for path in self.weights]
        for path in files:
            if not path.is_file():
                raise InputError(f"perceptual.weights {str(path)!r} do not exist; give a file that torch.save wrote")
        return files


class LPIPS(NamedTuple):
    """The weights: of each of the five layers, its convolutions and its linear layer."""

    convolutions: tuple[tuple[tuple[Float[Array, "3 3 _ _"], Float[Array, " _"]], ...], ...]
    linear: tuple[Float[Array, " _"], ...]


def load_lpips(files: Sequence[Path | str]) -> LPIPS:
    """The weights in `PerceptualConfig.weights`.

    Raises:
      InputError: a file is missing, damaged, or no file of torch.save; together they lack a layer, or one has another
        shape.
    """
    found = {_place(name): value for path in files for name, value in read_state_dict(Path(path)).items()}

    def take(name: str, source: str, *shape: int) -> Array:
        have = np.shape(found[name]) if name in found else "missing"
        if have != shape:
            raise InputError(
                f"perceptual.weights {[str(path) for path in files]}: {name} is {have}, not {shape}; give {source}"
            )
        return jnp.asarray(found[name], jnp.float32)

    def convolution(index: int, inputs: int, outputs: int) -> tuple[Array, Array]:
        source = "torchvision's VGG16 (vgg16-397923af.pth) too"
        kernel = take(f"features.{index}.weight", source, outputs, inputs, 3, 3)
        return kernel.transpose(2, 3, 1, 0), take(f"features.{index}.bias", source, outputs)

    convolutions = tuple(
        tuple(convolution(index, width if number else inputs, width) for number, index in enumerate(layer))
        for layer, inputs, width in zip(LAYERS, (3, *CHANNELS), CHANNELS, strict=False)
    )
    heads = "the linear layers of LPIPS for VGG16 (vgg.pth) too"
    linear = tuple(take(f"lin{i}", heads, 1, width, 1, 1).ravel() for i, width in enumerate(CHANNELS))
    return LPIPS(convolutions, linear)


def _place(name: str) -> str:
    """`features.N.weight` of VGG16 or `linK`, for other names of them: `net.slice2.5.weight`, `lin0.model.1.weight`."""
    if match := re.fullmatch(r"(?:features\.|net\.slice\d\.)?(\d+\.(?:weight|bias))", name):
        return f"features.{match[1]}"
    if match := re.fullmatch(r"lins?\.?(\d)\.model\.\d\.weight", name):
        return f"lin{match[1]}"
    return name


def lpips(weights: LPIPS, x: Images, y: Images) -> Float[Array, " batch"]:
    """The distance of each pair of pictures in [-1, 1], of at least 16 x 16 pixels."""
    distance = jnp.zeros(len(x))
    x, y = (x - SHIFT) / SCALE, (y - SHIFT) / SCALE
    for number, (layer, linear) in enumerate(zip(weights.convolutions, weights.linear, strict=True)):
        if number:
            x, y = _pool(x), _pool(y)
        for kernel, bias in layer:
            x, y = (jax.nn.relu(_conv(features, kernel) + bias) for features in (x, y))
        distance += jnp.mean(jnp.sum(linear * (_unit(x) - _unit(y)) ** 2, axis=-1), axis=(1, 2))
    return distance


def _unit(features: Features) -> Features:
    """Of length 1 at each place; where all are 0 they stay so, and so does their gradient, which sqrt alone has not."""
    return features * jax.lax.rsqrt(jnp.sum(features**2, axis=-1, keepdims=True) + 1e-20)


def _conv(
    x: Float[Array, "batch height width inputs"], kernel: Float[Array, "3 3 inputs outputs"]
) -> Float[Array, "batch height width outputs"]:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _pool(x: Images) -> Features:
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
