"""What is set for XLA and the C library on CPUs."""

import ctypes
import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, jax, jax.numpy as jnp
from rac3.devices.cpu import keep_freed_memory

keep_freed_memory()
step = jax.jit(lambda x: jnp.sum(jnp.sin(x) @ jnp.ones((2048, 256))))
x = jnp.ones((8192, 2048))

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(min(faults() for _ in range(10)))  # the heap takes some steps to have room for what overlaps
"""


def has_glibc() -> bool:
    try:
        return hasattr(ctypes.CDLL("libc.so.6"), "mallopt")
    except OSError:
        return False


@pytest.mark.skipif(not has_glibc(), reason="the settings are glibc's")
def test_a_step_finds_the_memory_of_the_step_before() -> None:
    """Arrays of 64 MB, which no step leaves behind, are 16,384 pages of 4 kB that the system would map again."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    ran = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 1000
