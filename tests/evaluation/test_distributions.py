"""Distances between sets of pictures: by hand, by plain loops, and as torch-fidelity has them."""

import math

import numpy as np
import pytest

from rac3.evaluation.bootstrap import half_samples, margin
from rac3.evaluation.distributions import (
    LEAST,
    Moments,
    cmmd,
    cmmd_metrics,
    distribution_metrics,
    frechet_distance,
    frechet_of,
    inception_score,
    kid,
    precision_recall,
)
from rac3.evaluation.features import Embedded

RNG = np.random.default_rng(0)
OURS = RNG.normal(size=(60, 7)).astype(np.float32)
THEIRS = (RNG.normal(size=(45, 7)) @ RNG.normal(size=(7, 7)) + 0.5).astype(np.float32)


def moments_of(*parts: np.ndarray) -> Moments:
    moments = Moments.of_none(parts[0].shape[1])
    for part in parts:
        moments.add(part)
    return moments


def test_moments_do_not_depend_on_the_parts() -> None:
    found = moments_of(OURS[:1] + 1000, OURS[1:20] + 1000, OURS[:0], OURS[20:] + 1000)
    wanted = (OURS + 1000).astype(np.float64)
    assert found.count == 60
    assert found.mean == pytest.approx(wanted.mean(0))
    assert found.scatter / 59 == pytest.approx(np.cov(wanted, rowvar=False), abs=1e-9)
    assert found.root @ found.root.T == pytest.approx(np.cov(wanted, rowvar=False), abs=1e-9)


def test_frechet_of_normal_distributions_by_hand() -> None:
    """Means 0 and 3, deviations 1 and 2 of one feature: 9 + (1 - 2)^2. Independent features add up."""
    line = np.array([[-1.0], [0.0], [1.0]])  # variance 1
    assert frechet_of(line, 2 * line + 3) == pytest.approx(9 + 1)
    both = np.array([[a, b] for a in (-1.0, 1.0) for b in (-1.0, 1.0)]) * math.sqrt(3 / 4)  # variances 1, 1
    assert frechet_of(both, both * [3, 5] + [1, 0]) == pytest.approx(1 + 2**2 + 4**2)


@pytest.mark.parametrize("pictures", [4, 45])  # fewer than features, and more
def test_frechet_agrees_with_the_eigenvalues_of_the_product(pictures: int) -> None:
    ours, theirs = OURS, THEIRS[:pictures]
    s, t = (np.cov(each, rowvar=False, dtype=np.float64) for each in (ours, theirs))
    root = np.sqrt(np.linalg.eigvals(s @ t).astype(complex)).real.sum()
    gap = ours.mean(0, dtype=np.float64) - theirs.mean(0, dtype=np.float64)
    wanted = gap @ gap + np.trace(s + t) - 2 * root
    assert frechet_of(ours, theirs) == pytest.approx(wanted, rel=1e-5)
    assert frechet_distance(moments_of(ours), moments_of(theirs)) == pytest.approx(wanted, rel=1e-5)
    assert frechet_of(ours, ours) == pytest.approx(0, abs=1e-9)


def test_kid_agrees_with_plain_loops() -> None:
    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a.astype(float) @ b.astype(float) / 7 + 1) ** 3)

    def within(rows: np.ndarray) -> float:
        return float(np.mean([k(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]))

    between = np.mean([k(a, b) for a in OURS for b in THEIRS])
    assert kid(OURS, THEIRS) == pytest.approx(within(OURS) + within(THEIRS) - 2 * between)


def test_kid_is_unbiased() -> None:
    """Of two sets of 8 from one distribution, it is 0 on average; with the diagonal it would be above 0.5."""
    rng = np.random.default_rng(1)
    found = [kid(*rng.normal(size=(2, 8, 4))) for _ in range(300)]
    assert abs(np.mean(found)) < 3 * np.std(found) / math.sqrt(300)


def test_cmmd_agrees_with_plain_loops() -> None:
    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean([math.exp(-((x.astype(float) - y) ** 2).sum() / 200) for x in a for y in b]))

    wanted = 1000 * (mean(OURS, OURS) + mean(THEIRS, THEIRS) - 2 * mean(OURS, THEIRS))
    assert cmmd(OURS, THEIRS) == pytest.approx(wanted)
    assert cmmd(OURS, OURS) == pytest.approx(0, abs=1e-9)


