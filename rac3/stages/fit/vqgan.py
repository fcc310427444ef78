"""Fit the VQGAN on the images of some documents."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, PyTree, UInt8

from rac3.devices.mesh import DeviceMesh
from rac3.documents.document import Document, prepare_image
from rac3.model.losses import Metrics
from rac3.stages.fit.encoder import FitTask, adam, fit_encoder
from rac3.training.state import NewState, TrainState, apply_gradients, new_state, one_each
from rac3.vqgan.discriminator import Discriminator, discriminator_loss, generator_loss
from rac3.vqgan.frozen import FrozenVQGAN
from rac3.vqgan.model import VQGAN, Images, Params, preprocess
from rac3.vqgan.objective import (
    CodebookState,
    averaged,
    init_codebook_from_batch,
    vqgan_step,
    with_codebook,
)
from rac3.vqgan.perceptual import LPIPS, load_lpips


@no_type_check  # of the constructor at run time: JAX rebuilds it with leaves of any kind
class VQGANExtra(flax.struct.PyTreeNode):
    """What a fit carries besides the generator's parameters and optimizer state; None for what is switched off."""

    codebook: CodebookState
    average: Params | None  # of the generator's parameters
    discriminator: TrainState | None  # whose `step` counts its own updates


def fit_vqgan(config: FrozenVQGAN, seed: int, mesh: DeviceMesh, documents: Sequence[Document], folder: Path) -> Params:
    """The parameters of a VQGAN that is fitted on all images of the documents: their average if `ema_decay` is set.

    Args:
      folder: keeps the checkpoints, from which a killed fit resumes.

    Raises:
      InputError: the weights of the perceptual loss can't be read.
    """
    state = fit_encoder(config.fit, vqgan_task(config, seed, mesh, documents), seed, mesh, folder)
    params = state.params if state.extra.average is None else state.extra.average
    return jax.device_get(with_codebook(params, state.extra.codebook))


def vqgan_task(config: FrozenVQGAN, seed: int, mesh: DeviceMesh, documents: Sequence[Document]) -> FitTask:
    """The fit of a VQGAN, with its discriminator if the objective has one; a row is an image."""
    weights = config.objective.perceptual.weights
    perceptual = load_lpips(weights) if weights else None
    optimizer, adversary = adam(config.fit, config.fit.steps), open_adversary(config)
    images = np.stack(
        [prepare_image(image.pixels(), config.model.resolution) for document in documents for image in document.images]
    )

    def batch(rows: np.ndarray) -> PyTree:
        return images[rows]

    new = new_vqgan_state(config, seed, mesh, images, optimizer, adversary)
    step = make_step(config, seed, optimizer, adversary)
    return FitTask("fit VQGAN", new, step, len(images), batch, perceptual)


def new_vqgan_state(
    config: FrozenVQGAN,
    seed: int,
    mesh: DeviceMesh,
    images: UInt8[np.ndarray, "images height width 3"],
    optimizer: optax.GradientTransformation,
    adversary: "Adversary | None",
) -> NewState:
    """New parameters with a codebook of vectors of some of the images, and, if they are switched on, the average of the
    parameters and the discriminator."""
    model = VQGAN(config.model)

    def init(key: Array) -> PyTree:
        return model.init(key, preprocess(images[:1]))["params"]

    def codebook_of(params: Params) -> CodebookState:
        rng = np.random.default_rng([seed, 1])
        some = preprocess(images[rng.integers(len(images), size=4 * config.fit.batch)])
        return jax.jit(init_codebook_from_batch, static_argnums=0)(model, params, some, jax.random.key(seed))

    generator = new_state(init, optimizer, seed, mesh)
    discriminator = None if adversary is None else adversary.new_state(config.model.resolution, seed, mesh)
    averages = config.objective.ema_decay > 0
    abstract = VQGANExtra(
        mesh.abstract(jax.eval_shape(codebook_of, generator.abstract.params)),
        generator.abstract.params if averages else None,
        None if discriminator is None else discriminator.abstract,
    )

    def create() -> TrainState:
        state = generator.create()
        extra = VQGANExtra(
            jax.device_put(codebook_of(state.params), mesh.sharding()),
            jax.tree.map(jnp.copy, state.params) if averages else None,
            None if discriminator is None else discriminator.create(),
        )
        return state.replace(extra=extra)

    return NewState(generator.abstract.replace(extra=abstract), create)


