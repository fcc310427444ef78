"""What XLA's compiler and the C library need to be told to make a training step fast on CPUs."""

import ctypes
import functools
import importlib.util
from importlib import metadata

import jax

OPTIONS = {
    # Its library of kernels for matrix products alone: the library's sums along an axis are slower than XLA's own.
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
    "xla_cpu_enable_fast_min_max": "True",  # maxima of rows in vectors; they may pass over a NaN
    "xla_cpu_copy_insertion_use_region_analysis": "True",  # fewer copies of what is updated in place
    "xla_cpu_prefer_vector_width": "512",
}


@functools.cache
def compiler_options() -> dict[str, str]:
    """Those of `OPTIONS` that this version of XLA has; none unless JAX runs on CPUs."""
    if jax.default_backend() != "cpu":
        return {}
    return {name: value for name, value in OPTIONS.items() if _is_known(name, value)}


def _is_known(name: str, value: str) -> bool:
    try:
        jax.jit(lambda x: x, compiler_options={name: value}).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Makes glibc keep what this process frees, for what it allocates next, if JAX has nothing but CPUs to run on.

    A step allocates its activations as one block and frees it at its end. By default the block goes back to the
    system, so that each step has it mapped and cleared again, page by page. To be called before JAX starts its threads;
    afterwards it has no effect.
    """
    if _may_have_accelerators():
        return
    try:
        set_option = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    set_option(M_MMAP_MAX, 0)  # a block with its own mapping ends when it is freed
    set_option(M_TRIM_THRESHOLD, 2**31 - 1)
    set_option(M_ARENA_MAX, 1)  # the arenas of threads hold no large blocks


def _may_have_accelerators() -> bool:
    """Without asking JAX, which would start its threads."""
    if platforms := jax.config.values["jax_platforms"]:
        return bool(platforms != "cpu")
    return bool(metadata.entry_points(group="jax_plugins")) or importlib.util.find_spec("libtpu") is not None
