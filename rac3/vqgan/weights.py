"""What the weights of published VQGANs are called, and how they become the parameters of `vqgan.py`.

The parameters of the module are looked up by a family's names and turned from torch's layout to Flax's:

    encoder/down_0_block_1/conv1/kernel [3, 3, in, out]
    taming     encoder.down.0.block.1.conv1.weight           [out, in, 3, 3]
    diffusers  encoder.down_blocks.0.resnets.1.conv1.weight  [out, in, 3, 3]
    LlamaGen   encoder.conv_blocks.0.res.1.conv1.weight      [out, in, 3, 3]

Weights of the training objective (discriminator, perceptual loss, averages) are left out; any other weight that is
missing, surplus or of another shape is refused.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from rac3.config import InputError
from rac3.vqgan.model import VQGAN, Params, VQGANConfig

Weights = dict[str, np.ndarray]
Rename = Callable[[str], str]
"""The name of a parameter in taming-transformers to its name in a family."""

TRAINING_ONLY = ("loss.", "model_ema.", "discriminator.", "quantize.codebook_used")


def convert(file: Path, config: VQGANConfig, weights: Weights, rename: Rename, decoder: bool = True) -> Params:
    """The parameters of the module, float32 in Flax's layout, from weights in torch's.

    Raises:
      InputError: the first weight that is missing or of another shape, else the first that the module does not have.
    """
    size = config.resolution
    images = jax.ShapeDtypeStruct((1, size, size, config.in_channels), jnp.float32)
    shapes = flatten_dict(jax.eval_shape(VQGAN(config).init, jax.random.key(0), images)["params"], sep="/")
    fix = "give the weights and the config of one model"
    params, used = {}, set()
    for path, shape in shapes.items():
        if not decoder and path.startswith("decoder/"):
            continue
        name = rename(taming_name(path))
        if name not in weights:
            raise InputError(f"weights {str(file)!r} lack {name!r}, which the config asks for; {fix}")
        weight = _torch_to_flax(weights[name], len(shape.shape))
        if weight.shape != shape.shape:
            raise InputError(
                f"weights {str(file)!r}: {name!r} has shape {weights[name].shape}, the config asks for "
                f"{_torch_shape(shape.shape)}; {fix}"
            )
        params[path] = weight
        used.add(name)
    surplus = [name for name in weights if name not in used and not name.startswith(TRAINING_ONLY)]
    if surplus:
        raise InputError(
            f"weights {str(file)!r} have {surplus[0]!r} ({len(surplus)} such), which the config has no place for; {fix}"
        )
    return unflatten_dict(params, sep="/")


def below(weights: Weights, prefix: str) -> Weights:
    """The weights whose names begin with the prefix, without it; all of them if none does."""
    inside = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
    return inside or weights


def taming_name(path: str) -> str:
    """`encoder/down_0_block_1/conv1/kernel` to `encoder.down.0.block.1.conv1.weight`."""
    codebook = {"embedding": "embedding.weight", "proj_kernel": "proj.weight", "proj_bias": "proj.bias"}
    if path.startswith("codebook/"):
        return f"quantize.{codebook[path.removeprefix('codebook/')]}"
    name = re.sub(r"/(down|up)_(\d+)_(block|attn)_(\d+)/", r".\1.\2.\3.\4.", path)
    name = re.sub(r"/(down|up)_(\d+)_", r".\1.\2.", name).replace("/mid_", ".mid.")
    return re.sub(r"(kernel|scale)$", "weight", name).replace("/", ".")


def gumbel_name(name: str) -> str:
    return name.replace("quantize.embedding.", "quantize.embed.")


def llamagen_names(levels: int) -> Rename:
    """Levels count in the order in which they are passed, in the decoder too, where taming counts by resolution."""

    def rename(name: str) -> str:
        name = re.sub(r"\.down\.(\d+)\.", r".conv_blocks.\1.", name)
        name = re.sub(r"\.up\.(\d+)\.", lambda level: f".conv_blocks.{levels - 1 - int(level[1])}.", name)
        name = re.sub(r"(conv_blocks\.\d+)\.block\.", r"\1.res.", name)
        for place, middle in enumerate(("block_1", "attn_1", "block_2")):
            name = name.replace(f".mid.{middle}.", f".mid.{place}.")
        return name

    return rename


def diffusers_names(levels: int) -> Rename:
    """Levels count as LlamaGen's do."""
    rules: list[tuple[str, str]] = [
        (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
        (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
        (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
        (r"_blocks\.(\d+)\.block\.", r"_blocks.\1.resnets."),
        (r"_blocks\.(\d+)\.attn\.", r"_blocks.\1.attentions."),
        (r"\.(down|up)sample\.", r".\1samplers.0."),
        (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
        (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
        (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"\.norm_out\.", ".conv_norm_out."),
    ]

    def rename(name: str) -> str:
        name = re.sub(r"\.down\.(\d+)\.", r".down_blocks.\1.", name)
        name = re.sub(r"\.up\.(\d+)\.", lambda level: f".up_blocks.{levels - 1 - int(level[1])}.", name)
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        return name

    return rename


def newer_diffusers_names(weights: Weights) -> Weights:
    """With the names that attention has since diffusers 0.15."""
    newer = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    pattern = re.compile(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.")
    return {pattern.sub(lambda m: f"{m[1]}.{newer[m[2]]}.", name): weight for name, weight in weights.items()}


def chameleon_prefix(names: Iterable[str]) -> str:
    """What stands before the VQGAN's names in a whole Chameleon; "" if none of the names has it."""
    prefixes = ("model.vqmodel.", "vqmodel.")
    return next((prefix for name in names for prefix in prefixes if name.startswith(prefix)), "")


def _torch_to_flax(weight: np.ndarray, dimensions: int) -> np.ndarray:
    """Convolutions [out, in, height, width] to [height, width, in, out]; a linear layer is a convolution of one pixel,
    and the other way round."""
    if weight.ndim == 4 and dimensions == 2 and weight.shape[2:] == (1, 1):
        weight = weight[:, :, 0, 0]
    if weight.ndim == 2 and dimensions == 4:
        weight = weight[:, :, None, None]
    if weight.ndim == 4:
        weight = weight.transpose(2, 3, 1, 0)
    return np.asarray(weight, np.float32, order="C")


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape
