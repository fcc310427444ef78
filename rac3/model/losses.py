"""The CM3 loss (paper, eq. 2-3), and the cross-entropy of each token that it weighs.

Logits are made a chunk of tokens at a time, so that those of a whole batch never exist at once. The loss is one number,
so its gradients with respect to hidden states and embedding are known, up to that number's cotangent, as soon as a
chunk's logits are: they are made in the forward pass, and no logits are made twice.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from rac3.batches.packing import KIND_NAMES, PackedBatch
from rac3.devices.mesh import map_shards, mesh_axes
from rac3.model.transformer import Transformer

Metrics = dict[str, tuple[Array, Array]]  # name -> (sum, count); sums add over steps and hosts

HIDDEN, IDS, TABLE = ("batch", None, None), ("batch", None), ("vocab", None)  # logical axes; a device has whole rows


def cross_entropy(
    hidden: Float[Array, "batch seq embed"],
    table: Float[Array, "vocab embed"],
    targets: Int[Array, "batch seq"],
    chunk: int = 512,
) -> Float[Array, "batch seq"]:
    """-log p(target) in nats for each token, in float32; not differentiable.

    Args:
      table: the embedding of the vocabulary.
      chunk: positions of each row whose logits are in memory at once, in float32.
    """
    local = functools.partial(_nats, chunk, mesh_axes("vocab"))
    nats: Array = map_shards(local, (HIDDEN, TABLE, IDS), IDS)(hidden, table, targets)
    return nats


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def weighted_cross_entropy(
    hidden: Float[Array, "batch seq embed"],
    table: Float[Array, "vocab embed"],
    targets: Int[Array, "batch seq"],
    weights: Float[Array, "batch seq"],
    chunk: int = 512,
) -> tuple[Float[Array, ""], Float[Array, "batch seq"]]:
    """The sum of weight * -log p(target), and -log p(target) itself, through which no gradient flows.

    Args:
      table: the embedding of the vocabulary.
      chunk: positions of each row whose logits are in memory at once.
    """
    nats = cross_entropy(hidden, table, targets, chunk)
    return jnp.sum(nats * weights), nats


def _with_gradients(
    hidden: Array, table: Array, targets: Array, weights: Array, chunk: int
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    rows, vocab, embed = mesh_axes("batch"), mesh_axes("vocab"), mesh_axes("embed")
    scattered = embed if set(embed) <= set(rows) else ()
    local = functools.partial(_nats_and_gradients, chunk, vocab, rows, scattered)
    outputs = [IDS, HIDDEN, ("vocab", "embed" if scattered else None)]
    nats, *gradients = map_shards(local, (HIDDEN, TABLE, IDS, IDS), outputs)(hidden, table, targets, weights)
    d_hidden, d_table = gradients
    return (jnp.sum(nats * weights), nats), (d_hidden, d_table)


def _scaled(chunk: int, gradients: tuple[Array, Array], cotangent: tuple[Array, Array]) -> tuple[Any, ...]:
    d_hidden, d_table = gradients
    scale, _ = cotangent
    return (d_hidden * scale).astype(d_hidden.dtype), d_table * scale, None, None


weighted_cross_entropy.defvjp(_with_gradients, _scaled)


# What one device does, with its rows and its part of the vocabulary, whose mesh axes are `vocab`.


def _nats(chunk: int, vocab: tuple[str, ...], hidden: Array, table: Array, targets: Array) -> Array:
    def one(hidden: Array, targets: Array) -> Array:
        return _chunk_nats(vocab, hidden, table, targets)[0]

    nats: Array = _by_chunk(one, chunk, hidden, targets)
    return nats


def _nats_and_gradients(
    chunk: int,
    vocab: tuple[str, ...],
    rows: tuple[str, ...],
    scattered: tuple[str, ...],
    hidden: Array,
    table: Array,
    targets: Array,
    weights: Array,
) -> tuple[Array, Array, Array]:
    """-log p; and the gradients of its weighted sum: of hidden states, and of the table, summed over all rows."""

    def one(d_table: Array, hidden: Array, targets: Array, weights: Array) -> tuple[Array, tuple[Array, Array]]:
        nats, exponentials, total, chosen = _chunk_nats(vocab, hidden, table, targets)
        d_logits = exponentials * (weights / total)[:, None] - jnp.where(chosen, weights[:, None], 0)
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = _sum_over(vocab, d_logits @ table)
        return d_table + _float32_dot("tv,te->ve", d_logits, hidden), (nats, d_hidden)

    start = jnp.zeros(table.shape)
    d_table, (nats, d_hidden) = _by_chunk(one, chunk, hidden, targets, weights, carry=start)
    for axis in scattered:
        d_table = jax.lax.psum_scatter(d_table, axis, scatter_dimension=1, tiled=True)
    return nats, d_hidden, _sum_over(tuple(axis for axis in rows if axis not in scattered), d_table)


def _chunk_nats(
    vocab: tuple[str, ...], hidden: Array, table: Array, targets: Array
) -> tuple[Array, Array, Array, Array]:
    """-log p; exp(logits - their maximum), and its sum over the whole vocabulary; which logits are the targets'."""
    logits = _float32_dot("te,ve->tv", hidden, table)
    number = jax.lax.axis_index(vocab) if vocab else 0
    places = targets - number * len(table)
    chosen = jnp.arange(len(table))[None, :] == places[:, None]
    peak = logits.max(-1)
    if vocab:
        peak = jax.lax.pmax(peak, vocab)
    exponentials = jnp.exp(logits - peak[:, None])
    total = _sum_over(vocab, exponentials.sum(-1))
    own = jnp.take_along_axis(logits, jnp.clip(places, 0, len(table) - 1)[:, None], 1)[:, 0]
    own = _sum_over(vocab, jnp.where((places >= 0) & (places < len(table)), own, 0))
    return peak + jnp.log(total) - own, exponentials, total, chosen


