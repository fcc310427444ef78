"""Checkpoints of a training run: written asynchronously by orbax, checked when they are read, restored onto any mesh.

STEP/state     the arrays, in orbax's format
STEP/record    the position of the stream; name, shape and checksum of each array; a checksum of all this
STEP.damaged   one that failed its checks, set aside
"""

import json
import os
import re
import shutil
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from rac3.config import InputError
from rac3.training.checksum import checksums
from rac3.training.state import TrainState

CHECKPOINTS = "checkpoints"  # the subfolder of a run's folder that holds them
StreamPosition = list[int]


class SaveError(OSError):
    """A checkpoint could not be written. The command exits with code 1."""


class DamagedError(Exception):
    """A checkpoint is not what was written: a file is missing, truncated or changed. The message is one line."""


class Checkpoints:
    """The checkpoints in `folder`: each is a training state and the position of the stream of batches.

    Raises:
      SaveError: (of `save`, `check` and `close`) a checkpoint could not be written. Those before it stay, and what was
        written of it is deleted.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True)
        self.folder = folder
        self.manager = ocp.CheckpointManager(folder.absolute(), options=options)
        self.saving = 0  # the step that is being written, or was last

    def save(self, step: int, state: TrainState, position: StreamPosition) -> None:
        """Starts to save. Training continues while the state is written; older checkpoints go once it is."""
        record = _sealed({"position": position, "arrays": _described(state, checksums(state))})
        try:
            self.manager.wait_until_finished()
            self.saving = step
            saves = ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record))
            self.manager.save(step, args=saves, force=True)
        except Exception as error:
            raise self._failed(error) from error

    def check(self) -> None:
        """Looks whether the save in progress, if there is one, has failed. Does not wait."""
        try:
            if not self.manager.is_saving_in_progress():
                self.manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Waits until the last save is complete."""
        try:
            self.manager.wait_until_finished()
            self.manager.close()
        except Exception as error:
            raise self._failed(error) from error

    def restore(self, like: TrainState) -> tuple[TrainState, StreamPosition] | None:
        """The newest checkpoint that is not damaged, or None if there is none at all.

        Damaged ones that are newer are named on standard error and set aside.

        Args:
          like: arrays, or abstract arrays (`jax.ShapeDtypeStruct`), with the shapes and shardings to restore into.

        Raises:
          InputError: the checkpoint is of a model of another shape, or all are damaged.
        """
        damaged: dict[int, str] = {}
        steps = self.steps()
        for step in steps:
            try:
                state, record = self._read(step, like)
            except DamagedError as error:
                damaged[step] = str(error)
                continue
            self._set_aside(damaged, step)
            return state, record["position"]
        if damaged:
            reasons = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
            raise InputError(
                f"all checkpoints in {self.folder} are damaged ({reasons}); put back a copy, or delete the folder to "
                "train from the start"
            )
        return None

    def restore_params(self, like: PyTree, step: int | None = None) -> PyTree:
        """The parameters of a checkpoint, without the rest of the state.

        Args:
          like: as for `restore`, of the parameters.
          step: of the checkpoint; None is the newest.

        Raises:
          InputError: there is no such checkpoint, or it is damaged, or it is of a model of another shape.
        """
        steps = self.steps()
        if not steps:
            raise InputError(f"{self.folder} holds no checkpoint; run `rac3 train` first")
        if step is None:
            step = steps[0]
        elif step not in steps:
            kept = ", ".join(map(str, sorted(steps)))
            raise InputError(f"{self.folder} holds no checkpoint of step {step}, only of {kept}; put back a copy")
        try:
            return self._read(step, {"params": like})[0]["params"]
        except DamagedError as error:
            raise InputError(
                f"checkpoint {self.folder}/{step} is damaged ({error}); put back a copy, or delete "
                f"{self.folder.parent} and train again"
            ) from error

    def steps(self) -> list[int]:
        """All checkpoints, the newest first, as the first process sees them: all processes look at the same ones."""
        steps = sorted(self.manager.all_steps(), reverse=True)
        if jax.process_count() == 1:
            return steps
        count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
        same = multihost_utils.broadcast_one_to_all(np.resize(np.array(steps or [0], np.int32), count))
        return [int(step) for step in same]

    def _read(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """The arrays of `like`, all or some top-level parts of the state, and the record; checked, by all processes.

        Raises:
          DamagedError: on all processes, if one finds damage.
          InputError: the checkpoint is of a model of another shape.
        """
        folder = (self.folder / str(step)).absolute()
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        problem, restored, record = "", None, {}
        try:
            record = _unsealed(ocp.JsonCheckpointHandler().restore(folder / "record"))
        except Exception as error:
            problem = f"its record is unreadable: {_one_line(error)}"
        _agree(problem)
        self._check_shapes(step, record["arrays"], abstract)
        try:
            restored = _read_arrays(folder / "state", abstract)
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise  # no room for it, whatever it is
        except Exception as error:
            problem = f"its arrays are unreadable: {_one_line(error)}"
        _agree(problem)
        for name, (_, found) in _described(restored, checksums(restored)).items():
            if found != record["arrays"][name][1]:
                raise DamagedError(f"{name} does not match its checksum")
        return restored, record

    def _check_shapes(self, step: int, stored: dict[str, Any], wanted: Any) -> None:
        """Compares `wanted` with the part of the checkpoint under the same top-level names."""
        have = {name: tuple(shape) for name, (shape, _) in stored.items()}
        want = {_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(wanted)}
        parts = {name.split("/")[0] for name in want}
        for name in sorted(want.keys() | {name for name in have if name.split("/")[0] in parts}):
            if have.get(name) != want.get(name):
                there, here = have.get(name, "missing"), want.get(name, "missing")
                raise InputError(
                    f"checkpoint {self.folder}/{step} is of another model: {name} is {there} there, {here} in this "
                    "config; use the config it was trained with, or another workdir"
                )

    def _set_aside(self, damaged: dict[int, str], whole: int) -> None:
        """Renames damaged checkpoints, of which `whole` takes the place."""
        for step, reason in damaged.items():
            if jax.process_index() == 0:
                path = self.folder / str(step)
                aside = path.with_name(f"{step}.damaged")
                number = 2
                while aside.exists():
                    aside, number = path.with_name(f"{step}.damaged-{number}"), number + 1
                path.rename(aside)
                print(
                    f"rac3: checkpoint {path} is damaged ({reason}); set aside as {aside.name}, going on from {whole}",
                    file=sys.stderr,
                )
        if damaged:
            _agree("")  # none goes on before the first process has renamed them
            self.manager.reload()

    def _failed(self, error: Exception) -> SaveError:
        """What to raise. The half of a checkpoint that was written goes: a full disk would stay full."""
        deadline = time.monotonic() + 10
        while jax.process_index() == 0 and (halves := list(self.folder.glob(f"{self.saving}.orbax-checkpoint-tmp*"))):
            for path in halves:  # other threads may still write into it
                shutil.rmtree(path, ignore_errors=True)
            if time.monotonic() > deadline:
                break
        kept = sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())
        return SaveError(
            f"the checkpoint of step {self.saving} can't be written to {self.folder}: {_one_line(error)}; once that is "
            f"fixed, run the same command to go on from {f'step {kept[-1]}' if kept else 'the start'}"
        )


