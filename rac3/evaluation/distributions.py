"""How far the pictures that a model draws are from real ones, as sets: over features of both.

    Frechet   |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))        FID over the Inception's features (arXiv 1706.08500)
    KID       E k(x, x') + E k(y, y') - 2 E k(x, y)               k = (x . y / width + 1)^3, unbiased (arXiv 1801.01401)
    IS        exp E KL(p(class | x) || p(class))                  of the network's classes (arXiv 1606.03498)
    precision share of the drawn pictures within the real ones' balls; recall: the reverse (arXiv 1904.06991)
    CMMD      1000 (E k(x, x') + E k(y, y') - 2 E k(x, y))        k = exp(-|x - y|^2 / 200), of CLIP (arXiv 2401.09603)

The Frechet distance is biased: it falls as pictures are added, so only figures over as many pictures can be compared.
KID is not. All sums are float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from rac3.evaluation.bootstrap import as_wide_as_margin, half_samples
from rac3.evaluation.features import Embedded

NEIGHBORS = 3  # whose farthest is the radius of a ball
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
BLOCK = 1024  # rows of a kernel or of distances at once
LEAST = 2 * (NEIGHBORS + 1)  # pictures for intervals: a half has neighbors

Features = Float[np.ndarray, "_ width"]
Kernel = Callable[[Features, Features], Float[np.ndarray, "rows columns"]]


@dataclass
class Moments:
    """Mean and covariance of features that come in parts.

    Attributes:
      scatter: the sum of the outer products of the features less their mean.
    """

    count: int
    mean: Float[np.ndarray, " width"]
    scatter: Float[np.ndarray, "width width"]

    @classmethod
    def of_none(cls, width: int) -> "Moments":
        return cls(0, np.zeros(width), np.zeros((width, width)))

    def add(self, features: Features) -> None:
        """Adds a part (Chan et al. 1983)."""
        if not len(features):
            return
        part = features.astype(np.float64)
        mean = part.mean(0)
        total, gap = self.count + len(part), mean - self.mean
        centered = part - mean
        self.scatter += centered.T @ centered + np.outer(gap, gap) * (self.count * len(part) / total)
        self.mean = self.mean + gap * (len(part) / total)
        self.count = total

    @property
    def root(self) -> Float[np.ndarray, "width width"]:
        """A matrix whose product with its transpose is the covariance (over count - 1)."""
        values, vectors = np.linalg.eigh(self.scatter / (self.count - 1))
        return vectors * np.sqrt(np.maximum(values, 0))


def frechet_distance(ours: Moments, theirs: Moments) -> float:
    """Between the normal distributions of these moments, each of at least 2 pictures."""
    return _frechet(ours.mean, ours.root, theirs.mean, theirs.root)


def frechet_of(ours: Features, theirs: Features) -> float:
    """The same of features in memory: for fewer pictures than features, without any covariance."""
    return _frechet(*_mean_and_root(ours), *_mean_and_root(theirs))


def _mean_and_root(features: Features) -> tuple[Float[np.ndarray, " width"], Float[np.ndarray, "width rank"]]:
    if len(features) > features.shape[1]:
        moments = Moments.of_none(features.shape[1])
        moments.add(features)
        return moments.mean, moments.root
    mean = features.mean(0, dtype=np.float64)
    return mean, (features - mean).T / np.sqrt(len(features) - 1)


def _frechet(mean: np.ndarray, root: np.ndarray, other_mean: np.ndarray, other_root: np.ndarray) -> float:
    """With S = A A^T and T = B B^T, the eigenvalues of S T are the squares of the singular values of A^T B: no square
    root of a matrix is taken, which explodes where one is singular."""
    shared = np.linalg.svd(root.T @ other_root, compute_uv=False).sum()
    return float(((mean - other_mean) ** 2).sum() + (root**2).sum() + (other_root**2).sum() - 2 * shared)


def kid(ours: Features, theirs: Features) -> float:
    """The kernel distance of all pairs, each set of at least 2; may be below 0, as it is unbiased."""

    def cubic(a: Features, b: Features) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    alone = [(((each**2).sum(1) / each.shape[1] + 1) ** 3).sum() for each in (ours, theirs)]  # of each with itself
    within = [
        (_sum(cubic, each) - own) / (len(each) ** 2 - len(each))
        for each, own in zip((ours, theirs), alone, strict=True)
    ]
    return float(sum(within)) - 2 * _sum(cubic, ours, theirs) / (len(ours) * len(theirs))


def cmmd(ours: Features, theirs: Features) -> float:
    """The distance of CLIP vectors of norm 1, with a picture's likeness to itself among the pairs, as published."""

    def gaussian(a: Features, b: Features) -> np.ndarray:
        return np.exp(-_squared_distances(a, b) / (2 * CMMD_SIGMA**2))

    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    within = sum(_sum(gaussian, each) / len(each) ** 2 for each in (ours, theirs))
    return CMMD_SCALE * (within - 2 * _sum(gaussian, ours, theirs) / (len(ours) * len(theirs)))


