"""A new state, and what a step makes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rac3.devices.mesh import MeshConfig
from rac3.training.state import TrainState, apply_gradients, new_state, skips_nonfinite


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


@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_either_of_loss_and_gradient_is_enough_to_skip(name: str, value: float):
    def step(state: TrainState, batch: float) -> tuple[TrainState, dict]:
        values = {"loss": 1.0, "gradient_norm": 1.0} | {name: batch}
        return state.replace(params=state.params + 1), {key: (jnp.float32(each), 1.0) for key, each in values.items()}

    state, metrics = skips_nonfinite(step, 5)(TrainState(jnp.int32(7), jnp.zeros(2), ()), value)
    assert (int(state.step), int(state.skipped), state.params.tolist()) == (8, 1, [0, 0])
    assert [float(total) for total, _ in metrics.values()] == [0, 0, 1]
    state, metrics = skips_nonfinite(step, 5)(state, 2.0)
    assert (int(state.skipped), state.params.tolist()) == (0, [1, 1])
    assert {key: float(total) for key, (total, _) in metrics.items()} == {
        "loss": 1.0, "gradient_norm": 1.0, "skipped_steps": 0.0
    } | {name: 2.0}  # fmt: skip
