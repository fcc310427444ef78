"""Published VQGAN checkpoints, for the Flax module of `vqgan.py`.

| family | files |
|---|---|
| taming-transformers VQModel and GumbelVQ; the checkpoint that Chameleon publishes | `*.ckpt` and its `*.yaml` |
| latent-diffusion VQModel and VQModelInterface, alone or inside a diffusion model | the same |
| LlamaGen VQ-8 and VQ-16 | `*.pt` alone |
| diffusers VQModel | a folder: `config.json`, `diffusion_pytorch_model.safetensors` or `.bin` |
| transformers ChameleonVQVAE, alone or inside a Chameleon; it has no decoder | a folder: `config.json`, safetensors |

`vqgan_files.py` finds the files, `vqgan_configs.py` reads a config, `vqgan_weights.py` knows what weights are called.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from rac3.config import InputError
from rac3.vqgan.configs import (
    chameleon_config,
    diffusers_config,
    llamagen_config,
    read_settings,
    taming_config,
    taming_model,
)
from rac3.vqgan.files import YAML_SUFFIXES, CheckpointFiles, checkpoint_files, only
from rac3.vqgan.model import Params, VQGANConfig, at_resolution
from rac3.vqgan.weights import (
    Weights,
    below,
    chameleon_prefix,
    convert,
    diffusers_names,
    gumbel_name,
    llamagen_names,
    newer_diffusers_names,
)
from rac3.weights.checkpoint_files import read_safetensors
from rac3.weights.torch_file import TorchFile, read_torch_file


@dataclass(frozen=True)
class VQGANCheckpoint:
    """A loaded VQGAN; `skipped` names the classes that its file mentions beside the weights, which were not made."""

    config: VQGANConfig
    params: Params
    family: str
    skipped: tuple[str, ...] = ()

    @property
    def decodes(self) -> bool:
        return "decoder" in self.params

    def summary(self) -> str:
        """What was found, in one line."""
        config = self.config
        parts = [
            f"{self.family}, {config.n_embed} codes, {config.tokens_per_image} tokens per image of "
            f"{config.resolution} x {config.resolution}"
        ]
        if not self.decodes:
            parts.append("encoder only, so that it cannot draw")
        if self.skipped:
            parts.append(f"{len(self.skipped)} foreign classes skipped, such as {self.skipped[0]}")
        return "; ".join(parts)


def load_vqgan(path: Path, resolution: int | None = None) -> VQGANCheckpoint:
    """The VQGAN of a published checkpoint, its parameters in float32; `path` is its weights, its config or its folder.

    `resolution` (pixels) replaces the config's: the layers stay as they are, and the tokens follow its square. The
    configs of diffusers often name another one than the model was trained at, and LlamaGen's files name none.

    Raises:
      InputError: a file is missing, cut short or something else than its name says; the family or a setting of it is
        not supported; the weights are not those of the config.
    """
    files = checkpoint_files(path)
    if files.kind == "diffusers":
        checkpoint = _load_diffusers(files)
    elif files.kind == "transformers":
        checkpoint = _load_chameleon(files)
    else:
        file = read_torch_file(files.weights[0])
        llamagen = any(".conv_blocks." in name for name in file.tensors)
        checkpoint = _load_llamagen(files.weights[0], file) if llamagen else _load_taming(files, file)
    if resolution is None:
        return checkpoint
    return replace(checkpoint, config=at_resolution(checkpoint.config, resolution))


def _load_taming(files: CheckpointFiles, file: TorchFile) -> VQGANCheckpoint:
    """taming-transformers, latent-diffusion, and the checkpoint that Chameleon itself publishes."""
    path = files.weights[0]
    if not files.configs:
        raise InputError(
            f"weights {str(path)!r} have no {' or '.join(YAML_SUFFIXES)} file beside them; put their config there"
        )
    model = taming_model(read_settings(only(files.configs)))
    config = taming_config(model)
    target = model.get("target", str, "VQModel")
    kind = "latent-diffusion VQModel" if target.startswith("ldm.") else f"taming {target.split('.')[-1]}"
    rename = gumbel_name if config.quantizer == "gumbel" else lambda name: name
    weights = dict(below(file.tensors, "first_stage_model."))
    remap = model.part("params").values.get("remap")
    used = None if remap is None else _used_codes(path, config, weights.pop("quantize.used", None), remap)
    params = convert(path, config, weights, rename)
    if used is not None:
        params["codebook"] = jax.tree.map(lambda rows: rows[used], params["codebook"])
        config = replace(config, n_embed=len(used))
    return VQGANCheckpoint(config, params, kind, file.foreign)


def _used_codes(path: Path, config: VQGANConfig, used: np.ndarray | None, remap: object) -> np.ndarray:
    """The codes that taming's `remap` keeps: token i stands for code `used[i]`.

    taming's VQModel searches the whole codebook, and gives a vector whose nearest code is not kept a random token. Here
    the codes that are not kept are dropped before the search, as GumbelVQ does, so that such a vector has the token of
    the nearest one that is kept; all other tokens are taming's. The list is among the weights, and the file that
    `remap` names is not needed.
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


def _load_llamagen(path: Path, file: TorchFile) -> VQGANCheckpoint:
    """LlamaGen's VQ. It looks for the code of the smallest angle, and decodes codes at length 1.

    With codes of length 1 the nearest code to a vector is that of the smallest angle, however long the vector is. So
    they are scaled once, here.
    """
    config = llamagen_config(path, file.tensors)
    params = convert(path, config, file.tensors, llamagen_names(len(config.ch_mult)))
    codes = params["codebook"]["embedding"]
    params["codebook"]["embedding"] = codes / np.maximum(np.linalg.norm(codes, axis=1, keepdims=True), 1e-12)
    return VQGANCheckpoint(config, params, f"LlamaGen VQ-{config.resolution // config.grid}", file.foreign)


def _load_diffusers(files: CheckpointFiles) -> VQGANCheckpoint:
    path = files.weights[0]
    config = diffusers_config(read_settings(files.configs[0]))
    weights = read_safetensors(path) if path.suffix == ".safetensors" else read_torch_file(path).tensors
    params = convert(path, config, newer_diffusers_names(weights), diffusers_names(len(config.ch_mult)))
    return VQGANCheckpoint(config, params, "diffusers VQModel")


def _load_chameleon(files: CheckpointFiles) -> VQGANCheckpoint:
    settings = read_settings(files.configs[0])
    whole = settings.values["model_type"] == "chameleon"
    weights: Weights = {}
    for file in files.weights:
        weights |= read_safetensors(file, lambda name: not whole or bool(chameleon_prefix([name])))
    if not weights:
        raise InputError(f"{str(settings.file.parent)!r} has no weights of the VQGAN (model.vqmodel.*); use another")
    config = chameleon_config(settings.part("vq_config") if whole else settings)
    weights = below(weights, chameleon_prefix(weights))
    decoder = any(name.startswith("decoder.") for name in weights)
    params = convert(files.weights[0], config, weights, lambda name: name, decoder)
    return VQGANCheckpoint(config, params, "transformers ChameleonVQVAE")
