"""The CM3 loss (paper, eq. 2-3), and the cross-entropy of each token that it weighs.

Logits are made chunk by chunk, so that those of a whole row never exist at once.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from rac3.batches.packing import KIND_NAMES, PackedBatch
from rac3.model.transformer import Transformer

Metrics = dict[str, tuple[Array, Array]]  # name -> (sum, count); sums add over steps and hosts


def cross_entropy(
    logits_of: Callable[[Float[Array, "batch chunk embed"]], Float[Array, "batch chunk vocab"]],
    hidden: Float[Array, "batch seq embed"],
    targets: Int[Array, "batch seq"],
    chunk: int = 512,
) -> Float[Array, "batch seq"]:
    """-log p(target) in nats for each token, in float32.

    Logits are made `chunk` positions at a time and made again in the backward pass: the memory is
    batch * chunk * vocab * 4 bytes instead of batch * seq * vocab * 4.
    """
    batch, seq, embed = hidden.shape

    @jax.checkpoint
    def one(hidden: Array, targets: Array) -> Array:
        logits = logits_of(hidden)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen

    if seq <= chunk:
        return one(hidden, targets)
    padding = -seq % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))).reshape(batch, -1, chunk, embed)
    chunks = jnp.pad(targets, ((0, 0), (0, padding))).reshape(batch, -1, chunk)
    _, nats = jax.lax.scan(lambda _, xs: (None, one(*xs)), None, (hidden.swapaxes(0, 1), chunks.swapaxes(0, 1)))
    return nats.swapaxes(0, 1).reshape(batch, -1)[:, :seq]


def token_cross_entropy(
    model: Transformer, params: PyTree, batch: PackedBatch, chunk: int = 512
) -> Float[Array, "rows seq"]:
    """-log p(target) in nats for each token of a batch. Values at padding have no meaning."""
    apply: Any = model.apply  # flax types its result by what is mutable
    hidden, _ = apply(params, batch.tokens, batch.positions, batch.offsets, batch.segments)
    targets = jnp.asarray(batch.targets)
    return cross_entropy(lambda hidden: apply(params, hidden, method="logits"), hidden, targets, chunk)


def cm3_loss(
    model: Transformer, params: PyTree, batch: PackedBatch, chunk: int = 512
) -> tuple[Float[Array, ""], Metrics]:
    """L_main + alpha L_retr (paper, eq. 2-3) in nats per unit of loss weight, and the loss by kind of target.

    Returns:
      the loss, and metrics: `loss`; `loss/KIND`, unweighted, for each of `KIND_NAMES`; `real_tokens`, of all positions.
    """
    nats = token_cross_entropy(model, params, batch, chunk)
    weight = jnp.sum(batch.loss_weight)
    total = jnp.sum(nats * batch.loss_weight)
    metrics: Metrics = {"loss": (total, weight)}
    for kind, name in KIND_NAMES.items():
        chosen = batch.kind == kind
        metrics[f"loss/{name}"] = (jnp.sum(nats * chosen), jnp.sum(chosen))
    metrics["real_tokens"] = (jnp.sum(batch.segments > 0), jnp.full((), batch.segments.size, jnp.float32))
    return total / jnp.maximum(weight, 1.0), metrics
