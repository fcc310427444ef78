"""The files of an artifact: what its manifest says of each, and the error about one that is not as it was written.

    "files": {"config.json": [630, "9f86d081..."], "document/c/0/0": [395268, null]}      bytes, SHA-256

A file has no SHA-256 if its format has checksums, which whoever reads it compares: arrays, documents and their ids.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rac3.artifacts.recipe import COMMANDS
from rac3.config import InputError, fingerprint

MANIFEST = "manifest.json"
TEMPORARY = ".tmp"
ARRAY = "zarr.json"  # in the folder of an array, next to its chunks
CHECKED_BY_READERS = (".array_record", ".u2", ".u4")  # as are the chunks of arrays
READ_LATER = ("checkpoints", "tensorboard")  # subfolders: of files that have other checks, or that nothing reads
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # what a full or read-only disk answers
LOGS = ("metrics.jsonl", "tensorboard")  # with times of the clock: they differ however equal the rest is
LARGE = 2**33  # bytes: to hash more takes ten seconds and up, each time that an artifact is opened
THREADS = 8  # that wait for a network file system; hashing takes a core each

Files = Mapping[str, Sequence[Any]]


def sealed(record: Mapping[str, Any]) -> str:
    """JSON of a record with its checksum."""
    return json.dumps({**record, "checksum": fingerprint(record)}, indent=2, ensure_ascii=False) + "\n"


def unsealed(path: Path) -> dict[str, Any]:
    """The record in a JSON file. Its checksum is compared if it has one: older ones have none.

    Raises:
      ValueError: it is damaged; the message is one line. A missing file is an OSError.
    """
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())[:120]) from error
    if not isinstance(record, dict):
        raise ValueError("it is no JSON object")
    if "checksum" in record and record.pop("checksum") != fingerprint(record):
        raise ValueError("it does not match its checksum")
    return record


def describe(folder: Path) -> dict[str, list[Any]]:
    """Size and checksum of each file below `folder`, by its path there."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    names = [path.relative_to(folder).as_posix() for path in paths if path.suffix != TEMPORARY]
    chunks = tuple(name.removesuffix(ARRAY) + "c/" for name in names if Path(name).name == ARRAY)

    def of(name: str) -> list[Any]:
        own = name.endswith(CHECKED_BY_READERS) or name.startswith(chunks)
        return [(folder / name).stat().st_size, None if own else _sha256(folder / name)]

    with ThreadPoolExecutor(THREADS) as threads:
        return dict(zip(names, threads.map(of, names), strict=True))


def damage(folder: Path, files: Files, everything: bool = False) -> Iterator[tuple[Path, str]]:
    """Each file below `folder` that is not as `files` has it, and what is wrong with it.

    Args:
      everything: also look at files that are checked when they are read, or that are read by nobody, and hash those of
        more than `LARGE` bytes, of which else only the size is compared.
    """

    def problem(name: str) -> str:
        path, (size, digest) = folder / name, files[name]
        if not path.is_file():
            return "is missing"
        found = path.stat().st_size
        if found != size:
            return f"is damaged: it has {found:,} bytes, not {size:,}"
        hashed = digest and (everything or size <= LARGE)
        return "is damaged: its SHA-256 is another" if hashed and _sha256(path) != digest else ""

    names = [name for name in files if everything or name.split("/")[0] not in READ_LATER]
    with ThreadPoolExecutor(THREADS) as threads:
        for name, what in zip(names, threads.map(problem, names), strict=True):
            if what:
                yield folder / name, what


def content(files: Files) -> str:
    """A digest of what an artifact holds: two that differ in their logs alone have the same."""
    kept = {name: entry for name, entry in files.items() if name.split("/")[0] not in LOGS}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def damaged(path: Path, what: str, command: str = "") -> InputError:
    """The error about a file of an artifact: its name, what is wrong, and the command that makes it again.

    Args:
      command: what makes it, if not what its manifest says.
    """
    folder = next((each for each in (path, *path.parents) if _is_artifact(each)), None)
    if folder is None:
        return InputError(f"{path} {what}; put back a copy of it")
    command = command or _made_by(folder)
    return InputError(f"{path} {what}; put back a copy, or run `rm -r {shlex.quote(str(folder))} && {command}`")


def refusal(error: BaseException, folder: Path) -> OSError | None:
    """What the operating system refused, if that caused the error: libraries have their own types for it.

    Args:
      folder: that was written to. If no byte is left on its disk, that is taken for the reason of a `RuntimeError`.
    """
    if isinstance(error, OSError):
        return error
    text = str(error)
    if found := re.search(r"os_error_code='(\d+)'|\(os error (\d+)\)", text):
        number = int(found[1] or found[2])
    else:
        number = next((each for each in UNWRITABLE if os.strerror(each) in text), 0)
    if not number and isinstance(error, RuntimeError) and shutil.disk_usage(folder).free < 4096:
        number = errno.ENOSPC
    return OSError(number, os.strerror(number), str(folder)) if number else None


@contextlib.contextmanager
def refused(folder: Path) -> Iterator[None]:
    """Lets what the operating system refuses be an `OSError`, whatever a library makes of it."""
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        if error.filename is None and error.errno is not None:  # NumPy does not say where
            raise OSError(error.errno, os.strerror(error.errno), str(folder)) from error
        raise
    except Exception as error:
        if (system := refusal(error, folder)) is not None:
            raise system from error
        raise


def _made_by(folder: Path) -> str:
    """The command that made an artifact, for the workdir that now holds it, which may be a copy."""
    try:
        words = shlex.split(unsealed(folder / MANIFEST)["command"])
    except (OSError, ValueError, KeyError):  # the manifest may be what is damaged
        return COMMANDS[folder.parent.name]
    for number, word in enumerate(words):
        if word == "--workdir" and number + 1 < len(words):
            words[number + 1] = str(folder.parents[1])
        elif word.startswith("--workdir="):
            words[number] = f"--workdir={folder.parents[1]}"
    return shlex.join(words)


def _is_artifact(folder: Path) -> bool:
    return folder.parent.name in COMMANDS and re.fullmatch(r"[0-9a-f]{12}(\.partial)?", folder.name) is not None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