def _by_chunk(function: Any, chunk: int, *arrays: Array, carry: Array | None = None) -> Any:
    """`function` over chunks of `chunk` positions of all rows; each array and each result is [rows, seq, ...]."""
    rows, seq = arrays[0].shape[:2]
    tokens, size = rows * seq, min(rows * chunk, rows * seq)

    def chunks(x: Array) -> Array:
        x = x.reshape(tokens, *x.shape[2:])
        return jnp.pad(x, ((0, -tokens % size), *((0, 0),) * (x.ndim - 1))).reshape(-1, size, *x.shape[1:])

    def whole(x: Array) -> Array:
        return x.reshape(-1, *x.shape[2:])[:tokens].reshape(rows, seq, *x.shape[2:])

    def step(carry: Any, parts: tuple[Array, ...]) -> Any:
        return (None, function(*parts)) if carry is None else function(carry, *parts)

    carry, results = jax.lax.scan(step, carry, tuple(map(chunks, arrays)))
    results = jax.tree.map(whole, results)
    return results if carry is None else (carry, results)


def _float32_dot(formula: str, a: Array, b: Array) -> Array:
    return jnp.einsum(formula, a, b, preferred_element_type=jnp.float32)


def _sum_over(axes: tuple[str, ...], x: Array) -> Array:
    return jax.lax.psum(x, axes) if axes else x


def token_cross_entropy(
    model: Transformer, params: PyTree, batch: PackedBatch, chunk: int = 512
) -> Float[Array, "rows seq"]:
    """-log p(target) in nats for each token of a batch; not differentiable. Values at padding have no meaning."""
    hidden, table = _hidden_and_table(model, params, batch)
    return cross_entropy(hidden, table, jnp.asarray(batch.targets), chunk)


def cm3_loss(
    model: Transformer, params: PyTree, batch: PackedBatch, chunk: int = 512
) -> tuple[Float[Array, ""], Metrics]:
    """L_main + alpha L_retr (paper, eq. 2-3) in nats per unit of loss weight, and the loss by kind of target.

    Returns:
      the loss, and metrics: `loss`; `loss/KIND`, unweighted, for each of `KIND_NAMES`; `real_tokens`, of all positions.
    """
    hidden, table = _hidden_and_table(model, params, batch)
    targets, weights = jnp.asarray(batch.targets), jnp.asarray(batch.loss_weight)
    total, nats = weighted_cross_entropy(hidden, table, targets, weights, chunk)
    nats = jax.lax.stop_gradient(nats)
    weight = jnp.sum(weights)
    metrics: Metrics = {"loss": (total, weight)}
    for kind, name in KIND_NAMES.items():
        chosen = batch.kind == kind
        metrics[f"loss/{name}"] = (jnp.sum(nats * chosen), jnp.sum(chosen))
    metrics["real_tokens"] = (jnp.sum(batch.segments > 0), jnp.full((), batch.segments.size, jnp.float32))
    return total / jnp.maximum(weight, 1.0), metrics


def _hidden_and_table(model: Transformer, params: PyTree, batch: PackedBatch) -> tuple[Array, Array]:
    """The hidden states, and the embedding that makes logits of them."""
    apply: Any = model.apply  # flax types its result by what is mutable
    hidden = apply(params, batch.tokens, batch.positions, batch.offsets, batch.segments)
    return hidden, apply(params, method="output_table")
