"""The files of published checkpoints: where they are, their JSON, and files that people mistake for weights."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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


def first_file(folder: Path, names: Iterable[str]) -> Path | None:
    """The file of the first of the names that `folder` has."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      InputError: the file cannot be read, is not JSON, or does not hold an object.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:  # undecodable text is a ValueError too
        raise InputError(f"{str(path)!r} is not JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{str(path)!r} is not a JSON object; download it again")
    return content


def mistaken_for(head: bytes) -> str | None:
    """What a file that begins with `head` is instead of weights, and what to do; None if it may be weights."""
    if not head:
        return "an empty file; download it again"
    if head.lstrip().startswith(b"<"):
        return "a web page, not weights; download the file that the page links to"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not weights; fetch the file with `git lfs pull`"
    return None


BLOCKS, BLOCK_BYTES = 64, 4096  # of a file, which tell its content from another


def content_identity(files: Iterable[Path]) -> dict[str, list[Any]]:
    """The size of each file, and a hash of blocks all over it: training changes every weight, but no size.

    Raises:
      InputError: a file cannot be read.
    """
    found: dict[str, list[Any]] = {}
    for path in files:
        digest = hashlib.sha256()
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                for block in range(BLOCKS):
                    file.seek(max(0, size - BLOCK_BYTES) * block // (BLOCKS - 1))
                    digest.update(file.read(BLOCK_BYTES))
        except OSError as error:
            raise InputError(f"{str(path)!r} cannot be read ({error}); make it readable") from error
        found[path.name] = [size, digest.hexdigest()[:16]]
    return found
