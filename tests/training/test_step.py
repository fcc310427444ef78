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
from rac3.training.flops import step_flops
from rac3.training.loop import put
from rac3.training.optimizer import OptimizerConfig
from rac3.training.state import TrainState, new_state
from rac3.training.step import make_train_step, shares


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


def train_one(
    config: MeshConfig, devices: list | None = None, microbatches: int = 1
) -> tuple[PyTree, dict[str, tuple]]:
    """One step of plain gradient descent, whose update is the gradient: Adam would blow small errors up."""
    mesh = config.build(devices)
    optimizer = optax.sgd(1.0)
    with mesh.use():
        state = new_state(init, optimizer, 0, mesh).create()
        before = jax.device_get(state.params)
        step = make_train_step(MODEL, optimizer, chunk=8, microbatches=microbatches)
        state, metrics = step(state, put(random_batch(), mesh))
    gradients = jax.tree.map(lambda old, new: old - new, before, jax.device_get(state.params))
    assert int(state.step) == 1
    return gradients, jax.device_get(metrics)


@pytest.fixture(scope="module")
def on_one_device():
    return train_one(MeshConfig(), jax.devices()[:1])


@pytest.mark.parametrize(("shape", "microbatches"), [((8, 1, 1), 1), ((2, 2, 2), 1), ((1, 4, 2), 1), ((1, 4, 2), 2)])
def test_eight_devices_do_what_one_does(on_one_device, shape, microbatches: int):
    """Float32 sums in another order: 192 tokens of 64 terms differ by 1e-5 of the scale; subtracting parameters of 0.3
    from each other adds 0.3 * 6e-8. Gradients that are added up over shares of the rows are such sums too."""
    gradients, metrics = train_one(MeshConfig(*shape), microbatches=microbatches)
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


def test_microbatches_are_one_batch(on_one_device):
    """Rows weigh as their tokens do, not as their share does: the rows of `random_batch` have different weights."""
    gradients, metrics = train_one(MeshConfig(), jax.devices()[:1], microbatches=8)
    expected, expected_metrics = on_one_device
    assert metrics.keys() == expected_metrics.keys()
    for name, (total, count) in metrics.items():
        assert float(total) == pytest.approx(float(expected_metrics[name][0]), rel=1e-5), name
        assert float(count) == pytest.approx(float(expected_metrics[name][1]), rel=1e-6), name
    for got, want in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max() + 1e-7)


def test_a_share_has_rows_of_every_device_and_none_moves():
    mesh = MeshConfig(data=2, tensor=4).build()
    numbers = put(random_batch(), mesh).replace(tokens=jax.device_put(jnp.arange(8)[:, None], mesh.sharding("batch")))
    with mesh.use():
        compiled = jax.jit(lambda batch: shares(batch, 2)).lower(numbers).compile()
        split = compiled(numbers).tokens
    assert split[:, :, 0].tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    text = compiled.as_text()
    assert not any(name in text for name in ("all-to-all", "all-gather", "all-reduce", "collective-permute"))
    assert split.sharding.shard_shape(split.shape) == (2, 2, 1)


def test_a_batch_that_is_not_finite_leaves_the_state_and_is_counted():
    """And after three in a row all are skipped, finite or not."""
    optimizer = OptimizerConfig(peak_lr=1e-2).build(30)
    step = make_train_step(MODEL, optimizer, max_skipped=3)
    good = jax.tree.map(jnp.asarray, random_batch())
    bad = good.replace(loss_weight=good.loss_weight.at[3, 5].set(jnp.nan))
    state = new_state(init, optimizer, 0, MeshConfig().build(jax.devices()[:1])).create()
    state, _ = step(state, good)
    kept = jax.device_get((state.params, state.opt_state))
    trail = []
    for batch in (bad, bad, good, bad, bad, bad, good):
        state, metrics = step(state, batch)
        trail.append((int(state.step), int(state.skipped)))
        assert float(metrics["skipped_steps"][0]) == (trail[-1][1] > 0)
        assert all(np.isfinite(total) for total, _ in metrics.values())
        assert (float(metrics["loss"][1]) == 0) == (trail[-1][1] > 0)  # it weighs nothing
        same = jax.tree.map(np.array_equal, kept, jax.device_get((state.params, state.opt_state)))
        assert all(jax.tree.leaves(same)) == (trail[-1][1] > 0 and trail[-1][0] < 4)
        if trail[-1] == (4, 0):
            learned = jax.device_get(state.params)
    assert trail == [(2, 1), (3, 2), (4, 0), (5, 1), (6, 2), (7, 3), (8, 4)]
    jax.tree.map(np.testing.assert_array_equal, learned, jax.device_get(state.params))


def test_a_weight_that_is_not_a_number_is_noticed_after_the_relu():
    """The bias of one neuron, before the ReLU; its output reaches everything. A maximum with 0 could lose the NaN."""
    optimizer = optax.sgd(1.0)
    params = random_params(MODEL)
    mlp = params["params"]["blocks"]["mlp_in"]
    mlp["bias"] = jnp.asarray(mlp["bias"]).at[0, 3].set(jnp.nan)
    params = jax.tree.map(jnp.array, params)
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    _, metrics = make_train_step(MODEL, optimizer)(state, jax.tree.map(jnp.asarray, random_batch()))
    assert float(metrics["skipped_steps"][0]) == 1


def test_the_learning_rate_is_that_of_the_updates_so_far():
    """A skipped batch doesn't move it on."""
    config = OptimizerConfig(peak_lr=1e-2, warmup_steps=4)
    step = make_train_step(MODEL, config.build(100), schedule=config.schedule(100))
    good = jax.tree.map(jnp.asarray, random_batch())
    bad = good.replace(loss_weight=good.loss_weight * jnp.inf)
    state = new_state(init, config.build(100), 0, MeshConfig().build(jax.devices()[:1])).create()
    rates = []
    for batch in (good, good, bad, good, good, good):
        state, metrics = step(state, batch)
        rates.append(float(metrics["learning_rate"][0]))
    np.testing.assert_allclose(rates, [0, 0.0025, 0, 0.005, 0.0075, 0.01], rtol=1e-6)


def test_flops_are_counted_by_hand():
    """8 rows of two groups, of 10 and 9 tokens. Products: 6 for each weight and token; attention: 12 x width a pair."""
    model, batch = MODEL.config, random_batch()
    weights = model.num_layers * (4 * model.embed**2 + 2 * model.embed * model.mlp) + model.embed * VOCAB
    products = 6 * weights * 8 * 19
    per_pair = 12 * model.num_layers * model.embed
    everyone, causal = 8 * (10 * 10 + 9 * 9), 8 * (55 + 45)
    full, half = step_flops(MODEL, jax.tree.map(jnp.asarray, batch))
    assert float(full) == pytest.approx(products + per_pair * everyone, rel=1e-6)
    assert float(half) == pytest.approx(products + per_pair * causal, rel=1e-6)
