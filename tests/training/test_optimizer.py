"""The schedule, what decays, and one update by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from plain_adam import plain_adam

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
    """A whole run against NumPy. No setting is a default; every other gradient is below the norm to clip at."""
    settings = {"peak_lr": 0.1, "b1": 0.7, "b2": 0.9, "eps": 0.05, "weight_decay": 0.2, "clip_norm": 0.5}
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}
    gradients = [
        {name: scale * rng.normal(size=value.shape) for name, value in params.items()} for scale in (3.0, 0.05) * 10
    ]
    norms = [float(optax.tree.norm(gradient)) for gradient in gradients]
    assert min(norms[::2]) > 0.5 > max(norms[1::2])
    optimizer = OptimizerConfig(warmup_steps=2, **settings).build(20)
    got = jax.tree.map(jnp.float32, params)
    state = optimizer.init(got)
    update = jax.jit(optimizer.update)
    for gradient, expected in zip(
        gradients, plain_adam(params, gradients, decays="kernel", steps=20, warmup=2, **settings), strict=True
    ):
        updates, state = update(jax.tree.map(jnp.float32, gradient), state, got)
        got = optax.apply_updates(got, updates)
        for name, value in expected.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6)


def test_the_defaults_are_those_of_the_paper():
    """Section 4.1: beta 0.9 and 0.98, peak 1e-4, 1,500 steps of warm-up, clipping at 1; it names no decay."""
    config = OptimizerConfig()
    assert (config.b1, config.b2, config.peak_lr, config.warmup_steps) == (0.9, 0.98, 1e-4, 1500)
    assert (config.clip_norm, config.weight_decay) == (1.0, 0.0)


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
