"""A step descends along the gradient of the CM3 loss, and is the same on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import PyTree
from plain_cm3_loss import MODEL, VOCAB, packed, plain_cm3_loss
from plain_transformer import random_params

from rac3.batches.packing import IGNORED, PackedBatch
from rac3.devices.mesh import MeshConfig
from rac3.training.loop import put
from rac3.training.optimizer import OptimizerConfig
from rac3.training.state import TrainState, new_state
from rac3.training.step import make_train_step


def random_batch(seed: int = 0, rows: int = 8, seq: int = 24) -> PackedBatch:
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, VOCAB, (rows, seq + 1)).astype(np.int32)
    segments = np.repeat([[1] * 10 + [2] * 9 + [0] * 5], rows, 0).astype(np.int32)
    positions = np.repeat([[*range(10), *range(9), *range(5)]], rows, 0).astype(np.int32)
    kind = (rng.integers(0, 6, (rows, seq)) * (segments > 0)).astype(np.int32)
    weight = np.select([kind == IGNORED, (kind == 3) | (kind == 4)], [0.0, 0.1], 1.0).astype(np.float32)
    offsets = rng.integers(0, 10, (rows, seq)).astype(np.int32)
    return PackedBatch(ids[:, :-1], ids[:, 1:], segments, positions, offsets, weight, kind)


def init(key: jax.Array):
    ids = jnp.zeros((1, 2), jnp.int32)
    return MODEL.init(key, ids, ids, ids, ids)


def test_a_step_of_descent_is_along_the_gradient_of_the_loss():
    """The slope of the plain loss along the step is the step's length, by central differences."""
    params = jax.tree.map(jnp.asarray, random_params(MODEL))
    state = TrainState(jnp.int32(0), params, optax.sgd(1.0).init(params))
    before = jax.device_get(params)
    after, metrics = make_train_step(MODEL, optax.sgd(1.0), chunk=7)(state, jax.tree.map(jnp.asarray, packed(0.1)))
    step = jax.tree.map(lambda old, new: np.float64(old) - np.float64(new), before, jax.device_get(after.params))
    length = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(step)))
    ahead, behind = (
        plain_cm3_loss(jax.tree.map(lambda x, d, t=t: x + t * d / length, before, step), 0.1)[0] for t in (1e-4, -1e-4)
    )
    assert (ahead - behind) / 2e-4 == pytest.approx(length, rel=1e-4)
    assert float(metrics["gradient_norm"][0]) == pytest.approx(length, rel=1e-4)


def test_a_step_never_holds_the_logits_of_a_whole_row():
    """Two rows are 24 long, chunks 7: what the vocabulary of 128 is an axis of, is 14 tokens at most."""
    params = jax.tree.map(jnp.asarray, random_params(MODEL))
    state = TrainState(jnp.int32(0), params, optax.sgd(1.0).init(params))
    batch = jax.tree.map(jnp.asarray, packed(0.1))
    program = str(make_train_step(MODEL, optax.sgd(1.0), chunk=7).trace(state, batch).jaxpr)
    assert "f32[14,128]" in program
    assert "f32[48,128]" not in program
    assert "f32[2,24,128]" not in program


def train_one(config: MeshConfig, devices: list | None = None) -> tuple[PyTree, dict[str, tuple]]:
    """One step of plain gradient descent, whose update is the gradient: Adam would blow small errors up."""
    mesh = config.build(devices)
    optimizer = optax.sgd(1.0)
    with mesh.use():
        state = new_state(init, optimizer, 0, mesh).create()
        before = jax.device_get(state.params)
        state, metrics = make_train_step(MODEL, optimizer, chunk=8)(state, put(random_batch(), mesh))
    gradients = jax.tree.map(lambda old, new: old - new, before, jax.device_get(state.params))
    assert int(state.step) == 1
    return gradients, jax.device_get(metrics)


@pytest.fixture(scope="module")
def on_one_device():
    return train_one(MeshConfig(), jax.devices()[:1])


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_eight_devices_do_what_one_does(on_one_device, shape):
    """Float32 sums in another order: 192 tokens of 64 terms differ by 1e-5 of the scale; subtracting parameters of 0.3
    from each other adds 0.3 * 6e-8."""
    gradients, metrics = train_one(MeshConfig(*shape))
    expected, expected_metrics = on_one_device
    for name, (total, count) in metrics.items():
        assert float(total) == pytest.approx(float(expected_metrics[name][0]), rel=1e-5), name
        assert float(count) == pytest.approx(float(expected_metrics[name][1]), rel=1e-6), name
    for (path, got), want in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(expected), strict=True
    ):
        scale = np.abs(want).max()
        assert scale > 0
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * scale + 1e-7, err_msg=jax.tree_util.keystr(path))


def test_the_norm_of_the_gradients_is_reported(on_one_device):
    gradients, metrics = on_one_device
    norm = np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in jax.tree.leaves(gradients)))
    assert float(metrics["gradient_norm"][0]) == pytest.approx(norm, rel=1e-4)


def test_training_learns():
    """Thirty steps on one batch: the loss falls by half from log(vocabulary)."""
    mesh = MeshConfig().build(jax.devices()[:1])
    optimizer = OptimizerConfig(peak_lr=1e-2).build(30)
    batch = random_batch()
    with mesh.use():
        state = new_state(init, optimizer, 0, mesh).create()
        step = make_train_step(MODEL, optimizer)
        placed = put(batch, mesh)
        losses = []
        for _ in range(30):
            state, metrics = step(state, placed)
            losses.append(float(metrics["loss"][0]) / float(metrics["loss"][1]))
    assert losses[0] > 0.9 * np.log(VOCAB)
    assert losses[-1] < 0.5 * losses[0]
