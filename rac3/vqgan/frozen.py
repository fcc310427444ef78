"""The config of the frozen VQGAN, and how it is opened from its artifact."""

from dataclasses import dataclass, field
from pathlib import Path

from rac3.config import InputError
from rac3.vqgan.checkpoint import VQGANCheckpoint
from rac3.vqgan.codec import VQGANCodec
from rac3.vqgan.model import VQGANConfig
from rac3.vqgan.objective import VQGANObjective
from rac3.vqgan.perceptual import MIN_RESOLUTION
from rac3.weights.fitting import ComputeDtype, FitConfig


@dataclass(frozen=True)
class FrozenVQGAN:
    """The VQGAN, fitted here, or loaded from a published checkpoint.

    Attributes:
      checkpoint: its file or folder (`rac3/vqgan/families/` has a module per format). The architecture is the
        checkpoint's: `model`, `objective` and `fit` are not used.
      resolution: height and width, in pixels, that a checkpoint is used at; None is what its config says, and 256 for
        LlamaGen's, which have none.
      dtype: of the convolutions that encode and decode images; codes are always found in float32. bfloat16 changes a
        few percent of the codes.
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
        """What `VQGANCheckpoint.save` wrote into `folder`."""
        return VQGANCheckpoint.open(folder).codec(self.dtype)
