"""What encoders are fitted on, and that a step's rows are a function of the seed and the step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from plain_adam import plain_adam

from rac3.config import InputError
from rac3.devices.mesh import MeshConfig
from rac3.documents.document import Document, Reject, Text
from rac3.documents.world import World
from rac3.experiment import Data, Experiment
from rac3.stages.fit import encoder as encoder_module
from rac3.stages.fit.encoder import FitTask, adam, fit_encoder, fitting_documents, one_each, read_documents
from rac3.training.loop import TrainingConfig
from rac3.training.state import TrainState, apply_gradients
from rac3.weights.fitting import FitConfig


@dataclass(frozen=True)
class Shelf:
    """A source of shards a, b and c with so many documents each; the first of a shard is damaged, the second unsafe."""

    name: str
    sizes: tuple[int, int, int]

    def shards(self, data_dir: Path) -> Sequence[str]:
        return [f"{data_dir}/{shard}" for shard in "abc"]

    def read(self, data_dir: Path, shard: str) -> Iterator[Document | Reject]:
        yield Reject("damaged", "image")
        yield Document("unsafe", (Text("x"),), {"punsafe": 0.9})
        for number in range(self.sizes["abc".index(shard.removeprefix(f"{data_dir}/"))]):
            yield Document(f"{self.name}:{shard.removeprefix(f'{data_dir}/')}{number}", (Text("x"),), {"punsafe": 0.1})


DATA = Data(Shelf("train", (5, 1, 6)), {"memory": Shelf("memory", (2, 2, 2))}, fit_on=("train",))
EXPERIMENT = Experiment(name="shelves", data=DATA, data_dir="/somewhere")


def keys(documents: list[Document]) -> list[str]:
    return [document.key for document in documents]


def test_documents_to_fit_on_come_evenly_from_all_shards_and_pass_the_filter():
    few = ["train:a0", "train:a1", "train:b0", "train:c0", "train:c1"]
    assert keys(fitting_documents(EXPERIMENT, 6)) == few  # two of each shard that has them
    assert keys(fitting_documents(EXPERIMENT, 5)) == few
    assert keys(fitting_documents(EXPERIMENT, 4)) == few[:4]
    assert keys(fitting_documents(EXPERIMENT, 3)) == ["train:a0", "train:b0", "train:c0"]
    assert len(fitting_documents(EXPERIMENT, 1000)) == 12


def test_encoders_are_fitted_on_the_sources_that_are_named():
    both = replace(EXPERIMENT, data=replace(DATA, fit_on=("train", "memory")))
    assert keys(fitting_documents(both, 6)) == [f"{split}:{shard}0" for split in ("train", "memory") for shard in "abc"]
    memory = replace(EXPERIMENT, data=replace(DATA, fit_on=("memory",), withdrawn=("memory",)))
    assert keys(fitting_documents(memory, 2)) == ["memory:a0", "memory:b0"]  # a withdrawn part has been fitted on
    assert keys(read_documents(EXPERIMENT, ["memory"], 1)) == ["memory:a0"]
    with pytest.raises(InputError, match="of train gives no documents that pass the filter"):
        fitting_documents(replace(EXPERIMENT, data=replace(DATA, train=Shelf("train", (0, 0, 0)))), 6)


def test_encoders_are_fitted_by_adam_with_a_short_warm_up_and_decay():
    """Of 20 steps, two warm up. Clipping at 1, and a decay of 0.01 of matrices."""
    settings = {"peak_lr": 0.1, "b1": 0.5, "b2": 0.9}
    optimizer = adam(FitConfig(steps=7, **settings), 20)
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}
    gradients = [{name: rng.normal(size=value.shape) for name, value in params.items()} for _ in range(5)]
    *_, expected = plain_adam(
        params, gradients, decays="kernel", steps=20, warmup=2, eps=1e-8, weight_decay=0.01, clip_norm=1.0, **settings
    )
    got = jax.tree.map(jnp.float32, params)
    state, update = optimizer.init(got), jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(jax.tree.map(jnp.float32, gradient), state, got)
        got = optax.apply_updates(got, updates)
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5)


ITEMS, FROZEN, EIGHT = 10, 0.5, MeshConfig()


def fit(folder: Path, steps: int, seed: int = 0, mesh: MeshConfig = EIGHT) -> tuple[list[list[int]], float]:
    """Fits a number that goes down by FROZEN times the mean of a step's rows; the rows of each step, and its end."""
    rows_of_steps: list[list[int]] = []
    optimizer = optax.sgd(1.0)

    def batch(rows: np.ndarray) -> np.ndarray:
        rows_of_steps.append(rows.tolist())
        return rows.astype(np.float32)

    def start(state: TrainState, mesh: jax.sharding.Mesh) -> TrainState:
        return state.replace(extra=jax.device_put(jnp.float32(100), state.step.sharding))

    def step(state: TrainState, batch: jax.Array, frozen: jax.Array):
        gradient = {"number": frozen * jnp.mean(batch)}
        return apply_gradients(state, gradient, optimizer, state.extra + 1), one_each({"loss": gradient["number"]})

    made = FitTask(
        "fit", lambda key: {"number": jax.random.normal(key, ())}, optimizer, step, ITEMS, batch, start,
        jnp.float32(FROZEN),
    )  # fmt: skip
    experiment = Experiment(name="fit", data=Data(World("train")), seed=seed, mesh=mesh)
    state = fit_encoder(experiment, FitConfig(steps=steps, batch=12), made, folder)
    assert int(state.step) == float(state.extra) - 100 == steps
    return rows_of_steps, float(state.params["number"])


