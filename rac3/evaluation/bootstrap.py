"""How far a figure would move on other documents of the same kind: the bootstrap (Efron 1979), and its relatives."""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import TypedDict

import numpy as np
from jaxtyping import Bool, Float, Int

CONFIDENCE = 0.95
RESAMPLES = 1000
HALVES = 30


class Figure(TypedDict):
    """A figure with its 95% interval."""

    value: float
    low: float
    high: float


def margin(share: float, count: int) -> float:
    """Half of the 95% interval of a share of `count` documents (Agresti and Coull: sound near 0 and 1 too)."""
    adjusted = (share * count + 2) / (count + 4)
    return 2 * math.sqrt(adjusted * (1 - adjusted) / (count + 4))


def bootstrap(
    statistic: Callable[[Int[np.ndarray, " draws"]], Sequence[float]],
    count: int,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Figure]:
    """Each value of a statistic of `count` rows, and the interval that holds the middle 95% of it over random draws.

    Args:
      statistic: of the rows of these numbers, of which some occur several times and others not at all.
      count: rows, which are drawn with replacement, as many each time.
    """
    rng = np.random.default_rng(seed)
    drawn = [statistic(rng.integers(count, size=count)) for _ in range(resamples)]
    ends = np.quantile(np.asarray(drawn, np.float64), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return [
        {"value": float(value), "low": float(low), "high": float(high)}
        for value, low, high in zip(statistic(np.arange(count)), *ends, strict=True)
    ]


def mean_of(values: Float[np.ndarray, " rows"]) -> Figure:
    """The mean of some values."""
    return bootstrap(lambda rows: [values[rows].mean()], len(values))[0]


def share_of(right: Bool[np.ndarray, " rows"], groups: Sequence[Hashable]) -> Figure:
    """The share of some rows that are right.

    Whole groups are drawn: rows about one entity, say, are right or wrong together, and count as less evidence.

    Args:
      groups: the group of each row.
    """
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    members = np.array([numbers[group] for group in groups])
    counts, sums = np.bincount(members), np.bincount(members, right)
    figure = bootstrap(lambda drawn: [sums[drawn].sum() / counts[drawn].sum()], len(numbers))[0]
    return as_wide_as_margin(figure, len(numbers))


def as_wide_as_margin(share: Figure, count: int) -> Figure:
    """A share whose interval is at least the `margin` of `count` documents: near 0 and 1, all that is drawn agrees."""
    least = margin(share["value"], count)
    low, high = min(share["low"], share["value"] - least), max(share["high"], share["value"] + least)
    return {"value": share["value"], "low": low, "high": high}


def half_samples(
    statistic: Callable[[list[Int[np.ndarray, " draws"]]], Sequence[float]],
    counts: Sequence[int],
    draws: int = HALVES,
    seed: int = 0,
) -> list[Figure]:
    """Each value of a statistic of several sets, and its 95% interval by the spread over random halves of the sets.

    For statistics that are biased where rows repeat or are few, such as distances between distributions: a half is
    drawn without replacement, so that the spread around the mean of the halves is that of the whole (the delete-half
    jackknife of Shao and Wu 1989; the variance of m of n rows is (n - m) / m of that of n).

    Args:
      statistic: of rows of each set.
      counts: rows of each set, at least 2.
    """
    rng = np.random.default_rng(seed)
    values = statistic([np.arange(count) for count in counts])
    halves = [statistic([np.sort(rng.permutation(count)[: count // 2]) for count in counts]) for _ in range(draws)]
    odd = min((count // 2) / (count - count // 2) for count in counts)
    spreads = 1.96 * np.std(np.asarray(halves, np.float64), axis=0, ddof=1) * np.sqrt(odd)
    return [
        {"value": float(value), "low": float(value - spread), "high": float(value + spread)}
        for value, spread in zip(values, spreads, strict=True)
    ]
