"""The frozen models: loaded, or fitted on the documents of `Data.fit_on`, then only read.

Fitted models may see what the memory holds, as a public CLIP has seen the web; they never see held-out documents.
"""

import json
import shutil
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, PyTree, UInt8

from rac3 import recipes
from rac3.artifacts.workdir import Workdir
from rac3.clip.checkpoints import ClipCheckpoint, load_clip
from rac3.clip.encoder import Encoder
from rac3.config import InputError, canonical
from rac3.devices.batches import DeviceBatches
from rac3.documents.document import Picture, pixels_of, prepare_image
from rac3.evaluation.reconstruction import codebook_use, psnr, ssim
from rac3.experiment import Experiment
from rac3.stages.fit.clip import fit_clip
from rac3.stages.fit.encoder import fitting_documents
from rac3.stages.fit.vqgan import fit_vqgan
from rac3.tokens.text import Tokenizer
from rac3.training.checkpoint import CHECKPOINTS
from rac3.vqgan.checkpoints import load_vqgan
from rac3.vqgan.model import VQGAN, VQGANConfig, preprocess, to_pixels
from rac3.weights.params_file import load_params, save_params

PARAMS = "params.safetensors"
CONFIG = "config.json"
PIXELS_AT_ONCE = 2**20  # per device: 16 pictures of 256 x 256, whose features take 0.5 GB in float32 at 128 channels


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
    limits = {
        "text": recipes.text_documents(experiment),
        "vqgan": experiment.vqgan.fit.max_documents,
        "clip": experiment.clip.fit.max_documents,
    }
    read = lru_cache(maxsize=1)(partial(fitting_documents, experiment))  # the limits are equal more often than not
    for recipe in missing:
        documents = read(limits[recipe.stage]) if checkpoints[recipe.stage] is None else []
        with workdir.write(recipe) as draft:
            if recipe.stage == "text":
                if experiment.text.checkpoint is None:
                    experiment.text.fit((document.text for document in documents if document.text), draft.folder)
                tokenizer = experiment.text.load(draft.folder)
                draft.counts["ids"] = tokenizer.size
                if experiment.text.checkpoint is not None:
                    print(f"text tokenizer {experiment.text.checkpoint}: {tokenizer.summary()}")
            elif recipe.stage == "vqgan" and experiment.vqgan.checkpoint is not None:
                _convert_vqgan(Path(experiment.vqgan.checkpoint), experiment.vqgan.resolution, draft.folder)
            elif recipe.stage == "vqgan":
                params = fit_vqgan(experiment, documents, draft.folder)
                _save_vqgan(draft.folder, experiment.vqgan.model, params)
            elif experiment.clip.checkpoint is not None:
                load_clip(experiment.clip.checkpoint).save(draft.folder)
            else:
                fit_clip(experiment, documents, draft.folder).save(draft.folder)
            shutil.rmtree(draft.folder / CHECKPOINTS, ignore_errors=True)  # of the fitting: no more needed


def open_text(experiment: Experiment, workdir: Workdir) -> Tokenizer:
    return experiment.text.load(workdir.require(recipes.text(experiment), "rac3 encoders").folder)


class ImageCodec:
    """A frozen VQGAN: pixels to codes and back, on all of this process's devices."""

    def __init__(self, model: VQGAN, params: PyTree) -> None:
        apply: Any = model.apply  # flax types its result by what is mutable
        self.config = model.config
        pixels = model.config.resolution**2
        self._batches = DeviceBatches(jax.local_device_count() * max(1, PIXELS_AT_ONCE // pixels))
        self._params = jax.device_put(params, self._batches.replicated)
        self._encode = jax.jit(lambda params, pixels: apply({"params": params}, preprocess(pixels), method="encode"))
        self._decode = jax.jit(lambda params, codes: to_pixels(apply({"params": params}, codes, method="decode")))

    @property
    def resolution(self) -> int:
        return self.config.resolution

    @property
    def tokens_per_image(self) -> int:
        return self.config.tokens_per_image

    @property
    def codes(self) -> int:
        return self.config.n_embed

    def encode(self, images: Sequence[Picture]) -> Int[np.ndarray, "images tokens"]:
        """Codes of images of any size: shorter side scaled, middle square kept; decoded by threads where they are not.

        Raises:
          ImageError: an image that cannot be decoded.
        """

        def prepare(rows: np.ndarray) -> np.ndarray:
            return np.stack(
                self._batches.each(lambda row: prepare_image(pixels_of(images[row]), self.resolution), rows)
            )

        parts = self._batches.run(np.arange(len(images)), prepare, lambda pixels: self._encode(self._params, pixels))
        return np.concatenate([np.zeros((0, self.tokens_per_image), np.int32), *parts])

    def decode(self, codes: Int[np.ndarray, "images tokens"]) -> UInt8[np.ndarray, "images height width 3"]:
        """The images of codes.

        Raises:
          InputError: the VQGAN was loaded from a checkpoint without a decoder.
        """
        if "decoder" not in self._params:
            raise InputError(
                "this VQGAN has no decoder, so that its codes can't become images; set vqgan.checkpoint to one that has"
            )
        parts = self._batches.run(
            np.arange(len(codes)), lambda rows: codes[rows], lambda codes: self._decode(self._params, codes)
        )
        return np.concatenate([np.zeros((0, self.resolution, self.resolution, 3), np.uint8), *parts])


def open_vqgan(experiment: Experiment, workdir: Workdir) -> ImageCodec:
    artifact = workdir.require(recipes.vqgan(experiment), "rac3 encoders")
    model = VQGAN(_saved_config(artifact.folder / CONFIG), experiment.vqgan.dtype)
    return ImageCodec(model, load_params(artifact.folder / PARAMS))


def open_clip(experiment: Experiment, workdir: Workdir) -> Encoder:
    artifact = workdir.require(recipes.clip(experiment), "rac3 encoders")
    return ClipCheckpoint.open(artifact.folder).encoder(experiment.clip.dtype)


def vqgan_metrics(codec: ImageCodec, images: Sequence[Picture]) -> dict[str, float]:
    """Means of PSNR (dB, at most 60) and SSIM over the images; the share and the perplexity of the codes in use."""
    truth = np.stack([prepare_image(pixels_of(image), codec.resolution) for image in images])
    codes = codec.encode(images)
    pictures = codec.decode(codes)
    use = codebook_use(codes, codec.codes)
    return {
        "psnr": float(np.minimum(psnr(truth, pictures), 60).mean()),
        "ssim": float(ssim(truth, pictures).mean()),
        "codebook_use": use.used,
        "codebook_perplexity": use.perplexity,
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
