"""Two processes of four devices train as one of eight does, and none is left waiting when the other fails.

Real commands, connected by `jax.distributed`, over the tiny run.
"""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_config
from commands import ROOT, free_port, many_started, started, wait_until

from rac3 import recipes
from rac3.artifacts.recipe import Recipe
from rac3.artifacts.workdir import MANIFEST, Workdir
from rac3.devices.processes import STALLED
from rac3.run import Run
from rac3.training.checkpoint import CHECKPOINTS
from rac3.training.loop import TrainingConfig
from rac3.training.metrics import read_metrics

TINY = str(Path(__file__).parent / "tiny_config.py")
TIMES = {"step_seconds", "input_wait_seconds", "tokens_per_second"}

# Sums over eight devices in another order differ by at most 8 roundings of 2^-24. Where terms cancel, to a hundredth of
# their size at most here, a gradient differs by a hundred times that, and so does the step of Adam that it gives.
ROUNDING = 100 * 8 * 2.0**-24
# In 30 steps, units of a ReLU are on in one run and off in the other by a rounding, and their gradients differ whole.
PASSED_ON = 10


@pytest.fixture
def workdir(finished_workdir: tuple[Path, Path], tmp_path: Path) -> Path:
    """All artifacts but the model."""
    return shutil.copytree(finished_workdir[1], tmp_path / "tiny", ignore=shutil.ignore_patterns("train"))


def trained(workdir: Path, **changed: Any) -> Run:
    """The RA-CM3 of a workdir, which is there; `changed` are fields of the tiny experiment."""
    run = Run(replace(tiny_config.get_config(), **changed), Workdir(workdir, "tiny"))
    assert run.workdir.find(run.recipe(recipes.train)), list((workdir / "train").glob("*"))
    return run


def assert_same(one: Run, other: Run, passed_on: int = 1) -> None:
    """Parameters, metrics, checkpoints and manifests, up to the order of sums.

    Args:
      passed_on: how many roundings later steps make of one, in a parameter.
    """
    lines = [read_metrics(run.trained_model().folder) for run in (one, other)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for a, b in zip(*lines, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - TIMES:
            np.testing.assert_allclose(a[name], b[name], rtol=ROUNDING, err_msg=name)
    far = one.experiment.training.steps * one.experiment.optimizer.peak_lr  # Adam moves a parameter at most so far
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=far * passed_on * ROUNDING)
    folders = [run.trained_model().folder for run in (one, other)]
    names = [{path.name for path in (folder / CHECKPOINTS).iterdir()} for folder in folders]
    assert names[0] == names[1]
    counts = [json.loads((folder / MANIFEST).read_text())["counts"] for folder in folders]
    assert counts[0] == counts[1]


def train_together(workdir: Path, folder: Path, *arguments: str) -> None:
    with many_started(folder, 2, "train", TINY, "--workdir", str(workdir), *arguments) as both:
        codes = [command.wait() for command in both]
        assert codes == [0, 0], [command.err() for command in both]


def test_two_processes_of_four_devices_are_one_of_eight(
    finished_workdir: tuple[Path, Path], workdir: Path, tmp_path: Path, rac3: Callable[..., int]
):
    """The finished run is the one that one process has made. And one process of eight goes on where two were, of whose
    run as much is left as if they had been killed after step 3."""
    alone = trained(finished_workdir[1])
    train_together(workdir, tmp_path, "--no-compare-with-cm3")
    assert_same(trained(workdir), alone)
    assert not list((workdir / "train").glob("*.lock"))

    whole = trained(workdir).trained_model().folder
    killed = whole.rename(f"{whole}.partial")
    (killed / MANIFEST).unlink()
    shutil.rmtree(killed / CHECKPOINTS / "6")
    kept = (killed / CHECKPOINTS / "3" / "_CHECKPOINT_METADATA").stat().st_mtime_ns
    assert rac3("train", TINY, "--workdir", str(workdir), "--no-compare-with-cm3") == 0
    assert_same(trained(workdir), alone)
    assert (whole / CHECKPOINTS / "3" / "_CHECKPOINT_METADATA").stat().st_mtime_ns == kept, "it began again"


LONG = ("--no-compare-with-cm3", "--training.steps", "30", "--training.checkpoint-every", "10")
LONGER = TrainingConfig(steps=30)


@pytest.fixture(scope="module")
def whole(finished_workdir: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A longer run of one process, without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    workdir = shutil.copytree(finished_workdir[1], folder / "tiny", ignore=shutil.ignore_patterns("train"))
    with started(folder, "train", TINY, "--workdir", str(workdir), *LONG) as command:
        assert command.wait() == 0, command.err()
    return trained(workdir, training=LONGER)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1), (2, 2)])
