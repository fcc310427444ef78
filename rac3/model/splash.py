"""Attention within packed groups by JAX's splash attention, a Pallas kernel for TPUs that takes segment ids."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rac3.model.blockwise import SAVED

LANES = 128  # of a TPU's vector registers: blocks and heads are multiples of it


def splash_attention(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq heads head_dim"],
    value: Float[Array, "batch seq heads head_dim"],
    segments: Int[Array, "batch seq"],
    interpret: bool = False,
) -> Float[Array, "batch seq heads head_dim"]:
    """Causal attention of each token to its group.

    Args:
      segments: the group of each token.
      interpret: run the kernel step by step on any device, for tests.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    seq, heads, head_dim = query.shape[1:]
    padded = seq + -seq % LANES
    block = next(size for size in (512, 256, LANES) if padded % size == 0)

    def heads_first(x: Array) -> Array:
        return jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, padded - seq), (0, -head_dim % LANES)))

    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([splash.CausalMask((padded, padded))] * heads),
        block_sizes=splash.BlockSizes(*(block,) * 6, block_q_dq=block, block_kv_dq=block),
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )
    groups = jnp.pad(segments, ((0, 0), (0, padded - seq)), constant_values=-1)
    scaled = (query * head_dim**-0.5).astype(query.dtype)
    rows = (heads_first(scaled), heads_first(key), heads_first(value), splash.SegmentIds(groups, groups))
    out = jax.vmap(kernel)(*rows)
    return out[:, :, :seq, :head_dim].transpose(0, 2, 1, 3)
