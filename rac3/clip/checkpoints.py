"""Published CLIPs and SigLIPs: a folder or a name on the Hugging Face hub, to what `MixedEncoder` runs.

    Hugging Face: config.json                     model.safetensors | pytorch_model.bin, whole or in shards
    OpenCLIP    : open_clip_config.json           open_clip_model.safetensors | open_clip_pytorch_model.*
    both        : the tokenizer's files; Hugging Face's also preprocessor_config.json or processor_config.json

A folder with both formats is read in the first. The family is `model_type` in config.json: `clip`; `siglip`, which also
the SigLIP 2 of a fixed resolution have; `siglip2`, the NaFlex variants of SigLIP 2. NaFlex keeps the aspect ratio of an
image and cuts it into as many patches as fit into `max_num_patches`. A batch has one shape here, so of an image that is
no square the middle square is kept; on squares the vectors are NaFlex's own.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jax.typing import DTypeLike

from rac3.clip.encoder import ClipText, MixedEncoder, SiglipText
from rac3.clip.images import ClipImages
from rac3.clip.model import CLIP, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from rac3.clip.siglip import SigLIP, SiglipConfig, SiglipTextConfig, SiglipVisionConfig
from rac3.clip.weights import clip_params, hugging_face, open_clip, read_weights, square_patches
from rac3.config import InputError
from rac3.tokens.text import SENTENCEPIECE, TextTokenizer, Tokenizer, load_clip_tokenizer, load_siglip_tokenizer
from rac3.weights.checkpoint_files import checkpoint_folder, read_json
from rac3.weights.params_file import load_params, save_params

HUGGING_FACE = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
OPEN_CLIP = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pt",
)
SETTINGS = (
    "config.json",
    "open_clip_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    SENTENCEPIECE,
)
SHARDS = {"model.safetensors": "model-*.safetensors", "pytorch_model.bin": "pytorch_model-*.bin"}

TOKENIZER = "tokenizer"  # the folder of an artifact's
FAMILIES = ("clip", "siglip", "siglip2")  # model_type in config.json

Config = TypeVar("Config", CLIPTextConfig, CLIPVisionConfig, SiglipTextConfig, SiglipVisionConfig)


@dataclass(frozen=True)
class ClipCheckpoint:
    """A CLIP or SigLIP, published or fitted here, with all that belongs to it; `params` are nested as its module has
    them."""

    config: CLIPConfig | SiglipConfig
    params: dict[str, Any]
    tokenizer: Tokenizer
    images: ClipImages

    def encoder(self, dtype: DTypeLike = "float32") -> MixedEncoder:
        """What embeds documents, with layers that compute in `dtype`."""
        config, images = self.config, self.images
        return MixedEncoder(
            CLIP(config, dtype) if isinstance(config, CLIPConfig) else SigLIP(config, dtype),
            self.params,
            _text(self.tokenizer, self.config),
            image_mean=images.mean,
            image_std=images.std,
            square=images.square,
        )

    def save(self, folder: Path) -> None:
        """Writes it in rac3's own form: with it, the published files are not needed any more."""
        family = "clip" if isinstance(self.config, CLIPConfig) else "siglip"
        config = {"model_type": family, **dataclasses.asdict(self.config)}
        self.tokenizer.save(folder / TOKENIZER)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (folder / "images.json").write_text(json.dumps(dataclasses.asdict(self.images), indent=2) + "\n")
        save_params(folder / "params.safetensors", self.params)

    @classmethod
    def open(cls, folder: Path) -> "ClipCheckpoint":
        """What `save` wrote.

        Raises:
          InputError: another version of rac3 wrote it.
        """
        settings = read_json(folder / "config.json")
        if settings.get("model_type") not in ("clip", "siglip"):
            raise InputError(f"{folder} was written by another version of rac3; delete it and run `rac3 encoders`")
        images, siglip = read_json(folder / "images.json"), settings["model_type"] == "siglip"
        return cls(
            config=(siglip_config if siglip else hugging_face_config)(settings, str(folder)),
            params=load_params(folder / "params.safetensors"),
            tokenizer=load_siglip_tokenizer(folder / TOKENIZER) if siglip else TextTokenizer().load(folder / TOKENIZER),
            images=ClipImages(**{**images, "mean": tuple(images["mean"]), "std": tuple(images["std"])}),
        )


