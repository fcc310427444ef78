"""What fitting an encoder takes, whichever it is: an optimizer, random rows for each step, and the training loop."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Int, PyTree

from rac3.devices.mesh import DeviceMesh
from rac3.model.losses import Metrics
from rac3.training.loop import TrainingConfig, training_loop
from rac3.training.optimizer import OptimizerConfig
from rac3.training.state import NewState, TrainState, skips_nonfinite
from rac3.weights.fitting import FitConfig


def adam(config: FitConfig, steps: int) -> optax.GradientTransformation:
    """For a run of `steps` steps: warm-up, then linear decay to 0."""
    rule = OptimizerConfig(config.peak_lr, warmup_steps=500, b1=config.b1, b2=config.b2, weight_decay=0.01)
    return rule.build(steps)


@dataclass(frozen=True)
class FitTask:
    """What is fitted, and on what.

    Attributes:
      label: names the run in its progress lines.
      new: the state that it starts from; parameters without logical axes are whole on each device.
      step: (state, batch, `frozen`) -> (next state, metrics), to be compiled.
      items: the number of rows of the data.
      batch: row numbers -> what `step` takes of those rows.
      frozen: arrays that steps read and checkpoints don't hold.
    """

    label: str
    new: NewState
    step: Callable[[TrainState, Any, PyTree], tuple[TrainState, Metrics]]
    items: int
    batch: Callable[[Int[np.ndarray, " rows"]], PyTree]
    frozen: PyTree = None


def fit_encoder(config: FitConfig, task: FitTask, seed: int, mesh: DeviceMesh, folder: Path) -> TrainState:
    """Runs the training loop over random rows; `folder` keeps the checkpoints, from which a killed fit resumes.

    The rows of a step are a function of (seed, step), and each process reads its share of them: a step sees the same
    rows however many processes there are.

    Raises:
      InputError: the processes can't feed equal shares of the rows.
    """
    shards = mesh.num_shards("batch")
    size = -(-config.batch // shards) * shards
    shares, own = mesh.share(size)

    def stream(position: Sequence[int]) -> Iterator[tuple[PyTree, Sequence[int]]]:
        (number,) = position or (0,)
        while True:
            rows = np.random.default_rng([seed, number]).integers(task.items, size=size)
            number += 1
            yield task.batch(np.split(rows, shares)[own]), [number]

    frozen = jax.device_put(task.frozen, mesh.sharding())
    training = TrainingConfig(steps=config.steps, checkpoint_every=max(50, config.steps // 5), log_every=20, keep=1)
    compiled = jax.jit(skips_nonfinite(task.step, training.max_skipped), donate_argnums=0)

    def step(state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        return compiled(state, batch, frozen)

    return training_loop(task.label, training, task.new, step, stream, folder, mesh)
