"""LPIPS (arXiv 1801.03924): how different two images look, by the features of a VGG16 trained on ImageNet.

    d(x, y) = sum over 5 layers of  mean over positions of  w . (f(x) / |f(x)| - f(y) / |f(y)|)^2

The user supplies the weights: torchvision's VGG16 and the linear layers w of LPIPS, in one file or in two.
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
from rac3.weights.port import Place, port
from rac3.weights.torch_file import read_state_dict

LAYERS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""Convolutions of torchvision's `vgg16().features` by their index, up to each of the five ReLUs that LPIPS compares."""
CHANNELS = (64, 128, 256, 512, 512)
SOURCES = "torchvision's VGG16 (vgg16-397923af.pth) and the linear layers of LPIPS for VGG16 (vgg.pth)"
MIN_RESOLUTION = 16  # pixels: four poolings leave one
# mean and deviation of ImageNet's colors, over [-1, 1], as LPIPS rounds them
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)


@dataclass(frozen=True)
class PerceptualConfig:
    """The perceptual loss of a VQGAN's fit; off without `weights`.

    Attributes:
      weights: the files of `torch.save` that together hold VGG16 and the linear layers, in any order: torchvision's
        `vgg16-397923af.pth` and the `vgg.pth` of LPIPS (of richzhang's package, or as taming-transformers
        downloads it), or the state dict of a whole LPIPS.
      weight: of the loss, next to `l1` and `l2`; 1 in taming-transformers.
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
    """The weights: the convolutions (kernel, bias) and the linear layer of each of the five layers."""

    convolutions: tuple[tuple[tuple[Float[Array, "3 3 _ _"], Float[Array, " _"]], ...], ...]
    linear: tuple[Float[Array, " _"], ...]


def load_lpips(files: Sequence[Path | str]) -> LPIPS:
    """The weights in `PerceptualConfig.weights`.

    Raises:
      InputError: a file is missing, damaged, or not a file of torch.save; together they lack a layer, or one has
        another shape.
    """
    weights = {_name(name): value for path in files for name, value in read_state_dict(Path(path)).items()}
    where = f"perceptual.weights {[str(path) for path in files]}"
    params = port(_params(), weights, _place, where=where, ignored=".*", fix=f"they must hold {SOURCES}")
    params = jax.tree.map(jnp.asarray, params)
    convolutions = tuple(
        tuple((params["features"][str(index)]["kernel"], params["features"][str(index)]["bias"]) for index in layer)
        for layer in LAYERS
    )
    linear = tuple(params[f"lin{i}"]["model"]["1"]["kernel"].ravel() for i in range(len(LAYERS)))
    return LPIPS(convolutions, linear)


def _params() -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters by their paths, which are the published names: `features/0/kernel`, `lin0/model/1/kernel`."""
    shapes: dict[str, tuple[int, ...]] = {}
    inputs = 3
    for i, (layer, width) in enumerate(zip(LAYERS, CHANNELS, strict=True)):
        for index in layer:
            shapes |= {f"features/{index}/kernel": (3, 3, inputs, width), f"features/{index}/bias": (width,)}
            inputs = width
        shapes[f"lin{i}/model/1/kernel"] = (1, 1, width, 1)
    return {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}


def _place(path: str) -> Place:
    name = path.replace("/", ".")
    return Place(re.sub("kernel$", "weight", name), transposed=name.endswith("kernel"))


def _name(name: str) -> str:
    """The published name of a weight that a whole LPIPS calls `net.slice2.5.weight` or `lins.0.model.1.weight`."""
    if match := re.fullmatch(r"(?:features\.|net\.slice\d\.)?(\d+\.(?:weight|bias))", name):
        return f"features.{match[1]}"
    if match := re.fullmatch(r"lins?\.?(\d)\.model\.\d\.weight", name):
        return f"lin{match[1]}.model.1.weight"
    return name


def lpips(weights: LPIPS, x: Images, y: Images) -> Float[Array, " batch"]:
    """The distance of each pair of images in [-1, 1], of at least 16 x 16 pixels."""
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
    """Of length 1 at each position. Features that are all 0 stay 0, with a gradient of 0; that of sqrt is NaN there."""
    return features * jax.lax.rsqrt(jnp.sum(features**2, axis=-1, keepdims=True) + 1e-20)


def _conv(
    x: Float[Array, "batch height width inputs"], kernel: Float[Array, "3 3 inputs outputs"]
) -> Float[Array, "batch height width outputs"]:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _pool(x: Images) -> Features:
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
