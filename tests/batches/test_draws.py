"""The counter-based generator: pure, uniform, and independent across its coordinates."""

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
