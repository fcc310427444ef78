"""Fit a CLIP with linear towers on the captioned images of some documents."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from rac3.clip.checkpoint import TOKENIZER, ClipCheckpoint
from rac3.clip.contrastive import contrastive_loss
from rac3.clip.efficientnet import installed_weights, torch_place
from rac3.clip.encoder import ClipText
from rac3.clip.frozen import LinearCLIP
from rac3.clip.linear import IMAGES, Features, LinearTowers
from rac3.config import InputError
from rac3.devices.batches import DeviceBatches
from rac3.devices.mesh import DeviceMesh
from rac3.documents.document import Document, Picture, pixels_of
from rac3.model.losses import Metrics
from rac3.stages.fit.encoder import FitTask, adam, fit_encoder
from rac3.training.state import TrainState, apply_gradients, new_state, one_each
from rac3.weights.port import port
from rac3.weights.torch_file import read_state_dict

FEATURES_BATCH = 32  # pictures that EfficientNet reads at once
DRAWS = 2**16  # of a partner: far more than a subject has documents, so that each is as likely as the others


def fit_linear_clip(
    config: LinearCLIP, seed: int, mesh: DeviceMesh, documents: Sequence[Document], folder: Path
) -> ClipCheckpoint:
    """A linear CLIP, fitted on the documents with text and an image: their whole text, and their first image.

    Args:
      folder: keeps the checkpoints, from which a killed fit resumes. The features are then computed again.

    Raises:
      InputError: no document has both text and an image, or none names a subject where the config asks for one, or
        the package of EfficientNet's weights is not installed.
    """
    pairs = [document for document in documents if document.text and document.images]
    if not pairs:
        raise InputError("no training document has both text and an image; CLIP is fitted on such pairs")
    subjects = subject_numbers(pairs, config.subject_field)
    trunk = trunk_params(config.image_size)
    if config.tokenizer.checkpoint is None:
        config.tokenizer.fit((document.text for document in pairs), folder / TOKENIZER)
    tokenizer = config.tokenizer.load(folder / TOKENIZER)
    architecture = config.model(tokenizer.size)
    raw = features_of([document.images[0] for document in pairs], trunk, config.image_size)
    mean, deviation = raw.mean(0), np.maximum(raw.std(0), 1e-3)
    features = (raw - mean) / deviation
    texts = ClipText.fitted(tokenizer, architecture.text_config)([document.text for document in pairs])
    task = linear_clip_task(config, LinearTowers(architecture), seed, mesh, (*texts, features), subjects)
    state = fit_encoder(config.fit, task, seed, mesh, folder)
    fixed = {"trunk": trunk, "standard": {"mean": mean, "deviation": deviation}}
    return ClipCheckpoint(architecture, jax.device_get(state.params) | fixed, tokenizer, IMAGES)


def linear_clip_task(
    config: LinearCLIP,
    model: LinearTowers,
    seed: int,
    mesh: DeviceMesh,
    inputs: tuple[np.ndarray, np.ndarray, np.ndarray],
    subjects: Int[np.ndarray, " documents"],
) -> FitTask:
    """The fit; a row is a document, and which other one of its subject it meets.

    A step has the loss of CLIP between the texts and images of the documents and those of the others they meet, in
    both directions; and, with subjects, that between their texts, and that between their images. All count the same.
    No document of a subject is a negative of another.

    Args:
      inputs: ids, mask, and standardized features.
    """
    optimizer = adam(config.fit, config.fit.steps)

    def compare(params: PyTree, *inputs: Array) -> tuple[Array, Array, Array]:
        return cast(Any, model.apply({"params": params}, *inputs, method="compare"))

    def init(key: Array) -> PyTree:
        return model.init(key, *(jnp.asarray(each[:1]) for each in inputs), method="compare")["params"]

    def step(state: TrainState, batch: tuple[Any, Any, Array], _: None) -> tuple[TrainState, Metrics]:
        one, other, subject = batch
        same = subject[:, None] == subject

        def loss_of(params: PyTree) -> tuple[Array, dict[str, Array]]:
            (text, image, scale), (other_text, other_image, _) = (compare(params, *each) for each in (one, other))
            compared = [(text, other_image), (other_text, image)]
            if config.subject_field:
                compared += [(text, other_text), (image, other_image)]
            losses = [contrastive_loss(*each, scale, same) for each in compared]
            weights = (0.5, 0.5, 1.0, 1.0)[: len(losses)]
            loss = sum(weight * value for weight, (value, _) in zip(weights, losses, strict=True)) / sum(weights)
            return loss, {"loss": loss, "accuracy": losses[0][1]["accuracy"]}

        (_, values), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        values["gradient_norm"] = optax.tree.norm(gradients)
        return apply_gradients(state, gradients, optimizer), one_each(values)

    members = members_of(subjects)

    def batch(rows: Int[np.ndarray, " rows"]) -> PyTree:
        documents, others = partners(rows, subjects, members)
        one, other = (tuple(each[places] for each in inputs) for places in (documents, others))
        return one, other, subjects[documents]

    return FitTask("fit CLIP", new_state(init, optimizer, seed, mesh), step, len(subjects) * DRAWS, batch)


def subject_numbers(documents: Sequence[Document], field: str) -> Int[np.ndarray, " documents"]:
    """Numbers that are equal where documents show the same; a document that does not say what it shows has its own.

    Raises:
      InputError: none says it.
    """
    names = [str(document.metadata.get(field) or "").strip() if field else "" for document in documents]
    if field and not any(names):
        raise InputError(
            f"clip.subject_field={field!r} is in the metadata of none of the {len(documents)} documents; name another "
            "field, or '' for none"
        )
    keys = [("subject", name) if name else ("document", number) for number, name in enumerate(names)]
    known: dict[Any, int] = {}
    return np.array([known.setdefault(key, len(known)) for key in keys], np.int32)


def members_of(subjects: Int[np.ndarray, " documents"]) -> list[Int[np.ndarray, " members"]]:
    """The documents of each subject."""
    members = defaultdict(list)
    for document, subject in enumerate(subjects.tolist()):
        members[subject].append(document)
    return [np.array(members[subject]) for subject in range(len(members))]


def partners(
    rows: Int[np.ndarray, " rows"], subjects: Int[np.ndarray, " documents"], members: Sequence[np.ndarray]
) -> tuple[Int[np.ndarray, " rows"], Int[np.ndarray, " rows"]]:
    """The document of each row, and another of its subject: itself where it is alone. Row n < documents * `DRAWS`."""
    documents, draws = rows % len(subjects), rows // len(subjects)
    others = []
    for document, draw in zip(documents.tolist(), draws.tolist(), strict=True):
        own = members[subjects[document]]
        place = int(np.searchsorted(own, document))
        others.append(own[(place + 1 + draw % max(1, len(own) - 1)) % len(own)])
    return documents, np.array(others)


def trunk_params(image_size: int) -> dict[str, Any]:
    """EfficientNet-Lite0 up to its features, from the installed package."""
    file = installed_weights()
    pixels = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    ours = jax.eval_shape(Features().init, jax.random.key(0), pixels)["params"]
    ignored = r".*num_batches_tracked|_fc\..*"
    return port(ours, read_state_dict(file), torch_place, where=f"weights {str(file)!r}", ignored=ignored)


def features_of(
    images: Sequence[Picture], trunk: dict[str, Any], image_size: int
) -> Float[np.ndarray, "images channel"]:
    """The features of pictures, as `LinearTowers.encode_image` computes them."""
    batches = DeviceBatches(FEATURES_BATCH)
    placed = jax.device_put(trunk, batches.replicated)
    mean, deviation = np.array(IMAGES.mean, np.float32) * 255, np.array(IMAGES.std, np.float32) * 255

    @jax.jit
    def apply(params: PyTree, pixels: Array) -> Array:
        return Features().apply({"params": params}, (pixels - mean) / deviation)

    def prepare(rows: Int[np.ndarray, " batch"]) -> np.ndarray:
        return np.stack(batches.each(lambda row: IMAGES.square(pixels_of(images[row]), image_size), rows.tolist()))

    return np.concatenate([*batches.run(np.arange(len(images)), prepare, lambda pixels: apply(placed, pixels))])
