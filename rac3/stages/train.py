"""Train: pre-retrieved batches -> a CM3 Transformer. Reads artifacts only; no retriever runs here."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib import metadata
from typing import Any

import jax
from jaxtyping import PyTree

from rac3 import recipes
from rac3.artifacts.recipe import Recipe
from rac3.artifacts.workdir import Draft, Workdir
from rac3.batches.loader import StreamState
from rac3.config import InputError, fingerprint
from rac3.devices.mesh import DeviceMesh
from rac3.devices.processes import COMPILING, Processes, code_digest
from rac3.model.exchange import check_tokenizer, parameters, read_pretrained
from rac3.run import Run, initializer
from rac3.training.loop import training_loop
from rac3.training.state import NewState, TrainState, new_state
from rac3.training.step import make_train_step


def train(run: Run, processes: Processes | None = None) -> None:
    """Trains the model of the experiment, unless that is done; goes on from its newest checkpoint.

    All processes call it; None trains in this one alone. The first one owns the artifact, the others help to fill it.

    Raises:
      InputError: a context too short for one document, sizes that can't be divided over the mesh, a mesh that does not
        divide the devices, a checkpoint of another model, processes that differ.
    """
    processes = processes or Processes()
    experiment, recipe = run.experiment, run.recipe(recipes.train)
    versions = f"jax {jax.__version__}, jaxlib {jax.lib.__version__}"
    same = {"code": code_digest(), "config": fingerprint(experiment), "jax": versions, "input": recipe.fingerprint}
    processes.compare(f"{experiment.model_name} before anything is read", same)
    if processes.from_first("the state of the artifact", run.workdir.find(recipe) is not None):
        return
    processes.at("its artifacts")
    mesh = experiment.mesh.build()
    training, rows = experiment.training, experiment.batches.rows
    model, stream = run.model, run.training_stream(mesh.share(rows))
    shards = mesh.num_shards("batch")
    if rows % (shards * training.microbatches):
        raise InputError(
            f"training.microbatches={training.microbatches} can't divide the {rows // shards} rows of each of the "
            f"{shards} shards of mesh.data x mesh.fsdp; use a divisor of {rows // shards}, or other batches.rows"
        )
    schedule = experiment.optimizer.schedule(training.steps)
    optimizer = experiment.optimizer.build(training.steps)
    new = new_state(initializer(model), optimizer, experiment.seed, mesh)
    if experiment.model.init_from:
        check_tokenizer(experiment.model.init_from, run.tokenizer)
        new = replace(new, create=partial(_pretrained, run, new, processes.first))

    def batches(position: Sequence[int]) -> Iterator[tuple[PyTree, Sequence[int]]]:
        return stream.batches(StreamState(*position))

    def documents(position: Sequence[int]) -> list[str]:
        return stream.keys(StreamState(*position))

    with written_together(run.workdir, recipe, processes) as draft:
        draft.counts["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(new.abstract.params))
        label = f"train {experiment.model_name}"
        if processes.first:
            print(f"{label}: {_machine(mesh)}; {model.packed}", file=sys.stderr)
        step = make_train_step(
            model, optimizer, training.loss_chunk, training.microbatches, training.max_skipped, schedule
        )
        step = compared(step, processes)
        training_loop(label, training, new, step, batches, draft.folder, mesh, processes.at, documents)


def _pretrained(run: Run, new: NewState, says: bool) -> TrainState:
    """A new state with the parameters that `model.init_from` names. They are read before any memory is taken."""
    shapes = {path: leaf.shape for path, leaf in parameters(new.abstract.params).items()}
    found = read_pretrained(run.experiment.model.init_from, run.model, shapes, run.vocabulary)
    if says:
        print(f"train {run.experiment.model_name}: starts with {found.note}", file=sys.stderr)
    state = new.create()
    return state.replace(params=found.over(state.params))


def _machine(mesh: DeviceMesh) -> str:
    """What a run runs on, in one line."""
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("rac3", "jax", "jaxlib"))
    shape = " x ".join(f"{name} {size}" for name, size in mesh.jax_mesh.shape.items())
    devices = f"{jax.device_count()} {jax.devices()[0].device_kind}"
    flags = os.environ.get("XLA_FLAGS", "").strip() or "none"
    return f"{packages}; mesh of {shape} on {devices}, {jax.process_count()} processes; XLA_FLAGS: {flags}"


@contextlib.contextmanager
def written_together(workdir: Workdir, recipe: Recipe, processes: Processes) -> Iterator[Draft]:
    """A draft that all processes fill: the first one holds the lock and completes the artifact, the others wait for it.

    Raises:
      InputError: as `Workdir.write` and `Workdir.join`.
    """
    if processes.first:
        with workdir.write(recipe) as draft:
            processes.meet("the lock of the artifact")
            yield draft
            processes.meet("the end of the training")
    else:
        processes.meet("the lock of the artifact")
        with workdir.join(recipe) as draft:
            yield draft
        processes.meet("the end of the training")
    processes.meet("the manifest of the artifact")


def compared(step: Any, processes: Processes) -> Callable[[TrainState, PyTree], Any]:
    """A jitted step; several processes compile it once all have lowered it to the same program.

    Programs that differ would wait for each other forever.
    """
    compiled: list[Any] = []

    def run(state: TrainState, batch: PyTree) -> Any:
        if not compiled:
            compiled.append(compile_with(state, batch))
        return compiled[0](state, batch)

    def compile_with(state: TrainState, batch: PyTree) -> Any:
        processes.at(COMPILING)
        if processes.count == 1:
            return step  # compiles when it is called
        lowered = step.lower(state, batch)
        processes.compare("the program", {"program": fingerprint(lowered.as_text())})
        processes.at(COMPILING)
        return lowered.compile()

    return run
