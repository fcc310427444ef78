"""Artifact directories: what a stage wrote, for which config, from which inputs.

    WORKDIR/<stage>/<fingerprint>/manifest.json + files       complete
    WORKDIR/<stage>/<fingerprint>.partial/ + files            being written, or killed: the stage resumes here

A directory gets its final name only when it is complete. Whoever asks for an artifact gets it with its files checked:
none is missing, truncated or changed (`files.py`), and its inputs are those that it was made from.
"""

import contextlib
import fcntl
import json
import os
import platform
import shlex
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

from rac3.artifacts.files import MANIFEST, TEMPORARY, content, damage, damaged, describe, refused, sealed, unsealed
from rac3.artifacts.recipe import COMMANDS, WHOLE, Recipe
from rac3.config import InputError, canonical

OWNER = "workdir.json"
PARTIAL = ".partial"
FOREIGN = ("lost+found", "System Volume Information")  # folders that file systems make
VISIBLE = 60.0  # seconds: as long as NFS clients believe what they have read of a folder
PACKAGES = ("rac3", "jax", "flax", "numpy", "tensorstore", "array-record", "scann")


@dataclass(frozen=True)
class Artifact:
    """A complete artifact, and the command that made it, if its manifest does not say."""

    folder: Path
    command: str = ""

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Raises InputError: it is missing, or not as it was written."""
        path = self.folder / MANIFEST
        try:
            manifest = unsealed(path)
        except FileNotFoundError as error:
            raise damaged(path, "is missing", self.command) from error
        except ValueError as error:
            raise damaged(path, f"is damaged: {error}", self.command) from error
        if manifest.get("fingerprint") != self.fingerprint:
            raise damaged(path, "is that of another artifact", self.command)
        return manifest

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
      needs_model: the command at hand needs a trained model; where there is none, messages name what makes all.

    Raises:
      InputError: the folder belongs to another config, or is a file.
    """

    def __init__(self, path: Path, owner: str, arguments: str = "", needs_model: bool = False) -> None:
        self.path = path
        if path.exists() and not path.is_dir():
            raise InputError(f"workdir {path} is a file; give a folder")
        if (path / OWNER).is_file():
            self._check_owner(path / OWNER, owner)
        elif path.is_dir() and (others := [each.name for each in path.iterdir() if not _is_of_the_system(each)]):
            raise InputError(
                f"workdir {path} holds files that rac3 did not write, such as {min(others)}; give an empty or new "
                "--workdir"
            )
        self.arguments, self._needs_model = arguments, needs_model
        self._owner = owner
        self._writing: list[Recipe] = []
        self._checked: dict[Path, str] = {}  # artifacts that are as they were written, and what makes each
        self._older = False  # whether an artifact without a record of its files was seen

    def _check_owner(self, record: Path, owner: str) -> None:
        try:
            other = unsealed(record).get("config")
        except ValueError as error:
            own = shlex.quote(json.dumps({"config": owner}))
            raise InputError(
                f"{record} is damaged: {error}; if this is the workdir of the config {owner!r}, run "
                f"`echo {own} > {shlex.quote(str(record))}`"
            ) from error
        if other != owner:
            raise InputError(f"workdir {self.path} was made by config {other!r}, not {owner!r}; give another --workdir")

    def find(self, recipe: Recipe) -> Artifact | None:
        """The artifact of a recipe, or None if it is not made yet.

        Raises:
          InputError: it is damaged, or was made from other inputs than the workdir now has under their names.
        """
        folder = self._final(recipe)
        if not folder.is_dir():
            return None
        if folder not in self._checked:
            command = self._command(recipe)
            self._check(recipe, Artifact(folder, command))
            self._checked[folder] = command
        return Artifact(folder, self._checked[folder])

    def _check(self, recipe: Recipe, artifact: Artifact) -> None:
        files = artifact.manifest.get("files")
        if files is None and not self._older:
            self._older = True
            print(
                f"rac3: {artifact.folder} is from a version of rac3 that kept no record of its files; they, and others "
                "like them, are used as they are",
                file=sys.stderr,
            )
        for path, what in damage(artifact.folder, files or {}):
            raise damaged(path, what)
        self._check_origin(recipe, set())

    def _check_origin(self, recipe: Recipe, seen: set[str]) -> None:
        """An input that was made again, after its folder was deleted, may be another: encoders are fitted, say."""
        seen.add(recipe.fingerprint)
        artifact, contents = Artifact(self._final(recipe)), self._contents(recipe)
        for name, recorded in artifact.manifest.get("contents", {}).items():
            if contents.get(name, recorded) != recorded:
                other = self._final(recipe.inputs[name])
                raise damaged(artifact.folder, f"was made from another {other}, which has been made again since")
        for each in recipe.inputs.values():
            if each.fingerprint not in seen and (self._final(each) / MANIFEST).is_file():
                self._check_origin(each, seen)

    def require(self, recipe: Recipe) -> Artifact:
        """The artifact of a recipe.

        Raises:
          InputError: there is none; the message has the command that makes it. Or as `find`.
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
            state = "is stale (made with other settings, or from other data)" if others else "is missing"
            raise InputError(f"{recipe.stage} {state} in {self.path}; run `{self._command(recipe)}`")
        return artifact

    def artifacts(self) -> list[Artifact]:
        """All artifacts of the workdir, of other settings too, in the order in which they are made."""
        folders = [sorted((self.path / stage).glob("*")) for stage in COMMANDS]
        return [Artifact(each) for each in chain(*folders) if each.is_dir() and each.suffix != PARTIAL]

    def _command(self, recipe: Recipe) -> str:
        """What makes the artifact of a recipe, with what it is made from if that is missing too."""
        command = COMMANDS[recipe.stage]
        if recipe.stage in ("train", "evaluation"):
            whole = not all(self._final(each).is_dir() for each in recipe.inputs.values())
        else:
            whole = self._needs_model and not any((self.path / "train").glob("*/"))
        command = WHOLE if whole else command
        return " ".join(part for part in (command, self.arguments) if part)

    @contextlib.contextmanager
    def write(self, recipe: Recipe) -> Iterator[Draft]:
        """A draft to fill; it becomes the artifact when the block ends without an error.

        After an error or a kill the draft stays, and the next `write` of the recipe gets it back to go on.

        Raises:
          InputError: another process writes this artifact now, or has just completed it; or what is there is damaged.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path / OWNER, sealed({"config": self._owner}))
        final, partial = self._final(recipe), self._partial(recipe)
        final.parent.mkdir(exist_ok=True)
        started, since = time.time(), time.monotonic()
        with _locked(final.with_name(final.name + ".lock"), final):
            if final.exists():
                self.find(recipe)  # raises if it is damaged
                raise InputError(f"{final} was completed by another process meanwhile; run the command again to use it")
            partial.mkdir(exist_ok=True)
            draft = Draft(partial)
            with self._noted(recipe), refused(partial):
                yield draft
            manifest = {
                "stage": recipe.stage,
                "fingerprint": recipe.fingerprint,
                "config": canonical(recipe.config),
                "inputs": recipe.input_fingerprints,
                "contents": self._contents(recipe),
                "counts": draft.counts,
                "versions": {"python": platform.python_version(), **_versions()},
                "started": round(started, 2),
                "seconds": round(time.monotonic() - since, 2),
                "command": self._command(recipe),
                "files": describe(partial),
            }
            write_atomic(partial / MANIFEST, sealed(manifest))
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
        return final.with_name(final.name + PARTIAL)

    def _contents(self, recipe: Recipe) -> dict[str, str]:
        """What the inputs hold now, as far as they are there and have a record of their files."""
        inputs = {name: Artifact(self._final(each)) for name, each in recipe.inputs.items()}
        found = {name: each.manifest for name, each in inputs.items() if (each.folder / MANIFEST).is_file()}
        return {name: content(manifest["files"]) for name, manifest in found.items() if "files" in manifest}

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
    try:
        with refused(path), temporary.open("wb") as file:
            file.write(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # it takes room on a disk that may be full
        raise


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


def _is_of_the_system(path: Path) -> bool:
    """Left by a file system, a file browser, or a first write of ours that was killed."""
    return path.name in FOREIGN or path.name.startswith((".", f"{OWNER}."))


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
