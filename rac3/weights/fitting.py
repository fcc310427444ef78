"""How the frozen models are fitted here if no published weights are loaded."""

from dataclasses import dataclass
from typing import Literal

from rac3.config import InputError

ComputeDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class FitConfig:
    """How a frozen model is fitted on the documents of `Data.fit_on`, if no checkpoint is loaded.

    Attributes:
      steps: optimizer steps.
      batch: images, or caption-image pairs, in a step.
      peak_lr: of Adam, with a short warm-up and linear decay.
      b1, b2: of Adam; with an adversarial loss 0.5 and 0.9 are usual.
      max_documents: at most this many documents are read, evenly from all shards.
    """

    steps: int = 10_000
    batch: int = 256
    peak_lr: float = 1e-3
    b1: float = 0.9
    b2: float = 0.98
    max_documents: int = 50_000

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.max_documents) < 1 or self.peak_lr <= 0:
            raise InputError(f"fit: steps={self.steps}, batch={self.batch}, peak_lr={self.peak_lr} must be positive")
        if not 0 <= self.b1 < 1 or not 0 <= self.b2 < 1:
            raise InputError(f"fit: b1={self.b1} and b2={self.b2} must lie in [0, 1); 0.9 and 0.98 are the defaults")
