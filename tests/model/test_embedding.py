"""Lookups and their gradients against NumPy, on one device and on meshes."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rac3.devices.mesh import MeshConfig
from rac3.model.embedding import look_up

MESHES = [None, {"fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 4, "tensor": 2}, {"fsdp": 8}]
IDS = np.random.default_rng(0).integers(0, 16, (8, 12))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("axis", ["vocab", "positions"])
def test_rows_and_their_gradients_are_those_of_numpy(axis, mesh):
    rng = np.random.default_rng(1)
    table, cotangent = np.float32(rng.normal(size=(16, 8))), np.float32(rng.normal(size=(8, 12, 8)))
    expected = np.zeros((16, 8))
    np.add.at(expected, IDS, np.float64(cotangent))
    with contextlib.nullcontext() if mesh is None else MeshConfig(**mesh).build().use():

        @jax.jit
        def both(table, ids, cotangent):
            found, transpose = jax.vjp(lambda table: look_up(table, ids, "float32", axis, "seq"), table)
            return found, transpose(cotangent)[0]

        found, gradient = both(table, jnp.asarray(IDS), cotangent)
    np.testing.assert_array_equal(found, table[IDS])
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


def test_a_frequent_id_keeps_its_gradient_in_bfloat16():
    """Sums of 4,096 ones stop at 256 in bfloat16."""
    ids = jnp.zeros((1, 4096), jnp.int32)
    total = jax.grad(lambda table: jnp.sum(look_up(table, ids, "bfloat16", "vocab", None)))(jnp.ones((2, 4)))
    np.testing.assert_array_equal(total, [[4096] * 4, [0] * 4])


def test_the_gradient_is_reduced_straight_into_the_shards_of_the_table():
    """Rows over tensor, features over fsdp: no device gets the sum of the whole table, [16, 8]."""
    mesh = MeshConfig(data=2, fsdp=2, tensor=2).build()
    place, table = mesh.sharding("vocab", "embed"), jax.ShapeDtypeStruct((16, 8), jnp.float32)
    with mesh.use():
        gradient = jax.grad(lambda table: jnp.sum(jnp.sin(look_up(table, jnp.asarray(IDS), "float32", "vocab", "seq"))))
        program = jax.jit(gradient, in_shardings=place, out_shardings=place).lower(table).compile()
    reduced = [line for line in program.as_text().splitlines() if re.search(r" (all-reduce|reduce-scatter)\(", line)]
    assert reduced
    assert not any("f32[16,8]" in line.split("(")[0] for line in reduced)
