"""CLIP's fit: the loss over a batch of pairs, and the augmentations of texts and images."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray


def crop_texts(
    key: PRNGKeyArray, ids: Int[Array, "batch seq"], mask: Bool[Array, "batch seq"], share: float
) -> tuple[Int[Array, "batch seq"], Bool[Array, "batch seq"]]:
    """Augmentation: `share` of the rows keep only a random number of their first tokens, and `<eos>`.

        <bos> a photo of a cat <eos>  ->  <bos> a photo <eos>

    A caption names its subject first and its surroundings later, if at all. With truncated captions the model can't
    rely on the surroundings alone.
    """
    which, how_many = jax.random.split(key)
    last = mask.sum(axis=1) - 1  # the position of <eos>
    short = 2 + jnp.floor(jax.random.uniform(how_many, last.shape) * (last - 1)).astype(last.dtype)
    end = jnp.where(jax.random.uniform(which, last.shape) < share, jnp.minimum(short, last), last)
    eos = jnp.take_along_axis(ids, last[:, None], axis=1)
    places = jnp.arange(ids.shape[1])
    return jnp.where(places == end[:, None], eos, jnp.where(places < end[:, None], ids, 0)), places <= end[:, None]


def crop_images(
    key: PRNGKeyArray, pixels: Float[Array, "batch size size channel"], smallest: float
) -> Float[Array, "batch size size channel"]:
    """Augmentation: a random square of `smallest` to all of the side, scaled back to the full size."""
    if smallest >= 1:
        return pixels
    size = pixels.shape[1]
    scale_key, place_key = jax.random.split(key)
    share = jax.random.uniform(scale_key, (len(pixels),), minval=smallest, maxval=1.0)
    corner = jax.random.uniform(place_key, (len(pixels), 2)) * (1 - share)[:, None] * size

    def one(image: Array, share: Array, corner: Array) -> Array:
        scale = jnp.full(2, 1 / share)
        return jax.image.scale_and_translate(image, image.shape, (0, 1), scale, -corner * scale, "linear")

    return jax.vmap(one)(pixels, share, corner)


def subject_loss(
    text: Float[Array, "batch projection"],
    image: Float[Array, "batch projection"],
    other_text: Float[Array, "batch projection"],
    other_image: Float[Array, "batch projection"],
    logit_scale: Float[Array, ""],
    subjects: Int[Array, " batch"],
    max_scale: float = 100.0,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """`contrastive_loss` between the parts of documents and those of other documents of the same subjects, in nats.

    loss = ((text, other image) / 2 + (other text, image) / 2 + (text, other text) + (image, other image)) / 3. A query
    is one part, and the memory holds the mean of both (paper, eq. 1), so each part has to find each. No document of a
    subject is a negative of another.

    Returns:
      the loss, and metrics: `loss`, `accuracy` (of texts for the other images).
    """
    same = subjects[:, None] == subjects
    compared = (text, other_image), (other_text, image), (text, other_text), (image, other_image)
    losses = [contrastive_loss(*each, logit_scale, same, max_scale) for each in compared]
    across, back, texts, images = (value for value, _ in losses)
    loss = ((across + back) / 2 + texts + images) / 3
    return loss, losses[0][1] | {"loss": loss}


def contrastive_loss(
    text: Float[Array, "batch projection"],
    image: Float[Array, "batch projection"],
    logit_scale: Float[Array, ""],
    duplicates: Bool[Array, "batch batch"] | None = None,
    max_scale: float = 100.0,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """CLIP's symmetric InfoNCE over the batch, in nats.

    loss = (CE(s t v^T, diagonal) + CE(s v t^T, diagonal)) / 2, with s = min(exp(logit_scale), max_scale).

    Args:
      text: vectors of L2 norm 1, row i the caption of image i; under `jit` over a mesh, the global batch.
      max_scale: 100 in CLIP (section 2.5). With a low one, only what separates most documents counts.
      duplicates: True where text i also describes image j != i (the same caption): not a negative.

    Returns:
      the loss, and metrics: `loss`, `accuracy` (share of texts that score their own image highest, duplicates aside).
    """
    logits = jnp.exp(jnp.minimum(logit_scale, math.log(max_scale))) * text @ image.T
    own = jnp.eye(logits.shape[0], dtype=bool)
    if duplicates is not None:
        logits = jnp.where(duplicates & ~own, -jnp.inf, logits)
    matched = jnp.sum(jnp.where(own, logits, 0), axis=1)  # the diagonal, of which each device has its own rows
    to_image = jax.nn.logsumexp(logits, axis=1) - matched
    to_text = jax.nn.logsumexp(logits, axis=0) - matched
    loss = (to_image.mean() + to_text.mean()) / 2
    return loss, {"loss": loss, "accuracy": jnp.mean(jnp.argmax(logits, axis=1) == jnp.arange(len(matched)))}