def load_clip(source: str) -> ClipCheckpoint:
    """The published CLIP or SigLIP in the folder `source`, or of that name on the Hugging Face hub.

    Raises:
      InputError: it cannot be had, is of none of these formats, is damaged, or its parts do not fit together.
    """
    folder = checkpoint_folder("clip checkpoint", source)
    folder = _download(source) if folder is None else folder
    where = f"clip checkpoint {str(folder)!r}"
    settings = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    family = settings.get("model_type")
    has_open_clip = (folder / "open_clip_config.json").is_file()
    if family in FAMILIES and (_first(folder, HUGGING_FACE) or not has_open_clip):
        load = {"clip": _load_clip, "siglip": _load_siglip, "siglip2": _load_naflex}[family]
        return load(folder, settings, where)
    if has_open_clip:
        return _load_open_clip(folder, where)
    if settings:
        known = ", ".join(map(repr, FAMILIES))
        raise InputError(f"{where} has model_type={family!r} in config.json; give one with {known}")
    raise InputError(f"{where} has no config.json (or open_clip_config.json); give the folder of a whole checkpoint")


def _load_clip(folder: Path, settings: Mapping[str, Any], where: str) -> ClipCheckpoint:
    config = hugging_face_config(settings, where)
    images = ClipImages.of_hugging_face(_processor(folder), config.vision_config.image_size, where)
    tokenizer = load_clip_tokenizer(folder)
    _text(tokenizer, config)
    weights = read_weights(_weights(folder, HUGGING_FACE, where))
    return ClipCheckpoint(config, clip_params(CLIP(config), weights, hugging_face, where), tokenizer, images)


def _load_open_clip(folder: Path, where: str) -> ClipCheckpoint:
    settings = read_json(folder / "open_clip_config.json")
    model, preprocess = settings.get("model_cfg"), settings.get("preprocess_cfg") or {}
    if not isinstance(model, Mapping) or not isinstance(preprocess, Mapping):
        raise InputError(f"{where} has no model_cfg in open_clip_config.json; give the one of the model")
    config = open_clip_config(model, where)
    images = ClipImages.of_open_clip(preprocess, config.vision_config.image_size, where)
    tokenizer = load_clip_tokenizer(folder)
    _text(tokenizer, config)
    weights = read_weights(_weights(folder, OPEN_CLIP, where))
    return ClipCheckpoint(config, clip_params(CLIP(config), weights, open_clip, where), tokenizer, images)


def _load_siglip(folder: Path, settings: Mapping[str, Any], where: str) -> ClipCheckpoint:
    tokenizer = load_siglip_tokenizer(folder)
    config = siglip_config(_with_padding(settings, tokenizer), where)
    images = ClipImages.of_siglip(_processor(folder), config.vision_config.image_size, where)
    _text(tokenizer, config)
    weights = read_weights(_weights(folder, HUGGING_FACE, where))
    return ClipCheckpoint(config, clip_params(SigLIP(config), weights, hugging_face, where), tokenizer, images)


def _load_naflex(folder: Path, settings: Mapping[str, Any], where: str) -> ClipCheckpoint:
    """As a SigLIP whose images have the most patches that a square may have."""
    tokenizer, processor = load_siglip_tokenizer(folder), _processor(folder)
    vision = _part(settings, "vision_config")
    sizes = {"patch_size": 16, "max_num_patches": 256, "num_patches": 256}
    sizes |= {name: processor[name] for name in ("patch_size", "max_num_patches") if name in processor}
    sizes |= {"num_patches": vision["num_patches"]} if "num_patches" in vision else {}
    if not all(isinstance(size, int) and size > 0 for size in sizes.values()):
        raise InputError(f"{where}: patch_size, max_num_patches, num_patches are {sizes}; each must be at least 1")
    patch, side = sizes["patch_size"], math.isqrt(sizes["max_num_patches"])
    if vision.get("patch_size", 16) != patch:
        raise InputError(
            f"{where}: patch_size={vision.get('patch_size', 16)} in config.json is not {patch}, the processor's; give "
            "the files of the same model"
        )
    square = {**settings, "vision_config": {**vision, "image_size": side * patch}}
    config = siglip_config(_with_padding(square, tokenizer), where)
    _text(tokenizer, config)
    weights = read_weights(_weights(folder, HUGGING_FACE, where))
    weights = square_patches(weights, patch, sizes["num_patches"], side, where)
    params = clip_params(SigLIP(config), weights, hugging_face, where)
    return ClipCheckpoint(config, params, tokenizer, ClipImages.of_naflex(processor, where))


