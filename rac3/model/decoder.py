"""Decoding: new ids against the keys and values of the ids before them, with the parameters of training.

    prefix  of each prompt, read-only, shared by its samples
            x x x x x x . .
    own     of each sample, a ring: what all rows feed at step t is in slot t mod slots
            3 4 5 0 1 2     step 5; a row that began at step 3 sees the slots of 3, 4 and 5

A prompt is called a stream. Prompts that differ at their ends alone are one stream: what they have in common is its
prefix, and the rest of each is in a cache of endings, between the two.

A step reads all weights and all filled slots once, and does little with them, so it is as fast as memory if it copies
neither. Hence each layer has its own arrays, where a scan would slice them out of its stack; kernels are [*out, *in]
and activations [embed, ...], so that products run along each kernel from front to back; and the keys and values of a
head are [head_dim, slots].
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from rac3.devices.mesh import constrain, map_shards, mesh_axes
from rac3.model.blockwise import HIDDEN
from rac3.model.rotary import Rotation, rotate
from rac3.model.transformer import EPSILON, Transformer

# The axes of each kernel of a layer, [*in, *out] in training, in the order [*out, *in].
ORDERS = {"qkv_kernel": (1, 2, 3, 0), "out_kernel": (2, 0, 1), "kernel": (1, 0)}


class KeyValues(NamedTuple):
    """Of one layer."""

    keys: Float[Array, "*rows heads head_dim slots"]
    values: Float[Array, "*rows heads head_dim slots"]


Cache = list[KeyValues]  # one of each layer


class Endings(NamedTuple):
    """What prompts do not have in common.

    Attributes:
      cache: its rows are [streams, endings] in one axis.
      lengths: ids in each.
    """

    cache: Cache
    lengths: Int[Array, "streams endings"]


Weights = Mapping[str, Any]
# The caches of a layer, the queries, and the new keys and values -> what is attended to, and the cache with these.
Attend = Callable[[Any, Array, KeyValues], tuple[Array, KeyValues]]


@dataclass(frozen=True)
class Decoder:
    """The forward pass of `model` over ids that continue a prompt."""

    model: Transformer

    def weights(self, params: PyTree) -> Weights:
        """The parameters as decoding reads them, in the dtype of the model; norms stay in float32, as in training.

        Arrays on a mesh keep their shardings.
        """
        config, tree = self.model.config, params["params"]

        def arrange(path: tuple[Any, ...], leaf: Array) -> Array:
            order = ORDERS.get(path[-1].key)
            of_norm = any("norm" in each.key for each in path)
            leaf = leaf if order is None else leaf.transpose(order)
            return leaf if of_norm else leaf.astype(config.dtype)

        def layer(blocks: PyTree, number: Array) -> PyTree:
            return jax.tree.map_with_path(arrange, jax.tree.map(lambda leaf: leaf[number], blocks))

        def sharding(path: tuple[Any, ...], leaf: Any, stacked: int) -> NamedSharding | None:
            if not isinstance(getattr(leaf, "sharding", None), NamedSharding):
                return None
            names = (*leaf.sharding.spec, *[None] * leaf.ndim)[: leaf.ndim][stacked:]
            order = ORDERS.get(path[-1].key, range(len(names)))
            return NamedSharding(leaf.sharding.mesh, PartitionSpec(*(names[axis] for axis in order)))

        blocks = tree["blocks"]
        of_blocks = jax.tree.map_with_path(lambda path, leaf: sharding(path, leaf, 1), blocks)
        rest = {name: tree[name] for name in tree if name != "blocks"}
        of_rest = jax.tree.map_with_path(lambda path, leaf: sharding(path, leaf, 0), rest)
        # A layer at a time, so that no second copy of all is ever in memory.
        take = jax.jit(layer, out_shardings=of_blocks)
        layers = [take(blocks, number) for number in range(config.num_layers)]
        arranged = jax.jit(lambda rest: jax.tree.map_with_path(arrange, rest), out_shardings=of_rest)(rest)
        return {**arranged, "blocks": layers}

    def empty_prefix(self, streams: int, slots: int) -> Cache:
        """For the prompts: zeros, of 2 * layers * streams * slots * embed * itemsize bytes."""
        return self._zeros((streams,), ("batch",), slots)

    def empty_own(self, streams: int, samples: int, slots: int) -> Cache:
        """For what follows them: zeros, of 2 * layers * streams * samples * slots * embed * itemsize bytes.

        Axes of length 1 are left out. XLA would do so for the products with the cache, and then copy it at each step.
        """
        axes = [(streams, "batch"), (samples, None)]
        kept = [axis for axis in axes if axis[0] > 1]
        return self._zeros(tuple(size for size, _ in kept), tuple(name for _, name in kept), slots)

    def _zeros(self, rows: tuple[int, ...], names: tuple[str | None, ...], slots: int) -> Cache:
        config = self.model.config
        shape = (*rows, config.num_heads, config.embed // config.num_heads, slots)

        def zeros() -> Array:
            return constrain(jnp.zeros(shape, config.dtype), *names, "heads", None, None)

        return [KeyValues(zeros(), zeros()) for _ in range(config.num_layers)]

    def prefill(
        self,
        weights: Weights,
        cache: Cache,
        tokens: Int[Array, "streams chunk"],
        offsets: Int[Array, "streams chunk"],
        start: Int[Array, ""],
    ) -> Cache:
        """The cache with the keys and values of a chunk of ids from position `start` on, a multiple of the chunk.

        Chunks must come in order; the slots of the cache are a multiple of them.
        """
        positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)

        def attend(old: KeyValues, query: Array, new: KeyValues) -> tuple[Array, KeyValues]:
            kept = KeyValues(*(_write(x, y.transpose(0, 2, 3, 1), start) for x, y in zip(old, new, strict=True)))
            return _causal(query, kept, start), kept

        _, cache = self._layers(weights, tokens, positions, offsets, cache, attend)
        return cache

    def insert(self, prefix: Cache, prefilled: Cache, slots: Int[Array, " shards"]) -> Cache:
        """The prefix with what each shard of the batch has prefilled, one request each.

        Args:
          slots: where it goes: a request of n streams is in streams [n * slot, n * (slot + 1)), of the shard's own;
            an index past the last is nowhere.
        """
        names = ("batch", "heads", None, None)

        def write(old: Array, new: Array, slots: Array) -> Array:
            streams, own = len(new), len(old) // len(new)
            axes = mesh_axes("batch")
            at = slots[0] - (jax.lax.axis_index(axes) * own if axes else 0)
            first = (jnp.clip(at, 0, own - 1) * streams, 0, 0, 0)
            kept = jnp.where((at >= 0) & (at < own), new, jax.lax.dynamic_slice(old, first, new.shape))
            return jax.lax.dynamic_update_slice(old, kept, first)

        inserted = map_shards(write, (names, names, ("batch",)), names)
        return jax.tree.map(lambda old, new: inserted(old, new, slots), prefix, prefilled)

    def ending(self, prefilled: Cache, start: Int[Array, " streams"], slots: int) -> Cache:
        """What is prefilled of each stream from id number `start` on, so many slots."""
        places = jnp.minimum(start[:, None] + jnp.arange(slots), prefilled[0].keys.shape[-1] - 1)
        return jax.tree.map(lambda x: jnp.take_along_axis(x, places[:, None, None], axis=-1), prefilled)

    def step(
        self,
        weights: Weights,
        prefix: Cache,
        own: Cache,
        lengths: Int[Array, " streams"],
        begun: Int[Array, " streams"],
        step: Int[Array, ""],
        tokens: Int[Array, "streams samples"],
        positions: Int[Array, "streams samples"],
        offsets: Int[Array, "streams samples"],
        endings: Endings | None = None,
    ) -> tuple[Float[Array, "streams samples vocab"], Cache]:
        """The logits, in float32, after one id of each sample, and its own cache with that id.

        Args:
          lengths: ids in the prefix of each stream.
          begun: the step at which the samples of each stream fed their first id.
          step: the current one.
          endings: of the prompts, if each stream has several; its samples are then as many of the first ending, of the
            second, and so on.
        """
        slots, ring = prefix[0].keys.shape[-1], own[0].keys.shape[-1]
        seen = [jnp.arange(slots) < lengths[:, None], (step - jnp.arange(ring)) % ring <= (step - begun)[:, None]]
        seen = [each[:, None, None] for each in seen]
        if endings is not None:
            count, last = endings.lengths.shape[1], endings.cache[0].keys.shape[-1]
            of_each = jnp.repeat(endings.lengths, tokens.shape[1] // count, axis=1)  # sample
            seen.insert(1, (jnp.arange(last) < of_each[..., None])[:, None])

        def attend(caches: tuple[KeyValues, ...], query: Array, new: KeyValues) -> tuple[Array, KeyValues]:
            *shared, old = caches
            fed = [x.reshape(*old.keys.shape[:-1], 1) for x in new]
            kept = KeyValues(*(_write(x, y, step % ring) for x, y in zip(old, fed, strict=True)))
            return _shared_prefix(query, shared, kept, seen), kept

        caches = [prefix, own] if endings is None else [prefix, endings.cache, own]
        x, own = self._layers(weights, tokens, positions, offsets, list(zip(*caches, strict=True)), attend)
        x = self._norm(weights["final_norm"], x)
        logits = jnp.tensordot(weights["token_embedding"], x, 1, preferred_element_type=jnp.float32)
        return jnp.moveaxis(logits, 0, -1), own

    def _layers(
        self, weights: Weights, tokens: Array, positions: Array, offsets: Array, caches: list[Any], attend: Attend
    ) -> tuple[Float[Array, "embed streams seq"], Cache]:
        """The hidden states before the final norm, and the new cache of each layer."""
        x = weights["token_embedding"][tokens]
        # Rows that have ended, and the padding of prompts, may be past the last position.
        x += weights["position_embedding"].at[positions].get(mode="clip")
        if self.model.config.offset_embedding:
            x += weights["offset_embedding"][offsets]
        x = constrain(x, None, None, None)  # on a mesh, tables are sharded along `embed`, and rows by `batch`
        rotation = self.model.rotation(offsets)
        x, kept = jnp.moveaxis(x, -1, 0), []
        for layer, cache in zip(weights["blocks"], caches, strict=True):
            x, new = self._block(layer, constrain(x, None, "batch", None), rotation, cache, attend)
            kept.append(new)
        return x, kept

    def _block(
        self,
        weights: Weights,
        x: Float[Array, "embed streams seq"],
        rotation: Rotation | None,
        cache: Any,
        attend: Attend,
    ) -> tuple[Float[Array, "embed streams seq"], KeyValues]:
        """`rac3.model.transformer.Block`, with the attention to a cache."""
        attention, mlp_in, mlp_out = weights["attention"], weights["mlp_in"], weights["mlp_out"]
        qkv = _affine(attention["qkv_kernel"], self._norm(weights["attention_norm"], x), attention["qkv_bias"])
        qkv = constrain(qkv, None, "heads", None, "batch", None)
        query, key, value = (part.transpose(2, 3, 0, 1) for part in qkv)  # [streams, seq, heads, head_dim]
        out, kept = attend(cache, rotate(query, rotation), KeyValues(rotate(key, rotation), value))
        x += _affine(attention["out_kernel"], out.transpose(2, 3, 0, 1), attention["out_bias"], 2)
        x = constrain(x, None, "batch", None)
        hidden = _affine(mlp_in["kernel"], self._norm(weights["mlp_norm"], x), mlp_in["bias"])
        hidden = constrain(jax.nn.relu(hidden), "mlp", "batch", None)
        return x + _affine(mlp_out["kernel"], hidden, mlp_out["bias"]), kept

    def _norm(self, weights: Weights, x: Array) -> Array:
        """Layer normalization over the first axis, in float32."""
        centered = x.astype(jnp.float32) - jnp.mean(x, 0, dtype=jnp.float32)
        scaled = centered * jax.lax.rsqrt(jnp.mean(jnp.square(centered), 0) + EPSILON)
        normal = scaled * weights["scale"][:, None, None] + weights["bias"][:, None, None]
        return normal.astype(self.model.config.dtype)


def _affine(kernel: Array, x: Array, bias: Array, axes: int = 1) -> Array:
    """[*out, *in], [*in, streams, seq] -> [*out, streams, seq]; `axes` is the number of axes of `in`."""
    return jnp.tensordot(kernel, x, axes) + bias[..., None, None]


def _causal(
    query: Float[Array, "streams chunk heads head_dim"], cache: KeyValues, start: Int[Array, ""]
) -> Float[Array, "streams chunk heads head_dim"]:
    """Attention of a chunk, which is in the cache from slot `start` on, to the slots up to itself.

    The softmax is online: a running maximum and sum rescale what was added before, chunk by chunk of keys.
    """
    size, scale = query.shape[1], query.shape[-1] ** -0.5
    query = (query * scale).swapaxes(1, 2)
    places = jnp.arange(size)

    def add(block: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        out, highest, total = carry
        keys, values = (jax.lax.dynamic_slice_in_dim(x, block * size, size, 3) for x in cache)
        scores = jnp.einsum("xhqd,xhdk->xhqk", query, keys, preferred_element_type=jnp.float32)
        scores = jnp.where(block * size + places <= start + places[:, None], scores, HIDDEN)
        top = jnp.maximum(highest, jnp.max(scores, -1, keepdims=True))
        weights, rescale = jnp.exp(scores - top), jnp.exp(highest - top)
        new = jnp.einsum("xhqk,xhdk->xhqd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return out * rescale + new, top, total * rescale + jnp.sum(weights, -1, keepdims=True)

    each = jnp.zeros((*query.shape[:3], 1))
    out, _, total = jax.lax.fori_loop(0, start // size + 1, add, (jnp.zeros(query.shape), each + HIDDEN, each))
    return (out / total).astype(cache.values.dtype).swapaxes(1, 2)


def _shared_prefix(
    query: Float[Array, "streams samples heads head_dim"],
    shared: Sequence[KeyValues],
    own: KeyValues,
    seen: Sequence[Array],
) -> Float[Array, "streams samples heads head_dim"]:
    """Attention of each sample to what it shares with others and to its own slots, in one softmax.

    Args:
      shared: each of as many rows as streams, or of a multiple: then as many samples read the first of a stream, the
        second, and so on.
      seen: of each of these and of the own slots, [streams, 1, 1 or samples, slots], bool.
    """
    query = query * query.shape[-1] ** -0.5
    streams, samples, heads, _ = query.shape
    scores = []
    for cache in shared:
        rows = query.reshape(len(cache.keys), -1, *query.shape[2:])
        each = _product(rows.swapaxes(1, 2), cache.keys, (3, 2))  # [rows, heads, samples of each, slots]
        each = each.reshape(streams, -1, *each.shape[1:]).swapaxes(1, 2)
        scores.append(each.reshape(streams, heads, samples, -1))
    of_own = _product(query.reshape(own.keys.shape[:-1]), own.keys, (-1, -2))
    scores.append(of_own.reshape(*query.shape[:3], -1).swapaxes(1, 2))
    masked = [jnp.where(where, each, HIDDEN) for where, each in zip(seen, scores, strict=True)]
    weights = jax.nn.softmax(jnp.concatenate(masked, axis=-1), axis=-1).astype(own.values.dtype)
    ends = np.cumsum([each.shape[-1] for each in scores])[:-1]
    *for_shared, for_own = jnp.split(weights, ends.tolist(), axis=-1)
    for_own = for_own.swapaxes(1, 2).reshape(*own.values.shape[:-2], -1)
    out = _product(for_own, own.values, (-1, -1)).reshape(query.shape)
    for cache, each in zip(shared, for_shared, strict=True):
        of_row = each.reshape(streams, heads, len(cache.values) // streams, -1, each.shape[-1]).swapaxes(1, 2)
        of_row = of_row.reshape(len(cache.values), heads, -1, each.shape[-1])
        out += _product(cache.values, of_row, (3, 3)).transpose(0, 3, 1, 2).reshape(query.shape)
    return out.astype(own.values.dtype)


def _product(x: Array, y: Array, axes: tuple[int, int]) -> Array:
    """The product of a cache, [*batch, head_dim, slots], with [*batch, ...] over one axis of each, in float32.

    `einsum` may turn the operands around, and then XLA would transpose the cache at each step.
    """
    batch = tuple(range(max(x.ndim, y.ndim) - 2))
    over = (([axes[0] % x.ndim], [axes[1] % y.ndim]), (batch, batch))
    return jax.lax.dot_general(x, y, over, preferred_element_type=jnp.float32)


def _write(cache: Array, new: Array, slot: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(cache, new, slot, cache.ndim - 1)
