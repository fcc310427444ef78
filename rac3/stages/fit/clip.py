"""Fit CLIP on the captioned images of some documents."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from rac3.clip.checkpoint import TOKENIZER, ClipCheckpoint
from rac3.clip.contrastive import contrastive_loss, crop_images, crop_texts
from rac3.clip.encoder import ClipText
from rac3.clip.frozen import FrozenCLIP
from rac3.clip.images import ClipImages
from rac3.clip.model import CLIP, CLIPConfig
from rac3.config import InputError
from rac3.devices.mesh import DeviceMesh
from rac3.documents.document import Document
from rac3.model.losses import Metrics
from rac3.stages.fit.encoder import FitTask, adam, fit_encoder
from rac3.tokens.text import Tokenizer
from rac3.training.state import TrainState, apply_gradients, new_state, one_each

IMAGES = ClipImages(steps="crop, scale")


def fit_clip(
    config: FrozenCLIP, seed: int, mesh: DeviceMesh, documents: Sequence[Document], folder: Path
) -> ClipCheckpoint:
    """A CLIP that is fitted on the documents with text and an image: their whole text, and their first image.

    Args:
      folder: keeps the checkpoints, from which a killed fit resumes.

    Raises:
      InputError: no document has both text and an image.
    """
    pairs = [document for document in documents if document.text and document.images]
    if not pairs:
        raise InputError("no training document has both text and an image; CLIP is fitted on such pairs")
    if config.tokenizer.checkpoint is None:
        config.tokenizer.fit((document.text for document in pairs), folder / TOKENIZER)
    tokenizer = config.tokenizer.load(folder / TOKENIZER)
    architecture = clip_config(config, tokenizer)
    model = CLIP(architecture)
    apply: Any = model.apply  # flax types its result by what is mutable
    size = architecture.vision_config.image_size
    images = np.stack([IMAGES.square(document.images[0].pixels(), size) for document in pairs])
    ids, mask = ClipText.fitted(tokenizer, architecture.text_config)([document.text for document in pairs])
    mean, deviation = np.array(IMAGES.mean) * 255, np.array(IMAGES.std) * 255
    optimizer = adam(config.fit, config.fit.steps)

    def pixels_of(raw: Array) -> Array:
        return (raw.astype(jnp.float32) - mean) / deviation

    def init(key: Array) -> PyTree:
        one = jax.tree.map(jnp.asarray, (ids[:1], mask[:1], images[:1]))
        return model.init(key, one[0], one[1], pixels_of(one[2]))["params"]

    def step(state: TrainState, batch: tuple[Array, Array, Array], _: None) -> tuple[TrainState, Metrics]:
        ids, mask, pixels = batch
        text_key, image_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
        ids, mask = crop_texts(text_key, ids, mask, config.text_crop)
        pixels = crop_images(image_key, pixels_of(pixels), config.image_crop)

        def loss_of(params: PyTree) -> tuple[Array, dict[str, Array]]:
            text, image, scale = apply({"params": params}, ids, mask, pixels)
            same = jnp.all(ids[:, None] == ids[None], axis=-1)
            return contrastive_loss(text, image, scale, same, config.max_logit_scale)

        (_, values), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        values["gradient_norm"] = optax.tree.norm(gradients)
        return apply_gradients(state, gradients, optimizer), one_each(values)

    def batch(rows: np.ndarray) -> PyTree:
        return ids[rows], mask[rows], images[rows]

    task = FitTask("fit CLIP", new_state(init, optimizer, seed, mesh), step, len(pairs), batch)
    state = fit_encoder(config.fit, task, seed, mesh, folder)
    return ClipCheckpoint(architecture, jax.device_get(state.params), tokenizer, IMAGES)


def clip_config(config: FrozenCLIP, tokenizer: Tokenizer) -> CLIPConfig:
    """The CLIP of the config, with the vocabulary of its tokenizer: its ids, then `<bos>` and `<eos>`."""
    text = replace(config.model.text_config, vocab_size=tokenizer.size + 2, eos_token_id=tokenizer.size + 1)
    return replace(config.model, text_config=text)
