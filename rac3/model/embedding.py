"""Rows of an embedding table: each device looks up its own tokens, and gradients end where the table's shards are."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rac3.devices.mesh import constrain, map_shards, mesh_axes


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def look_up(
    table: Float[Array, "rows embed"], ids: Int[Array, "batch seq"], dtype: str, rows: str, seq: str | None
) -> Float[Array, "batch seq embed"]:
    """The rows `ids` of a float32 table, in `dtype`, into which the table is cast before it moves between devices.

    The gradient adds up in float32. On a mesh it is reduced once, straight into the table's shards.

    Args:
      rows: the logical axis of the table's rows.
      seq: the logical axis that the result is sharded along in addition to `batch`, if any.
    """
    take = functools.partial(jnp.take, axis=0)
    local = map_shards(take, ((None, None), ("batch", seq)), ("batch", seq, None))
    cast = constrain(jnp.asarray(table, dtype), rows, "embed")  # or XLA would gather it first, in float32
    found: Array = local(cast, ids)
    return found


def _forward(table: Array, ids: Array, dtype: str, rows: str, seq: str | None) -> tuple[Array, tuple[Array, int]]:
    return look_up(table, ids, dtype, rows, seq), (ids, len(table))


def _backward(dtype: str, rows: str, seq: str | None, saved: tuple[Array, int], cotangent: Array) -> tuple[Array, None]:
    ids, length = saved
    summed = (*mesh_axes("batch"), *(mesh_axes(seq) if seq else ()))
    names = tuple(name if set(mesh_axes(name)) <= set(summed) else None for name in (rows, "embed"))
    scattered = {axis: dim for dim, name in enumerate(names) if name for axis in mesh_axes(name)}

    def local(ids: Array, cotangent: Array) -> Array:
        gradient = jnp.zeros((length, cotangent.shape[-1])).at[ids].add(cotangent.astype(jnp.float32))
        for axis, dim in scattered.items():
            gradient = jax.lax.psum_scatter(gradient, axis, scatter_dimension=dim, tiled=True)
        whole = tuple(axis for axis in summed if axis not in scattered)
        return jax.lax.psum(gradient, whole) if whole else gradient

    gradient: Array = map_shards(local, (("batch", seq), ("batch", seq, None)), names)(ids, cotangent)
    return gradient, None


look_up.defvjp(_forward, _backward)
