"""The frozen models: loaded, or fitted on the training and memory documents, then only read.

Fitted models may see what the memory holds, as a public CLIP has seen the web; they never see held-out documents.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, PyTree, UInt8

from rac3.artifacts import Workdir
from rac3.config import InputError, canonical
from rac3.documents.document import Document, Reject, prepare_image
from rac3.experiment import Experiment, FitConfig, Split
from rac3.progress import progress
from rac3.retrieval.clip import CLIP, CLIPConfig, contrastive_loss, crop_images, crop_texts
from rac3.retrieval.clip_checkpoints import ClipCheckpoint, load_clip
from rac3.retrieval.clip_images import OPENAI_MEAN, OPENAI_STD
from rac3.retrieval.encoder import ClipText, MixedEncoder
from rac3.sharding import MeshConfig, use_mesh
from rac3.stages import recipes
from rac3.tokens.params_file import load_params, save_params
from rac3.tokens.text import Tokenizer
from rac3.tokens.vqgan import VQGAN, VQGANConfig, preprocess, to_pixels
from rac3.tokens.vqgan_checkpoints import load_vqgan
from rac3.tokens.vqgan_objective import init_codebook_from_batch, vqgan_loss, with_codebook
from rac3.training.loop import TrainingConfig, fit
from rac3.training.optimizer import OptimizerConfig
from rac3.training.state import TrainState, apply_gradients, create_state
from rac3.training.step import Metrics

PARAMS = "params.safetensors"
CONFIG = "config.json"
TOKENIZER = "tokenizer"
ENCODE_BATCH = 64


def fitting_documents(experiment: Experiment, limit: int) -> list[Document]:
    """At most `limit` training and memory documents that pass the filter, evenly from all shards."""
    sources = experiment.data.sources()
    data_dir = Path(experiment.data_dir)
    splits: list[Split] = [split for split in sources if split in ("train", "memory")]
    shards = [(split, shard) for split in splits for shard in sources[split].shards(data_dir)]
    share = -(-limit // len(shards))
    documents: list[Document] = []
    for split, shard in progress(shards, "read documents to fit on", len(shards), "shards"):
        taken = 0
        for item in sources[split].read(data_dir, shard):
            if isinstance(item, Reject) or experiment.filter.reason(item.metadata):
                continue
            documents.append(item)
            taken += 1
            if taken == share:
                break
    if not documents:
        raise InputError("the training source gives no documents that pass the filter; check data_dir and filter")
    return documents[:limit]


def fit_encoders(experiment: Experiment, workdir: Workdir) -> None:
    """Makes what is missing of the text tokenizer, the VQGAN and CLIP; checkpoints first, since they fail quickly."""
    missing = [
        recipe
        for recipe in (recipes.text(experiment), recipes.vqgan(experiment), recipes.clip(experiment))
        if workdir.find(recipe) is None
    ]
    if not missing:
        return
    checkpoints = {stage: getattr(experiment, stage).checkpoint for stage in ("text", "vqgan", "clip")}
    missing.sort(key=lambda recipe: checkpoints[recipe.stage] is None)
    documents: list[Document] = []
    for recipe in missing:
        if not documents and checkpoints[recipe.stage] is None:
            limit = max(experiment.vqgan.fit.max_documents, experiment.clip.fit.max_documents)
            documents = fitting_documents(experiment, limit)
        with workdir.write(recipe) as draft:
            if recipe.stage == "text":
                if experiment.text.checkpoint is None:
                    experiment.text.fit((document.text for document in documents if document.text), draft.folder)
                draft.counts["ids"] = experiment.text.load(draft.folder).size
            elif recipe.stage == "vqgan" and experiment.vqgan.checkpoint is not None:
                _convert_vqgan(Path(experiment.vqgan.checkpoint), experiment.vqgan.resolution, draft.folder)
            elif recipe.stage == "vqgan":
                _fit_vqgan(experiment, documents[: experiment.vqgan.fit.max_documents], draft.folder)
            elif experiment.clip.checkpoint is not None:
                load_clip(experiment.clip.checkpoint).save(draft.folder)
            else:
                _fit_clip(experiment, documents[: experiment.clip.fit.max_documents], draft.folder)


def open_text(experiment: Experiment, workdir: Workdir) -> Tokenizer:
    return experiment.text.load(workdir.require(recipes.text(experiment), "rac3 encoders").folder)


@dataclass(frozen=True)
class ImageCodec:
    """A frozen VQGAN: pixels to codes and back, in batches of one shape."""

    model: VQGAN
    params: PyTree

    def __post_init__(self) -> None:
        apply: Any = self.model.apply  # flax types its result by what is mutable
        encode = jax.jit(lambda params, pixels: apply({"params": params}, preprocess(pixels), method="encode"))
        decode = jax.jit(lambda params, codes: to_pixels(apply({"params": params}, codes, method="decode")))
        object.__setattr__(self, "_encode", encode)
        object.__setattr__(self, "_decode", decode)

    @property
    def resolution(self) -> int:
        return self.model.config.resolution

    @property
    def tokens_per_image(self) -> int:
        return self.model.config.tokens_per_image

    @property
    def codes(self) -> int:
        return self.model.config.n_embed

    def encode(self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> Int[np.ndarray, "images tokens"]:
        """Codes of images of any size: shorter side scaled, middle square kept."""
        pixels = [prepare_image(image, self.resolution) for image in images]
        return _in_batches(lambda batch: self._encode(self.params, batch), pixels, (0, self.tokens_per_image))  # type: ignore[attr-defined]

    def decode(self, codes: Int[np.ndarray, "images tokens"]) -> UInt8[np.ndarray, "images height width 3"]:
        """The images of codes.

        Raises:
          InputError: the VQGAN was loaded from a checkpoint without a decoder.
        """
        if "decoder" not in self.params:
            raise InputError(
                "this VQGAN has no decoder, so that its codes can't become images; set vqgan.checkpoint to one that has"
            )
        empty = (0, self.resolution, self.resolution, 3)
        return _in_batches(lambda batch: self._decode(self.params, batch), list(codes), empty)  # type: ignore[attr-defined]


def _in_batches(apply: Callable[[np.ndarray], Array], rows: list[np.ndarray], empty: tuple[int, ...]) -> np.ndarray:
    """`apply` over rows in batches of `ENCODE_BATCH`, the last one padded, so that one shape compiles."""
    done = []
    for start in range(0, len(rows), ENCODE_BATCH):
        batch = np.stack(rows[start : start + ENCODE_BATCH])
        padding = ((0, ENCODE_BATCH - len(batch)),) + ((0, 0),) * (batch.ndim - 1)
        done.append(np.asarray(apply(np.pad(batch, padding, mode="edge")))[: len(batch)])
    return np.concatenate(done) if done else np.zeros(empty, np.int32)


def open_vqgan(experiment: Experiment, workdir: Workdir) -> ImageCodec:
    artifact = workdir.require(recipes.vqgan(experiment), "rac3 encoders")
    return ImageCodec(VQGAN(_saved_config(artifact.folder / CONFIG)), load_params(artifact.folder / PARAMS))


def open_clip(experiment: Experiment, workdir: Workdir) -> MixedEncoder:
    artifact = workdir.require(recipes.clip(experiment), "rac3 encoders")
    if experiment.clip.checkpoint is not None:
        return ClipCheckpoint.open(artifact.folder).encoder()
    tokenizer = experiment.clip.tokenizer.load(artifact.folder / TOKENIZER)
    config = clip_config(experiment, tokenizer)
    text = ClipText.fitted(tokenizer, config.text_config)
    return MixedEncoder(CLIP(config), load_params(artifact.folder / PARAMS), text)


def clip_config(experiment: Experiment, tokenizer: Tokenizer) -> CLIPConfig:
    """The CLIP of the experiment with the vocabulary of its tokenizer: its ids, then `<bos>` and `<eos>`."""
    text = replace(experiment.clip.model.text_config, vocab_size=tokenizer.size + 2, eos_token_id=tokenizer.size + 1)
    return replace(experiment.clip.model, text_config=text)


def vqgan_metrics(codec: ImageCodec, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> dict[str, float]:
    """PSNR (dB, mean over images) of reconstructions, and the share and perplexity of the codes that are used."""
    truth = np.stack([prepare_image(image, codec.resolution) for image in images])
    codes = codec.encode(images)
    error = (codec.decode(codes).astype(np.float64) - truth) ** 2
    per_image = 10 * np.log10(255**2 / np.maximum(error.mean((1, 2, 3)), 1e-2))
    share = np.bincount(codes.ravel(), minlength=codec.codes) / codes.size
    entropy = -np.sum(share[share > 0] * np.log(share[share > 0]))
    return {
        "psnr": float(per_image.mean()),
        "codebook_use": float((share > 0).mean()),
        "codebook_perplexity": float(np.exp(entropy)),
    }


def _save_vqgan(folder: Path, config: VQGANConfig, params: PyTree) -> None:
    save_params(folder / PARAMS, params)
    (folder / CONFIG).write_text(json.dumps(canonical(config), indent=2) + "\n")


def _saved_config(path: Path) -> VQGANConfig:
    """The architecture that an artifact holds, which for a checkpoint is not the experiment's."""
    saved: dict[str, Any] = json.loads(path.read_text())
    del saved["class"]
    sequences: dict[str, Any] = {name: tuple(value) for name, value in saved.items() if isinstance(value, list)}
    return VQGANConfig(**saved | sequences | {"dropout": float(saved["dropout"])})


