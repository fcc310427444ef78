"""Drawing the next id, against NumPy: temperature, top-k, nucleus, ensembles, guidance, contrast, and bad numbers."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rac3.config import InputError
from rac3.generation.copying import Copying
from rac3.generation.sampling import Contrast, Guidance, Sampling, sample, stack, top_k, top_p
from rac3.generation.step import Step
from rac3.tokens.vocabulary import Vocabulary

PROBS = np.array([0.05, 0.4, 0.1, 0.25, 0.2])
ALL = np.ones(5, bool)
jitted = jax.jit(sample)


def a_step(requests: int, samples: int) -> Step:
    zeros = [
        jnp.zeros(shape, jnp.int32) for shape in [(requests, 1, 1)] * 2 + [(requests, 1)] + [(requests, samples, 1)] * 2
    ]
    counts = [jnp.zeros((requests, samples), jnp.int32)] * 2
    return Step(*zeros, *counts, vocabulary=Vocabulary(1, 1))


def draw(sampling: Sampling, logits: np.ndarray, allowed: np.ndarray = ALL, count: int = 4000):
    """Samples of one request; logits are [vocab], or [streams, vocab]."""
    streams = np.atleast_2d(np.asarray(logits, np.float32))[None, :, None]
    shape = (1, streams.shape[1], count, streams.shape[-1])
    keys = jax.random.split(jax.random.key(0), (1, count))
    masks = jnp.broadcast_to(allowed, (1, count, streams.shape[-1]))
    ids, log_probs = jitted(sampling, jnp.broadcast_to(streams, shape), masks, a_step(1, count), keys)
    return np.asarray(ids)[0], np.asarray(log_probs)[0]


def frequencies(ids: np.ndarray) -> np.ndarray:
    """Of 4000 draws: a standard deviation of at most 0.008."""
    return np.bincount(ids, minlength=5) / len(ids)


def normalized(x: np.ndarray) -> np.ndarray:
    return x / x.sum()


def test_ids_come_as_often_as_they_are_probable():
    ids, log_probs = draw(Sampling(), np.log(PROBS))
    np.testing.assert_allclose(frequencies(ids), PROBS, atol=0.03)
    np.testing.assert_allclose(log_probs, np.log(PROBS)[ids], rtol=1e-5)


def test_temperature_sharpens_and_leaves_the_log_probabilities_true():
    ids, log_probs = draw(Sampling(temperature=0.5), np.log(PROBS))
    np.testing.assert_allclose(frequencies(ids), normalized(PROBS**2), atol=0.03)
    np.testing.assert_allclose(log_probs, np.log(PROBS)[ids], rtol=1e-5)


def test_temperature_zero_takes_the_best_allowed_id():
    ids, log_probs = draw(Sampling(temperature=0.0), np.log(PROBS), np.array([True, False, True, False, True]), 3)
    assert ids.tolist() == [4, 4, 4]
    np.testing.assert_allclose(log_probs, np.log(0.2 / 0.35), rtol=1e-5)  # among what is allowed


@pytest.mark.parametrize("temperature", [1e-30, 1e-45, 1e30])
def test_extreme_temperatures_are_those_of_the_limit(temperature: float):
    ids, log_probs = draw(Sampling(temperature=temperature), np.log(PROBS))
    expected = PROBS == 0.4 if temperature < 1 else np.full(5, 0.2)
    np.testing.assert_allclose(frequencies(ids), expected, atol=0.03)
    assert np.isfinite(log_probs).all()


def test_a_tiny_temperature_takes_the_best_of_many_ids():
    """Of 200 ids with log probabilities of about -5, which 1.2e-38 takes beyond what float32 holds."""
    ids, _ = draw(Sampling(temperature=1.2e-38), np.where(np.arange(200) == 7, 0.5, 0.0), np.ones(200, bool), 20)
    assert set(ids) == {7}


NUCLEI = [(0.01, [1]), (0.39, [1]), (0.5, [1, 3]), (0.66, [1, 3, 4]), (0.94, [1, 2, 3, 4]), (0.999, [0, 1, 2, 3, 4])]


@pytest.mark.parametrize(("top_p", "kept"), NUCLEI)
def test_the_nucleus_is_the_smallest_set_of_that_probability(top_p: float, kept: list[int]):
    ids, log_probs = draw(Sampling(top_p=top_p), np.log(PROBS))
    expected = np.where(np.isin(np.arange(5), kept), PROBS, 0)
    np.testing.assert_allclose(frequencies(ids), normalized(expected), atol=0.03)
    assert set(ids) == set(kept)
    np.testing.assert_allclose(log_probs, np.log(PROBS)[ids], rtol=1e-5)


@pytest.mark.parametrize(("top_k", "kept"), [(1, {1}), (2, {1, 3}), (4, {1, 2, 3, 4}), (99, {0, 1, 2, 3, 4})])
def test_top_k_keeps_the_most_probable(top_k: int, kept: set[int]):
    ids, log_probs = draw(Sampling(top_k=top_k), np.log(PROBS))
    assert set(ids) == kept
    np.testing.assert_allclose(log_probs, np.log(PROBS)[ids], rtol=1e-5)


@pytest.mark.parametrize("sampling", [Sampling(top_p=0.25), Sampling(top_k=3)])
def test_of_equal_ids_the_first_are_kept(sampling: Sampling):
    """Three of ten: 0.1 + 0.1 < 0.25 <= 0.1 + 0.1 + 0.1."""
    ids, _ = draw(sampling, np.zeros(10), np.ones(10, bool))
    assert set(ids) == {0, 1, 2}


def test_random_sets_are_those_of_a_sort():
    """Of 50 ids with ties: sorted by falling probability, then by id."""
    rng = np.random.default_rng(0)
    logits = rng.choice(np.linspace(-3, 2, 9), (20, 1, 50))
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    k, p = rng.integers(1, 50, (20, 1, 1)), rng.uniform(0.1, 0.95, (20, 1, 1))
    best, nucleus = top_k(jnp.float32(probs), jnp.float32(k)), top_p(jnp.float32(probs), jnp.float32(p))
    for row in range(20):
        order = np.lexsort((np.arange(50), -probs[row, 0]))
        count = int(np.searchsorted(np.cumsum(probs[row, 0, order]), p[row, 0, 0])) + 1
        assert set(np.flatnonzero(best[row, 0])) == set(order[: k[row, 0, 0]])
        assert set(np.flatnonzero(nucleus[row, 0])) == set(order[:count])


def test_temperature_comes_before_the_nucleus():
    """Squared, the probabilities are 0.58, 0.23, 0.15, ...: two ids reach 0.7 rather than three."""
    assert set(draw(Sampling(temperature=0.5, top_p=0.7), np.log(PROBS))[0]) == {1, 3}


def test_top_k_comes_before_the_nucleus():
    """Of the best three, with 0.47, 0.29 and 0.24, two reach 0.7; of all five, three would."""
    assert set(draw(Sampling(top_k=3, top_p=0.7), np.log(PROBS))[0]) == {1, 3}


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_p=0.9), Sampling(top_k=4), Sampling(temperature=0.0)])
def test_an_id_that_is_not_allowed_is_never_drawn(sampling: Sampling):
    ids, log_probs = draw(sampling, np.log(PROBS), np.array([True, False, False, False, True]), 2000)
    assert set(ids) <= {0, 4}
    np.testing.assert_allclose(log_probs, np.log(np.where(ids == 0, 0.2, 0.8)), rtol=1e-5)


def test_each_request_has_its_numbers_and_each_sample_its_key():
    """A batch of samplings is what each of them gives alone; other numbers compile nothing."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(4, 2, 3, 6)), jnp.float32)
    allowed, keys = jnp.ones((4, 3, 6), bool), jax.random.split(jax.random.key(1), (4, 3))
    many = [
        Sampling(temperature, top_p, top_k, Guidance(scale))
        for temperature, top_p, top_k, scale in [
            (0.0, 0.9, 3, 2.0),
            (1.0, 0.3, 5, 3.0),
            (2.0, 0.9, 1, 0.0),
            (0.7, 0.8, 2, 1.5),
        ]
    ]
    together = jax.jit(lambda *arguments: sample(*arguments))  # with its own cache
    ids, log_probs = together(stack(many), logits, allowed, a_step(4, 3), keys)
    for row, sampling in enumerate(many):
        alone = together(
            stack([sampling]), *(each[row : row + 1] for each in (logits, allowed)), a_step(1, 3), keys[row : row + 1]
        )
        np.testing.assert_array_equal(ids[row], alone[0][0])
        np.testing.assert_allclose(log_probs[row], alone[1][0], rtol=1e-5)
    assert together._cache_size() == 2  # of four requests, and of one


