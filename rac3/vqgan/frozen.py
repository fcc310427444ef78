"""The frozen VQGAN of an experiment: which it is, and the artifact that holds it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from rac3.config import InputError, canonical
from rac3.vqgan.codec import VQGANCodec
from rac3.vqgan.model import VQGAN, VQGANConfig
from rac3.vqgan.objective import VQGANObjective
from rac3.vqgan.perceptual import MIN_RESOLUTION
from rac3.weights.fitting import ComputeDtype, FitConfig
from rac3.weights.params_file import load_params, save_params

PARAMS = "params.safetensors"
CONFIG = "config.json"


@dataclass(frozen=True)
class FrozenVQGAN:
    """The VQGAN, fitted here, or loaded from a published checkpoint.

    Attributes:
      checkpoint: its file or folder (`rac3/vqgan/checkpoints.py` lists the formats). The architecture is the
        checkpoint's: `model`, `objective` and `fit` are not used.
      resolution: pixels of the pictures that a checkpoint is used at, in height and width; None is what its config
        says, and 256 for LlamaGen's, which have none.
      dtype: of the convolutions when pictures are encoded and decoded; codes are found in float32 always. bfloat16
        changes a few percent of the codes.
    """

    checkpoint: str | None = None
    resolution: int | None = None
    dtype: ComputeDtype = "float32"
    model: VQGANConfig = field(default_factory=VQGANConfig)
    objective: VQGANObjective = field(default_factory=VQGANObjective)
    fit: FitConfig = field(default_factory=FitConfig)

    def __post_init__(self) -> None:
        if self.checkpoint is None and self.resolution is not None:
            raise InputError(
                f"vqgan.resolution={self.resolution} is for a checkpoint, and vqgan.checkpoint is not set; "
                "set vqgan.model.resolution for a VQGAN that is fitted here"
            )
        if self.checkpoint is None and self.model.quantizer != "nearest":
            raise InputError(
                f"vqgan.model.quantizer={self.model.quantizer!r} can't be fitted here; use 'nearest', or set "
                "vqgan.checkpoint"
            )
        if self.checkpoint is None:
            self._check_objective()

    def _check_objective(self) -> None:
        adversarial, resolution = self.objective.adversarial, self.model.resolution
        if adversarial.weight and resolution < adversarial.min_resolution:
            raise InputError(
                f"adversarial.n_layers={adversarial.n_layers} needs pictures of {adversarial.min_resolution} pixels, "
                f"and vqgan.model.resolution={resolution}; lower n_layers"
            )
        if adversarial.weight and adversarial.start >= self.fit.steps:
            raise InputError(
                f"adversarial.start={adversarial.start} is not below vqgan.fit.steps={self.fit.steps}, so that the "
                "adversarial loss never counts; lower it, or set adversarial.weight=0"
            )
        if self.objective.perceptual.weights and resolution < MIN_RESOLUTION:
            raise InputError(
                f"the perceptual loss needs pictures of {MIN_RESOLUTION} pixels, and vqgan.model.resolution="
                f"{resolution}; leave perceptual.weights out"
            )

    def open(self, folder: Path) -> VQGANCodec:
        """What `save_vqgan` wrote into `folder`."""
        return VQGANCodec(VQGAN(_saved_config(folder / CONFIG), self.dtype), load_params(folder / PARAMS))


def save_vqgan(folder: Path, config: VQGANConfig, params: PyTree) -> None:
    save_params(folder / PARAMS, params)
    (folder / CONFIG).write_text(json.dumps(canonical(config), indent=2) + "\n")


def _saved_config(path: Path) -> VQGANConfig:
    """The architecture that an artifact holds, which for a checkpoint is not the experiment's."""
    saved: dict[str, Any] = json.loads(path.read_text())
    del saved["class"]
    sequences: dict[str, Any] = {name: tuple(value) for name, value in saved.items() if isinstance(value, list)}
    return VQGANConfig(**saved | sequences | {"dropout": float(saved["dropout"])})
