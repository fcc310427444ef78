"""Copying from the documents in the prompt, without training."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rac3.config import InputError
from rac3.generation.step import Step
from rac3.tokens.vocabulary import EOD, NUM_SPECIALS

TEXT_NEIGHBORS = 16  # ids before a place of a text that are compared
IMAGE_NEIGHBORS = ((0, -1), (1, -1), (1, 0), (1, 1))  # (rows above, columns to the right) of a place of an image
OUTSIDE, UNKNOWN = -1, -2  # the id of a neighbor beyond the edge of a text or image; of one that is not drawn yet


@dataclass(frozen=True)
class Copying:
    """A mixture of the model's distribution and that of the documents in its prompt.

        p(id) = (1 - weight) p_model(id) + weight p_documents(id)
        p_documents(id) ~ the sum, over the places in documents that hold the id, of exp(sharpness * matches(place))

    For images this is AR-RAG's DAiD (arXiv 2506.06962): `matches` counts the codes to the left, above left, above, and
    above right that equal those of the place to draw. It compares codes, not their vectors. For texts it is a kNN-LM
    (arXiv 1911.00172, eq. 2-3) over the context: `matches` is the number of ids right before the place that equal those
    before the place to draw. In both, the edge of a text or image matches an edge. The end of a text stands for the id
    that ends the text to draw. Places that match in nothing do not count; where none does, the model is alone.

        document: <img alt=" a red fox " src=" ...          p_documents(fox) is high: "a red" precedes it
        drawn   : <img alt=" a red

    Unlike a kNN-LM's, the weight grows within a word: for a place whose id continues or ends a word of which n ids
    were drawn as in the document, it is 1 - (1 - weight)^n, with n counting the place's own id if it continues the
    word. So a small weight decides whether a name is copied, which is then spelled to its end, and leaves alone the
    words that the model is sure of. Where it is unknown which ids begin words, each id is a word.

    Attributes:
      weight: of what the documents say; 0 is the model alone, 1 the documents alone.
      sharpness: a place counts exp(sharpness) times as much as one that matches by one id less.
    """

    weight: float = 0.0
    sharpness: float = 3.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise InputError(f"sampling.copying.weight={self.weight} is outside 0 to 1; use 0 to copy nothing")
        if not 0 <= self.sharpness < math.inf:
            raise InputError(f"sampling.copying.sharpness={self.sharpness} is not a number from 0; use 1 to 5")

    def __call__(
        self, log_probs: Float[Array, "requests samples vocab"], step: Step
    ) -> Float[Array, "requests samples vocab"]:
        """Log probabilities of the model -> those of the mixture."""
        vocabulary, size = step.vocabulary, log_probs.shape[-1]
        allowed = log_probs > -jnp.inf
        matches, evidence, ids = _text_places(step)
        specials = allowed[..., :NUM_SPECIALS]
        stop = jnp.where(jnp.any(specials, axis=-1), jnp.argmax(specials, axis=-1), size)  # past the end is no id
        ids = jnp.where(ids == OUTSIDE, stop[..., None], ids)
        if step.image_width:
            draws_image = jnp.any(allowed[..., vocabulary.image_start : vocabulary.mask_start], axis=-1)[..., None]
            of_images = _image_places(step)
            matches, ids = (jnp.where(draws_image, *both) for both in zip(of_images, (matches, ids), strict=True))
            evidence = jnp.where(draws_image, 1, evidence)
        fits = jax.vmap(jax.vmap(lambda allowed, ids: allowed.at[ids].get(mode="fill", fill_value=False)))(allowed, ids)
        counted = fits & (matches > 0)
        score = jnp.where(counted, _by_request(self.sharpness) * matches, 0)
        shares = jnp.where(counted, jnp.exp(score - jnp.max(score, axis=-1, keepdims=True)), 0)
        shares = shares / jnp.maximum(jnp.sum(shares, axis=-1, keepdims=True), 1)
        weights = shares * (1 - (1 - _by_request(self.weight)) ** evidence)
        copied = jax.vmap(jax.vmap(lambda ids, weights: jnp.zeros(size).at[ids].add(weights)))(ids, weights)
        left = 1 - jnp.sum(weights, axis=-1, keepdims=True)
        return jnp.logaddexp(jnp.log(jnp.maximum(left, 0)) + log_probs, jnp.log(copied))


def _text_places(
    step: Step,
) -> tuple[
    Int[Array, "requests samples places"], Int[Array, "requests samples places"], Int[Array, "requests 1 places"]
]:
    """For each place of the prompts: how many ids before it match; how many are of its word, at least 1; and its id.

    The id is `OUTSIDE` at the end of a text.
    """
    ids, offsets, known = _documents(step)
    text = _is_text(step, ids)
    ended = ~text & _shifted(text, 1)
    place = jnp.where(text, offsets, jnp.where(ended, _shifted(offsets, 1) + 1, 0))
    begins = jnp.ones(1, bool) if step.word_starts is None else jnp.asarray(step.word_starts)
    shape = (*step.offset.shape, ids.shape[-1])

    def compare(distance: int | Array, found: tuple[Array, ...]) -> tuple[Array, ...]:
        run, word, matches, of_word = found  # whether all ids so far match; whether they are of the word that is drawn
        theirs = jnp.where(place > distance, _shifted(ids, distance), OUTSIDE)
        ours = jnp.where(step.offset > distance, _so_far(step, step.offset - distance, _is_text), OUTSIDE)
        run, word = run & (theirs[:, None] == ours[..., None]), word & (ours >= 0)
        matches, of_word = matches + run, of_word + (run & word[..., None])
        return run, word & ~begins.at[ours].get(mode="clip"), matches, of_word

    zeros = jnp.zeros(shape, jnp.int32)
    start = jnp.broadcast_to((known & (place > 0))[:, None], shape), jnp.ones(shape[:2], bool), zeros, zeros
    _, _, matches, of_word = jax.lax.fori_loop(1, TEXT_NEIGHBORS + 1, compare, start)
    continues = (text & ~begins.at[ids].get(mode="clip"))[:, None]
    return matches, jnp.maximum(of_word + continues, 1), jnp.where(text, ids, OUTSIDE)[:, None]


def _image_places(
    step: Step,
) -> tuple[Int[Array, "requests samples places"], Int[Array, "requests 1 places"]]:
    """For each place of the prompts, how many codes around it match, and its code."""
    ids, offsets, known = _documents(step)
    width = step.image_width
    candidate = (known & _is_image(step, ids))[:, None]
    total = jnp.zeros((*step.offset.shape, ids.shape[-1]), jnp.int32)
    for rows, columns in IMAGE_NEIGHBORS:
        distance = rows * width - columns
        inside = functools.partial(_inside, width, rows, columns)
        theirs = jnp.where(inside(offsets), _shifted(ids, distance), OUTSIDE)
        ours = jnp.where(inside(step.offset), _so_far(step, step.offset - distance, _is_image), OUTSIDE)
        total = total + (candidate & (theirs[:, None] == ours[..., None]))
    return total, ids[:, None]


def _inside(width: int, rows: int, columns: int, offset: Array) -> Array:
    """Whether an image has a code that is so many rows above, and columns to the right of, the one at an offset."""
    column = (offset - 1) % width + columns
    return (offset > rows * width) & (column >= 0) & (column < width)


def _documents(
    step: Step,
) -> tuple[Int[Array, "requests places"], Int[Array, "requests places"], Bool[Array, "requests places"]]:
    """Ids and offsets of the prompts of each request, one after the other, and which of them are documents'.

    The last `<eod>` of a prompt is the end of its documents.
    """
    requests, streams, longest = step.prompts.shape
    known = jnp.arange(longest) <= _main_start(step)[..., None]
    flat = (requests, streams * longest)
    return step.prompts.reshape(flat), step.prompt_offsets.reshape(flat), known.reshape(flat)


def _main_start(step: Step) -> Int[Array, "requests streams"]:
    """The place of the last `<eod>` of each prompt."""
    return jnp.max(jnp.where(step.prompts == EOD, jnp.arange(step.prompts.shape[-1]), 0), axis=-1)


def _so_far(
    step: Step, offset: Int[Array, "requests samples"], kind: Callable[[Step, Array], Array]
) -> Int[Array, "requests samples"]:
    """The id at an offset of the text or image that is drawn, drawn or known from its prompt; else `UNKNOWN`.

    Of several texts or images of the document, this is the last that has the offset.
    """
    main = jnp.arange(step.prompts.shape[-1]) > _main_start(step)[:, :1]
    given = jnp.where(main & kind(step, step.prompts[:, 0]), step.prompt_offsets[:, 0], 0)[:, None]
    drawn = jnp.where(kind(step, step.drawn), step.drawn_offsets, 0)
    found = jnp.full(offset.shape, UNKNOWN)
    for ids, offsets in ((step.prompts[:, :1], given), (step.drawn, drawn)):
        last = jnp.max(jnp.where(offsets == offset[..., None], jnp.arange(ids.shape[-1]), -1), axis=-1)
        there = jnp.take_along_axis(jnp.broadcast_to(ids, (*offset.shape, ids.shape[-1])), last[..., None], axis=-1)
        found = jnp.where(last >= 0, there[..., 0], found)
    return found


def _is_text(step: Step, ids: Array) -> Array:
    return (ids >= NUM_SPECIALS) & (ids < step.vocabulary.image_start)


def _is_image(step: Step, ids: Array) -> Array:
    return (ids >= step.vocabulary.image_start) & (ids < step.vocabulary.mask_start)


def _shifted(x: Array, distance: int | Array) -> Array:
    """x[i - distance] at place i; zeros at the start."""
    moved = jnp.roll(x, distance, axis=1)
    return jnp.where(jnp.arange(x.shape[1]) < distance, jnp.zeros_like(x), moved)


def _by_request(number: float | int | Array) -> Float[Array, "#requests 1 1"]:
    return jnp.asarray(number, jnp.float32).reshape(-1, 1, 1)
