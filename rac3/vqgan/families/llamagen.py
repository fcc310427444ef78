"""LlamaGen's VQ-8 and VQ-16 (arXiv 2406.06525): `*.pt` alone.

There is no config: the sizes are those of the weights. A training file holds the weights twice; those of its `ema` are
taken, with which LlamaGen reconstructs. LlamaGen finds the code at the smallest angle, and decodes codes at length 1.
"""

import re
from pathlib import Path

import numpy as np

from rac3.config import InputError
from rac3.vqgan.checkpoint import VQGANCheckpoint
from rac3.vqgan.family import Family, Rename, vqgan_params
from rac3.vqgan.files import AVERAGED, CheckpointFiles
from rac3.vqgan.model import VQGANConfig
from rac3.weights.port import Weights

RESOLUTION = 256
"""Pixels: the size that LlamaGen's tokenizers were trained at; their files do not say it."""


def load(files: CheckpointFiles) -> VQGANCheckpoint:
    """Codes are scaled to length 1 here, once: the nearest of these is the one at the smallest angle."""
    path, weights = files.weights[0], files.torch_file.tensors
    config = read_config(path, weights)
    params = vqgan_params(path, config, weights, renaming(len(config.ch_mult)))
    codes = params["codebook"]["embedding"]
    params["codebook"]["embedding"] = codes / np.maximum(np.linalg.norm(codes, axis=1, keepdims=True), 1e-12)
    averaged = f", averaged weights ({AVERAGED})" if files.torch_file.entry == AVERAGED else ""
    title = f"LlamaGen VQ-{RESOLUTION // config.grid}{averaged}"
    return VQGANCheckpoint(config, params, title, files.torch_file.foreign)


def read_config(file: Path, weights: Weights) -> VQGANConfig:
    """From the names and shapes of the weights."""

    def size(name: str, axis: int) -> int:
        """A side of a weight in torch's layout: convolutions are [out, in, height, width]."""
        if name not in weights:
            raise InputError(f"weights {str(file)!r} lack {name!r}, which LlamaGen's VQ has; download the file again")
        if weights[name].ndim <= axis or not weights[name].shape[axis]:
            raise InputError(
                f"weights {str(file)!r}: {name!r} has shape {weights[name].shape}; download the file again"
            )
        return weights[name].shape[axis]

    def count(pattern: str) -> int:
        return next(number for number in range(len(weights) + 1) if pattern.format(number) not in weights)

    ch = size("encoder.conv_in.weight", 0)
    levels = range(count("encoder.conv_blocks.{}.res.0.conv1.weight"))
    return VQGANConfig(
        ch=ch,
        ch_mult=tuple(size(f"encoder.conv_blocks.{level}.res.0.conv1.weight", 0) // ch for level in levels),
        num_res_blocks=count("encoder.conv_blocks.0.res.{}.conv1.weight"),
        attn_resolutions=tuple(
            RESOLUTION >> level for level in levels if f"encoder.conv_blocks.{level}.attn.0.norm.weight" in weights
        ),
        resolution=RESOLUTION,
        in_channels=size("encoder.conv_in.weight", 1),
        out_ch=size("decoder.conv_out.weight", 0),
        z_channels=size("encoder.conv_out.weight", 0),
        n_embed=size("quantize.embedding.weight", 0),
        embed_dim=size("quantize.embedding.weight", 1),
    )


def renaming(levels: int) -> Rename:
    """Levels count in the order in which they are passed; taming counts by resolution in the decoder too."""

    def rename(name: str) -> str:
        name = re.sub(r"\.down\.(\d+)\.", r".conv_blocks.\1.", name)
        name = re.sub(r"\.up\.(\d+)\.", lambda level: f".conv_blocks.{levels - 1 - int(level[1])}.", name)
        name = re.sub(r"(conv_blocks\.\d+)\.block\.", r"\1.res.", name)
        for place, middle in enumerate(("block_1", "attn_1", "block_2")):
            name = name.replace(f".mid.{middle}.", f".mid.{place}.")
        return name

    return rename


FAMILY = Family(load, marker=".conv_blocks.")