def _convert_vqgan(checkpoint: Path, resolution: int | None, folder: Path) -> None:
    loaded = load_vqgan(checkpoint, resolution)
    _save_vqgan(folder, loaded.config, loaded.params)
    print(f"VQGAN {checkpoint}: {loaded.summary()}")


def _fit_vqgan(experiment: Experiment, documents: Sequence[Document], folder: Path) -> None:
    config = experiment.vqgan
    model = VQGAN(config.model)
    images = np.stack(
        [prepare_image(image.pixels(), config.model.resolution) for document in documents for image in document.images]
    )
    optimizer = _adam(config.fit)

    def init(key: Array) -> PyTree:
        return model.init(key, preprocess(images[:1]))["params"]

    def step(state: TrainState, pixels: Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(experiment.seed), state.step)
        (_, (codebook, values)), gradients = jax.value_and_grad(
            lambda params: vqgan_loss(model, config.objective, params, state.extra, preprocess(pixels), key),
            has_aux=True,
        )(state.params)
        return apply_gradients(state, gradients, optimizer, codebook), _each(values)

    def start(state: TrainState) -> TrainState:
        rng = np.random.default_rng([experiment.seed, 1])
        some = preprocess(images[rng.integers(len(images), size=4 * config.fit.batch)])
        first = jax.jit(init_codebook_from_batch, static_argnums=0)
        codebook = first(model, state.params, some, jax.random.key(experiment.seed))
        return state.replace(extra=jax.device_put(codebook, state.step.sharding))

    def batch(rows: np.ndarray) -> PyTree:
        return images[rows]

    state = _fit(experiment, "fit VQGAN", config.fit, init, start, optimizer, step, len(images), batch, folder)
    _save_vqgan(folder, config.model, jax.device_get(with_codebook(state.params, state.extra)))
    shutil.rmtree(folder / "checkpoints")


