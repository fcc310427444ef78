"""How far a figure would move on other documents of the same kind: the bootstrap (Efron 1979)."""

from collections.abc import Callable
from typing import TypedDict

import numpy as np
from jaxtyping import Float, Int

CONFIDENCE = 0.95
RESAMPLES = 1000


class Figure(TypedDict):
    """A figure with its 95% interval."""

    value: float
    low: float
    high: float


def bootstrap(
    statistic: Callable[[Int[np.ndarray, " draws"]], float], count: int, resamples: int = RESAMPLES, seed: int = 0
) -> Figure:
    """The statistic of `count` rows, and the interval that holds the middle 95% of it over random draws of the rows.

    Args:
      statistic: of the rows of these numbers, of which some occur several times and others not at all.
      count: rows, which are drawn with replacement, as many each time.
    """
    rng = np.random.default_rng(seed)
    drawn = [statistic(rng.integers(count, size=count)) for _ in range(resamples)]
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return {"value": float(statistic(np.arange(count))), "low": float(low), "high": float(high)}


def mean_of(values: Float[np.ndarray, " rows"]) -> Figure:
    """The mean of some values."""
    return bootstrap(lambda rows: float(values[rows].mean()), len(values))
