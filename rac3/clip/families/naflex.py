"""NaFlex variants of SigLIP 2, as transformers' `Siglip2Model` is published: the files of `huggingface.py`, with
model_type `siglip2`.

NaFlex keeps the aspect ratio of an image and splits it into as many patches as fit into `max_num_patches`. A batch has
one shape here, so the model becomes a SigLIP of the largest square that fits, and of any other image the middle square
is kept. The vectors of square images are NaFlex's own.
"""

import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from rac3.clip.checkpoint import ClipCheckpoint
from rac3.clip.families import huggingface, siglip
from rac3.clip.family import Family, clip_checkpoint
from rac3.clip.images import ClipImages
from rac3.config import InputError
from rac3.tokens.text import load_siglip_tokenizer
from rac3.weights.port import Weights
from rac3.weights.settings import Settings, read_settings

PATCH_SIZE, NUM_PATCHES = 16, 256  # what the files leave out, as in transformers


def load(folder: Path) -> ClipCheckpoint:
    tokenizer, processor = load_siglip_tokenizer(folder), huggingface.processor_settings(folder)
    settings = read_settings(folder / "config.json")
    vision = settings.part("vision_config", {})
    sizes = {
        "patch_size": processor.get("patch_size", int, PATCH_SIZE),
        "max_num_patches": processor.get("max_num_patches", int, NUM_PATCHES),
        "num_patches": vision.get("num_patches", int, NUM_PATCHES),
    }
    if min(sizes.values()) < 1:
        raise InputError(
            f"clip checkpoint {str(folder)!r}: {sizes} must be at least 1 each; give the model's own files"
        )
    patch, side = sizes["patch_size"], math.isqrt(sizes["max_num_patches"])
    if (found := vision.get("patch_size", int, PATCH_SIZE)) != patch:
        raise InputError(
            f"{settings.file}: vision_config.patch_size={found} is not {patch}, the processor's in "
            f"{processor.file.name}; give the files of one model"
        )
    square = {**settings.values, "vision_config": {**vision.values, "image_size": side * patch}}
    config = siglip.read_config(siglip.with_padding(Settings(settings.file, square), tokenizer.pad))
    convert = partial(
        square_patches, patch_size=patch, num_patches=sizes["num_patches"], side=side, config=settings.file
    )
    images = read_images(processor)
    return clip_checkpoint(folder, config, tokenizer, images, huggingface.WEIGHTS, siglip.place, convert)


def read_images(settings: Settings) -> ClipImages:
    """As `huggingface.read_images`, for transformers' `Siglip2ImageProcessor` on square images."""
    return ClipImages(**huggingface.normalization(settings, siglip.MEAN, siglip.STD, PIL.Image.Resampling.BILINEAR))


def square_patches(weights: Weights, *, patch_size: int, num_patches: int, side: int, config: Path) -> Weights:
    """The weights as those of a `SiglipModel` whose images are `side` x `side` patches.

    The patch embedding is linear on flattened patches (row, column, channel) and becomes a convolution. The positions,
    a square grid of `num_patches`, are resized as `Siglip2VisionEmbeddings` does: bilinear, antialiased, in float32.

    Raises:
      InputError: `num_patches` is no square number, or not the number of positions; `config` is the file that has it.
    """
    weights = dict(weights)
    name = "vision_model.embeddings.patch_embedding.weight"
    flat = weights.get(name)
    if flat is not None and flat.ndim == 2 and flat.shape[1] % patch_size**2 == 0:
        weights[name] = flat.reshape(len(flat), patch_size, patch_size, -1).transpose(0, 3, 1, 2)
    name, grid = "vision_model.embeddings.position_embedding.weight", math.isqrt(num_patches)
    if grid**2 != num_patches or (name in weights and len(weights[name]) != num_patches):
        raise InputError(
            f"{config}: vision_config.num_patches={num_patches} is not a square number, or not the number of positions "
            "in the weights; give the weights and the config of one model"
        )
    if name in weights and side != grid:
        positions = jnp.asarray(weights[name], jnp.float32).reshape(grid, grid, -1)
        resized = jax.image.resize(positions, (side, side, positions.shape[-1]), "bilinear", antialias=True)
        weights[name] = np.asarray(resized).reshape(side * side, -1)
    return weights


FAMILY = Family(load, huggingface.SETTINGS, huggingface.WEIGHTS, "siglip2")
