"""What an experiment says reaches the stream, the model, the optimizer and the loop; and what is left is restored."""

import os
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest
import tiny_config
from handmade import PlainCodec, document, experiment_of, workdir_of

from rac3 import recipes
from rac3.artifacts.workdir import Workdir
from rac3.batches.loader import StreamState
from rac3.batches.masking import Masking
from rac3.config import InputError
from rac3.devices.mesh import MeshConfig
from rac3.devices.processes import Processes
from rac3.retrieval.baselines import NoRetriever
from rac3.retrieval.exact import Exact
from rac3.run import Run
from rac3.stages import train as stage
from rac3.stages.embed import embed
from rac3.stages.ingest import ingest
from rac3.stages.retrieve import index, retrieve
from rac3.stages.train import compared, train
from rac3.tokens.vocabulary import Vocabulary
from rac3.training.optimizer import OptimizerConfig
from rac3.training.state import NewState, TrainState
from rac3.training.step import make_train_step

TINY = tiny_config.get_config()
SHORT = replace(TINY.evaluation, max_caption_tokens=8)
DOCUMENTS = {"train": [[document(f"t{number}", f"number {number}", b"%d" % number) for number in range(12)]]}


def test_the_model_has_room_for_the_longest_text_and_image(tmp_path: Path):
    batches = replace(TINY.batches, context_length=300, row_length=600)
    for tokens_per_image, longest in ((9, 20), (64, 64)):
        codec = PlainCodec(codebook_size=50, tokens_per_image=tokens_per_image)
        experiment = experiment_of(DOCUMENTS, max_text_tokens=20, batches=batches, evaluation=SHORT, vqgan=codec)
        run = Run(experiment, workdir_of(experiment, tmp_path / str(longest)))
        assert run.vocabulary == Vocabulary(text_size=256, image_size=50)
        model = run.model
        assert (model.vocab_size, model.max_positions, model.max_segment_tokens) == (384, 300, longest)
        assert model.config == experiment.model


def test_the_stream_is_that_of_the_experiment(finished_workdir: tuple[Path, Path], tmp_path: Path):
    workdir = Workdir(finished_workdir[1], "tiny")
    masking = Masking(mean_spans=2.0)
    batches = replace(TINY.batches, masking=masking, retrieved_weight=0.3, retrieved="image")
    vocabulary = Vocabulary(300, 16)
    stream = Run(replace(TINY, batches=batches), workdir).training_stream((2, 1))
    assert (stream.hosts, stream.host, stream.seed, stream.config) == (2, 1, TINY.seed, batches)
    assert stream.documents.folder == Run(TINY, workdir).documents("train").folder
    assert stream.neighbors.path == workdir.require(recipes.neighbors(TINY, "train")).folder / "ids"
    assert (stream.builder.vocabulary, stream.builder.masking) == (vocabulary, masking)
    assert (stream.builder.retrieved_weight, stream.builder.retrieved) == (0.3, "image")
    takedowns = tmp_path / "keys.txt"
    takedowns.write_text(stream.documents[3].document.key)
    vanilla = replace(TINY, retriever=NoRetriever(), takedowns=str(takedowns))
    stream = Run(vanilla, workdir).training_stream()
    assert stream.neighbors is None
    groups = stream.groups(np.arange(len(stream.documents) - 1))
    assert set(groups.main.tolist()) == set(range(len(stream.documents))) - {3}


