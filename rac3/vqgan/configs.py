"""The configs of published VQGANs, read as the `VQGANConfig` of `vqgan.py`.

taming-transformers, latent-diffusion and Chameleon's own file have a yaml, diffusers and transformers a `config.json`.
A setting that the module does not have is refused. LlamaGen's files hold weights alone: there the sizes are read off
the weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from rac3.config import InputError
from rac3.vqgan.model import VQGANConfig
from rac3.weights.checkpoint_files import read_json

T = TypeVar("T")

LLAMAGEN_RESOLUTION = 256
"""Pixels: LlamaGen's tokenizers were trained at this size, which their files do not name."""


@dataclass(frozen=True)
class Settings:
    """The entries of a config file, taken with the kind that each must have."""

    file: Path
    values: Mapping[str, Any]

    def get(self, name: str, kind: type[T], default: T | None = None) -> T:
        value = self.values.get(name)
        value = default if value is None else value
        if kind is float and type(value) is int:
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise InputError(
                f"{self.file}: {name}={value!r} is not of type {kind.__name__}; give the model's own config"
            )
        return value

    def numbers(self, name: str, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        if self.values.get(name) is None and default is not None:
            return default
        value = self.get(name, list)
        if not all(type(number) is int for number in value):
            raise InputError(
                f"{self.file}: {name}={value!r} is not a list of whole numbers; give the model's own config"
            )
        return tuple(value)

    def part(self, name: str) -> "Settings":
        return Settings(self.file, self.get(name, dict))

    def require(self, **wanted: object) -> None:
        """Refuses another value than the one that the module has; a setting that is not there is as wanted."""
        for name, value in wanted.items():
            if (found := self.values.get(name)) not in (None, value):
                raise InputError(
                    f"{self.file}: {name}={found!r} is not supported, only {value!r}; use another checkpoint"
                )


def read_settings(path: Path) -> Settings:
    """The settings of a JSON or a yaml file, by its suffix.

    Raises:
      InputError: it is neither, or holds something else than settings by name.
    """
    if path.suffix == ".json":
        return Settings(path, read_json(path))
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} is not YAML ({' '.join(str(error).split())[:120]}); download it again") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no settings by name; download it again")
    return Settings(path, values)


def taming_model(settings: Settings) -> Settings:
    """The VQGAN in a yaml (its `target` and `params`); of a whole latent diffusion model, the first stage."""
    model = settings.part("model")
    if "first_stage_config" in model.part("params").values:
        return model.part("params").part("first_stage_config")
    return model


def taming_config(model: Settings) -> VQGANConfig:
    """What `taming_model` found; without a target it is a VQModel."""
    target = model.get("target", str, "VQModel").split(".")[-1]
    if target not in ("VQModel", "VQModelInterface", "GumbelVQ"):
        raise InputError(f"{model.file}: target {target!r} is not supported; use a VQModel or a GumbelVQ")
    params = model.part("params")
    layers = params.part("ddconfig")
    layers.require(double_z=False, use_linear_attn=False, give_pre_end=False, tanh_out=False)
    attention = layers.get("attn_type", str, "vanilla")
    if attention not in ("vanilla", "none"):
        raise InputError(f"{params.file}: attn_type={attention!r} is not supported, only 'vanilla' and 'none'")
    resolutions = layers.numbers("attn_resolutions", ())
    return VQGANConfig(
        ch=layers.get("ch", int),
        ch_mult=layers.numbers("ch_mult"),
        num_res_blocks=layers.get("num_res_blocks", int),
        attn_resolutions=resolutions if attention == "vanilla" else (),
        resolution=layers.get("resolution", int),
        in_channels=layers.get("in_channels", int, 3),
        out_ch=layers.get("out_ch", int, 3),
        z_channels=layers.get("z_channels", int),
        embed_dim=params.get("embed_dim", int),
        n_embed=params.get("n_embed", int),
        dropout=layers.get("dropout", float, 0.0),
        resamp_with_conv=layers.get("resamp_with_conv", bool, True),
        mid_attn=attention == "vanilla",
        quantizer="gumbel" if target == "GumbelVQ" else "nearest",
    )


def diffusers_config(settings: Settings) -> VQGANConfig:
    """From the `config.json` of a VQModel, with the defaults of diffusers."""
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


def chameleon_config(vq: Settings) -> VQGANConfig:
    """From the `config.json` of transformers' ChameleonVQVAE, or from the `vq_config` of a Chameleon's."""
    vq.require(double_latent=False)
    attention = vq.values.get("attn_type", "vanilla") == "vanilla"
    return VQGANConfig(
        ch=vq.get("base_channels", int, 128),
        ch_mult=vq.numbers("channel_multiplier", (1, 1, 2, 2, 4)),
        num_res_blocks=vq.get("num_res_blocks", int, 2),
        attn_resolutions=vq.numbers("attn_resolutions", ()) if attention else (),
        resolution=vq.get("resolution", int, 512),
        in_channels=vq.get("in_channels", int, 3),
        z_channels=vq.get("latent_channels", int, 256),
        embed_dim=vq.get("embed_dim", int, 256),
        n_embed=vq.get("num_embeddings", int, 8192),
        dropout=vq.get("dropout", float, 0.0),
        mid_attn=attention,
    )


def llamagen_config(file: Path, weights: Mapping[str, np.ndarray]) -> VQGANConfig:
    """From the names and shapes of LlamaGen's weights."""

    def size(name: str, axis: int) -> int:
        """A side of a weight, torch's layout: of convolutions [out, in, height, width]."""
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
            LLAMAGEN_RESOLUTION >> level
            for level in levels
            if f"encoder.conv_blocks.{level}.attn.0.norm.weight" in weights
        ),
        resolution=LLAMAGEN_RESOLUTION,
        in_channels=size("encoder.conv_in.weight", 1),
        out_ch=size("decoder.conv_out.weight", 0),
        z_channels=size("encoder.conv_out.weight", 0),
        n_embed=size("quantize.embedding.weight", 0),
        embed_dim=size("quantize.embedding.weight", 1),
    )
