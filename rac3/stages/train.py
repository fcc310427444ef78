"""Train: pre-retrieved batches -> a CM3 Transformer. Reads artifacts only; no retriever runs here."""

from collections.abc import Iterator, Sequence

import jax
from jaxtyping import PyTree

from rac3 import recipes
from rac3.batches.loader import StreamState
from rac3.run import Run, initializer
from rac3.training.loop import training_loop
from rac3.training.state import new_state
from rac3.training.step import make_train_step


def train(run: Run) -> None:
    """Trains the model of the experiment, unless that is done; goes on from its newest checkpoint.

    Raises:
      InputError: a context too short for one document, a mesh that does not divide the devices, a checkpoint of
        another model.
    """
    experiment, recipe = run.experiment, run.recipe(recipes.train)
    if run.workdir.find(recipe) is not None:
        return
    mesh = experiment.mesh.build()
    model, stream = run.model, run.training_stream()

    def batches(position: Sequence[int]) -> Iterator[tuple[PyTree, Sequence[int]]]:
        return stream.batches(StreamState(*position))

    optimizer = experiment.optimizer.build(experiment.training.steps)
    with run.workdir.write(recipe) as draft:
        new = new_state(initializer(model), optimizer, experiment.seed, mesh)
        draft.counts["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(new.abstract.params))
        step = make_train_step(model, optimizer, experiment.training.loss_chunk)
        label = f"train {experiment.model_name}"
        training_loop(label, experiment.training, new, step, batches, draft.folder, mesh)
