"""Rotary offsets: attention depends on how far apart places are, and first heads look one place ahead."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_transformer import plain_turns

from rac3.config import InputError
from rac3.model.rotary import aligned_bias, rotate, rotation
from rac3.model.transformer import TransformerConfig

CONFIG = TransformerConfig(
    num_layers=2, embed=64, num_heads=4, mlp=64, dtype="float32", remat="none", rotary_offsets=True
)


@pytest.mark.parametrize(("head_dim", "longest"), [(8, 9), (32, 256), (80, 1024)])
def test_products_depend_on_the_distance_alone(head_dim: int, longest: int):
    """Of a query at place m and a key at n: the sum over pairs of Re(q conj(k) e^(i f (m - n))), and the rest as is."""
    query, key = np.random.default_rng(0).normal(size=(2, head_dim))
    places = np.array([[0, 1, 2, 7, longest - 1, longest]])

    def turned(x: np.ndarray) -> np.ndarray:
        heads = jnp.asarray(np.broadcast_to(x, (1, 6, 1, head_dim)), jnp.float32)
        return np.float64(rotate(heads, rotation(jnp.asarray(places), head_dim, longest))[0, :, 0])

    got = turned(query) @ turned(key).T
    pairs, (turn,) = head_dim // 4, plain_turns(np.ones(1), head_dim, longest)
    q, k = (x[:pairs] + 1j * x[pairs : 2 * pairs] for x in (query, key))
    apart = (places[0][:, None] - places[0])[..., None]
    expected = (q * k.conj() * np.exp(1j * turn * apart)).real.sum(-1) + query[2 * pairs :] @ key[2 * pairs :]
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-7 * longest * head_dim)  # angles of 3 longest in float32


def test_without_rotary_offsets_nothing_turns():
    x = jnp.ones((1, 2, 3, 8))
    assert rotate(x, None) is x
    model = dataclasses.replace(CONFIG, rotary_offsets=False).build(64, 16, 9)
    assert model.rotation(jnp.ones((1, 2), jnp.int32)) is None


def test_bfloat16_turns_in_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 1, 8)), jnp.bfloat16)
    got = rotate(x, rotation(jnp.full((1, 1), 9), 8, 9))
    assert got.dtype == jnp.bfloat16
    exact = rotate(x.astype(jnp.float32), rotation(jnp.full((1, 1), 9), 8, 9))
    np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize(("head_dim", "longest"), [(16, 9), (32, 64), (32, 256), (80, 1024)])
def test_two_heads_begin_by_looking_one_place_ahead(head_dim: int, longest: int):
    """Of all places, the next one has the highest logit, e^6 times as probable as the two next to it."""
    bias = aligned_bias(5, head_dim, longest)
    assert bias.shape == (3, 5, head_dim)
    assert not bias[:, 2:].any()
    assert not bias[2].any()
    places = jnp.arange(longest + 1)[None]
    turn = rotation(places, head_dim, longest)
    query, key = (
        np.float64(rotate(jnp.broadcast_to(each, (1, longest + 1, 5, head_dim)), turn)[0]) for each in bias[:2]
    )
    for head in (0, 1):
        logits = query[:, head] @ key[:, head].T / head_dim**0.5
        np.testing.assert_array_equal(logits[:-1].argmax(-1), np.arange(1, longest + 1))
        for place in (1, longest - 2):
            next_to = logits[place, place + 1] - logits[place, [place, place + 2]]
            np.testing.assert_allclose(next_to, 6, atol=1e-3)


def test_a_new_model_has_these_biases_in_each_layer():
    model = CONFIG.build(64, 16, 9)
    ids = jnp.zeros((1, 2), jnp.int32)
    params = nn.unbox(model.init(jax.random.key(0), ids, ids, ids, ids))["params"]
    got = params["blocks"]["attention"]["qkv_bias"]
    np.testing.assert_array_equal(got, np.stack([aligned_bias(4, 16, 9)] * 2))
    assert not any(params["blocks"][name]["bias"].any() for name in ("mlp_in", "mlp_out"))


def test_heads_too_small_to_turn_are_refused():
    with pytest.raises(InputError, match=r"model.embed=64 gives model.num_heads=16 heads less than 8; use fewer heads"):
        dataclasses.replace(CONFIG, num_heads=16)
    dataclasses.replace(CONFIG, num_heads=8)
