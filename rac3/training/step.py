"""The training step of the CM3 Transformer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from rac3.batches.packing import KIND_NAMES, PackedBatch
from rac3.model.losses import token_losses
from rac3.model.transformer import Transformer
from rac3.training.state import TrainState, apply_gradients

Metrics = dict[str, tuple[Array, Array]]  # name -> (sum, count); sums add over steps and hosts


def losses(model: Transformer, params: PyTree, batch: PackedBatch, chunk: int = 512) -> Float[Array, "rows seq"]:
    """-log p(target) of every token, in nats."""
    apply: Any = model.apply  # flax types its result by what is mutable
    hidden, _ = apply(params, batch.tokens, batch.positions, batch.offsets, batch.segments)
    targets = jnp.asarray(batch.targets)
    return token_losses(lambda hidden: apply(params, hidden, method="logits"), hidden, targets, chunk)


def objective(
    model: Transformer, params: PyTree, batch: PackedBatch, chunk: int = 512
) -> tuple[Float[Array, ""], Metrics]:
    """L_main + alpha L_retr per unit of loss weight (paper, eq. 2-3), and the loss by kind of target."""
    nats = losses(model, params, batch, chunk)
    weight = jnp.sum(batch.loss_weight)
    total = jnp.sum(nats * batch.loss_weight)
    metrics: Metrics = {"loss": (total, weight)}
    for kind, name in KIND_NAMES.items():
        chosen = batch.kind == kind
        metrics[f"loss/{name}"] = (jnp.sum(nats * chosen), jnp.sum(chosen))
    metrics["tokens"] = (jnp.sum(batch.segments > 0), jnp.ones(()))
    return total / jnp.maximum(weight, 1.0), metrics


def make_train_step(
    model: Transformer, optimizer: optax.GradientTransformation, chunk: int = 512
) -> Callable[[TrainState, PackedBatch], tuple[TrainState, Metrics]]:
    """(state, batch) -> (next state, metrics), jitted; the state is donated."""

    def step(state: TrainState, batch: PackedBatch) -> tuple[TrainState, Metrics]:
        (_, metrics), gradients = jax.value_and_grad(
            lambda params: objective(model, params, batch, chunk), has_aux=True
        )(state.params)
        metrics["gradient_norm"] = (optax.tree.norm(gradients), jnp.ones(()))
        return apply_gradients(state, gradients, optimizer), metrics

    return jax.jit(step, donate_argnums=0)
