"""The files of published checkpoints: where they are, what they hold, and what is mistaken for them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rac3.config import InputError


def checkpoint_folder(what: str, source: str) -> Path | None:
    """The folder that `source` names, or None if it is a name on the Hugging Face hub, `owner/name` or `name`.

    Raises:
      InputError: it is a path, but not of a folder. The message calls the source `what`.
    """
    if Path(source).is_dir():
        return Path(source)
    if Path(source).is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise InputError(f"{what} {source!r} is not a folder; give one, or a name on the Hugging Face hub")
    return None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      InputError: the file cannot be read, is not JSON, or holds something else than an object.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:  # undecodable text is a ValueError too
        raise InputError(f"{str(path)!r} is not JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{str(path)!r} is not a JSON object; download it again")
    return content


def read_safetensors(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, np.ndarray]:
    """The arrays whose names are wanted; the others are not read.

    Raises:
      InputError: the file is missing, cut short, or something else.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputError(f"weights {str(path)!r} do not exist; download that file too")
    with path.open("rb") as file:
        mistake = mistaken_for(file.read(256))
    if mistake is not None:
        raise InputError(f"weights {str(path)!r} are {mistake}")
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"weights {str(path)!r} are cut short or not safetensors ({error}); download the file again"
        ) from error


def mistaken_for(head: bytes) -> str | None:
    """What a file that begins so is in place of weights, and what to do about it; None if it may be weights."""
    if not head:
        return "an empty file; download it again"
    if head.lstrip().startswith(b"<"):
        return "a web page, not weights; download the file that the page links to"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not weights; fetch the file with `git lfs pull`"
    return None
