"""The objective that fits a VQGAN.

Code vectors follow the encoder by moving averages (arXiv 1711.00937, appendix A.1) rather than by gradient, and an
unused code is moved to where the data is. By default the loss is of pixels, which suits small flat images. The rest of
VQGAN's objective (arXiv 2012.09841) is off by default: the adversarial loss (`discriminator.py`), the perceptual one
(`perceptual.py`, with the user's weights), and the average of the generator's weights.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, cast, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from rac3.config import InputError
from rac3.vqgan.discriminator import AdversarialConfig
from rac3.vqgan.model import VQGAN, Features, Images, Params, VQGANOutput
from rac3.vqgan.perceptual import LPIPS, PerceptualConfig, lpips


@dataclass(frozen=True)
class VQGANObjective:
    """Weights of the fitting objective and the pace of the codebook."""

    l1: float = 1.0
    l2: float = 1.0
    beta: float = 0.25  # commitment: pulls the encoder's vectors toward their codes
    locality: float = 0.0  # pulls a patch's vector toward its vector among other neighbors; see `locality_loss`
    decay: float = 0.95  # of the moving averages, per step; slower than the encoder moves, most codes die
    smoothing: float = 1e-5  # Laplace smoothing of the cluster sizes
    revive_below: float = 0.03  # a code used less than this share of the mean is dead; 0 never revives
    ema_decay: float = 0.0  # of the average of the weights, which the fit returns; see `averaged`; 0 returns the last
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise InputError(f"vqgan objective: decay={self.decay} is outside [0, 1); 0.9 to 0.99 is usual")
        if not 0 <= self.revive_below < 1:
            raise InputError(
                f"vqgan objective: revive_below={self.revive_below} is outside [0, 1); use 0 to switch off"
            )
        if not 0 <= self.ema_decay < 1:
            raise InputError(
                f"vqgan objective: ema_decay={self.ema_decay} is outside [0, 1); 0.999 is usual, 0 switches off"
            )


@no_type_check  # of the constructor at run time: JAX rebuilds it with leaves of any kind
class CodebookState(flax.struct.PyTreeNode):
    """The state of the codebook's fit: per code, moving averages of the vectors that it is nearest to."""

    embedding: Float[Array, "codes channel"]
    cluster_size: Float[Array, " codes"]  # vectors per batch
    vector_sum: Float[Array, "codes channel"]


def with_codebook(params: Params, codebook: CodebookState) -> Params:
    """`params` with the fitted code vectors, to save."""
    return {**params, "codebook": {"embedding": codebook.embedding}}


def init_codebook_from_batch(model: VQGAN, params: Params, images: Images, key: PRNGKeyArray) -> CodebookState:
    """Code vectors drawn from the encoder's for `images` (none twice if there are enough), all used evenly."""
    latents = cast(Array, model.apply({"params": params}, images, method="latents"))
    vectors = latents.reshape(-1, model.config.embed_dim)
    codes = model.config.n_embed
    embedding = jax.random.choice(key, vectors, (codes,), replace=len(vectors) < codes)
    cluster_size = jnp.full(codes, len(vectors) / codes, jnp.float32)
    return CodebookState(embedding, cluster_size, embedding * cluster_size[:, None])


def update_codebook(
    objective: VQGANObjective,
    codebook: CodebookState,
    vectors: Float[Array, "rows channel"],
    codes: Int[Array, " rows"],
    key: PRNGKeyArray,
) -> CodebookState:
    """One step of the moving averages; then dead codes move to vectors of the batch that have no good code yet.

    These are drawn without replacement with probability proportional to the squared distance to their code, as
    k-means++ seeds its centers. A uniform draw would give frequent vectors several codes.
    """
    counts = jnp.zeros_like(codebook.cluster_size).at[codes].add(1.0)
    sums = jnp.zeros_like(codebook.vector_sum).at[codes].add(vectors)
    size = objective.decay * codebook.cluster_size + (1 - objective.decay) * counts
    vector_sum = objective.decay * codebook.vector_sum + (1 - objective.decay) * sums
    total, even_use = jnp.sum(size), len(vectors) / len(counts)
    smoothed = (size + objective.smoothing) / (total + len(counts) * objective.smoothing) * total
    embedding = vector_sum / smoothed[:, None]

    # a revived code starts as if evenly used: it has time to win vectors before it counts as dead again
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
    model: VQGAN, variables: Params, images: Images, latents: Features, key: PRNGKeyArray, dropout_key: PRNGKeyArray
) -> Float[Array, ""]:
    """How much a patch's vector depends on the patches around it, as a share of the variance of all vectors.

    Half of the patches of each image are exchanged for those of the next image; every patch should keep its vector.
    A language model can copy a part of a retrieved image if that part has the same codes everywhere.

    Args:
      dropout_key: the one that `latents` were computed with, or dropout alone would move vectors.
    """
    grid, patch = latents.shape[1], images.shape[1] // latents.shape[1]
    own = jax.random.bernoulli(key, 0.5, (len(images), grid, grid, 1))
    own_pixels = own.repeat(patch, axis=1).repeat(patch, axis=2)
    mixed = jnp.where(own_pixels, images, jnp.roll(images, 1, axis=0))
    wanted = jax.lax.stop_gradient(jnp.where(own, latents, jnp.roll(latents, 1, axis=0)))
    moved = cast(Array, model.apply(variables, mixed, True, method="latents", rngs={"dropout": dropout_key}))
    error = jnp.mean((moved - wanted) ** 2)
    return error / (jnp.mean(jnp.var(wanted, axis=(0, 1, 2))) + 1e-6)


