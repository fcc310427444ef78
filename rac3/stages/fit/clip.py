"""Fit CLIP on the captioned images of some documents."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from rac3.clip.checkpoint import TOKENIZER, ClipCheckpoint, towers
from rac3.clip.contrastive import contrastive_loss, crop_images, crop_texts, subject_loss
from rac3.clip.encoder import ClipText
from rac3.clip.frozen import FrozenCLIP
from rac3.clip.images import ClipImages
from rac3.clip.linear import IMAGES as LINEAR_IMAGES
from rac3.clip.linear import LinearConfig
from rac3.clip.model import CLIPConfig
from rac3.config import InputError
from rac3.devices.mesh import DeviceMesh
from rac3.documents.document import Document, Image
from rac3.model.losses import Metrics
from rac3.stages.fit.encoder import FitTask, adam, fit_encoder
from rac3.stages.fit.features import features_of, trunk_params
from rac3.stages.fit.subjects import Subjects
from rac3.tokens.text import Tokenizer
from rac3.training.state import TrainState, apply_gradients, new_state, one_each

IMAGES = ClipImages(steps="crop, scale")  # for Transformers
SMALLEST_DEVIATION = 1e-3  # by which features are divided


def fit_clip(
    config: FrozenCLIP, seed: int, mesh: DeviceMesh, documents: Sequence[Document], folder: Path
) -> ClipCheckpoint:
    """A CLIP that is fitted on the documents with text and an image: their whole text, and their first image.

    With `subject_field`, a row is a document and another of its subject, with `subject_loss`.

    Args:
      folder: keeps the checkpoints, from which a killed fit resumes.

    Raises:
      InputError: no document has both text and an image, or none has the field that names subjects, or the weights of
        EfficientNet are missing.
    """
    pairs = [document for document in documents if document.text and document.images]
    if not pairs:
        raise InputError("no training document has both text and an image; CLIP is fitted on such pairs")
    subjects = Subjects.of(pairs, config.subject_field) if config.subject_field else None
    images, model = [document.images[0] for document in pairs], config.model
    if isinstance(model, LinearConfig):
        seen = linear_look(model, images)
    else:
        seen = transformer_look(model, images, config.image_crop)
    if config.tokenizer.checkpoint is None:
        config.tokenizer.fit((document.text for document in pairs), folder / TOKENIZER)
    tokenizer = config.tokenizer.load(folder / TOKENIZER)
    architecture = clip_config(config, tokenizer)
    apply: Any = towers(architecture).apply  # flax types its result by what is mutable
    ids, mask = ClipText.fitted(tokenizer, architecture.text_config)([document.text for document in pairs])
    optimizer = adam(config.fit, config.fit.steps)

    def init(key: Array) -> PyTree:
        one = jax.tree.map(jnp.asarray, (ids[:1], mask[:1], seen.images[:1]))
        return towers(architecture).init(key, one[0], one[1], seen.view(None, one[2]), method=seen.method)["params"]

    def step(state: TrainState, batch: tuple[Array, ...], _: None) -> tuple[TrainState, Metrics]:
        text_key, image_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))

        def views(rows: Sequence[Array], text_key: Array, image_key: Array) -> tuple[Array, ...]:
            ids, mask, images = rows
            return *crop_texts(text_key, ids, mask, config.text_crop), seen.view(image_key, images)

        one, other = views(batch[:3], text_key, image_key), None
        if subjects is not None:
            other = views(batch[3:6], jax.random.fold_in(text_key, 1), jax.random.fold_in(image_key, 1))

        def loss_of(params: PyTree) -> tuple[Array, dict[str, Array]]:
            text, image, scale = apply({"params": params}, *one, method=seen.method)
            if other is None:
                same = jnp.all(one[0][:, None] == one[0][None], axis=-1)
                return contrastive_loss(text, image, scale, same, config.max_logit_scale)
            other_text, other_image, _ = apply({"params": params}, *other, method=seen.method)
            return subject_loss(text, image, other_text, other_image, scale, batch[6], config.max_logit_scale)

        (_, values), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        values["gradient_norm"] = optax.tree.norm(gradients)
        return apply_gradients(state, gradients, optimizer), one_each(values)

    def batch(rows: np.ndarray) -> PyTree:
        if subjects is None:
            return ids[rows], mask[rows], seen.images[rows]
        one, other = subjects.pairs(rows)
        both = (each[places] for places in (one, other) for each in (ids, mask, seen.images))
        return *both, subjects.numbers[one]

    items = len(pairs) if subjects is None else subjects.rows
    task = FitTask("fit CLIP", new_state(init, optimizer, seed, mesh), step, items, batch)
    state = fit_encoder(config.fit, task, seed, mesh, folder)
    return ClipCheckpoint(architecture, jax.device_get(state.params) | seen.fixed, tokenizer, seen.preprocessing)


@dataclass(frozen=True)
class Look:
    """The images of a fit as its steps see them.

    Attributes:
      images: what `view` starts from, a row each.
      view: (key, rows) -> what the image tower takes, by another augmentation for each key; None for no augmentation.
      method: of the towers: (ids, mask, what `view` gives) -> text vectors, image vectors, logit scale.
      preprocessing: of images for the fitted towers.
      fixed: parameters of the towers that are not fitted.
    """

    images: np.ndarray
    view: Callable[[Array | None, Array], Array]
    method: str
    preprocessing: ClipImages
    fixed: dict[str, Any] = field(default_factory=dict)


def transformer_look(model: CLIPConfig, images: Sequence[Image], smallest_crop: float) -> Look:
    """Pixels, cropped in each step."""
    size = model.vision_config.image_size
    mean, deviation = np.array(IMAGES.mean) * 255, np.array(IMAGES.std) * 255

    def view(key: Array | None, raw: Array) -> Array:
        pixels = (raw.astype(jnp.float32) - mean) / deviation
        return pixels if key is None else crop_images(key, pixels, smallest_crop)

    squares = np.stack([IMAGES.square(image.pixels(), size) for image in images])
    return Look(squares, view, "__call__", IMAGES)


def linear_look(model: LinearConfig, images: Sequence[Image]) -> Look:
    """Features, computed once, less their mean, over their deviation."""
    trunk = trunk_params(model.image_size)
    raw = features_of(images, trunk, model.image_size)
    mean, deviation = raw.mean(0), np.maximum(raw.std(0), SMALLEST_DEVIATION)
    fixed = {"trunk": trunk, "standard": {"mean": mean, "deviation": deviation}}
    return Look((raw - mean) / deviation, lambda key, raw: raw, "compare", LINEAR_IMAGES, fixed)


def clip_config(config: FrozenCLIP, tokenizer: Tokenizer) -> CLIPConfig | LinearConfig:
    """The CLIP of the config, with the vocabulary of its tokenizer: its ids, then `<bos>` and `<eos>`."""
    if isinstance(config.model, LinearConfig):
        return replace(config.model, vocab_size=tokenizer.size + 2)
    text = replace(config.model.text_config, vocab_size=tokenizer.size + 2, eos_token_id=tokenizer.size + 1)
    return replace(config.model, text_config=text)
