"""What fitting an encoder reads: which documents, and which rows at each step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_config

from rac3.config import InputError
from rac3.documents.document import Document, Reject, Text
from rac3.experiment import Data, FitConfig
from rac3.sharding import MeshConfig
from rac3.stages import fitting
from rac3.stages.fitting import Fitting, adam, fit_encoder, fitting_documents, read_documents
from rac3.training.loop import TrainingConfig
from rac3.training.state import TrainState


@dataclass(frozen=True)
class Numbered:
    """Two shards of five samples: one that is damaged, one with a watermark, and three documents."""

    name: str

    def shards(self, data_dir: Path) -> Sequence[str]:
        return [f"{data_dir}/a", f"{data_dir}/b"]

    def read(self, data_dir: Path, shard: str) -> Iterator[Document | Reject]:
        yield Reject("0", "damaged")
        for number in range(1, 5):
            key = f"{self.name}{shard.removeprefix(f'{data_dir}/')}{number}"
            yield Document(key, (Text("a fox"),), {"pwatermark": 0.9 if number == 1 else 0.1})


EXPERIMENT = replace(
    tiny_config.get_config(),
    data_dir="/data",
    data=Data(
        Numbered("train"),
        {"news": Numbered("news"), "old": Numbered("old")},
        withdrawn=("old",),
        validation=Numbered("validation"),
        test=Numbered("test"),
        fit_on=("train", "old"),  # a part that was withdrawn has been fitted on
    ),
)


@pytest.mark.parametrize(
    ("limit", "keys"),
    [
        (1, "a2"),
        (2, "a2 b2"),
        (3, "a2 a3 b2"),
        (4, "a2 a3 b2 b3"),
        (5, "a2 a3 a4 b2 b3"),
        (99, "a2 a3 a4 b2 b3 b4"),
    ],
)
def test_documents_are_read_evenly_from_all_shards(limit: int, keys: str):
    found = read_documents(EXPERIMENT, ["train"], limit)
    assert [document.key for document in found] == [f"train{key}" for key in keys.split()]


def test_encoders_are_fitted_on_what_fit_on_names_alone():
    found = [document.key for document in fitting_documents(EXPERIMENT, 8)]
    assert found == ["traina2", "traina3", "trainb2", "trainb3", "olda2", "olda3", "oldb2", "oldb3"]


def test_no_documents_that_pass_is_an_error():
    experiment = replace(EXPERIMENT, filter=replace(EXPERIMENT.filter, max_watermark=0.05))
    with pytest.raises(InputError, match="the source of validation and test gives no documents that pass the filter"):
        read_documents(experiment, ["validation", "test"], 5)


def steps_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int, config: FitConfig, start: int = 0) -> dict:
    """What the training loop is given by `fit_encoder`: the rows of three steps among others."""
    seen: dict[str, Any] = {}

    def fit(label, training, state, step, stream, first, folder, mesh_config, mesh) -> TrainState:
        batches = stream([start])
        taken = [next(batches) for _ in range(3)]
        seen.update(training=training, first=first, rows=[np.asarray(rows) for rows, _ in taken])
        seen["positions"] = [list(position) for _, position in taken]
        seen["state"], _ = step(state, jnp.zeros(()))
        return state

    def step(state: TrainState, batch: Any, frozen: Any) -> tuple[TrainState, dict]:
        return state.replace(params={"w": state.params["w"] + frozen}), {}

    def begin(state: TrainState, mesh: Any) -> TrainState:
        return state.replace(extra=jnp.float32(7))

    given = Fitting(
        "fit", lambda key: {"w": jnp.zeros(())}, optax.sgd(1.0), step, 1000, lambda rows: rows, begin, jnp.float32(5)
    )
    monkeypatch.setattr(fitting, "fit", fit)
    experiment = replace(EXPERIMENT, seed=seed, mesh=MeshConfig(data=4, fsdp=2))
    fit_encoder(experiment, config, given, tmp_path)
    return seen


def test_the_rows_of_a_step_follow_from_seed_and_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    config = FitConfig(steps=40, batch=20)
    seen, again, other, later = (
        steps_of(monkeypatch, tmp_path, seed, config, start) for seed, start in ((0, 0), (0, 0), (1, 0), (0, 1))
    )
    assert seen["first"] == [0]
    assert seen["positions"] == [[1], [2], [3]]
    assert seen["training"] == TrainingConfig(steps=40, checkpoint_every=50, log_every=20, keep=1)
    assert all(rows.shape == (24,) for rows in seen["rows"])  # 20, rounded up to a multiple of the 8 parts of the mesh
    everything = np.concatenate([rows for run in (seen, other) for rows in run["rows"]])
    assert (everything.min() >= 0) & (everything.max() < 1000) & (len(np.unique(everything)) > 100)
    np.testing.assert_array_equal(seen["rows"], again["rows"])
    np.testing.assert_array_equal(seen["rows"][1:], later["rows"][:2])
    for one in range(3):
        assert not np.array_equal(seen["rows"][one], seen["rows"][(one + 1) % 3])
        assert not np.array_equal(seen["rows"][one], other["rows"][one])
    assert (jax.device_get(seen["state"].params["w"]), seen["state"].extra) == (5, 7)


def test_the_optimizer_is_adam_as_the_fit_says():
    """Two steps by hand on a bias, which does not decay: of 100 steps, ten are warm-up from 0."""
    rule = adam(FitConfig(peak_lr=0.1, b1=0.5, b2=0.9), steps=100)
    params = {"bias": jnp.float32(1.0)}
    state, first, second = rule.init(params), 0.3, 0.1
    _, state = rule.update({"bias": jnp.float32(first)}, state, params)  # at a learning rate of 0
    updates, _ = rule.update({"bias": jnp.float32(second)}, state, params)
    mean = (0.5 * 0.5 * first + 0.5 * second) / (1 - 0.5**2)
    square = (0.9 * 0.1 * first**2 + 0.1 * second**2) / (1 - 0.9**2)
    np.testing.assert_allclose(updates["bias"], -0.01 * mean / np.sqrt(square), rtol=1e-4)
