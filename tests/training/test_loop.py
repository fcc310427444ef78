"""The loop: a run that is killed and resumed ends as one that is not."""

import contextlib
import dataclasses
import gc
import gzip
import json
import struct
import types
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tensorboardX.proto.event_pb2 import Event, SessionLog

from rac3.batches.packing import PackedBatch
from rac3.config import InputError
from rac3.devices.mesh import MeshConfig
from rac3.model.transformer import TransformerConfig
from rac3.training import loop, metrics
from rac3.training.checkpoint import Checkpoints
from rac3.training.flops import PEAKS, step_flops
from rac3.training.loop import TrainingConfig, put, training_loop
from rac3.training.metrics import METRICS_FILE, MetricsWriter, read_metrics
from rac3.training.optimizer import OptimizerConfig
from rac3.training.state import NewState, TrainState, new_state
from rac3.training.step import make_train_step

MODEL = TransformerConfig(num_layers=1, embed=16, num_heads=2, mlp=16, dtype="float32").build(128, 16, 4)
MESH = MeshConfig(fsdp=2, tensor=2).build()
CONFIG = TrainingConfig(steps=13, checkpoint_every=4, log_every=3)
LOGGED = [3, 4, 6, 8, 9, 12, 13]
OPTIMIZER = OptimizerConfig(peak_lr=1e-2).build(CONFIG.steps)


class StopHereError(Exception):
    pass


def batch_at(place: int) -> PackedBatch:
    rng = np.random.default_rng(place)
    ids = rng.integers(1, 128, (8, 17)).astype(np.int32)
    ones, places = np.ones((8, 16), np.int32), np.repeat(np.arange(16, dtype=np.int32)[None], 8, 0)
    return PackedBatch(ids[:, :-1], ids[:, 1:], ones, places, 0 * ones, ones.astype(np.float32), ones)


class Stream:
    """Batches by position: two numbers, as those of the loader. Stops before batch `stop`, and notes where it began."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop = stop
        self.starts: list[list[int]] = []

    def __call__(self, position: Sequence[int]) -> Iterator[tuple[PackedBatch, Sequence[int]]]:
        self.starts.append(list(position))
        row, column = position or (0, 0)
        place = row * 5 + column
        while place != self.stop:
            place += 1
            yield batch_at(place - 1), list(divmod(place, 5))
        raise StopHereError


@pytest.fixture(scope="module")
def step():
    return make_train_step(MODEL, OPTIMIZER)


@cache
def initial() -> NewState:
    """The state that every run here starts from. It is kept in host memory, as steps donate theirs."""

    def init(key: jax.Array):
        ids = jnp.zeros((1, 2), jnp.int32)
        return MODEL.init(key, ids, ids, ids, ids)

    new = new_state(init, OPTIMIZER, 0, MESH)
    with MESH.use():
        values = jax.device_get(new.create())
    shardings = jax.tree.map(lambda leaf: leaf.sharding, new.abstract)
    return NewState(new.abstract, lambda: jax.device_put(values, shardings))


def run(
    folder: Path, step, stream: loop.Stream, config: TrainingConfig = CONFIG, new: NewState | None = None
) -> TrainState:
    return training_loop("train", config, new or initial(), step, stream, folder, MESH)


@pytest.fixture(scope="module")
def uninterrupted(step, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainState, list[dict]]:
    folder = tmp_path_factory.mktemp("whole")
    return run(folder, step, Stream()), read_metrics(folder)


@pytest.mark.parametrize(("stop", "start"), [(9, [1, 3]), (3, []), (4, [0, 4])])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, step, uninterrupted, stop: int, start: list[int]):
    """Stopped after a checkpoint, before the first one, and right at one; then run again."""
    with pytest.raises(StopHereError):
        run(tmp_path, step, Stream(stop))
    again = Stream()
    state = run(tmp_path, step, again)
    assert again.starts == [start]
    whole, lines = uninterrupted
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(one, other)
    timings = {"step_seconds", "input_wait_seconds", "tokens_per_second"}
    resumed = read_metrics(tmp_path)
    assert [line["step"] for line in resumed] == LOGGED
    for one, other in zip(resumed, lines, strict=True):
        assert one.keys() == other.keys()
        assert all(one[name] == other[name] for name in one.keys() - timings)


def no_new_state() -> TrainState:
    raise AssertionError("a resumed run makes a new state")


def live_bytes() -> int:
    """Of all arrays on the devices of this process."""
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def test_a_resumed_run_never_makes_a_new_state_and_holds_one(tmp_path: Path, step):
    with pytest.raises(StopHereError):
        run(tmp_path, step, Stream(9))
    held, before = [], live_bytes()

    def watched(state: TrainState, batch: PackedBatch):
        held.append(live_bytes() - before - sum(leaf.nbytes for leaf in jax.tree.leaves(batch)))
        return step(state, batch)

    abstract = initial().abstract
    run(tmp_path, watched, Stream(), new=NewState(abstract, no_new_state))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    until_it_is_saved = held[:4]  # steps 9 to 12; orbax has copies while it writes
    assert size <= min(until_it_is_saved)
    assert max(until_it_is_saved) < 1.02 * size  # the rest is metrics


def test_a_finished_run_is_left_as_it_is(tmp_path: Path, step, uninterrupted):
    run(tmp_path, step, Stream())
    again = Stream(stop=0)
    state = run(tmp_path, step, again, new=NewState(initial().abstract, no_new_state))
    assert again.starts == []
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(uninterrupted[0]), strict=True):
        np.testing.assert_array_equal(one, other)
    assert [line["step"] for line in read_metrics(tmp_path)] == LOGGED


def test_checkpoints_are_every_so_many_steps_and_at_the_end(tmp_path: Path, step, uninterrupted):
    """Of 4, 8, 12 and 13, the last three; the newest holds the final state and its stream's place, 13 = 2 * 5 + 3."""
    run(tmp_path, step, Stream(), dataclasses.replace(CONFIG, keep=3))
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [8, 12, 13]
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    state, position = checkpoints.restore(uninterrupted[0])
    checkpoints.close()
    assert position == [2, 3]
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(uninterrupted[0]), strict=True):
        np.testing.assert_array_equal(one, other)


