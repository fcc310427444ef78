"""The fit of an encoder: its optimizer, and that a step's rows are a function of the seed and the step."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from plain_adam import plain_adam

from rac3.devices.mesh import DeviceMesh, MeshConfig
from rac3.stages.fit import encoder as encoder_module
from rac3.stages.fit.encoder import FitTask, adam, fit_encoder
from rac3.training.loop import TrainingConfig
from rac3.training.state import NewState, TrainState, apply_gradients, new_state, one_each
from rac3.weights.fitting import FitConfig


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


def fit(
    folder: Path, steps: int, seed: int = 0, config: MeshConfig = EIGHT, create: Callable[[], TrainState] | None = None
) -> tuple[list[list[int]], float]:
    """Fits a number that goes down by FROZEN times the mean of a step's rows; the rows of each step, and its end.

    `create` takes the place of what makes the new state.
    """
    rows_of_steps: list[list[int]] = []
    optimizer, mesh = optax.sgd(1.0), config.build()

    def batch(rows: np.ndarray) -> np.ndarray:
        rows_of_steps.append(rows.tolist())
        return rows.astype(np.float32)

    def step(state: TrainState, batch: jax.Array, frozen: jax.Array):
        gradient = {"number": frozen * jnp.mean(batch)}
        return apply_gradients(state, gradient, optimizer, state.extra + 1), one_each({"loss": gradient["number"]})

    bare = new_state(lambda key: {"number": jax.random.normal(key, ())}, optimizer, seed, mesh)
    count = jax.device_put(jnp.float32(100), mesh.sharding())
    abstract = bare.abstract.replace(extra=mesh.abstract(count))
    new = NewState(abstract, create or (lambda: bare.create().replace(extra=count)))
    task = FitTask("fit", new, step, ITEMS, batch, jnp.float32(FROZEN))
    state = fit_encoder(FitConfig(steps=steps, batch=12), task, seed, mesh, folder)
    assert int(state.step) == float(state.extra) - 100 == steps
    return rows_of_steps, float(state.params["number"])


def test_an_encoder_is_fitted_on_rows_of_the_seed_and_the_step(tmp_path: Path):
    rows, end = fit(tmp_path / "one", 4)
    assert [len(each) for each in rows] == [16] * 4  # 12, rounded up to a multiple of 8 devices
    assert {row for each in rows for row in each} == set(range(ITEMS))
    assert len({tuple(each) for each in rows}) == 4
    first = jax.random.normal(jax.random.key(0), ())
    assert end == pytest.approx(float(first) - FROZEN * sum(np.mean(each) for each in rows), rel=1e-5)

    other, other_end = fit(tmp_path / "two", 2, seed=1, config=MeshConfig(data=2, tensor=4))
    assert [len(each) for each in other] == [12] * 2  # two parts; tensor parallelism splits no rows
    assert other[0] != rows[0][:12]
    first = jax.random.normal(jax.random.key(1), ())
    assert other_end == pytest.approx(float(first) - FROZEN * sum(np.mean(each) for each in other), rel=1e-5)


def test_fitting_goes_on_where_it_stopped(tmp_path: Path):
    whole, end = fit(tmp_path / "whole", 4)
    first, _ = fit(tmp_path / "parts", 2)

    def no_new_state() -> TrainState:
        raise AssertionError("a resumed fit makes a new state")

    rest, resumed_end = fit(tmp_path / "parts", 4, create=no_new_state)
    assert first + rest == whole
    assert resumed_end == end


@pytest.mark.parametrize(("steps", "every"), [(1000, 200), (100, 50)])
def test_a_long_fit_is_saved_a_few_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, every: int):
    seen = []

    def watched(label: str, config: TrainingConfig, new: NewState, step, stream, folder: Path, _) -> TrainState:
        seen.append((config.steps, config.checkpoint_every, config.keep, folder))
        return new.create().replace(step=jnp.int32(steps), extra=jnp.int32(100 + steps))

    monkeypatch.setattr(encoder_module, "training_loop", watched)
    fit(tmp_path, steps)
    assert seen == [(steps, every, 1, tmp_path)]


def test_two_processes_share_the_rows_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    read = []

    def watched(label: str, config: TrainingConfig, new: NewState, step, stream, *rest) -> TrainState:
        read.append(next(stream([2])))
        return new.create().replace(step=jnp.int32(4), extra=jnp.int32(104))

    monkeypatch.setattr(encoder_module, "training_loop", watched)
    for share in ((1, 0), (2, 0), (2, 1)):
        monkeypatch.setattr(DeviceMesh, "share", lambda mesh, rows, share=share: share)
        fit(tmp_path, 4)
    (whole, place), *halves = read
    assert [(len(half), its_place) for half, its_place in halves] == [(8, place)] * 2
    assert np.concatenate([half for half, _ in halves]).tolist() == whole.tolist()
