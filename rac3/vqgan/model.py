"""The image tokenizer: VQGAN (arXiv 2012.09841) in Flax.

The architecture and the config fields are those of taming-transformers, in NHWC. Its checkpoints load by renaming:
`encoder.down.0.block.1.conv1` is `encoder/down_0_block_1/conv1` here, and so on for every weight.

    pixels uint8 -> preprocess -> encoder -> quant_conv -> nearest codes       -> the tokens, raster order
    pixels uint8 <- to_pixels  <- decoder <- post_quant_conv <- codebook[codes] <-

With `patch_size`, patches of pixels are the positions of the first level, as in the Cosmos tokenizer
(github.com/NVIDIA/Cosmos-Tokenizer, `patch_method` "rearrange"), so that no layer runs at full resolution.

`Codebook` holds the code vectors; `objective.py` fits one, `published.py` loads published ones.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from rac3.config import InputError

Params = dict[str, Any]
"""Nested parameters of a Flax module: module names down to arrays."""

Images = Float[Array, "batch height width channel"]
Features = Float[Array, "batch grid_height grid_width features"]
"""`Images` inside the model: other sizes, other channels."""


MOST_BLOCKS, MOST_LEVELS = 16, 16  # a file that claims more is damaged


@dataclass(frozen=True)
class VQGANConfig:
    """Field names and defaults of taming-transformers (`ddconfig`, `embed_dim`, `n_embed`), but for the last five."""

    ch: int = 128  # channels at the first level; level i has ch * ch_mult[i]
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
    patch_size: int = 1  # pixels a side that are one position of the first level, their colors its channels
    norm_groups: int = 32  # lowered to a divisor where a layer's channels ask for it
    latent_kernel: int = 3  # of convolutions at the lowest resolution; 1: a token hardly sees its neighbors
    mid_attn: bool = True  # False: no attention in the middle either, for small images on CPU
    quantizer: Literal["nearest", "gumbel"] = "nearest"  # gumbel: the code of the largest logit, a projection's

    def __post_init__(self) -> None:
        if not self.ch_mult:
            raise InputError("vqgan.ch_mult is empty; give one multiplier per level, such as (1, 2, 2, 4)")
        if min(self.ch_mult) < 1:
            raise InputError(f"vqgan.ch_mult={self.ch_mult} has a multiplier below 1; use at least 1 in every level")
        for name in (
            "ch",
            "num_res_blocks",
            "resolution",
            "in_channels",
            "out_ch",
            "z_channels",
            "embed_dim",
            "n_embed",
            "patch_size",
            "norm_groups",
            "latent_kernel",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"vqgan.{name}={getattr(self, name)} is below 1; use at least 1")
        if self.num_res_blocks > MOST_BLOCKS or len(self.ch_mult) > MOST_LEVELS:
            raise InputError(
                f"vqgan.num_res_blocks={self.num_res_blocks} or the {len(self.ch_mult)} levels of ch_mult are too "
                f"many; use at most {MOST_BLOCKS} and {MOST_LEVELS}"
            )
        downsampling = self.patch_size * 2 ** (len(self.ch_mult) - 1)
        if self.resolution % downsampling:
            patches = f"patches of {self.patch_size} pixels and the " if self.patch_size > 1 else ""
            raise InputError(
                f"vqgan.resolution={self.resolution} is not a multiple of {downsampling}, which the {patches}"
                f"{len(self.ch_mult)} levels of ch_mult downsample by; change either"
            )
        if not 0 <= self.dropout < 1:
            raise InputError(f"vqgan.dropout={self.dropout} is outside [0, 1); use 0 to switch it off")

    @property
    def grid(self) -> int:
        """Tokens along one side of an image."""
        return self.positions // 2 ** (len(self.ch_mult) - 1)

    @property
    def positions(self) -> int:
        """Positions along one side in the first level: the pixels, or the patches of them."""
        return self.resolution // self.patch_size

    @property
    def tokens_per_image(self) -> int:
        return self.grid**2


def at_resolution(config: VQGANConfig, resolution: int) -> VQGANConfig:
    """The same layers, with attention in the same levels, for images of another size."""
    other = replace(config, resolution=resolution)
    attends = (level for level in range(len(config.ch_mult)) if config.positions >> level in config.attn_resolutions)
    return replace(other, attn_resolutions=tuple(other.positions >> level for level in attends))


def _norm(config: VQGANConfig, channels: int, dtype: DTypeLike, name: str) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(config.norm_groups, channels), epsilon=1e-6, dtype=dtype, name=name)


def _conv(channels: int, size: int, dtype: DTypeLike, name: str) -> nn.Conv:
    return nn.Conv(channels, (size, size), padding="SAME", dtype=dtype, name=name)


def _kernel(config: VQGANConfig, height: int) -> int:
    return config.latent_kernel if height == config.grid else 3


def fold_patches(x: Images, size: int) -> Features:
    """Patches of `size` x `size` pixels as positions. Their channels are the pixels' in raster order, colors last."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // size, size, width // size, size, channels).swapaxes(2, 3)
    return x.reshape(batch, height // size, width // size, size * size * channels)


def unfold_patches(h: Features, size: int) -> Images:
    """The inverse of `fold_patches`."""
    batch, height, width, channels = h.shape
    h = h.reshape(batch, height, width, size, size, channels // size**2).swapaxes(2, 3)
    return h.reshape(batch, height * size, width * size, channels // size**2)


class ResnetBlock(nn.Module):
    config: VQGANConfig
    channels: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Images, train: bool) -> Float[Array, "batch height width features"]:
        h = nn.swish(_norm(self.config, x.shape[-1], self.dtype, "norm1")(x))
        kernel = _kernel(self.config, x.shape[1])
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
    """Each pixel repeated to 2 x 2, then a 3 x 3 convolution."""

    config: VQGANConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Images) -> Features:
        if not self.config.resamp_with_conv:
            return x.repeat(2, axis=1).repeat(2, axis=2)
        return UpsampleConv(x.shape[-1], self.dtype, name="conv")(x)


class UpsampleConv(nn.Module):
    """`conv3x3(x.repeat(2, axis=1).repeat(2, axis=2))` in 4/9 of its FLOPs, with the parameters of that convolution.

    Of the three rows under a kernel two are the same row of `x`, so their weights can be added first: an even row
    of the result sees rows i - 1 and i of `x` under the weights (k0, k1 + k2), an odd row sees i and i + 1 under
    (k0 + k1, k2). So with the columns: four 2 x 2 kernels, run as one convolution, whose outputs are interleaved.
    """

    channels: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Images) -> Features:
        batch, height, width, inputs = x.shape
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, inputs, self.channels))
        bias = self.param("bias", nn.initializers.zeros, (self.channels,))
        folded = [[_fold(_fold(kernel, odd_row, 0), odd_column, 1) for odd_column in (0, 1)] for odd_row in (0, 1)]
        kernels = jnp.concatenate([*folded[0], *folded[1]], axis=-1).astype(self.dtype)
        dimensions = ("NHWC", "HWIO", "NHWC")
        out = jax.lax.conv_general_dilated(
            x.astype(self.dtype), kernels, (1, 1), ((1, 1), (1, 1)), dimension_numbers=dimensions
        )
        out = out.reshape(batch, height + 1, width + 1, 2, 2, self.channels)
        rows = [[out[:, r : r + height, c : c + width, r, c] for c in (0, 1)] for r in (0, 1)]
        out = jnp.stack([jnp.stack(row, axis=3) for row in rows], axis=2)  # batch height 2 width 2 channels
        return out.reshape(batch, 2 * height, 2 * width, self.channels) + bias.astype(self.dtype)


