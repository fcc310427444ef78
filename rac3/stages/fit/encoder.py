"""What fitting the encoders here has in common: the documents, the optimizer, and a run of the training loop."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from rac3.config import InputError
from rac3.devices.mesh import use_mesh
from rac3.documents.document import Document, Reject
from rac3.execution.progress import progress
from rac3.experiment import Experiment, Split
from rac3.model.losses import Metrics
from rac3.training.loop import TrainingConfig, training_loop
from rac3.training.optimizer import OptimizerConfig
from rac3.training.state import TrainState, create_state
from rac3.weights.fitting import FitConfig


def fitting_documents(experiment: Experiment, limit: int) -> list[Document]:
    """At most `limit` documents of `Data.fit_on` that pass the filter, evenly from all shards."""
    return read_documents(experiment, experiment.data.fit_on, limit)


def read_documents(experiment: Experiment, splits: Sequence[Split], limit: int) -> list[Document]:
    """At most `limit` documents of the splits' sources that pass the filter, evenly from all shards.

    Raises:
      InputError: there are none.
    """
    sources = {**experiment.data.memory, **experiment.data.sources()}
    data_dir = Path(experiment.data_dir)
    shards = [(split, shard) for split in splits for shard in sources[split].shards(data_dir)]
    share = -(-limit // len(shards))
    documents: list[Document] = []
    for split, shard in progress(shards, f"read {' and '.join(splits)} documents", len(shards), "shards"):
        taken = 0
        for item in sources[split].read(data_dir, shard):
            if isinstance(item, Reject) or experiment.filter.reason(item.metadata):
                continue
            documents.append(item)
            taken += 1
            if taken == share:
                break
    if not documents:
        raise InputError(
            f"the source of {' and '.join(splits)} gives no documents that pass the filter; check data_dir and filter"
        )
    return documents[:limit]


def adam(config: FitConfig, steps: int) -> optax.GradientTransformation:
    """For a run of `steps` steps: warm-up, then linear decay to 0."""
    rule = OptimizerConfig(config.peak_lr, warmup_steps=500, b1=config.b1, b2=config.b2, weight_decay=0.01)
    return rule.build(steps)


def one_each(values: dict[str, Array]) -> Metrics:
    return {name: (value, jnp.ones(())) for name, value in values.items()}


@dataclass(frozen=True)
class FitTask:
    """What an encoder's fitting is made of.

    Attributes:
      label: names the run in its progress lines.
      init: random key -> parameters.
      step: (state, batch, `frozen`) -> (next state, metrics), to be compiled.
      items: rows of the data.
      batch: rows -> what `step` takes of them.
      start: completes a new state, which has no `extra` yet, on its mesh.
      frozen: arrays that steps read and checkpoints don't hold.
    """

    label: str
    init: Callable[[Array], PyTree]
    optimizer: optax.GradientTransformation
    step: Callable[[TrainState, Any, PyTree], tuple[TrainState, Metrics]]
    items: int
    batch: Callable[[np.ndarray], PyTree]
    start: Callable[[TrainState, Mesh], TrainState] = lambda state, mesh: state
    frozen: PyTree = None


def fit_encoder(experiment: Experiment, config: FitConfig, task: FitTask, folder: Path) -> TrainState:
    """Fits with the training loop, the batch cut over the `data` and `fsdp` axes of the experiment's mesh and the
    parameters whole on each device. The rows of a step are a function of (seed, step); a process reads its share of
    them, so that a step sees the same rows however many processes there are."""
    mesh = experiment.mesh.build()
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    size = -(-config.batch // parts) * parts

    def stream(position: Sequence[int]) -> Iterator[tuple[PyTree, Sequence[int]]]:
        number = position[0]
        while True:
            rows = np.random.default_rng([experiment.seed, number]).integers(task.items, size=size)
            number += 1
            yield task.batch(np.split(rows, jax.process_count())[jax.process_index()]), [number]

    with use_mesh(experiment.mesh, mesh):
        state = create_state(task.init, task.optimizer, experiment.seed, experiment.mesh, mesh)
        state = task.start(state, mesh)
        frozen = jax.device_put(task.frozen, state.step.sharding)
    compiled = jax.jit(task.step, donate_argnums=0)

    def step(state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        return compiled(state, batch, frozen)

    training = TrainingConfig(steps=config.steps, checkpoint_every=max(50, config.steps // 5), log_every=20, keep=1)
    return training_loop(task.label, training, state, step, stream, [0], folder, experiment.mesh, mesh)
