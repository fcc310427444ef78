"""The one training loop: for the CM3 Transformer, and for encoders that are fitted here."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from rac3.config import InputError
from rac3.devices.mesh import MeshConfig, use_mesh
from rac3.execution.progress import Progress
from rac3.model.losses import Metrics
from rac3.training.checkpoint import CHECKPOINTS, Checkpoints
from rac3.training.metrics import MetricsWriter
from rac3.training.state import TrainState

Stream = Callable[[Sequence[int]], Iterator[tuple[PyTree, Sequence[int]]]]  # position -> (batch, position after it)


@dataclass(frozen=True)
class TrainingConfig:
    """How long to train and what to write on the way.

    Attributes:
      steps: optimizer steps.
      checkpoint_every, log_every: in steps.
      keep: checkpoints to keep.
      loss_chunk: positions whose logits exist at once.
    """

    steps: int = 100_000
    checkpoint_every: int = 1000
    log_every: int = 20
    keep: int = 2
    loss_chunk: int = 512

    def __post_init__(self) -> None:
        for name in ("steps", "checkpoint_every", "log_every", "keep", "loss_chunk"):
            if getattr(self, name) < 1:
                raise InputError(f"training.{name}={getattr(self, name)} is below 1; use at least 1")


def training_loop(
    label: str,
    config: TrainingConfig,
    state: TrainState,
    step_fn: Callable[[TrainState, Any], tuple[TrainState, Metrics]],
    stream: Stream,
    start: Sequence[int],
    folder: Path,
    mesh_config: MeshConfig,
    mesh: Mesh,
) -> TrainState:
    """Trains `state` to `config.steps` steps, from the newest checkpoint below `folder` if there is one.

    A run that was killed and goes on ends in the same state, bit for bit, as one that was not: the checkpoint holds
    the position of the stream, and nothing else is random.
    """
    checkpoints = Checkpoints(folder / CHECKPOINTS, config.keep)
    with contextlib.closing(checkpoints), use_mesh(mesh_config, mesh):
        restored = checkpoints.restore(state)
        if restored is not None:
            state, start = restored
        done = int(state.step)
        bar = Progress(label, config.steps, "steps", done)
        with contextlib.closing(MetricsWriter(folder, done)) as writer, bar:
            window = _Window(writer)
            batches = stream(start) if done < config.steps else iter(())
            while done < config.steps:
                waiting = time.monotonic()
                batch, start = next(batches)
                wait = time.monotonic() - waiting
                state, metrics = step_fn(state, put(batch, mesh_config, mesh))
                done += 1
                window.add(metrics, wait)
                saves = done % config.checkpoint_every == 0 or done == config.steps
                # Metrics are read one window late, so that the device never waits for the host.
                if done % config.log_every == 0 or saves:
                    window.close(done)
                # A run that goes on from here must find all lines up to here, so these are written before the state.
                if saves:
                    window.flush()
                    checkpoints.save(done, state, list(start))
                bar.update(1, window.note)
    return state


def put(batch: PyTree, config: MeshConfig, mesh: Mesh) -> PyTree:
    """This host's rows -> global arrays, cut over the batch axis."""

    def one(x: np.ndarray) -> jax.Array:
        names = ("batch",) + (None,) * (np.ndim(x) - 1)
        sharding = jax.sharding.NamedSharding(mesh, config.spec(names))
        return jax.make_array_from_process_local_data(sharding, x)

    return jax.tree.map(one, batch)


class _Window:
    """Sums the metrics of the steps between two log lines, on the device, and writes them when the next one ends."""

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
        """Writes the window that was closed last, if any. A mean over nothing (no retrieved text, say) is left out."""
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