def test_all_lines_up_to_a_checkpoint_are_on_disk_before_it(tmp_path: Path, step, monkeypatch: pytest.MonkeyPatch):
    """A run that is killed right after a checkpoint resumes from it and writes none of these lines again."""
    save, seen = Checkpoints.save, []

    def watched(self: Checkpoints, number: int, *rest) -> None:
        seen.append((number, [line["step"] for line in read_metrics(tmp_path)]))
        save(self, number, *rest)

    monkeypatch.setattr(Checkpoints, "save", watched)
    run(tmp_path, step, Stream())
    assert seen == [(number, [line for line in LOGGED if line <= number]) for number in (4, 8, 12, 13)]


def test_steps_run_on_the_mesh(tmp_path: Path, step):
    seen = []

    def watched(state: TrainState, batch: PackedBatch):
        seen.append((jax.sharding.get_abstract_mesh().shape, batch.tokens.sharding.shard_shape(batch.tokens.shape)))
        return step(state, batch)

    run(tmp_path, watched, Stream(), dataclasses.replace(CONFIG, steps=1))
    assert seen == [({"data": 2, "fsdp": 2, "tensor": 2}, (2, 16))]


def test_a_step_takes_over_the_memory_of_its_state(step):
    state = initial().create()
    with MESH.use():
        step(state, put(batch_at(0), MESH))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_metrics_are_means_over_their_window(tmp_path: Path, step, uninterrupted):
    """Against a run that writes every step."""
    run(tmp_path, step, Stream(), dataclasses.replace(CONFIG, log_every=1))
    each = {line["step"]: line for line in read_metrics(tmp_path)}
    start = 0
    for line in uninterrupted[1]:
        steps = range(start + 1, line["step"] + 1)
        for name in ("loss", "gradient_norm", "loss/main/text"):
            assert line[name] == pytest.approx(np.mean([each[number][name] for number in steps]), rel=1e-6)
        assert line["tokens_per_second"] * line["step_seconds"] == pytest.approx(8 * 16)
        assert 0 <= line["input_wait_seconds"] <= line["step_seconds"]
        assert "loss/retrieved/image" not in line  # there are none: no loss of 0
        start = line["step"]
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert events.count(b"loss/main/text") == CONFIG.steps


def test_rates_are_those_of_the_window(tmp_path: Path, step, monkeypatch: pytest.MonkeyPatch):
    """By a clock that only the stream (2 s a batch) and the step (3 s) move: 5 s for 8 x 16 tokens."""
    clock = types.SimpleNamespace(now=0.0)
    for module in (loop, metrics):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: clock.now))

    def stream(position: Sequence[int]) -> Iterator[tuple[PackedBatch, Sequence[int]]]:
        for pair in Stream()(position):
            clock.now += 2
            yield pair

    def timed(state: TrainState, batch: PackedBatch):
        clock.now += 3
        return step(state, batch)

    run(tmp_path, timed, stream)
    for line in read_metrics(tmp_path):
        assert (line["step_seconds"], line["input_wait_seconds"], line["tokens_per_second"]) == (5, 2, 8 * 16 / 5)


