"""The gradients of fitting against plain ones, the adaptive weight, and the average of the weights."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rac3.config import InputError
from rac3.vqgan.discriminator import AdversarialConfig
from rac3.vqgan.model import VQGAN, VQGANConfig
from rac3.vqgan.objective import (
    VQGANObjective,
    adaptive_weight,
    averaged,
    init_codebook_from_batch,
    locality_loss,
    vqgan_step,
    with_codebook,
)
from rac3.vqgan.perceptual import LPIPS, PerceptualConfig, lpips

MODEL = VQGAN(
    VQGANConfig(
        ch=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(), resolution=8, z_channels=8, embed_dim=4,
        n_embed=16, norm_groups=4, mid_attn=False,
    )
)  # fmt: skip
OBJECTIVE = VQGANObjective(l1=0.7, l2=0.4, locality=0.1, adversarial=AdversarialConfig(weight=0.8))
KEY = jax.random.key(3)


def drawn(model: VQGAN, images: jax.Array) -> dict:
    """Parameters; to compile `init` would take longer than all the rest."""
    rng = np.random.default_rng(1)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = rng.standard_normal(leaf.shape).astype(np.float32)
        return jnp.asarray(values / np.sqrt(np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 1 + 0.1 * values)

    return jax.tree.map(draw, jax.eval_shape(model.init, jax.random.key(1), images)["params"])


@pytest.fixture(scope="module")
def start() -> tuple:
    """(parameters, codebook, images)"""
    images = jax.random.uniform(jax.random.key(0), (6, 8, 8, 3), minval=-1.0)
    params = drawn(MODEL, images)
    return params, init_codebook_from_batch(MODEL, params, images, jax.random.key(2)), images


@pytest.fixture(scope="module")
def compiled(start) -> dict[bool, jax.stages.Compiled]:
    """The step, without and with an adversary."""
    steps = {
        against: partial(vqgan_step, MODEL, OBJECTIVE, adversary=critic if against else None) for against in (0, 1)
    }
    return {bool(against): jax.jit(step).lower(*start, KEY).compile() for against, step in steps.items()}


def critic(images: jax.Array) -> jax.Array:
    """A smooth loss of pictures with a gradient unlike that of the reconstruction."""
    return jnp.mean(jnp.sin(3 * images) * jnp.arange(8.0)[:, None])


def plain_losses(params, codebook, images) -> jax.Array:
    """(of the reconstruction, of the latents, adversarial)"""
    variables = {"params": with_codebook(params, codebook)}
    out = MODEL.apply(variables, images, train=True)
    error = out.reconstruction - images
    commitment = jnp.mean((out.latents - jax.lax.stop_gradient(out.quantized)) ** 2)
    dropout_key, _, mix_key = jax.random.split(KEY, 3)
    locality = locality_loss(MODEL, variables, images, out.latents, mix_key, dropout_key)
    reconstruction = 0.7 * jnp.mean(jnp.abs(error)) + 0.4 * jnp.mean(error**2)
    return jnp.stack([reconstruction, 0.25 * commitment + 0.1 * locality, critic(out.reconstruction)])


def test_gradients_are_those_of_the_sum_of_the_losses(start, compiled):
    """Eq. 6 and 7 as they stand: a backward pass for each loss, and their sum."""
    losses = plain_losses(*start)
    each = jax.jit(jax.jacrev(plain_losses))(*start)
    norms = jnp.linalg.norm(each["decoder"]["conv_out"]["kernel"].reshape(3, -1), axis=1)
    weight = norms[0] / (norms[2] + 1e-4)
    assert 0.01 < weight < 1e3
    for against, step in compiled.items():
        found = step(*start, KEY)
        factors = jnp.array([1, 1, 0.8 * weight if against else 0])
        np.testing.assert_allclose(found.metrics["loss"], losses @ factors, rtol=1e-5)
        if against:
            np.testing.assert_allclose(found.metrics["adaptive_weight"], weight, rtol=1e-4)
            np.testing.assert_allclose(found.metrics["generator_loss"], losses[2], rtol=1e-5)
        expected = jax.tree.map(lambda gradients: jnp.tensordot(factors, gradients, 1), each)  # noqa: B023
        for (path, one), other in zip(
            jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found.gradients), strict=True
        ):
            # float32 sums in another order, relative to the largest value
            atol = 1e-4 * np.abs(one).max() + 1e-7
            np.testing.assert_allclose(other, one, atol=atol, err_msg=jax.tree_util.keystr(path))


def test_metrics_are_those_of_the_reconstruction_and_the_codes(start, compiled):
    params, codebook, images = start
    found = compiled[False](*start, KEY)
    out = jax.jit(MODEL.apply)({"params": with_codebook(params, codebook)}, images)
    error = np.asarray(out.reconstruction - images) / 2  # of values in [0, 1]
    share = np.bincount(np.asarray(out.codes).ravel(), minlength=16) / out.codes.size
    expected = {
        "l1": np.abs(error).mean(),
        "mse": np.mean(error**2),
        "psnr": -10 * np.log10(np.mean(error**2)),
        "commitment": np.mean((out.latents - out.quantized) ** 2),
        "perplexity": np.exp(-sum(p * np.log(p) for p in share if p)),
        "codes_used": np.mean(share > 0),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found.metrics[name], value, rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(found.reconstruction, out.reconstruction, atol=1e-4)


def test_the_perceptual_loss_counts_by_its_weight(start):
    """With two layers of two channels in the place of VGG16's."""
    rng, (params, codebook, images) = np.random.default_rng(0), start

    def layer(inputs: int) -> tuple[tuple[jax.Array, jax.Array], ...]:
        return ((jnp.asarray(rng.standard_normal((3, 3, inputs, 2)), jnp.float32), jnp.zeros(2)),)

    weights = LPIPS((layer(3), layer(2)), (jnp.ones(2), jnp.array([0.5, 2.0])))
    objective = VQGANObjective(l1=0.0, l2=1.0, beta=0.0, perceptual=PerceptualConfig(weight=3.0))
    found = jax.jit(partial(vqgan_step, MODEL, objective))(params, codebook, images, KEY, weights)
    distance = jax.jit(lpips)(weights, images, found.reconstruction).mean()
    assert distance > 0.1
    np.testing.assert_allclose(found.metrics["perceptual"], distance, rtol=1e-4)
    squared = jnp.mean((found.reconstruction - images) ** 2)
    np.testing.assert_allclose(found.metrics["loss"], squared + 3 * distance, rtol=1e-4)


