"""SigLIP, and SigLIP 2 of a fixed resolution, as transformers' `SiglipModel` is published: the files of
`huggingface.py`, with model_type `siglip`.
"""

import dataclasses
import re
from pathlib import Path

import PIL.Image

from rac3.clip.checkpoint import ClipCheckpoint
from rac3.clip.families import huggingface
from rac3.clip.family import Family, clip_checkpoint
from rac3.clip.images import ClipImages, require_preprocessing
from rac3.clip.siglip import SiglipConfig, SiglipTextConfig, SiglipVisionConfig
from rac3.config import InputError
from rac3.tokens.text import load_siglip_tokenizer
from rac3.weights.port import Place
from rac3.weights.settings import Settings, read_settings

MEAN = STD = (0.5, 0.5, 0.5)


def load(folder: Path) -> ClipCheckpoint:
    tokenizer = load_siglip_tokenizer(folder)
    config = read_config(with_padding(read_settings(folder / "config.json"), tokenizer.pad))
    images = read_images(huggingface.processor_settings(folder), config.vision_config.image_size)
    return clip_checkpoint(folder, config, tokenizer, images, huggingface.WEIGHTS, place)


def read_config(settings: Settings) -> SiglipConfig:
    """From `config.json`, with the defaults of transformers.

    Raises:
      InputError: a setting has the wrong type, or asks for another architecture.
    """
    if not settings.part("vision_config", {}).get("vision_use_head", bool, True):
        raise InputError(
            f"{settings.file}: vision_config.vision_use_head=False has no image vectors; give a checkpoint with the "
            "pooling head"
        )
    return SiglipConfig(
        huggingface.read_tower(SiglipTextConfig, settings, "text_config"),
        huggingface.read_tower(SiglipVisionConfig, settings, "vision_config"),
    )


def with_padding(settings: Settings, pad: int | None) -> Settings:
    """The padding id is the tokenizer's; config.json often has another, which transformers never reads."""
    text = {**settings.part("text_config", {}).values, "pad_token_id": pad}
    return dataclasses.replace(settings, values={**settings.values, "text_config": text})


def read_images(settings: Settings, size: int) -> ClipImages:
    """As `huggingface.read_images`, for transformers' `SiglipImageProcessor`, which does not crop."""
    edges = huggingface.given(settings, "size", 224)
    edges = {"height": edges, "width": edges} if isinstance(edges, int) else edges
    require_preprocessing(settings.file, {"size": edges}, {"size": {"height": size, "width": size}})
    fields = huggingface.normalization(settings, MEAN, STD, PIL.Image.Resampling.BICUBIC)
    return ClipImages(**fields, steps="stretch")


def place(path: str) -> Place:
    """The attention of the pooling head is torch's own module, which has q, k and v in one."""
    if fused := re.search(r"^vision_model/head/attention/([qkv])_proj/(kernel|bias)$", path):
        name = f"vision_model.head.attention.in_proj_{'weight' if fused[2] == 'kernel' else 'bias'}"
        return Place(name, transposed=fused[2] == "kernel", part="qkv".index(fused[1]))
    return huggingface.place(path)


FAMILY = Family(load, huggingface.SETTINGS, huggingface.WEIGHTS, "siglip")
