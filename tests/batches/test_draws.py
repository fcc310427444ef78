"""The counter-based generator: pure, uniform, and independent across its coordinates."""

from collections import Counter

import numpy as np
import pytest

from rac3.batches import draws


def test_a_draw_depends_on_nothing_but_its_coordinates():
    documents = np.arange(100)
    epochs = np.full(100, 3)
    all_at_once = draws.uniform(7, epochs, documents, draws.MASK, 5)
    assert all_at_once.shape == (100, 5)
    for document in (0, 17, 99):
        alone = draws.uniform(7, 3, document, draws.MASK, 5)
        np.testing.assert_array_equal(alone[0], all_at_once[document])
    np.testing.assert_array_equal(draws.uniform(7, epochs[::-1], documents[::-1], draws.MASK, 5), all_at_once[::-1])
    np.testing.assert_array_equal(draws.uniform(7, epochs, documents, draws.MASK, 1), all_at_once[:, :1])  # a prefix


def test_the_numbers_are_pinned():
    """Another generator would change how every checkpointed run resumes."""
    np.testing.assert_array_equal(draws.uniform(1, 2, 3, 4, 2), [[0.4692588078505293, 0.8457395026628717]])


@pytest.mark.parametrize("count", [1, 4])
def test_uniform_on_the_unit_interval(count: int):
    """Chi-square over 64 bins, 63 degrees of freedom: above 116 with probability 5e-5."""
    values = draws.uniform(0, 0, np.arange(64_000 // count), draws.NEIGHBOR, count).ravel()
    assert values.min() >= 0
    assert values.max() < 1
    seen = np.bincount((values * 64).astype(int), minlength=64)
    assert ((seen - 1000) ** 2 / 1000).sum() < 116


def test_seeds_epochs_documents_and_streams_are_independent():
    """Correlations of 20,000 pairs have a standard deviation of 0.007: none of ten reaches 5 of them."""
    documents = np.arange(20_000)
    base = draws.uniform(0, 0, documents, 0)[:, 0]
    others = [
        draws.uniform(1, 0, documents, 0),
        draws.uniform(2**63, 0, documents, 0),
        draws.uniform(-1, 0, documents, 0),
        draws.uniform(0, 1, documents, 0),
        draws.uniform(0, 2, documents, 0),
        draws.uniform(0, 0, documents, 1),
        draws.uniform(0, 0, documents, draws.MASK),
        draws.uniform(0, 0, documents, draws.MASK + 1),
        draws.uniform(0, 0, documents + 1, 0),
        draws.uniform(0, 0, documents, 0, 2)[:, 1:],
    ]
    for other in others:
        assert abs(np.corrcoef(base, other[:, 0])[0, 1]) < 0.036


def test_large_document_numbers_do_not_repeat():
    values = draws.uniform(0, 0, np.concatenate([np.arange(5000), 150_000_000 + np.arange(5000)]), 0)[:, 0]
    assert len(np.unique(values)) == 10_000


@pytest.mark.parametrize("size", [1, 2, 3, 255, 256, 257, 1000, 4096, 4097, 70_000])
def test_a_permutation_has_every_number_once(size: int):
    for epoch in range(3):
        numbers = draws.permuted(7, epoch, size, np.arange(size))
        assert sorted(numbers.tolist()) == list(range(size))
        some = np.random.default_rng(0).integers(0, size, 20)
        np.testing.assert_array_equal(draws.permuted(7, epoch, size, some), numbers[some])  # each on its own


@pytest.mark.slow
def test_permutations_are_uniform():
    """The first two of 16 numbers: 240 pairs, 2,400 epochs, 239 degrees of freedom: above 350 with probability 3e-6.

    Of 3,000 numbers: where 16 neighboring places go by 800 seeds, in 16 bins of 50 or so, 15 degrees of freedom: above
    50 with probability 1e-5; and the difference of neighbors, which is triangular over the circle, thus uniform.
    """
    seen = Counter(tuple(draws.permuted(0, epoch, 16, np.arange(2)).tolist()) for epoch in range(2400))
    assert sum((seen[one, other] - 10) ** 2 / 10 for one in range(16) for other in range(16) if one != other) < 350
    table = np.stack([draws.permuted(seed, 0, 3000, np.arange(1000, 1016)) for seed in range(800)])
    for values in (*table.T, *np.diff(table).T):
        bins = np.bincount(values % 3000 * 16 // 3000, minlength=16)
        assert ((bins - 50) ** 2 / 50).sum() < 50


def test_the_neighbors_of_150_million_are_far_apart():
    """Places in a row go to numbers that are independent: the mean distance on the line is a third, within 1%."""
    size = 150_000_000
    numbers = draws.permuted(0, 0, size, 10**8 + np.arange(100_000))
    assert len(np.unique(numbers)) == 100_000
    assert 0 <= numbers.min() < size / 1000 < size - size / 1000 < numbers.max() < size
    assert np.abs(np.diff(numbers)).mean() / size == pytest.approx(1 / 3, rel=0.01)
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 5 / 316  # five standard deviations


def test_the_permutation_is_pinned():
    """Another one would change how every checkpointed run resumes."""
    assert draws.permuted(1, 2, 300, np.arange(5)).tolist() == [196, 30, 221, 26, 295]