def test_a_resumed_run_writes_over_the_lines_it_repeats(tmp_path: Path):
    writer = MetricsWriter(tmp_path, 0)
    for number in (10, 20, 30):
        writer.write(number, {"loss": float(number)})
    writer.close()
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 40, "lo')  # truncated by a kill
    assert [line["step"] for line in read_metrics(tmp_path)] == [10, 20, 30]
    writer = MetricsWriter(tmp_path, 20)
    writer.write(30, {"loss": 0.5})
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert lines == [{"step": 10, "loss": 10.0}, {"step": 20, "loss": 20.0}, {"step": 30, "loss": 0.5}]
    assert read_metrics(tmp_path / "nothing") == []


def test_tensorboard_has_each_number_at_its_step(tmp_path: Path):
    """By the records of the event file: a length of 8 bytes, a sum of 4, the event, a sum of 4."""
    writer = MetricsWriter(tmp_path, 20)
    for number in (24, 30):
        writer.write(number, {"loss": number / 4, "loss/main/text": 0.5})
    writer.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, place, events = path.read_bytes(), 0, []
    while place < len(data):
        (size,) = struct.unpack_from("<Q", data, place)
        events.append(Event.FromString(data[place + 12 : place + 12 + size]))
        place += size + 16
    found = [(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value]
    assert found == [
        (24, "loss", 6.0), (24, "loss/main/text", 0.5), (30, "loss", 7.5), (30, "loss/main/text", 0.5)
    ]  # fmt: skip
    starts = [event.step for event in events if event.session_log.status == SessionLog.START]
    assert starts == [21]  # what an earlier run has from there on is not shown


def test_only_the_first_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    writer = MetricsWriter(tmp_path, 0)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_put_shards_the_rows_over_data_and_fsdp():
    batch = put(batch_at(0), MESH)
    expected = NamedSharding(MESH.jax_mesh, PartitionSpec(("data", "fsdp")))
    for field, whole in zip(jax.tree.leaves(batch), jax.tree.leaves(batch_at(0)), strict=True):
        assert field.sharding.is_equivalent_to(expected, 2)
        np.testing.assert_array_equal(field, whole)


def broken(bad: set[int]):
    """The stream, with a weight that is no number in the batches of these steps."""

    def stream(position: Sequence[int]) -> Iterator[tuple[PackedBatch, Sequence[int]]]:
        row, column = position or (0, 0)
        for step, (batch, after) in enumerate(Stream()(position), row * 5 + column + 1):
            weight = np.where(np.arange(16) == 3, np.nan, 1.0) * np.ones((8, 1))
            yield (batch.replace(loss_weight=weight.astype(np.float32)) if step in bad else batch), after

    return stream


def keys_at(position: Sequence[int]) -> list[str]:
    row, column = position or (0, 0)
    return [f"document {row * 5 + column}", "b", "c", "d"]


def run_broken(folder: Path, bad: set[int], config: TrainingConfig) -> TrainState:
    guarded = make_train_step(MODEL, OPTIMIZER, max_skipped=config.max_skipped)
    return training_loop("train", config, initial(), guarded, broken(bad), folder, MESH, documents=keys_at)


@pytest.mark.parametrize(("log_every", "last"), [(3, 8), (1, 8), (4, 11)])
def test_batches_that_are_not_finite_stop_a_run_with_their_documents(tmp_path: Path, log_every: int, last: int):
    """The third of three in a row is that of step `last`, whose batch begins at position last - 1."""
    config = dataclasses.replace(CONFIG, max_skipped=3, log_every=log_every)
    bad = {2, 3, *range(last - 2, 14)}
    message = (
        "^train: loss or gradient is not finite for training.max_skipped=3 batches in a row, the last that of step "
        rf"{last}, of documents document {last - 1}, b, c, ... \(4, all in {tmp_path}/batch-{last}.txt\); the newest"
    )
    with pytest.raises(InputError, match=message):
        run_broken(tmp_path, bad, config)
    assert (tmp_path / f"batch-{last}.txt").read_text().split("\n") == [f"document {last - 1}", "b", "c", "d", ""]
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    state, _ = checkpoints.restore(initial().abstract)
    checkpoints.close()
    assert int(state.step) == 4 * ((last - 1) // 4)  # the last checkpoint before it
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state)))
    lines = read_metrics(tmp_path)
    assert sum(line["skipped_steps"] for line in lines) == len([step for step in bad if step <= lines[-1]["step"]])
    assert all(np.isfinite(value) for line in lines for value in line.values())
    with pytest.raises(InputError, match=message):  # as it does again
        run_broken(tmp_path, bad, config)


