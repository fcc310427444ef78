"""Copying from documents: by hand, and against loops over all places."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rac3.generation.copying import Copying
from rac3.generation.prompts import Piece, sequence
from rac3.generation.step import Step
from rac3.tokens.html import Sequenced
from rac3.tokens.vocabulary import END_OF_INFILL, EOD, IMAGE_ALT, IMAGE_END, IMAGE_SOURCE, Vocabulary

VOCABULARY = Vocabulary(text_size=12, image_size=6)  # text ids are 8 to 19, image codes 20 to 25, sentinels from 26
WIDTH = 3
TEXT = np.isin(np.arange(42), [END_OF_INFILL, *range(8, 20)])
IMAGE = np.isin(np.arange(42), range(20, 26))
MASK = 26


def words(*ids: int, offset: int = 1) -> Piece:
    return np.array(ids) + 8, offset


def codes(*ids: int, offset: int = 1) -> Piece:
    return np.array(ids) + 20, offset


def document(text: Piece, image: Piece) -> list[Piece]:
    return [IMAGE_ALT, text, IMAGE_SOURCE, image, IMAGE_END, EOD]


def step(prompts: list[list[Piece]], drawn: list[Piece], offset: int) -> Step:
    """One request of one sample, padded."""
    parts = [sequence(prompt) for prompt in prompts]
    tokens, offsets = np.zeros((2, 1, len(parts), 72), np.int32)
    for row, part in enumerate(parts):
        tokens[0, row, : len(part.ids)], offsets[0, row, : len(part.ids)] = part
    after = sequence(drawn) if drawn else Sequenced(np.zeros(0, np.int32), np.zeros(0, np.int32))
    ids, places = np.zeros((2, 1, 1, 12), np.int32)
    ids[..., : len(after.ids)], places[..., : len(after.ids)] = after
    lengths = np.array([[len(part.ids) for part in parts]])
    arrays = [
        jnp.asarray(x, jnp.int32) for x in (tokens, offsets, lengths, ids, places, [[len(after.ids)]], [[offset]])
    ]
    return Step(*arrays, vocabulary=VOCABULARY, image_width=WIDTH)


mixed = jax.jit(lambda copying, log_probs, now: copying(log_probs, now))


def copied(now: Step, allowed: np.ndarray, sharpness: float = 1.0) -> np.ndarray:
    """The probabilities of weight 1, which are those of the documents alone."""
    log_probs = jnp.log(jnp.asarray(allowed / allowed.sum(), jnp.float32))[None, None]
    return np.exp(mixed(Copying(1.0, sharpness), log_probs, now))[0, 0]


def some(**probs: float) -> np.ndarray:
    """Probabilities by id: w3 is the text id 3, c3 the code 3, and eoi `<eoi>`."""
    out = np.zeros(42)
    for name, value in probs.items():
        out[END_OF_INFILL if name == "eoi" else int(name[1:]) + (8 if name[0] == "w" else 20)] = value
    return out


E = np.exp(1.0)
CAPTION = [IMAGE_ALT, MASK, IMAGE_SOURCE, codes(*[0] * 9), IMAGE_END, MASK]
DOCUMENTS = [EOD, *document(words(1, 2, 3), codes(*range(6), 0, 1, 2)), *document(words(4, 2, 5, 2), codes(*[5] * 9))]


def test_a_word_follows_the_words_that_precede_it():
    """2 precedes 3, 5 and the end. As "1 2" begins a text, all of what is before 3 matches, up to the edge."""
    now = step([[*DOCUMENTS, *CAPTION]], [words(1, 2)], 3)
    total = E**16 + E + E
    np.testing.assert_allclose(copied(now, TEXT), some(w3=E**16 / total, w5=E / total, eoi=E / total), rtol=1e-4)
    now = step([[*DOCUMENTS, *CAPTION]], [words(7, 5, 2)], 4)
    total = E + E + E**2
    np.testing.assert_allclose(copied(now, TEXT), some(w3=E / total, w5=E / total, eoi=E**2 / total), rtol=1e-4)


def test_a_text_begins_as_those_of_documents_do():
    np.testing.assert_allclose(copied(step([[*DOCUMENTS, *CAPTION]], [], 1), TEXT), some(w1=0.5, w4=0.5), rtol=1e-4)


def test_words_before_a_mask_are_those_before_what_is_drawn():
    """<img alt=" 4 <mask:0> : 2 follows 4."""
    main = [IMAGE_ALT, words(4), MASK, words(9, offset=5), IMAGE_SOURCE, codes(*[0] * 9), IMAGE_END, MASK]
    np.testing.assert_allclose(copied(step([[*DOCUMENTS, *main]], [], 2), TEXT), some(w2=1.0), rtol=1e-4)


