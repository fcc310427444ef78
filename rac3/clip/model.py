"""CLIP (arXiv 2103.00020) in Flax: the two frozen towers of the retriever, and query dropout (paper, section 3.2).

The architecture and the config fields are those of Hugging Face `CLIPModel`. Its checkpoints load by renaming:
`text_model.encoder.layers.0.mlp.fc1` is `text_model/layers_0/mlp/fc1` here, and so on for every weight.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from rac3.config import InputError

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: nn.gelu(x, approximate=True),
}


@runtime_checkable
class TowerConfig(Protocol):
    """The fields of a tower's config that the layers read."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def hidden_act(self) -> str: ...
    @property
    def layer_norm_eps(self) -> float: ...


MOST_LAYERS = 1000  # of a tower; a file that claims more is damaged


def check_tower(config: TowerConfig, name: str) -> None:
    """Raise InputError if the layers can't be built; `name` is the tower's in messages."""
    for count in ("hidden_size", "intermediate_size", "num_hidden_layers"):
        if getattr(config, count) < 1:
            raise InputError(f"{name}: {count}={getattr(config, count)} is below 1; use at least 1")
    if config.num_attention_heads < 1 or config.hidden_size % config.num_attention_heads:
        raise InputError(
            f"{name}: hidden_size={config.hidden_size} is not a multiple of "
            f"num_attention_heads={config.num_attention_heads}; change either"
        )
    if config.num_hidden_layers > MOST_LAYERS:
        raise InputError(
            f"{name}: num_hidden_layers={config.num_hidden_layers} is out of range; use at most {MOST_LAYERS} layers"
        )
    if config.hidden_act not in ACTIVATIONS:
        raise InputError(f"{name}: hidden_act={config.hidden_act!r} is unknown; use one of {', '.join(ACTIVATIONS)}")


@dataclass(frozen=True)
class CLIPTextConfig:
    """Field names and defaults of `transformers.CLIPTextConfig`."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407  # 2 in old checkpoints, where it means "the highest id of the row"

    def __post_init__(self) -> None:
        check_tower(self, "clip text")
        if self.max_position_embeddings < 3:
            raise InputError(
                f"clip text: max_position_embeddings={self.max_position_embeddings} has no room for a token between "
                "begin and end of text; use at least 3"
            )


@dataclass(frozen=True)
class CLIPVisionConfig:
    """Field names and defaults of `transformers.CLIPVisionConfig`."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224  # pixels, height and width
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    tower: ClassVar[str] = "clip vision"

    def __post_init__(self) -> None:
        check_tower(self, self.tower)
        if not 0 < self.patch_size <= self.image_size:
            raise InputError(
                f"{self.tower}: patch_size={self.patch_size} is outside [1, image_size={self.image_size}]; lower it"
            )

    @property
    def num_patches(self) -> int:
        """Whole patches only: the pixels left over at the right and bottom are not seen, as in `transformers`."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class CLIPConfig:
    """Field names and defaults of `transformers.CLIPConfig`."""

    text_config: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    vision_config: CLIPVisionConfig = field(default_factory=CLIPVisionConfig)
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592  # log(1 / 0.07)

    def __post_init__(self) -> None:
        if self.projection_dim < 1:
            raise InputError(f"clip: projection_dim={self.projection_dim} is below 1; use at least 1")


class CLIPAttention(nn.Module):
    config: TowerConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch queries embed"],
        mask: Bool[Array, "#batch 1 #queries seq"] | None,
        context: Float[Array, "batch seq embed"] | None = None,
    ) -> Float[Array, "batch queries embed"]:
        """Attention of `x` to `context`, or to itself where that is None."""
        embed, heads = x.shape[-1], self.config.num_attention_heads
        std = embed**-0.5 * (2 * self.config.num_hidden_layers) ** -0.5

        def project(name: str, inputs: Array) -> Array:
            dense = nn.Dense(embed, dtype=self.dtype, kernel_init=nn.initializers.normal(std), name=name)
            return dense(inputs).reshape(*inputs.shape[:2], heads, embed // heads)

        context = x if context is None else context
        q, k, v = project("q_proj", x), project("k_proj", context), project("v_proj", context)
        out = jax.nn.dot_product_attention(q, k, v, mask=mask)
        init = nn.initializers.normal(embed**-0.5)
        return nn.Dense(embed, dtype=self.dtype, kernel_init=init, name="out_proj")(out.reshape(x.shape))


class CLIPMLP(nn.Module):
    config: TowerConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        config, embed = self.config, x.shape[-1]
        init_in = nn.initializers.normal((2 * embed) ** -0.5)
        init_out = nn.initializers.normal(embed**-0.5 * (2 * config.num_hidden_layers) ** -0.5)
        h = nn.Dense(config.intermediate_size, dtype=self.dtype, kernel_init=init_in, name="fc1")(x)
        return nn.Dense(embed, dtype=self.dtype, kernel_init=init_out, name="fc2")(ACTIVATIONS[config.hidden_act](h))


class CLIPLayer(nn.Module):
    """A pre-LN Transformer layer."""

    config: TowerConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        mask: Bool[Array, "#batch 1 #queries seq"] | None,
        position: Int[Array, " batch"] | None = None,
    ) -> Float[Array, "batch queries embed"]:
        """The outputs at all positions; or at one `position` of each row, which is all that a last layer needs: of the
        others only keys and values are computed."""
        eps = self.config.layer_norm_eps
        h = nn.LayerNorm(eps, dtype=self.dtype, name="layer_norm1")(x)
        queries = h
        if position is not None:
            x, queries = (jnp.take_along_axis(each, position[:, None, None], axis=1) for each in (x, h))
        x = x + CLIPAttention(self.config, self.dtype, name="self_attn")(queries, mask, h)
        h = nn.LayerNorm(eps, dtype=self.dtype, name="layer_norm2")(x)
        return x + CLIPMLP(self.config, self.dtype, name="mlp")(h)


class CLIPTextModel(nn.Module):
    config: CLIPTextConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, ids: Int[Array, "batch seq"], mask: Bool[Array, "batch seq"]) -> Float[Array, "batch embed"]:
        """The features at each row's end-of-text token, or at its first token if it has none."""
        config, seq = self.config, ids.shape[1]
        if seq > config.max_position_embeddings:
            raise InputError(
                f"clip text: {seq} tokens exceed max_position_embeddings={config.max_position_embeddings}; truncate "
                "them"
            )
        init = nn.initializers.normal(0.02)
        embed = nn.Embed(
            config.vocab_size, config.hidden_size, dtype=self.dtype, embedding_init=init, name="token_embedding"
        )
        positions = self.param("position_embedding", init, (config.max_position_embeddings, config.hidden_size))
        x = embed(ids) + positions[:seq].astype(self.dtype)
        if config.eos_token_id == 2:
            end = jnp.argmax(jnp.where(mask, ids, -1), axis=1)
        else:
            end = jnp.argmax((ids == config.eos_token_id) & mask, axis=1)
        causal = jnp.tril(jnp.ones((seq, seq), bool))
        for i in range(config.num_hidden_layers - 1):
            x = CLIPLayer(config, self.dtype, name=f"layers_{i}")(x, causal & mask[:, None, None, :])
        before_end = (jnp.arange(seq) <= end[:, None]) & mask
        last = CLIPLayer(config, self.dtype, name=f"layers_{config.num_hidden_layers - 1}")
        x = last(x, before_end[:, None, None, :], end)
        return nn.LayerNorm(config.layer_norm_eps, dtype=self.dtype, name="final_layer_norm")(x[:, 0])


