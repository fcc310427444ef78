"""The Inception of the FID (arXiv 1706.08500): TensorFlow's of 2015-12-05, with the weights in pytorch-fid's file.

The file is `pt_inception-2015-12-05-6726825d.pth`, which pytorch-fid and torch-fidelity download (Apache 2.0). Names of
modules are those of its weights.

    299 x 299 x 3  ->  stem 35 x 35 x 192  ->  5b to 5d 35 x 35  ->  6a to 6e 17 x 17  ->  7a to 7c 8 x 8  ->  2,048
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from rac3.clip.efficientnet import BatchNorm, Maps

SIDE = 299
WIDTH, CLASSES = 2048, 1008

Pair = tuple[int, int]


class Inception(nn.Module):
    """uint8 images -> their 2,048 features, then 1,008 logits without the bias, as the Inception Score takes them."""

    @nn.compact
    def __call__(self, images: UInt8[Array, "batch height width 3"]) -> Float[Array, "batch 3056"]:
        x = (resize_like_tensorflow_1(images.astype(jnp.float32), SIDE) - 128) / 128
        x = Conv(32, (3, 3), stride=2, name="Conv2d_1a_3x3")(x)
        x = Conv(32, (3, 3), name="Conv2d_2a_3x3")(x)
        x = Conv(64, (3, 3), (1, 1), name="Conv2d_2b_3x3")(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        x = Conv(80, name="Conv2d_3b_1x1")(x)
        x = Conv(192, (3, 3), name="Conv2d_4a_3x3")(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        for name, pooled in (("5b", 32), ("5c", 64), ("5d", 64)):
            x = BlockA(pooled, name=f"Mixed_{name}")(x)
        x = BlockB(name="Mixed_6a")(x)
        for name, inner in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            x = BlockC(inner, name=f"Mixed_{name}")(x)
        x = BlockD(name="Mixed_7a")(x)
        x = BlockE(name="Mixed_7b")(x)
        x = BlockE(pools_by_max=True, name="Mixed_7c")(x)
        features = x.mean((1, 2))
        dense = nn.Dense(CLASSES, name="fc", precision="highest")
        return jnp.concatenate([features, dense(features) - dense(jnp.zeros_like(features))], axis=1)


class Conv(nn.Module):
    """A convolution without a bias, batch norm by stored statistics, and ReLU."""

    features: int
    kernel: Pair = (1, 1)
    padding: Pair = (0, 0)
    stride: int = 1

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        around = [(side, side) for side in self.padding]
        strides = (self.stride, self.stride)
        x = nn.Conv(self.features, self.kernel, strides, around, use_bias=False, precision="highest", name="conv")(x)
        return nn.relu(BatchNorm(name="bn")(x))


class BlockA(nn.Module):
    """Inception-A: 1 x 1, 5 x 5, two 3 x 3, and a pool."""

    pooled: int

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        five = Conv(48, name="branch5x5_1")(x)
        three = Conv(96, (3, 3), (1, 1), name="branch3x3dbl_2")(Conv(64, name="branch3x3dbl_1")(x))
        return _joined(
            Conv(64, name="branch1x1")(x),
            Conv(64, (5, 5), (2, 2), name="branch5x5_2")(five),
            Conv(96, (3, 3), (1, 1), name="branch3x3dbl_3")(three),
            Conv(self.pooled, name="branch_pool")(_mean_pool(x)),
        )


class BlockB(nn.Module):
    """Halves the sides."""

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        double = Conv(96, (3, 3), (1, 1), name="branch3x3dbl_2")(Conv(64, name="branch3x3dbl_1")(x))
        return _joined(
            Conv(384, (3, 3), stride=2, name="branch3x3")(x),
            Conv(96, (3, 3), stride=2, name="branch3x3dbl_3")(double),
            nn.max_pool(x, (3, 3), (2, 2)),
        )


class BlockC(nn.Module):
    """Inception-C: 7 x 7 as 1 x 7 and 7 x 1."""

    inner: int

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        row, column = ((1, 7), (0, 3)), ((7, 1), (3, 0))
        single = Conv(self.inner, name="branch7x7_1")(x)
        single = Conv(self.inner, *row, name="branch7x7_2")(single)
        double = Conv(self.inner, name="branch7x7dbl_1")(x)
        for number, way in ((2, column), (3, row), (4, column)):
            double = Conv(self.inner, *way, name=f"branch7x7dbl_{number}")(double)
        return _joined(
            Conv(192, name="branch1x1")(x),
            Conv(192, *column, name="branch7x7_3")(single),
            Conv(192, *row, name="branch7x7dbl_5")(double),
            Conv(192, name="branch_pool")(_mean_pool(x)),
        )


class BlockD(nn.Module):
    """Halves the sides."""

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        seven = Conv(192, name="branch7x7x3_1")(x)
        seven = Conv(192, (1, 7), (0, 3), name="branch7x7x3_2")(seven)
        seven = Conv(192, (7, 1), (3, 0), name="branch7x7x3_3")(seven)
        return _joined(
            Conv(320, (3, 3), stride=2, name="branch3x3_2")(Conv(192, name="branch3x3_1")(x)),
            Conv(192, (3, 3), stride=2, name="branch7x7x3_4")(seven),
            nn.max_pool(x, (3, 3), (2, 2)),
        )


class BlockE(nn.Module):
    """Inception-E: 3 x 3 as 1 x 3 next to 3 x 1. The last one of TensorFlow's network pools by the maximum."""

    pools_by_max: bool = False

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        single = Conv(384, name="branch3x3_1")(x)
        double = Conv(384, (3, 3), (1, 1), name="branch3x3dbl_2")(Conv(448, name="branch3x3dbl_1")(x))
        pooled = nn.max_pool(x, (3, 3), (1, 1), "SAME") if self.pools_by_max else _mean_pool(x)
        return _joined(
            Conv(320, name="branch1x1")(x),
            *_row_and_column(single, "branch3x3_2"),
            *_row_and_column(double, "branch3x3dbl_3"),
            Conv(192, name="branch_pool")(pooled),
        )


def _row_and_column(x: Maps, name: str) -> tuple[Maps, Maps]:
    return Conv(384, (1, 3), (0, 1), name=f"{name}a")(x), Conv(384, (3, 1), (1, 0), name=f"{name}b")(x)


def _mean_pool(x: Maps) -> Maps:
    """3 x 3; the padding does not count."""
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _joined(*branches: Maps) -> Maps:
    return jnp.concatenate(branches, axis=-1)


def resize_like_tensorflow_1(x: Maps, side: int) -> Maps:
    """Bilinear, without antialiasing, and with pixel i of the result at i * old / new, as TensorFlow 1 had it.

    2 -> 4 pixels:  a b  ->  a (a+b)/2 b b
    """
    for axis in (2, 1):
        size = x.shape[axis]
        places = np.arange(side, dtype=np.float32) * np.float32(size / side)
        low = places.astype(np.int32)
        share = (places - low).reshape([-1 if each == axis else 1 for each in range(4)])
        first, second = jnp.take(x, low, axis), jnp.take(x, np.minimum(low + 1, size - 1), axis)
        x = first + (second - first) * share
    return x