def test_an_encoder_is_fitted_on_rows_of_the_seed_and_the_step(tmp_path: Path):
    rows, end = fit(tmp_path / "one", 4)
    assert [len(each) for each in rows] == [16] * 4  # 12, rounded up to a multiple of 8 devices
    assert {row for each in rows for row in each} == set(range(ITEMS))
    assert len({tuple(each) for each in rows}) == 4
    first = jax.random.normal(jax.random.key(0), ())
    assert end == pytest.approx(float(first) - FROZEN * sum(np.mean(each) for each in rows), rel=1e-5)

    other, other_end = fit(tmp_path / "two", 2, seed=1, mesh=MeshConfig(data=2, tensor=4))
    assert [len(each) for each in other] == [12] * 2  # two parts; tensor parallelism splits no rows
    assert other[0] != rows[0][:12]
    first = jax.random.normal(jax.random.key(1), ())
    assert other_end == pytest.approx(float(first) - FROZEN * sum(np.mean(each) for each in other), rel=1e-5)


def test_fitting_goes_on_where_it_stopped(tmp_path: Path):
    whole, end = fit(tmp_path / "whole", 4)
    first, _ = fit(tmp_path / "parts", 2)
    rest, resumed_end = fit(tmp_path / "parts", 4)
    assert first + rest == whole
    assert resumed_end == end


@pytest.mark.parametrize(("steps", "every"), [(1000, 200), (100, 50)])
def test_a_long_fit_is_saved_a_few_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, every: int):
    seen = []

    def watched(label: str, config: TrainingConfig, state: TrainState, *rest) -> TrainState:
        seen.append((config.steps, config.checkpoint_every, config.keep, rest[2], rest[3]))
        return state.replace(step=jnp.int32(steps), extra=jnp.int32(100 + steps))

    monkeypatch.setattr(encoder_module, "training_loop", watched)
    fit(tmp_path, steps)
    assert seen == [(steps, every, 1, [0], tmp_path)]


def test_two_processes_share_the_rows_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def watched(label: str, config: TrainingConfig, state: TrainState, step, stream, *rest) -> TrainState:
        whole, place = next(stream([2]))
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        halves = []
        for process in (0, 1):
            monkeypatch.setattr(jax, "process_index", lambda process=process: process)
            half, its_place = next(stream([2]))
            assert (len(half), its_place) == (8, place)
            halves.append(half)
        monkeypatch.undo()
        assert np.concatenate(halves).tolist() == whole.tolist()
        return state.replace(step=jnp.int32(4), extra=jnp.int32(104))

    monkeypatch.setattr(encoder_module, "training_loop", watched)
    fit(tmp_path, 4)
