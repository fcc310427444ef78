"""The files of a published VQGAN: which belong together, and what is missing.

    torch.save             vqgan.ckpt and vqgan.yaml, or the only ones in their folder; LlamaGen's vq_ds16_c2i.pt alone
    a library's folder     config.json and the weights, whole or in shards

No weights are read here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rac3.config import InputError
from rac3.weights.checkpoint_files import first_file
from rac3.weights.torch_file import NESTED, TorchFile, read_torch_file
from rac3.weights.weights_file import INDEX, shards

TORCH_SUFFIXES = (".ckpt", ".pt", ".pth")
YAML_SUFFIXES = (".yaml", ".yml")
AVERAGED = "ema"  # LlamaGen's scripts draw with these weights, where its training files have them
ENTRIES = (AVERAGED, *NESTED)


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of a checkpoint.

    Attributes:
      kind: `_class_name` or `model_type` in the config.json of a library's folder; None for a `torch.save` file.
      configs: one; of a `torch.save` file there may be none (LlamaGen has none), or several if it is not clear which
        one belongs to it.
      weights: one file, or the shards that hold weights of the VQGAN.
      index: says which shard has which weight; None for one file.
    """

    kind: str | None
    configs: tuple[Path, ...]
    weights: tuple[Path, ...]
    index: Path | None = None

    @cached_property
    def torch_file(self) -> TorchFile:
        """The `torch.save` file, read once; of a training file with averaged weights, these.

        Raises:
          InputError: it is damaged, or no such file.
        """
        return read_torch_file(self.weights[0], ENTRIES)


def torch_files(path: Path) -> CheckpointFiles:
    """Those of a `torch.save` file, of its yaml, or in a folder.

    Raises:
      InputError: there are no weights, or it is not clear which ones are meant.
    """
    folder = path if path.is_dir() else path.parent
    if path.is_file() and path.suffix in YAML_SUFFIXES:
        return CheckpointFiles(None, (path,), (_torch_weights(folder, path.stem),))
    if path.is_dir():
        path = _torch_weights(folder)
    return CheckpointFiles(None, tuple(_candidates(folder, YAML_SUFFIXES, path.stem)), (path,))


def folder_files(folder: Path, kind: str, names: Sequence[str], prefixes: tuple[str, ...]) -> CheckpointFiles:
    """Those in a library's folder: the first of the weights' `names` that is there.

    Of an index, the shards with weights whose names begin with one of the `prefixes`.

    Raises:
      InputError: weights are missing.
    """
    file = first_file(folder, names)
    if file is None:
        raise InputError(f"{str(folder)!r} has a config.json but none of {', '.join(names)}; download the weights too")
    index = file if file.name.endswith(INDEX) else None
    weights = shards(file, lambda name: name.startswith(prefixes)) if index else [file]
    return CheckpointFiles(kind, (folder / "config.json",), tuple(weights), index)


def only(found: Sequence[Path]) -> Path:
    """The one file.

    Raises:
      InputError: there are several, and it is not clear which one is meant.
    """
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:3])
        raise InputError(
            f"{str(found[0].parent)!r} has {len(found)} {found[0].suffix} files ({names}), and which one is meant is "
            "not clear; give weights and config the same name, such as vqgan.ckpt and vqgan.yaml"
        )
    return found[0]


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
            "with their yaml, or a folder that diffusers or transformers wrote"
        )
    return only(found)