def _fit_clip(experiment: Experiment, documents: Sequence[Document], folder: Path) -> None:
    pairs = [document for document in documents if document.text and document.images]
    if not pairs:
        raise InputError("no training document has both text and an image; CLIP is fitted on such pairs")
    if experiment.clip.tokenizer.checkpoint is None:
        experiment.clip.tokenizer.fit((document.text for document in pairs), folder / TOKENIZER)
    tokenizer = experiment.clip.tokenizer.load(folder / TOKENIZER)
    config = clip_config(experiment, tokenizer)
    model = CLIP(config)
    apply: Any = model.apply  # flax types its result by what is mutable
    size = config.vision_config.image_size
    images = np.stack([prepare_image(document.images[0].pixels(), size) for document in pairs])
    ids, mask = ClipText.fitted(tokenizer, config.text_config)([document.text for document in pairs])
    mean, deviation = np.array(OPENAI_MEAN) * 255, np.array(OPENAI_STD) * 255
    optimizer = _adam(experiment.clip.fit)

    def pixels_of(raw: Array) -> Array:
        return (raw.astype(jnp.float32) - mean) / deviation

    def init(key: Array) -> PyTree:
        one = jax.tree.map(jnp.asarray, (ids[:1], mask[:1], images[:1]))
        return model.init(key, one[0], one[1], pixels_of(one[2]))["params"]

    def step(state: TrainState, batch: tuple[Array, Array, Array]) -> tuple[TrainState, Metrics]:
        ids, mask, pixels = batch
        text_key, image_key = jax.random.split(jax.random.fold_in(jax.random.key(experiment.seed), state.step))
        ids, mask = crop_texts(text_key, ids, mask, experiment.clip.text_crop)
        pixels = crop_images(image_key, pixels_of(pixels), experiment.clip.image_crop)

        def objective(params: PyTree) -> tuple[Array, dict[str, Array]]:
            text, image, scale = apply({"params": params}, ids, mask, pixels)
            same = jnp.all(ids[:, None] == ids[None], axis=-1)
            return contrastive_loss(text, image, scale, same, experiment.clip.max_logit_scale)

        (_, values), gradients = jax.value_and_grad(objective, has_aux=True)(state.params)
        return apply_gradients(state, gradients, optimizer), _each(values)

    def batch(rows: np.ndarray) -> PyTree:
        return ids[rows], mask[rows], images[rows]

    state = _fit(experiment, "fit CLIP", experiment.clip.fit, init, None, optimizer, step, len(pairs), batch, folder)
    save_params(folder / PARAMS, jax.device_get(state.params))
    (folder / CONFIG).write_text(json.dumps(canonical(config), indent=2) + "\n")
    shutil.rmtree(folder / "checkpoints")