def test_a_killed_run_goes_on_with_another_number_of_processes(
    whole: Run, workdir: Path, tmp_path: Path, first: int, then: int
):
    arguments = "train", TINY, "--workdir", str(workdir), *LONG
    with many_started(tmp_path, first, *arguments) as commands:
        wait_until(lambda: bool(list(workdir.glob("train/*.partial/checkpoints/10/_CHECKPOINT_METADATA"))), commands[0])
        for command in commands:
            command.kill()
    assert list((workdir / "train").glob("*.partial")), "it had ended already"
    with many_started(tmp_path, then, *arguments) as commands:
        assert [command.wait() for command in commands] == [0] * then, [command.err() for command in commands]
    assert_same(trained(workdir, training=LONGER), whole, PASSED_ON)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", [("--mesh.tensor", "8"), ("--mesh.data", "1", "--mesh.fsdp", "4", "--mesh.tensor", "2")]
)
def test_any_mesh_over_two_processes_is_that_of_one(workdir: Path, tmp_path: Path, mesh: tuple[str, ...]):
    """With `tensor` of 8, one group spans both processes, and both need the same rows."""
    eight = "--no-compare-with-cm3", "--model.num-heads", "8", *mesh
    alone = shutil.copytree(workdir, tmp_path / "alone")
    with started(tmp_path, "train", TINY, "--workdir", str(alone), *eight) as command:
        assert command.wait() == 0, command.err()
    train_together(workdir, tmp_path, *eight)
    model = replace(tiny_config.get_config().model, num_heads=8)
    assert_same(*(trained(each, model=model) for each in (workdir, alone)))


def ended(folder: Path, workdir: Path, *arguments: str, config: str = TINY, last: tuple[str, ...] = ()):
    """The exit codes of two processes, and the lines of rac3 that each has written."""
    arguments = "train", config, "--workdir", str(workdir), *arguments
    with many_started(folder, 2, *arguments, last=last) as both:
        codes = [command.wait() for command in both]
        lines = [[line for line in command.err().splitlines() if line.startswith("rac3: ")] for command in both]
    return codes, lines


