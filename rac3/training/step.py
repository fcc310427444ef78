"""The training step of the CM3 Transformer."""

import functools
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

    return jax.jit(step, donate_argnums=0, compiler_options=_cpu_options())


@functools.cache
def _cpu_options() -> dict[str, str]:
    """On CPUs, XLA's library of kernels is for matrix products only: its sums along an axis take ten times as long."""
    options = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return {}  # another version of XLA, without this experimental option
    return options
