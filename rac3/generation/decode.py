"""Decoding with a KV cache: prefill the prompts, then draw one id at a time under a grammar.

The output is a whole text or image, from its first id on. An image is exactly its grid: `count` image ids. A caption is
text ids until `<eoi>`, at most `count` of them, and ends where the context does. For either task, a grammar is a set of
allowed ids, a stop id and a count.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from rac3.config import InputError
from rac3.generation.sampling import Sampler, Sampling, Step, sample
from rac3.model.transformer import Transformer
from rac3.tokens.html import segment_offsets
from rac3.tokens.vocabulary import END_OF_INFILL, Vocabulary


@dataclass(frozen=True, eq=False)
class Grammar:
    """Which ids an output may have, and how it ends.

    Attributes:
      allowed: True at the ids that may be drawn.
      count: the largest number of ids; without a stop id, the exact number.
      stop: the id that ends the output; -1 is none.
    """

    allowed: Bool[np.ndarray, " vocab"]
    count: int
    stop: int

    @property
    def shortest(self) -> int:
        """The number of ids of the shortest output, which must fit into the context."""
        return self.count if self.stop < 0 else 1


def image_grammar(vocabulary: Vocabulary, tokens_per_image: int) -> Grammar:
    """Exactly one image."""
    allowed = vocabulary.is_image(np.arange(vocabulary.padded_size))
    return Grammar(allowed, tokens_per_image, -1)


def caption_grammar(vocabulary: Vocabulary, max_tokens: int) -> Grammar:
    """Text until `<eoi>`, at most `max_tokens` ids."""
    allowed = vocabulary.is_text(np.arange(vocabulary.padded_size))
    allowed[END_OF_INFILL] = True
    return Grammar(allowed, max_tokens, END_OF_INFILL)


class Generated(NamedTuple):
    """The output of each row.

    Attributes:
      ids: without the prompt and the stop id.
      mean_log_prob: of the ids and the stop id, in nats per id; at temperature 1, among the ids that are allowed.
    """

    ids: list[Int[np.ndarray, " _"]]
    mean_log_prob: Float[np.ndarray, " rows"]


def generate(
    model: Transformer,
    params: PyTree,
    vocabulary: Vocabulary,
    prompts: Sequence[Int[np.ndarray, " _"]],
    grammar: Grammar,
    sampling: Sampling,
    keys: Key[Array, " rows"],
    batch: int = 64,
) -> Generated:
    """Continues each prompt. A row's output is a function of its prompt and key; it does not depend on other rows.

    Prompts are padded to a multiple of 32 tokens, and rows to a power of two up to `batch`, so that few shapes compile.

    Args:
      keys: one of each prompt.

    Raises:
      InputError: a prompt leaves no room for the output, or a text is longer than those that the model is trained on.
    """
    longest = max(len(prompt) for prompt in prompts)
    if longest + grammar.shortest > model.max_positions:
        raise InputError(
            f"a prompt of {longest} tokens and {grammar.shortest} to generate exceed the {model.max_positions} "
            "positions of the model; use fewer retrieved documents or a shorter prompt"
        )
    limits = [min(grammar.count, model.max_positions - len(prompt)) for prompt in prompts]
    segment = max(*limits, *(int(segment_offsets(vocabulary, prompt).max()) for prompt in prompts))
    if segment > model.max_segment_tokens:
        raise InputError(
            f"a text of {segment} tokens, given or to generate, exceeds the {model.max_segment_tokens} that the model "
            "was trained for (max_text_tokens); use a shorter one"
        )
    width = min(-(-longest // 32) * 32, model.max_positions)
    allowed = jnp.asarray(grammar.allowed)
    rows: list[np.ndarray] = []
    scores = []
    for start in range(0, len(prompts), batch):
        chunk = [*prompts[start : start + batch]]
        filled = np.minimum(np.arange(min(batch, _power_of_two(len(chunk)))), len(chunk) - 1)
        chunk_keys = keys[start : start + len(chunk)]
        tokens, offsets, lengths = _pad([chunk[i] for i in filled], width, vocabulary)
        ids, log_probs = _decode(
            model, max(limits), sampling.build(), params, tokens, offsets, lengths, allowed, chunk_keys[filled]
        )
        ids, log_probs = np.asarray(ids)[: len(chunk)], np.asarray(log_probs)[: len(chunk)]
        for row, log_prob, limit in zip(ids, log_probs, limits[start : start + batch], strict=True):
            stops = np.flatnonzero(row[:limit] == grammar.stop)
            end = int(stops[0]) if len(stops) else limit
            rows.append(row[:end])
            scores.append(log_prob[: min(end + 1, limit)].mean())
    return Generated(rows, np.array(scores, np.float32))


def _pad(
    prompts: Sequence[Int[np.ndarray, " _"]], width: int, vocabulary: Vocabulary
) -> tuple[Int[np.ndarray, "rows width"], Int[np.ndarray, "rows width"], Int[np.ndarray, " rows"]]:
    tokens = np.zeros((len(prompts), width), np.int32)
    offsets = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        offsets[row, : len(prompt)] = segment_offsets(vocabulary, prompt)
    return tokens, offsets, np.array([len(prompt) for prompt in prompts], np.int32)


@partial(jax.jit, static_argnums=(0, 1))
def _decode(
    model: Transformer,
    count: int,
    sampler: Sampler,
    params: PyTree,
    tokens: Int[Array, "rows width"],
    offsets: Int[Array, "rows width"],
    lengths: Int[Array, " rows"],
    allowed: Bool[Array, " vocab"],
    keys: Key[Array, " rows"],
) -> tuple[Int[Array, "rows count"], Float[Array, "rows count"]]:
    """Prefill, then `count` steps. Rows that have stopped continue unseen: the rest of the batch needs the steps."""
    apply: Any = partial(model.apply, params)  # flax types its result by what is mutable
    rows, width = tokens.shape
    numbers = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (rows,)), sampler)
    none = jnp.zeros((rows, 1), jnp.int32)
    nothing = Step(tokens, offsets, lengths, none[..., None], none[..., None], none, none)
    cache = model.empty_cache(rows, min(width + count, model.max_positions))
    positions = jnp.broadcast_to(jnp.arange(width), tokens.shape)
    hidden, cache = apply(tokens, positions, offsets, None, cache)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]

    def draw(hidden: Array, step: Array) -> tuple[Array, Array]:
        logits = apply(hidden, method="logits")[:, None, None]
        each = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)[:, None]
        masks = jnp.broadcast_to(allowed, (rows, 1, len(allowed)))
        ids, log_probs = sample(numbers, logits, masks, nothing, each)
        return ids[:, 0], log_probs[:, 0]

    def advance(carry: tuple[Array, PyTree], step: Array) -> tuple[tuple[Array, PyTree], tuple[Array, Array]]:
        hidden, cache = carry
        ids, log_prob = draw(hidden, step)
        # Rows at the end of the context have ended; they stay at its last position while others continue.
        positions = jnp.minimum(lengths + step, model.max_positions - 1)[:, None]
        hidden, cache = apply(ids[:, None], positions, jnp.full((rows, 1), step + 1), None, cache)
        return (hidden[:, 0], cache), (ids, log_prob)

    (last, _), (ids, log_probs) = jax.lax.scan(advance, (last, cache), jnp.arange(count - 1))
    final, final_log_prob = draw(last, jnp.asarray(count - 1))
    ids = jnp.concatenate([ids, final[None]]).T
    return ids, jnp.concatenate([log_probs, final_log_prob[None]]).T


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
