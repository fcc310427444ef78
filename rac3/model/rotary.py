"""Rotary offsets: queries and keys turned by a token's place in its text or image (RoPE; Su et al. 2021, section 3.2).

The product of a query at place m and a key at place n depends on n - m then, so "the next patch of a retrieved image"
is one direction for every patch, where a table of offsets has to learn it for each. The first heads of each layer look
there from the start:

    retrieved  I0 I1 I2 I3
                      ^
    main       I0 I1       after I1, to the retrieved I2: a guess of what comes next
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

HIGHEST = 3.0  # radians per place, just below pi, so that the next place is far
ALIGNED_HEADS = 2  # of each layer, that look one place ahead at first
CONTRAST = 6.0  # how far above the logits of the places next to it that of the aligned place is at first


class Rotation(NamedTuple):
    """The angles of tokens."""

    cos: Float[Array, "batch seq pairs"]
    sin: Float[Array, "batch seq pairs"]


def frequencies(head_dim: int, longest: int) -> Float[np.ndarray, " pairs"]:
    """Radians per place of each pair of dimensions, from `HIGHEST` down to `HIGHEST` / longest, geometrically.

    The pairs take half of a head; the other half matches content alone.

    Args:
      longest: tokens of the longest text or image.
    """
    pairs = head_dim // 4
    return (HIGHEST * float(longest) ** -(np.arange(pairs) / max(1, pairs - 1))).astype(np.float32)


def rotation(offsets: Int[Array, "batch seq"], head_dim: int, longest: int) -> Rotation:
    angles = offsets[..., None] * jnp.asarray(frequencies(head_dim, longest))
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(
    x: Float[Array, "batch seq heads head_dim"], by: Rotation | None
) -> Float[Array, "batch seq heads head_dim"]:
    """Queries or keys, with dimension p turned against dimension pairs + p; in float32, returned in the dtype of x."""
    if by is None:
        return x
    pairs = by.cos.shape[-1]
    cos, sin = by.cos[:, :, None], by.sin[:, :, None]
    first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    turned = [first * cos - second * sin, first * sin + second * cos]
    return jnp.concatenate([each.astype(x.dtype) for each in turned] + [rest], axis=-1)


def aligned_bias(num_heads: int, head_dim: int, longest: int) -> Float[np.ndarray, "3 num_heads head_dim"]:
    """Biases of queries, keys and values with which the first `ALIGNED_HEADS` heads look one place ahead.

    A query turned back by one place and an unturned key: their product is largest where the key is one place further.
    """
    turns = frequencies(head_dim, longest)
    pairs = len(turns)
    size = (CONTRAST * head_dim**0.5 / (1 - np.cos(turns)).sum()) ** 0.5
    bias = np.zeros((3, num_heads, head_dim), np.float32)
    bias[0, :ALIGNED_HEADS, :pairs] = size * np.cos(turns)
    bias[0, :ALIGNED_HEADS, pairs : 2 * pairs] = size * np.sin(turns)
    bias[1, :ALIGNED_HEADS, :pairs] = size
    return bias