DRAW = [IMAGE_ALT, words(1), IMAGE_SOURCE]
GRID = [EOD, *document(words(1), codes(0, 1, 2, 3, 4, 5, 0, 1, 2))]


def test_a_code_follows_the_codes_around_it():
    """
    0 1 2    drawn 0 1 2    left 4, above left 1, above 2, above right outside: all as at the 5 in the document. The
    3 4 5          3 4 ?    first row and the last 2 have nothing to their above right either.
    0 1 2
    """
    now = step([[*GRID, *DRAW]], [codes(0, 1, 2, 3, 4)], 6)
    total = E**4 + 4 * E
    expected = some(c5=E**4 / total, c0=E / total, c1=E / total, c2=2 * E / total)
    np.testing.assert_allclose(copied(now, IMAGE), expected, rtol=1e-4)


def test_an_image_begins_in_the_corner():
    """All four neighbors are outside there, and fewer elsewhere."""
    found = copied(step([[*GRID, *DRAW]], [], 1), IMAGE, sharpness=20.0)
    np.testing.assert_allclose(found, some(c0=1.0), atol=1e-6)


def test_known_codes_around_a_mask_are_compared():
    """The codes 4 and 5 are masked. The place that is drawn first has 3 to its left, and 0 1 2 above."""
    main = [IMAGE_ALT, IMAGE_SOURCE, codes(0, 1, 2, 3), MASK, codes(0, 1, 2, offset=7), IMAGE_END, MASK]
    found = copied(step([[*GRID, *main]], [], 5), IMAGE, sharpness=20.0)
    np.testing.assert_allclose(found, some(c4=1.0), atol=1e-6)


BEGINS = np.ones(42, bool)
BEGINS[8 + np.array([4, 5])] = False  # 4 and 5 go on with a word, as in "1 4 5"
NAMES = [EOD, *document(words(1, 4, 5, 2), codes(*[0] * 9))]


