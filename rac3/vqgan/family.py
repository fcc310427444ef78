"""What defines a family of published VQGANs. A family renames weights from their names in taming-transformers.

ours        encoder/down_0_block_1/conv1/kernel
taming      encoder.down.0.block.1.conv1.weight
diffusers   encoder.down_blocks.0.resnets.1.conv1.weight
LlamaGen    encoder.conv_blocks.0.res.1.conv1.weight
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from rac3.vqgan.checkpoint import VQGANCheckpoint
from rac3.vqgan.files import CheckpointFiles
from rac3.vqgan.model import VQGAN, Params, VQGANConfig
from rac3.weights.port import Place, Weights, port

Rename = Callable[[str], str]
"""The name of a weight in taming-transformers to its name in a family."""

TRAINING_ONLY = r"(loss|model_ema|discriminator)\..*|quantize\.codebook_used|colorize"
"""Weights of the training objective: the discriminator, the perceptual loss, averages; and of its logs."""


def always(files: CheckpointFiles) -> bool:
    return True


def same(name: str) -> str:
    return name


@dataclass(frozen=True)
class Family:
    """A family of published VQGANs: how its files are recognized, and how they are loaded.

    Attributes:
      load: the VQGAN of its files.
      kinds: `_class_name` or `model_type` in config.json; none if it has `torch.save` files, with or without a yaml.
      weights: the names that the file of weights next to config.json may have; the first one that is there is read.
      prefixes: what the VQGAN's names begin with inside a larger model. Its other shards are not read.
      marker: part of a weight's name that only its `torch.save` files have, among the families from here to the end of
        the list.
      decodes: whether files have a decoder.
    """

    load: Callable[[CheckpointFiles], VQGANCheckpoint]
    kinds: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ("",)
    marker: str = ""
    decodes: Callable[[CheckpointFiles], bool] = always

    def claims(self, files: CheckpointFiles) -> bool:
        """Whether the files are of this family."""
        if self.kinds or files.kind is not None:
            return files.kind in self.kinds
        return any(self.marker in name for name in files.torch_file.tensors)


def vqgan_params(
    file: Path, config: VQGANConfig, weights: Weights, rename: Rename = same, *, decoder: bool = True
) -> Params:
    """The parameters of our module.

    Args:
      file: of the weights, for messages.
      decoder: False for weights without one; the parameters have none then.

    Raises:
      InputError: the weights are not those of the config.
    """
    images = jax.ShapeDtypeStruct((1, config.resolution, config.resolution, config.in_channels), jnp.float32)
    params = jax.eval_shape(VQGAN(config).init, jax.random.key(0), images)["params"]
    if not decoder:
        del params["decoder"]

    def place(path: str) -> Place:
        return Place(rename(taming_name(path)), transposed=path.endswith("/kernel"))

    return port(params, weights, place, where=f"weights {str(file)!r}", ignored=TRAINING_ONLY)


def taming_name(path: str) -> str:
    """`encoder/down_0_block_1/conv1/kernel` to `encoder.down.0.block.1.conv1.weight`."""
    codebook = {"embedding": "embedding.weight", "proj_kernel": "proj.weight", "proj_bias": "proj.bias"}
    if path.startswith("codebook/"):
        return f"quantize.{codebook[path.removeprefix('codebook/')]}"
    name = re.sub(r"/(down|up)_(\d+)_(block|attn)_(\d+)/", r".\1.\2.\3.\4.", path)
    name = re.sub(r"/(down|up)_(\d+)_", r".\1.\2.", name).replace("/mid_", ".mid.")
    return re.sub(r"(kernel|scale)$", "weight", name).replace("/", ".")


def below(weights: Weights, prefixes: tuple[str, ...]) -> Weights:
    """The weights of a part of a larger model, without the prefix of their names; all of them if none has it."""
    inside = {
        name.removeprefix(prefix): weight
        for name, weight in weights.items()
        for prefix in prefixes
        if name.startswith(prefix)
    }
    return inside or weights
