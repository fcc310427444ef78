"""The training step of the CM3 Transformer."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from rac3.batches.packing import PackedBatch
from rac3.devices.cpu import compiler_options
from rac3.devices.mesh import constrain
from rac3.model.losses import Metrics, cm3_loss
from rac3.model.transformer import Transformer
from rac3.training.flops import step_flops
from rac3.training.state import Step, TrainState, apply_gradients, one_each, skips_nonfinite


def make_train_step(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    chunk: int = 512,
    microbatches: int = 1,
    max_skipped: int = 20,
    schedule: optax.Schedule | None = None,
) -> Step:
    """(state, batch) -> (next state, metrics), jitted; the state is donated.

    Args:
      chunk: positions of a row whose logits are in memory at once.
      microbatches: the gradient is summed over so many shares of the rows, one after the other, so that the activations
        of one share are in memory at once. The loss is that of the whole batch.
      max_skipped: see `skips_nonfinite`.
      schedule: the optimizer's, for the metrics.
    """

    def loss(params: PyTree, batch: PackedBatch, weight: Array) -> tuple[Array, Metrics]:
        _, metrics = cm3_loss(model, params, batch, chunk)
        return metrics["loss"][0] / weight, metrics

    def step(state: TrainState, batch: PackedBatch) -> tuple[TrainState, Metrics]:
        weight = jnp.maximum(jnp.sum(batch.loss_weight), 1.0)  # of the whole batch

        def one(share: PackedBatch) -> tuple[PyTree, Metrics]:
            (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state.params, share, weight)
            return gradients, metrics

        gradients, metrics = one(batch) if microbatches == 1 else _summed(one, shares(batch, microbatches))
        values = {"gradient_norm": optax.tree.norm(gradients)}
        values["flops/full"], values["flops/causal"] = step_flops(model, batch)
        if schedule is not None:
            _, updates = optax.tree.get_all_with_path(state.opt_state, "count")[0]
            values["learning_rate"] = schedule(updates)
        metrics |= one_each(values)
        return apply_gradients(state, gradients, optimizer), metrics

    return jax.jit(skips_nonfinite(step, max_skipped), donate_argnums=0, compiler_options=compiler_options())


def shares(batch: PackedBatch, count: int) -> PackedBatch:
    """The rows in `count` shares, [count, rows / count, ...]. A share has rows of every device, and none moves.

    rows 0 1 2 3 | 4 5 6 7  on two devices  ->  shares 0 2 | 4 6  and  1 3 | 5 7
    """

    def split(x: Array) -> Array:
        parts = x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)
        return constrain(parts, None, "batch", *(None,) * (x.ndim - 1))

    return jax.tree.map(split, batch)


def _summed(one: Callable[[PackedBatch], tuple[PyTree, Metrics]], batches: PackedBatch) -> tuple[PyTree, Metrics]:
    """The gradients and metrics of all shares, added up in float32, each array where its parameter is."""
    first = jax.tree.map(lambda x: x[0], batches)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, first))
    total, _ = jax.lax.scan(lambda sums, share: (jax.tree.map(jnp.add, sums, one(share)), None), zeros, batches)
    return total
