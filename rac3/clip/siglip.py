"""SigLIP (arXiv 2303.15343) and SigLIP 2 (arXiv 2502.14786) in Flax: two frozen towers, as CLIP has them.

Architecture and config fields are those of Hugging Face `SiglipModel`; the layers are CLIP's. What differs from CLIP:

    text   not causal; always padded to the full length, and the padding is read like any other token, as in training;
           the features are those of the last position
    image  no class position; a learned query (`probe`) attends to the patches and pools them

A NaFlex checkpoint of SigLIP 2 becomes a `SigLIP` of one square grid when it is loaded, see `families/naflex.py`.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from rac3.clip.model import CLIPMLP, CLIPAttention, CLIPLayer, CLIPVisionConfig, check_tower, unit_norm
from rac3.config import InputError


@dataclass(frozen=True)
class SiglipTextConfig:
    """Field names and defaults of `transformers.SiglipTextConfig`."""

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 64
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    pad_token_id: int = 1  # always 1 in published configs; loading sets the tokenizer's
    projection_size: int | None = None  # None: as hidden_size

    def __post_init__(self) -> None:
        check_tower(self, "siglip text")
        if self.max_position_embeddings < 2:
            raise InputError(
                f"siglip text: max_position_embeddings={self.max_position_embeddings} has no room for a token before "
                "the end of text; use at least 2"
            )
        if not 0 <= self.pad_token_id < self.vocab_size:
            raise InputError(
                f"siglip text: pad_token_id={self.pad_token_id} is outside [0, vocab_size={self.vocab_size}); change it"
            )


@dataclass(frozen=True)
class SiglipVisionConfig(CLIPVisionConfig):
    """Field names and defaults of `transformers.SiglipVisionConfig`: CLIP's fields."""

    patch_size: int = 16
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6

    tower: ClassVar[str] = "siglip vision"


@dataclass(frozen=True)
class SiglipConfig:
    """Field names and defaults of `transformers.SiglipConfig`.

    Raises:
      InputError: the towers end in vectors of different widths.
    """

    text_config: SiglipTextConfig = field(default_factory=SiglipTextConfig)
    vision_config: SiglipVisionConfig = field(default_factory=SiglipVisionConfig)

    def __post_init__(self) -> None:
        if self.width != self.vision_config.hidden_size:
            raise InputError(
                f"siglip: text vectors are {self.width} wide (projection_size, else hidden_size), image vectors "
                f"{self.vision_config.hidden_size} (vision hidden_size); set projection_size to the latter"
            )

    @property
    def width(self) -> int:
        """The width of the vectors of both towers."""
        text = self.text_config
        return text.hidden_size if text.projection_size is None else text.projection_size


class SiglipTextModel(nn.Module):
    config: SiglipTextConfig
    width: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, ids: Int[Array, "batch seq"], mask: Bool[Array, "batch seq"]) -> Float[Array, "batch embed"]:
        """`mask` is False at padding, which becomes `pad_token_id`; no attention is masked."""
        config, seq = self.config, ids.shape[1]
        if seq != config.max_position_embeddings:
            raise InputError(
                f"siglip text: rows of {seq} ids; SigLIP reads its padding, so pad or truncate them to "
                f"max_position_embeddings={config.max_position_embeddings}"
            )
        init = nn.initializers.normal(0.02)
        embed = nn.Embed(
            config.vocab_size, config.hidden_size, dtype=self.dtype, embedding_init=init, name="token_embedding"
        )
        positions = self.param("position_embedding", init, (seq, config.hidden_size))
        x = embed(jnp.where(mask, ids, config.pad_token_id)) + positions.astype(self.dtype)
        for i in range(config.num_hidden_layers - 1):
            x = CLIPLayer(config, self.dtype, name=f"layers_{i}")(x, None)
        last = CLIPLayer(config, self.dtype, name=f"layers_{config.num_hidden_layers - 1}")
        x = last(x, None, jnp.full(len(ids), seq - 1))
        x = nn.LayerNorm(config.layer_norm_eps, dtype=self.dtype, name="final_layer_norm")(x[:, 0])
        return nn.Dense(self.width, dtype=self.dtype, name="head")(x)


