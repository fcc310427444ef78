"""The schedule, what decays, and one update by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rac3.config import InputError
from rac3.model.transformer import TransformerConfig
from rac3.training.optimizer import OptimizerConfig, _matrices


def test_the_schedule_of_the_paper():
    """Linear to 1e-4 over 1,500 steps, then linear to 0."""
    schedule = OptimizerConfig().schedule(101_500)
    for step, rate in [(0, 0.0), (750, 5e-5), (1500, 1e-4), (51_500, 5e-5), (101_500, 0.0), (200_000, 0.0)]:
        assert float(schedule(step)) == pytest.approx(rate, abs=1e-10)


def test_a_short_run_warms_up_for_a_tenth():
    schedule = OptimizerConfig(peak_lr=1.0).schedule(50)
    assert [float(schedule(step)) for step in (0, 5, 50)] == pytest.approx([0.0, 1.0, 0.0])
    assert float(OptimizerConfig(peak_lr=1.0).schedule(1)(1)) == pytest.approx(1.0)


def test_no_warm_up_starts_at_the_peak():
    schedule = OptimizerConfig(peak_lr=1.0, warmup_steps=0).schedule(10)
    assert [float(schedule(step)) for step in (0, 5, 10)] == pytest.approx([1.0, 0.5, 0.0])


def test_updates_are_adam_with_clipping_and_decoupled_decay():
    """Two steps against the equations of Adam (arXiv 1412.6980) and AdamW (1711.05101), in numpy."""
    config = OptimizerConfig(peak_lr=0.1, warmup_steps=0, weight_decay=0.01, clip_norm=1.0)
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}
    gradients = [{name: rng.normal(size=value.shape) for name, value in params.items()} for _ in range(2)]
    optimizer = config.build(100)
    got = jax.tree.map(jnp.float32, params)
    state = optimizer.init(got)
    mean = {name: 0.0 for name in params}
    square = {name: 0.0 for name in params}
    for step, gradient in enumerate(gradients):
        updates, state = optimizer.update(jax.tree.map(jnp.float32, gradient), state, got)
        got = optax.apply_updates(got, updates)
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        assert norm > 1
        rate = 0.1 * (1 - step / 100)
        for name, value in params.items():
            g = gradient[name] / norm
            mean[name] = 0.9 * mean[name] + 0.1 * g
            square[name] = 0.98 * square[name] + 0.02 * g**2
            corrected = mean[name] / (1 - 0.9 ** (step + 1)) / (np.sqrt(square[name] / (1 - 0.98 ** (step + 1))) + 1e-8)
            params[name] = value - rate * (corrected + 0.01 * value * (name == "kernel"))
    for name, value in params.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5)


def test_matrices_decay_and_vectors_do_not():
    """In the model, whose biases and scales are stacked over the layers and so look like matrices."""
    model = TransformerConfig(num_layers=2, embed=8, num_heads=2, mlp=8).build(128, 16, 4)
    ids = jnp.zeros((1, 2), jnp.int32)
    boxed = jax.eval_shape(model.init, jax.random.key(0), ids, ids, ids, ids)
    for params in (nn.unbox(boxed), boxed):
        mask = _matrices(params)
        decays = {jax.tree_util.keystr(path) for path, on in jax.tree_util.tree_leaves_with_path(mask) if on}
        stays = {jax.tree_util.keystr(path) for path, on in jax.tree_util.tree_leaves_with_path(mask) if not on}
        assert all("kernel" in name or "embedding" in name for name in decays)
        assert all("bias" in name or "scale" in name for name in stays)
        assert (len(decays), len(stays)) == (7, 10)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peak_lr": 0.0}, "peak_lr=0.0"),
        ({"clip_norm": -1.0}, "clip_norm=-1.0"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
    ],
)
def test_fields_are_checked(fields, message):
    with pytest.raises(InputError, match=message):
        OptimizerConfig(**fields)
