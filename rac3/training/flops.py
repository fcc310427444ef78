"""The arithmetic of a training step, and the peak of the devices that are known: their ratio is the MFU."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rac3.batches.packing import PackedBatch
from rac3.devices.cluster import GPUS
from rac3.model.transformer import Transformer

# Peak FLOP/s of dense bfloat16 products with float32 sums, by JAX's `device_kind`, from the vendors' data sheets.
PEAKS = {
    "NVIDIA A100-SXM4-40GB": 1e12 * GPUS["A100-40GB"].tflops,
    "NVIDIA A100-SXM4-80GB": 1e12 * GPUS["A100"].tflops,
    "NVIDIA A100 80GB PCIe": 1e12 * GPUS["A100"].tflops,
    "NVIDIA H100 80GB HBM3": 1e12 * GPUS["H100"].tflops,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 1e12 * GPUS["H200"].tflops,
    "NVIDIA B200": 1e12 * GPUS["B200"].tflops,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def step_flops(model: Transformer, batch: PackedBatch) -> tuple[Array, Array]:
    """FLOPs of a step, forward and backward, without padding and without what is computed again.

    Returns:
      with each token attending to all tokens of its group, and only to those up to itself.
    """
    config, real = model.config, batch.segments > 0
    per_layer = 4 * config.embed**2 + 2 * config.embed * config.mlp
    products = 6.0 * (config.num_layers * per_layer + config.embed * model.vocab_size) * jnp.sum(real)
    causal = jnp.sum(jnp.where(real, batch.positions + 1, 0).astype(jnp.float32))  # pairs of tokens
    everyone = 2 * causal - jnp.sum(real)  # n^2 for a group of n tokens, of which n (n + 1) / 2 are causal
    per_pair = 12.0 * config.num_layers * config.embed
    return products + per_pair * everyone, products + per_pair * causal


def peak_flops() -> float | None:
    """Peak FLOP/s of all devices together; None if their kind isn't known."""
    peak = PEAKS.get(jax.devices()[0].device_kind)
    return None if peak is None else peak * jax.device_count()
