"""Causal attention within packed segments, and over a KV cache while decoding."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rac3.devices.mesh import constrain

Dtype = jnp.dtype | str


class KVCache(NamedTuple):
    """Keys and values of the positions decoded so far; those of position p are in slot p.

    Right-padded prompts leave garbage in the slots after their end. It is never seen: a query at position p attends to
    slots 0 to p, and each of these is overwritten before decoding reaches its position.
    """

    keys: Float[Array, "*layers batch slots heads head_dim"]
    values: Float[Array, "*layers batch slots heads head_dim"]


def packed_mask(segments: Int[Array, "batch seq"]) -> Bool[Array, "batch 1 seq seq"]:
    """Which tokens a token of a packed row attends to: itself and earlier ones of its group. Padding is segment 0.

    segments 1 1 1 2 2 0      x . . . . .
                              x x . . . .
                              x x x . . .
                              . . . x . .
                              . . . x x .
                              . . . . . x
    """
    same = segments[:, :, None] == segments[:, None, :]
    causal = jnp.tril(jnp.ones((segments.shape[1],) * 2, bool))
    return (same & causal)[:, None]


def attend(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch slots heads head_dim"],
    value: Float[Array, "batch slots heads head_dim"],
    mask: Bool[Array, "batch 1 seq slots"],
) -> Float[Array, "batch seq heads head_dim"]:
    """Scaled dot-product attention; logits and softmax in float32."""
    scale = query.shape[-1] ** -0.5
    logits = jnp.einsum("bqhd,bkhd->bhqk", query * scale, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(mask, logits, -1e30), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value)


class SelfAttention(nn.Module):
    """Multi-head self-attention with biases, as in OPT.

    With a cache, keys and values are written to the slots of their positions, and queries attend to the whole cache
    under `mask`. The cache that is returned holds them.
    """

    num_heads: int
    head_dim: int
    dtype: Dtype
    init_std: float
    output_init_std: float

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        mask: Bool[Array, "batch 1 seq slots"],
        positions: Int[Array, "batch seq"],
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "batch seq embed"], KVCache | None]:
        heads = (self.num_heads, self.head_dim)
        qkv_kernel = self._kernel(
            "qkv_kernel", (x.shape[-1], 3, *heads), ("embed", None, "heads", "head_dim"), self.init_std
        )
        qkv_bias = self._bias("qkv_bias", (3, *heads), (None, "heads", "head_dim"))
        qkv = jnp.einsum("bse,ethd->tbshd", x, qkv_kernel) + qkv_bias[:, None, None]
        query, key, value = qkv
        query = constrain(query, "batch", "seq", "heads", None)
        if cache is not None:
            rows = jnp.arange(x.shape[0])[:, None]
            cache = KVCache(cache.keys.at[rows, positions].set(key), cache.values.at[rows, positions].set(value))
            key, value = cache
        out = attend(query, key, value, mask)
        out_kernel = self._kernel(
            "out_kernel", (*heads, x.shape[-1]), ("heads", "head_dim", "embed"), self.output_init_std
        )
        out_bias = self._bias("out_bias", (x.shape[-1],), ("embed",))
        return jnp.einsum("bshd,hde->bse", out, out_kernel) + out_bias, cache

    def _kernel(self, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float) -> Array:
        init = nn.with_logical_partitioning(nn.initializers.normal(std), axes)
        value: Any = self.param(name, init, shape)
        return value.astype(self.dtype)

    def _bias(self, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Array:
        init = nn.with_logical_partitioning(nn.initializers.zeros, axes)
        value: Any = self.param(name, init, shape)
        return value.astype(self.dtype)