def test_a_few_batches_that_are_not_finite_are_passed_over(tmp_path: Path):
    """The parameters are those of a run without these batches, whose schedule is as long."""
    state = run_broken(tmp_path / "some", {5, 6, 9}, dataclasses.replace(CONFIG, max_skipped=3))

    def without(position: Sequence[int]) -> Iterator[tuple[PackedBatch, Sequence[int]]]:
        for place in (0, 1, 2, 3, 6, 7, 9, 10, 11, 12):
            yield batch_at(place), [0, place]

    config = dataclasses.replace(CONFIG, steps=10)
    other = run(tmp_path / "none", make_train_step(MODEL, OPTIMIZER), without, config)
    assert (int(state.step), int(other.step)) == (13, 10)
    for one, same in zip(jax.tree.leaves(state.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_array_equal(one, same)
    assert [line["skipped_steps"] for line in read_metrics(tmp_path / "some")] == [0, 0, 2, 0, 1, 0, 0]


def test_the_trace_has_the_steps_that_were_asked_for(tmp_path: Path, step):
    run(tmp_path, step, Stream(), dataclasses.replace(CONFIG, steps=6, profile="3:4"))
    (trace,) = (tmp_path / "profile").rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = [event["args"]["step_num"] for event in events if event.get("name", "").startswith("train")]
    assert sorted(map(int, steps)) == [3, 4]


def test_a_known_peak_gives_the_mfu_of_a_window(tmp_path: Path, step, monkeypatch: pytest.MonkeyPatch):
    """The FLOPs of a step over its seconds and 1e9 FLOP/s on each of 8 devices."""
    monkeypatch.setitem(PEAKS, jax.devices()[0].device_kind, 1e9)
    run(tmp_path, step, Stream(), dataclasses.replace(CONFIG, steps=3))
    full, causal = step_flops(MODEL, jax.tree.map(jnp.asarray, batch_at(0)))
    (line,) = read_metrics(tmp_path)
    assert line["mfu/full"] == pytest.approx(float(full) / line["step_seconds"] / 8e9, rel=1e-5)
    assert line["mfu/causal"] == pytest.approx(float(causal) / line["step_seconds"] / 8e9, rel=1e-5)


def test_no_figure_is_invented(uninterrupted):
    """The peak of these devices isn't known, nor is their memory."""
    for line in uninterrupted[1]:
        assert line["real_tokens"] == 1
        assert not {name for name in line if name.startswith(("mfu", "flops", "device"))}


@pytest.mark.parametrize(
    ("stats", "most"),
    [
        ([{"peak_bytes_in_use": 5, "bytes_in_use": 9}, None, {"peak_bytes_in_use": 7, "bytes_in_use": 2}, {}], 7),
        ([None, {}, {"bytes_in_use": 3}], None),
    ],
)
def test_the_memory_is_the_peak_of_the_fullest_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stats: list[dict[str, int] | None], most: int | None
):
    state = initial().create()
    devices = [types.SimpleNamespace(memory_stats=lambda found=found: found) for found in stats]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    with contextlib.closing(MetricsWriter(tmp_path, 0)) as writer:
        window = metrics.Window(writer)
        window.add({"skipped_steps": (jnp.zeros(()), jnp.ones(()))}, 0.0)
        window.close(1, state)
        window.flush()
    (line,) = read_metrics(tmp_path)
    assert line.get("device_memory_bytes") == most


@pytest.mark.parametrize("profile", ["3", "4:3", "0:2", "a:b", "1:2:3"])
def test_a_trace_is_of_steps(profile: str):
    with pytest.raises(InputError, match=f"training.profile='{profile}' names no steps; use FIRST:LAST, such as 20:25"):
        TrainingConfig(profile=profile)


@pytest.mark.parametrize(
    "name", ["steps", "checkpoint_every", "log_every", "keep", "loss_chunk", "microbatches", "max_skipped"]
)
def test_fields_are_checked(name: str):
    with pytest.raises(InputError, match=f"training.{name}=0"):
        TrainingConfig(**{name: 0})
