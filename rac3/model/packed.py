"""Attention within the groups of packed rows: its forms, and the choice of one by device and trial.

Each form is a function of query, key and value, [batch, seq, heads, head_dim], and of segments, [batch, seq]: the group
of each token, numbered from 1 in order, with 0 for the padding at the end. What comes out at padding has no meaning.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rac3.config import InputError
from rac3.devices.mesh import map_shards
from rac3.model.blockwise import blockwise_attention
from rac3.model.cudnn import gathered_attention, packed_attention
from rac3.model.splash import splash_attention

AttentionName = Literal["auto", "plain", "blockwise", "cudnn", "cudnn_packed", "splash"]
TOLERANCE = {"float32": 1e-4, "bfloat16": 4e-2}  # of the largest value: of sums in another order, 3 bits of bfloat16


def packed_mask(segments: Int[Array, "batch seq"]) -> Array:
    """Which tokens a token of a packed row attends to, [batch, 1, seq, seq]: itself and earlier ones of its group.

    segments 1 1 1 2 2 0      x . . . . .
                              x x . . . .
                              x x x . . .
                              . . . x . .
                              . . . x x .
                              . . . . . x
    """
    same = segments[:, :, None] == segments[:, None, :]
    causal = jnp.tril(jnp.ones((segments.shape[1],) * 2, bool))
    return (same & causal)[:, None]


def attend(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch slots heads head_dim"],
    value: Float[Array, "batch slots heads head_dim"],
    mask: Array,
) -> Float[Array, "batch seq heads head_dim"]:
    """Scaled dot-product attention; logits and softmax in float32.

    Args:
      mask: [batch, 1, seq, slots], bool.
    """
    scale = query.shape[-1] ** -0.5
    logits = jnp.einsum("bqhd,bkhd->bhqk", query * scale, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(mask, logits, -1e30), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value)


@dataclass(frozen=True)
class PackedAttention:
    """A form of attention, with the sizes that it needs to know.

    Attributes:
      form: a name of `FORMS`.
      max_group: tokens of the longest group.
      max_groups: the most groups in a row; 0 is unknown.
      rejected: why the forms that come before it on this device are not used.
    """

    form: str = "blockwise"
    max_group: int = 0
    max_groups: int = 0
    rejected: tuple[str, ...] = ()

    def __call__(
        self,
        query: Float[Array, "batch seq heads head_dim"],
        key: Float[Array, "batch seq heads head_dim"],
        value: Float[Array, "batch seq heads head_dim"],
        segments: Int[Array, "batch seq"],
    ) -> Float[Array, "batch seq heads head_dim"]:
        """Causal attention of each token to its group. On a mesh, each device attends within its rows and heads."""
        names = ("batch", None, "heads", None)
        function = functools.partial(FORMS[self.form], self)
        result: Array = map_shards(function, (names, names, names, ("batch", None)), names)(query, key, value, segments)
        return result

    def __str__(self) -> str:
        return "; ".join([f"attention: {self.form.replace('_', ', ')}", *self.rejected])


# The sizes, query, key, value, segments -> output.
FORMS: dict[str, Callable[..., Array]] = {
    "plain": lambda sizes, q, k, v, segments: attend(q, k, v, packed_mask(segments)),
    "blockwise": lambda sizes, q, k, v, segments: blockwise_attention(q, k, v, segments),
    "cudnn": lambda sizes, q, k, v, segments: gathered_attention(q, k, v, segments, sizes.max_group, sizes.max_groups),
    "cudnn_packed": lambda sizes, q, k, v, segments: packed_attention(q, k, v, segments, sizes.max_groups),
    "splash": lambda sizes, q, k, v, segments: splash_attention(q, k, v, segments),
}
BY_PLATFORM = {"cpu": (), "gpu": ("cudnn_packed", "cudnn"), "tpu": ("splash",)}  # tried in this order, then blockwise
UNTRIED = ("plain", "blockwise")  # run anywhere


@functools.lru_cache
def choose_attention(
    name: AttentionName, head_dim: int, dtype: str, max_group: int, max_groups: int
) -> PackedAttention:
    """The form of attention that `name` stands for on this process's devices.

    `auto` is the first form of `BY_PLATFORM` that agrees with the plain one in a small trial, or else `blockwise`.

    Raises:
      InputError: the form that is named does not agree, or does not run on this device.
    """
    if name in UNTRIED:
        return PackedAttention(name, max_group, max_groups)
    rejected: list[str] = []
    for form in BY_PLATFORM.get(jax.default_backend(), ()) if name == "auto" else (name,):
        problem = _problem(PackedAttention(form, max_group, max_groups), head_dim, dtype)
        if problem is None:
            return PackedAttention(form, max_group, max_groups, tuple(rejected))
        rejected.append(f"{form} is not used: {problem}")
    if name != "auto":
        raise InputError(f"model.attention={name} cannot be used: {problem}; use auto or blockwise")
    return PackedAttention("blockwise", max_group, max_groups, tuple(rejected))


def _problem(attention: PackedAttention, head_dim: int, dtype: str) -> str | None:
    """Why a form cannot be used on this device; None if it can.

    Runs it forward and backward on two rows, one of four groups and one of two with padding, against the plain form.
    """
    if "cudnn" in attention.form and not attention.max_groups:
        return "the number of groups in a row has no limit (batches.max_groups)"
    seq = 256
    segments = np.zeros((2, seq), np.int32)
    for row, lengths in enumerate([[100, 1, 90, 65], [128, 60]]):
        segments[row, : sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(key, (2, seq, 2, head_dim), dtype) for key in keys]
    groups, real = jnp.asarray(segments), (segments > 0)[..., None, None]

    @functools.partial(jax.jit, static_argnums=0)
    def run(form: PackedAttention, query: Array, key: Array, value: Array, cotangent: Array) -> list[Array]:
        function = functools.partial(FORMS[form.form], form)
        out, transpose = jax.vjp(lambda *x: function(*x, groups) * real, query, key, value)
        return [out, *transpose(cotangent)]

    try:
        got = [np.float32(x) for x in run(PackedAttention(attention.form, seq, 4), *arrays)]
    except Exception as error:  # whatever a kernel, its compiler or its driver raises
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")
    wanted = [np.float32(x) for x in run(PackedAttention("plain"), *arrays)]
    for what, a, b in zip(("output", "query gradient", "key gradient", "value gradient"), got, wanted, strict=True):
        off = float(np.max(np.abs(a - b)) / np.max(np.abs(b)))
        if not off <= TOLERANCE[dtype]:  # or NaN
            return f"its {what} is off by {off:.2g} of the largest value in a trial, over {TOLERANCE[dtype]}"
    return None
