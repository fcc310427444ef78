"""Decoding: new ids against the keys and values of the ids before them, with the parameters of training.

    prefix  of each prompt, read-only, shared by its samples
            x x x x x x . .
    own     of each sample, a ring: what all rows feed at step t is in slot t mod slots
            3 4 5 0 1 2     step 5; a row that began at step 3 sees the slots of 3, 4 and 5

A stream is a prompt; its samples are to a `Block` what the positions of a row are in training. Keys and values are
[heads, slots, head_dim], so that each head reads a block of memory from front to back. A step is unrolled over the
layers, whose weights are arrays of their own: a scan would slice them out of its stack into new buffers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from rac3.devices.mesh import constrain, map_shards, mesh_axes
from rac3.model.blockwise import HIDDEN
from rac3.model.transformer import Block, Transformer, layer_norm


class KeyValues(NamedTuple):
    """Of one layer."""

    keys: Float[Array, "*rows heads slots head_dim"]
    values: Float[Array, "*rows heads slots head_dim"]


Cache = list[KeyValues]  # one of each layer


@dataclass(frozen=True)
class Decoder:
    """The forward pass of `model` over ids that continue a prompt."""

    model: Transformer

    def weights(self, params: PyTree) -> PyTree:
        """The parameters as decoding reads them: an array for each layer, in the dtype of the model.

        Norms stay in float32, as in training. Arrays on a mesh keep their shardings.
        """

        def unstack(params: PyTree) -> PyTree:
            blocks = params["params"]["blocks"]
            layers = [jax.tree.map(lambda leaf, i=i: leaf[i], blocks) for i in range(self.model.config.num_layers)]
            tree = {**params["params"], "blocks": layers}
            return jax.tree_util.tree_map_with_path(self._cast, tree)

        def sharding(leaf: Any, first: int) -> NamedSharding | None:
            own = getattr(leaf, "sharding", None)
            return NamedSharding(own.mesh, PartitionSpec(*own.spec[first:])) if isinstance(own, NamedSharding) else None

        tree = params["params"]
        of_layer = jax.tree.map(lambda leaf: sharding(leaf, 1), tree["blocks"])
        rest = jax.tree.map(lambda leaf: sharding(leaf, 0), {name: tree[name] for name in tree if name != "blocks"})
        return jax.jit(unstack, out_shardings={**rest, "blocks": [of_layer] * self.model.config.num_layers})(params)

    def _cast(self, path: tuple[Any, ...], leaf: Array) -> Array:
        return leaf if any("norm" in str(key) for key in path) else leaf.astype(self.model.config.dtype)

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
        shape = (*rows, config.num_heads, slots, config.embed // config.num_heads)

        def zeros() -> Array:
            return constrain(jnp.zeros(shape, config.dtype), *names, "heads", None, None)

        return [KeyValues(zeros(), zeros()) for _ in range(config.num_layers)]

    def prefill(
        self,
        weights: PyTree,
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
            chunk = KeyValues(*(x.swapaxes(1, 2) for x in new))
            kept = KeyValues(*(_write(x, y, start) for x, y in zip(old, chunk, strict=True)))
            return _causal(query, kept, start), kept

        _, cache = self._blocks(weights, tokens, positions, offsets, cache, attend)
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

    def step(
        self,
        weights: PyTree,
        prefix: Cache,
        own: Cache,
        lengths: Int[Array, " streams"],
        begun: Int[Array, " streams"],
        step: Int[Array, ""],
        tokens: Int[Array, "streams samples"],
        positions: Int[Array, "streams samples"],
        offsets: Int[Array, "streams samples"],
    ) -> tuple[Float[Array, "streams samples vocab"], Cache]:
        """The logits, in float32, after one id of each sample, and its own cache with that id.

        Args:
          lengths: ids in the prefix of each stream.
          begun: the step at which the samples of each stream fed their first id.
          step: the current one.
        """
        slots, ring = prefix[0].keys.shape[-2], own[0].keys.shape[-2]
        filled = jnp.arange(slots) < lengths[:, None]
        recent = (step - jnp.arange(ring)) % ring <= (step - begun)[:, None]
        seen = jnp.concatenate([filled, recent], axis=1)[:, None, None]

        def attend(caches: tuple[KeyValues, KeyValues], query: Array, new: KeyValues) -> tuple[Array, KeyValues]:
            shared, old = caches
            kept = KeyValues(
                *(_write(x, y.reshape(*x.shape[:-2], 1, -1), step % ring) for x, y in zip(old, new, strict=True))
            )
            return _shared_prefix(query, shared, kept, seen), kept

        x, own = self._blocks(weights, tokens, positions, offsets, list(zip(prefix, own, strict=True)), attend)
        norm: Any = layer_norm(self.model.config, "final_norm").apply  # flax types its result by what is mutable
        x = norm({"params": weights["final_norm"]}, x)
        table = weights["token_embedding"]
        return jnp.einsum("xse,ve->xsv", x, table, preferred_element_type=jnp.float32), own

    def _blocks(
        self,
        weights: PyTree,
        tokens: Array,
        positions: Array,
        offsets: Array,
        caches: list[Any],
        attend: Callable[[Any, Array, KeyValues], tuple[Array, KeyValues]],
    ) -> tuple[Array, Cache]:
        """The hidden states before the final norm, and the new cache of each layer."""
        config, last = self.model.config, self.model.max_positions - 1
        x = weights["token_embedding"][tokens] + weights["position_embedding"][jnp.minimum(positions, last)]
        if config.offset_embedding:
            x = x + weights["offset_embedding"][offsets]
        kept = []
        for layer, cache in zip(weights["blocks"], caches, strict=True):

            def own(query: Array, key: Array, value: Array, _: None, cache: Any = cache) -> Array:
                out, new = attend(cache, query, KeyValues(key, value))
                kept.append(new)
                return out

            apply: Any = Block(config, own, seq=None).apply
            x, _ = apply({"params": layer}, constrain(x, "batch", None, None), None)
        return x, kept


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
        keys, values = (jax.lax.dynamic_slice_in_dim(x, block * size, size, 2) for x in cache)
        scores = jnp.einsum("xhqd,xhkd->xhqk", query, keys, preferred_element_type=jnp.float32)
        scores = jnp.where(block * size + places <= start + places[:, None], scores, HIDDEN)
        top = jnp.maximum(highest, jnp.max(scores, -1, keepdims=True))
        weights, rescale = jnp.exp(scores - top), jnp.exp(highest - top)
        new = jnp.einsum("xhqk,xhkd->xhqd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return out * rescale + new, top, total * rescale + jnp.sum(weights, -1, keepdims=True)

    first = (
        jnp.zeros(query.shape, jnp.float32),
        jnp.full((*query.shape[:3], 1), HIDDEN),
        jnp.zeros((*query.shape[:3], 1)),
    )
    out, _, total = jax.lax.fori_loop(0, start // size + 1, add, first)
    return (out / total).astype(cache.values.dtype).swapaxes(1, 2)


def _shared_prefix(
    query: Float[Array, "streams samples heads head_dim"],
    prefix: KeyValues,
    own: KeyValues,
    seen: Array,
) -> Float[Array, "streams samples heads head_dim"]:
    """Attention of each sample to the prefix of its stream and to its own slots, in one softmax.

    Args:
      seen: [streams, 1, 1, slots of the prefix and own slots], bool.
    """
    query = query * query.shape[-1] ** -0.5
    heads_first = query.swapaxes(1, 2)
    of_prefix = _product(heads_first, prefix.keys, 3)  # [streams, heads, samples, slots]
    of_own = _product(query.reshape(*own.keys.shape[:-2], -1), own.keys, own.keys.ndim - 1)
    of_own = of_own.reshape(*query.shape[:3], -1).swapaxes(1, 2)
    scores = jnp.where(seen, jnp.concatenate([of_prefix, of_own], axis=-1), HIDDEN)
    weights = jax.nn.softmax(scores, axis=-1).astype(prefix.values.dtype)
    for_prefix, for_own = jnp.split(weights, [prefix.keys.shape[-2]], axis=-1)
    out = _product(for_prefix, prefix.values, 2).swapaxes(1, 2)
    for_own = for_own.swapaxes(1, 2).reshape(*own.values.shape[:-1])
    out += _product(for_own, own.values, own.values.ndim - 2).reshape(query.shape)
    return out.astype(prefix.values.dtype)


def _product(x: Array, cache: Array, axis: int) -> Array:
    """The product of [*batch, *rows, n] and a cache [*batch, heads, slots, head_dim] over its `axis`, in float32.

    The batch comes first in both. `einsum` may turn operands around, and transpose the cache at each step.
    """
    batch = tuple(range(cache.ndim - 2))
    over = ((x.ndim - 1,), (axis,)), (batch, batch)
    return jax.lax.dot_general(x, cache, over, preferred_element_type=jnp.float32)


def _write(cache: Array, new: Array, slot: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(cache, new, slot, cache.ndim - 2)
