"""A peer's weights on disk: safetensors or `torch.save`, in one file or in shards that an index lists.

model.safetensors                                             {name: array}
model.safetensors.index.json    {"weight_map": {name: "model-00001-of-00002.safetensors", ...}}
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from rac3.config import InputError
from rac3.weights.checkpoint_files import mistaken_for, read_json
from rac3.weights.torch_file import read_state_dict

INDEX = ".index.json"
SHARD_BYTES = 5_000_000_000
DISTRIBUTED = "module."  # what torch's DistributedDataParallel puts before every name

Wanted = Callable[[str], bool]


def everything(name: str) -> bool:
    return True


def read_weights(file: Path, wanted: Wanted = everything) -> dict[str, np.ndarray]:
    """The arrays of a safetensors or `torch.save` file, or of all the shards of an index, whose names are wanted.

    Raises:
      InputError: a file is missing, truncated, or does not hold weights.
    """
    if file.name.endswith(INDEX):
        parts = [read_weights(shard, wanted) for shard in shards(file, wanted)]
        return {name: array for part in parts for name, array in part.items()}
    if file.suffix == ".safetensors":
        return read_safetensors(file, wanted)
    weights = read_state_dict(file)
    if all(name.startswith(DISTRIBUTED) for name in weights):
        weights = {name.removeprefix(DISTRIBUTED): array for name, array in weights.items()}
    return {name: array for name, array in weights.items() if wanted(name)}


def shards(index: Path, wanted: Wanted = everything) -> list[Path]:
    """The files that hold weights whose names are wanted; all lie next to the index.

    Raises:
      InputError: the index is damaged, or a file is missing.
    """
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict):
        raise InputError(f"{str(index)!r} has no weight_map; download it again")
    names = sorted({Path(str(file)).name for name, file in files.items() if wanted(name)})
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise InputError(f"{str(index)!r} lists {missing[0]!r}, which is not there; download it too")
    return [index.parent / name for name in names]


def read_safetensors(file: Path, wanted: Wanted = everything) -> dict[str, np.ndarray]:
    """The arrays whose names are wanted; the others are not read.

    Raises:
      InputError: the file is missing, truncated, or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise InputError(f"weights {str(file)!r} do not exist; download that file too")
    with file.open("rb") as opened:
        mistake = mistaken_for(opened.read(256))
    if mistake is not None:
        raise InputError(f"weights {str(file)!r} are {mistake}")
    try:
        with safe_open(file, framework="numpy") as arrays:
            return {name: arrays.get_tensor(name) for name in arrays.keys() if wanted(name)}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"weights {str(file)!r} are truncated or not safetensors ({error}); download the file again"
        ) from error


def write_weights(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], sizes: Mapping[str, int]) -> None:
    """Writes safetensors as Hugging Face does: `model.safetensors`, or shards of at most `SHARD_BYTES` and their index.

    One shard at a time is in memory. A tensor that is larger has its own shard.

    Args:
      sizes: of all tensors in bytes, in their order.
    """
    from safetensors.numpy import save_file

    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    count = len(groups)
    files = [
        f"model-{n:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors" for n in range(1, count + 1)
    ]
    source = iter(tensors)
    for file, names in zip(files, groups, strict=True):
        shard = dict(next(source) for _ in names)
        if list(shard) != names:
            raise ValueError(f"tensors come in another order than their sizes: {list(shard)} instead of {names}")
        save_file(shard, folder / file, metadata={"format": "pt"})
    if count > 1:
        where = {name: file for file, names in zip(files, groups, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (folder / f"model.safetensors{INDEX}").write_text(json.dumps(index, indent=2) + "\n")
