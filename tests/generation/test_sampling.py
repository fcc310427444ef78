"""Drawing the next id: temperature, nucleus, and true log probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rac3.config import InputError
from rac3.generation.sampling import Sampling, Step, sample

PROBS = np.array([0.05, 0.4, 0.1, 0.25, 0.2])
ALL = jnp.ones(5, bool)


def draw(sampling: Sampling, probs: np.ndarray = PROBS, allowed: jax.Array = ALL, count: int = 10_000):
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probs, jnp.float32)), (1, 1, count, len(probs)))
    keys = jax.random.split(jax.random.key(0), count)[None]
    masks = jnp.broadcast_to(allowed, (1, *logits.shape[2:]))
    ids, log_probs = jax.jit(sample)(sampling.build(), logits, masks, nothing(1, count), keys)
    return np.asarray(ids)[0], np.asarray(log_probs)[0]


def nothing(requests: int, samples: int) -> Step:
    """An empty prompt, and no ids yet."""
    each = jnp.zeros((requests, samples), jnp.int32)
    return Step(each[:, :0], each[:, :0], each[:, 0], each[..., None], each[..., None], each, each)


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
    logits = jnp.asarray(rng.normal(size=(3, 1, 2, 5)), jnp.float32)
    keys = jax.random.split(jax.random.key(1), (3, 2))
    sampler = Sampling(top_p=0.9).build()
    each = jax.tree.map(lambda leaf: jnp.repeat(leaf, 3), sampler)
    ids, _ = sample(each, logits, jnp.ones((3, 2, 5), bool), nothing(3, 2), keys)
    some, _ = sample(sampler, logits[2:], jnp.ones((1, 2, 5), bool), nothing(1, 2), keys[2:])
    np.testing.assert_array_equal(some, ids[2:])


def test_requests_of_one_batch_have_their_own_numbers():
    """Temperature 0 next to 1, and a nucleus of one id next to all; each as in a batch of its own."""
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(PROBS, jnp.float32)), (3, 1, 50, 5))
    keys = jax.random.split(jax.random.key(0), (3, 50))
    samplers = [Sampling(0.0, 0.9).build(), Sampling(1.0, 0.3).build(), Sampling(1.0, 0.99).build()]
    together = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *samplers)
    ids, _ = sample(together, logits, jnp.ones((3, 50, 5), bool), nothing(3, 50), keys)
    assert set(ids[0].tolist()) == set(ids[1].tolist()) == {1}
    assert set(ids[2].tolist()) > {1}
    for row, sampler in enumerate(samplers):
        alone, _ = sample(sampler, logits[:1], jnp.ones((1, 50, 5), bool), nothing(1, 50), keys[row : row + 1])
        np.testing.assert_array_equal(alone[0], ids[row])


def test_the_probabilities_of_several_prompts_are_averaged():
    """Two prompts, of which the second has the probabilities in reverse."""
    both = np.log(np.stack([PROBS, PROBS[::-1]]))[None, :, None].repeat(10_000, axis=2)
    keys = jax.random.split(jax.random.key(0), (1, 10_000))
    masks = jnp.ones((1, 10_000, 5), bool)
    ids, log_probs = sample(Sampling().build(), jnp.float32(both), masks, nothing(1, 10_000), keys)
    expected = (PROBS + PROBS[::-1]) / 2
    np.testing.assert_allclose(frequencies(np.asarray(ids[0])), expected, atol=0.02)
    np.testing.assert_allclose(log_probs[0], np.log(expected)[ids[0]], rtol=1e-5)


def test_other_numbers_compile_nothing():
    compiled = jax.jit(lambda *args: sample(*args))
    given = (
        jnp.zeros((1, 1, 2, 5)),
        jnp.ones((1, 2, 5), bool),
        nothing(1, 2),
        jax.random.split(jax.random.key(0), (1, 2)),
    )
    for sampling in (Sampling(0.0, 0.9), Sampling(1.0, 0.5), Sampling(0.3, 0.7)):
        compiled(sampling.build(), *given)
    assert compiled._cache_size() == 1


@pytest.mark.parametrize("fields", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_fields_are_checked(fields: dict[str, float]):
    ((name, value),) = fields.items()
    with pytest.raises(InputError, match=f"sampling.{name}={value}"):
        Sampling(**fields)
