"""Decoding against the forward pass over whole sequences, and what its compiled program copies."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_transformer import plain_logits, plain_turns, random_params

from rac3.model.decoder import Cache, Decoder, Endings
from rac3.model.transformer import Transformer, TransformerConfig

CONFIG = TransformerConfig(num_layers=2, embed=32, num_heads=4, mlp=48, dtype="float32", remat="none")
VOCAB, POSITIONS, IMAGE, CHUNK = 128, 40, 9, 8
# float32 against float64, of the largest logit: sums of up to 128 terms, ten of which follow each other
EPS = 1e-5


def prefilled(decoder: Decoder, weights: Any, tokens: np.ndarray, offsets: np.ndarray, slots: int) -> Cache:
    """The prefix cache of prompts of one width, a multiple of the chunk."""
    cache = decoder.empty_prefix(len(tokens), slots)
    prefill = jax.jit(decoder.prefill)
    for start in range(0, tokens.shape[1], CHUNK):
        chunk = slice(start, start + CHUNK)
        cache = prefill(weights, cache, tokens[:, chunk], offsets[:, chunk], start)
    return cache


def cached_logits(
    model: Transformer,
    params: Any,
    tokens: np.ndarray,
    offsets: np.ndarray,
    lengths: list[int],
    begun: list[int],
    ring: int,
) -> np.ndarray:
    """Logits after each id that follows the prompts, [streams, samples, ids, vocab].

    Args:
      tokens, offsets: [streams, samples, ids]; the first `lengths` are the prompt, the same for all samples.
      begun: the step at which each stream feeds the first id after its prompt; what it feeds before is garbage.
    """
    decoder = Decoder(model)
    weights = decoder.weights(params)
    streams, samples, ids = tokens.shape
    width = -(-max(lengths) // CHUNK) * CHUNK
    of_prompts = [
        np.where(np.arange(width) < np.array(lengths)[:, None], x[:, 0, :width], 7) for x in (tokens, offsets)
    ]
    prefix = prefilled(decoder, weights, *of_prompts, width + CHUNK)
    own, step = decoder.empty_own(streams, samples, ring), jax.jit(decoder.step)
    found = np.zeros((streams, samples, ids, model.vocab_size), np.float32)
    for number in range(min(begun), max(begun) + ids - min(lengths)):
        place = np.minimum(np.array(lengths) + number - np.array(begun), ids - 1)
        each = np.arange(streams)
        fed = [np.asarray(x[each, :, place], np.int32) for x in (tokens, offsets)]
        positions = np.broadcast_to(place[:, None], (streams, samples))
        logits, own = step(weights, prefix, own, np.array(lengths), np.array(begun), number, fed[0], positions, fed[1])
        for stream in range(streams):
            if begun[stream] <= number < begun[stream] + ids - lengths[stream]:
                found[stream, :, place[stream]] = logits[stream]
    return found


@pytest.mark.parametrize(("offset_embedding", "rotary"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize(("streams", "samples"), [(1, 1), (3, 1), (1, 4), (2, 3)])
def test_prefill_and_steps_have_the_logits_of_plain_numpy(offset_embedding, rotary, streams, samples):
    """Prompts of 13, 16 and 3 ids in chunks of 8, whose samples go on differently. The streams begin at different
    steps, and the ring of 28 slots wraps around. Embeddings are small, so that the norms' epsilon counts."""
    config = TransformerConfig(**{**vars(CONFIG), "offset_embedding": offset_embedding, "rotary_offsets": rotary})
    model = config.build(VOCAB, POSITIONS, IMAGE)
    params = random_params(model)
    for name in ("token_embedding", "position_embedding", "offset_embedding")[: 3 if offset_embedding else 2]:
        params["params"][name] /= 50
    rng = np.random.default_rng(0)
    lengths, begun = [13, 16, 3][:streams], [10, 12, 11][:streams]
    tokens = rng.integers(0, VOCAB, (streams, samples, 30)).astype(np.int32)
    offsets = rng.integers(0, IMAGE + 1, tokens.shape).astype(np.int32)
    for stream, length in enumerate(lengths):
        for x in (tokens, offsets):
            x[stream, :, :length] = x[stream, 0, :length]
    got = cached_logits(model, params, tokens, offsets, lengths, begun, ring=28)
    for stream, sample in np.ndindex(streams, samples):
        own = [x[stream, sample] for x in (tokens, offsets)]
        turns = plain_turns(own[1], 8, IMAGE) if rotary else None
        expected = plain_logits(params, 4, own[0], own[1] if offset_embedding else None, turns)[lengths[stream] :]
        atol = EPS * np.abs(expected).max()
        np.testing.assert_allclose(got[stream, sample, lengths[stream] :], expected, rtol=0, atol=atol)


