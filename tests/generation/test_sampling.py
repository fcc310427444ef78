"""Drawing the next id: temperature, nucleus, and true log probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rac3.config import InputError
from rac3.generation.sampling import Sampling, sample

PROBS = np.array([0.05, 0.4, 0.1, 0.25, 0.2])
ALL = jnp.ones(5, bool)


def draw(sampling: Sampling, probs: np.ndarray = PROBS, allowed: jax.Array = ALL, count: int = 10_000):
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probs, jnp.float32)), (count, len(probs)))
    keys = jax.random.split(jax.random.key(0), count)
    ids, log_probs = jax.jit(lambda *args: sample(sampling, *args))(logits, allowed, keys)
    return np.asarray(ids), np.asarray(log_probs)


def frequencies(ids: np.ndarray) -> np.ndarray:
    """Of 10,000 draws: a standard deviation of at most 0.005."""
    return np.bincount(ids, minlength=5) / len(ids)


def test_ids_come_as_often_as_they_are_probable():
    ids, log_probs = draw(Sampling())
    np.testing.assert_allclose(frequencies(ids), PROBS, atol=0.02)
    np.testing.assert_allclose(log_probs, np.log(PROBS)[ids], rtol=1e-5)


def test_temperature_sharpens_and_leaves_the_log_probabilities_true():
    ids, log_probs = draw(Sampling(temperature=0.5))
    np.testing.assert_allclose(frequencies(ids), PROBS**2 / (PROBS**2).sum(), atol=0.02)
    np.testing.assert_allclose(log_probs, np.log(PROBS)[ids], rtol=1e-5)


def test_temperature_zero_takes_the_best_allowed_id():
    ids, log_probs = draw(Sampling(temperature=0.0), allowed=jnp.array([True, False, True, False, True]), count=3)
    assert ids.tolist() == [4, 4, 4]
    np.testing.assert_allclose(log_probs, np.log(0.2 / 0.35), rtol=1e-5)  # among what is allowed


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.01, [1]), (0.39, [1]), (0.5, [1, 3]), (0.66, [1, 3, 4]), (0.94, [1, 2, 3, 4])]
)
def test_the_nucleus_is_the_smallest_set_of_that_probability(top_p: float, kept: list[int]):
    ids, log_probs = draw(Sampling(top_p=top_p))
    expected = np.where(np.isin(np.arange(5), kept), PROBS, 0)
    np.testing.assert_allclose(frequencies(ids), expected / expected.sum(), atol=0.02)
    assert set(ids) == set(kept)
    np.testing.assert_allclose(log_probs, np.log(PROBS)[ids], rtol=1e-5)


def test_temperature_comes_before_the_nucleus():
    """Squared, the probabilities are 0.58, 0.23, 0.15, ...: two ids reach 0.7 rather than three."""
    assert set(draw(Sampling(temperature=0.5, top_p=0.7))[0]) == {1, 3}


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_p=0.9), Sampling(temperature=0.0)])
def test_an_id_that_is_not_allowed_is_never_drawn(sampling: Sampling):
    allowed = jnp.array([True, False, False, False, True])
    ids, log_probs = draw(sampling, allowed=allowed, count=2000)
    assert set(ids) <= {0, 4}
    np.testing.assert_allclose(log_probs, np.log(np.where(ids == 0, 0.2, 0.8)), rtol=1e-5)


def test_a_row_draws_from_its_own_key():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)
    keys = jax.random.split(jax.random.key(1), 6)
    ids, _ = sample(Sampling(top_p=0.9), logits, ALL, keys)
    order = np.array([3, 1, 5])
    some, _ = sample(Sampling(top_p=0.9), logits[order], ALL, keys[order])
    np.testing.assert_array_equal(some, ids[order])


@pytest.mark.parametrize("fields", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_fields_are_checked(fields: dict[str, float]):
    ((name, value),) = fields.items()
    with pytest.raises(InputError, match=f"sampling.{name}={value}"):
        Sampling(**fields)
