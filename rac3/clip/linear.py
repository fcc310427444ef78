"""CLIP with two linear towers: a sum of token vectors, and a projection of the features of a frozen EfficientNet-Lite0.

Small data suffices for it, and since the features are computed once, so does a minute of one CPU core.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from rac3.clip.efficientnet import DEVIATION, MEAN, POOLED, pooled_stages
from rac3.clip.images import ClipImages
from rac3.clip.model import CLIPTextConfig, unit_norm
from rac3.config import InputError

SMALLEST = 32  # pixels: EfficientNet halves the sides five times
PATCH = 16  # pixels: the side of what query dropout drops
FIRST_STAGE = 3  # the first whose maps count: 80, 112, 192 and 320 channels, then the 1,280 of the head
WIDTH = sum(POOLED[FIRST_STAGE:])
IMAGES = ClipImages(mean=(MEAN / 255,) * 3, std=(DEVIATION / 255,) * 3, steps="crop, scale")


@dataclass(frozen=True)
class LinearConfig:
    """CLIP with two linear towers: a text is the sum of its tokens' vectors, an image a projection of its features.

    The features are those of EfficientNet-Lite0, trained on ImageNet and frozen. A fit takes its weights from the
    package of the extra `features`; the artifact holds them.

    Attributes:
      vocab_size: of the text tower, whose last id ends a text.
      projection_dim: width of the vectors.
      image_size: to which images are scaled, a multiple of 16. EfficientNet-Lite0 was trained at 224.
    """

    vocab_size: int = 49408
    projection_dim: int = 128
    image_size: int = 224

    def __post_init__(self) -> None:
        if self.image_size < SMALLEST or self.image_size % PATCH:
            raise InputError(
                f"clip: image_size={self.image_size} must be a multiple of {PATCH}, and at least {SMALLEST}; "
                "EfficientNet-Lite0 was trained at 224"
            )
        if self.projection_dim < 1:
            raise InputError(f"clip: projection_dim={self.projection_dim} is below 1; use at least 1")

    @property
    def text_config(self) -> CLIPTextConfig:
        """What the reader of texts asks of a text tower."""
        return CLIPTextConfig(vocab_size=self.vocab_size, eos_token_id=self.vocab_size - 1)


class Features(nn.Module):
    """Normalized pixels to the features that are projected."""

    @nn.compact
    def __call__(self, pixels: Float[Array, "batch size size 3"]) -> Float[Array, "batch channel"]:
        return jnp.concatenate(pooled_stages(pixels)[FIRST_STAGE:], axis=1)


class Standardize(nn.Module):
    """Features less their mean, over their deviation, of the documents that the towers were fitted on."""

    @nn.compact
    def __call__(self, features: Float[Array, "batch channel"]) -> Float[Array, "batch channel"]:
        mean = self.param("mean", nn.initializers.zeros, features.shape[1:])
        return (features - mean) / self.param("deviation", nn.initializers.ones, features.shape[1:])


class LinearTowers(nn.Module):
    """The towers; `trunk` and `standard` are not fitted by gradients."""

    config: LinearConfig
    dtype: DTypeLike = jnp.float32  # of the text tower and the projection

    def setup(self) -> None:
        width, init = self.config.projection_dim, nn.initializers.normal(0.02)
        self.token_embedding = nn.Embed(self.config.vocab_size, width, dtype=self.dtype, embedding_init=init)
        self.visual_projection = nn.Dense(width, use_bias=False, dtype=self.dtype)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(2.6592), ())  # log(1 / 0.07)
        self.trunk = Features()
        self.standard = Standardize()

    @property
    def width(self) -> int:
        return self.config.projection_dim

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def num_patches(self) -> int:
        return (self.config.image_size // PATCH) ** 2

    def encode_text(
        self, ids: Int[Array, "batch seq"], mask: Bool[Array, "batch seq"] | None = None
    ) -> Float[Array, "batch projection"]:
        """The sum of the vectors of a text's tokens, scaled to L2 norm 1; where `mask` is False is padding."""
        mask = jnp.ones(ids.shape, bool) if mask is None else mask
        return unit_norm(jnp.sum(self.token_embedding(ids) * mask[..., None], axis=1))

    def encode_image(
        self,
        pixels: Float[Array, "batch height width channel"],
        patch_keep: Bool[Array, "batch patches"] | None = None,
    ) -> Float[Array, "batch projection"]:
        """Normalized pixels to float32 vectors of L2 norm 1; patches that are not kept have the mean of the others."""
        if patch_keep is not None:
            pixels = fill_patches(pixels, patch_keep)
        return self.encode_features(self.standard(self.trunk(pixels)))

    def encode_features(self, features: Float[Array, "batch channel"]) -> Float[Array, "batch projection"]:
        """Standardized features to vectors of L2 norm 1."""
        return unit_norm(self.visual_projection(features))

    def compare(
        self,
        ids: Int[Array, "batch seq"],
        mask: Bool[Array, "batch seq"],
        features: Float[Array, "batch channel"],
    ) -> tuple[Float[Array, "batch projection"], Float[Array, "batch projection"], Float[Array, ""]]:
        """The text vectors, the image vectors and the logit scale, as a fit takes them: from standardized features."""
        return self.encode_text(ids, mask), self.encode_features(features), self.logit_scale

    def __call__(
        self,
        ids: Int[Array, "batch seq"],
        mask: Bool[Array, "batch seq"],
        pixels: Float[Array, "batch height width channel"],
    ) -> tuple[Float[Array, "batch projection"], Float[Array, "batch projection"], Float[Array, ""]]:
        return self.encode_text(ids, mask), self.encode_image(pixels), self.logit_scale


def fill_patches(
    pixels: Float[Array, "batch size size 3"], keep: Bool[Array, "batch patches"]
) -> Float[Array, "batch size size 3"]:
    """Each patch that is not kept takes the mean color of those that are; patches in raster order."""
    side = pixels.shape[1] // PATCH
    grid = keep.reshape(-1, side, side)
    kept = jnp.repeat(jnp.repeat(grid, PATCH, axis=1), PATCH, axis=2)[..., None]
    mean = jnp.sum(pixels * kept, axis=(1, 2), keepdims=True) / jnp.sum(kept, axis=(1, 2), keepdims=True)
    return jnp.where(kept, pixels, mean)
