"""Matrix products, and their gradients, in the form that runs fastest."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rac3.devices.mesh import is_sharded

FEW = 32  # rows: products of fewer are as fast in any form


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: Array, kernel: Array, axes: int = 1) -> Array:
    """[*batch, *in], [*in, *out] -> [*batch, *out]; `axes` is the number of axes of `in`.

    Its gradients are products of the same operands: JAX's own would transpose one of them.
    """
    return _product(x, kernel, axes)


def _product(x: Array, kernel: Array, axes: int) -> Array:
    if is_sharded():  # sharded axes must not merge
        return jnp.tensordot(x, kernel, axes)
    batch, out = x.shape[: x.ndim - axes], kernel.shape[axes:]
    size = math.prod(kernel.shape[:axes])
    return rows_times(x.reshape(-1, size), kernel.reshape(size, -1)).reshape(*batch, *out)


def _forward(x: Array, kernel: Array, axes: int) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, kernel, axes), (x, kernel)  # remat policies see products, but nothing inside custom_vjp


def _backward(axes: int, saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, kernel = saved
    batch, out = x.ndim - axes, kernel.ndim - axes
    if not is_sharded():  # as matrices: XLA transposes an operand that is summed over several axes
        tokens, size = math.prod(x.shape[:batch]), math.prod(x.shape[batch:])
        rows, d_rows, matrix = x.reshape(tokens, size), cotangent.reshape(tokens, -1), kernel.reshape(size, -1)
        d_x = jnp.einsum("to,io->ti", d_rows, matrix)
        return d_x.reshape(x.shape), _columns_times(rows, d_rows).reshape(kernel.shape)
    of_out = tuple(range(batch, batch + out)), tuple(range(axes, axes + out))
    of_batch = tuple(range(batch)), tuple(range(batch))
    d_x = jax.lax.dot_general(cotangent, kernel, (of_out, ((), ())))
    return d_x, jax.lax.dot_general(x, cotangent, (of_batch, ((), ())))


product.defvjp(_forward, _backward)


def dot_general(x: Array, kernel: Array, dimension_numbers: Any, **_: Any) -> Array:
    """`product` in the form that `flax.linen.Dense` calls."""
    return product(x, kernel)


def rows_times(x: Float[Array, "rows in"], matrix: Float[Array, "in out"]) -> Float[Array, "rows out"]:
    """x @ matrix.

    XLA for CPUs multiplies by YNNPACK (see `rac3.devices.cpu`), or else by Eigen, which is a tenth to a fifth faster
    where neither operand is transposed. What YNNPACK does not take are convolutions: one of width 1 is this product.
    """
    if jax.default_backend() != "cpu" or x.dtype != jnp.float32 or len(x) < FEW:
        return x @ matrix
    dimensions = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(x[None], matrix[None], (1,), "VALID", dimension_numbers=dimensions)[0]


def _columns_times(x: Float[Array, "rows in"], y: Float[Array, "rows out"]) -> Float[Array, "in out"]:
    """x^T @ y.

    Eigen takes up to twice as long where the first operand is the wider one: its columns are far apart in memory.
    """
    if jax.default_backend() != "cpu" or x.shape[1] <= y.shape[1]:
        return jnp.einsum("ti,to->io", x, y)
    # Behind a barrier, or XLA would swap the operands back.
    return jax.lax.optimization_barrier(jnp.einsum("to,ti->oi", y, x)).T
