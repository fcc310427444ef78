"""The files of a published VQGAN: which belong together, what is missing, and whether they can draw.

    torch         vqgan.ckpt and vqgan.yaml, or the only ones in their folder; LlamaGen's vq_ds16_c2i.pt alone
    diffusers     config.json, diffusion_pytorch_model.safetensors or .bin
    transformers  config.json, model.safetensors, whole or in shards

No weights are read here, but for one vector that tells whether there is a decoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rac3.config import InputError
from rac3.vqgan.weights import chameleon_prefix
from rac3.weights.checkpoint_files import read_json, read_safetensors

TORCH_SUFFIXES = (".ckpt", ".pt", ".pth")
YAML_SUFFIXES = (".yaml", ".yml")
DIFFUSERS_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
TRANSFORMERS_WEIGHTS = ("model.safetensors.index.json", "model.safetensors")


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of a checkpoint.

    Attributes:
      kind: how they are laid out: a torch.save file, or the folder of a library.
      configs: one; of a torch.save file there may be none (LlamaGen has none), or several if it is not clear which one
        belongs to it.
      weights: one file, or the shards that hold weights of the VQGAN.
    """

    kind: Literal["torch", "diffusers", "transformers"]
    configs: tuple[Path, ...]
    weights: tuple[Path, ...]


def checkpoint_files(path: Path) -> CheckpointFiles:
    """The files that `load_vqgan` reads; no weights are read.

    Raises:
      InputError: a file is missing, or which one is meant is not clear, or it is no VQGAN's folder.
    """
    if not path.exists():
        raise InputError(f"VQGAN checkpoint {str(path)!r} does not exist; give a checkpoint file or its folder")
    folder = path if path.is_dir() else path.parent
    if path.suffix not in TORCH_SUFFIXES and (folder / "config.json").is_file():
        return _folder_files(folder)
    if path.is_file() and path.suffix in YAML_SUFFIXES:
        return CheckpointFiles("torch", (path,), (_torch_weights(folder, path.stem),))
    if path.is_dir():
        path = _torch_weights(folder)
    return CheckpointFiles("torch", tuple(_candidates(folder, YAML_SUFFIXES, path.stem)), (path,))


def require_decoder(path: Path) -> None:
    """Refuses a checkpoint that only encodes, before anything is read or trained for it.

    Raises:
      InputError: it has no decoder, or its files are not there.
    """
    files = checkpoint_files(path)
    if files.kind != "transformers":
        return
    if not any(read_safetensors(file, lambda name: name.endswith("decoder.conv_out.bias")) for file in files.weights):
        raise InputError(
            f"VQGAN checkpoint {str(path)!r} has no decoder, so that a model trained on its codes could never draw; "
            "set vqgan.checkpoint to one that has, such as Chameleon's own vqgan.ckpt"
        )


def _candidates(folder: Path, suffixes: tuple[str, ...], stem: str | None) -> list[Path]:
    """The file with that stem, else with a usual name, else all."""
    found = sorted(path for path in folder.iterdir() if path.suffix in suffixes and path.is_file())
    for name in (stem, "model", "config"):
        if named := [path for path in found if path.stem == name]:
            return named[:1]
    return found


def _torch_weights(folder: Path, stem: str | None = None) -> Path:
    found = _candidates(folder, TORCH_SUFFIXES, stem)
    if not found:
        raise InputError(
            f"{str(folder)!r} has no {' or '.join(TORCH_SUFFIXES)} file and no config.json; give a VQGAN's weights "
            "with their yaml, or a folder of diffusers or transformers"
        )
    return only(found)


def only(found: Sequence[Path]) -> Path:
    """The one file that is there, where which one is meant must be clear."""
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:3])
        raise InputError(
            f"{str(found[0].parent)!r} has {len(found)} {found[0].suffix} files ({names}), and which one is meant is "
            "not clear; name weights and config alike, such as vqgan.ckpt and vqgan.yaml"
        )
    return found[0]


def _folder_files(folder: Path) -> CheckpointFiles:
    config = folder / "config.json"
    settings = read_json(config)
    kind = settings.get("_class_name") or settings.get("model_type")
    if kind not in ("VQModel", "chameleon", "chameleon_vqgan"):
        raise InputError(f"{config}: {kind!r} is no VQGAN that can be loaded; give a VQModel or a Chameleon")
    names = DIFFUSERS_WEIGHTS if kind == "VQModel" else TRANSFORMERS_WEIGHTS
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        raise InputError(f"{str(folder)!r} has a config.json but none of {', '.join(names)}; download the weights too")
    if kind == "VQModel":
        return CheckpointFiles("diffusers", (config,), (file,))
    if file.suffix == ".safetensors":
        return CheckpointFiles("transformers", (config,), (file,))
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{str(file)!r} has no weight_map; download it again")
    shards = sorted({str(shard) for name, shard in weight_map.items() if chameleon_prefix([name])})
    if absent := [shard for shard in shards if not (folder / shard).is_file()]:
        raise InputError(f"{file} lists {absent[0]!r}, which is not there; download it too")
    return CheckpointFiles("transformers", (config,), tuple(folder / shard for shard in shards))