def _adam(config: FitConfig) -> optax.GradientTransformation:
    return OptimizerConfig(config.peak_lr, warmup_steps=500, b2=0.98, weight_decay=0.01).build(config.steps)


def _each(values: dict[str, Array]) -> Metrics:
    return {name: (value, jnp.ones(())) for name, value in values.items()}


def _fit(
    experiment: Experiment,
    label: str,
    config: FitConfig,
    init: Callable[[Array], PyTree],
    start: Callable[[TrainState], TrainState] | None,
    optimizer: optax.GradientTransformation,
    step: Callable[[TrainState, Any], tuple[TrainState, Metrics]],
    items: int,
    batch: Callable[[np.ndarray], PyTree],
    folder: Path,
) -> TrainState:
    """Data-parallel fitting with the training loop; the rows of a step are a function of (seed, step)."""
    mesh_config = MeshConfig()
    size = -(-config.batch // jax.device_count()) * jax.device_count()

    def stream(position: Sequence[int]) -> Iterator[tuple[PyTree, Sequence[int]]]:
        number = position[0]
        while True:
            rows = np.random.default_rng([experiment.seed, number]).integers(items, size=size)
            number += 1
            yield batch(rows), [number]

    mesh = mesh_config.build()
    with use_mesh(mesh_config, mesh):
        state = create_state(init, optimizer, experiment.seed, mesh_config, mesh)
        if start is not None:
            state = start(state)
    training = TrainingConfig(steps=config.steps, checkpoint_every=max(50, config.steps // 5), log_every=20, keep=1)
    step_fn = jax.jit(step, donate_argnums=0)
    return fit(label, training, state, step_fn, stream, [0], folder, mesh_config, mesh)
