"""Attention within packed groups, block by block, in plain JAX: FlashAttention's algorithm (arXiv 2307.08691).

A row is split into blocks. A block of queries meets one block of keys at a time, from the block where its first group
begins to its own; blocks without a common group are never visited. The softmax is online: a running maximum and sum
rescale what was added so far. The backward pass makes the weights again from the saved log-sum-exp, so memory is linear
in the length of the row.

    keys ->   0 0 1 1 1 2        q\\k  0 1 2      groups 0, 1, 2 in blocks of two tokens
    blocks    [0] [1] [2]         0   x . .
                                  1   . x .
                                  2   . x x
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

SAVED = "attention"  # the name that remat policies know the output and the log-sum-exp by
HIDDEN = -1e30  # the logit of a key that a query does not see; finite, so that no block makes a NaN


def first_visible(segments: Int[Array, "batch seq"]) -> Int[Array, "batch seq"]:
    """The place of the first token of each token's group; a token attends from there to itself.

    segments 1 1 1 2 2 0  ->  0 0 0 3 3 5
    """
    places = jnp.arange(segments.shape[1])
    begins = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], 1)
    return jax.lax.cummax(jnp.where(begins, places, 0), axis=1)


def blockwise_attention(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq heads head_dim"],
    value: Float[Array, "batch seq heads head_dim"],
    segments: Int[Array, "batch seq"],
    block: int | None = None,
) -> Float[Array, "batch seq heads head_dim"]:
    """Causal attention of each token to its group.

    Args:
      segments: the group of each token; tokens of a group are adjacent.
      block: tokens per block: by default 128 on CPUs, whose caches hold such blocks, and 512 elsewhere.
    """
    block = block or (128 if jax.default_backend() == "cpu" else 512)
    seq = segments.shape[1]
    block = min(block, seq)
    padding = -seq % block

    def heads_first(x: Array) -> Array:
        return jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, padding), (0, 0)))

    # Padding is its own group, which no other token sees.
    first = first_visible(jnp.pad(segments, ((0, 0), (0, padding)), constant_values=-1))
    out = _attention(heads_first(query), heads_first(key), heads_first(value), first, block)
    return out[:, :, :seq].transpose(0, 2, 1, 3)


# Below, arrays of a row are [heads, seq, head_dim], and `first` is [seq].


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(query: Array, key: Array, value: Array, first: Array, block: int) -> Array:
    return _by_row(functools.partial(_forward, block), query, key, value, first)[0]


def _attention_forward(query: Array, key: Array, value: Array, first: Array, block: int) -> tuple[Array, Any]:
    out, lse = _by_row(functools.partial(_forward, block), query, key, value, first)
    out, lse = checkpoint_name(out, SAVED), checkpoint_name(lse, SAVED)
    return out, (query, key, value, first, out, lse)


def _attention_backward(block: int, saved: Any, cotangent: Array) -> tuple[Array, Array, Array, None]:
    return *_by_row(functools.partial(_backward, block), *saved, cotangent), None


_attention.defvjp(_attention_forward, _attention_backward)


def _by_row(function: Callable[..., Any], *arrays: Array) -> Any:
    """Rows one after the other: each visits its own blocks."""
    if len(arrays[0]) == 1:
        return jax.tree.map(lambda x: x[None], function(*(x[0] for x in arrays)))
    return jax.lax.map(lambda row: function(*row), arrays)


def _forward(block: int, query: Array, key: Array, value: Array, first: Array) -> tuple[Array, Array]:
    """The output, and the log-sum-exp of each query's logits."""
    heads, seq, head_dim = query.shape

    def of_queries(i: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
        queries, begins = _block(query, i, block, 1), _block(first, i, block)

        def with_keys(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            peak, total, mixed = carry
            logits = _logits(queries, _block(key, j, block, 1), begins, i, j)
            new_peak = jnp.maximum(peak, logits.max(-1))
            weights = jnp.exp(logits - new_peak[..., None])
            rescale = jnp.exp(peak - new_peak)
            added = _einsum("hqk,hkd->hqd", weights.astype(value.dtype), _block(value, j, block, 1))
            return new_peak, total * rescale + weights.sum(-1), mixed * rescale[..., None] + added

        start = jnp.full((heads, block), HIDDEN), jnp.zeros((heads, block)), jnp.zeros((heads, block, head_dim))
        peak, total, mixed = jax.lax.fori_loop(begins[0] // block, i + 1, with_keys, start)
        out, lse = results
        return _put(out, mixed / total[..., None], i), _put(lse, peak + jnp.log(total), i)

    empty = jnp.zeros_like(query), jnp.zeros((heads, seq))
    return jax.lax.fori_loop(0, seq // block, of_queries, empty)


def _backward(
    block: int, query: Array, key: Array, value: Array, first: Array, out: Array, lse: Array, cotangent: Array
) -> tuple[Array, Array, Array]:
    """The cotangents of query, key and value.

    With weights P and the output's cotangent dO: dV = P^T dO, dS = P * (dO V^T - rowsum(dO * out)), dQ = dS K,
    dK = dS^T Q, each of dQ and dK times the scale of the logits.
    """
    seq = query.shape[1]
    dots = jnp.sum(cotangent.astype(jnp.float32) * out.astype(jnp.float32), -1)

    def of_queries(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        d_query, *of_keys = carry
        queries, d_out = _block(query, i, block, 1), _block(cotangent, i, block, 1)
        lse_block, dots_block, begins = _block(lse, i, block, 1), _block(dots, i, block, 1), _block(first, i, block)

        def with_keys(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            d_queries, d_key, d_value = carry
            keys, values = _block(key, j, block, 1), _block(value, j, block, 1)
            weights = jnp.exp(_logits(queries, keys, begins, i, j, True) - lse_block[:, None, :])
            d_weights = _einsum("hkd,hqd->hkq", values, d_out) - dots_block[:, None, :]
            d_logits = (weights * d_weights * _scale(query)).astype(query.dtype)
            d_value = _add(d_value, _einsum("hkq,hqd->hkd", weights.astype(query.dtype), d_out), j)
            d_key = _add(d_key, _einsum("hkq,hqd->hkd", d_logits, queries), j)
            return d_queries + _einsum("hkq,hkd->hqd", d_logits, keys), d_key, d_value

        start = (jnp.zeros(queries.shape), *of_keys)
        d_queries, d_key, d_value = jax.lax.fori_loop(begins[0] // block, i + 1, with_keys, start)
        return _put(d_query, d_queries, i), d_key, d_value

    start = jnp.zeros_like(query), jnp.zeros(key.shape), jnp.zeros(value.shape)  # sums over blocks are in float32
    d_query, d_key, d_value = jax.lax.fori_loop(0, seq // block, of_queries, start)
    return d_query, d_key.astype(key.dtype), d_value.astype(value.dtype)


def _logits(queries: Array, keys: Array, begins: Array, i: Array, j: Array, by_key: bool = False) -> Array:
    """Of the queries of block i and the keys of block j, in float32: [heads, query, key], or [heads, key, query]."""
    places = jnp.arange(len(begins))
    queries_at, keys_at = i * len(begins) + places, j * len(begins) + places
    if by_key:
        visible = (begins[None, :] <= keys_at[:, None]) & (keys_at[:, None] <= queries_at[None, :])
        logits = _einsum("hkd,hqd->hkq", keys, queries)
    else:
        visible = (begins[:, None] <= keys_at[None, :]) & (keys_at[None, :] <= queries_at[:, None])
        logits = _einsum("hqd,hkd->hqk", queries, keys)
    return jnp.where(visible, logits * _scale(queries), HIDDEN)


def _scale(query: Array) -> float:
    return float(query.shape[-1] ** -0.5)


def _einsum(formula: str, *operands: Array) -> Array:
    return jnp.einsum(formula, *operands, preferred_element_type=jnp.float32)


def _block(x: Array, i: Array, block: int, axis: int = 0) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, i * block, block, axis)


def _put(x: Array, new: Array, i: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, new.astype(x.dtype), i * new.shape[1], 1)


def _add(x: Array, new: Array, i: Array) -> Array:
    return _put(x, _block(x, i, new.shape[1], 1) + new, i)