def test_inception_score_at_its_ends() -> None:
    assert inception_score(np.zeros((5, 4))) == pytest.approx(1)
    sure = 800.0 * np.tile(np.eye(4), (3, 1))
    assert inception_score(sure) == pytest.approx(4)
    assert inception_score(sure[:6], splits=3) == pytest.approx(2)  # the first two, the next two, the last two
    p = np.array([[0.5, 0.5], [0.9, 0.1]])
    by_hand = np.mean([(row * np.log(row / [0.7, 0.3])).sum() for row in p])
    assert inception_score(np.log(p)) == pytest.approx(math.exp(by_hand))


def test_precision_and_recall_by_hand() -> None:
    """On a line, with one neighbor: real balls are 0 +- 1, 1 +- 1, 5 +- 4; drawn ones 3 +- 1, 4 +- 1, 20 +- 16."""
    real, drawn = np.array([[0.0], [1.0], [5.0]]), np.array([[3.0], [4.0], [20.0]])
    assert precision_recall(drawn, real, 1) == (2 / 3, 1 / 3)
    assert precision_recall(real, drawn, 1) == (1 / 3, 2 / 3)
    assert precision_recall(OURS, OURS) == (1, 1)


def test_halves_spread_as_the_whole() -> None:
    """The deviation of a mean of n is that of the values over sqrt(n), for sets of even and of odd size."""
    for count in (400, 7):
        rows = np.random.default_rng(2).normal(size=count)
        (found,) = half_samples(lambda rows_of, rows=rows: [rows[rows_of[0]].mean()], [count], draws=4000)
        assert found["value"] == pytest.approx(rows.mean())
        wanted = 1.96 * rows.std(ddof=1) / math.sqrt(count)
        assert (found["high"] - found["low"]) / 2 == pytest.approx(wanted, rel=0.05)  # 4,000 draws


def test_all_figures_of_two_sets() -> None:
    drawn, real = Embedded(OURS, OURS), Embedded(THEIRS)
    found = distribution_metrics("FD (x)", drawn, real)
    assert (found["name"], found["images"], found["real_images"]) == ("FD (x)", 60, 45)
    wanted = {"frechet": frechet_of(OURS, THEIRS), "kid": kid(OURS, THEIRS), "inception_score": inception_score(OURS)}
    wanted |= dict(zip(("precision", "recall"), precision_recall(OURS, THEIRS), strict=True))
    for name, value in wanted.items():
        assert found[name]["value"] == pytest.approx(value)
        assert found[name]["low"] < value < found[name]["high"]
    apart = distribution_metrics("x", drawn, Embedded(THEIRS + 100))["recall"]  # 0 of 45 in every half
    assert (apart["low"], apart["high"]) == pytest.approx((-margin(0.0, 45), margin(0.0, 45)))
    assert cmmd_metrics(OURS, THEIRS)["value"] == pytest.approx(cmmd(OURS, THEIRS))
    assert distribution_metrics("x", Embedded(OURS), real)["inception_score"] is None


def test_too_few_pictures_are_no_figure() -> None:
    few = distribution_metrics("FID", Embedded(OURS[: LEAST - 1]), Embedded(THEIRS))
    assert few == {"name": "FID", "images": LEAST - 1, "real_images": 45} | dict.fromkeys(
        ("frechet", "kid", "precision", "recall", "inception_score")
    )
    assert cmmd_metrics(OURS[: LEAST - 1], THEIRS) is None


def test_distances_are_those_of_torch_fidelity() -> None:
    pytest.importorskip("torch_fidelity")
    import torch
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    ours, theirs = (torch.from_numpy(each.astype(np.float64)) for each in (OURS[:45], THEIRS))
    statistics = [fid_features_to_statistics(each) for each in (ours, theirs)]
    fid = fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    assert frechet_of(OURS[:45], THEIRS) == pytest.approx(fid, rel=1e-6)
    settings = {"kid_subsets": 1, "kid_subset_size": 45, "verbose": False}
    theirs_kid = kid_features_to_metric(ours, theirs, **settings)["kernel_inception_distance_mean"]
    assert kid(OURS[:45], THEIRS) == pytest.approx(theirs_kid, rel=1e-6)
    score = isc_features_to_metric(ours, splits=3, shuffle=False)["inception_score_mean"]
    assert inception_score(OURS[:45], splits=3) == pytest.approx(score, rel=1e-6)
    both = prc_features_to_metric(ours, theirs, verbose=False)
    assert precision_recall(OURS[:45], THEIRS) == pytest.approx((both["precision"], both["recall"]))
