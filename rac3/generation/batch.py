"""The engine's batch on the devices: requests in slots, their samples in rows, and the step that draws an id for each.

    slot 0  prompt A, prefilled once   sample 0  x x x x x x x x .      rows end at different steps
                                       sample 1  x x x x .
    slot 1  prompt B                   sample 0  x x x x x x x .  |  prompt C, inserted into the free slot
                                       sample 1  x x x x x .      |

A step feeds one id to each row, and draws the next under the tables of the row's grammar. The last id of a prompt is
fed, not prefilled, so that the first step is like every other.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt32

from rac3.devices.mesh import constrain
from rac3.generation.sampling import sample
from rac3.generation.step import Step
from rac3.model.decoder import Cache, Decoder, Endings
from rac3.tokens.vocabulary import NUM_SPECIALS, Vocabulary

# Arrays that come from the host.
OnHost = Array | np.ndarray


class Shape(NamedTuple):
    """What programs are compiled for, besides the structure of the sampling.

    Attributes:
      requests: slots of the batch.
      prompts: of each request.
      samples: of each slot.
      slots: of the prefix cache: ids of the longest prompt.
      places: of the longest grammar.
      masks: sets of allowed ids.
      endings: of prompts that share their documents.
      ending: slots of the cache of each of several; 0 if there is one.
    """

    requests: int
    prompts: int
    samples: int
    slots: int
    places: int
    masks: int
    endings: int = 1
    ending: int = 0

    @property
    def streams(self) -> int:
        """The decoder's, of each request."""
        return self.prompts // self.endings


@flax.struct.dataclass
class Tables:
    """Requests, one of each row.

    Attributes:
      tokens: ids of the prompts; 0 after the end.
      offsets: their places in texts and images.
      lengths: of the prompts.
      shared: ids in the prefix cache of each stream: of the prompts without their endings, or without their last ids.
      places: of the grammar.
      forced, stop, jump, offset: as in `rac3.generation.grammar.Table`.
      allowed: the row of the masks that holds at each place.
      sampling: its leaves are [requests].
    """

    tokens: Int[OnHost, "requests prompts slots"]
    offsets: Int[OnHost, "requests prompts slots"]
    lengths: Int[OnHost, "requests prompts"]
    shared: Int[OnHost, "requests streams"]
    places: Int[OnHost, " requests"]
    forced: Int[OnHost, "requests places"]
    stop: Int[OnHost, "requests places"]
    jump: Int[OnHost, "requests places"]
    offset: Int[OnHost, "requests places"]
    allowed: Int[OnHost, "requests places"]
    sampling: PyTree


def blank(requests: int, shape: Shape, sampling: PyTree) -> Tables:
    """Tables of no requests, on the host."""

    def zeros(*sizes: int) -> np.ndarray:
        return np.zeros((requests, *sizes), np.int32)

    return Tables(
        tokens=zeros(shape.prompts, shape.slots),
        offsets=zeros(shape.prompts, shape.slots),
        lengths=zeros(shape.prompts) + 1,
        shared=zeros(shape.streams),
        places=zeros(),
        forced=zeros(shape.places),
        stop=zeros(shape.places),
        jump=zeros(shape.places),
        offset=zeros(shape.places),
        allowed=zeros(shape.places),
        sampling=jax.tree.map(lambda leaf: np.zeros(requests, leaf.dtype), sampling),
    )


@flax.struct.dataclass
class Arrivals:
    """The requests that are inserted at a time, one of each shard of the batch.

    Attributes:
      slots: where each goes; past the last one is nowhere.
      seeds: the data of `jax.random.key` of each.
      digest: of the first prompt's ids, for the keys.
      numbers: of the samples.
      count: how many of these there are; the others have ended.
    """

    slots: Int[OnHost, " shards"]
    tables: Tables
    seeds: UInt32[OnHost, "shards 2"]
    digest: UInt32[OnHost, " shards"]
    numbers: Int[OnHost, "shards samples"]
    count: Int[OnHost, " shards"]


@flax.struct.dataclass
class Batch:
    """The requests in the slots; constant while they are decoded.

    Attributes:
      prefix: keys and values of their prompts, without the endings or the last ids.
      endings: those of the endings, [requests, streams, endings] in one axis; None if each stream has one.
      masks: the sets of allowed ids.
      begun: the step at which the rows of each request fed their first id.
      keys: of the samples.
    """

    prefix: Cache
    endings: Cache | None
    masks: Bool[Array, "masks vocab"]
    tables: Tables
    begun: Int[Array, " requests"]
    keys: UInt32[Array, "requests samples 2"]


