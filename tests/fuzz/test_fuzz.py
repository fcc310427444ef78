"""Damaged inputs of every kind are read, counted as rejects, or refused in one line; `benchmarks/fuzz.py` runs more."""

from collections import Counter
from pathlib import Path

import pytest

from fuzz.kinds import KINDS, outcome, workdir_file

CASES = {"tokenizer": 40, "vqgan": 8, "clip": 20, "config": 60, "command": 60, "table": 60, "torch": 100}
NEEDS = {"torch": "torch", "vqgan": "torch"}


@pytest.mark.parametrize("name", [name for name in KINDS if name != "workdir"])
@pytest.mark.filterwarnings("ignore")  # libraries warn of damage
def test_damaged_inputs(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    case = KINDS[name](tmp_path)
    outcomes = Counter(outcome(case, seed) for seed in range(CASES.get(name, 150)))
    assert outcomes["rejected"] + outcomes["refused"] > 0, outcomes  # the damage is seen at all
    assert name == "takedowns" or outcomes["read"] > 0, outcomes  # and is not of every case


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_of_a_workdir(finished_workdir: tuple[Path, Path], tmp_path: Path):
    case = workdir_file(tmp_path, finished_workdir[1])
    outcomes = Counter(outcome(case, seed) for seed in range(80))
    assert outcomes["refused"] > 40, outcomes
