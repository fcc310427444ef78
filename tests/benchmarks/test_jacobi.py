"""Speculative Jacobi decoding samples from the model's own distribution."""

import importlib
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

IDS, PLACES, ROWS = 3, 4, 6000


@pytest.fixture(scope="module")
def jacobi(path: None) -> Callable[..., Any]:
    return importlib.import_module("jacobi").jacobi


@pytest.fixture(scope="module")
def chain() -> np.ndarray:
    """The distribution of each id after each history, [ids] * PLACES: far from uniform, and unlike each other."""
    return np.random.default_rng(3).dirichlet([0.4] * IDS, size=(PLACES, IDS, IDS))


def forward(chain: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Each id depends on the two before it."""
    padded = np.pad(ids, ((0, 0), (2, 0)))
    return np.stack([chain[place, padded[:, place], padded[:, place + 1]] for place in range(PLACES)], axis=1)


def probabilities(chain: np.ndarray) -> np.ndarray:
    """Of all sequences, id by id."""
    every = np.array(list(itertools.product(range(IDS), repeat=PLACES)))
    each = forward(chain, every)
    return np.take_along_axis(each, every[..., None], axis=2)[..., 0].prod(axis=1)


@pytest.mark.parametrize("window", [1, 2, 4])
def test_sequences_are_as_frequent_as_the_model_says(jacobi, chain, window):
    drawn = jacobi(lambda ids: forward(chain, ids), ROWS, PLACES, IDS, window, np.random.default_rng(0))
    counts = np.bincount(drawn.ids @ IDS ** np.arange(PLACES)[::-1], minlength=IDS**PLACES)
    expected = ROWS * probabilities(chain)
    rare = expected < 5  # counted together, for the approximation of the test
    observed = np.append(counts[~rare], counts[rare].sum())
    assert stats.chisquare(observed, np.append(expected[~rare], expected[rare].sum())).pvalue > 1e-3


def test_a_window_of_one_id_takes_a_pass_for_each(jacobi, chain):
    drawn = jacobi(lambda ids: forward(chain, ids), 5, PLACES, IDS, 1, np.random.default_rng(0))
    assert drawn.passes.tolist() == [PLACES] * 5


def test_good_guesses_are_accepted_together(jacobi):
    certain = np.eye(IDS)[[2, 0, 1, 1]]  # the second pass has guesses that are right
    drawn = jacobi(
        lambda ids: np.broadcast_to(certain, (len(ids), PLACES, IDS)), 50, PLACES, IDS, 4, np.random.default_rng(0)
    )
    assert (drawn.ids == [2, 0, 1, 1]).all()
    assert drawn.passes.max() == 2
