"""Intervals of shares whose rows depend on each other."""

import numpy as np
import pytest

from rac3.evaluation.bootstrap import as_wide_as_margin, margin, share_of


def test_whole_groups_are_drawn():
    """Six groups, three of them all right. As many groups drawn: the share is B / 6, with B of Binomial(6, 1/2).

    P(B = 0) = 1/64 < 2.5% < P(B <= 1) = 7/64, so the interval ends at 1/6 and 5/6, however many rows a group has.
    Single rows would stay within 0.31 of a half.
    """
    groups = np.repeat(["a", "b", "c", "d", "e", "f"], 9).tolist()
    figure = share_of(np.isin(groups, ["b", "c", "f"]), groups)
    assert figure["value"] == 0.5
    assert (figure["low"], figure["high"]) == (pytest.approx(1 / 6), pytest.approx(5 / 6))


def test_a_group_counts_by_its_rows():
    """Three right rows in one group, and a wrong one in another: 3/4 of the rows, not half of the groups."""
    assert share_of(np.array([True, False, True, True]), ["a", "b", "a", "a"])["value"] == 0.75


@pytest.mark.parametrize("right", [False, True])
def test_a_share_of_all_or_none_is_not_certain(right: bool):
    """4 groups of 5. Agresti and Coull: a share of (0 + 2) / (4 + 4), give or take 2 sqrt(1/4 3/4 / 8) = 0.306."""
    figure = share_of(np.full(20, right), [0, 1, 2, 3] * 5)
    assert figure["value"] == right
    assert [figure["low"], figure["high"]] == pytest.approx([right - 0.3062, right + 0.3062], abs=1e-4)


def test_a_wide_interval_stays_as_it_is():
    wide = {"value": 0.5, "low": 0.0, "high": 0.9}
    assert as_wide_as_margin(wide, 100) == wide
    assert margin(0.5, 100) < 0.4
