"""The objective that fits a VQGAN.

Code vectors follow the encoder by moving averages (arXiv 1711.00937, appendix A.1) rather than by gradient, and a code
that nothing uses is moved to where the data is. There is no perceptual or adversarial term: the objective suits small
flat pictures; photographs want a public checkpoint.
"""

from dataclasses import dataclass
from typing import cast, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from rac3.config import InputError
from rac3.tokens.vqgan import VQGAN, Features, Images, Params, VQGANOutput


@dataclass(frozen=True)
class VQGANObjective:
    """Weights of the fitting objective and the pace of the codebook."""

    l1: float = 1.0
    l2: float = 1.0
    beta: float = 0.25  # commitment: pulls the encoder's vectors to their codes
    locality: float = 0.0  # pulls a patch's vector to what it is among other neighbors; see `locality_loss`
    decay: float = 0.95  # of the moving averages, per step; slower than the encoder moves, most codes die
    smoothing: float = 1e-5  # Laplace smoothing of the cluster sizes
    revive_below: float = 0.03  # a code with less than this share of an even use is dead; 0 never revives

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise InputError(f"vqgan objective: decay={self.decay} is outside [0, 1); 0.9 to 0.99 is usual")
        if not 0 <= self.revive_below < 1:
            raise InputError(
                f"vqgan objective: revive_below={self.revive_below} is outside [0, 1); use 0 to switch off"
            )


@no_type_check  # of the constructor at run time: JAX rebuilds it with leaves of any kind
class CodebookState(flax.struct.PyTreeNode):
    """The codebook while it is fitted: moving averages per code of the vectors that it is nearest to."""

    embedding: Float[Array, "codes channel"]
    cluster_size: Float[Array, "codes"]  # vectors per batch
    vector_sum: Float[Array, "codes channel"]


def with_codebook(params: Params, codebook: CodebookState) -> Params:
    """`params` with the fitted code vectors in their place: what `save_params` should keep."""
    return {**params, "codebook": {"embedding": codebook.embedding}}


def init_codebook_from_batch(model: VQGAN, params: Params, images: Images, key: PRNGKeyArray) -> CodebookState:
    """Code vectors drawn from the encoder's for `images` (each once, if those suffice), as if all were used evenly."""
    latents = cast(Array, model.apply({"params": params}, images, method="latents"))
    vectors = latents.reshape(-1, model.config.embed_dim)
    codes = model.config.n_embed
    embedding = jax.random.choice(key, vectors, (codes,), replace=len(vectors) < codes)
    cluster_size = jnp.full(codes, len(vectors) / codes)
    return CodebookState(embedding, cluster_size, embedding * cluster_size[:, None])


def update_codebook(
    objective: VQGANObjective,
    codebook: CodebookState,
    vectors: Float[Array, "rows channel"],
    codes: Int[Array, "rows"],
    key: PRNGKeyArray,
) -> CodebookState:
    """One step of the moving averages, then dead codes move to vectors of the batch that have no good code yet.

    They are drawn without replacement with probability in proportion to the squared distance to their code, as
    k-means++ seeds its centers: drawn evenly, they would split what is frequent into several codes for one thing.
    """
    counts = jnp.zeros_like(codebook.cluster_size).at[codes].add(1.0)
    sums = jnp.zeros_like(codebook.vector_sum).at[codes].add(vectors)
    size = objective.decay * codebook.cluster_size + (1 - objective.decay) * counts
    vector_sum = objective.decay * codebook.vector_sum + (1 - objective.decay) * sums
    total, even_use = jnp.sum(size), len(vectors) / len(counts)
    smoothed = (size + objective.smoothing) / (total + len(counts) * objective.smoothing) * total
    embedding = vector_sum / smoothed[:, None]

    # a revived code starts as if evenly used, so that it has time to win vectors before it counts as dead again
    dead = size < objective.revive_below * even_use
    error = jnp.sum((vectors - codebook.embedding[codes]) ** 2, axis=1)
    noisy = jnp.log(error + 1e-12) + jax.random.gumbel(key, error.shape)
    rank = jnp.maximum(jnp.cumsum(dead) - 1, 0)  # the first dead code gets the first draw
    drawn = vectors[jnp.argsort(-noisy)[rank % len(vectors)]]
    size = jnp.where(dead, even_use, size)
    vector_sum = jnp.where(dead[:, None], drawn * even_use, vector_sum)
    embedding = jnp.where(dead[:, None], drawn, embedding)
    return CodebookState(embedding, size, vector_sum)