def test_what_is_off_is_another_structure():
    one = jax.tree.structure(Sampling(temperature=0.3))
    assert jax.tree.structure(Sampling(temperature=2.0)) == one
    for other in (
        Sampling(top_p=0.9),
        Sampling(top_k=1),
        Sampling(guidance=Guidance(3.0)),
        Sampling(copying=Copying(0.5)),
    ):
        assert jax.tree.structure(other) != one


# Several streams.

TWO = np.array([[0.7, 0.1, 0.1, 0.05, 0.05], [0.1, 0.1, 0.5, 0.1, 0.2]])


def test_an_ensemble_averages_probabilities():
    ids, log_probs = draw(Sampling(), np.log(TWO))
    np.testing.assert_allclose(frequencies(ids), TWO.mean(0), atol=0.03)
    np.testing.assert_allclose(log_probs, np.log(TWO.mean(0))[ids], rtol=1e-5)


def test_streams_are_averaged_among_the_allowed_ids():
    allowed = np.array([True, False, True, False, False])
    ids, log_probs = draw(Sampling(), np.log(TWO), allowed)
    expected = np.mean([normalized(row * allowed) for row in TWO], axis=0)
    np.testing.assert_allclose(frequencies(ids), expected, atol=0.03)
    np.testing.assert_allclose(np.exp(log_probs), expected[ids], rtol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5, 3.0])
