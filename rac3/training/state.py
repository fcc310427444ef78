"""What training changes, allocated straight into its shardings."""

from collections.abc import Callable
from typing import Any, no_type_check

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, PyTree

from rac3.devices.mesh import MeshConfig, shardings_of


@no_type_check  # of the constructor at run time: JAX rebuilds it with leaves of any kind
class TrainState(flax.struct.PyTreeNode):
    """Parameters (float32), optimizer state, and what else a model carries from step to step (`extra`)."""

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree
    extra: PyTree = None


def create_state(
    init: Callable[[Array], PyTree],
    optimizer: optax.GradientTransformation,
    seed: int,
    mesh_config: MeshConfig,
    mesh: Mesh,
) -> TrainState:
    """A new state: abstract first, then its shardings, then allocated under `jit`; no device ever holds it whole.

    Args:
      init: random key -> parameters, whose leaves may carry logical axis names.
    """

    def build(key: Array) -> TrainState:
        params = init(key)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    key = jax.random.key(seed)
    shardings = shardings_of(mesh_config, mesh, jax.eval_shape(build, key))
    # It runs once: to compile it quickly matters more than to run it quickly.
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(lambda key: nn.unbox(build(key)), out_shardings=shardings, compiler_options=options)(key)


def apply_gradients(
    state: TrainState, gradients: PyTree, optimizer: optax.GradientTransformation, extra: Any = None
) -> TrainState:
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state, extra)
