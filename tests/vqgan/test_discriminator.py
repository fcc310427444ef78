"""The patch discriminator against torch, its losses by hand, and that it learns to tell pictures apart."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rac3.config import InputError
from rac3.vqgan.discriminator import AdversarialConfig, Discriminator, discriminator_loss, generator_loss


def torch_discriminator(params, n_layers: int, x):
    """pix2pix's layers with GroupNorm, as a function of our parameters; `x` is NCHW."""
    import torch
    import torch.nn.functional as F

    def tensor(module: str, name: str):
        return torch.from_numpy(np.array(params[module][name]))

    def conv(name: str, x, stride: int):
        return F.conv2d(x, tensor(name, "kernel").permute(3, 2, 0, 1), tensor(name, "bias"), stride, padding=1)

    for layer in range(n_layers + 1):
        x = conv(f"conv_{layer}", x, 2 if layer < n_layers else 1)
        if layer:
            x = F.group_norm(x, 32, tensor(f"norm_{layer}", "scale"), tensor(f"norm_{layer}", "bias"))
        x = F.leaky_relu(x, 0.2)
    return conv("conv_out", x, 1)


def test_parity_with_torch():
    torch = pytest.importorskip("torch")
    model = Discriminator(AdversarialConfig(ndf=16, n_layers=2))
    images = jax.random.uniform(jax.random.key(2), (2, 32, 24, 3), minval=-1.0)
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    noise = jax.random.normal(jax.random.key(1), (200,))
    params = jax.tree.map(lambda x: x + 0.1 * noise[: x.size].reshape(x.shape) if x.ndim == 1 else 4 * x, params)
    logits = jax.jit(model.apply)({"params": params}, images)
    assert logits.shape == (2, 6, 4, 1)  # 32 x 24 -> 16 x 12 -> 8 x 6 -> 7 x 5 -> 6 x 4
    assert {name: params[name]["kernel"].shape[-1] for name in ("conv_0", "conv_1", "conv_2", "conv_out")} == {
        "conv_0": 16, "conv_1": 32, "conv_2": 64, "conv_out": 1,
    }  # fmt: skip
    expected = torch_discriminator(params, 2, torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)).permute(
        0, 2, 3, 1
    )
    scale = np.abs(expected.numpy()).max()
    np.testing.assert_allclose(logits, expected, atol=1e-5 * scale)  # float32 sums of up to 1,024 terms


def test_initial_kernels_have_the_spread_of_pix2pix():
    kernel = jax.random.key(0)
    params = jax.jit(Discriminator(AdversarialConfig(ndf=16, n_layers=1)).init)(kernel, jnp.zeros((1, 8, 8, 3)))
    for name in ("conv_0", "conv_1"):  # of 768 and 8,192 values
        assert float(params["params"][name]["kernel"].std()) == pytest.approx(0.02, rel=0.1)


def test_channels_grow_up_to_eight_times():
    model = Discriminator(AdversarialConfig(ndf=2, n_layers=5))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 96, 96, 3)))["params"]
    assert [shapes[f"conv_{i}"]["kernel"].shape[-1] for i in range(6)] == [2, 4, 8, 16, 16, 16]


@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_the_smallest_picture_leaves_one_logit(n_layers: int):
    config = AdversarialConfig(ndf=4, n_layers=n_layers)
    images = jnp.zeros((1, config.min_resolution, config.min_resolution, 3))
    logits, _ = jax.eval_shape(Discriminator(config).init_with_output, jax.random.key(0), images)
    assert logits.shape == (1, 1, 1, 1)


def test_hinge_losses_by_hand():
    real = jnp.array([2.0, 0.5, -1.0]).reshape(1, 3, 1, 1)
    fake = jnp.array([-3.0, 0.0, 1.0]).reshape(1, 3, 1, 1)
    np.testing.assert_allclose(discriminator_loss(real, fake), 0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3), rtol=1e-6)
    np.testing.assert_allclose(generator_loss(fake), 2 / 3, rtol=1e-6)


def test_it_learns_to_tell_sharp_pictures_from_blurred_ones():
    model = Discriminator(AdversarialConfig(ndf=8, n_layers=1))
    optimizer = optax.adam(2e-3, 0.5, 0.9)

    def pictures(seed: int) -> tuple[jax.Array, jax.Array]:
        sharp = jnp.sign(jax.random.normal(jax.random.key(seed), (16, 12, 12, 3)))
        return sharp, (sharp + jnp.roll(sharp, 1, 1) + jnp.roll(sharp, 1, 2)) / 3

    def loss(params, sharp, blurred):
        return discriminator_loss(model.apply({"params": params}, sharp), model.apply({"params": params}, blurred))

    @jax.jit
    def step(params, state, sharp, blurred):
        gradients = jax.grad(loss)(params, sharp, blurred)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state

    params = jax.jit(model.init)(jax.random.key(0), pictures(0)[0])["params"]
    state = optimizer.init(params)
    assert loss(params, *pictures(99)) > 0.9  # logits near 0 cost 1
    for seed in range(40):
        params, state = step(params, state, *pictures(seed))
    assert loss(params, *pictures(99)) < 0.3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": -0.1}, r"adversarial\.weight=-0\.1"),
        ({"start": -1}, "start=-1"),
        ({"ndf": 0}, r"adversarial\.ndf=0"),
        ({"n_layers": 0}, "n_layers=0"),
    ],
)
def test_bad_settings(fields, message):
    with pytest.raises(InputError, match=message):
        AdversarialConfig(**fields)