def test_guidance_is_that_of_cm3leon(scale: float):
    ids, log_probs = draw(Sampling(guidance=Guidance(scale)), np.log(TWO[: 1 + (scale != 1)]))
    given, without = np.log(TWO)
    expected = normalized(np.exp(without + scale * (given - without)))
    np.testing.assert_allclose(frequencies(ids), expected, atol=0.03)
    np.testing.assert_allclose(log_probs, given[ids], rtol=1e-4)  # the model's own


FOUR = np.array([TWO[0], normalized(np.arange(1.0, 6)), TWO[1], normalized(np.arange(5.0, 0, -1))])


@pytest.mark.parametrize(("without", "streams"), [("text", 2), ("documents", 3)])
def test_guidance_of_an_ensemble_has_as_many_streams_as_it_must(without: str, streams: int):
    """Without the text, each stream has one that lacks it; without documents, all share one."""
    ids, _ = draw(Sampling(guidance=Guidance(1.5, without)), np.log(FOUR))
    given, bare = np.log(FOUR[:streams].mean(0)), np.log(FOUR[streams:].mean(0))
    np.testing.assert_allclose(frequencies(ids), normalized(np.exp(bare + 1.5 * (given - bare))), atol=0.03)


@pytest.mark.parametrize(("alpha", "k", "plausible"), [(1.0, 1, [0]), (0.9, 2, [0, 1, 2]), (0.5, 2, [0, 1, 2, 3, 4])])
def test_contrast_draws_what_the_condition_raises_among_the_plausible(alpha: float, k: int, plausible: list[int]):
    ids, _ = draw(Sampling(contrast=Contrast(k, alpha)), np.log(TWO))
    expected = np.where(np.isin(np.arange(5), plausible), TWO[0] / TWO[1], 0)
    np.testing.assert_allclose(frequencies(ids), normalized(expected), atol=0.03)


# A user's own processor.


