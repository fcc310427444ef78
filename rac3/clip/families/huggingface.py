"""CLIP as transformers' `CLIPModel` is published: config.json with model_type `clip`, the image processor's settings,
and the weights, whole or in shards. SigLIP has the same files.

    text_model.encoder.layers.0.self_attn.q_proj.weight  [out, in]
    text_model/layers_0/self_attn/q_proj/kernel          [in, out]
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import PIL.Image

from rac3.clip.checkpoint import ClipCheckpoint
from rac3.clip.family import Family, clip_checkpoint
from rac3.clip.images import OPENAI_MEAN, OPENAI_STD, ClipImages, per_channel, require_preprocessing
from rac3.clip.model import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from rac3.clip.siglip import SiglipTextConfig, SiglipVisionConfig
from rac3.config import InputError, quoted
from rac3.tokens.text import load_clip_tokenizer
from rac3.weights.port import Place
from rac3.weights.settings import Settings, read_settings

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
PROCESSOR, OLD_PROCESSOR = "processor_config.json", "preprocessor_config.json"
SETTINGS = ("config.json", PROCESSOR, OLD_PROCESSOR)

Tower = TypeVar("Tower", CLIPTextConfig, CLIPVisionConfig, SiglipTextConfig, SiglipVisionConfig)


def load(folder: Path) -> ClipCheckpoint:
    config = read_config(read_settings(folder / "config.json"))
    images = read_images(processor_settings(folder), config.vision_config.image_size)
    return clip_checkpoint(folder, config, load_clip_tokenizer(folder), images, WEIGHTS, place)


def read_config(settings: Settings) -> CLIPConfig:
    """From `config.json`. What it leaves out has the defaults of transformers, as the fields of our configs do."""
    return CLIPConfig(
        read_tower(CLIPTextConfig, settings, "text_config"),
        read_tower(CLIPVisionConfig, settings, "vision_config"),
        settings.get("projection_dim", int, CLIPConfig.projection_dim),
        settings.get("logit_scale_init_value", float, CLIPConfig.logit_scale_init_value),
    )


def read_tower(kind: type[Tower], settings: Settings, name: str) -> Tower:
    """The config of a tower. Old files have `text_config_dict` next to `text_config`, and then it alone counts.

    Raises:
      InputError: a setting has another type than the field of our config.
    """
    old = f"{name}_dict"
    name = name if settings.values.get(old) is None else old
    values = settings.part(name, {})
    found: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if values.values.get(field.name) is not None:
            found[field.name] = values.get(field.name, int if field.default is None else type(field.default))
    return kind(**found)


def processor_settings(folder: Path) -> Settings:
    """The settings of the image processor: a section of the processor's file in new checkpoints, else a file.

    Raises:
      InputError: there are none.
    """
    if (folder / PROCESSOR).is_file():
        settings = read_settings(folder / PROCESSOR)
        if isinstance(settings.values.get("image_processor"), dict):
            return settings.part("image_processor")
    if not (folder / OLD_PROCESSOR).is_file():
        raise InputError(f"clip checkpoint {str(folder)!r} has no {OLD_PROCESSOR}; download it from the model")
    return read_settings(folder / OLD_PROCESSOR)


def read_images(settings: Settings, size: int) -> ClipImages:
    """From the image processor's settings, with the defaults of transformers' `CLIPImageProcessor`.

    Args:
      size: the image size of the tower.

    Raises:
      InputError: it does not scale, keep the middle square and normalize for a tower of `size`.
    """
    edge, crop = given(settings, "size", 224), given(settings, "crop_size", 224)
    edge = edge.get("shortest_edge", edge) if isinstance(edge, Mapping) else edge
    crop = list(crop.values()) if isinstance(crop, Mapping) else [crop, crop]
    asked = {"size": edge, "crop_size": crop, "do_center_crop": given(settings, "do_center_crop", True)}
    wanted = {"size": size, "crop_size": [size, size], "do_center_crop": True}
    require_preprocessing(settings.file, asked, wanted)
    return ClipImages(**normalization(settings, OPENAI_MEAN, OPENAI_STD, PIL.Image.Resampling.BICUBIC))


def given(settings: Settings, name: str, default: Any) -> Any:
    """A setting of any type; one that is None counts as absent."""
    value = settings.values.get(name)
    return default if value is None else value


def normalization(
    settings: Settings, mean: tuple[float, ...], std: tuple[float, ...], resample: PIL.Image.Resampling
) -> dict[str, Any]:
    """The fields of `ClipImages` that all image processors of transformers set, with the given defaults."""
    steps = ("do_resize", "do_rescale", "do_normalize")
    factor = given(settings, "rescale_factor", 1 / 255)
    asked = {"rescale_factor": round(factor, 6) if isinstance(factor, int | float) else factor}
    asked |= {name: given(settings, name, True) for name in steps}
    require_preprocessing(settings.file, asked, {"rescale_factor": round(1 / 255, 6), **dict.fromkeys(steps, True)})
    number = given(settings, "resample", resample)
    try:
        name = PIL.Image.Resampling(number).name.lower()
    except ValueError:
        raise InputError(f"{settings.file}: resample={quoted(number)} is no filter of Pillow; 3 is bicubic") from None
    return {
        "mean": per_channel(settings.file, "image_mean", given(settings, "image_mean", mean)),
        "std": per_channel(settings.file, "image_std", given(settings, "image_std", std)),
        "resample": name,
    }


def place(path: str) -> Place:
    name = re.sub(r"layers_(\d+)", r"encoder.layers.\1", path.replace("/", "."))
    name = re.sub(r"(token_embedding|position_embedding|patch_embedding|class_embedding)", r"embeddings.\1", name)
    name = re.sub(r"\.(kernel|scale|embedding)$", ".weight", name)
    name = f"{name}.weight" if name.endswith("position_embedding") else name
    return Place(name, transposed=path.endswith("kernel"))


FAMILY = Family(load, SETTINGS, WEIGHTS, "clip")
