"""The training step of the CM3 Transformer."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from rac3.batches.packing import PackedBatch
from rac3.model.losses import Metrics, cm3_loss
from rac3.model.transformer import Transformer
from rac3.training.state import TrainState, apply_gradients


def make_train_step(
    model: Transformer, optimizer: optax.GradientTransformation, chunk: int = 512
) -> Callable[[TrainState, PackedBatch], tuple[TrainState, Metrics]]:
    """(state, batch) -> (next state, metrics), jitted; the state is donated."""

    def step(state: TrainState, batch: PackedBatch) -> tuple[TrainState, Metrics]:
        (_, metrics), gradients = jax.value_and_grad(
            lambda params: cm3_loss(model, params, batch, chunk), has_aux=True
        )(state.params)
        metrics["gradient_norm"] = (optax.tree.norm(gradients), jnp.ones(()))
        return apply_gradients(state, gradients, optimizer), metrics

    return jax.jit(step, donate_argnums=0)