def inception_score(logits: Float[np.ndarray, "images classes"], splits: int = 1) -> float:
    """1 where all pictures look alike to the network, up to its number of classes; the mean over `splits` parts."""
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    scores = []
    for part in np.array_split(log_p, splits):
        share = np.exp(part)
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(share > 0, share * (part - np.log(share.mean(0))), 0.0)
        scores.append(np.exp(terms.sum(1).mean()))
    return float(np.mean(scores))


def precision_recall(drawn: Features, real: Features, neighbors: int = NEIGHBORS) -> tuple[float, float]:
    """How many of the drawn pictures lie in the ball of a real one, and the reverse.

    The ball of a picture reaches to the `neighbors`-th nearest of its own set, which has more pictures than that.
    """
    drawn, real = drawn.astype(np.float64), real.astype(np.float64)
    return _inside(drawn, real, neighbors), _inside(real, drawn, neighbors)


def _inside(points: Features, centers: Features, neighbors: int) -> float:
    radii = np.concatenate(
        [
            np.partition(_squared_distances(centers[start : start + BLOCK], centers), neighbors, axis=1)[:, neighbors]
            for start in range(0, len(centers), BLOCK)
        ]
    )
    found = [
        (_squared_distances(points[start : start + BLOCK], centers) <= radii).any(1)
        for start in range(0, len(points), BLOCK)
    ]
    return float(np.concatenate(found).mean())


def _squared_distances(a: Features, b: Features) -> Float[np.ndarray, "rows columns"]:
    return np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T, 0)


def _sum(kernel: Kernel, a: Features, b: Features | None = None) -> float:
    """Of all pairs of a and b, or of a with itself."""
    b = a if b is None else b
    return float(sum(kernel(a[start : start + BLOCK], b).sum() for start in range(0, len(a), BLOCK)))


def distribution_metrics(name: str, drawn: Embedded, real: Embedded) -> dict[str, Any]:
    """All of them but CMMD over one network's features, each with its 95% interval, and over how many pictures.

    Figures are None where a set has fewer than `LEAST` pictures; the Inception Score is that of the drawn pictures.

    Args:
      name: of the Frechet distance.
    """
    counts = [len(drawn.features), len(real.features)]
    metrics: dict[str, Any] = {"name": name, "images": counts[0], "real_images": counts[1]}
    figures = ("frechet", "kid", "precision", "recall")
    if min(counts) < LEAST:
        return metrics | dict.fromkeys((*figures, "inception_score"))

    def statistic(rows: list[np.ndarray]) -> list[float]:
        ours, theirs = drawn.features[rows[0]], real.features[rows[1]]
        return [frechet_of(ours, theirs), kid(ours, theirs), *precision_recall(ours, theirs)]

    found = dict(zip(figures, half_samples(statistic, counts), strict=True))
    for share, count in zip(("precision", "recall"), counts, strict=True):
        found[share] = as_wide_as_margin(found[share], count)
    metrics |= found
    logits = drawn.logits
    score = None if logits is None else half_samples(lambda rows: [inception_score(logits[rows[0]])], counts[:1])[0]
    return metrics | {"inception_score": score}


def cmmd_metrics(drawn: Features, real: Features) -> dict[str, Any] | None:
    """CMMD with its 95% interval; None where a set has fewer than `LEAST` pictures."""
    if min(len(drawn), len(real)) < LEAST:
        return None
    found = half_samples(lambda rows: [cmmd(drawn[rows[0]], real[rows[1]])], [len(drawn), len(real)])[0]
    return dict(found)