def checkpoint_identity(source: str) -> dict[str, Any]:
    """What an artifact that is made from a checkpoint depends on: its name; of a folder, also its files' sizes.

    The folder itself must be there whenever a stage asks whether it is current, but only `load_clip` reads from it.
    """
    folder = checkpoint_folder("clip checkpoint", source)
    if folder is None:
        return {"name": source}
    patterns = (*SETTINGS, *HUGGING_FACE, *OPEN_CLIP, *SHARDS.values())
    files = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    return {"folder": str(folder.resolve()), "files": {path.name: path.stat().st_size for path in files}}


def _text(tokenizer: Tokenizer, config: CLIPConfig | SiglipConfig) -> ClipText | SiglipText:
    if isinstance(config, SiglipConfig):
        return SiglipText(tokenizer, config.text_config)
    if config.text_config.eos_token_id == tokenizer.size + 1:  # past the tokenizer's ids: as fitted here
        return ClipText.fitted(tokenizer, config.text_config)
    if tokenizer.bos is None or tokenizer.eos is None:
        raise InputError(
            f"clip checkpoint: its tokenizer has bos={tokenizer.bos} and eos={tokenizer.eos}, but CLIP needs both; "
            "give the tokenizer files that belong to it"
        )
    return ClipText(tokenizer, config.text_config, tokenizer.bos, tokenizer.eos)


