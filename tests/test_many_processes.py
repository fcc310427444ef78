"""Two processes of four devices train as one of eight does, and none is left waiting when the other fails.

Real commands, connected by `jax.distributed`, over the tiny run.
"""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_config
from commands import many_started, started, wait_until

from rac3 import recipes
from rac3.artifacts.workdir import MANIFEST, Workdir
from rac3.run import Run
from rac3.training.checkpoint import CHECKPOINTS
from rac3.training.metrics import read_metrics

TINY = str(Path(__file__).parent / "tiny_config.py")
TIMES = {"step_seconds", "input_wait_seconds", "tokens_per_second"}

# Sums over eight devices in another order differ by at most 8 roundings of 2^-24. Where terms cancel, to a hundredth of
# their size at most here, a gradient differs by a hundred times that, and so does the step of Adam that it gives.
ROUNDING = 100 * 8 * 2.0**-24


@pytest.fixture
def workdir(finished_workdir: tuple[Path, Path], tmp_path: Path) -> Path:
    """All artifacts but the model."""
    return shutil.copytree(finished_workdir[1], tmp_path / "tiny", ignore=shutil.ignore_patterns("train"))


def trained(workdir: Path, **training) -> Run:
    """The RA-CM3 of a workdir, which is there."""
    tiny = tiny_config.get_config()
    run = Run(replace(tiny, training=replace(tiny.training, **training)), Workdir(workdir, "tiny"))
    assert run.workdir.find(run.recipe(recipes.train)), list((workdir / "train").glob("*"))
    return run


def assert_same(one: Run, other: Run) -> None:
    """Parameters, metrics, checkpoints and manifests, up to the order of sums."""
    lines = [read_metrics(run.trained_model().folder) for run in (one, other)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for a, b in zip(*lines, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - TIMES:
            np.testing.assert_allclose(a[name], b[name], rtol=ROUNDING, err_msg=name)
    far = one.experiment.training.steps * one.experiment.optimizer.peak_lr  # Adam moves a parameter at most so far
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=far * ROUNDING)
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
    finished_workdir: tuple[Path, Path], workdir: Path, tmp_path: Path
):
    """The finished run is the one that one process has made."""
    train_together(workdir, tmp_path, "--no-compare-with-cm3")
    assert_same(trained(workdir), trained(finished_workdir[1]))
    assert not list((workdir / "train").glob("*.lock"))