@dataclass(frozen=True)
class Without:
    ids: tuple[int, ...]

    def __call__(self, log_probs, step: Step):
        return log_probs.at[..., jnp.array(self.ids)].set(-jnp.inf)


@dataclass(frozen=True)
class Everything:
    def __call__(self, log_probs, step: Step):
        return jnp.zeros_like(log_probs)


def test_a_processor_of_ones_own_changes_the_distribution():
    ids, log_probs = draw(Sampling(processors=(Without((1,)),)), np.log(PROBS))
    np.testing.assert_allclose(frequencies(ids), normalized(PROBS * [1, 0, 1, 1, 1]), atol=0.03)
    np.testing.assert_allclose(log_probs, np.log(PROBS)[ids], rtol=1e-5)


def test_processors_apply_in_order_and_allow_nothing_that_the_grammar_does_not():
    allowed = np.array([True, True, True, False, False])
    ids, _ = draw(Sampling(processors=(Without((1,)), Everything())), np.log(PROBS), allowed)
    assert set(ids) == {0, 1, 2}
    ids, _ = draw(Sampling(processors=(Everything(), Without((1,)))), np.log(PROBS), allowed)
    assert set(ids) == {0, 2}


# Logits that are no numbers.


def test_a_nan_among_the_allowed_is_told_and_never_drawn():
    logits = np.log(PROBS)
    logits[1] = np.nan
    ids, log_probs = draw(Sampling(), logits, count=100)
    assert np.isnan(log_probs).all()
    assert 1 not in ids
    ids, log_probs = draw(Sampling(), logits, np.array([True, False, True, True, True]), 100)
    assert np.isfinite(log_probs).all()
    ids, log_probs = draw(Sampling(), np.full(5, np.nan), np.array([False, True, False, True, False]), 100)
    assert np.isnan(log_probs).all()
    assert set(ids) <= {1, 3}


def test_infinities_are_very_large():
    logits = np.array([0.0, np.inf, -np.inf, np.inf, 3.0])
    ids, log_probs = draw(Sampling(), logits)
    np.testing.assert_allclose(frequencies(ids), [0, 0.5, 0, 0.5, 0], atol=0.03)
    np.testing.assert_allclose(log_probs, np.log(0.5), rtol=1e-5)


def test_a_processor_that_leaves_nothing_is_told():
    _, log_probs = draw(Sampling(processors=(Without((0, 1, 2, 3, 4)),)), np.log(PROBS), count=3)
    assert np.isnan(log_probs).all()


BAD = [
    (lambda: Sampling(temperature=-1.0), r"sampling.temperature=-1.0 is not a number from 0"),
    (lambda: Sampling(temperature=math.nan), r"sampling.temperature=nan is not a number from 0"),
    (lambda: Sampling(temperature=math.inf), r"sampling.temperature=inf is not a number from 0"),
    (lambda: Sampling(top_p=0.0), r"sampling.top_p=0.0 is outside \(0, 1\]"),
    (lambda: Sampling(top_p=1.1), r"sampling.top_p=1.1 is outside"),
    (lambda: Sampling(top_p=math.nan), r"sampling.top_p=nan is outside"),
    (lambda: Sampling(top_k=-1), r"sampling.top_k=-1 is below 0"),
    (lambda: Guidance(math.nan), "sampling.guidance.scale=nan is not a finite number"),
    (lambda: Contrast(alpha=1.5), "sampling.contrast.alpha=1.5 is outside 0 to 1"),
    (lambda: Contrast(k=-1), "sampling.contrast.k=-1 is below 0"),
    (lambda: Sampling(guidance=Guidance(2.0), contrast=Contrast(1)), "scale=2.0 and sampling.contrast.k=1 exclude"),
    (lambda: Copying(weight=1.5), "sampling.copying.weight=1.5 is outside 0 to 1"),
    (lambda: Copying(sharpness=math.nan), "sampling.copying.sharpness=nan is not a number from 0"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_numbers_are_checked(make, message: str):
    with pytest.raises(InputError, match=message):
        make()
