"""What XLA's compiler for CPUs needs to be told to make a training step fast."""

import functools

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
