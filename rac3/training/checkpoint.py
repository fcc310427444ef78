"""Checkpoints of a training run: written asynchronously by orbax, restored onto any mesh."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from rac3.config import InputError
from rac3.training.state import TrainState

CHECKPOINTS = "checkpoints"  # the subfolder of a run's folder that holds them
StreamPosition = list[int]


class Checkpoints:
    """The checkpoints in `folder`: each is a training state and the position of the stream of batches."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True)
        self.folder = folder
        self.manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, step: int, state: TrainState, position: StreamPosition) -> None:
        """Starts to save. Training continues while the state is written."""
        self.manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), stream=ocp.args.JsonSave({"position": position})
            ),
        )

    def restore(self, like: TrainState) -> tuple[TrainState, StreamPosition] | None:
        """The newest checkpoint, or None if there is none.

        Args:
          like: arrays, or abstract arrays (`jax.ShapeDtypeStruct`), with the shapes and shardings to restore into.

        Raises:
          InputError: the checkpoint is of a model of another shape.
        """
        step = self.manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        self._check_shapes(step, abstract)
        restored = self.manager.restore(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), stream=ocp.args.JsonRestore()),
        )
        return restored["state"], restored["stream"]["position"]

    def restore_params(self, like: Any) -> Any:
        """The parameters of the newest checkpoint, without the rest of the state.

        Args:
          like: as for `restore`, of the parameters.

        Raises:
          InputError: there is no checkpoint, or it is of a model of another shape.
        """
        step = self.manager.latest_step()
        if step is None:
            raise InputError(f"{self.folder} holds no checkpoint; run `rac3 train` first")
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        self._check_shapes(step, {"params": abstract})
        with ocp.PyTreeCheckpointer() as checkpointer:
            args = ocp.checkpoint_utils.construct_restore_args({"params": abstract})
            restored = checkpointer.restore(
                (self.folder / str(step) / "state").absolute(),
                args=ocp.args.PyTreeRestore({"params": abstract}, restore_args=args, partial_restore=True),
            )
        return restored["params"]

    def close(self) -> None:
        """Waits until the last save is complete."""
        self.manager.wait_until_finished()
        self.manager.close()

    def _check_shapes(self, step: int, wanted: Any) -> None:
        """Compares `wanted` with the part of the checkpoint under the same top-level names."""
        with ocp.PyTreeCheckpointer() as checkpointer:
            stored = checkpointer.metadata((self.folder / str(step) / "state").absolute()).item_metadata.tree
        have = {_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(stored)}
        want = {_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(wanted)}
        parts = {name.split("/")[0] for name in want}
        for name in sorted(want.keys() | {name for name in have if name.split("/")[0] in parts}):
            if have.get(name) != want.get(name):
                there, here = have.get(name, "missing"), want.get(name, "missing")
                raise InputError(
                    f"checkpoint {self.folder}/{step} is of another model: {name} is {there} there, {here} in this "
                    "config; use the config it was trained with, or another workdir"
                )


def _name(path: tuple[Any, ...]) -> str:
    """A leaf's path as orbax stores it: nested names, the same for dicts, dataclasses and named tuples."""
    parts = [getattr(k, "key", getattr(k, "name", getattr(k, "idx", None))) for k in path]
    return "/".join(str(part) for part in parts)
