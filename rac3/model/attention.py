"""Self-attention within packed groups, and over a KV cache while decoding."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rac3.devices.mesh import constrain
from rac3.model.packed import PackedAttention, attend
from rac3.model.product import product

Dtype = jnp.dtype | str


class KVCache(NamedTuple):
    """Keys and values of the positions decoded so far; those of position p are in slot p.

    Right-padded prompts leave garbage in the slots after their end. It is never seen: a query at position p attends to
    slots 0 to p, and each of these is overwritten before decoding reaches its position.
    """

    keys: Float[Array, "*layers batch slots heads head_dim"]
    values: Float[Array, "*layers batch slots heads head_dim"]


class SelfAttention(nn.Module):
    """Multi-head self-attention with biases, as in OPT.

    Without a cache, tokens attend within their groups. With one, keys and values are written to the slots of their
    positions, and a query attends to the slots up to its own position. The cache that is returned holds them.
    """

    num_heads: int
    head_dim: int
    dtype: Dtype
    init_std: float
    output_init_std: float
    packed: PackedAttention

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        segments: Int[Array, "batch seq"] | None,
        positions: Int[Array, "batch seq"],
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "batch seq embed"], KVCache | None]:
        heads = (self.num_heads, self.head_dim)
        qkv_kernel = self._kernel(
            "qkv_kernel", (x.shape[-1], 3, *heads), ("embed", None, "heads", "head_dim"), self.init_std
        )
        qkv_bias = self._bias("qkv_bias", (3, *heads), (None, "heads", "head_dim"))
        qkv = constrain(product(x, qkv_kernel) + qkv_bias, "batch", None, None, "heads", None)
        query, key, value = (qkv[:, :, part] for part in range(3))
        if cache is not None:
            rows = jnp.arange(x.shape[0])[:, None]
            cache = KVCache(cache.keys.at[rows, positions].set(key), cache.values.at[rows, positions].set(value))
            seen = jnp.arange(cache.keys.shape[1])[None, None, :] <= positions[:, :, None]
            out = attend(query, *cache, seen[:, None])
        elif segments is not None:
            out = query if self.is_initializing() else self.packed(query, key, value, segments)
        else:
            raise ValueError("a call without a cache needs the segments of the packed rows")
        out_kernel = self._kernel(
            "out_kernel", (*heads, x.shape[-1]), ("heads", "head_dim", "embed"), self.output_init_std
        )
        out_bias = self._bias("out_bias", (x.shape[-1],), (None,))
        return product(out, out_kernel, axes=2) + out_bias, cache

    def _kernel(self, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float) -> Array:
        init = nn.with_logical_partitioning(nn.initializers.normal(std), axes)
        value: Any = self.param(name, init, shape)
        return value.astype(self.dtype)

    def _bias(self, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Array:
        init = nn.with_logical_partitioning(nn.initializers.zeros, axes)
        value: Any = self.param(name, init, shape)
        return value.astype(self.dtype)
