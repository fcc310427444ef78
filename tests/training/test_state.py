"""A new state, and what a step makes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rac3.devices.mesh import MeshConfig
from rac3.training.state import TrainState, apply_gradients, new_state


def test_parameters_are_drawn_from_the_seed():
    def init(key: jax.Array) -> dict[str, jax.Array]:
        return {"kernel": jax.random.normal(key, (3, 2))}

    mesh = MeshConfig().build()
    for seed in (0, 7):
        state = new_state(init, optax.adam(0.1), seed, mesh).create()
        np.testing.assert_array_equal(state.params["kernel"], jax.random.normal(jax.random.key(seed), (3, 2)))


def test_gradients_are_descended_and_the_step_counted():
    """With momentum 0.9: the second step of 0.5 goes by 1.9 gradients."""
    optimizer, params = optax.sgd(0.5, momentum=0.9), {"bias": jnp.array([1.0, -2.0])}
    state = TrainState(jnp.int32(3), params, optimizer.init(params), "old")
    gradient = {"bias": jnp.array([2.0, 4.0])}
    state = apply_gradients(state, gradient, optimizer, "new")
    np.testing.assert_allclose(state.params["bias"], [0.0, -4.0])
    state = apply_gradients(state, gradient, optimizer, "newest")
    np.testing.assert_allclose(state.params["bias"], [-1.9, -7.8], rtol=1e-6)
    assert (int(state.step), state.extra) == (5, "newest")
