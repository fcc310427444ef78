"""A checksum of arrays that is computed on their devices, and is the same for every way of sharding them.

    checksum(x) = sum over i of bits(x[i]) * odd(i)   mod 2^32

`odd` is a hash of the index, made odd. Integer sums are exact in any order, so shards are summed where they lie. A
change of one element is always found: its difference times an odd number is not 0 mod 2^32. Of changes of many
elements, and of elements that change places, one in 2^32 is missed.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, UInt32

SMALL = 2**20  # elements
Words = Array | np.ndarray


@jax.jit
def checksum(x: Array) -> UInt32[Array, ""]:
    """The checksum of one array, of elements of up to 32 bits."""
    width = x.dtype.itemsize * 8
    as_integers = x.astype(jnp.uint8) if x.dtype == bool else jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{width}"))
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, stride in enumerate(math.prod(x.shape[axis + 1 :]) for axis in range(x.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
    return jnp.sum(as_integers.astype(jnp.uint32) * (_hash(index) | 1), dtype=jnp.uint32)


def checksums(tree: PyTree) -> list[int]:
    """Of each leaf, in JAX's order.

    One at a time: small programs that all reduce over the same devices can block each other on CPUs. They are not one
    program, since that takes long to compile for models of many arrays, which have few shapes. Small arrays of one
    device are summed on the host, which compiles nothing; to read those of many would leave copies of their shards.
    """

    def one(leaf: Any) -> int:
        on_one_device = not isinstance(leaf, jax.Array) or len(leaf.sharding.device_set) == 1
        return _on_host(leaf) if on_one_device and leaf.size <= SMALL else int(checksum(leaf))

    return [one(leaf) for leaf in jax.tree.leaves(tree)]


def _hash(x: UInt32[Words, "*shape"]) -> UInt32[Words, "*shape"]:
    """The last steps of MurmurHash3, which mix all bits of a word."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _on_host(x: Any) -> int:
    host = np.asarray(x)
    words = host.ravel().view(np.uint8 if host.dtype == bool else f"uint{8 * host.dtype.itemsize}").astype(np.uint32)
    index = np.arange(words.size, dtype=np.uint32)
    return int(np.sum(words * (_hash(index) | 1), dtype=np.uint32))