class CLIPVisionModel(nn.Module):
    config: CLIPVisionConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, pixels: Float[Array, "batch height width channel"], patch_keep: Bool[Array, "batch patches"] | None
    ) -> Float[Array, "batch embed"]:
        """The features at the class position. Attention ignores the patches that are not kept."""
        config = self.config
        batch, embed, patch = pixels.shape[0], config.hidden_size, config.patch_size
        if pixels.shape[1:] != (config.image_size, config.image_size, config.num_channels):
            raise InputError(
                f"clip vision: pixels are {pixels.shape[1:]}, not image_size={config.image_size} squared with "
                f"num_channels={config.num_channels}; resize them"
            )
        init = nn.initializers.normal(0.02)
        conv = nn.Conv(
            embed,
            (patch, patch),
            patch,
            "VALID",
            use_bias=False,
            dtype=self.dtype,
            kernel_init=init,
            name="patch_embedding",
        )
        class_embedding = self.param("class_embedding", nn.initializers.normal(embed**-0.5), (embed,))
        class_column = jnp.broadcast_to(class_embedding.astype(self.dtype), (batch, 1, embed))
        x = jnp.concatenate([class_column, conv(pixels).reshape(batch, -1, embed)], axis=1)
        x += self.param("position_embedding", init, (config.num_patches + 1, embed)).astype(x.dtype)
        x = nn.LayerNorm(config.layer_norm_eps, dtype=self.dtype, name="pre_layrnorm")(x)
        mask = None
        if patch_keep is not None:
            mask = jnp.pad(patch_keep, ((0, 0), (1, 0)), constant_values=True)[:, None, None, :]
        for i in range(config.num_hidden_layers - 1):
            x = CLIPLayer(config, self.dtype, name=f"layers_{i}")(x, mask)
        last = CLIPLayer(config, self.dtype, name=f"layers_{config.num_hidden_layers - 1}")
        x = last(x, mask, jnp.zeros(batch, jnp.int32))
        return nn.LayerNorm(config.layer_norm_eps, dtype=self.dtype, name="post_layernorm")(x[:, 0])


