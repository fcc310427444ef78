"""Real commands that end early, by signals or on a full disk: what they save, their last line and their exit code."""

import contextlib
import os
import random
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_config
from commands import Command, many_started, started, wait_until

from rac3 import recipes
from rac3.artifacts.workdir import Workdir
from rac3.batches.loader import StreamState
from rac3.run import Run
from rac3.training.checkpoint import CHECKPOINTS
from rac3.training.metrics import read_metrics
from rac3.training.preemption import Preemption

STEPS = 60
LONG = ("--training.steps", str(STEPS), "--training.checkpoint-every", "1000", "--training.log-every", "1")


@pytest.fixture
def command(finished_workdir: tuple[Path, Path], tmp_path: Path) -> tuple[str, ...]:
    """Trains the tiny model for longer; nothing but the model is missing."""
    workdir = shutil.copytree(finished_workdir[1], tmp_path / "tiny", ignore=shutil.ignore_patterns("train"))
    return "train", str(finished_workdir[0]), "--workdir", str(workdir), "--no-compare-with-cm3", *LONG


def run_folder(command: tuple[str, ...]) -> Path:
    (folder,) = (Path(command[3]) / "train").glob("*.partial")
    return folder


def send(process: Command, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
        os.kill(process.process.pid, number)


def interrupted(command: tuple[str, ...], folder: Path, *numbers: int) -> tuple[int, str]:
    """The exit code and the errors of a command that gets signals while it trains."""
    with started(folder, *command) as process:
        lines = Path(command[3]) / "train"
        wait_until(lambda: any(path.stat().st_size for path in lines.glob("*.partial/metrics.jsonl")), process)
        for number in numbers:
            send(process, number)
        return process.wait(), process.err()


def test_a_run_that_is_told_to_stop_saves_and_goes_on_bit_for_bit(
    command: tuple[str, ...], tmp_path: Path, uninterrupted: list[np.ndarray]
):
    """Launchers repeat SIGTERM."""
    code, errors = interrupted(command, tmp_path, signal.SIGTERM, signal.SIGTERM)
    assert code == 75, errors
    (saved,) = (int(path.name) for path in (run_folder(command) / CHECKPOINTS).iterdir())
    assert 0 < saved < STEPS
    assert f"train ra_cm3: stopped after step {saved}, saved; run the same command to go on\n" in errors
    assert [line["step"] for line in read_metrics(run_folder(command))] == list(range(1, saved + 1))
    with started(tmp_path, *command) as process:
        assert process.wait() == 0, process.err()
    for one, other in zip(trained(command), uninterrupted, strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_interrupt_saves_too(command: tuple[str, ...], tmp_path: Path):
    code, errors = interrupted(command, tmp_path, signal.SIGINT)
    assert code == 75, errors
    assert "rac3: interrupted; saving after this step" in errors
    assert len(list((run_folder(command) / CHECKPOINTS).iterdir())) == 1


@pytest.fixture(scope="module")
def uninterrupted(finished_workdir: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> list[np.ndarray]:
    """The parameters of a run that nobody stops."""
    folder = tmp_path_factory.mktemp("whole")
    workdir = shutil.copytree(finished_workdir[1], folder / "tiny", ignore=shutil.ignore_patterns("train"))
    command = "train", str(finished_workdir[0]), "--workdir", str(workdir), "--no-compare-with-cm3", *LONG
    with started(folder, *command) as process:
        assert process.wait() == 0, process.err()
    return trained(command)


def trained(command: tuple[str, ...], steps: int = STEPS) -> list[np.ndarray]:
    tiny = tiny_config.get_config()
    run = Run(replace(tiny, training=replace(tiny.training, steps=steps)), Workdir(Path(command[3]), "tiny"))
    assert run.workdir.find(run.recipe(recipes.train)) is not None
    return jax.tree.leaves(jax.device_get(run.params))


def test_a_second_interrupt_ends_at_once(command: tuple[str, ...], tmp_path: Path):
    """It is the signal that ends the process, before anything is saved or in the middle of it."""
    with started(tmp_path, *command) as process:
        lines = Path(command[3]) / "train"
        wait_until(lambda: any(path.stat().st_size for path in lines.glob("*.partial/metrics.jsonl")), process)
        while not process.ended():  # signals that come before the first is dealt with count as one
            send(process, signal.SIGINT)
        assert process.wait() == -signal.SIGINT
        assert "stopped after" not in process.err()


def test_a_full_disk_ends_a_run_after_its_last_checkpoint(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """From the first checkpoint on, the kernel lets the process write no file above 64 kB: enough for metrics."""
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")  # else JAX warns that it can't write its own files
    often = (*command[: -len(LONG)], "--training.steps", str(STEPS), "--training.checkpoint-every", "5")
    with started(tmp_path, *often) as process:
        wait_until(lambda: bool(list(Path(command[3]).glob("train/*.partial/checkpoints/5"))), process)
        resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, (64_000, resource.RLIM_INFINITY))
        assert process.wait() == 1, process.err()
    *progress, last = process.err().splitlines()
    saved = sorted(int(path.name) for path in (run_folder(command) / CHECKPOINTS).iterdir())  # and no half of another
    assert last.startswith(f"rac3: the checkpoint of step {saved[-1] + 5} can't be written to ")
    assert last.endswith(f": File too large; once that is fixed, run the same command to go on from step {saved[-1]}")
    assert all(line.startswith("train ra_cm3: ") for line in progress)


def last_step(command: tuple[str, ...]) -> int:
    """The last step that the metrics have, of a run that has not ended."""
    folders = (Path(command[3]) / "train").glob("*.partial")
    return max((line["step"] for folder in folders for line in read_metrics(folder)), default=0)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "kills"), [(1, 20), (2, 8)])
def test_a_run_that_is_killed_at_random_ends_bit_for_bit(
    command: tuple[str, ...], tmp_path: Path, count: int, kills: int
):
    """Each kill comes at any moment of up to ten steps more, of which every third is saved; some in the start."""
    steps = 10 * kills
    command = (*command, "--training.steps", str(steps), "--training.checkpoint-every", "3")
    whole = (*command[:3], str(shutil.copytree(command[3], tmp_path / "whole")), *command[4:])
    begun = time.monotonic()
    with many_started(tmp_path, count, *whole) as processes:
        wait_until(lambda: last_step(whole) > 0, processes[0])
        start = time.monotonic() - begun
        assert [process.wait() for process in processes] == [0] * count, [process.err() for process in processes]
    one_step = (time.monotonic() - begun - start) / steps
    rng, reached = random.Random(count), [0]
    for _ in range(kills):
        more, share = rng.randrange(10), rng.random()
        with many_started(tmp_path, count, *command) as processes:
            wait_until(lambda: last_step(command) >= reached[-1] + more, processes[0])  # noqa: B023
            time.sleep(share * (one_step if more else start))
            for process in rng.sample(processes, count):
                process.process.kill()
            assert 0 not in [process.wait() for process in processes], "it had ended already"
        reached.append(last_step(command))
    assert len(set(reached)) > kills / 2, reached
    with many_started(tmp_path, count, *command) as processes:
        assert [process.wait() for process in processes] == [0] * count, [process.err() for process in processes]
    for one, other in zip(trained(command, steps), trained(whole, steps), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")  # it restores onto the mesh that it was saved from
def test_a_run_that_diverges_ends_in_one_line_and_keeps_finite_parameters(
    command: tuple[str, ...], rac3: Callable[..., int], capsys: pytest.CaptureFixture[str]
):
    """The learning rate is 0 in step 1 and 5e29 in step 2, so no loss is finite from step 3 on."""
    saves = "--training.steps", "20", "--training.checkpoint-every", "1", "--training.max-skipped", "2"
    assert rac3(*command, *saves, "--optimizer.peak-lr", "1e30") == 2
    folder = run_folder(command)
    keys = Run(tiny_config.get_config(), Workdir(Path(command[3]), "tiny")).training_stream().keys(StreamState(0, 3))
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("rac3: "))
    assert line.startswith(
        "rac3: train ra_cm3: loss or gradient is not finite for training.max_skipped=2 batches in a row, the last that "
        f"of step 4, of documents {keys[0]}, {keys[1]}, {keys[2]}, ... ({len(keys)}, all in {folder / 'batch-4.txt'}); "
    )
    assert (folder / "batch-4.txt").read_text().splitlines() == keys
    assert [line["skipped_steps"] for line in read_metrics(folder)] == [0, 0, 1, 1]
    newest = max((folder / CHECKPOINTS).iterdir(), key=lambda path: int(path.name))
    assert newest.name == "3"
    with ocp.PyTreeCheckpointer() as checkpointer:
        state = checkpointer.restore((newest / "state").absolute())
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(state["params"])) > 1e20  # those of step 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state["params"]))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(
    command: tuple[str, ...], tmp_path: Path, number: int
):
    """The preemption service looks for the signal once a second, so the run is longer."""
    command = (*command, "--training.steps", "1000")
    with many_started(tmp_path, 2, *command) as both:
        lines = Path(command[3]) / "train"
        wait_until(lambda: any(path.stat().st_size for path in lines.glob("*.partial/metrics.jsonl")), both[0])
        send(both[1], number)
        assert [process.wait() for process in both] == [75, 75], [process.err() for process in both]
    (saved,) = (int(path.name) for path in (run_folder(command) / CHECKPOINTS).iterdir())
    assert 0 < saved < 1000
    for process in both:
        assert f"stopped after step {saved}, saved" in process.err()


def test_the_handlers_that_were_there_return():
    def mine(*_) -> None: ...

    before = {number: signal.signal(number, mine) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with Preemption():
            assert all(signal.getsignal(number) != mine for number in before)
        assert all(signal.getsignal(number) == mine for number in before)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def never(step: int) -> bool:
    return False


def test_another_thread_leaves_signals_alone():
    failed = []

    def enter() -> None:
        try:
            with Preemption() as preemption:
                assert not preemption.reached(1, never)
        except ValueError as error:
            failed.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert failed == []


def test_several_processes_stop_where_the_service_says(monkeypatch: pytest.MonkeyPatch):
    """SIGTERM is the service's, and an interrupt goes to it as one."""
    got = []
    before = signal.signal(signal.SIGTERM, lambda number, _: got.append(number))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    try:
        with Preemption() as preemption:
            os.kill(os.getpid(), signal.SIGINT)
            assert [step for step in range(10) if preemption.reached(step, lambda step: step == 7)] == [7]
        assert got == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