@flax.struct.dataclass
class Rows:
    """The samples of the requests in the slots; updated in place at each step.

    Attributes:
      step: the number of steps that the batch has had.
      own: keys and values of what the rows have fed; rows are [requests, streams, endings, samples].
      feed: the id that each feeds next: the prompt's last, then the one drawn before.
      feed_offset: its place in its text or image.
      place: of the id to draw; rows that have ended are past the last one.
      count: ids after the prompt, given ones included.
      drawn: these ids; 0 after the last.
      drawn_offsets: their places in texts and images.
      log_probs: of these ids.
    """

    step: Int[Array, ""]
    own: Cache
    feed: Int[Array, "requests prompts samples"]
    feed_offset: Int[Array, "requests prompts samples"]
    place: Int[Array, "requests samples"]
    count: Int[Array, "requests samples"]
    drawn: Int[Array, "requests samples places"]
    drawn_offsets: Int[Array, "requests samples places"]
    log_probs: Float[Array, "requests samples places"]


def sample_keys(
    seeds: UInt32[OnHost, "requests 2"], digest: UInt32[OnHost, " requests"], numbers: Int[OnHost, "requests samples"]
) -> UInt32[Array, "requests samples 2"]:
    """The random key of each sample: a function of the seed, the prompt's ids and the sample's number.

    The id at place p is drawn with `fold_in(key, p)`.

    Args:
      seeds: the data of `jax.random.key` of each request's seed.
    """
    prompts = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(jnp.asarray(seeds)), digest)
    keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(prompts, numbers)
    return jax.random.key_data(keys)


@partial(jax.jit, static_argnums=(0, 1, 2))
def empty(
    decoder: Decoder, shape: Shape, shards: int, masks: Bool[OnHost, "masks vocab"], sampling: PyTree
) -> tuple[Batch, Rows, Cache]:
    """A batch without requests, its rows, which have ended, and the cache that prompts are prefilled in."""
    requests, prompts, samples, slots, places, *_ = shape

    def zeros(*sizes: int, dtype: Any = jnp.int32) -> Array:
        return _replicated(jnp.zeros(sizes, dtype))

    batch = Batch(
        prefix=decoder.empty_prefix(requests * shape.streams, slots),
        endings=decoder.empty_prefix(requests * prompts, shape.ending) if shape.endings > 1 else None,
        masks=_replicated(jnp.asarray(masks)),
        tables=jax.tree.map(lambda x: _replicated(jnp.asarray(x)), blank(requests, shape, sampling)),
        begun=zeros(requests),
        keys=zeros(requests, samples, 2, dtype=jnp.uint32),
    )
    rows = Rows(
        step=zeros(),
        own=decoder.empty_own(requests * shape.streams, shape.endings * samples, places),
        feed=zeros(requests, prompts, samples),
        feed_offset=zeros(requests, prompts, samples),
        place=zeros(requests, samples),
        count=zeros(requests, samples),
        drawn=zeros(requests, samples, places),
        drawn_offsets=zeros(requests, samples, places),
        log_probs=zeros(requests, samples, places, dtype=jnp.float32),
    )
    return batch, rows, decoder.empty_prefix(shards * shape.streams, slots)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill(
    decoder: Decoder,
    weights: PyTree,
    cache: Cache,
    tokens: Int[Array, "streams chunk"],
    offsets: Int[Array, "streams chunk"],
    start: Int[Array, ""],
) -> Cache:
    """`Decoder.prefill`, compiled."""
    return decoder.prefill(weights, cache, tokens, offsets, start)


@partial(jax.jit, static_argnums=(0, 3))
def ending(decoder: Decoder, cache: Cache, start: Int[Array, " streams"], slots: int) -> Cache:
    """`Decoder.ending`, compiled."""
    return decoder.ending(cache, start, slots)


@partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def insert(
    decoder: Decoder, batch: Batch, rows: Rows, prefilled: Cache, endings: Sequence[Cache], new: Arrivals
) -> tuple[Batch, Rows]:
    """The batch with other requests in some slots, and their rows at the beginning.

    Args:
      endings: each as from `ending`; none if each stream has one.
    """

    def put(old: Array, value: OnHost) -> Array:
        return _replicated(old.at[new.slots].set(value, mode="drop"))

    of_endings = batch.endings
    if of_endings is not None:
        stacked = jax.tree.map(lambda *each: jnp.stack(each, axis=1).reshape(-1, *each[0].shape[1:]), *endings)
        of_endings = decoder.insert(of_endings, stacked, jnp.asarray(new.slots))
    batch = replace(
        batch,
        prefix=decoder.insert(batch.prefix, prefilled, jnp.asarray(new.slots)),
        endings=of_endings,
        tables=jax.tree.map(put, batch.tables, new.tables),
        begun=put(batch.begun, jnp.broadcast_to(rows.step, new.slots.shape)),
        keys=put(batch.keys, sample_keys(new.seeds, new.digest, new.numbers)),
    )
    shape = new.numbers.shape
    first = [
        jnp.take_along_axis(x, new.tables.lengths[..., None] - 1, axis=-1).repeat(shape[1], -1)
        for x in (new.tables.tokens, new.tables.offsets)
    ]
    exists = jnp.arange(shape[1]) < new.count[:, None]
    zeros = jnp.zeros((*shape, rows.drawn.shape[-1]), jnp.int32)
    rows = replace(
        rows,
        feed=put(rows.feed, first[0]),
        feed_offset=put(rows.feed_offset, first[1]),
        place=put(rows.place, jnp.where(exists, 0, new.tables.places[:, None])),
        count=put(rows.count, zeros[..., 0]),
        drawn=put(rows.drawn, zeros),
        drawn_offsets=put(rows.drawn_offsets, zeros),
        log_probs=put(rows.log_probs, zeros.astype(jnp.float32)),
    )
    return batch, rows


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=6)
def advance(
    decoder: Decoder,
    vocabulary: Vocabulary,
    image_width: int,
    weights: PyTree,
    word_starts: Bool[Array | np.ndarray, " vocab"] | None,
    batch: Batch,
    rows: Rows,
    most: Int[Array, ""],
    waiting: Bool[Array, ""],
) -> Rows:
    """The rows after steps until all have ended, or, if requests wait, all those of a slot; at most so many."""
    last = rows.step + most

    def goes_on(rows: Rows) -> Array:
        running = jnp.any(rows.place < batch.tables.places[:, None], axis=1)
        return (rows.step < last) & jnp.where(waiting, jnp.all(running), jnp.any(running))

    step = partial(_step, decoder, vocabulary, image_width, weights, word_starts, batch)
    rows = jax.lax.while_loop(goes_on, step, rows)
    read = [_replicated(x) for x in (rows.place, rows.count, rows.drawn, rows.log_probs)]
    return replace(rows, place=read[0], count=read[1], drawn=read[2], log_probs=read[3])


