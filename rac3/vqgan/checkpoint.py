"""A VQGAN with its parameters, published or fitted here, and the form in which rac3 saves it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.typing import DTypeLike

from rac3.config import canonical
from rac3.vqgan.codec import VQGANCodec
from rac3.vqgan.model import VQGAN, Params, VQGANConfig
from rac3.weights.params_file import load_params, save_params

PARAMS = "params.safetensors"
CONFIG = "config.json"


@dataclass(frozen=True)
class VQGANCheckpoint:
    """A VQGAN and its parameters.

    Attributes:
      params: nested as its module has them.
      family: for `summary`; the saved form does not keep it.
      skipped: the classes that a published file names besides its weights; no objects of them were made.
    """

    config: VQGANConfig
    params: Params
    family: str = "VQGAN"
    skipped: tuple[str, ...] = ()

    @property
    def decodes(self) -> bool:
        return "decoder" in self.params

    def summary(self) -> str:
        """The family, the sizes and what is missing, in one line."""
        config = self.config
        parts = [
            f"{self.family}, {config.n_embed} codes, {config.tokens_per_image} tokens per image of "
            f"{config.resolution} x {config.resolution}"
        ]
        if not self.decodes:
            parts.append("encoder only: it cannot decode")
        if self.skipped:
            parts.append(f"{len(self.skipped)} foreign classes skipped, such as {self.skipped[0]}")
        return "; ".join(parts)

    def codec(self, dtype: DTypeLike = "float32") -> VQGANCodec:
        """The image tokenizer, with convolutions that compute in `dtype`."""
        return VQGANCodec(VQGAN(self.config, dtype), self.params)

    def save(self, folder: Path) -> None:
        """Write it in rac3's own form: the published files are no longer needed."""
        save_params(folder / PARAMS, self.params)
        (folder / CONFIG).write_text(json.dumps(canonical(self.config), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def open(cls, folder: Path) -> "VQGANCheckpoint":
        """What `save` wrote."""
        saved: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        del saved["class"]
        sequences: dict[str, Any] = {name: tuple(value) for name, value in saved.items() if isinstance(value, list)}
        config = VQGANConfig(**saved | sequences | {"dropout": float(saved["dropout"])})
        return cls(config, load_params(folder / PARAMS))