def locality_loss(
    model: VQGAN, variables: Params, images: Images, latents: Features, key: PRNGKeyArray
) -> Float[Array, ""]:
    """How much a patch's vector depends on the patches around it, as a share of the variance of all vectors.

    Half of the patches of each image are exchanged for those of the next image; every patch should keep its vector.
    A picture part that has the same codes wherever it stands is one that a language model can copy from a retrieved
    document.
    """
    grid, patch = latents.shape[1], images.shape[1] // latents.shape[1]
    own = jax.random.bernoulli(key, 0.5, (len(images), grid, grid, 1))
    own_pixels = own.repeat(patch, axis=1).repeat(patch, axis=2)
    mixed = jnp.where(own_pixels, images, jnp.roll(images, 1, axis=0))
    wanted = jax.lax.stop_gradient(jnp.where(own, latents, jnp.roll(latents, 1, axis=0)))
    moved = cast(Array, model.apply(variables, mixed, True, method="latents"))
    error = jnp.mean((moved - wanted) ** 2)
    return error / (jnp.mean(jnp.var(wanted, axis=(0, 1, 2))) + 1e-6)


def vqgan_loss(
    model: VQGAN,
    objective: VQGANObjective,
    params: Params,
    codebook: CodebookState,
    images: Images,
    key: PRNGKeyArray,
) -> tuple[Float[Array, ""], tuple[CodebookState, dict[str, Float[Array, ""]]]]:
    """The fitting loss on images in [-1, 1], for `jax.value_and_grad(..., argnums=2, has_aux=True)`.

    loss = l1 |x - x'| + l2 (x - x')^2 + beta (z - stop_gradient(code))^2, means over all elements. The code vectors
    are those of `codebook`, which moves on without gradient; `params["codebook"]` is ignored.

    Returns:
      the loss, and (the next codebook, metrics). Metrics, of this batch: `loss`, `l1` and `mse` (of values in [0, 1]),
      `psnr` (dB, over the whole batch), `commitment`, `perplexity` of the codes (1 to n_embed), `codes_used` (share).
    """
    dropout_key, codebook_key, mix_key = jax.random.split(key, 3)
    variables = {"params": with_codebook(params, codebook)}
    out = cast(VQGANOutput, model.apply(variables, images, train=True, rngs={"dropout": dropout_key}))
    error = out.reconstruction - images
    l1, l2 = jnp.mean(jnp.abs(error)), jnp.mean(error**2)
    commitment = jnp.mean((out.latents - out.quantized) ** 2)
    loss = objective.l1 * l1 + objective.l2 * l2 + objective.beta * commitment
    if objective.locality > 0:
        loss += objective.locality * locality_loss(model, variables, images, out.latents, mix_key)

    vectors = jax.lax.stop_gradient(out.latents).reshape(-1, model.config.embed_dim)
    codes = out.codes.reshape(-1)
    updated = update_codebook(objective, codebook, vectors, codes, codebook_key)
    share = jnp.zeros(model.config.n_embed).at[codes].add(1.0 / codes.size)
    mse = l2 / 4  # errors over [0, 1] are half of those over [-1, 1]
    metrics = {
        "loss": loss,
        "l1": l1 / 2,
        "mse": mse,
        "psnr": -10 * jnp.log10(mse),
        "commitment": commitment,
        "perplexity": jnp.exp(-jnp.sum(jax.scipy.special.xlogy(share, share))),
        "codes_used": jnp.mean(share > 0),
    }
    return loss, (updated, metrics)
