"""Self-attention within packed groups."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rac3.devices.mesh import constrain
from rac3.model.packed import PackedAttention
from rac3.model.product import product
from rac3.model.rotary import Rotation, aligned_bias, rotate

Dtype = jnp.dtype | str


class SelfAttention(nn.Module):
    """Multi-head self-attention with biases, as in OPT; tokens attend within their groups.

    Attributes:
      longest: tokens of the longest text or image, if offsets are rotary; 0 if they are not.
    """

    num_heads: int
    head_dim: int
    dtype: Dtype
    init_std: float
    output_init_std: float
    packed: PackedAttention
    longest: int = 0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        segments: Int[Array, "batch seq"],
        rotation: Rotation | None = None,
    ) -> Float[Array, "batch seq embed"]:
        heads = (self.num_heads, self.head_dim)
        qkv_kernel = self._kernel(
            "qkv_kernel", (x.shape[-1], 3, *heads), ("embed", None, "heads", "head_dim"), self.init_std
        )
        aligned = aligned_bias(*heads, self.longest) if self.longest else None
        qkv_bias = self._bias("qkv_bias", (3, *heads), (None, "heads", "head_dim"), aligned)
        qkv = constrain(product(x, qkv_kernel) + qkv_bias, "batch", None, None, "heads", None)
        query, key, value = (qkv[:, :, part] for part in range(3))
        query, key = rotate(query, rotation), rotate(key, rotation)
        out = query if self.is_initializing() else self.packed(query, key, value, segments)
        out_kernel = self._kernel(
            "out_kernel", (*heads, x.shape[-1]), ("heads", "head_dim", "embed"), self.output_init_std
        )
        out_bias = self._bias("out_bias", (x.shape[-1],), (None,))
        return product(out, out_kernel, axes=2) + out_bias

    def _kernel(self, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float) -> Array:
        init = nn.with_logical_partitioning(nn.initializers.normal(std), axes)
        value: Any = self.param(name, init, shape)
        return value.astype(self.dtype)

    def _bias(
        self, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], values: np.ndarray | None = None
    ) -> Array:
        zeros: Any = nn.initializers.zeros
        init = nn.with_logical_partitioning(zeros if values is None else lambda *_: jnp.asarray(values), axes)
        value: Any = self.param(name, init, shape)
        return value.astype(self.dtype)