def test_cached_decoding_has_the_logits_of_transformers_opt(opt):
    """A prompt of 5, then one by one."""
    model, params, logits = opt
    tokens = np.random.default_rng(0).integers(1, VOCAB, 12).astype(np.int32)
    expected = logits(tokens)
    got = cached_logits(model, params, tokens[None, None], np.zeros((1, 1, 12), np.int32), [5], [0], ring=7)
    np.testing.assert_allclose(got[0, 0, 5:], expected[5:], rtol=0, atol=EPS * np.abs(expected).max())


def test_bfloat16_is_read_as_bfloat16_and_the_norms_as_float32():
    model = TransformerConfig(**{**vars(CONFIG), "dtype": "bfloat16"}).build(VOCAB, POSITIONS, IMAGE)
    params, decoder = random_params(model), Decoder(model)
    weights = decoder.weights(params)
    of_norms = {leaf.dtype for path, leaf in jax.tree.leaves_with_path(weights) if "norm" in str(path)}
    others = {leaf.dtype for path, leaf in jax.tree.leaves_with_path(weights) if "norm" not in str(path)}
    assert (of_norms, others) == ({jnp.dtype("float32")}, {jnp.dtype("bfloat16")})
    assert {leaf.dtype for leaf in jax.tree.leaves(decoder.empty_own(1, 2, 8))} == {jnp.dtype("bfloat16")}
    tokens = np.random.default_rng(0).integers(0, VOCAB, (1, 1, 20)).astype(np.int32)
    offsets = np.zeros_like(tokens)
    got = cached_logits(model, params, tokens, offsets, [9], [0], ring=16)[0, 0, 9:]
    places = np.arange(20, dtype=np.int32)[None]
    hidden: Any = jax.jit(model.apply)(params, tokens[0], places, offsets[0], np.ones_like(tokens[0]))
    expected = np.asarray(model.apply(params, hidden, method="logits"))[0, 9:]
    assert np.abs(got - expected).max() < 0.04 * np.abs(expected).max()  # 8 bits, in two orders of summation


@pytest.mark.parametrize(
    ("streams", "samples", "endings"), [(1, 1, 0), (3, 1, 0), (1, 4, 0), (2, 3, 0), (1, 2, 2), (2, 4, 2)]
)
def test_a_step_copies_neither_caches_nor_weights(streams, samples, endings):
    """Read off the compiled program of a loop of steps: what it copies, transposes, slices or concatenates is smaller
    than any cache or matrix. Before the loop, nothing of a donated cache is copied either."""
    config = TransformerConfig(num_layers=2, embed=128, num_heads=2, mlp=256, dtype="float32", remat="none")
    model = config.build(256, 300, IMAGE)
    decoder = Decoder(model)
    weights = decoder.weights(random_params(model))
    prefix, own = decoder.empty_prefix(streams, 160), decoder.empty_own(streams, samples, 140)
    ids = jnp.zeros((streams, samples), jnp.int32)
    of_stream = jnp.zeros(streams, jnp.int32)
    ended = None
    if endings:
        ended = Endings(decoder.empty_prefix(streams * endings, 150), jnp.zeros((streams, endings), jnp.int32))

    def loop(weights, prefix, ended, own, ids, steps):
        def body(carry):
            step, own, ids = carry
            each = of_stream, of_stream, step, ids, 0 * ids + step, 0 * ids
            logits, own = decoder.step(weights, prefix, own, *each, ended)
            return step + 1, own, jnp.argmax(logits, -1).astype(jnp.int32)

        return jax.lax.while_loop(lambda carry: carry[0] < steps, body, (0, own, ids))

    program = jax.jit(loop, donate_argnums=3).lower(weights, prefix, ended, own, ids, 3).compile().as_text()
    moved = re.findall(r"= f32\[([\d,]*)\]\S* (?:copy|transpose|slice|dynamic-slice|concatenate|pad)\(", program)
    largest = max(math.prod(map(int, dims.split(","))) for dims in moved if dims)
    assert largest < 128 * 128 < 128 * 140
    scores, projected = 2 * (300 + (150 if endings else 0)), 3 * 128  # of a sample; the latter are qkv
    assert largest <= streams * samples * max(scores, projected)
