"""Attention within packed groups by cuDNN's fused kernels, which know lengths but, below Hopper, no packed groups.

`gathered_attention` runs anywhere that `jax.nn.dot_product_attention` does. It copies each group to a sequence, in
slots of falling length: the m-th longest group of a row of S tokens has at most S / m, so four slots of a full row take
2.1 S rather than 4 S.

    row    : a a b b b c           slots: b b b | a a | c
    lengths: 2   3     1                  S/1     S/2   S/3

`packed_attention` hands the rows over as they are, with the offsets of their groups; cuDNN takes these on Hopper and
later (JAX has no public function for it).
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def groups(segments: Int[Array, "batch seq"], most: int) -> tuple[Int[Array, "batch most"], Int[Array, "batch most"]]:
    """The starts and lengths of groups 1 to `most` of each row; lengths are 0 where a row has fewer."""
    numbers = jnp.arange(1, most + 1)
    lengths = jnp.sum(segments[:, None, :] == numbers[None, :, None], -1, dtype=jnp.int32)
    return jnp.cumsum(lengths, 1) - lengths, lengths


def gathered_attention(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq heads head_dim"],
    value: Float[Array, "batch seq heads head_dim"],
    segments: Int[Array, "batch seq"],
    max_group: int,
    max_groups: int,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "batch seq heads head_dim"]:
    """Causal attention of each token to its group; 0 at padding.

    Args:
      segments: the group of each token, numbered from 1 in order; 0 is padding, at the end.
      max_group: tokens of the longest group.
      max_groups: the most groups in a row. Tokens of further or longer groups get NaN: there is no slot for them.
      implementation: of `jax.nn.dot_product_attention`.
    """
    all_starts, all_lengths = groups(segments, max_groups)
    order = jnp.argsort(-all_lengths, axis=1)
    out = jnp.zeros_like(query)
    for first, last, size in slot_sizes(segments.shape[1], max_group, max_groups):
        starts, lengths = (jnp.take_along_axis(x, order[:, first:last], 1) for x in (all_starts, all_lengths))
        q, k, v = (_to_slots(x, starts, lengths, size) for x in (query, key, value))
        # An empty slot attends to one token of zeros: kernels differ in what they make of a length of 0.
        rows = jnp.maximum(lengths.reshape(-1), 1)
        attended = jax.nn.dot_product_attention(
            q, k, v, is_causal=True, query_seq_lengths=rows, key_value_seq_lengths=rows, implementation=implementation
        )
        out = out + _from_slots(attended, starts, lengths, size, query.shape[1])
    lost = (segments > max_groups) | (_own_lengths(segments, all_lengths) > max_group)
    return jnp.where(lost[..., None, None], jnp.nan, out)


def _own_lengths(segments: Array, lengths: Array) -> Array:
    """The length of each token's group."""
    return jnp.take_along_axis(lengths, jnp.clip(segments - 1, 0, lengths.shape[1] - 1), 1)


def slot_sizes(seq: int, max_group: int, max_groups: int) -> list[tuple[int, int, int]]:
    """Ranges [first, last) of slots and the tokens that each takes; few sizes, since each is another kernel call."""
    ranges, first = [], 0
    while first < max_groups:
        size = max(1, min(max_group, seq // (first + 1)))
        # The next slots that can hold as many tokens, and then half as many again.
        last = min(max_groups, max(2 * first, seq // size, first + 1))
        ranges.append((first, last, size))
        first = last
    return ranges


# Each of these two maps is the transpose of the other, so each is the other's backward pass: both passes gather.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _to_slots(x: Array, starts: Array, lengths: Array, size: int) -> Array:
    """[batch, seq, ...] -> [batch * slots, size, ...]; zeros after the end of a slot's group."""
    places = jnp.arange(size)
    found = jax.vmap(lambda row, at: jnp.take(row, at, axis=0, mode="clip"))(x, starts[:, :, None] + places)
    found = jnp.where((places < lengths[:, :, None])[..., None, None], found, 0)
    return found.reshape(-1, size, *x.shape[2:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _from_slots(slots: Array, starts: Array, lengths: Array, size: int, seq: int) -> Array:
    """[batch * slots, size, ...] -> [batch, seq, ...]; zeros at tokens that are in none of these slots."""
    batch, count = starts.shape
    after = jnp.arange(seq)[None, None, :] - starts[:, :, None]  # [batch, slots, seq]
    inside = (after >= 0) & (after < lengths[:, :, None])
    places = jnp.max(jnp.where(inside, jnp.arange(count)[None, :, None] * size + after, -1), axis=1)
    rows = slots.reshape(batch, count * size, *slots.shape[2:])
    found = jax.vmap(lambda row, at: jnp.take(row, at, axis=0, mode="clip"))(rows, places)
    return jnp.where((places >= 0)[..., None, None], found, 0)


_to_slots.defvjp(
    lambda x, starts, lengths, size: (_to_slots(x, starts, lengths, size), (starts, lengths, x.shape[1])),
    lambda size, saved, cotangent: (_from_slots(cotangent, *saved[:2], size, saved[2]), None, None),
)
_from_slots.defvjp(
    lambda slots, starts, lengths, size, seq: (_from_slots(slots, starts, lengths, size, seq), (starts, lengths)),
    lambda size, seq, saved, cotangent: (_to_slots(cotangent, *saved, size), None, None),
)


def packed_attention(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq heads head_dim"],
    value: Float[Array, "batch seq heads head_dim"],
    segments: Int[Array, "batch seq"],
    max_groups: int,
) -> Float[Array, "batch seq heads head_dim"]:
    """As `gathered_attention`, but without copies, on GPUs of the Hopper generation and later."""
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    starts, lengths = groups(segments, max_groups)
    sizes = jnp.where(lengths > 0, lengths, -1)
    ends = jnp.where(lengths > 0, starts + lengths, -1)
    offsets = jnp.concatenate([starts[:, :1], ends], 1)
    out = dot_product_attention(
        query, key, value, q_seqlen=sizes, kv_seqlen=sizes, q_offsets=offsets, kv_offsets=offsets,
        scale=query.shape[-1] ** -0.5, mask_type=MaskType.PADDING_CAUSAL,
    )  # fmt: skip
    out = jnp.where((segments > 0)[..., None, None], out, 0)
    return jnp.where((segments > max_groups)[..., None, None], jnp.nan, out)