def test_the_error_of_the_first_process_ends_both(workdir: Path, tmp_path: Path):
    """Another command has the artifact's lock."""
    fingerprint = trained_recipe().fingerprint
    (workdir / "train").mkdir()
    with (workdir / "train" / f"{fingerprint}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        codes, ((first,), (other,)) = ended(tmp_path, workdir)
    assert codes == [2, 2]
    assert first.endswith("is being written by another process; wait for it, or use another --workdir")
    said = re.escape(first.removeprefix("rac3: "))
    assert re.fullmatch(rf"rac3: process 0 of 2 \(\S+\) failed: {said}", other)


def trained_recipe() -> Recipe:
    return recipes.train(tiny_config.get_config())


def test_a_process_with_other_settings_is_named(workdir: Path, tmp_path: Path):
    codes, lines = ended(tmp_path, workdir, last=("--model.num-heads", "4"))
    assert codes == [2, 2]
    for (line,) in lines:
        assert re.match(r"rac3: process 1 \(\S+\) has another config than the others; .* another input than ", line)
    assert not (workdir / "train").exists()


ONE_FAILS = f"""
import sys
from rac3.batches.loader import BatchStream
from rac3.config import InputError, load_config_module

batches = BatchStream.batches


def failing(self, state):
    for number, each in enumerate(batches(self, state)):
        if number == 2:
            raise {{error}}
        yield each


if sys.argv[-1] == "1":
    BatchStream.batches = failing
get_config = load_config_module({TINY!r}).get_config
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        ("InputError('shard 3 is damaged; delete it')", 2, "shard 3 is damaged; delete it"),
        ("RuntimeError('a defect')", 1, "RuntimeError: a defect"),
    ],
)
def test_what_only_one_process_finds_ends_both(workdir: Path, tmp_path: Path, error: str, code: int, said: str):
    """In the middle of the training, while the other one waits in a step."""
    config = tmp_path / "config.py"
    config.write_text(ONE_FAILS.format(error=error))
    codes, (others, _) = ended(tmp_path, workdir, config=str(config))
    assert codes == [code, code]
    assert len(others) == 1
    assert re.fullmatch(rf"rac3: process 1 of 2 \(\S+\) failed: {re.escape(said)}", others[0])


@pytest.mark.slow
@pytest.mark.parametrize(("number", "who"), [(signal.SIGSTOP, 0), (signal.SIGSTOP, 1), (signal.SIGKILL, 1)])
def test_a_process_that_is_stopped_or_lost_ends_the_other(workdir: Path, tmp_path: Path, number: int, who: int):
    """Within `stall_minutes`: it says where it waits, and what the other has said last."""
    endless = "--training.steps", "100000", "--training.log-every", "1", "--training.stall-minutes", "0.25"
    with many_started(tmp_path, 2, "train", TINY, "--workdir", str(workdir), *endless) as both:
        wait_until(lambda: any(each.stat().st_size for each in workdir.glob("train/*/metrics.jsonl")), both[0])
        time.sleep(2)
        os.kill(both[who].process.pid, number)
        begun = time.monotonic()
        other = both[1 - who]
        assert other.wait() == STALLED, other.err()
        assert 14 < time.monotonic() - begun < 40  # the machine may be busy
        (line,) = (line for line in other.err().splitlines() if line.startswith("rac3: "))
    here = rf"process {1 - who} of 2 \(\S+\) has not got on for 0.25 minutes \(training.stall_minutes\)"
    waits = r"it waits for the .* at step \d+, in .*training_loop \(loop.py:\d+\).*"
    there = rf"process {who} of 2 \(\S+\): waits for .* at step \d+"
    assert re.match(f"rac3: {here}: {waits}; {there};", line)


@pytest.mark.slow
def test_no_process_outlives_the_first(workdir: Path, tmp_path: Path):
    """The coordination service, which is in it, is what JAX itself watches: it aborts."""
    endless = "--training.steps", "100000", "--training.log-every", "1"
    with many_started(tmp_path, 2, "train", TINY, "--workdir", str(workdir), *endless) as both:
        wait_until(lambda: any(each.stat().st_size for each in workdir.glob("train/*/metrics.jsonl")), both[0])
        both[0].kill()
        begun = time.monotonic()
        assert both[1].wait() == -signal.SIGABRT
        assert time.monotonic() - begun < 20


@pytest.mark.slow
def test_a_process_with_other_code_is_named(workdir: Path, tmp_path: Path):
    """An install of rac3 that is one comment older."""
    shutil.copytree(ROOT / "rac3", tmp_path / "old" / "rac3")
    with (tmp_path / "old" / "rac3" / "config.py").open("a") as file:
        file.write("# an old comment\n")
    command = [sys.executable, "-c", "from rac3.cli import main; main()", "train", TINY, "--workdir", str(workdir)]
    place = ["--distributed.coordinator", f"localhost:{free_port()}", "--distributed.processes", "2"]
    both = [
        subprocess.Popen(
            [*command, *place, "--distributed.process", str(number)],
            env={**os.environ, "PYTHONPATH": f"{folder}:{ROOT / 'tests'}"},
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, folder in enumerate((ROOT, tmp_path / "old"))
    ]
    for process in both:
        assert "process 1 (" in (said := process.communicate()[1])
        assert ") has another code than the others; start all" in said
        assert process.returncode == 2
