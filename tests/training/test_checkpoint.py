"""Checkpoints: exact, on any mesh, and never of another model."""

from functools import cache
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rac3.config import InputError
from rac3.devices.mesh import MeshConfig
from rac3.model.transformer import TransformerConfig
from rac3.training.checkpoint import Checkpoints
from rac3.training.optimizer import OptimizerConfig
from rac3.training.state import TrainState, new_state

MESHES = {
    "one": (MeshConfig(), 1),
    "many": (MeshConfig(fsdp=2, tensor=2), 8),
    "other": (MeshConfig(fsdp=4, tensor=2), 8),
}


OPTIMIZER = OptimizerConfig().build(10)


def initializer(**fields):
    model = TransformerConfig(**{"num_layers": 2, "embed": 16, "num_heads": 2, "mlp": 16} | fields).build(128, 8, 4)

    def init(key: jax.Array):
        ids = jnp.zeros((1, 2), jnp.int32)
        return model.init(key, ids, ids, ids, ids)

    return init


def abstract_state(**fields) -> TrainState:
    """On one device, but not there: only shapes and shardings."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def build(key: jax.Array) -> TrainState:
        params = nn.unbox(initializer(**fields)(key))
        return TrainState(jnp.zeros((), jnp.int32), params, OPTIMIZER.init(params))

    shapes = jax.eval_shape(build, jax.random.key(0))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


@cache
def state_on(mesh: str = "one", seed: int = 0) -> TrainState:
    config, devices = MESHES[mesh]
    return new_state(initializer(), OPTIMIZER, seed, config.build(jax.devices()[:devices])).create()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainState]:
    """Steps 3, 5 and 7 of a state on eight devices, each another in all its leaves, and the last of them."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = Checkpoints(folder, keep=2)
    for step in (3, 5, 7):
        state = jax.tree.map(lambda x, step=step: x + jnp.asarray(step, x.dtype), state_on("many"))
        checkpoints.save(step, state, [step, 1])
    checkpoints.close()
    return folder, state


def assert_equal(one, other) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(one)
    for (path, leaf), same in zip(leaves, jax.tree.leaves(other), strict=True):
        assert leaf.dtype == same.dtype
        np.testing.assert_array_equal(leaf, same, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("mesh", MESHES)
def test_the_newest_state_comes_back_on_any_mesh(saved, mesh):
    folder, state = saved
    like = state_on(mesh, seed=1)
    checkpoints = Checkpoints(folder)
    restored, position = checkpoints.restore(like)
    checkpoints.close()
    assert position == [7, 1]
    assert_equal(restored, state)
    assert jax.tree.structure(restored) == jax.tree.structure(like)
    for one, other in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)


def test_the_newest_parameters_alone(saved):
    folder, state = saved
    checkpoints = Checkpoints(folder)
    params = checkpoints.restore_params(state_on("other", seed=1).params)
    checkpoints.close()
    assert_equal(params, state.params)


def test_older_checkpoints_go(saved):
    assert {path.name for path in saved[0].iterdir()} == {"5", "7"}


def test_nothing_to_restore(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.restore(abstract_state()) is None
    with pytest.raises(InputError, match="no checkpoint; run `rac3 train` first"):
        checkpoints.restore_params(abstract_state().params)
    checkpoints.close()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mlp": 32}, r"mlp_in/bias is \(2, 16\) there, \(2, 32\) in this config"),
        ({"num_layers": 3}, "is of another model"),
        ({"offset_embedding": False}, r"offset_embedding is \(5, 16\) there, missing in this config"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(saved, fields, message):
    like = abstract_state(**fields)
    checkpoints = Checkpoints(saved[0])
    with pytest.raises(InputError, match=message):
        checkpoints.restore(like)
    with pytest.raises(InputError, match=message):
        checkpoints.restore_params(like.params)
    checkpoints.close()


def test_abstract_parameters_will_do(saved):
    """As `rac3 evaluate` does, which never allocates the parameters that it is about to read."""
    folder, state = saved
    checkpoints = Checkpoints(folder)
    assert_equal(checkpoints.restore_params(abstract_state().params), state.params)
    checkpoints.close()
