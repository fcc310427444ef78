"""Checksums: by the formula in plain integers, the same on every mesh, and changed by any change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rac3.devices.mesh import MeshConfig
from rac3.training.checksum import checksum, checksums

RNG = np.random.default_rng(0)
ARRAYS = {
    "float32": RNG.normal(size=(8, 4, 6)).astype(np.float32),
    "bfloat16": RNG.normal(size=(16, 3)).astype(jnp.bfloat16),
    "int32": np.arange(-8, 8, dtype=np.int32),
    "bool": np.array([True, False, True, True, False, False, True, False]),
    "scalar": np.float32(3.25),
    "nothing": np.zeros((8, 0), np.float32),
}


def plain(x: np.ndarray) -> int:
    """Element by element, in Python's integers."""
    total = 0
    words = np.atleast_1d(x).ravel().view(f"uint{8 * x.dtype.itemsize}").tolist()
    for index, word in enumerate(words):
        h = index
        h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
        h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
        total += word * ((h ^ (h >> 16)) | 1)
    return total % 2**32


@pytest.mark.parametrize("name", ARRAYS)
def test_it_is_the_sum_of_the_formula(name: str, monkeypatch: pytest.MonkeyPatch):
    """On the devices, and of small arrays on the host."""
    x = ARRAYS[name]
    assert int(checksum(jnp.asarray(x))) == plain(x)
    for small in (2**20, -1):
        monkeypatch.setattr("rac3.training.checksum.SMALL", small)
        assert checksums({"a": x, "b": jnp.ones(2)}) == [plain(x), plain(np.ones(2, np.float32))]


@pytest.mark.parametrize("mesh", [MeshConfig(data=8), MeshConfig(data=2, fsdp=2, tensor=2)])
def test_shards_add_up_to_the_whole(mesh: MeshConfig):
    built = mesh.build()
    for names, x in ((("batch", None, None), ARRAYS["float32"]), (("embed", None), ARRAYS["bfloat16"])):
        assert int(checksum(jax.device_put(x, built.sharding(*names)))) == plain(x)


def test_any_bit_of_any_element_counts():
    x = ARRAYS["float32"]
    before, bits = int(checksum(jnp.asarray(x))), x.view(np.uint32)
    for _ in range(200):
        changed = bits.copy()
        changed[tuple(RNG.integers(x.shape))] ^= np.uint32(1 << RNG.integers(32))
        assert int(checksum(jnp.asarray(changed.view(np.float32)))) != before


def test_the_order_counts():
    x = ARRAYS["float32"]
    assert int(checksum(jnp.asarray(x[::-1].copy()))) != int(checksum(jnp.asarray(x)))
