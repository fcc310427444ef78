"""OpenCLIP's CLIPs with plain ViTs: `open_clip_config.json` and `open_clip_model.safetensors`, or an older name of it.

transformer.resblocks.0.attn.in_proj_weight  [3 out, in], q, k and v in one
text_model/layers_0/self_attn/q_proj/kernel  [in, out]
"""

import re
from pathlib import Path
from typing import Any

from rac3.clip.checkpoint import ClipCheckpoint
from rac3.clip.families.huggingface import given
from rac3.clip.family import Family, clip_checkpoint
from rac3.clip.images import OPENAI_MEAN, OPENAI_STD, ClipImages, per_channel, require_preprocessing
from rac3.clip.model import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from rac3.config import InputError, quoted
from rac3.tokens.text import CLEANED, Clean, load_clip_tokenizer
from rac3.weights.port import Place
from rac3.weights.settings import Settings, read_settings

WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pt",
)
SETTINGS = ("open_clip_config.json",)

MODEL = {"embed_dim": 512, "quick_gelu": False, "vision_cfg": {}, "text_cfg": {}}
VISION = {"layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224}
TEXT = {"layers": 12, "width": 512, "heads": 8, "mlp_ratio": 4.0, "context_length": 77, "vocab_size": 49408}
"""The settings that are read, with OpenCLIP's defaults."""
PLAIN = {
    "pool_type": ("tok", "argmax"),
    "pos_embed_type": ("learnable",),
    "proj_type": ("linear",),
    "block_type": ("default",),
}
"""Settings that change the architecture, with the values that mean CLIP's."""
IDLE = (
    *("patch_dropout", "output_tokens", "pad_id", "eos_id", "attn_pooler_queries", "attn_pooler_heads"),
    *("timm_pool", "timm_proj", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type", "init_logit_scale"),
    *("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "timm_model_pretrained"),
)
"""Settings that act only in training, on the tokenizer, or together with others that are refused."""

NAMES = (
    (r"^text_model/layers_(\d+)/", r"transformer.resblocks.\1."),
    (r"^vision_model/layers_(\d+)/", r"visual.transformer.resblocks.\1."),
    (r"layer_norm(\d)/", r"ln_\1."),
    (r"mlp/fc1/", "mlp.c_fc."),
    (r"mlp/fc2/", "mlp.c_proj."),
    (r"self_attn/out_proj/", "attn.out_proj."),
    (r"^text_model/token_embedding/", "token_embedding."),
    (r"^text_model/position_embedding", "positional_embedding"),
    (r"^text_model/final_layer_norm/", "ln_final."),
    (r"^vision_model/class_embedding", "visual.class_embedding"),
    (r"^vision_model/position_embedding", "visual.positional_embedding"),
    (r"^vision_model/patch_embedding/", "visual.conv1."),
    (r"^vision_model/pre_layrnorm/", "visual.ln_pre."),
    (r"^vision_model/post_layernorm/", "visual.ln_post."),
    (r"self_attn/[qkv]_proj/kernel$", "attn.in_proj_weight"),
    (r"self_attn/[qkv]_proj/bias$", "attn.in_proj_bias"),
    (r"^text_projection/kernel$", "text_projection"),
    (r"^visual_projection/kernel$", "visual.proj"),
    (r"\.(kernel|scale|embedding)$", ".weight"),
)


def load(folder: Path) -> ClipCheckpoint:
    settings = read_settings(folder / "open_clip_config.json")
    config = read_config(settings.part("model_cfg"))
    images = read_images(settings.part("preprocess_cfg", {}), config.vision_config.image_size)
    tokenizer = load_clip_tokenizer(folder).cleaning(read_clean(settings.part("model_cfg").part("text_cfg", {})))
    return clip_checkpoint(folder, config, tokenizer, images, WEIGHTS, place)


def read_clean(text: Settings) -> Clean:
    """How OpenCLIP cleans texts: by its own tokenizer's default, or that of its wrapper of Hugging Face's."""
    usual = "whitespace" if text.values.get("hf_tokenizer_name") else "lower"
    clean = text.part("tokenizer_kwargs", {}).get("clean", str, usual)
    if clean not in CLEANED[2:]:
        raise InputError(f"{text.file}: clean={quoted(clean)} is unknown; use one of {', '.join(CLEANED[2:])}")
    return clean  # type: ignore[return-value]


def read_config(model: Settings) -> CLIPConfig:
    """From `model_cfg`, with OpenCLIP's defaults. The text ends at the highest id."""
    act = "quick_gelu" if model.values.get("quick_gelu") else "gelu"
    sizes = _read(model, MODEL)
    vision = _read(model.part("vision_cfg"), VISION)
    text = _read(model.part("text_cfg"), TEXT)
    if vision["head_width"] < 1 or vision["width"] % vision["head_width"]:
        raise InputError(
            f"{model.file}: {model.section}vision_cfg: head_width={vision['head_width']} does not divide "
            f"width={vision['width']}; OpenCLIP's is 64"
        )
    return CLIPConfig(
        CLIPTextConfig(
            vocab_size=text["vocab_size"],
            hidden_size=text["width"],
            intermediate_size=int(text["width"] * text["mlp_ratio"]),
            num_hidden_layers=text["layers"],
            num_attention_heads=text["heads"],
            max_position_embeddings=text["context_length"],
            hidden_act=act,
            eos_token_id=2,
        ),
        CLIPVisionConfig(
            hidden_size=vision["width"],
            intermediate_size=int(vision["width"] * vision["mlp_ratio"]),
            num_hidden_layers=vision["layers"],
            num_attention_heads=vision["width"] // vision["head_width"],
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            hidden_act=act,
        ),
        projection_dim=sizes["embed_dim"],
    )


def _read(settings: Settings, defaults: dict[str, Any]) -> dict[str, Any]:
    """The settings that `defaults` names.

    Raises:
      InputError: one has another type than its default, or a setting asks for another architecture.
    """
    for name, value in settings.values.items():
        where = f"{settings.file}: {settings.section}{name}={quoted(value)}"
        if name in defaults:
            usual = defaults[name]
            if not isinstance(value, int | float if isinstance(usual, float) else type(usual)):
                raise InputError(f"{where} is not like {usual!r}: rac3 has only OpenCLIP's plain ViTs")
        elif value and name not in IDLE and value not in PLAIN.get(name, ()):
            raise InputError(f"{where} is another architecture; rac3 has only OpenCLIP's plain ViTs")
    return {name: settings.values.get(name, usual) for name, usual in defaults.items()}


def read_images(settings: Settings, size: int) -> ClipImages:
    """From `preprocess_cfg`, with OpenCLIP's defaults.

    Args:
      size: the image size of the tower.

    Raises:
      InputError: it does not scale the shorter side to `size` and keep the middle square.
    """
    edge = given(settings, "size", size)
    asked = {
        "size": [edge, edge] if isinstance(edge, int) else list(edge)[-2:],
        "mode": given(settings, "mode", "RGB"),
        "resize_mode": given(settings, "resize_mode", "shortest"),
    }
    require_preprocessing(settings.file, asked, {"size": [size, size], "mode": "RGB", "resize_mode": "shortest"})
    resample = given(settings, "interpolation", "bicubic")
    return ClipImages(
        mean=per_channel(settings.file, "mean", given(settings, "mean", OPENAI_MEAN)),
        std=per_channel(settings.file, "std", given(settings, "std", OPENAI_STD)),
        resample="bicubic" if resample == "random" else resample,  # random only in training
        rounding="even",
    )


def place(path: str) -> Place:
    """The two projections are bare matrices [in, out]."""
    name = path
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    fused = re.search(r"([qkv])_proj/", path)
    transposed = path.endswith("kernel") and "projection" not in path
    return Place(name, transposed, part="qkv".index(fused[1]) if fused else None)


FAMILY = Family(load, SETTINGS, WEIGHTS)
