"""Adam in plain NumPy (arXiv 1412.6980, AdamW 1711.05101) with warm-up, linear decay and clipping: an oracle."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np


def plain_adam(
    params: Mapping[str, np.ndarray],
    gradients: Sequence[Mapping[str, np.ndarray]],
    *,
    decays: str,
    steps: int,
    warmup: int,
    peak_lr: float,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float,
) -> Iterator[dict[str, np.ndarray]]:
    """The parameters after each of the gradients; only the one named `decays` does."""
    params = {name: np.float64(value) for name, value in params.items()}
    mean, square = ({name: 0.0 * value for name, value in params.items()} for _ in range(2))
    for step, gradient in enumerate(gradients):
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        rate = peak_lr * (step / warmup if step < warmup else (steps - step) / (steps - warmup))
        for name, value in params.items():
            g = gradient[name] * min(1, clip_norm / norm)
            mean[name] = b1 * mean[name] + (1 - b1) * g
            square[name] = b2 * square[name] + (1 - b2) * g**2
            update = mean[name] / (1 - b1 ** (step + 1)) / (np.sqrt(square[name] / (1 - b2 ** (step + 1))) + eps)
            params[name] = value - rate * (update + weight_decay * value * (name == decays))
        yield dict(params)