@pytest.mark.parametrize(
    ("drawn", "expected"),
    [
        ([], {"w1": 0.2}),
        ([1], {"w4": 1 - 0.8**2}),  # goes on after one id, and is the second
        ([1, 4], {"w5": 1 - 0.8**3}),
        ([1, 4, 5], {"w2": 1 - 0.8**3}),  # another word begins: three ids of the last one were copied
        ([1, 4, 5, 2], {"eoi": 0.2}),  # a word of one id says no more than itself
        ([3, 5], {"w2": 0.2}),  # of "3 5", only the 5 is as in the document
        ([3, 4, 5], {"w2": 1 - 0.8**2}),
    ],
)
def test_the_weight_grows_within_a_word(drawn: list[int], expected: dict[str, float]):
    """The model is sure of 11."""
    log_probs = jnp.where(jnp.asarray(TEXT), jnp.where(jnp.arange(42) == 19, 0.0, -1e9), -jnp.inf)[None, None]
    now = step([[*NAMES, *CAPTION]], [words(*drawn)] if drawn else [], len(drawn) + 1).replace(word_starts=BEGINS)
    out = np.exp(mixed(Copying(0.2), log_probs, now))[0, 0]
    np.testing.assert_allclose(out, some(w11=1 - sum(expected.values()), **expected), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_the_mixture(weight: float):
    now = step([[*DOCUMENTS, *CAPTION]], [], 1)
    model = np.random.default_rng(0).dirichlet(np.ones(42)) * TEXT
    model /= model.sum()
    out = np.exp(mixed(Copying(weight), jnp.log(jnp.asarray(model, jnp.float32))[None, None], now))[0, 0]
    np.testing.assert_allclose(out, (1 - weight) * model + weight * some(w1=0.5, w4=0.5), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("prompt", "drawn", "offset", "allowed"),
    [
        ([EOD, *CAPTION], [words(1, 2)], 3, TEXT),  # no documents
        ([*DOCUMENTS, *CAPTION], [words(1, 11)], 3, TEXT),  # no document has 11
        (
            [*DOCUMENTS, *CAPTION],
            [words(1, 2)],
            3,
            np.isin(np.arange(42), [9, 10]),
        ),  # none of what follows 2 is allowed
    ],
)
def test_where_no_place_matches_the_model_is_alone(prompt: list[Piece], drawn: list[Piece], offset: int, allowed):
    log_probs = jnp.log(jnp.asarray(allowed / allowed.sum(), jnp.float32))[None, None]
    out = mixed(Copying(0.9), log_probs, step([prompt], drawn, offset))
    np.testing.assert_allclose(out, log_probs, atol=1e-6)


def test_documents_of_all_streams_are_copied_from():
    """And the main document of a prompt is none of them."""
    first, second = [EOD, *document(words(1), codes(*[0] * 9))], [EOD, *document(words(4), codes(*[0] * 9))]
    main = [IMAGE_ALT, words(9), MASK, IMAGE_SOURCE, codes(*[0] * 9), IMAGE_END, MASK]
    both = copied(step([[*first, *CAPTION], [*second, *CAPTION]], [], 1), TEXT)
    np.testing.assert_allclose(both, some(w1=0.5, w4=0.5), rtol=1e-4)
    np.testing.assert_allclose(copied(step([[*first, *main]], [], 1), TEXT), some(w1=1.0), rtol=1e-4)


# Against loops.


def plain(prompts: list[Sequenced], drawn: Sequenced, offset: int, allowed: np.ndarray, sharpness: float) -> np.ndarray:
    """The definition: over every place of every document, one neighbor after the other."""
    image = allowed[20]
    around = [(-1, 0), (-1, -1), (0, -1), (1, -1)]  # (columns, rows)

    def neighbors(at, offset: int) -> list[int]:
        if not image:
            return [at(offset - distance) if offset > distance else -1 for distance in range(1, 17)]
        row, column = divmod(offset - 1, WIDTH)
        spots = [(row + y, column + x) for x, y in around]
        return [at(y * WIDTH + x + 1) if 0 <= x < WIDTH and y >= 0 else -1 for y, x in spots]

    start = int(np.flatnonzero(prompts[0].ids == EOD)[-1])
    own = {}
    for ids, offsets in ((prompts[0].ids[start:], prompts[0].offsets[start:]), drawn):
        own |= {o: i for i, o in zip(ids.tolist(), offsets.tolist(), strict=True) if o and (i >= 20) == image}
    here = neighbors(lambda offset: own.get(offset, -2), offset)
    scores = np.zeros(42)
    for ids, offsets in prompts:
        end = int(np.flatnonzero(ids == EOD)[-1])
        for place in range(1, end + 1):
            i, o = int(ids[place]), int(offsets[place])
            if not image and o == 0 and 8 <= ids[place - 1] < 20:
                i, o = END_OF_INFILL, int(offsets[place - 1]) + 1
            if o == 0 or not allowed[i]:
                continue
            there = neighbors(lambda offset, place=place, o=o, ids=ids: int(ids[place - (o - offset)]), o)
            equal = np.equal(here, there)
            matches = equal.sum() if image else np.cumprod(equal).sum()
            scores[i] += np.exp(sharpness * matches) if matches else 0
    return scores / scores.sum() if scores.any() else scores


@pytest.mark.parametrize("kind", ["text", "image"])
def test_random_prompts_agree_with_loops(kind: str):
    rng = np.random.default_rng(0)
    seen = 0
    for _ in range(12):

        def any_document() -> list[Piece]:
            return document(words(*rng.integers(0, 3, rng.integers(1, 6))), codes(*rng.integers(0, 3, 9)))

        before = [[EOD, *any_document(), *any_document()] for _ in range(2)]
        count = int(rng.integers(0, 5))
        drawn = [(words if kind == "text" else codes)(*rng.integers(0, 3, count))] if count else []
        prompts = [[*each, *(CAPTION if kind == "text" else DRAW)] for each in before]
        allowed = TEXT if kind == "text" else IMAGE
        now = step(prompts, drawn, count + 1)
        after = sequence(drawn) if drawn else Sequenced(np.zeros(0, np.int32), np.zeros(0, np.int32))
        expected = plain([sequence(prompt) for prompt in prompts], after, count + 1, allowed, 0.3)
        if expected.any():
            seen += 1
            np.testing.assert_allclose(copied(now, allowed, 0.3), expected, rtol=1e-4, atol=1e-6)
    assert seen > 6