@dataclass(frozen=True)
class Adversary:
    """The discriminator without its state; its optimizer runs over the steps from `adversarial.start` on."""

    model: Discriminator
    optimizer: optax.GradientTransformation

    def new_state(self, resolution: int, seed: int, mesh: DeviceMesh) -> NewState:
        def init(key: Array) -> PyTree:
            return self.model.init(key, jnp.zeros((1, resolution, resolution, 3)))["params"]

        return new_state(init, self.optimizer, seed, mesh)

    def judge(self, params: Params, images: Images) -> Array:
        apply: Any = self.model.apply  # flax types its result by what is mutable
        return apply({"params": params}, images)

    def generator_loss(self, state: TrainState, active: Bool[Array, ""], fake: Images) -> Float[Array, ""]:
        """The adversarial loss of the generator; 0 unless `active`."""
        return jax.lax.cond(active, lambda: generator_loss(self.judge(state.params, fake)), lambda: jnp.zeros(()))

    def update(
        self, state: TrainState, active: Bool[Array, ""], real: Images, fake: Images
    ) -> tuple[TrainState, dict[str, Array]]:
        """The state after one step, and metrics; unless `active`, the state as it is, and zeros."""

        def loss(params: Params) -> Array:
            return discriminator_loss(self.judge(params, real), self.judge(params, fake))

        def learn() -> tuple[TrainState, dict[str, Array]]:
            value, gradients = jax.value_and_grad(loss)(state.params)
            values = {"discriminator_loss": value, "discriminator_gradient_norm": optax.tree.norm(gradients)}
            return apply_gradients(state, gradients, self.optimizer), values

        rest = {"discriminator_loss": jnp.zeros(()), "discriminator_gradient_norm": jnp.zeros(())}
        return jax.lax.cond(active, learn, lambda: (state, rest))


def open_adversary(config: FrozenVQGAN) -> Adversary | None:
    """None if the objective has no adversarial loss."""
    adversarial = config.objective.adversarial
    if not adversarial.weight:
        return None
    return Adversary(Discriminator(adversarial), adam(config.fit, config.fit.steps - adversarial.start))


def make_step(
    config: FrozenVQGAN, seed: int, optimizer: optax.GradientTransformation, adversary: Adversary | None
) -> Callable[[TrainState, UInt8[Array, "batch height width 3"], LPIPS | None], tuple[TrainState, Metrics]]:
    """One step of both players, each against the other as it was before the step: the discriminator learns from the
    reconstructions that the generator's loss is computed on, so there is no second forward pass."""
    model, objective = VQGAN(config.model), config.objective

    def step(state: TrainState, pixels: Array, perceptual: LPIPS | None) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        images, extra = preprocess(pixels), state.extra
        active = state.step >= objective.adversarial.start
        opposing = None if adversary is None else partial(adversary.generator_loss, extra.discriminator, active)
        found = vqgan_step(model, objective, state.params, extra.codebook, images, key, perceptual, opposing)
        metrics = one_each(found.metrics | {"gradient_norm": optax.tree.norm(found.gradients)})
        discriminator = extra.discriminator
        if adversary is not None:
            discriminator, learned = adversary.update(discriminator, active, images, found.reconstruction)
            values = learned | found.metrics
            for name in (*learned, "generator_loss", "adaptive_weight"):
                metrics[name] = (jnp.where(active, values[name], 0.0), active.astype(jnp.float32))
        after = apply_gradients(state, found.gradients, optimizer)
        average = extra.average
        if average is not None:
            average = averaged(objective.ema_decay, average, after.params, state.step)
        return after.replace(extra=VQGANExtra(found.codebook, average, discriminator)), metrics

    return step
