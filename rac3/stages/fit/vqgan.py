"""Fit the VQGAN on the images of the training and memory documents."""

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
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, PyTree, UInt8

from rac3.documents.document import Document, prepare_image
from rac3.experiment import Experiment
from rac3.model.losses import Metrics
from rac3.stages.fit.encoder import FitTask, adam, fit_encoder, one_each
from rac3.training.state import TrainState, apply_gradients, create_state
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
    """What fitting carries beside the generator's parameters and optimizer; None for what is switched off."""

    codebook: CodebookState
    average: Params | None  # of the generator's parameters
    discriminator: TrainState | None  # whose `step` counts its own updates


def fit_vqgan(experiment: Experiment, documents: Sequence[Document], folder: Path) -> Params:
    """The fitted parameters, averaged if `ema_decay` says so; checkpoints of the run are below `folder` while it lasts.

    Raises:
      InputError: the weights of the perceptual loss can't be read.
    """
    state = fit_encoder(experiment, experiment.vqgan.fit, vqgan_task(experiment, documents), folder)
    params = state.params if state.extra.average is None else state.extra.average
    return jax.device_get(with_codebook(params, state.extra.codebook))


def vqgan_task(experiment: Experiment, documents: Sequence[Document]) -> FitTask:
    config = experiment.vqgan
    objective = config.objective
    perceptual = load_lpips(objective.perceptual.weights) if objective.perceptual.weights else None
    model, optimizer = VQGAN(config.model), adam(config.fit, config.fit.steps)
    adversary = open_adversary(config) if objective.adversarial.weight else None
    images = np.stack(
        [prepare_image(image.pixels(), config.model.resolution) for document in documents for image in document.images]
    )

    def init(key: Array) -> PyTree:
        return model.init(key, preprocess(images[:1]))["params"]

    def start(state: TrainState, mesh: Mesh) -> TrainState:
        rng = np.random.default_rng([experiment.seed, 1])
        some = preprocess(images[rng.integers(len(images), size=4 * config.fit.batch)])
        first = jax.jit(init_codebook_from_batch, static_argnums=0)
        codebook = first(model, state.params, some, jax.random.key(experiment.seed))
        codebook = jax.device_put(codebook, state.step.sharding)
        average = jax.tree.map(jnp.copy, state.params) if objective.ema_decay else None
        discriminator = None if adversary is None else adversary.create(experiment, mesh)
        return state.replace(extra=VQGANExtra(codebook, average, discriminator))

    def batch(rows: np.ndarray) -> PyTree:
        return images[rows]

    step = make_step(experiment, model, optimizer, adversary)
    return FitTask("fit VQGAN", init, optimizer, step, len(images), batch, start, perceptual)


@dataclass(frozen=True)
class Adversary:
    """What is fixed of the discriminator; its optimizer runs over the steps from `adversarial.start` on."""

    model: Discriminator
    optimizer: optax.GradientTransformation

    def create(self, experiment: Experiment, mesh: Mesh) -> TrainState:
        size = experiment.vqgan.model.resolution

        def init(key: Array) -> PyTree:
            return self.model.init(key, jnp.zeros((1, size, size, 3)))["params"]

        return create_state(init, self.optimizer, experiment.seed, experiment.mesh, mesh)

    def judge(self, params: Params, images: Images) -> Array:
        apply: Any = self.model.apply  # flax types its result by what is mutable
        return apply({"params": params}, images)

    def generator_loss(self, state: TrainState, active: Bool[Array, ""], fake: Images) -> Float[Array, ""]:
        """0 unless `active`."""
        return jax.lax.cond(active, lambda: generator_loss(self.judge(state.params, fake)), lambda: jnp.zeros(()))

    def update(
        self, state: TrainState, active: Bool[Array, ""], real: Images, fake: Images
    ) -> tuple[TrainState, Float[Array, ""]]:
        """One step of the discriminator, and its loss before that; unless `active`, the state as it is, and 0."""

        def loss(params: Params) -> Array:
            return discriminator_loss(self.judge(params, real), self.judge(params, fake))

        def learn() -> tuple[TrainState, Array]:
            value, gradients = jax.value_and_grad(loss)(state.params)
            return apply_gradients(state, gradients, self.optimizer), value

        return jax.lax.cond(active, learn, lambda: (state, jnp.zeros(())))


def open_adversary(config: FrozenVQGAN) -> Adversary:
    adversarial = config.objective.adversarial
    return Adversary(Discriminator(adversarial), adam(config.fit, config.fit.steps - adversarial.start))


def make_step(
    experiment: Experiment, model: VQGAN, optimizer: optax.GradientTransformation, adversary: Adversary | None
) -> Callable[[TrainState, UInt8[Array, "batch height width 3"], LPIPS | None], tuple[TrainState, Metrics]]:
    """One step of both players. Each answers to the other as it was before the step: the discriminator learns from the
    reconstructions that the generator's loss was computed on, so that there is no second forward pass."""
    objective = experiment.vqgan.objective

    def step(state: TrainState, pixels: Array, perceptual: LPIPS | None) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(experiment.seed), state.step)
        images, extra = preprocess(pixels), state.extra
        active = state.step >= objective.adversarial.start
        opposing = None if adversary is None else partial(adversary.generator_loss, extra.discriminator, active)
        found = vqgan_step(model, objective, state.params, extra.codebook, images, key, perceptual, opposing)
        metrics = one_each(found.metrics)
        discriminator = extra.discriminator
        if adversary is not None:
            discriminator, loss = adversary.update(discriminator, active, images, found.reconstruction)
            values = {"discriminator_loss": loss} | found.metrics
            for name in ("discriminator_loss", "generator_loss", "adaptive_weight"):
                metrics[name] = (jnp.where(active, values[name], 0.0), active.astype(jnp.float32))
        after = apply_gradients(state, found.gradients, optimizer)
        average = extra.average
        if average is not None:
            average = averaged(objective.ema_decay, average, after.params, state.step)
        return after.replace(extra=VQGANExtra(found.codebook, average, discriminator)), metrics

    return step
