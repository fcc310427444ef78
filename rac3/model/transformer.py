"""The CM3 Transformer: a pre-LayerNorm decoder with the architecture of OPT (paper, section 4.1)."""

from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rac3.config import InputError
from rac3.devices.mesh import constrain, is_sharded
from rac3.model.attention import SelfAttention
from rac3.model.blockwise import SAVED
from rac3.model.embedding import look_up
from rac3.model.packed import AttentionName, PackedAttention, choose_attention
from rac3.model.product import dot_general
from rac3.model.rotary import Rotation, rotation

EPSILON = 1e-5  # of the norms, as in OPT
SMALLEST_HEAD = 8  # with rotary offsets: two pairs of dimensions that turn


@dataclass(frozen=True)
class TransformerConfig:
    """The generator. The defaults are the paper's 2.7B model; vocabulary and context length come from the data.

    Attributes:
      embed, num_heads, mlp: widths; `num_heads` divides `embed`.
      offset_embedding: embed a token's place in its text or image, in addition to its position in the group. The
        position of a document varies with what stands before it; with this, "the same patch in the retrieved image" or
        "the same word in the retrieved caption" is a match of keys rather than arithmetic on positions. OPT has none.
      rotary_offsets: turn queries and keys by these places, and let two heads of each layer start by looking one place
        ahead in other texts and images (`rac3.model.rotary`). Neither the paper nor OPT does. Small models learn to use
        documents in fewer steps with it.
      dtype: of the computation. Parameters are float32.
      attention: the form of attention over packed rows (`rac3.model.packed`): `auto` is the fastest one that agrees
        with the plain one on this device.
      remat: which activations of a layer are kept for the backward pass: `none` recomputes none and keeps all, `dots`
        keeps the matrix products and the attention's output, `attention` the layer's input and the attention's output,
        `full` only the layer's input.
      init_std: standard deviation of the initial weights; those that write to the residual stream have it divided by
        sqrt(2 num_layers).
      init_from: a folder to start from instead: an OPT of these sizes, or what `rac3 export` wrote; "" is none. Only
        rows of the embedding tables that it has no values for are random.
    """

    num_layers: int = 32
    embed: int = 2560
    num_heads: int = 32
    mlp: int = 10240
    offset_embedding: bool = True
    rotary_offsets: bool = False
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    attention: AttentionName = "auto"
    remat: Literal["none", "dots", "attention", "full"] = "dots"
    init_std: float = 0.006
    init_from: str = ""

    def __post_init__(self) -> None:
        for name in ("num_layers", "embed", "num_heads", "mlp"):
            if getattr(self, name) < 1:
                raise InputError(f"model.{name}={getattr(self, name)} is below 1; use at least 1")
        if self.embed % self.num_heads:
            raise InputError(
                f"model.num_heads={self.num_heads} does not divide model.embed={self.embed}; use heads of 64 to 128"
            )
        if self.rotary_offsets and self.embed // self.num_heads < SMALLEST_HEAD:
            raise InputError(
                f"model.rotary_offsets turns pairs of dimensions, and model.embed={self.embed} gives "
                f"model.num_heads={self.num_heads} heads less than {SMALLEST_HEAD}; use fewer heads"
            )

    def build(self, vocab_size: int, max_positions: int, max_segment_tokens: int, max_groups: int = 0) -> "Transformer":
        """The model, with the form of attention that suits this process's devices.

        Args:
          max_groups: the most groups in a packed row; 0 is unknown.

        Raises:
          InputError: the form of attention that is named cannot be used here.
        """
        packed = choose_attention(self.attention, self.embed // self.num_heads, self.dtype, max_positions, max_groups)
        return Transformer(self, vocab_size, max_positions, max_segment_tokens, packed)


def _saved(primitive: Any, *_: Any, **params: Any) -> bool:
    """Whether the backward pass keeps what a primitive makes: the attention's output, and what its kernel keeps."""
    name = params.get("name") if primitive.name == "name" else primitive.name
    return name == SAVED or primitive.name.startswith("dot_product_attention_fwd")


REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _saved
    ),
    "attention": _saved,
    "full": None,
}


class Block(nn.Module):
    """LayerNorm and attention, then LayerNorm and a ReLU MLP, each with a residual connection around it."""

    config: TransformerConfig
    packed: PackedAttention
    longest: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        segments: Int[Array, "batch seq"],
        rotation: Rotation | None,
    ) -> tuple[Float[Array, "batch seq embed"], None]:
        config = self.config
        output_std = config.init_std / (2 * config.num_layers) ** 0.5
        attended = SelfAttention(
            num_heads=config.num_heads,
            head_dim=config.embed // config.num_heads,
            dtype=config.dtype,
            init_std=config.init_std,
            output_init_std=output_std,
            packed=self.packed,
            longest=self.longest if config.rotary_offsets else 0,
            name="attention",
        )(_layer_norm(config, "attention_norm")(x), segments, rotation)
        x = constrain(x + attended, "batch", "seq", None)
        hidden = _dense(config, config.mlp, ("embed", "mlp"), config.init_std, "mlp_in")(
            _layer_norm(config, "mlp_norm")(x)
        )
        hidden = constrain(jnp.where(hidden <= 0, 0, hidden), "batch", None, "mlp")  # a NaN stays one
        x = x + _dense(config, config.embed, ("mlp", "embed"), output_std, "mlp_out")(hidden)
        return constrain(x, "batch", "seq", None), None  # a scan over the layers collects nothing


