"""Artifact directories: what a stage wrote, for which config, from which inputs.

    WORKDIR/<stage>/<fingerprint>/manifest.json + files       complete
    WORKDIR/<stage>/<fingerprint>.partial/ + files            being written, or killed: the stage resumes here

A directory gets its final name only when it is complete, so one that has it can be trusted.
"""

import contextlib
import fcntl
import json
import os
import platform
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from rac3.artifacts.recipe import Recipe
from rac3.config import InputError, canonical

MANIFEST = "manifest.json"
OWNER = "workdir.json"
TEMPORARY = ".tmp"
VISIBLE = 60.0  # seconds: as long as NFS clients believe what they have read of a folder
PACKAGES = ("rac3", "jax", "flax", "numpy", "tensorstore", "array-record", "scann")


@dataclass(frozen=True)
class Artifact:
    """A complete artifact."""

    folder: Path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))

    @property
    def fingerprint(self) -> str:
        return self.folder.name


@dataclass
class Draft:
    """An artifact that is being written: put files into `folder`, and counts into `counts`."""

    folder: Path
    counts: dict[str, Any] = field(default_factory=dict)


class Workdir:
    """The artifacts of one config (and its variations on the command line).

    Args:
      owner: the name of the config.
      arguments: what follows `rac3 STAGE` in a command of this config, for messages that name a command.

    Raises:
      InputError: the folder belongs to another config, or is a file.
    """

    def __init__(self, path: Path, owner: str, arguments: str = "") -> None:
        self.path = path
        if path.exists() and not path.is_dir():
            raise InputError(f"workdir {path} is a file; give a folder")
        record = path / OWNER
        if record.is_file():
            other = json.loads(record.read_text(encoding="utf-8")).get("config")
            if other != owner:
                raise InputError(f"workdir {path} was made by config {other!r}, not {owner!r}; give another --workdir")
        elif path.is_dir() and any(path.iterdir()):
            raise InputError(f"workdir {path} holds files that rac3 did not write; give an empty or new --workdir")
        self.arguments = arguments
        self._owner = owner
        self._writing: list[Recipe] = []

    def find(self, recipe: Recipe) -> Artifact | None:
        """The artifact of a recipe, if it is complete."""
        artifact = Artifact(self._final(recipe))
        return artifact if (artifact.folder / MANIFEST).is_file() else None

    def require(self, recipe: Recipe, command: str) -> Artifact:
        """The artifact of a recipe.

        Raises:
          InputError: there is none; the message has the command that makes it.
          RuntimeError: it is read while another artifact is being written, whose recipe does not name it as an input.
        """
        if self._writing and not any(recipe.fingerprint in writing.reads for writing in self._writing):
            written = " and ".join(sorted({writing.stage for writing in self._writing}))
            raise RuntimeError(
                f"{recipe.stage} is read while writing {written}, whose recipe does not name it as an input: when "
                f"{recipe.stage} changes, {written} would still pass for current; add the input in rac3.recipes"
            )
        artifact = self.find(recipe)
        if artifact is None:
            stage = self.path / recipe.stage
            others = [path for path in stage.glob("*") if (path / MANIFEST).is_file()] if stage.is_dir() else []
            state = "is stale (made with other settings)" if others else "is missing"
            whole = " ".join(part for part in (command, self.arguments) if part)
            raise InputError(f"{recipe.stage} {state} in {self.path}; run `{whole}`")
        return artifact

    @contextlib.contextmanager
    def write(self, recipe: Recipe) -> Iterator[Draft]:
        """A draft to fill; it becomes the artifact when the block ends without an error.

        After an error or a kill the draft stays, and the next `write` of the recipe gets it back to go on.

        Raises:
          InputError: another process writes this artifact now, or has just completed it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path / OWNER, json.dumps({"config": self._owner}) + "\n")
        final, partial = self._final(recipe), self._partial(recipe)
        final.parent.mkdir(exist_ok=True)
        started = time.monotonic()
        with _locked(final.with_name(final.name + ".lock"), final):
            if final.exists():
                raise InputError(f"{final} was completed by another process meanwhile; run the command again to use it")
            partial.mkdir(exist_ok=True)
            draft = Draft(partial)
            with self._noted(recipe):
                yield draft
            manifest = {
                "stage": recipe.stage,
                "fingerprint": recipe.fingerprint,
                "config": canonical(recipe.config),
                "inputs": recipe.input_fingerprints,
                "counts": draft.counts,
                "versions": {"python": platform.python_version(), **_versions()},
                "seconds": round(time.monotonic() - started, 2),
            }
            write_atomic(partial / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
            partial.rename(final)

    @contextlib.contextmanager
    def join(self, recipe: Recipe) -> Iterator[Draft]:
        """The draft that another process of this run has from `write`, to fill its folder together.

        Only that process completes the artifact, with its own counts.

        Raises:
          InputError: this process can't see the folder.
        """
        partial = self._partial(recipe)
        if not _appears(partial):
            raise InputError(
                f"{partial}, which another process has made, can't be seen on {platform.node()}; give a --workdir that "
                "all hosts share"
            )
        with self._noted(recipe):
            yield Draft(partial)

    def _final(self, recipe: Recipe) -> Path:
        return self.path / recipe.stage / recipe.fingerprint

    def _partial(self, recipe: Recipe) -> Path:
        final = self._final(recipe)
        return final.with_name(final.name + ".partial")

    @contextlib.contextmanager
    def _noted(self, recipe: Recipe) -> Iterator[None]:
        """While it is written, only its inputs may be read."""
        self._writing.append(recipe)
        try:
            yield
        finally:
            self._writing.remove(recipe)


def write_atomic(path: Path, content: str | bytes) -> None:
    """The file appears whole or not at all, also when the machine fails."""
    temporary = temporary_path(path)
    with temporary.open("wb") as file:
        file.write(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def temporary_path(path: Path) -> Path:
    """A unique name next to `path`, to write to and then rename."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}{TEMPORARY}")


@contextlib.contextmanager
def _locked(path: Path, artifact: Path) -> Iterator[None]:
    """Holds an advisory lock; the kernel drops it when the process dies, however it dies."""
    with path.open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"{artifact} is being written by another process; wait for it, or use another --workdir"
            ) from None
        yield
        path.unlink()


def _appears(folder: Path) -> bool:
    """Whether it is there, or comes soon: a network file system may remember for a while that it was not."""
    until = time.monotonic() + VISIBLE
    while not folder.is_dir() and time.monotonic() < until:
        time.sleep(0.1)
    return folder.is_dir()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