def _read_arrays(folder: Path, abstract: Any) -> Any:
    """Each process reads its shards, without waiting for another: one that fails can tell the others."""
    args = ocp.args.PyTreeRestore(
        abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=True
    )
    return ocp.PyTreeCheckpointHandler().restore(folder, args=args)


def _agree(problem: str) -> None:
    """Raises on all processes if one has a problem.

    Raises:
      DamagedError: with this process's problem.
    """
    wrong = bool(problem)
    if jax.process_count() > 1:
        wrong = bool(multihost_utils.process_allgather(np.array(wrong)).any())
    if wrong:
        raise DamagedError(problem or "another process finds it unreadable")


def _described(tree: Any, sums: Sequence[int]) -> dict[str, Any]:
    """Shape and checksum of each array, by name."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(path): [list(leaf.shape), each] for (path, leaf), each in zip(leaves, sums, strict=True)}


def _sealed(record: dict[str, Any]) -> dict[str, Any]:
    return record | {"checksum": _checksum(record)}


def _unsealed(record: dict[str, Any]) -> dict[str, Any]:
    record = dict(record)
    if record.pop("checksum", None) != _checksum(record):
        raise ValueError("it does not match its checksum")
    return record


def _checksum(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _one_line(error: BaseException) -> str:
    """The first cause; what the operating system says, if it is its error. Tensorstore's messages are long paths."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    if code := re.search(r"os_error_code='(\d+)'", text):
        return os.strerror(int(code[1]))
    return text if len(text) < 300 else f"{text[:100]} ... {text[-200:]}"


def _name(path: tuple[Any, ...]) -> str:
    """A leaf's path: nested names, the same for dicts, dataclasses and named tuples."""
    parts = [getattr(k, "key", getattr(k, "name", getattr(k, "idx", None))) for k in path]
    return "/".join(str(part) for part in parts)
