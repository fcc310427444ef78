"""What an experiment says reaches the stream, the model, the optimizer and the loop; and what is left is restored."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_config

from rac3 import recipes
from rac3.artifacts.workdir import Workdir
from rac3.batches.masking import Masking
from rac3.devices.mesh import MeshConfig
from rac3.retrieval.baselines import NoRetriever
from rac3.stages import train as stage
from rac3.stages.embed import open_documents
from rac3.stages.train import build_model, open_params, train, training_stream
from rac3.tokens.vocabulary import Vocabulary
from rac3.training.optimizer import OptimizerConfig
from rac3.training.state import NewState, TrainState
from rac3.training.step import make_train_step

TINY = tiny_config.get_config()


def test_the_model_has_room_for_the_longest_text_and_image():
    experiment = replace(TINY, max_text_tokens=20, batches=replace(TINY.batches, context_length=300, row_length=600))
    vocabulary = Vocabulary(text_size=100, image_size=50)
    for tokens_per_image, longest in ((9, 20), (64, 64)):
        model = build_model(experiment, vocabulary, tokens_per_image)
        assert (model.vocab_size, model.max_positions, model.max_segment_tokens) == (256, 300, longest)
        assert model.config == experiment.model


def test_the_stream_is_that_of_the_experiment(
    finished_workdir: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    workdir = Workdir(finished_workdir[1], "tiny")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    masking = Masking(mean_spans=2.0)
    batches = replace(TINY.batches, masking=masking, retrieved_weight=0.3, retrieved="image")
    vocabulary = Vocabulary(300, 16)
    stream = training_stream(replace(TINY, batches=batches), workdir, vocabulary)
    assert (stream.hosts, stream.host, stream.seed, stream.config) == (2, 1, TINY.seed, batches)
    assert stream.documents.folder == open_documents(TINY, workdir, "train").folder
    assert stream.neighbors.path == workdir.require(recipes.neighbors(TINY, "train"), "").folder / "ids"
    assert (stream.builder.vocabulary, stream.builder.masking) == (vocabulary, masking)
    assert (stream.builder.retrieved_weight, stream.builder.retrieved) == (0.3, "image")
    takedowns = tmp_path / "keys.txt"
    takedowns.write_text(stream.documents[3].document.key)
    vanilla = replace(TINY, retriever=NoRetriever(), takedowns=str(takedowns))
    stream = training_stream(vanilla, workdir, vocabulary)
    assert stream.neighbors is None
    plan = stream.plan(0)
    assert set(plan.main[plan.epoch == 0].tolist()) == set(range(len(stream.documents))) - {3}


def test_a_killed_run_resumes_without_a_new_state(workdir: Path, monkeypatch: pytest.MonkeyPatch):
    """Its state alone is 18 bytes a parameter, of which there is room for one."""
    store, training = Workdir(workdir, "tiny"), replace(TINY.training, checkpoint_every=1)
    experiment = replace(TINY, retriever=NoRetriever(), seed=TINY.seed + 7, training=training)
    for name in ("open_vqgan", "open_text", "open_documents"):
        there = getattr(stage, name)
        monkeypatch.setattr(stage, name, lambda experiment, *rest, there=there: there(TINY, *rest))
    make, made = stage.new_state, []

    def new(*given: Any) -> NewState:
        state = make(*given)
        return NewState(state.abstract, lambda: made.append(state) or state.create())

    class KilledError(Exception):
        pass

    def killed(model: Any, *rest: Any) -> Any:
        step = make_train_step(model, *rest)

        def one(state: TrainState, batch: Any) -> Any:
            if int(state.step) == 2:
                raise KilledError
            return step(state, batch)

        return one

    monkeypatch.setattr(stage, "new_state", new)
    with monkeypatch.context() as patch:
        patch.setattr(stage, "make_train_step", killed)
        with pytest.raises(KilledError):
            train(experiment, store)
    assert len(made) == 1
    train(experiment, store)
    assert len(made) == 1
    assert store.find(recipes.train(experiment)) is not None


def test_training_is_that_of_the_experiment(workdir: Path, monkeypatch: pytest.MonkeyPatch):
    """With another seed, on the documents and neighbors of the finished run."""
    calls: dict[str, tuple[Any, ...]] = {}
    results: dict[str, Any] = {}

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls[name] = args
            results[name] = function(*args)
            return results[name]

        return call

    for name in ("new_state", "make_train_step", "training_stream", "training_loop"):
        monkeypatch.setattr(stage, name, watched(name, getattr(stage, name)))
    monkeypatch.setattr(OptimizerConfig, "build", watched("build", OptimizerConfig.build))
    for name in ("open_vqgan", "open_text", "open_documents", "read_neighbors"):
        there = getattr(stage, name)
        monkeypatch.setattr(stage, name, lambda experiment, *rest, there=there: there(TINY, *rest))
    training = replace(TINY.training, checkpoint_every=5, keep=2, loss_chunk=TINY.batches.row)
    experiment = replace(TINY, seed=TINY.seed + 7, training=training)
    store = Workdir(workdir, "tiny")
    train(experiment, store)

    model = calls["make_train_step"][0]
    assert model == build_model(experiment, results["training_stream"].builder.vocabulary, 16)
    assert calls["build"] == (experiment.optimizer, experiment.training.steps)
    mesh = experiment.mesh.build()
    assert calls["new_state"][1:] == (results["build"], experiment.seed, mesh)
    assert calls["make_train_step"][1:] == (results["build"], training.loss_chunk)
    label, config, new, step, _, _, on_mesh = calls["training_loop"]
    assert (label, config, on_mesh) == ("train ra_cm3", training, mesh)
    assert (new, step) == (results["new_state"], results["make_train_step"])
    assert results["training_stream"].seed == experiment.seed

    made = store.require(recipes.train(experiment), "")
    assert sorted(path.name for path in (made.folder / "checkpoints").iterdir()) == ["5", "6"]
    state = results["training_loop"]
    assert made.manifest["counts"]["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(state.params))
    params = open_params(experiment, store, model)
    assert jax.tree.structure(params) == jax.tree.structure(state.params)
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(one, other)

    sharded = open_params(replace(experiment, mesh=MeshConfig(fsdp=2, tensor=2)), store, model)
    kernel = sharded["params"]["blocks"]["mlp_in"]["kernel"]
    assert (kernel.shape, kernel.sharding.shard_shape(kernel.shape)) == ((2, 32, 64), (2, 16, 32))

    del calls["training_loop"]
    train(experiment, store)
    assert "training_loop" not in calls  # that is done
