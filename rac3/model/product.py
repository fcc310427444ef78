"""The product of activations and a kernel, whose gradients are products too: JAX's own would transpose one of them."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rac3.devices.mesh import is_sharded


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: Array, kernel: Array, axes: int = 1) -> Array:
    """[*batch, *in], [*in, *out] -> [*batch, *out]; `axes` is the number of axes of `in`."""
    return jnp.tensordot(x, kernel, axes)


def _forward(x: Array, kernel: Array, axes: int) -> tuple[Array, tuple[Array, Array]]:
    return jnp.tensordot(x, kernel, axes), (x, kernel)  # remat policies see products, but nothing inside custom_vjp


def _backward(axes: int, saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, kernel = saved
    batch, out = x.ndim - axes, kernel.ndim - axes
    if max(batch, axes, out) > 1 and not is_sharded():
        # As matrices, since XLA transposes an operand that is summed over several axes. Sharded ones must not merge.
        tokens, size = math.prod(x.shape[:batch]), math.prod(x.shape[batch:])
        matrices = x.reshape(tokens, size), kernel.reshape(size, -1)
        d_x, d_kernel = _backward(1, matrices, cotangent.reshape(tokens, -1))
        return d_x.reshape(x.shape), d_kernel.reshape(kernel.shape)
    of_out = tuple(range(batch, batch + out)), tuple(range(axes, axes + out))
    of_batch = tuple(range(batch)), tuple(range(batch))
    d_x = jax.lax.dot_general(cotangent, kernel, (of_out, ((), ())))
    return d_x, jax.lax.dot_general(x, cotangent, (of_batch, ((), ())))


product.defvjp(_forward, _backward)


def dot_general(x: Array, kernel: Array, dimension_numbers: Any, **_: Any) -> Array:
    """`product` in the form that `flax.linen.Dense` calls."""
    return product(x, kernel)