def _step(
    decoder: Decoder,
    vocabulary: Vocabulary,
    image_width: int,
    weights: PyTree,
    word_starts: Bool[Array | np.ndarray, " vocab"] | None,
    batch: Batch,
    rows: Rows,
) -> Rows:
    """Feeds an id to each row and draws the next. Rows that have ended do as the others, but nothing is kept of it."""
    tables: Any = batch.tables  # on the devices, all arrays
    requests, prompts, samples = rows.feed.shape
    streams = tables.shared.shape[1]
    prefilled = tables.lengths - 1
    position = prefilled + (rows.step - batch.begun)[:, None]

    def by_stream(x: Array) -> Array:
        """[requests, prompts, ...] -> [requests * streams, endings * ...]"""
        turned = x.reshape(requests, prompts // streams, streams, *x.shape[2:]).swapaxes(1, 2)
        return turned.reshape(requests * streams, -1)

    ended = prefilled - jnp.tile(tables.shared, (1, prompts // streams))
    logits, own = decoder.step(
        weights,
        batch.prefix,
        rows.own,
        tables.shared.reshape(-1),
        jnp.repeat(batch.begun, streams),
        rows.step,
        by_stream(rows.feed),
        by_stream(jnp.broadcast_to(position[..., None], rows.feed.shape)),
        by_stream(rows.feed_offset),
        None if batch.endings is None else Endings(batch.endings, by_stream(ended)),
    )
    logits = logits.reshape(requests, streams, prompts // streams, samples, -1).swapaxes(1, 2)
    logits = constrain(logits.reshape(requests, prompts, samples, -1), "batch", None, None, None)
    place = jnp.minimum(rows.place, tables.jump.shape[1] - 1)

    def here(table: Array) -> Array:
        return jnp.take_along_axis(table, place, axis=1)

    offset, forced = here(tables.offset), here(tables.forced)
    known = tables.tokens, tables.offsets, tables.lengths, rows.drawn, rows.drawn_offsets, rows.count, offset
    starts = None if word_starts is None else jnp.asarray(word_starts)
    given = Step(*known, starts, vocabulary=vocabulary, image_width=image_width)
    keys = jax.vmap(jax.vmap(jax.random.fold_in))(jax.random.wrap_key_data(batch.keys), place)
    ids, log_probs = sample(tables.sampling, logits, batch.masks[here(tables.allowed)], given, keys)
    ids, log_probs = _replicated(jnp.where(forced >= 0, forced, ids).astype(jnp.int32)), _replicated(log_probs)
    in_segment = (forced >= 0) | ((ids >= NUM_SPECIALS) & (ids < vocabulary.mask_start))
    offset = jnp.where(in_segment, offset, 0)  # a run may stop, or have markup in it

    running = rows.place < tables.places[:, None]
    new = running[..., None] & (jnp.arange(rows.drawn.shape[-1]) == rows.count[..., None])
    after = jnp.where(ids == here(tables.stop), here(tables.jump), rows.place + 1)
    return Rows(
        step=rows.step + 1,
        own=own,
        feed=jnp.broadcast_to(ids[:, None], rows.feed.shape),
        feed_offset=jnp.broadcast_to(offset[:, None], rows.feed.shape),
        place=jnp.where(running, after, rows.place),
        count=rows.count + running,
        drawn=jnp.where(new, ids[..., None], rows.drawn),
        drawn_offsets=jnp.where(new, offset[..., None], rows.drawn_offsets),
        log_probs=jnp.where(new, log_probs[..., None], rows.log_probs),
    )


def _replicated(x: Array) -> Array:
    """Whole on every device: each process reads it."""
    return constrain(x, *[None] * x.ndim)