def _with_padding(settings: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """The padding id is the tokenizer's; config.json often has another, which `transformers` never reads."""
    return {**settings, "text_config": {**_part(settings, "text_config"), "pad_token_id": tokenizer.pad}}


def _part(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    values = settings.get(name)
    return values if isinstance(values, Mapping) else {}


def _weights(folder: Path, names: tuple[str, ...], where: str) -> Path:
    file = _first(folder, names)
    if file is None:
        raise InputError(f"{where} has no weights; it needs one of {', '.join(names)}")
    return file


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _processor(folder: Path) -> Mapping[str, Any]:
    """The settings of the image processor: inside the processor's file in new checkpoints, else in one of their own."""
    whole = folder / "processor_config.json"
    if whole.is_file() and isinstance(inner := read_json(whole).get("image_processor"), dict):
        return inner
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise InputError(f"clip checkpoint {str(folder)!r} has no preprocessor_config.json; download it from the model")
    return read_json(path)


def hugging_face_config(settings: Mapping[str, Any], where: str) -> CLIPConfig:
    """From `config.json`. What it leaves out has the defaults of `transformers`, as the fields of our configs do."""
    return CLIPConfig(
        _tower(CLIPTextConfig, settings, "text_config", where),
        _tower(CLIPVisionConfig, settings, "vision_config", where),
        **_known(CLIPConfig, settings, ("projection_dim", "logit_scale_init_value"), where),
    )


def siglip_config(settings: Mapping[str, Any], where: str) -> SiglipConfig:
    """The same for SigLIP.

    Raises:
      InputError: a setting is of the wrong type, or asks for another architecture.
    """
    vision = _part(settings, "vision_config")
    if vision.get("vision_use_head", True) is not True:
        raise InputError(
            f"{where}: vision_config: vision_use_head={vision['vision_use_head']!r} has no image vectors; give a "
            "checkpoint with the pooling head"
        )
    return SiglipConfig(
        _tower(SiglipTextConfig, settings, "text_config", where),
        _tower(SiglipVisionConfig, settings, "vision_config", where),
    )


def _tower(kind: type[Config], settings: Mapping[str, Any], name: str, where: str) -> Config:
    """Old files have `text_config_dict` beside `text_config`; where it is there, it alone counts."""
    values = _part(settings, name if settings.get(f"{name}_dict") is None else f"{name}_dict")
    return kind(**_known(kind, values, [field.name for field in dataclasses.fields(kind)], f"{where}: {name}"))


def _known(kind: Any, values: Mapping[str, Any], names: Any, where: str) -> dict[str, Any]:
    """Those of the values that the config `kind` has fields for, of the fields' types."""
    found = {}
    for name in (name for name in names if name in values):
        value, usual = values[name], kind.__dataclass_fields__[name].default
        if usual is None:  # of projection_size
            if value is None:
                continue
            usual = 768
        if isinstance(value, bool) or not isinstance(value, int | float if isinstance(usual, float) else type(usual)):
            raise InputError(f"{where}: {name}={value!r} is not like {usual!r}; correct it in the config file")
        found[name] = value
    return found


_OPEN_CLIP_PLAIN = {
    "pool_type": ("tok", "argmax"),
    "pos_embed_type": ("learnable",),
    "proj_type": ("linear",),
    "block_type": ("default",),
}
"""Settings of OpenCLIP that change the architecture, with the values that stand for the one of CLIP."""
_OPEN_CLIP_IDLE = (
    *("patch_dropout", "output_tokens", "pad_id", "eos_id", "attn_pooler_queries", "attn_pooler_heads"),
    *("timm_pool", "timm_proj", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type", "init_logit_scale"),
    *("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "timm_model_pretrained"),
)
"""Settings that act in training alone, or only beside others that are refused, or on the tokenizer."""


def open_clip_config(model: Mapping[str, Any], where: str) -> CLIPConfig:
    """From `model_cfg` of `open_clip_config.json`, with OpenCLIP's defaults. The text ends at the highest id."""
    where = f"{where}: model_cfg"
    act = "quick_gelu" if model.get("quick_gelu") else "gelu"
    sizes = _open_clip_part(model, {"embed_dim": 512, "quick_gelu": False, "vision_cfg": {}, "text_cfg": {}}, where)
    vision_sizes = {"layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224}
    text_sizes = {"layers": 12, "width": 512, "heads": 8, "mlp_ratio": 4.0, "context_length": 77, "vocab_size": 49408}
    vision = _open_clip_part(sizes["vision_cfg"], vision_sizes, f"{where}.vision_cfg")
    text = _open_clip_part(sizes["text_cfg"], text_sizes, f"{where}.text_cfg")
    if vision["head_width"] < 1 or vision["width"] % vision["head_width"]:
        raise InputError(
            f"{where}.vision_cfg: head_width={vision['head_width']} does not divide width={vision['width']}; "
            "OpenCLIP's is 64"
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


def _open_clip_part(values: Mapping[str, Any], sizes: dict[str, Any], where: str) -> dict[str, Any]:
    """`sizes` with those of the values that it names.

    Raises:
      InputError: a value is of another type than there, or a setting asks for another architecture.
    """
    for name, value in values.items():
        if name in sizes:
            usual = sizes[name]
            if not isinstance(value, int | float if isinstance(usual, float) else type(usual)):
                raise InputError(f"{where}.{name}={value!r} is not like {usual!r}: rac3 has OpenCLIP's plain ViTs only")
        elif value and name not in _OPEN_CLIP_IDLE and value not in _OPEN_CLIP_PLAIN.get(name, ()):
            raise InputError(f"{where}.{name}={value!r} is another architecture; rac3 has OpenCLIP's plain ViTs only")
    return {name: values.get(name, usual) for name, usual in sizes.items()}


def _download(name: str) -> Path:
    """The files of a checkpoint on the hub that `load_clip` reads, from the cache if they are there."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=[*SETTINGS, "*.index.json"]))
        settings = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        wanted = list(HUGGING_FACE) if settings.get("model_type") in FAMILIES else []
        for weights in [*wanted, *OPEN_CLIP]:  # one format only: each holds all of the weights
            if not weights.endswith(".index.json"):
                patterns = [weights, SHARDS.get(weights, weights)]
                snapshot_download(name, revision=folder.name, allow_patterns=patterns)
                if any(found for pattern in patterns for found in folder.glob(pattern)):
                    break
    except InputError:
        raise
    except Exception as error:  # of the hub's client and of the HTTP library below it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"clip checkpoint {name!r} cannot be fetched from the Hugging Face hub: {reason} "
            "(check the name and the network, or give a folder)"
        ) from error
    return folder