class Step(NamedTuple):
    """The results of one batch: gradients of the generator's loss, the next codebook, and metrics."""

    gradients: Params
    codebook: CodebookState
    reconstruction: Images  # in [-1, 1], not clipped
    metrics: dict[str, Float[Array, ""]]


def vqgan_step(
    model: VQGAN,
    objective: VQGANObjective,
    params: Params,
    codebook: CodebookState,
    images: Images,
    key: PRNGKeyArray,
    perceptual: LPIPS | None = None,
    adversary: Callable[[Images], Float[Array, ""]] | None = None,
) -> Step:
    """The gradients of the fitting loss on images in [-1, 1].

    L = L_rec + beta (z - stop_gradient(code))^2 + weight lambda L_GAN, means over all elements, where
    L_rec = l1 |x - x'| + l2 (x - x')^2 + weight LPIPS(x, x') with `perceptual`, and L_GAN is `adversary(x')`. The code
    vectors are those of `codebook`, which moves on without gradient; `params["codebook"]` is ignored.

    Metrics, of this batch: `loss`, `l1` and `mse` (of values in [0, 1]), `psnr` (dB, over the whole batch),
    `commitment`, `perplexity` of the codes (1 to n_embed), `codes_used` (share); `perceptual`; `generator_loss` (L_GAN)
    and `adaptive_weight` (lambda).
    """
    dropout_key, codebook_key, mix_key = jax.random.split(key, 3)

    def forward(params: Params) -> tuple[tuple[Images, Array], tuple[VQGANOutput, Array]]:
        variables = {"params": with_codebook(params, codebook)}
        out = cast(VQGANOutput, model.apply(variables, images, train=True, rngs={"dropout": dropout_key}))
        commitment = jnp.mean((out.latents - out.quantized) ** 2)
        latent_loss = objective.beta * commitment
        if objective.locality > 0:
            moved = locality_loss(model, variables, images, out.latents, mix_key, dropout_key)
            latent_loss += objective.locality * moved
        return (out.reconstruction, latent_loss), (out, commitment)

    def reconstruction_loss(reconstruction: Images) -> tuple[Array, dict[str, Array]]:
        error = reconstruction - images
        l1, l2 = jnp.mean(jnp.abs(error)), jnp.mean(error**2)
        mse = l2 / 4  # errors over [0, 1] are half of those over [-1, 1]
        metrics = {"l1": l1 / 2, "mse": mse, "psnr": -10 * jnp.log10(mse)}
        loss = objective.l1 * l1 + objective.l2 * l2
        if perceptual is not None:
            metrics["perceptual"] = jnp.mean(lpips(perceptual, images, reconstruction))
            loss += objective.perceptual.weight * metrics["perceptual"]
        return loss, metrics

    # Each loss is differentiated by the reconstruction first; the sum goes back through the generator once.
    (reconstruction, latent_loss), pull, (out, commitment) = jax.vjp(forward, params, has_aux=True)
    (loss, metrics), toward = jax.value_and_grad(reconstruction_loss, has_aux=True)(reconstruction)
    loss += latent_loss
    if adversary is not None:
        adversarial, toward_real = jax.value_and_grad(adversary)(reconstruction)

        def last_layer(toward: Images) -> Array:  # all other gradients of this pull are unused, so never computed
            return pull((toward, jnp.zeros(())))[0]["decoder"]["conv_out"]["kernel"]

        weight = adaptive_weight(last_layer(toward), last_layer(toward_real))
        metrics |= {"generator_loss": adversarial, "adaptive_weight": weight}
        toward += objective.adversarial.weight * weight * toward_real
        loss += objective.adversarial.weight * weight * adversarial
    (gradients,) = pull((toward, jnp.ones(())))

    codes = out.codes.reshape(-1)
    updated = update_codebook(objective, codebook, out.latents.reshape(-1, model.config.embed_dim), codes, codebook_key)
    share = jnp.zeros(model.config.n_embed).at[codes].add(1.0 / codes.size)
    metrics |= {
        "loss": loss,
        "commitment": commitment,
        "perplexity": jnp.exp(-jnp.sum(jax.scipy.special.xlogy(share, share))),
        "codes_used": jnp.mean(share > 0),
    }
    return Step(gradients, updated, reconstruction, metrics)


def adaptive_weight(reconstruction: Float[Array, "*shape"], adversarial: Float[Array, "*shape"]) -> Float[Array, ""]:
    """lambda = |gradient of L_rec| / (|gradient of L_GAN| + 1e-4), at most 1e4: both by the decoder's last kernel.

    Equation 7 of the paper, which has 1e-6; its published code has 1e-4, and the bound.
    """
    ratio = jnp.linalg.norm(reconstruction.ravel()) / (jnp.linalg.norm(adversarial.ravel()) + 1e-4)
    return jnp.minimum(ratio, 1e4)


def averaged(decay: float, average: Params, params: Params, updates: Int[Array, ""]) -> Params:
    """The moving average of the parameters after one more update; `updates` have gone into it so far.

    It begins as the initial parameters. The decay warms up, so that even a short run forgets them and its first steps:
    min(decay, (1 + updates) / (10 + updates)) averages over about the last tenth of the run until it reaches `decay`.
    """
    decays = jnp.minimum(decay, (1 + updates) / (10 + updates))
    return optax.incremental_update(params, average, 1 - decays)