class CLIP(nn.Module):
    config: CLIPConfig
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        config = self.config
        self.text_model = CLIPTextModel(config.text_config, self.dtype)
        self.vision_model = CLIPVisionModel(config.vision_config, self.dtype)
        self.text_projection = self._projection(config.text_config.hidden_size)
        self.visual_projection = self._projection(config.vision_config.hidden_size)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(config.logit_scale_init_value), ())

    @property
    def width(self) -> int:
        return self.config.projection_dim

    @property
    def image_size(self) -> int:
        return self.config.vision_config.image_size

    @property
    def num_patches(self) -> int:
        return self.config.vision_config.num_patches

    def _projection(self, hidden_size: int) -> nn.Dense:
        init = nn.initializers.normal(hidden_size**-0.5)
        return nn.Dense(self.config.projection_dim, use_bias=False, dtype=self.dtype, kernel_init=init)

    def encode_text(
        self, ids: Int[Array, "batch seq"], mask: Bool[Array, "batch seq"] | None = None
    ) -> Float[Array, "batch projection"]:
        """Texts as `<bos> ... <eos>` ids, padded where `mask` is False, to float32 vectors of L2 norm 1."""
        mask = jnp.ones(ids.shape, bool) if mask is None else mask
        return unit_norm(self.text_projection(self.text_model(ids, mask)))

    def encode_image(
        self,
        pixels: Float[Array, "batch height width channel"],
        patch_keep: Bool[Array, "batch patches"] | None = None,
    ) -> Float[Array, "batch projection"]:
        """Normalized pixels to float32 vectors of L2 norm 1; patches in raster order, see `drop_patches`."""
        return unit_norm(self.visual_projection(self.vision_model(pixels, patch_keep)))

    def __call__(
        self,
        ids: Int[Array, "batch seq"],
        mask: Bool[Array, "batch seq"],
        pixels: Float[Array, "batch height width channel"],
    ) -> tuple[Float[Array, "batch projection"], Float[Array, "batch projection"], Float[Array, ""]]:
        """The text vectors, the image vectors and the logit scale, a logarithm: what `contrastive_loss` takes."""
        return self.encode_text(ids, mask), self.encode_image(pixels), self.logit_scale


def unit_norm(x: Float[Array, "*batch channel"]) -> Float[Array, "*batch channel"]:
    """`x` in float32, scaled to L2 norm 1 along the last axis; zeros stay zeros."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def _keep(keys: Key[Array, " batch"], droppable: Bool[Array, "batch seq"], rate: float) -> Bool[Array, "batch seq"]:
    """True with probability 1 - rate where droppable, at one droppable position at least; True everywhere else.

    One draw per position: the result does not depend on the padding of a row.
    """
    positions = jnp.arange(droppable.shape[1])

    def draw(key: Key[Array, ""]) -> Float[Array, " seq"]:
        return jax.vmap(lambda position: jax.random.uniform(jax.random.fold_in(key, position)))(positions)

    draws = jax.vmap(draw)(keys)
    draws = jnp.where(droppable, draws, -1.0)
    return ~droppable | (draws >= rate) | (draws == draws.max(axis=1, keepdims=True))


def drop_text_tokens(
    keys: Key[Array, " batch"],
    ids: Int[Array, "batch seq"],
    mask: Bool[Array, "batch seq"],
    rate: float,
    has_bos: bool = True,
) -> tuple[Int[Array, "batch seq"], Bool[Array, "batch seq"]]:
    """Query dropout (paper 3.2) on texts: each token is dropped with probability `rate`, and the rest moves up.

        in : <bos> a photo of a cat <eos> .
        out: <bos> a photo cat <eos> . . .

    The last token of a row (`<eos>`) always stays, the first too if it is `<bos>`, and so does one of the others.
    """
    positions = jnp.arange(ids.shape[1])
    last = mask.sum(axis=1, keepdims=True) - 1
    kept = mask & _keep(keys, mask & (positions >= int(has_bos)) & (positions < last), rate)
    order = jnp.argsort(~kept, axis=1, stable=True)
    mask = jnp.take_along_axis(kept, order, axis=1)
    return jnp.where(mask, jnp.take_along_axis(ids, order, axis=1), 0), mask


def drop_patches(keys: Key[Array, " batch"], patches: int, rate: float) -> Bool[Array, "batch patches"]:
    """Query dropout (paper 3.2) on images: which patches stay, each with probability 1 - rate, at least one per row."""
    return _keep(keys, jnp.ones((keys.shape[0], patches), bool), rate)
