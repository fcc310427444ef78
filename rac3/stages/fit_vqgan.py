"""Fit the VQGAN on the images of the training and memory documents."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, PyTree

from rac3.documents.document import Document, prepare_image
from rac3.experiment import Experiment
from rac3.stages.fitting import adam, fit_encoder, one_each
from rac3.tokens.vqgan import VQGAN, Params, preprocess
from rac3.tokens.vqgan_objective import init_codebook_from_batch, vqgan_loss, with_codebook
from rac3.training.state import TrainState, apply_gradients
from rac3.training.step import Metrics


def fit_vqgan(experiment: Experiment, documents: Sequence[Document], folder: Path) -> Params:
    """The fitted parameters; checkpoints of the run are below `folder` while it lasts."""
    config = experiment.vqgan
    model = VQGAN(config.model)
    images = np.stack(
        [prepare_image(image.pixels(), config.model.resolution) for document in documents for image in document.images]
    )
    optimizer = adam(config.fit)

    def init(key: Array) -> PyTree:
        return model.init(key, preprocess(images[:1]))["params"]

    def step(state: TrainState, pixels: Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(experiment.seed), state.step)
        (_, (codebook, values)), gradients = jax.value_and_grad(
            lambda params: vqgan_loss(model, config.objective, params, state.extra, preprocess(pixels), key),
            has_aux=True,
        )(state.params)
        return apply_gradients(state, gradients, optimizer, codebook), one_each(values)

    def start(state: TrainState) -> TrainState:
        rng = np.random.default_rng([experiment.seed, 1])
        some = preprocess(images[rng.integers(len(images), size=4 * config.fit.batch)])
        first = jax.jit(init_codebook_from_batch, static_argnums=0)
        codebook = first(model, state.params, some, jax.random.key(experiment.seed))
        return state.replace(extra=jax.device_put(codebook, state.step.sharding))

    def batch(rows: np.ndarray) -> PyTree:
        return images[rows]

    state = fit_encoder(experiment, "fit VQGAN", config.fit, init, start, optimizer, step, len(images), batch, folder)
    return jax.device_get(with_codebook(state.params, state.extra))
