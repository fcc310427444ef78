"""How well an image tokenizer reconstructs pictures, and how much of its codebook it uses.

PSNR = 10 log10(255^2 / MSE)                                              dB, per picture over all its values
SSIM = mean of (2 a b + c1)(2 cov + c2) / ((a^2 + b^2 + c1)(va + vb + c2))  at most 1 (Wang et al. 2004, eq. 13)
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from rac3.documents.document import Picture, pixels_of, prepare_image
from rac3.vqgan.codec import ImageTokenizer

WINDOW, SIGMA = 11, 1.5  # of SSIM's Gaussian, in pixels
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
AT_ONCE = 64  # pictures

Pictures = UInt8[np.ndarray, "batch height width channel"]


class CodebookUse(NamedTuple):
    """How evenly the codes of a codebook are used.

    Attributes:
      used: share of the codes that occur at least once.
      perplexity: exp of the entropy of the codes' frequencies: 1 if one code is all, the codebook's size if all are
        equally frequent.
    """

    used: float
    perplexity: float


def psnr(truth: Pictures, pictures: Pictures) -> Float[np.ndarray, " batch"]:
    """Peak signal-to-noise ratio of each picture in dB; infinite where the two are equal."""
    parts = [
        np.mean((a.astype(np.float32) - b.astype(np.float32)) ** 2, axis=(1, 2, 3), dtype=np.float64)
        for a, b in _in_parts(truth, pictures)
    ]
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255**2 / np.concatenate(parts))


def ssim(truth: Pictures, pictures: Pictures) -> Float[np.ndarray, " batch"]:
    """Structural similarity of each picture: the mean over all places of a Gaussian window and over the channels.

    The window is 11 x 11 pixels with a standard deviation of 1.5; for smaller pictures, it is as large as their shorter
    side.
    """
    parts = [np.asarray(_ssim(a, b), np.float64) for a, b in _in_parts(truth, pictures)]
    return np.concatenate(parts)


def codebook_use(codes: Int[np.ndarray, "*shape"], size: int) -> CodebookUse:
    """The use of a codebook of `size` codes by some pictures, whose codes lie in [0, size)."""
    share = np.bincount(codes.ravel(), minlength=size) / codes.size
    entropy = -np.sum(share[share > 0] * np.log(share[share > 0]))
    return CodebookUse(float((share > 0).mean()), float(np.exp(entropy)))


def _in_parts(a: Pictures, b: Pictures) -> Sequence[tuple[np.ndarray, np.ndarray]]:
    """A few pictures at a time: ten thousand do not fit into memory as floats."""
    return [(a[start : start + AT_ONCE], b[start : start + AT_ONCE]) for start in range(0, len(a), AT_ONCE)]


@jax.jit
def _ssim(a: Array, b: Array) -> Float[Array, " batch"]:
    window = min(WINDOW, *a.shape[1:3])
    rows, columns = (_blur(size, window) for size in a.shape[1:3])

    def mean(x: Array) -> Array:
        """The weighted mean under the window at every place; the Gaussian is separable, so by rows, then columns."""
        once = jnp.einsum("ih,bhwc->biwc", rows, x, precision="highest")
        return jnp.einsum("jw,biwc->bijc", columns, once, precision="highest")

    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    mean_a, mean_b = mean(a), mean(b)
    variance_a, variance_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    likeness = (2 * mean_a * mean_b + C1) * (2 * covariance + C2)
    return jnp.mean(likeness / ((mean_a**2 + mean_b**2 + C1) * (variance_a + variance_b + C2)), axis=(1, 2, 3))


@functools.cache
def _blur(size: int, window: int) -> np.ndarray:
    """The window as a matrix: row i has its weights where it begins at pixel i."""
    weights = np.exp(-0.5 * ((np.arange(window) - (window - 1) / 2) / SIGMA) ** 2)
    matrix = np.zeros((size - window + 1, size), np.float32)
    for place in range(len(matrix)):
        matrix[place, place : place + window] = weights / weights.sum()
    return matrix


def reconstruction_metrics(codec: ImageTokenizer, images: Sequence[Picture]) -> dict[str, float]:
    """Mean PSNR (dB; a picture counts at most 60) and SSIM over the images, and the use of the codebook."""
    truth = np.stack([prepare_image(pixels_of(image), codec.resolution) for image in images])
    codes = codec.encode(images)
    pictures = codec.decode(codes)
    use = codebook_use(codes, codec.codebook_size)
    return {
        "psnr": float(np.minimum(psnr(truth, pictures), 60).mean()),
        "ssim": float(ssim(truth, pictures).mean()),
        "codebook_use": use.used,
        "codebook_perplexity": use.perplexity,
    }
