"""Published VQGAN checkpoints, for the Flax module of `vqgan.py`.

| family | files |
|---|---|
| taming-transformers VQModel and GumbelVQ; the checkpoint that Chameleon publishes | `*.ckpt` and its `*.yaml` |
| latent-diffusion VQModel and VQModelInterface, alone or inside a diffusion model | the same |
| diffusers VQModel | a folder: `config.json`, `diffusion_pytorch_model.safetensors` or `.bin` |
| transformers ChameleonVQVAE, alone or inside a Chameleon; it has no decoder | a folder: `config.json`, safetensors |

Each family is a reader of its config, and what its weights are called. The parameters of the module are looked up by
these names and turned from torch's layout to Flax's:

    encoder/down_0_block_1/conv1/kernel [3, 3, in, out]
    taming     encoder.down.0.block.1.conv1.weight           [out, in, 3, 3]
    diffusers  encoder.down_blocks.0.resnets.1.conv1.weight  [out, in, 3, 3]

Weights of the training objective (discriminator, perceptual loss, averages) are left out; any other weight that is
missing, surplus or of another shape is refused, as is a setting that the module does not have.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from rac3.config import InputError
from rac3.tokens.checkpoint_files import read_json, read_safetensors
from rac3.tokens.torch_file import read_torch_file
from rac3.tokens.vqgan import VQGAN, Params, VQGANConfig, at_resolution

TORCH_SUFFIXES = (".ckpt", ".pt", ".pth")
YAML_SUFFIXES = (".yaml", ".yml")
DIFFUSERS_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
TRANSFORMERS_WEIGHTS = ("model.safetensors.index.json", "model.safetensors")
TRAINING_ONLY = ("loss.", "model_ema.", "discriminator.")

T = TypeVar("T")
Weights = dict[str, np.ndarray]
Rename = Callable[[str], str]
"""The name of a parameter in taming-transformers to its name in a family."""


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


def checkpoint_files(path: Path) -> tuple[Path, ...]:
    """The config and the weight files that `load_vqgan` reads.

    Raises:
      InputError: a file is missing, or which one is meant is not clear.
    """
    if not path.exists():
        raise InputError(f"VQGAN checkpoint {str(path)!r} does not exist; give a checkpoint file or its folder")
    folder = path if path.is_dir() else path.parent
    if path.suffix not in TORCH_SUFFIXES and (folder / "config.json").is_file():
        return (folder / "config.json", *_folder_weights(folder))
    if path.is_file() and path.suffix in YAML_SUFFIXES:
        path = _only(folder, TORCH_SUFFIXES, path.stem)
    elif path.is_dir():
        path = _only(folder, TORCH_SUFFIXES)
    return _only(folder, YAML_SUFFIXES, path.stem), path


def load_vqgan(path: Path, resolution: int | None = None) -> VQGANCheckpoint:
    """The VQGAN of a published checkpoint, its parameters in float32; `path` is its weights, its config or its folder.

    `resolution` (pixels) replaces the config's: the layers stay as they are, and the tokens follow its square. The
    configs of diffusers often name another one than the model was trained at.

    Raises:
      InputError: a file is missing, cut short or something else than its name says; the family or a setting of it is
        not supported; the weights are not those of the config.
    """
    files = checkpoint_files(path)
    if files[0].suffix != ".json":
        checkpoint = _load_taming(*files)
    else:
        kind = _read_json(files[0])
        if kind.values.get("_class_name") == "VQModel":
            checkpoint = _load_diffusers(kind, files[1])
        elif kind.values.get("model_type") in ("chameleon", "chameleon_vqgan"):
            checkpoint = _load_chameleon(kind, files[1:])
        else:
            name = kind.values.get("_class_name") or kind.values.get("model_type")
            raise InputError(f"{files[0]}: {name!r} is no VQGAN that can be loaded; give a VQModel or a Chameleon")
    if resolution is None:
        return checkpoint
    return VQGANCheckpoint(
        at_resolution(checkpoint.config, resolution), checkpoint.params, checkpoint.family, checkpoint.skipped
    )


def _only(folder: Path, suffixes: tuple[str, ...], stem: str | None = None) -> Path:
    """The file with that stem, else with a usual name, else the only one."""
    found = sorted(path for path in folder.iterdir() if path.suffix in suffixes and path.is_file())
    for name in (stem, "model", "config"):
        if named := [path for path in found if path.stem == name]:
            return named[0]
    if len(found) == 1:
        return found[0]
    kinds = " or ".join(suffixes)
    if not found:
        raise InputError(f"{str(folder)!r} has no {kinds} file; a VQGAN checkpoint needs its weights and its config")
    names = ", ".join(path.name for path in found[:3])
    raise InputError(
        f"{str(folder)!r} has {len(found)} {kinds} files ({names}); name the pair alike, such as vqgan.ckpt"
    )


def _folder_weights(folder: Path) -> tuple[Path, ...]:
    for name in (*DIFFUSERS_WEIGHTS, *TRANSFORMERS_WEIGHTS):
        if not (folder / name).is_file():
            continue
        if not name.endswith(".index.json"):
            return (folder / name,)
        weight_map = _read_json(folder / name).get("weight_map", dict)
        shards = sorted({str(file) for key, file in weight_map.items() if _chameleon_prefix([key])})
        if absent := [shard for shard in shards if not (folder / shard).is_file()]:
            raise InputError(f"{folder / name} lists {absent[0]!r}, which is not there; download it too")
        return tuple(folder / shard for shard in shards)
    raise InputError(
        f"{str(folder)!r} has a config.json but none of {', '.join((*DIFFUSERS_WEIGHTS, *TRANSFORMERS_WEIGHTS))}; "
        "download the weights too"
    )


@dataclass(frozen=True)
class _Settings:
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

    def part(self, name: str) -> "_Settings":
        return _Settings(self.file, self.get(name, dict))

    def require(self, **wanted: object) -> None:
        """Refuses another value than the one that the module has; a setting that is not there is as wanted."""
        for name, value in wanted.items():
            if (found := self.values.get(name)) not in (None, value):
                raise InputError(
                    f"{self.file}: {name}={found!r} is not supported, only {value!r}; use another checkpoint"
                )


def _read_json(path: Path) -> _Settings:
    return _Settings(path, read_json(path))


def _read_yaml(path: Path) -> _Settings:
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} is not YAML ({' '.join(str(error).split())[:120]}); download it again") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no settings by name; download it again")
    return _Settings(path, values)


# Families


def _load_taming(config_file: Path, weights_file: Path) -> VQGANCheckpoint:
    """taming-transformers, latent-diffusion, and the checkpoint that Chameleon itself publishes."""
    file = read_torch_file(weights_file)
    weights = file.tensors
    if any(".conv_blocks." in name for name in weights):
        raise InputError(f"weights {str(weights_file)!r} are LlamaGen's VQ, which is not supported; use another VQGAN")
    model = _read_yaml(config_file).part("model")
    if "first_stage_config" in model.part("params").values:  # a whole latent diffusion model
        model = model.part("params").part("first_stage_config")
    weights = _below(weights, "first_stage_model.")
    target = model.get("target", str, "VQModel").split(".")[-1]
    if target not in ("VQModel", "VQModelInterface", "GumbelVQ"):
        raise InputError(f"{config_file}: target {target!r} is not supported; use a VQModel or a GumbelVQ")
    config = _taming_config(model.part("params"), gumbel=target == "GumbelVQ")
    if "quantize.used" in weights:
        raise InputError(f"weights {str(weights_file)!r} have remapped codes (quantize.used); use one without a remap")
    family = "latent-diffusion VQModel" if model.get("target", str, "").startswith("ldm.") else f"taming {target}"
    params = _convert(weights_file, config, weights, lambda name: name)
    return VQGANCheckpoint(config, params, family, file.foreign)


def _taming_config(params: _Settings, gumbel: bool) -> VQGANConfig:
    layers = params.part("ddconfig")
    params.require(remap=None)
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
        quantizer="gumbel" if gumbel else "nearest",
    )


def _load_diffusers(settings: _Settings, weights_file: Path) -> VQGANCheckpoint:
    config = _diffusers_config(settings)
    read = read_safetensors if weights_file.suffix == ".safetensors" else lambda path: read_torch_file(path).tensors
    # the names that attention had before diffusers 0.15
    older = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    weights = {
        re.sub(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{older[m[2]]}.", name): weight
        for name, weight in read(weights_file).items()
    }
    params = _convert(weights_file, config, weights, _diffusers_names(len(config.ch_mult)))
    return VQGANCheckpoint(config, params, "diffusers VQModel")


def _diffusers_config(settings: _Settings) -> VQGANConfig:
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


def _diffusers_names(levels: int) -> Rename:
    """Encoder and decoder levels count in the order in which they are passed, where taming counts by resolution."""
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


def _chameleon_prefix(names: Iterable[str]) -> str:
    """What stands before the VQGAN's names in a whole Chameleon; "" if none of the names has it."""
    prefixes = ("model.vqmodel.", "vqmodel.")
    return next((prefix for name in names for prefix in prefixes if name.startswith(prefix)), "")


def _load_chameleon(settings: _Settings, files: tuple[Path, ...]) -> VQGANCheckpoint:
    whole = settings.values["model_type"] == "chameleon"
    weights: Weights = {}
    for file in files:
        weights |= read_safetensors(file, lambda name: not whole or bool(_chameleon_prefix([name])))
    if not weights:
        raise InputError(f"{str(settings.file.parent)!r} has no weights of the VQGAN (model.vqmodel.*); use another")
    config = _chameleon_config(settings.part("vq_config") if whole else settings)
    weights = _below(weights, _chameleon_prefix(weights))
    decoder = any(name.startswith("decoder.") for name in weights)
    params = _convert(files[0], config, weights, lambda name: name, decoder)
    return VQGANCheckpoint(config, params, "transformers ChameleonVQVAE")


def _chameleon_config(vq: _Settings) -> VQGANConfig:
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


# Weights


def _below(weights: Weights, prefix: str) -> Weights:
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


def _convert(file: Path, config: VQGANConfig, weights: Weights, rename: Rename, decoder: bool = True) -> Params:
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
        if config.quantizer == "gumbel":
            name = name.replace("quantize.embedding.", "quantize.embed.")
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
