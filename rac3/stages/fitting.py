"""What fitting the encoders here has in common: the documents, the optimizer, and a run of the training loop."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from rac3.config import InputError
from rac3.documents.document import Document, Reject
from rac3.experiment import Experiment, FitConfig, Split
from rac3.progress import progress
from rac3.sharding import MeshConfig, use_mesh
from rac3.training.loop import TrainingConfig, fit
from rac3.training.optimizer import OptimizerConfig
from rac3.training.state import TrainState, create_state
from rac3.training.step import Metrics


def fitting_documents(experiment: Experiment, limit: int) -> list[Document]:
    """At most `limit` training and memory documents that pass the filter, evenly from all shards."""
    splits: list[Split] = [split for split in experiment.data.sources() if split in ("train", "memory")]
    return read_documents(experiment, splits, limit)


def read_documents(experiment: Experiment, splits: Sequence[Split], limit: int) -> list[Document]:
    """At most `limit` documents of the splits' sources that pass the filter, evenly from all shards.

    Raises:
      InputError: there are none.
    """
    sources = experiment.data.sources()
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


def adam(config: FitConfig) -> optax.GradientTransformation:
    return OptimizerConfig(config.peak_lr, warmup_steps=500, b2=0.98, weight_decay=0.01).build(config.steps)


def one_each(values: dict[str, Array]) -> Metrics:
    return {name: (value, jnp.ones(())) for name, value in values.items()}


def fit_encoder(
    experiment: Experiment,
    label: str,
    config: FitConfig,
    init: Callable[[Array], PyTree],
    start: Callable[[TrainState], TrainState] | None,
    optimizer: optax.GradientTransformation,
    step: Callable[[TrainState, Any], tuple[TrainState, Metrics]],
    items: int,
    batch: Callable[[np.ndarray], PyTree],
    folder: Path,
) -> TrainState:
    """Data-parallel fitting with the training loop; the rows of a step are a function of (seed, step).

    A process reads its share of them, so that a step sees the same rows however many processes there are.
    """
    mesh_config = MeshConfig()
    size = -(-config.batch // jax.device_count()) * jax.device_count()

    def stream(position: Sequence[int]) -> Iterator[tuple[PyTree, Sequence[int]]]:
        number = position[0]
        while True:
            rows = np.random.default_rng([experiment.seed, number]).integers(items, size=size)
            number += 1
            yield batch(np.split(rows, jax.process_count())[jax.process_index()]), [number]

    mesh = mesh_config.build()
    with use_mesh(mesh_config, mesh):
        state = create_state(init, optimizer, experiment.seed, mesh_config, mesh)
        if start is not None:
            state = start(state)
    training = TrainingConfig(steps=config.steps, checkpoint_every=max(50, config.steps // 5), log_every=20, keep=1)
    step_fn = jax.jit(step, donate_argnums=0)
    return fit(label, training, state, step_fn, stream, [0], folder, mesh_config, mesh)
