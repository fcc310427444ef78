"""A peer's weights on disk: safetensors or `torch.save`, in one file or in shards that an index lists.

model.safetensors                                             {name: array}
model.safetensors.index.json    {"weight_map": {name: "model-00001-of-00002.safetensors", ...}}
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from rac3.config import InputError, quoted
from rac3.weights.checkpoint_files import mistaken_for, plain_names, read_json
from rac3.weights.torch_file import read_state_dict

INDEX = ".index.json"
SHARD_BYTES = 5_000_000_000
READABLE = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")

Wanted = Callable[[str], bool]
LONGEST = 255  # characters of the name of a file, on all usual systems


def everything(name: str) -> bool:
    return True


def read_weights(file: Path, wanted: Wanted = everything) -> dict[str, np.ndarray]:
    """The arrays of a safetensors or `torch.save` file, or of all the shards of an index, whose names are wanted.

    Names are those of `plain_names`. An index decides which of its files an array comes from: another one may have an
    older copy.

    Raises:
      InputError: a file is missing, truncated, or does not hold weights.
    """
    if not file.name.endswith(INDEX):
        return _read_file(file, wanted)
    places = _weight_map(file)
    weights: dict[str, np.ndarray] = {}
    names = plain_names(places)
    for shard in shards(file, wanted):
        here = {names[name] for name, place in places.items() if place == shard.name and wanted(names[name])}
        found = _read_file(shard, wanted, {name: names[name] for name, place in places.items() if place == shard.name})
        if missing := sorted(here - found.keys()):
            raise InputError(
                f"{str(shard)!r} lacks {quoted(missing[0])}, which {file.name} says it has; download both again"
            )
        weights |= {name: found[name] for name in here}
    return weights


def _read_file(file: Path, wanted: Wanted, names: Mapping[str, str] | None = None) -> dict[str, np.ndarray]:
    """The wanted arrays of one file under their plain names; or those in `names`, under its names."""
    if file.suffix == ".safetensors":
        return read_safetensors(file, wanted, names)
    weights = read_state_dict(file)  # under plain names
    known = weights.keys() if names is None else set(names.values())
    return {name: array for name, array in weights.items() if name in known and wanted(name)}


def shards(index: Path, wanted: Wanted = everything) -> list[Path]:
    """The files that hold weights whose plain names are wanted; all lie next to the index.

    Raises:
      InputError: the index is damaged or leads out of its folder, or a file is missing.
    """
    places = _weight_map(index)
    plain = plain_names(places)
    names = sorted({file for name, file in places.items() if wanted(plain[name])})
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise InputError(f"{str(index)!r} lists {quoted(missing[0])}, which is not there; download it too")
    return [index.parent / name for name in names]


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each weight by its stored name."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict):
        raise InputError(f"{str(index)!r} has no weight_map; download it again")
    for file in files.values():
        if not isinstance(file, str) or file in ("", "..") or Path(file).name != file or len(file) > LONGEST:
            raise InputError(f"{str(index)!r} lists {quoted(file)}, which is no file next to it; download it again")
    return files


def read_safetensors(
    file: Path, wanted: Wanted = everything, names: Mapping[str, str] | None = None
) -> dict[str, np.ndarray]:
    """The arrays whose plain names are wanted, under these names; the others are not read.

    Args:
      names: of the arrays to read, by their stored names; None is `plain_names` of all.

    Raises:
      InputError: the file is missing, truncated, not safetensors, or an array is of a type that NumPy does not have.
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
            stored = list(arrays.keys())
            names = plain_names(stored) if names is None else names
            chosen = [name for name in stored if name in names and wanted(names[name])]
            for name in chosen:
                if (kind := arrays.get_slice(name).get_dtype()) not in READABLE:
                    raise InputError(
                        f"weights {str(file)!r}: {quoted(name)} is of {kind}; give weights that are not quantized"
                    )
            return {names[name]: arrays.get_tensor(name) for name in chosen}
    except (SafetensorError, OSError, ValueError, TypeError, OverflowError, MemoryError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"weights {str(file)!r} are truncated or not safetensors ({' '.join(str(error).split())[:160]}); download "
            "the file again"
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
        (folder / f"model.safetensors{INDEX}").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