class SiglipPoolingHead(nn.Module):
    """A learned query attends to the patches; a residual MLP follows. No residual goes around the attention."""

    config: SiglipVisionConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch patches embed"], mask: Bool[Array, "batch 1 1 patches"] | None
    ) -> Float[Array, "batch embed"]:
        batch, _, embed = x.shape
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, embed)).astype(self.dtype)
        query = jnp.broadcast_to(probe, (batch, 1, embed))
        x = CLIPAttention(self.config, self.dtype, name="attention")(query, mask, x)
        h = nn.LayerNorm(self.config.layer_norm_eps, dtype=self.dtype, name="layernorm")(x)
        return (x + CLIPMLP(self.config, self.dtype, name="mlp")(h))[:, 0]


class SiglipVisionModel(nn.Module):
    config: SiglipVisionConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, pixels: Float[Array, "batch height width channel"], patch_keep: Bool[Array, "batch patches"] | None
    ) -> Float[Array, "batch embed"]:
        """Neither the layers' attention nor the pooling sees patches that are not kept."""
        config = self.config
        batch, embed, patch = pixels.shape[0], config.hidden_size, (config.patch_size, config.patch_size)
        if pixels.shape[1:] != (config.image_size, config.image_size, config.num_channels):
            raise InputError(
                f"siglip vision: pixels are {pixels.shape[1:]}, not image_size={config.image_size} squared with "
                f"num_channels={config.num_channels}; resize them"
            )
        x = nn.Conv(embed, patch, patch, "VALID", dtype=self.dtype, name="patch_embedding")(pixels)
        init = nn.initializers.normal(embed**-0.5)
        positions = self.param("position_embedding", init, (config.num_patches, embed))
        x = x.reshape(batch, -1, embed) + positions.astype(self.dtype)
        mask = None if patch_keep is None else patch_keep[:, None, None, :]
        for i in range(config.num_hidden_layers):
            x = CLIPLayer(config, self.dtype, name=f"layers_{i}")(x, mask)
        x = nn.LayerNorm(config.layer_norm_eps, dtype=self.dtype, name="post_layernorm")(x)
        return SiglipPoolingHead(config, self.dtype, name="head")(x, mask)


class SigLIP(nn.Module):
    config: SiglipConfig
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        config = self.config
        self.text_model = SiglipTextModel(config.text_config, config.width, self.dtype)
        self.vision_model = SiglipVisionModel(config.vision_config, self.dtype)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(math.log(10)), (1,))
        self.logit_bias = self.param("logit_bias", nn.initializers.constant(-10.0), (1,))

    @property
    def width(self) -> int:
        return self.config.width

    @property
    def image_size(self) -> int:
        return self.config.vision_config.image_size

    @property
    def num_patches(self) -> int:
        return self.config.vision_config.num_patches

    def encode_text(
        self, ids: Int[Array, "batch seq"], mask: Bool[Array, "batch seq"] | None = None
    ) -> Float[Array, "batch embed"]:
        """Texts as `... <eos>` ids, padded where `mask` is False, to float32 vectors of L2 norm 1.

        Raises:
          InputError: `seq` is not `max_position_embeddings`.
        """
        mask = jnp.ones(ids.shape, bool) if mask is None else mask
        return unit_norm(self.text_model(ids, mask))

    def encode_image(
        self,
        pixels: Float[Array, "batch height width channel"],
        patch_keep: Bool[Array, "batch patches"] | None = None,
    ) -> Float[Array, "batch embed"]:
        """Normalized pixels to float32 vectors of L2 norm 1; patches in raster order, see `model.drop_patches`."""
        return unit_norm(self.vision_model(pixels, patch_keep))

    def __call__(
        self,
        ids: Int[Array, "texts seq"],
        mask: Bool[Array, "texts seq"],
        pixels: Float[Array, "images height width channel"],
    ) -> Float[Array, "texts images"]:
        """Logits of each text for each image: sigmoid(exp(logit_scale) text . image + logit_bias) is the
        probability that they belong together."""
        text, image = self.encode_text(ids, mask), self.encode_image(pixels)
        return jnp.exp(self.logit_scale) * text @ image.T + self.logit_bias
