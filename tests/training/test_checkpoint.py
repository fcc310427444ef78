"""Checkpoints: exact, on any mesh, never of another model, and never a damaged one."""

import random
import resource
import shutil
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rac3.config import InputError
from rac3.devices.mesh import MeshConfig
from rac3.model.transformer import TransformerConfig
from rac3.training.checkpoint import Checkpoints, SaveError
from rac3.training.optimizer import OptimizerConfig
from rac3.training.state import TrainState, new_state

MESHES = {
    "one": (MeshConfig(), 1),
    "many": (MeshConfig(fsdp=2, tensor=2), 8),
    "other": (MeshConfig(fsdp=4, tensor=2), 8),
}


OPTIMIZER = OptimizerConfig().build(10)


def initializer(**fields):
    model = TransformerConfig(**{"num_layers": 2, "embed": 16, "num_heads": 2, "mlp": 16} | fields).build(128, 8, 4)

    def init(key: jax.Array):
        ids = jnp.zeros((1, 2), jnp.int32)
        return model.init(key, ids, ids, ids, ids)

    return init


def abstract_state(**fields) -> TrainState:
    """On one device, but not there: only shapes and shardings."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def build(key: jax.Array) -> TrainState:
        params = nn.unbox(initializer(**fields)(key))
        return TrainState(jnp.zeros((), jnp.int32), params, OPTIMIZER.init(params))

    shapes = jax.eval_shape(build, jax.random.key(0))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


@cache
def state_on(mesh: str = "one", seed: int = 0) -> TrainState:
    config, devices = MESHES[mesh]
    return new_state(initializer(), OPTIMIZER, seed, config.build(jax.devices()[:devices])).create()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainState]:
    """Steps 3, 5 and 7 of a state on eight devices, each another in all its leaves, and the last of them."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = Checkpoints(folder, keep=2)
    for step in (3, 5, 7):
        state = jax.tree.map(lambda x, step=step: x + jnp.asarray(step, x.dtype), state_on("many"))
        checkpoints.save(step, state, [step, 1])
    checkpoints.close()
    return folder, state


def assert_equal(one, other) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(one)
    for (path, leaf), same in zip(leaves, jax.tree.leaves(other), strict=True):
        assert leaf.dtype == same.dtype
        np.testing.assert_array_equal(leaf, same, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("mesh", MESHES)
def test_the_newest_state_comes_back_on_any_mesh(saved, mesh):
    folder, state = saved
    like = state_on(mesh, seed=1)
    checkpoints = Checkpoints(folder)
    restored, position = checkpoints.restore(like)
    checkpoints.close()
    assert position == [7, 1]
    assert_equal(restored, state)
    assert jax.tree.structure(restored) == jax.tree.structure(like)
    for one, other in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)


def test_the_newest_parameters_alone(saved):
    folder, state = saved
    checkpoints = Checkpoints(folder)
    params = checkpoints.restore_params(state_on("other", seed=1).params)
    checkpoints.close()
    assert_equal(params, state.params)


def test_older_checkpoints_go(saved):
    assert {path.name for path in saved[0].iterdir()} == {"5", "7"}