@pytest.mark.slow
def test_a_killed_run_resumes_without_a_new_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its state alone is 18 bytes a parameter, of which there is room for one."""
    training = replace(TINY.training, checkpoint_every=1)
    experiment = experiment_of(DOCUMENTS, seed=TINY.seed + 7, training=training, retriever=NoRetriever())
    run = Run(experiment, workdir_of(experiment, tmp_path / "workdir"))
    ingest(run)
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
            train(run)
    assert len(made) == 1
    train(run)
    assert len(made) == 1
    assert run.workdir.find(run.recipe(recipes.train)) is not None


def test_training_is_that_of_the_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    calls: dict[str, tuple[Any, ...]] = {}
    results: dict[str, Any] = {}

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls[name] = args
            results[name] = function(*args)
            return results[name]

        return call

    for name in ("new_state", "make_train_step", "training_loop"):
        monkeypatch.setattr(stage, name, watched(name, getattr(stage, name)))
    monkeypatch.setattr(OptimizerConfig, "build", watched("build", OptimizerConfig.build))
    monkeypatch.setattr(Run, "training_stream", watched("training_stream", Run.training_stream))
    training = replace(TINY.training, checkpoint_every=5, keep=2, loss_chunk=TINY.batches.row, max_skipped=7)
    experiment = experiment_of(DOCUMENTS, seed=TINY.seed + 7, training=training, retriever=Exact())
    run = Run(experiment, workdir_of(experiment, tmp_path / "workdir"))
    for prepare in (ingest, embed, index, retrieve):
        prepare(run)
    capsys.readouterr()
    train(run)
    assert capsys.readouterr().err.splitlines()[0] == (
        f"train ra_cm3: rac3 {metadata.version('rac3')}, jax {jax.__version__}, jaxlib {jaxlib.__version__}; "
        "mesh of data 8 x fsdp 1 x tensor 1 on 8 cpu, 1 processes; "
        f"XLA_FLAGS: {os.environ['XLA_FLAGS'].strip()}; attention: plain"
    )

    model = calls["make_train_step"][0]
    assert model == run.model
    assert calls["build"] == (experiment.optimizer, experiment.training.steps)
    mesh = experiment.mesh.build()
    assert calls["new_state"][1:] == (results["build"], experiment.seed, mesh)
    optimizer, chunk, microbatches, max_skipped, schedule = calls["make_train_step"][1:]
    assert (optimizer, chunk, microbatches, max_skipped) == (results["build"], training.loss_chunk, 1, 7)
    assert float(schedule(2)) == float(experiment.optimizer.schedule(training.steps)(2)) > 0
    label, config, new, _, _, _, on_mesh, _, documents = calls["training_loop"]
    assert documents(()) == results["training_stream"].keys(StreamState())
    assert (label, config, on_mesh) == ("train ra_cm3", training, mesh)
    assert new == results["new_state"]
    assert results["training_stream"].seed == experiment.seed

    made = run.artifact(recipes.train)
    assert sorted(path.name for path in (made.folder / "checkpoints").iterdir()) == ["5", "6"]
    state = results["training_loop"]
    assert made.manifest["counts"]["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert jax.tree.structure(run.params) == jax.tree.structure(state.params)
    for one, other in zip(jax.tree.leaves(run.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(one, other)
    assert run.with_retriever(NoRetriever()).params is run.params  # what it retrieves leaves the model as it is
    assert run.with_retriever(NoRetriever()).trained_model().folder == made.folder

    sharded = Run(replace(experiment, mesh=MeshConfig(fsdp=2, tensor=2)), run.workdir).params
    kernel = sharded["params"]["blocks"]["mlp_in"]["kernel"]
    assert (kernel.shape, kernel.sharding.shard_shape(kernel.shape)) == ((2, 32, 64), (2, 16, 32))

    del calls["training_loop"]
    train(run)
    assert "training_loop" not in calls  # that is done


def test_microbatches_that_do_not_divide_the_rows_are_refused(tmp_path: Path):
    """Of 16 rows, each of the 8 devices has 2."""
    experiment = experiment_of(
        DOCUMENTS, batches=replace(TINY.batches, rows=16), training=replace(TINY.training, microbatches=4)
    )
    run = Run(replace(experiment, retriever=NoRetriever()), workdir_of(experiment, tmp_path / "workdir"))
    ingest(run)
    message = "training.microbatches=4 can't divide the 2 rows of each of the 8 shards .*; use a divisor of 2, or other"
    with pytest.raises(InputError, match=message):
        train(run)


class LeftError(Exception):
    pass


class Board:
    """Stands in for JAX's coordination service of two processes that come one after the other.

    What the first to come says stays; it leaves where it would wait for the other.
    """

    def __init__(self) -> None:
        self.said: dict[str, str] = {}

    def key_value_set(self, key: str, value: str) -> None:
        self.said[key] = value

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        return [(path, value) for path, value in self.said.items() if path.startswith(f"{key}/")]

    def wait_at_barrier(self, name: str, milliseconds: int) -> None:
        if len(self.said) < 2:
            raise LeftError


@pytest.mark.parametrize("package", ["jax", "jax.lib"])
def test_a_process_with_another_jax_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    experiment = experiment_of(DOCUMENTS, retriever=NoRetriever())
    run, board = Run(experiment, workdir_of(experiment, tmp_path / "workdir")), Board()
    with monkeypatch.context() as patch:
        patch.setattr(f"{package}.__version__", "0.0.1")
        with pytest.raises(LeftError):
            train(run, Processes(2, 1, board))
    with pytest.raises(InputError, match=r"^process 1 \(\S+\) has another jax than the others; start all"):
        train(run, Processes(2, 0, board))


@pytest.mark.parametrize("other", ["+", "-"])
def test_a_process_with_another_program_is_named_before_the_first_step(other: str):
    """The shapes are the same, and only one operation differs."""
    ran: list[int] = []
    state, batch = TrainState(jnp.int32(3), {}, ()), jnp.int32(4)

    def program(operation: str) -> Any:
        def step(state: TrainState, batch: jax.Array) -> jax.Array:
            result = state.step + batch if operation == "+" else state.step - batch
            jax.debug.callback(lambda each: ran.append(int(each)), result)
            return result

        return jax.jit(step)

    board = Board()
    with pytest.raises(LeftError):
        compared(program(other), Processes(2, 1, board))(state, batch)
    step = compared(program("+"), Processes(2, 0, board))
    if other == "+":
        assert [int(step(state, batch)) for _ in range(2)] == [7, 7]
    else:
        with pytest.raises(InputError, match=r"^process 1 \(\S+\) has another program than the others; start all"):
            step(state, batch)
    jax.effects_barrier()
    assert ran == ([7, 7] if other == "+" else [])
