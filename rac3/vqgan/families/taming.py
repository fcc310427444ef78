"""taming-transformers' VQModel, VQNoDiscModel and GumbelVQ, latent-diffusion's VQModel and VQModelInterface (alone, or
as the first stage of a diffusion model), and the checkpoint that Chameleon itself publishes: `*.ckpt` and its `*.yaml`.
"""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from rac3.config import InputError, quoted
from rac3.vqgan.checkpoint import VQGANCheckpoint
from rac3.vqgan.family import Family, below, same, vqgan_params
from rac3.vqgan.files import YAML_SUFFIXES, CheckpointFiles, only
from rac3.vqgan.model import VQGANConfig
from rac3.weights.settings import Settings, read_settings

FIRST_STAGE = ("first_stage_model.",)
COLORIZE = "colorize"  # colors of the classes of segmentation maps, for pictures in training logs


def load(files: CheckpointFiles) -> VQGANCheckpoint:
    path = files.weights[0]
    if not files.configs:
        raise InputError(
            f"weights {str(path)!r} have no {' or '.join(YAML_SUFFIXES)} file next to them; put their config there"
        )
    model = model_settings(read_settings(only(files.configs)))
    config = read_config(model)
    weights = dict(below(files.torch_file.tensors, FIRST_STAGE))
    remap = model.part("params").values.get("remap")
    used = None if remap is None else _used_codes(path, config, weights.pop("quantize.used", None), remap)
    params = vqgan_params(path, config, weights, gumbel_name if config.quantizer == "gumbel" else same)
    if used is not None:
        params["codebook"] = jax.tree.map(lambda rows: rows[used], params["codebook"])
        config = replace(config, n_embed=len(used))
    target = model.get("target", str, "VQModel")
    title = "latent-diffusion VQModel" if target.startswith("ldm.") else f"taming {target.split('.')[-1]}"
    title += f", {COLORIZE!r} ignored" if COLORIZE in weights else ""
    return VQGANCheckpoint(config, params, title, files.torch_file.foreign)


def model_settings(settings: Settings) -> Settings:
    """The `target` and `params` of the VQGAN in a yaml: those of the first stage, if it is a latent diffusion model."""
    model = settings.part("model")
    if "first_stage_config" in model.part("params").values:
        return model.part("params").part("first_stage_config")
    return model


def read_config(model: Settings) -> VQGANConfig:
    """From `model_settings`; without a target it is a VQModel."""
    target = model.get("target", str, "VQModel").split(".")[-1]
    if target not in ("VQModel", "VQModelInterface", "VQNoDiscModel", "GumbelVQ"):
        raise InputError(f"{model.file}: target {quoted(target)} is not supported; use a VQModel or a GumbelVQ")
    params = model.part("params")
    layers = params.part("ddconfig")
    layers.require(double_z=False, use_linear_attn=False, give_pre_end=False, tanh_out=False)
    attention = layers.get("attn_type", str, "vanilla")
    if attention not in ("vanilla", "none"):
        raise InputError(f"{params.file}: attn_type={quoted(attention)} is not supported, only 'vanilla' and 'none'")
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


def gumbel_name(name: str) -> str:
    return name.replace("quantize.embedding.", "quantize.embed.")


def _used_codes(path: Path, config: VQGANConfig, used: np.ndarray | None, remap: object) -> np.ndarray:
    """The codes that taming's `remap` keeps: token i stands for code `used[i]`.

    taming's VQModel searches the whole codebook, and gives a vector whose nearest code is not kept a random token. Here
    the other codes are dropped before the search, as in GumbelVQ: such a vector has the token of the nearest code that
    is kept. All other tokens are taming's. The list is among the weights; the file that `remap` names is not needed.
    """
    if used is None:
        raise InputError(
            f"weights {str(path)!r} lack 'quantize.used', which remap={remap!r} asks for; give the weights of a model "
            "with remapped codes, or delete remap from the config"
        )
    if used.ndim != 1 or used.dtype.kind not in "iu" or not len(used) or used.min() < 0 or used.max() >= config.n_embed:
        raise InputError(
            f"weights {str(path)!r}: 'quantize.used' is no list of codes from 0 to {config.n_embed - 1}, as "
            f"n_embed={config.n_embed} in the config asks for; give the weights and the config of one model"
        )
    return used


FAMILY = Family(load)
