"""What defines a family of published CLIPs and SigLIPs, and how the checkpoint of any family is put together."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rac3.clip.checkpoint import ClipCheckpoint, text_ids, towers
from rac3.clip.images import ClipImages
from rac3.clip.model import CLIPConfig
from rac3.clip.siglip import SiglipConfig
from rac3.config import InputError
from rac3.tokens.text import Tokenizer
from rac3.weights.checkpoint_files import first_file, read_json
from rac3.weights.port import Place, Weights, port
from rac3.weights.weights_file import read_weights

BUFFERS = r".*(position_ids|attn_mask)"  # in old files next to the weights; they follow from the config


@dataclass(frozen=True)
class Family:
    """A family of published CLIPs: how its folder is recognized, and how it is loaded.

    Attributes:
      load: the checkpoint in a folder.
      settings: the names of its files of settings, the model's config first. The tokenizer's are not among them.
      weights: the names that its file of weights may have; the first one that is there is read.
      model_type: in the model's config; None if it has none.
    """

    load: Callable[[Path], ClipCheckpoint]
    settings: tuple[str, ...]
    weights: tuple[str, ...]
    model_type: str | None = None

    def claims(self, folder: Path) -> bool:
        """Whether the folder has a config of this family.

        Raises:
          InputError: the config is damaged.
        """
        config = folder / self.settings[0]
        return config.is_file() and self.model_type in (None, read_json(config).get("model_type"))


def unchanged(weights: Weights) -> Weights:
    return weights


def clip_checkpoint(
    folder: Path,
    config: CLIPConfig | SiglipConfig,
    tokenizer: Tokenizer,
    images: ClipImages,
    names: tuple[str, ...],
    place: Callable[[str], Place],
    convert: Callable[[Weights], Weights] = unchanged,
) -> ClipCheckpoint:
    """A published checkpoint; its weights are read last, when everything else is known to fit.

    Args:
      names: `Family.weights`.
      place: the path of a parameter to its place among the weights.
      convert: applied to the weights before they are ported.

    Raises:
      InputError: there are no weights, or not those of the config; or the tokenizer is another model's.
    """
    file = first_file(folder, names)
    if file is None:
        raise InputError(f"clip checkpoint {str(folder)!r} has no weights; it needs one of {', '.join(names)}")
    text_ids(tokenizer, config)
    return ClipCheckpoint(config, clip_params(file, config, convert(read_weights(file)), place), tokenizer, images)


def clip_params(
    file: Path, config: CLIPConfig | SiglipConfig, weights: Weights, place: Callable[[str], Place]
) -> dict[str, Any]:
    """The parameters of the towers; `file` names the weights in messages."""
    text, vision = config.text_config, config.vision_config
    ids = jax.ShapeDtypeStruct((1, text.max_position_embeddings), jnp.int32)
    mask = jax.ShapeDtypeStruct(ids.shape, bool)
    pixels = jax.ShapeDtypeStruct((1, vision.image_size, vision.image_size, vision.num_channels), jnp.float32)
    params = jax.eval_shape(towers(config).init, jax.random.key(0), ids, mask, pixels)["params"]
    return port(params, weights, place, where=f"weights {str(file)!r}", ignored=BUFFERS)
