"""diffusers' VQModel: a folder with `config.json` and `diffusion_pytorch_model.safetensors` or `.bin`."""

import re

from rac3.config import InputError
from rac3.vqgan.checkpoint import VQGANCheckpoint
from rac3.vqgan.family import Family, Rename, vqgan_params
from rac3.vqgan.files import CheckpointFiles
from rac3.vqgan.model import VQGANConfig
from rac3.weights.port import Weights
from rac3.weights.settings import Settings, read_settings
from rac3.weights.weights_file import read_weights


def load(files: CheckpointFiles) -> VQGANCheckpoint:
    path = files.weights[0]
    config = read_config(read_settings(files.configs[0]))
    params = vqgan_params(path, config, newer_names(read_weights(path)), renaming(len(config.ch_mult)))
    return VQGANCheckpoint(config, params, "diffusers VQModel")


def read_config(settings: Settings) -> VQGANConfig:
    """From `config.json`, with the defaults of diffusers."""
    settings.require(act_fn="silu", norm_type="group")
    channels = settings.numbers("block_out_channels", (64,))
    if not channels or channels[0] < 1 or any(width % channels[0] for width in channels):
        raise InputError(
            f"{settings.file}: block_out_channels={channels} are not multiples of the first; not supported"
        )
    down = settings.get("down_block_types", list, ["DownEncoderBlock2D"])
    up = settings.get("up_block_types", list, ["UpDecoderBlock2D"])
    attention = [kind == "AttnDownEncoderBlock2D" for kind in down]
    expected = ["AttnDownEncoderBlock2D" if attends else "DownEncoderBlock2D" for attends in attention]
    mirrored = ["AttnUpDecoderBlock2D" if attends else "UpDecoderBlock2D" for attends in reversed(attention)]
    if len(down) != len(channels) or down != expected or up != mirrored:
        raise InputError(
            f"{settings.file}: blocks {down} and {up} are not supported; the decoder must mirror the encoder, level by "
            "level, with or without attention"
        )
    resolution = settings.get("sample_size", int, 32)
    latent = settings.get("latent_channels", int, 3)
    return VQGANConfig(
        ch=channels[0],
        ch_mult=tuple(width // channels[0] for width in channels),
        num_res_blocks=settings.get("layers_per_block", int, 1),
        attn_resolutions=tuple(resolution >> level for level, attends in enumerate(attention) if attends),
        resolution=resolution,
        in_channels=settings.get("in_channels", int, 3),
        out_ch=settings.get("out_channels", int, 3),
        z_channels=latent,
        embed_dim=settings.get("vq_embed_dim", int, latent),
        n_embed=settings.get("num_vq_embeddings", int, 256),
        norm_groups=settings.get("norm_num_groups", int, 32),
        mid_attn=settings.get("mid_block_add_attention", bool, True),
    )


def renaming(levels: int) -> Rename:
    """Levels count in the order in which they are passed; taming counts by resolution in the decoder too."""
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


def newer_names(weights: Weights) -> Weights:
    """The names that attention has had since diffusers 0.15."""
    newer = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    pattern = re.compile(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.")
    return {pattern.sub(lambda m: f"{m[1]}.{newer[m[2]]}.", name): weight for name, weight in weights.items()}


FAMILY = Family(
    load, kinds=("VQModel",), weights=("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
)
