"""The training state: made abstract first, then allocated or restored straight into its shardings."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, no_type_check

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from rac3.devices.mesh import DeviceMesh
from rac3.model.losses import Metrics


@no_type_check  # of the constructor at run time: JAX rebuilds it with leaves of any kind
class TrainState(flax.struct.PyTreeNode):
    """Parameters (float32), optimizer state, and what else a model carries from step to step (`extra`).

    Attributes:
      step: batches so far, skipped ones among them.
      skipped: the last so many batches were skipped.
    """

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree
    extra: PyTree = None
    skipped: Int[Array, ""] = flax.struct.field(default_factory=lambda: jnp.zeros((), jnp.int32))


@dataclass(frozen=True)
class NewState:
    """The state that a run starts from, before it takes any memory.

    Attributes:
      abstract: its shapes, dtypes and shardings (`jax.ShapeDtypeStruct`). A checkpoint is restored into these.
      create: allocates it. A run that resumes from a checkpoint never calls this.
    """

    abstract: TrainState
    create: Callable[[], TrainState]


def new_state(
    init: Callable[[Array], PyTree], optimizer: optax.GradientTransformation, seed: int, mesh: DeviceMesh
) -> NewState:
    """Parameters of `init`, and the optimizer's state for them; no device ever holds more than its shards.

    Args:
      init: random key -> parameters, whose leaves may be boxed with the names of their logical axes.
    """

    build = partial(first_state, init, optimizer)
    key = jax.random.key(seed)
    abstract = mesh.abstract(jax.eval_shape(build, key))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    # It runs once: to compile it quickly matters more than to run it quickly.
    options = {"xla_backend_optimization_level": 0}
    create = jax.jit(lambda key: nn.unbox(build(key)), out_shardings=shardings, compiler_options=options)
    return NewState(abstract, partial(create, key))


def first_state(init: Callable[[Array], PyTree], optimizer: optax.GradientTransformation, key: Array) -> TrainState:
    """The state before the first step, with its leaves boxed as those of `init`."""
    params = init(key)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def apply_gradients(
    state: TrainState, gradients: PyTree, optimizer: optax.GradientTransformation, extra: Any = None
) -> TrainState:
    """The state after one update; `extra` takes the place of what the state carried."""
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    return state.replace(
        step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state, extra=extra
    )


def one_each(values: dict[str, Array]) -> Metrics:
    """Means over a batch as metrics of one count each, so that all batches weigh the same."""
    return {name: (value, jnp.ones(())) for name, value in values.items()}


Step = Callable[..., tuple[TrainState, Metrics]]  # (state, batch, ...) -> (next state, metrics)


def skips_nonfinite(step: Step, max_skipped: int) -> Step:
    """`step`, which leaves the state as it is if a metric is not finite: the loss, or the norm of the gradients.

    Only `step` and `skipped` count on. After `max_skipped` such batches in a row all others are skipped too, so that a
    host that reads the metrics late finds the state as it was then. The metrics gain `skipped_steps`; those of a
    skipped batch weigh nothing.
    """

    def guarded(state: TrainState, *rest: Any) -> tuple[TrainState, Metrics]:
        after, metrics = step(state, *rest)
        finite = jnp.all(jnp.stack([jnp.isfinite(total) for total, _ in metrics.values()]))
        good = finite & (state.skipped < max_skipped)
        kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), after, state)
        kept = kept.replace(step=state.step + 1, skipped=jnp.where(good, 0, state.skipped + 1))
        metrics = jax.tree.map(lambda x: jnp.where(good, x, jnp.zeros_like(x)), metrics)
        metrics["skipped_steps"] = (1.0 - good, jnp.ones(()))
        return kept, metrics

    return guarded
