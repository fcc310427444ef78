"""Sampling: how the next id is drawn from the logits."""

from dataclasses import dataclass

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from rac3.config import InputError


@dataclass(frozen=True)
class Sampling:
    """Temperature, then nucleus sampling (arXiv 1904.09751).

    Attributes:
      temperature: of the softmax; 0 takes the most probable id.
      top_p: draw from the smallest set of ids whose probabilities sum to at least this; 1 keeps all ids.
    """

    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise InputError(f"sampling.temperature={self.temperature} is below 0; use 0 for the best id, or 1")
        if not 0 < self.top_p <= 1:
            raise InputError(f"sampling.top_p={self.top_p} is outside (0, 1]; use 1 to keep all ids")

    def build(self) -> "Sampler":
        """The numbers as arrays of one request, without what has no effect."""
        top_p = None if self.top_p == 1 else np.array([self.top_p], np.float32)
        return Sampler(np.array([self.temperature], np.float32), top_p)


@flax.struct.dataclass
class Sampler:
    """The numbers of a `Sampling` for each request of a batch. They are traced: other numbers compile nothing.

    Requests whose samplers have the same structure can share a batch, which `jnp.concatenate` makes of their leaves.

    Attributes:
      top_p: None keeps all ids.
    """

    temperature: Float[Array | np.ndarray, " requests"]
    top_p: Float[Array | np.ndarray, " requests"] | None


@flax.struct.dataclass
class Step:
    """What has been given and drawn so far, for processors that look at it.

    Attributes:
      prompts: ids of the first prompt of each request; 0 after its end.
      prompt_offsets: as in `rac3.tokens.html.Sequenced`; 0 after the end.
      lengths: of these prompts.
      drawn: the ids of each sample after its prompt, given ones included; 0 after the last.
      drawn_offsets: their offsets.
      count: how many these are.
      offset: of the id to draw.
    """

    prompts: Int[Array, "requests slots"]
    prompt_offsets: Int[Array, "requests slots"]
    lengths: Int[Array, " requests"]
    drawn: Int[Array, "requests samples ids"]
    drawn_offsets: Int[Array, "requests samples ids"]
    count: Int[Array, "requests samples"]
    offset: Int[Array, "requests samples"]


def sample(
    sampler: Sampler,
    logits: Float[Array, "requests streams samples vocab"],
    allowed: Bool[Array, "requests samples vocab"],
    step: Step,
    keys: Key[Array, "requests samples"],
) -> tuple[Int[Array, "requests samples"], Float[Array, "requests samples"]]:
    """An id for each sample, and its log probability among the allowed ids at temperature 1, in nats.

    Args:
      logits: after each prompt of a request; the probabilities of its prompts are averaged.
      keys: one per sample and id, so that a draw does not depend on the rest of the batch.
    """
    logits = jnp.where(allowed, _averaged(logits), -jnp.inf)
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    ids = jax.lax.cond(
        jnp.all(sampler.temperature == 0),  # no noise is made where none is needed
        lambda: jnp.argmax(logits, axis=-1),
        lambda: _drawn(sampler, logits, keys),
    )
    return ids, jnp.take_along_axis(log_probs, ids[..., None], axis=-1)[..., 0]


def _averaged(logits: Float[Array, "requests streams samples vocab"]) -> Float[Array, "requests samples vocab"]:
    streams = logits.shape[1]
    if streams == 1:
        return logits[:, 0]
    return jax.nn.logsumexp(jax.nn.log_softmax(logits, axis=-1), axis=1) - jnp.log(streams)


def _drawn(
    sampler: Sampler, logits: Float[Array, "requests samples vocab"], keys: Key[Array, "requests samples"]
) -> Int[Array, "requests samples"]:
    greedy = sampler.temperature == 0
    scaled = logits / jnp.where(greedy, 1, sampler.temperature)[:, None, None]
    if sampler.top_p is not None:
        probs = jax.nn.softmax(scaled, axis=-1)
        scaled = jnp.where(_nucleus(probs, sampler.top_p), scaled, -jnp.inf)
    ids = jax.vmap(jax.vmap(jax.random.categorical))(keys, scaled)
    return jnp.where(greedy[:, None], jnp.argmax(logits, axis=-1), ids)


def _nucleus(
    probs: Float[Array, "requests samples vocab"], top_p: Float[Array | np.ndarray, " requests"]
) -> Bool[Array, "requests samples vocab"]:
    """The most probable ids, up to and including the one that brings their sum to `top_p`."""
    order = jnp.sort(probs, axis=-1, descending=True)
    before = jnp.cumsum(order, axis=-1) - order
    least = jnp.min(jnp.where(before < top_p[:, None, None], order, jnp.inf), axis=-1, keepdims=True)
    return probs >= least
