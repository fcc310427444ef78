"""Next-token loss in chunks, so that the logits of a whole row never exist at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_losses(
    logits_of: Callable[[Float[Array, "batch chunk embed"]], Float[Array, "batch chunk vocab"]],
    hidden: Float[Array, "batch seq embed"],
    targets: Int[Array, "batch seq"],
    chunk: int = 512,
) -> Float[Array, "batch seq"]:
    """-log p(target) in nats for each token, in float32.

    Logits are made `chunk` positions at a time and made again in the backward pass: the memory is
    batch * chunk * vocab * 4 bytes instead of batch * seq * vocab * 4.
    """
    batch, seq, embed = hidden.shape

    @jax.checkpoint
    def one(hidden: Array, targets: Array) -> Array:
        logits = logits_of(hidden)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen

    if seq <= chunk:
        return one(hidden, targets)
    padding = -seq % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))).reshape(batch, -1, chunk, embed)
    chunks = jnp.pad(targets, ((0, 0), (0, padding))).reshape(batch, -1, chunk)
    _, losses = jax.lax.scan(lambda _, xs: (None, one(*xs)), None, (hidden.swapaxes(0, 1), chunks.swapaxes(0, 1)))
    return losses.swapaxes(0, 1).reshape(batch, -1)[:, :seq]
