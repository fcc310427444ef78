"""The image tokenizer: VQGAN (arXiv 2012.09841) in Flax, and the objective that fits one.

The architecture and the config fields are those of taming-transformers, in NHWC, so that its checkpoints load by
renaming: `encoder.down.0.block.1.conv1` is `encoder/down_0_block_1/conv1` here, and so on for every weight.

    pixels uint8 -> preprocess -> encoder -> quant_conv -> nearest codes       -> the tokens, raster order
    pixels uint8 <- to_pixels  <- decoder <- post_quant_conv <- codebook[codes] <-

`Codebook` holds the code vectors. While fitting they follow the encoder by moving averages (arXiv 1711.00937,
appendix A.1) rather than by gradient, and a code that nothing uses is moved to where the data is. The objective has no
perceptual or adversarial term: it suits small flat pictures; for photographs, load a public checkpoint.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, cast, no_type_check

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from rac3.config import InputError

Params = dict[str, Any]
"""Nested parameters of a Flax module: module names down to arrays."""

Images = Float[Array, "batch height width channel"]
Features = Float[Array, "batch grid_height grid_width features"]
"""What becomes of `Images` inside: other sizes, other channels."""


@dataclass(frozen=True)
class VQGANConfig:
    """Field names and defaults of taming-transformers (`ddconfig`, `embed_dim`, `n_embed`), but for the last three."""

    ch: int = 128  # channels at full resolution; level i has ch * ch_mult[i]
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)  # each level but the last halves height and width
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = (16,)  # attention in the levels of this height
    resolution: int = 256  # pixels, height and width
    in_channels: int = 3
    out_ch: int = 3
    z_channels: int = 256
    embed_dim: int = 256
    n_embed: int = 1024
    dropout: float = 0.0
    resamp_with_conv: bool = True
    norm_groups: int = 32  # lowered to a divisor where a layer's channels ask for it
    latent_kernel: int = 3  # of the convolutions at the lowest resolution; 1 keeps a token from looking at its neighbors
    mid_attn: bool = True  # False: no attention in the middle either, for small pictures on CPU

    def __post_init__(self) -> None:
        if not self.ch_mult:
            raise InputError("vqgan.ch_mult is empty; give one multiplier per level, such as (1, 2, 2, 4)")
        downsampling = 2 ** (len(self.ch_mult) - 1)
        if self.resolution % downsampling:
            raise InputError(
                f"vqgan.resolution={self.resolution} is not a multiple of {downsampling}, which the "
                f"{len(self.ch_mult)} levels of ch_mult downsample by; change either"
            )
        for name in ("ch", "num_res_blocks", "resolution", "z_channels", "embed_dim", "n_embed", "norm_groups", "latent_kernel"):
            if getattr(self, name) < 1:
                raise InputError(f"vqgan.{name}={getattr(self, name)} is below 1; use at least 1")
        if not 0 <= self.dropout < 1:
            raise InputError(f"vqgan.dropout={self.dropout} is outside [0, 1); use 0 to switch it off")

    @property
    def grid(self) -> int:
        """Tokens along one side of an image."""
        return self.resolution // 2 ** (len(self.ch_mult) - 1)

    @property
    def tokens_per_image(self) -> int:
        return self.grid**2


def _norm(config: VQGANConfig, channels: int, dtype: DTypeLike, name: str) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(config.norm_groups, channels), epsilon=1e-6, dtype=dtype, name=name)


def _conv(channels: int, size: int, dtype: DTypeLike, name: str) -> nn.Conv:
    return nn.Conv(channels, (size, size), padding="SAME", dtype=dtype, name=name)


class ResnetBlock(nn.Module):
    config: VQGANConfig
    channels: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Images, train: bool) -> Float[Array, "batch height width features"]:
        h = nn.swish(_norm(self.config, x.shape[-1], self.dtype, "norm1")(x))
        kernel = self.config.latent_kernel if x.shape[1] == self.config.grid else 3
        h = _conv(self.channels, kernel, self.dtype, "conv1")(h)
        h = nn.swish(_norm(self.config, h.shape[-1], self.dtype, "norm2")(h))
        h = nn.Dropout(self.config.dropout, deterministic=not train)(h)
        h = _conv(self.channels, kernel, self.dtype, "conv2")(h)
        if x.shape[-1] != self.channels:
            x = _conv(self.channels, 1, self.dtype, "nin_shortcut")(x)
        return x + h


class AttnBlock(nn.Module):
    """Single-head attention over all positions of the feature map."""

    config: VQGANConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Images) -> Images:
        batch, height, width, channels = x.shape
        h = _norm(self.config, x.shape[-1], self.dtype, "norm")(x)
        q, k, v = (
            _conv(channels, 1, self.dtype, name)(h).reshape(batch, height * width, channels) for name in ("q", "k", "v")
        )
        scores = jnp.einsum("bqc,bkc->bqk", q, k, preferred_element_type=jnp.float32) * channels**-0.5
        weights = nn.softmax(scores).astype(self.dtype)
        h = jnp.einsum("bqk,bkc->bqc", weights, v).reshape(batch, height, width, channels)
        return x + _conv(channels, 1, self.dtype, "proj_out")(h)


class Downsample(nn.Module):
    config: VQGANConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Images) -> Features:
        if not self.config.resamp_with_conv:
            return nn.avg_pool(x, (2, 2), (2, 2))
        padding = ((0, 1), (0, 1))  # below and to the right only
        return nn.Conv(x.shape[-1], (3, 3), strides=2, padding=padding, dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
    config: VQGANConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Images) -> Features:
        x = x.repeat(2, axis=1).repeat(2, axis=2)
        return _conv(x.shape[-1], 3, self.dtype, "conv")(x) if self.config.resamp_with_conv else x


def _middle(config: VQGANConfig, dtype: DTypeLike, h: Images, train: bool) -> Images:
    h = ResnetBlock(config, h.shape[-1], dtype, name="mid_block_1")(h, train)
    if config.mid_attn:
        h = AttnBlock(config, dtype, name="mid_attn_1")(h)
    return ResnetBlock(config, h.shape[-1], dtype, name="mid_block_2")(h, train)


class Encoder(nn.Module):
    config: VQGANConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Images, train: bool = False) -> Features:
        config, dtype = self.config, self.dtype
        resolution = config.resolution
        h = _conv(config.ch, 3, dtype, "conv_in")(x)
        for level, multiplier in enumerate(config.ch_mult):
            for block in range(config.num_res_blocks):
                h = ResnetBlock(config, config.ch * multiplier, dtype, name=f"down_{level}_block_{block}")(h, train)
                if resolution in config.attn_resolutions:
                    h = AttnBlock(config, dtype, name=f"down_{level}_attn_{block}")(h)
            if level < len(config.ch_mult) - 1:
                h = Downsample(config, dtype, name=f"down_{level}_downsample")(h)
                resolution //= 2
        h = _middle(config, dtype, h, train)
        h = nn.swish(_norm(config, h.shape[-1], dtype, "norm_out")(h))
        return _conv(config.z_channels, config.latent_kernel, dtype, "conv_out")(h)


class Decoder(nn.Module):
    config: VQGANConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, z: Features, train: bool = False) -> Images:
        config, dtype = self.config, self.dtype
        resolution = config.grid
        h = _conv(config.ch * config.ch_mult[-1], config.latent_kernel, dtype, "conv_in")(z)
        h = _middle(config, dtype, h, train)
        for level, multiplier in reversed(list(enumerate(config.ch_mult))):
            for block in range(config.num_res_blocks + 1):
                h = ResnetBlock(config, config.ch * multiplier, dtype, name=f"up_{level}_block_{block}")(h, train)
                if resolution in config.attn_resolutions:
                    h = AttnBlock(config, dtype, name=f"up_{level}_attn_{block}")(h)
            if level:
                h = Upsample(config, dtype, name=f"up_{level}_upsample")(h)
                resolution *= 2
        h = nn.swish(_norm(config, h.shape[-1], dtype, "norm_out")(h))
        return _conv(config.out_ch, 3, dtype, "conv_out")(h)


def nearest_codes(
    vectors: Float[Array, "rows channel"], embedding: Float[Array, "codes channel"], max_distances: int = 2**24
) -> Int[Array, "rows"]:
    """The index of the code nearest to each vector in squared distance, ties to the lowest; computed in float32.

    At most `max_distances` distances (64 MiB) exist at once: 16,384 codes against the 262,144 vectors of 256 pictures
    would be 17 GB.
    """
    vectors, embedding = vectors.astype(jnp.float32), embedding.astype(jnp.float32)
    half_norms = 0.5 * jnp.sum(embedding**2, axis=1)

    def nearest(vector: Float[Array, "channel"]) -> Int[Array, ""]:
        # highest precision: an accelerator's default would round the products to 10 bits and pick other codes
        return jnp.argmin(half_norms - jnp.matmul(embedding, vector, precision=jax.lax.Precision.HIGHEST))

    chunk = max(1, max_distances // embedding.shape[0])
    if vectors.shape[0] <= chunk:
        return jax.vmap(nearest)(vectors)
    return jax.lax.map(nearest, vectors, batch_size=chunk)


class Codebook(nn.Module):
    config: VQGANConfig

    def setup(self) -> None:
        shape = (self.config.n_embed, self.config.embed_dim)
        self.embedding = self.param("embedding", nn.initializers.normal(), shape)

    def nearest(self, z: Features) -> Int[Array, "batch tokens"]:
        return nearest_codes(z.reshape(-1, z.shape[-1]), self.embedding).reshape(z.shape[0], -1)

    def vectors(self, codes: Int[Array, "batch tokens"]) -> Features:
        grid = self.config.grid
        return self.embedding[codes].reshape(codes.shape[0], grid, grid, -1)


class VQGANOutput(NamedTuple):
    reconstruction: Images  # in [-1, 1], not clipped
    codes: Int[Array, "batch tokens"]
    latents: Features  # the encoder's vectors, float32, before they are replaced by their nearest codes
    quantized: Features  # the codes' vectors, without gradient


class VQGAN(nn.Module):
    config: VQGANConfig
    dtype: DTypeLike = jnp.float32  # of the convolutions; distances to the codes are float32 always

    def setup(self) -> None:
        self.encoder = Encoder(self.config, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)
        self.codebook = Codebook(self.config)
        self.quant_conv = nn.Conv(self.config.embed_dim, (1, 1), dtype=self.dtype)
        self.post_quant_conv = nn.Conv(self.config.z_channels, (1, 1), dtype=self.dtype)

    def latents(self, images: Images, train: bool = False) -> Features:
        """The vectors that the codes stand for, `(batch, grid, grid, embed_dim)`, float32; images in [-1, 1]."""
        return self.quant_conv(self.encoder(images, train)).astype(jnp.float32)

    def encode(self, images: Images) -> Int[Array, "batch tokens"]:
        """Images in [-1, 1] to codes in [0, n_embed), row by row from the top left."""
        return self.codebook.nearest(self.latents(images))

    def decode(self, codes: Int[Array, "batch tokens"]) -> Images:
        """Codes to images in about [-1, 1]; `to_pixels` clips."""
        return self._draw(self.codebook.vectors(codes), train=False)

    def _draw(self, vectors: Features, train: bool) -> Images:
        return self.decoder(self.post_quant_conv(vectors), train).astype(jnp.float32)

    def __call__(self, images: Images, train: bool = False) -> VQGANOutput:
        """Encode and decode, the gradient passing straight from the codes' vectors to the encoder's."""
        latents = self.latents(images, train)
        codes = self.codebook.nearest(latents)
        quantized = jax.lax.stop_gradient(self.codebook.vectors(codes))
        straight_through = latents + jax.lax.stop_gradient(quantized - latents)
        return VQGANOutput(self._draw(straight_through, train), codes, latents, quantized)


def preprocess(pixels: UInt8[Array | np.ndarray, "batch height width channel"]) -> Images:
    """uint8 pixels to the [-1, 1] that the model takes."""
    return jnp.asarray(pixels, jnp.float32) / 127.5 - 1


def to_pixels(images: Images) -> UInt8[Array, "batch height width channel"]:
    """The inverse of `preprocess`, clipped and rounded."""
    return jnp.round((jnp.clip(images, -1, 1) + 1) * 127.5).astype(jnp.uint8)


def psnr(a: UInt8[np.ndarray, "*shape"], b: UInt8[np.ndarray, "*shape"]) -> float:
    """Peak signal-to-noise ratio in dB over all the pixels of both arrays; infinite if they are equal."""
    mse = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return math.inf if mse == 0 else 10 * math.log10(255**2 / mse)


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
    drawn = vectors[jnp.argsort(-noisy)[jnp.arange(len(counts)) % len(vectors)]]
    size = jnp.where(dead, even_use, size)
    vector_sum = jnp.where(dead[:, None], drawn * even_use, vector_sum)
    embedding = jnp.where(dead[:, None], drawn, embedding)
    return CodebookState(embedding, size, vector_sum)


def locality_loss(
    model: VQGAN, variables: Params, images: Images, latents: Images, key: PRNGKeyArray
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