def test_a_step_drops_out_by_its_key(start):
    params, codebook, images = start
    model = VQGAN(replace(MODEL.config, dropout=0.5))
    step = jax.jit(partial(vqgan_step, model, VQGANObjective(locality=0.1)))
    l1 = [float(step(params, codebook, images, jax.random.key(seed)).metrics["l1"]) for seed in (0, 0, 1)]
    reconstruction = jax.jit(MODEL.apply)({"params": with_codebook(params, codebook)}, images).reconstruction
    without = np.abs(reconstruction - images).mean() / 2
    assert l1[0] == l1[1]
    assert min(abs(l1[0] - l1[2]), abs(l1[0] - without)) > 1e-3


def test_dropout_alone_is_no_lack_of_locality(start):
    """A picture whose patches are exchanged for its own."""
    params, codebook, images = start
    model = VQGAN(replace(MODEL.config, dropout=0.5))
    variables, image, one, other = {"params": with_codebook(params, codebook)}, images[:1], *jax.random.split(KEY)

    @jax.jit
    def loss(key):
        latents = model.apply(variables, image, True, method="latents", rngs={"dropout": one})
        return locality_loss(model, variables, image, latents, KEY, key)

    assert loss(one) == 0
    assert loss(other) > 0.1


def test_the_adaptive_weight_costs_no_second_backward_pass(compiled):
    flops = {against: step.cost_analysis()["flops"] for against, step in compiled.items()}
    assert flops[True] < 1.1 * flops[False]  # of which a backward pass is about two thirds


def test_the_adaptive_weight_is_bounded_where_the_adversary_has_no_opinion():
    reconstruction = jnp.full((3, 3, 8, 3), 0.5)
    zeros = jnp.zeros_like(reconstruction)
    assert adaptive_weight(reconstruction, zeros) == 1e4
    np.testing.assert_allclose(adaptive_weight(reconstruction, 2 * reconstruction), 0.5, rtol=1e-4)
    assert adaptive_weight(zeros, reconstruction) == 0
    weak = adaptive_weight(jnp.array([0.0, 0.1]), jnp.array([3e-4, 4e-4]))
    np.testing.assert_allclose(weak, 0.1 / (5e-4 + 1e-4), rtol=1e-5)


def test_the_average_warms_up():
    """After n updates it is the weighted mean by products of the decays; a short run keeps nothing of its start."""
    decay, values = 0.9, np.random.default_rng(0).normal(size=31)
    average = {"w": jnp.float32(values[0])}
    expected, kept = values[0], 1.0
    for updates, value in enumerate(values[1:]):
        average = averaged(decay, average, {"w": jnp.float32(value)}, jnp.int32(updates))
        step = min(decay, (1 + updates) / (10 + updates))
        expected = step * expected + (1 - step) * value
        kept *= step
    np.testing.assert_allclose(average["w"], expected, rtol=1e-5)
    assert kept < 1e-6
    late = averaged(decay, {"w": jnp.float32(0)}, {"w": jnp.float32(1)}, jnp.int32(10_000))
    np.testing.assert_allclose(late["w"], 1 - decay, rtol=1e-6)


@pytest.mark.parametrize("name", ["decay", "revive_below", "ema_decay"])
def test_bad_settings(name: str):
    VQGANObjective(**{name: 0.0})
    for value in (1.0, -0.1):
        with pytest.raises(InputError, match=rf"{name}={value} is outside"):
            VQGANObjective(**{name: value})
