"""The one training loop: for the CM3 Transformer, and for the encoders that are fitted."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from rac3.config import InputError
from rac3.devices.mesh import DeviceMesh
from rac3.execution.progress import Progress
from rac3.model.losses import Metrics
from rac3.training.checkpoint import CHECKPOINTS, Checkpoints
from rac3.training.metrics import MetricsWriter
from rac3.training.preemption import PreemptedError, Preemption
from rac3.training.state import NewState, TrainState

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
      stall_minutes: a process ends, with code 76, when it has not got on for so long: it can't know whether what it
        waits for will ever come. A compilation may take longer. 0 waits forever.
    """

    steps: int = 100_000
    checkpoint_every: int = 1000
    log_every: int = 20
    keep: int = 2
    loss_chunk: int = 512
    stall_minutes: float = 30.0

    def __post_init__(self) -> None:
        for name in ("steps", "checkpoint_every", "log_every", "keep", "loss_chunk"):
            if getattr(self, name) < 1:
                raise InputError(f"training.{name}={getattr(self, name)} is below 1; use at least 1")
        if not 0 <= self.stall_minutes < float("inf"):
            raise InputError(f"training.stall_minutes={self.stall_minutes} is no time; use 30, or 0 to wait forever")


def training_loop(
    label: str,
    config: TrainingConfig,
    new: NewState,
    step: Callable[[TrainState, Any], tuple[TrainState, Metrics]],
    stream: Stream,
    folder: Path,
    mesh: DeviceMesh,
    at: Callable[[str, int], None] = lambda waits_for, step: None,
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

    Raises:
      InputError: the checkpoint is of a model of another shape.
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
        with contextlib.closing(MetricsWriter(folder, done)) as writer, bar:
            window = _Window(writer)
            batches = stream(position) if done < config.steps else iter(())
            while done < config.steps:
                at("a batch", done + 1)
                waiting = time.monotonic()
                batch, position = next(batches)
                wait = time.monotonic() - waiting
                at("the step", done + 1)
                state, metrics = step(state, put(batch, mesh))
                done += 1
                window.add(metrics, wait)
                checkpoints.check()
                stops = preemption.reached(done, checkpoints.manager.reached_preemption)
                saves = stops or done % config.checkpoint_every == 0 or done == config.steps
                # Metrics are read one window late, so that the device never waits for the host.
                if done % config.log_every == 0 or saves:
                    at("the metrics of the steps so far", done)
                    window.close(done)
                # A run that resumes from here must find all lines up to here, so they are written before the state.
                if saves:
                    window.flush()
                    at("the checkpoint", done)
                    checkpoints.save(done, state, list(position))
                bar.update(1, window.note)
                if stops:
                    raise PreemptedError(f"{label}: stopped after step {done}, saved; run the same command to go on")
        at("the last checkpoint", done)
    return state


def put(batch: PyTree, mesh: DeviceMesh) -> PyTree:
    """This process's rows -> global arrays, sharded over the batch axis."""

    def one(x: np.ndarray) -> jax.Array:
        names = ("batch",) + (None,) * (np.ndim(x) - 1)
        return jax.make_array_from_process_local_data(mesh.sharding(*names), x)

    return jax.tree.map(one, batch)


class _Window:
    """The metrics of the steps between two log lines: summed on the device, written when the next window ends."""

    def __init__(self, writer: MetricsWriter) -> None:
        self.writer = writer
        self.note = ""
        self.pending: tuple[int, Metrics, int, float, float] | None = None
        self.sums: Metrics | None = None
        self.steps, self.wait, self.started = 0, 0.0, time.monotonic()

    def add(self, metrics: Metrics, wait: float) -> None:
        self.sums = metrics if self.sums is None else jax.tree.map(lambda a, b: a + b, self.sums, metrics)
        self.steps += 1
        self.wait += wait

    def close(self, step: int) -> None:
        if self.sums is None:
            return
        self.flush()
        self.pending = (step, self.sums, self.steps, self.wait, time.monotonic() - self.started)
        self.sums, self.steps, self.wait, self.started = None, 0, 0.0, time.monotonic()

    def flush(self) -> None:
        """Writes the window that was closed last, if any, without means over nothing (no retrieved text, say)."""
        if self.pending is None:
            return
        step, sums, steps, wait, seconds = self.pending
        self.pending = None
        totals = jax.device_get(sums)
        values = {name: float(total) / float(count) for name, (total, count) in totals.items() if count > 0}
        values |= {"step_seconds": seconds / steps, "input_wait_seconds": wait / steps}
        if "tokens" in values:
            values["tokens_per_second"] = values.pop("tokens") * steps / seconds
        self.note = f"loss {values['loss']:.3f}" if "loss" in values else ""
        self.writer.write(step, values)
