"""Sampling: how the next id is drawn from the logits."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
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


def sample(
    sampling: Sampling,
    logits: Float[Array, "batch vocab"],
    allowed: Bool[Array, " vocab"],
    keys: Key[Array, " batch"],
) -> tuple[Int[Array, " batch"], Float[Array, " batch"]]:
    """An id for each row, and its log probability among the allowed ids at temperature 1, in nats.

    Args:
      keys: one per row, so that a row's draw does not depend on the rest of the batch.
    """
    logits = jnp.where(allowed, logits, -jnp.inf)
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    if sampling.temperature == 0:
        ids = jnp.argmax(logits, axis=-1)
    else:
        scaled = logits / sampling.temperature
        if sampling.top_p < 1:
            scaled = jnp.where(_nucleus(jax.nn.softmax(scaled, axis=-1), sampling.top_p), scaled, -jnp.inf)
        ids = jax.vmap(jax.random.categorical)(keys, scaled)
    return ids, jnp.take_along_axis(log_probs, ids[:, None], axis=-1)[:, 0]


def _nucleus(probs: Float[Array, "batch vocab"], top_p: float) -> Bool[Array, "batch vocab"]:
    """The most probable ids, up to and including the one that brings their sum to `top_p`."""
    order = jnp.sort(probs, axis=-1, descending=True)
    before = jnp.cumsum(order, axis=-1) - order
    least = jnp.min(jnp.where(before < top_p, order, jnp.inf), axis=-1, keepdims=True)
    return probs >= least
