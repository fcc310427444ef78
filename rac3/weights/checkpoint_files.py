"""The files of published checkpoints: where they are, their JSON, and files that people mistake for weights."""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from rac3.config import InputError

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
DISTRIBUTED, COMPILED = "module.", "_orig_mod."  # of DistributedDataParallel before a name, of torch.compile inside it


def checkpoint_folder(what: str, source: str) -> Path | None:
    """The folder that `source` names, or None if it is a name on the Hugging Face hub, `owner/name` or `name`.

    A relative path into a folder that is there is a path.

    Raises:
      InputError: it is a path, but not of a folder. The message calls the source `what`.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists() or not HUB_NAME.fullmatch(source):
        raise InputError(f"{what} {source[:200]!r} is not a folder; give one, or a name on the Hugging Face hub")
    if "/" in source and path.parent.is_dir():
        raise InputError(
            f"{what} {source!r} is not a folder, though {str(path.parent)!r} is one; give a folder, or run rac3 from "
            "another place if you mean the name on the Hugging Face hub"
        )
    return None


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """What a damaged or hostile file may raise, wherever its values are used, as one line about `what`."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, MemoryError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise InputError(f"{what} can't be loaded ({reason}); its files are damaged, or of several models") from error


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Each name without what torch's wrappers put into all of them.

    module._orig_mod.encoder.conv_in.weight -> encoder.conv_in.weight
    """
    stored = list(names)
    plain = [name.replace(COMPILED, "") for name in stored]
    while plain and all(name.startswith(DISTRIBUTED) for name in plain):
        plain = [name.removeprefix(DISTRIBUTED) for name in plain]
    return dict(zip(stored, plain if len(set(plain)) == len(plain) else stored, strict=True))


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
    except (OSError, ValueError, RecursionError) as error:  # undecodable text is a ValueError too
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{str(path)!r} is not JSON ({reason}); download it again") from error
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


WHOLE = 2**22  # bytes of a file that is hashed whole
BLOCKS, BLOCK_BYTES = 64, 4096  # of a larger one, which tell its content from another


def content_identity(files: Iterable[Path]) -> dict[str, list[Any]]:
    """By name, the size of each file and a hash of its content; the names differ.

    Of large files, blocks all over are hashed: training changes every weight, but no size.

    Raises:
      InputError: a file cannot be read.
    """
    found: dict[str, list[Any]] = {}
    for path in files:
        try:
            status = path.stat()
            found[path.name] = [status.st_size, _digest(path.resolve(), status.st_size, status.st_mtime_ns)]
        except OSError as error:
            raise InputError(f"{str(path)!r} cannot be read ({error}); make it readable") from error
    return found


@cache
def _digest(path: Path, size: int, mtime: int) -> str:
    """Of a file that was changed last at `mtime`."""
    with path.open("rb") as file:
        if size <= WHOLE:
            return hashlib.sha256(file.read()).hexdigest()[:16]
        digest = hashlib.sha256()
        for block in range(BLOCKS):
            file.seek((size - BLOCK_BYTES) * block // (BLOCKS - 1))
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()[:16]
