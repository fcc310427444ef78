"""AdamW with warm-up and linear decay (paper, section 4.1)."""

from dataclasses import dataclass
from typing import Any

import jax
import optax
from jaxtyping import PyTree

from rac3.config import InputError


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam with a linear decay of the learning rate to 0, and gradients clipped by their global norm, as in the paper.

    Attributes:
      warmup_steps: steps of linear rise to `peak_lr`, but at most a tenth of the run.
      weight_decay: decoupled, on matrices only; the paper mentions none.
    """

    peak_lr: float = 1e-4
    warmup_steps: int = 1500
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.peak_lr <= 0 or self.clip_norm <= 0:
            raise InputError(f"optimizer.peak_lr={self.peak_lr} and clip_norm={self.clip_norm} must be positive")
        if self.warmup_steps < 0 or self.weight_decay < 0:
            raise InputError(
                f"optimizer.warmup_steps={self.warmup_steps}, weight_decay={self.weight_decay}: use 0 or more"
            )

        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1 and self.eps > 0):
            raise InputError(
                f"optimizer.b1={self.b1} and b2={self.b2} must be in [0, 1), and eps={self.eps} above 0; use 0.9, 0.98 "
                "and 1e-8"
            )

    def schedule(self, steps: int) -> optax.Schedule:
        warmup = min(self.warmup_steps, max(1, steps // 10))
        return optax.join_schedules(
            [
                optax.linear_schedule(0.0, self.peak_lr, warmup),
                optax.linear_schedule(self.peak_lr, 0.0, max(1, steps - warmup)),
            ],
            [warmup],
        )

    def build(self, steps: int) -> optax.GradientTransformation:
        """The update rule for a run of `steps` steps."""
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.adamw(
                self.schedule(steps), self.b1, self.b2, self.eps, weight_decay=self.weight_decay, mask=_matrices
            ),
        )


def _matrices(params: PyTree) -> PyTree:
    """True where weights decay: at matrices, but not at biases and scales, which nn.scan stacks to matrices too."""

    def decays(path: tuple[Any, ...], leaf: Any) -> bool:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        return leaf.ndim > 1 and not names[-1].endswith(("bias", "scale"))

    return jax.tree_util.tree_map_with_path(decays, params)