def _fold(kernel: Array, odd: int, axis: int) -> Array:
    first, middle, last = (jax.lax.index_in_dim(kernel, i, axis) for i in range(3))
    return jnp.concatenate([first + middle, last] if odd else [first, middle + last], axis)


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
        resolution = config.positions
        x = fold_patches(x, config.patch_size)
        h = _conv(config.ch, _kernel(config, resolution), dtype, "conv_in")(x)
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
        h = _conv(config.out_ch * config.patch_size**2, _kernel(config, config.positions), dtype, "conv_out")(h)
        return unfold_patches(h, config.patch_size)


def nearest_codes(
    vectors: Float[Array, "rows channel"], embedding: Float[Array, "codes channel"], max_distances: int = 2**24
) -> Int[Array, " rows"]:
    """The index of the code nearest to each vector in squared distance, ties to the lowest; computed in float32.

    At most `max_distances` distances (64 MiB) exist at once: 16,384 codes against the 262,144 vectors of 256 images
    would be 17 GB.
    """
    embedding = embedding.astype(jnp.float32)
    return largest_logit(vectors, embedding, -0.5 * jnp.sum(embedding**2, axis=1), max_distances)


def largest_logit(
    vectors: Float[Array, "rows channel"],
    kernel: Float[Array, "codes channel"],
    bias: Float[Array, " codes"],
    max_logits: int = 2**24,
) -> Int[Array, " rows"]:
    """The index of the largest of `kernel @ vector + bias` for each vector, ties to the lowest; computed in float32, at
    most `max_logits` at once."""
    vectors, kernel, bias = (x.astype(jnp.float32) for x in (vectors, kernel, bias))

    def largest(vector: Float[Array, " channel"]) -> Int[Array, ""]:
        # highest precision: an accelerator's default would round the products to 10 bits and pick other codes
        return jnp.argmax(bias + jnp.matmul(kernel, vector, precision=jax.lax.Precision.HIGHEST))

    chunk = max(1, max_logits // kernel.shape[0])
    if vectors.shape[0] <= chunk:
        return jax.vmap(largest)(vectors)
    return jax.lax.map(largest, vectors, batch_size=chunk)


class Codebook(nn.Module):
    config: VQGANConfig

    def setup(self) -> None:
        shape = (self.config.n_embed, self.config.embed_dim)
        self.embedding = self.param("embedding", nn.initializers.normal(), shape)
        if self.config.quantizer == "gumbel":
            self.proj_kernel = self.param("proj_kernel", nn.initializers.normal(), shape)
            self.proj_bias = self.param("proj_bias", nn.initializers.zeros, shape[:1])

    def codes(self, z: Features) -> Int[Array, "batch tokens"]:
        rows = z.reshape(-1, z.shape[-1])
        if self.config.quantizer == "gumbel":  # the likeliest code: noise is for training
            return largest_logit(rows, self.proj_kernel, self.proj_bias).reshape(z.shape[0], -1)
        return nearest_codes(rows, self.embedding).reshape(z.shape[0], -1)

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
        """The vectors before they are quantized, `(batch, grid, grid, embed_dim)`, float32; images in [-1, 1]."""
        return self.quant_conv(self.encoder(images, train)).astype(jnp.float32)

    def encode(self, images: Images) -> Int[Array, "batch tokens"]:
        """Images in [-1, 1] to codes in [0, n_embed), row by row from the top left."""
        return self.codebook.codes(self.latents(images))

    def decode(self, codes: Int[Array, "batch tokens"]) -> Images:
        """Codes to images in about [-1, 1]; `to_pixels` clips."""
        return self._draw(self.codebook.vectors(codes), train=False)

    def _draw(self, vectors: Features, train: bool) -> Images:
        return self.decoder(self.post_quant_conv(vectors), train).astype(jnp.float32)

    def __call__(self, images: Images, train: bool = False) -> VQGANOutput:
        """Encode and decode, the gradient passing straight from the codes' vectors to the encoder's."""
        latents = self.latents(images, train)
        codes = self.codebook.codes(latents)
        quantized = jax.lax.stop_gradient(self.codebook.vectors(codes))
        straight_through = latents + jax.lax.stop_gradient(quantized - latents)
        return VQGANOutput(self._draw(straight_through, train), codes, latents, quantized)


def preprocess(pixels: UInt8[Array | np.ndarray, "batch height width channel"]) -> Images:
    """uint8 pixels to the [-1, 1] that the model takes."""
    return jnp.asarray(pixels, jnp.float32) / 127.5 - 1


def to_pixels(images: Images) -> UInt8[Array, "batch height width channel"]:
    """The inverse of `preprocess`, clipped and rounded."""
    return jnp.round((jnp.clip(images, -1, 1) + 1) * 127.5).astype(jnp.uint8)
