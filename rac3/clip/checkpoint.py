"""A CLIP or SigLIP with its tokenizer and preprocessing, published or fitted here, and the form in which rac3 saves it.

config.json  images.json  params.safetensors  tokenizer/
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jax.typing import DTypeLike

from rac3.clip.encoder import ClipText, MixedEncoder, SiglipText
from rac3.clip.images import ClipImages
from rac3.clip.linear import LinearConfig, LinearTowers
from rac3.clip.model import CLIP, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from rac3.clip.siglip import SigLIP, SiglipConfig, SiglipTextConfig, SiglipVisionConfig
from rac3.config import InputError
from rac3.tokens.text import TextTokenizer, Tokenizer, load_siglip_tokenizer
from rac3.weights.checkpoint_files import read_json
from rac3.weights.params_file import load_params, save_params

Config = CLIPConfig | SiglipConfig | LinearConfig
MODELS: dict[str, type] = {"clip": CLIPConfig, "siglip": SiglipConfig, "linear": LinearConfig}
CONFIG, IMAGES, PARAMS, TOKENIZER = "config.json", "images.json", "params.safetensors", "tokenizer"


@dataclass(frozen=True)
class ClipCheckpoint:
    """A CLIP or SigLIP with all that it needs to embed; `params` are nested as its module has them."""

    config: Config
    params: dict[str, Any]
    tokenizer: Tokenizer
    images: ClipImages

    def encoder(self, dtype: DTypeLike = "float32") -> MixedEncoder:
        """The encoder of documents, with layers that compute in `dtype`."""
        images = self.images
        return MixedEncoder(
            towers(self.config, dtype),
            self.params,
            text_ids(self.tokenizer, self.config),
            image_mean=images.mean,
            image_std=images.std,
            square=images.square,
        )

    def save(self, folder: Path) -> None:
        """Write it in rac3's own form: the published files are no longer needed."""
        model = next(name for name, kind in MODELS.items() if isinstance(self.config, kind))
        self.tokenizer.save(folder / TOKENIZER)
        (folder / CONFIG).write_text(
            json.dumps({"model_type": model, "clean": self.tokenizer.clean, **asdict(self.config)}, indent=2) + "\n",
            encoding="utf-8",
        )
        (folder / IMAGES).write_text(json.dumps(asdict(self.images), indent=2) + "\n", encoding="utf-8")
        save_params(folder / PARAMS, self.params)

    @classmethod
    def open(cls, folder: Path) -> "ClipCheckpoint":
        """What `save` wrote.

        Raises:
          InputError: another version of rac3 wrote it.
        """
        settings, images = read_json(folder / CONFIG), read_json(folder / IMAGES)
        model, clean = settings.pop("model_type", None), settings.pop("clean", None)
        if model not in MODELS:
            raise InputError(f"{folder} was written by another version of rac3; delete it and run `rac3 encoders`")
        text, vision = (settings.pop(name, {}) for name in ("text_config", "vision_config"))
        config: Config
        if model == "siglip":
            config = SiglipConfig(SiglipTextConfig(**text), SiglipVisionConfig(**vision))
            tokenizer = load_siglip_tokenizer(folder / TOKENIZER)
        else:
            parts = (CLIPTextConfig(**text), CLIPVisionConfig(**vision)) if model == "clip" else ()
            config = MODELS[model](*parts, **settings)
            tokenizer = TextTokenizer().load(folder / TOKENIZER).cleaning(clean or "")
        channels = {"mean": tuple(images["mean"]), "std": tuple(images["std"])}
        return cls(config, load_params(folder / PARAMS), tokenizer, ClipImages(**images | channels))


def towers(config: Config, dtype: DTypeLike = "float32") -> CLIP | SigLIP | LinearTowers:
    if isinstance(config, LinearConfig):
        return LinearTowers(config, dtype)
    return CLIP(config, dtype) if isinstance(config, CLIPConfig) else SigLIP(config, dtype)


def text_ids(tokenizer: Tokenizer, config: Config) -> ClipText | SiglipText:
    """Texts to the ids that the text tower reads.

    Raises:
      InputError: tokenizer and tower do not fit together.
    """
    if isinstance(config, SiglipConfig):
        return SiglipText(tokenizer, config.text_config)
    if config.text_config.eos_token_id == tokenizer.size + 1:  # past the tokenizer's ids: fitted here
        return ClipText.fitted(tokenizer, config.text_config)
    if tokenizer.bos is None or tokenizer.eos is None:
        raise InputError(
            f"clip checkpoint: its tokenizer has bos={tokenizer.bos} and eos={tokenizer.eos}, but CLIP needs both; "
            "give the tokenizer files that belong to it"
        )
    return ClipText(tokenizer, config.text_config, tokenizer.bos, tokenizer.eos)