class Transformer(nn.Module):
    """Ids -> hidden states; hidden states -> `logits` over the vocabulary, by the tied embedding.

    Attributes:
      vocab_size: rows of the embedding table (`Vocabulary.padded_size`).
      max_positions: tokens of the longest group.
      max_segment_tokens: tokens of the longest text or image.
      packed: attention over packed rows.
    """

    config: TransformerConfig
    vocab_size: int
    max_positions: int
    max_segment_tokens: int
    packed: PackedAttention

    def setup(self) -> None:
        def table(name: str, rows: int, axis: str) -> Any:
            init = nn.initializers.normal(self.config.init_std)
            return self.param(name, nn.with_logical_partitioning(init, (axis, "embed")), (rows, self.config.embed))

        self.token_embedding = table("token_embedding", self.vocab_size, "vocab")
        self.position_embedding = table("position_embedding", self.max_positions, "positions")
        if self.config.offset_embedding:
            self.offset_embedding = table("offset_embedding", self.max_segment_tokens + 1, "positions")
        block: Any = Block
        if self.config.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[self.config.remat], prevent_cse=False)
        self.blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # all layers share the segments and the rotation
            length=self.config.num_layers,
            unroll=self._unroll(),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(self.config, self.packed, self.max_segment_tokens)
        self.final_norm = _layer_norm(self.config, "final_norm")

    def _unroll(self) -> int:
        """How many layers a step of the scan runs: all of a small model on one CPU, where a scan copies what it keeps
        of each layer for the backward pass; elsewhere one, so that programs stay small."""
        one_cpu = jax.default_backend() == "cpu" and not is_sharded()
        return self.config.num_layers if one_cpu and self.config.num_layers <= 4 and self.config.remat == "none" else 1

    def __call__(
        self,
        tokens: Int[Array, "batch seq"],
        positions: Int[Array, "batch seq"],
        offsets: Int[Array, "batch seq"],
        segments: Int[Array, "batch seq"],
    ) -> Float[Array, "batch seq embed"]:
        """Hidden states after the final norm.

        Args:
          tokens: ids.
          positions: the place of each token in its group, from 0.
          offsets: 1 + the place of each token in its text or image (raster order), 0 at markup.
          segments: the group of each token, from 1; 0 is padding.
        """
        x, _ = self.blocks(self._embedded(tokens, positions, offsets), segments, self.rotation(offsets))
        return constrain(self.final_norm(x), "batch", "seq", None)

    def rotation(self, offsets: Int[Array, "batch seq"]) -> Rotation | None:
        """By what queries and keys are turned; None is nothing."""
        config = self.config
        if not config.rotary_offsets:
            return None
        return rotation(offsets, config.embed // config.num_heads, self.max_segment_tokens)

    def _embedded(self, tokens: Array, positions: Array, offsets: Array) -> Array:
        """The sum of the embeddings of ids, positions and offsets. `init`, which needs no values, gets zeros."""
        dtype = self.config.dtype
        if self.is_initializing():
            return jnp.zeros((*tokens.shape, self.config.embed), dtype)
        x = look_up(self.token_embedding, tokens, dtype, "vocab", "seq")
        x = x + look_up(self.position_embedding, positions, dtype, "positions", "seq")
        if self.config.offset_embedding:
            x = x + look_up(self.offset_embedding, offsets, dtype, "positions", "seq")
        return x

    def logits(self, hidden: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
        """Logits in float32, whatever the dtype of the model."""
        return jnp.einsum("...d,vd->...v", hidden, self.output_table(), preferred_element_type=jnp.float32)

    def output_table(self) -> Float[Array, "vocab embed"]:
        """The token embedding in the dtype of the model: what hidden states are multiplied with."""
        return constrain(jnp.asarray(self.token_embedding, self.config.dtype), "vocab", "embed")


def _layer_norm(config: TransformerConfig, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(
        epsilon=EPSILON,
        dtype=config.dtype,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, (None,)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, (None,)),
        name=name,
    )


def _dense(config: TransformerConfig, features: int, axes: tuple[str, str], std: float, name: str) -> nn.Dense:
    bias_axis = None if axes[1] == "embed" else axes[1]  # every device holds the vectors of the residual stream
    return nn.Dense(
        features,
        dtype=config.dtype,
        dot_general=dot_general,
        kernel_init=nn.with_logical_partitioning(nn.initializers.normal(std), axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, (bias_axis,)),
        name=name,
    )
