"""The one training loop: for the CM3 Transformer, and for the encoders that are fitted."""

import contextlib
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree

from rac3.config import InputError
from rac3.devices.mesh import DeviceMesh
from rac3.execution.progress import Progress
from rac3.training.checkpoint import CHECKPOINTS, Checkpoints
from rac3.training.metrics import MetricsWriter, Window
from rac3.training.preemption import PreemptedError, Preemption
from rac3.training.profile import Profile
from rac3.training.state import NewState, Step, TrainState

Position = Sequence[int]  # of a stream of batches; () is its beginning
Stream = Callable[[Position], Iterator[tuple[PyTree, Position]]]  # from a position on: (batch, position after it)


@dataclass(frozen=True)
class TrainingConfig:
    """How long to train, and how often to save and log.

    Attributes:
      steps: optimizer steps.
      checkpoint_every, log_every: in steps.
      keep: the number of checkpoints to keep.
      loss_chunk: positions of a row whose logits are in memory at once.
      microbatches: the rows of a batch go through the model in so many shares, one after the other, so that only the
        activations of one are in memory. The gradient is that of the whole batch.
      max_skipped: a batch whose loss or gradient is not finite is skipped; after so many in a row the run stops.
      profile: FIRST:LAST, the steps of which `jax.profiler` writes a trace into the run's folder; "" is none.
      stall_minutes: a process ends, with code 76, when it has not got on for so long: it can't know whether what it
        waits for will ever come. A compilation may take longer. 0 waits forever.
    """

    steps: int = 100_000
    checkpoint_every: int = 1000
    log_every: int = 20
    keep: int = 2
    loss_chunk: int = 512
    microbatches: int = 1
    max_skipped: int = 20
    profile: str = ""
    stall_minutes: float = 30.0

    def __post_init__(self) -> None:
        for name in ("steps", "checkpoint_every", "log_every", "keep", "loss_chunk", "microbatches", "max_skipped"):
            if getattr(self, name) < 1:
                raise InputError(f"training.{name}={getattr(self, name)} is below 1; use at least 1")
        if not 0 <= self.stall_minutes < float("inf"):
            raise InputError(f"training.stall_minutes={self.stall_minutes} is no time; use 30, or 0 to wait forever")
        first, last = self.profiled
        if self.profile and not 1 <= first <= last:
            raise InputError(f"training.profile={self.profile!r} names no steps; use FIRST:LAST, such as 20:25")

    @property
    def profiled(self) -> tuple[int, int]:
        """The first and the last step of `profile`; (0, 0) if it names none."""
        found = re.fullmatch(r"(\d+):(\d+)", self.profile)
        return (int(found[1]), int(found[2])) if found else (0, 0)


def training_loop(
    label: str,
    config: TrainingConfig,
    new: NewState,
    step: Step,
    stream: Stream,
    folder: Path,
    mesh: DeviceMesh,
    at: Callable[[str, int], None] = lambda waits_for, step: None,
    documents: Callable[[Position], Sequence[str]] = lambda position: (),
) -> TrainState:
    """Trains to `config.steps` steps: from the newest checkpoint below `folder`, or else from a new state.

    A run that is killed and resumed ends in the same state, bit for bit, as one that is not: the checkpoint holds the
    position of the stream, and nothing else is random. A resumed run allocates the state once, to restore it.

    Args:
      label: names the run in its progress lines.
      step: (state, batch) -> (next state, metrics); the state is donated.
      stream: batches of this process's rows.
      folder: takes the checkpoints and the metrics.
      at: is told what the loop waits for next, and for which step.
      documents: the keys of the documents in the batch at a position, to name those of a batch that is not finite.

    Raises:
      InputError: the checkpoint is of a model of another shape; or too many batches in a row were skipped.
      SaveError: a checkpoint can't be written; the run ends soon after.
      PreemptedError: SIGTERM or SIGINT came; the last step is saved.
    """
    checkpoints = Checkpoints(folder / CHECKPOINTS, config.keep)
    with Preemption() as preemption, contextlib.closing(checkpoints), mesh.use():
        position: Position
        at("the newest checkpoint", 0)
        state, position = checkpoints.restore(new.abstract) or (new.create(), ())
        done = int(state.step)
        bar = Progress(label, config.steps, "steps", done, shown=jax.process_index() == 0)
        profile = Profile(config.profiled, folder)
        with contextlib.closing(MetricsWriter(folder, done)) as writer, bar, profile:
            window = Window(writer)
            places = deque[Position](maxlen=2 * config.log_every + 1)  # of the batches of steps not known to be good
            batches = stream(position) if done < config.steps else iter(())
            while done < config.steps:
                at("a batch", done + 1)
                waiting = time.monotonic()
                places.append(position)
                batch, position = next(batches)
                wait = time.monotonic() - waiting
                at("the step", done + 1)
                with profile.step(done + 1):
                    state, metrics = step(state, put(batch, mesh))
                done += 1
                profile.after(done, state)
                window.add(metrics, wait)
                checkpoints.check()
                stops = preemption.reached(done, checkpoints.manager.reached_preemption)
                saves = stops or done % config.checkpoint_every == 0 or done == config.steps
                # Metrics are read one window late, so that the device never waits for the host.
                if done % config.log_every == 0 or saves:
                    at("the metrics of the steps so far", done)
                    window.close(done, state)
                # A run that resumes from here must find all lines up to here, so they are written before the state; and
                # a run that is to end for its batches must not be saved, or it would go on after them.
                if saves:
                    window.flush()
                if window.skipped >= config.max_skipped:
                    last = window.read - window.skipped + config.max_skipped
                    keys = documents(places[max(-len(places), last - 1 - done)])
                    raise _not_finite(label, config.max_skipped, last, keys, folder)
                if saves:
                    at("the checkpoint", done)
                    checkpoints.save(done, state, list(position))
                bar.update(1, window.note)
                if stops:
                    raise PreemptedError(f"{label}: stopped after step {done}, saved; run the same command to go on")
        at("the last checkpoint", done)
    return state


def _not_finite(label: str, count: int, step: int, keys: Sequence[str], folder: Path) -> InputError:
    """What to raise when `count` batches in a row, the last of them that of `step`, can't be trained on."""
    named = ""
    if keys:
        path = folder / f"batch-{step}.txt"
        if jax.process_index() == 0:
            path.write_text("".join(f"{key}\n" for key in keys), encoding="utf-8")
        some = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
        named = f", of documents {some} ({len(keys)}, all in {path})"
    return InputError(
        f"{label}: loss or gradient is not finite for training.max_skipped={count} batches in a row, the last that of "
        f"step {step}{named}; the newest checkpoint is from before that step: lower the peak_lr, or put what is broken "
        "on the list of takedowns"
    )


def put(batch: PyTree, mesh: DeviceMesh) -> PyTree:
    """This process's rows -> global arrays, sharded over the batch axis."""

    def one(x: np.ndarray) -> jax.Array:
        names = ("batch",) + (None,) * (np.ndim(x) - 1)
        return jax.make_array_from_process_local_data(mesh.sharding(*names), x)

    return jax.tree.map(one, batch)
