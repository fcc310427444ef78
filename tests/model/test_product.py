"""Matrix products and their gradients, against NumPy in float64."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rac3.devices.mesh import MeshConfig
from rac3.model.product import product


@pytest.mark.parametrize(
    ("batch", "inputs", "outputs"),
    [
        ((2, 20), (24,), (8,)),  # a wide operand of the kernel's gradient, which is made transposed
        ((2, 20), (8,), (3, 2, 4)),
        ((40,), (2, 4), (8,)),
        ((3,), (8,), (5,)),  # few rows
    ],
)
@pytest.mark.parametrize(("dtype", "devices"), [("float32", 1), ("bfloat16", 1), ("float32", 8)])
def test_a_product_and_its_gradients_are_those_of_numpy(
    batch: tuple[int, ...], inputs: tuple[int, ...], outputs: tuple[int, ...], dtype: str, devices: int
) -> None:
    random = np.random.default_rng(0)
    shapes = ((*batch, *inputs), (*inputs, *outputs), (*batch, *outputs))
    x, kernel, cotangent = (jnp.asarray(random.normal(size=shape), dtype) for shape in shapes)
    with MeshConfig(fsdp=8).build().use() if devices == 8 else contextlib.nullcontext():
        out, transpose = jax.vjp(lambda *operands: product(*operands, len(inputs)), x, kernel)
        gradients = transpose(cotangent)

    rows, matrix, d_rows = (
        np.float64(array).reshape(np.prod(left), -1)
        for array, left in ((x, batch), (kernel, inputs), (cotangent, batch))
    )
    wanted = (rows @ matrix, d_rows @ matrix.T, rows.T @ d_rows)
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]  # sums of 8 to 40 terms, relative to the largest
    for got, expected in zip((out, *gradients), wanted, strict=True):
        assert got.dtype == dtype
        np.testing.assert_allclose(
            np.float64(got).reshape(expected.shape), expected, atol=tolerance * abs(expected).max()
        )
