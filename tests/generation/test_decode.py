"""Cached decoding against computing everything again for each id, and what the grammars allow."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rac3.config import InputError
from rac3.generation import decode
from rac3.generation.decode import Generated, Grammar, caption_grammar, generate, image_grammar
from rac3.generation.sampling import Sampling
from rac3.model.transformer import TransformerConfig
from rac3.tokens.html import Segment, encode, segment_offsets
from rac3.tokens.vocabulary import END_OF_INFILL, EOD, IMAGE_ALT, IMAGE_SOURCE, Vocabulary

VOCABULARY = Vocabulary(text_size=40, image_size=30)
POSITIONS, IMAGE = 64, 9
MODEL = TransformerConfig(
    num_layers=2, embed=32, num_heads=4, mlp=48, dtype="float32", remat="none", init_std=0.2
).build(VOCABULARY.padded_size, POSITIONS, POSITIONS)
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def params():
    ids = jnp.zeros((1, 2), jnp.int32)
    return nn.unbox(jax.jit(MODEL.init)(jax.random.key(0), ids, ids, ids, ids))


@pytest.fixture(scope="module")
def prompts() -> list[np.ndarray]:
    """Of 8, 28 and 12 ids; the second one has an image in it."""
    rng = np.random.default_rng(0)
    retrieved = encode(
        VOCABULARY, [Segment(False, rng.integers(0, 40, 7)), Segment(True, rng.integers(0, 30, IMAGE))]
    ).ids
    ends = [VOCABULARY.from_text(rng.integers(0, 40, size)) for size in (5, 4, 9)]
    start = ([EOD], [EOD, *retrieved], [EOD])
    return [
        np.array([*before, IMAGE_ALT, *end, IMAGE_SOURCE], np.int32) for before, end in zip(start, ends, strict=True)
    ]


def keys(count: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), count)


@pytest.fixture(scope="module")
def log_probs_of(params):
    """Log probabilities over `allowed` at the last of `length` ids, with no cache."""

    @jax.jit
    def last(tokens, offsets, length, allowed):
        segments = (jnp.arange(POSITIONS) < length).astype(jnp.int32)[None]
        places = jnp.arange(POSITIONS)[None]
        hidden, _ = MODEL.apply(params, tokens[None], places, offsets[None], segments)
        logits = MODEL.apply(params, hidden[0, length - 1], method="logits")
        return jax.nn.log_softmax(jnp.where(allowed, logits, -jnp.inf))

    def of(ids: np.ndarray, grammar: Grammar) -> np.ndarray:
        tokens, offsets = np.zeros((2, POSITIONS), np.int32)
        tokens[: len(ids)], offsets[: len(ids)] = ids, segment_offsets(VOCABULARY, ids)
        return np.asarray(last(tokens, offsets, len(ids), grammar.allowed))

    return of


def greedy(log_probs_of, prompt: np.ndarray, grammar: Grammar) -> tuple[list[int], float]:
    """The oracle: the whole sequence again for each id."""
    ids: list[int] = []
    terms = []
    while len(ids) < grammar.count:
        log_probs = log_probs_of(np.array([*prompt, *ids], np.int32), grammar)
        best = int(log_probs.argmax())
        terms.append(float(log_probs[best]))
        if best == grammar.stop:
            break
        ids.append(best)
    return ids, float(np.mean(terms))


def test_the_grammars_by_hand():
    """Text ids are 8 to 47, image ids 48 to 77 (of 94, in a table of 128), and `<eoi>` is 5."""
    image, caption = image_grammar(VOCABULARY, IMAGE), caption_grammar(VOCABULARY, 10)
    np.testing.assert_array_equal(np.flatnonzero(image.allowed), np.arange(48, 78))
    assert (image.count, image.stop) == (IMAGE, -1)
    np.testing.assert_array_equal(np.flatnonzero(caption.allowed), [5, *range(8, 48)])
    assert (caption.count, caption.stop) == (10, 5)
    assert len(image.allowed) == len(caption.allowed) == 128


@pytest.mark.parametrize("kind", ["image", "caption"])
def test_greedy_decoding_is_the_best_id_again_and_again(params, prompts, log_probs_of, kind):
    grammar = image_grammar(VOCABULARY, IMAGE) if kind == "image" else caption_grammar(VOCABULARY, 10)
    out = generate(MODEL, params, VOCABULARY, prompts, grammar, GREEDY, keys(3))
    for prompt, ids, mean in zip(prompts, out.ids, out.mean_log_prob, strict=True):
        expected, expected_mean = greedy(log_probs_of, prompt, grammar)
        assert ids.tolist() == expected
        assert mean == pytest.approx(expected_mean, abs=1e-4)  # float32 logits of scale 10 in two orders of summation


def test_an_image_is_exactly_its_grid(params, prompts):
    out = generate(MODEL, params, VOCABULARY, prompts, image_grammar(VOCABULARY, IMAGE), Sampling(), keys(3))
    assert all(ids.shape == (IMAGE,) and VOCABULARY.is_image(ids).all() for ids in out.ids)
    assert len({tuple(ids) for ids in out.ids}) == 3


@pytest.fixture(scope="module")
def captions(params, prompts) -> Generated:
    """Sixty samples of one prompt."""
    return generate(MODEL, params, VOCABULARY, [prompts[1]] * 60, caption_grammar(VOCABULARY, 10), Sampling(), keys(60))


def test_a_caption_is_text_until_the_end_of_infill(captions, prompts, log_probs_of):
    """And its mean log probability is that of its ids and the stop id, by the plain model."""
    grammar = caption_grammar(VOCABULARY, 10)
    lengths = [len(ids) for ids in captions.ids]
    assert all(VOCABULARY.is_text(ids).all() for ids in captions.ids)
    assert min(lengths) < 10  # some stop
    rows = {length: row for row, length in enumerate(lengths)}
    assert any(0 < length < 10 for length in rows)
    for row in rows.values():
        ids = captions.ids[row].tolist()
        targets = [*ids, END_OF_INFILL] if len(ids) < 10 else ids
        terms = [
            log_probs_of(np.array([*prompts[1], *ids[:place]], np.int32), grammar)[target]
            for place, target in enumerate(targets)
        ]
        assert captions.mean_log_prob[row] == pytest.approx(np.mean(terms), abs=1e-4)


def test_samples_follow_the_distribution(captions, prompts, log_probs_of):
    """The first id of sixty samples: their mean log probability is minus the entropy, within 5 standard errors."""
    log_probs = log_probs_of(prompts[1], caption_grammar(VOCABULARY, 10))
    finite = np.isfinite(log_probs)
    probs = np.exp(log_probs[finite])
    mean = (probs * log_probs[finite]).sum()
    deviation = np.sqrt((probs * (log_probs[finite] - mean) ** 2).sum() / 60)
    first = [int(ids[0]) if len(ids) else END_OF_INFILL for ids in captions.ids]
    assert log_probs[first].mean() == pytest.approx(mean, abs=5 * float(deviation))


def test_a_row_does_not_depend_on_its_batch(params, prompts):
    """Other rows, another order, other widths, and batches of another size."""
    grammar, each = caption_grammar(VOCABULARY, 6), keys(3)
    together = generate(MODEL, params, VOCABULARY, prompts, grammar, Sampling(), each)
    split = generate(MODEL, params, VOCABULARY, prompts, grammar, Sampling(), each, batch=2)
    order = np.array([2, 0])
    some = [prompts[i] for i in order]
    turned = generate(MODEL, params, VOCABULARY, some, grammar, Sampling(), each[order])
    same = Generated([together.ids[i] for i in order], together.mean_log_prob[order])
    for one, other in [(together, split), (same, turned)]:
        assert [ids.tolist() for ids in one.ids] == [ids.tolist() for ids in other.ids]
        np.testing.assert_allclose(one.mean_log_prob, other.mean_log_prob, atol=1e-4)


@pytest.fixture(scope="module")
def long_prompt() -> np.ndarray:
    """Of 60 of the 64 positions."""
    text = VOCABULARY.from_text(np.random.default_rng(1).integers(0, 40, 57))
    return np.array([EOD, IMAGE_ALT, *text, IMAGE_SOURCE], np.int32)


TEXT_ALONE = replace(caption_grammar(VOCABULARY, 10), allowed=VOCABULARY.is_text(np.arange(128)))  # it never stops


def test_a_row_ends_with_its_context_and_others_continue(params, prompts, long_prompt, log_probs_of):
    """After 4 ids, whose mean log probability it has."""
    both = [long_prompt, prompts[0]]
    out = generate(MODEL, params, VOCABULARY, both, TEXT_ALONE, GREEDY, keys(2))
    for prompt, ids, mean, count in zip(both, out.ids, out.mean_log_prob, (4, 10), strict=True):
        expected, expected_mean = greedy(log_probs_of, prompt, replace(TEXT_ALONE, count=count))
        assert ids.tolist() == expected
        assert len(ids) == count
        assert mean == pytest.approx(expected_mean, abs=1e-4)


def test_rows_of_each_batch_have_their_own_limits(params, prompts, long_prompt):
    both = [prompts[0], long_prompt]
    out = generate(MODEL, params, VOCABULARY, both, TEXT_ALONE, GREEDY, keys(2), batch=1)
    assert [len(ids) for ids in out.ids] == [10, 4]


def test_rows_that_have_ended_look_up_no_position_out_of_range(
    params, prompts, long_prompt, monkeypatch: pytest.MonkeyPatch
):
    """Such a look-up gives NaN, which would be in what is decoded unseen."""
    decoded, real = [], decode._decode

    def watched(*given):
        decoded.append(real(*given))
        return decoded[-1]

    monkeypatch.setattr(decode, "_decode", watched)
    generate(MODEL, params, VOCABULARY, [long_prompt, prompts[0]], TEXT_ALONE, GREEDY, keys(2))
    ((_, log_probs),) = decoded
    assert log_probs.shape == (2, 10)
    assert np.isfinite(log_probs).all()


def test_a_caption_of_one_id_is_the_best_one(params, prompts, log_probs_of):
    grammar = caption_grammar(VOCABULARY, 1)
    out = generate(MODEL, params, VOCABULARY, prompts, grammar, GREEDY, keys(3))
    for prompt, ids, mean in zip(prompts, out.ids, out.mean_log_prob, strict=True):
        expected, expected_mean = greedy(log_probs_of, prompt, grammar)
        assert ids.tolist() == expected
        assert mean == pytest.approx(expected_mean, abs=1e-4)
    assert any(len(ids) == 1 for ids in out.ids)


def test_each_id_is_drawn_with_its_own_noise(params, prompts):
    """A model of zeros gives all 30 codes the same probability after any prompt. Ids of two steps, or of two rows, are
    then equal 1 time in 30: of 9,216 and 2,295 pairs, within 5 deviations."""
    zeros, grammar = jax.tree.map(np.zeros_like, params), image_grammar(VOCABULARY, IMAGE)
    out = generate(MODEL, zeros, VOCABULARY, [prompts[0]] * 256, grammar, Sampling(), keys(256))
    ids = np.stack(out.ids)
    steps = [(ids[:, one] == ids[:, other]).mean() for one in range(IMAGE) for other in range(one)]
    assert np.mean(steps) == pytest.approx(1 / 30, abs=0.0095)
    assert max(steps) < 0.1
    assert (ids[1:] == ids[:-1]).mean() == pytest.approx(1 / 30, abs=0.019)
    counts = np.bincount(ids.ravel() - VOCABULARY.image_start, minlength=30)
    assert ((counts - 76.8) ** 2 / 76.8).sum() < 72  # chi-square of 29 degrees of freedom: above it 2 in 100,000 times
    np.testing.assert_allclose(out.mean_log_prob, -np.log(30), rtol=1e-5)


def test_a_prompt_that_leaves_no_room_is_refused(params):
    prompt = np.full(POSITIONS - IMAGE + 1, 9, np.int32)
    with pytest.raises(InputError, match=r"a prompt of 56 tokens and 9 to generate exceed the 64 positions"):
        generate(MODEL, params, VOCABULARY, [prompt], image_grammar(VOCABULARY, IMAGE), GREEDY, keys(1))
    full = np.full(POSITIONS, 9, np.int32)
    with pytest.raises(InputError, match=r"a prompt of 64 tokens and 1 to generate exceed the 64 positions"):
        generate(MODEL, params, VOCABULARY, [full], caption_grammar(VOCABULARY, 5), GREEDY, keys(1))
    out = generate(MODEL, params, VOCABULARY, [prompt[1:]], image_grammar(VOCABULARY, IMAGE), GREEDY, keys(1))
    assert len(out.ids[0]) == IMAGE


def test_prompts_are_padded_within_the_positions_of_the_model(params, log_probs_of):
    """A prompt of 40 ids would be padded to 64, of which there are 60."""
    table = params["params"]["position_embedding"][:60]
    cropped = {"params": {**params["params"], "position_embedding": table}}
    ids = np.random.default_rng(0).integers(0, 40, 37)
    prompt = np.array([EOD, IMAGE_ALT, *VOCABULARY.from_text(ids), IMAGE_SOURCE], np.int32)
    grammar = image_grammar(VOCABULARY, IMAGE)
    out = generate(MODEL.clone(max_positions=60), cropped, VOCABULARY, [prompt], grammar, GREEDY, keys(1))
    expected, mean = greedy(log_probs_of, prompt, grammar)
    assert out.ids[0].tolist() == expected
    assert out.mean_log_prob[0] == pytest.approx(mean, abs=1e-4)


def test_a_longer_text_than_the_model_is_trained_on_is_refused(params, prompts):
    """Positions inside a text have rows in a table, which a longer text would leave."""
    short = MODEL.clone(max_segment_tokens=9)
    with pytest.raises(InputError, match=r"a text of 10 tokens, given or to generate, exceeds the 9"):
        generate(short, params, VOCABULARY, prompts, caption_grammar(VOCABULARY, 10), GREEDY, keys(3))
    prompt = np.array([EOD, IMAGE_ALT, *VOCABULARY.from_text(np.zeros(11, int)), IMAGE_SOURCE], np.int32)
    with pytest.raises(InputError, match=r"a text of 11 tokens, given or to generate, exceeds the 9"):
        generate(short, params, VOCABULARY, [prompt], image_grammar(VOCABULARY, IMAGE), GREEDY, keys(1))


def test_a_text_as_long_as_those_the_model_is_trained_on_is_taken(params, prompts):
    """Of 9 ids in the prompt, for a table of 9 places and that of markup."""
    short = MODEL.clone(max_segment_tokens=9)
    rows = {"params": {**params["params"], "offset_embedding": params["params"]["offset_embedding"][:10]}}
    grammar = caption_grammar(VOCABULARY, 2)
    few, all_of_them = (
        generate(model, some, VOCABULARY, prompts[2:], grammar, GREEDY, keys(1))
        for model, some in ((short, rows), (MODEL, params))
    )
    np.testing.assert_array_equal(few.ids[0], all_of_them.ids[0])