def test_nothing_to_restore(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.restore(abstract_state()) is None
    with pytest.raises(InputError, match="no checkpoint; run `rac3 train` first"):
        checkpoints.restore_params(abstract_state().params)
    checkpoints.close()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mlp": 32}, r"mlp_in/bias is \(2, 16\) there, \(2, 32\) in this config"),
        ({"num_layers": 3}, "is of another model"),
        ({"offset_embedding": False}, r"offset_embedding is \(5, 16\) there, missing in this config"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(saved, fields, message):
    like = abstract_state(**fields)
    checkpoints = Checkpoints(saved[0])
    with pytest.raises(InputError, match=message):
        checkpoints.restore(like)
    with pytest.raises(InputError, match=message):
        checkpoints.restore_params(like.params)
    checkpoints.close()


def test_abstract_parameters_will_do(saved):
    """As `rac3 evaluate` does, which never allocates the parameters that it is about to read."""
    folder, state = saved
    checkpoints = Checkpoints(folder)
    assert_equal(checkpoints.restore_params(abstract_state().params), state.params)
    checkpoints.close()


def small_state(seed: int) -> TrainState:
    """The kernel is too large for orbax to keep it next to its own (checked) tables."""
    rng = np.random.default_rng(seed)
    params = {"kernel": rng.normal(size=(64, 96)).astype(np.float32), "bias": rng.normal(size=4).astype(np.float32)}
    return jax.device_put(TrainState(np.int32(seed), params, {"mean": params["bias"] / 2}), jax.devices()[0])


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    checkpoints = Checkpoints(folder)
    for step in (5, 7):
        checkpoints.save(step, small_state(step), [step, 1])
    checkpoints.close()
    return folder


@pytest.fixture
def folder(two: Path, tmp_path: Path) -> Path:
    """Checkpoints 5 and 7, to damage."""
    return shutil.copytree(two, tmp_path / "checkpoints")


def restored(folder: Path) -> int:
    """The step of the state that is restored, which must be one that was saved, bit for bit."""
    checkpoints = Checkpoints(folder)
    state, position = checkpoints.restore(small_state(0))
    checkpoints.close()
    assert position[1] == 1
    assert_equal(state, small_state(position[0]))
    return position[0]


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def leaves_errors_behind(test: Callable) -> Callable:
    ignored = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    return pytest.mark.usefixtures("collects")(ignored(test))


@leaves_errors_behind
def test_a_flipped_bit_anywhere_is_found_or_harmless(folder: Path, capfd: pytest.CaptureFixture[str]):
    rng = random.Random(0)
    found = set()
    for path in files(folder / "7"):
        data = path.read_bytes()
        for place in rng.sample(range(len(data)), 3):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :])
            if restored(folder) == 5:
                found.add(path.relative_to(folder))
                (folder / "7.damaged").rename(folder / "7")
        path.write_bytes(data)
    assert restored(folder) == 7
    assert Path("7/record/metadata") in found
    assert any(path.stat().st_size > small_state(0).params["kernel"].nbytes / 2 for path in map(folder.joinpath, found))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def largest(step: Path) -> Path:
    return max(files(step), key=lambda path: path.stat().st_size)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a truncated file": lambda step: truncated(largest(step)),
    "a missing file": lambda step: largest(step).unlink(),
    "no record": lambda step: shutil.rmtree(step / "record"),
    "no arrays": lambda step: shutil.rmtree(step / "state"),
    "an empty folder": emptied,
}


@leaves_errors_behind
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(
    folder: Path, capfd: pytest.CaptureFixture[str], damage: str
):
    DAMAGES[damage](folder / "7")
    checkpoints = Checkpoints(folder)
    state, position = checkpoints.restore(small_state(0))
    assert position == [5, 1]
    assert_equal(state, small_state(5))
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("rac3: ")]
    assert len(told) == 1
    assert told[0].startswith(f"rac3: checkpoint {folder}/7 is damaged (its ")
    assert told[0].endswith("); set aside as 7.damaged, going on from 5")
    assert {path.name for path in folder.iterdir()} == {"5", "7.damaged"}
    for step in (6, 7):  # it goes on, and gets to 7 again
        checkpoints.save(step, small_state(step), [step, 1])
    checkpoints.close()
    assert {path.name for path in folder.iterdir()} == {"6", "7", "7.damaged"}
    DAMAGES[damage](folder / "7")
    assert restored(folder) == 6
    assert {path.name for path in folder.iterdir()} == {"6", "7.damaged", "7.damaged-2"}


def test_if_all_are_damaged_none_is_touched(folder: Path):
    for step in ("5", "7"):
        emptied(folder / step)
    checkpoints = Checkpoints(folder)
    with pytest.raises(
        InputError, match=r"^all checkpoints in \S+ are damaged \(7: its record .*; 5: its .*\); put back"
    ):
        checkpoints.restore(small_state(0))
    checkpoints.close()
    assert {path.name for path in folder.iterdir()} == {"5", "7"}


@leaves_errors_behind
def test_a_damaged_model_is_not_used(folder: Path):
    """A model that is evaluated is the one that was trained to the end, not one before it."""
    truncated(largest(folder / "7"))
    checkpoints = Checkpoints(folder)
    with pytest.raises(
        InputError, match=r"checkpoint \S+/7 is damaged .*; put back a copy, or delete .* and train again"
    ):
        checkpoints.restore_params(small_state(0).params)
    checkpoints.close()


def save_and_check(checkpoints: Checkpoints) -> None:
    checkpoints.save(7, small_state(7), [7, 1])
    end = time.monotonic() + 30
    while time.monotonic() < end:
        checkpoints.check()


@leaves_errors_behind
@pytest.mark.parametrize("keep", [1, 2])
def test_a_checkpoint_that_cannot_be_written_leaves_those_before(tmp_path: Path, keep: int):
    """A process that may write no file above 8 kB, as on a full disk: the kernel's is larger."""
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder, keep)
    checkpoints.save(5, small_state(5), [5, 1])
    checkpoints.manager.wait_until_finished()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, before[1]))
    failed = rf"^the checkpoint of step 7 can't be written to {folder}: File too large; once that is fixed, run "
    try:
        with pytest.raises(SaveError, match=failed + "the same command to go on from step 5$"):
            save_and_check(checkpoints)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in folder.iterdir()] == ["5"]
    assert restored(folder) == 5
