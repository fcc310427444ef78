"""What the ablations and the scaling laws share: settings that reach the experiment, seeds, and intervals."""

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import scipy.stats
from rac3.configs.quickstart import get_config as quickstart

from rac3.cli import load_experiment
from rac3.config import InputError
from rac3.documents.world import World

TINY = Path(__file__).parents[1] / "tiny_config.py"


def test_a_retriever_comes_last_with_its_settings(variants: ModuleType):
    settings = {"retriever": "random --retriever.num-neighbors 4", "batches.num-retrieved": "0 1"}
    assert variants.flags(settings) == [
        *("--batches.num-retrieved", "0", "1"),
        *("retriever:random", "--retriever.num-neighbors", "4"),
    ]


def test_a_seed_is_that_of_the_world_too(variants: ModuleType, tmp_path: Path):
    path = variants.seeded("quickstart", 3, tmp_path / "new")
    found = load_experiment(str(path))
    assert path.name == "seed_3.py"
    assert found == quickstart(seed=3)
    assert isinstance(found.data.train, World)
    assert (found.seed, found.data.train.seed) == (3, 3)


def test_a_config_without_a_seed_gets_one(variants: ModuleType, tmp_path: Path):
    found = load_experiment(str(variants.seeded(str(TINY), 5, tmp_path)))
    assert (found.seed, found.name) == (5, "tiny")


def test_variants_of_a_seed_share_a_workdir_and_other_seeds_have_others(variants: ModuleType, tmp_path: Path):
    def folder(seed: int, settings: dict[str, str]) -> Path:
        arguments, run = variants.open_variant(variants.seeded(str(TINY), seed, tmp_path), ["--seed", "9"], settings)
        assert arguments[:3] == [str(tmp_path / f"seed_{seed}.py"), "--workdir", str(run.workdir.path)]
        assert run.experiment.seed == 9  # what is given for all variants
        return run.workdir.path

    assert folder(1, {}) == folder(1, {"query-dropout": "0"}) == tmp_path / "seed_1"
    assert folder(2, {}) == tmp_path / "seed_2"


def test_an_unknown_setting_is_refused(variants: ModuleType, tmp_path: Path):
    with pytest.raises(InputError, match=r"Unrecognized options: --batches\.alpha"):
        variants.open_variant(variants.seeded(str(TINY), 0, tmp_path), [], {"batches.alpha": "1"})


def test_a_record_names_the_command_without_its_files(variants: ModuleType, monkeypatch: pytest.MonkeyPatch):
    arguments = ["my.py", "--workdir", "/here", "--steps", "6", "--out=/there.json", "--only", "full", "alpha 0"]
    monkeypatch.setattr(sys, "argv", ["/home/me/rac3/benchmarks/ablations.py", *arguments])
    assert variants.command() == "python benchmarks/ablations.py my.py --steps 6 --only full 'alpha 0'"


@pytest.mark.parametrize("values", [[1.0, 2.0, 3.0], [4.0, -1.0], [0.1, 0.2, 0.4, 0.1, 0.3, 0.2, 0.5, 0.4, 0.1, 0.2]])
def test_intervals_are_those_of_student(variants: ModuleType, values: list[float]):
    expected = scipy.stats.t.interval(0.95, len(values) - 1, np.mean(values), scipy.stats.sem(values))
    assert variants.interval(values) == pytest.approx(expected, rel=1e-3)


def test_more_seeds_than_listed_have_an_interval_a_little_wide(variants: ModuleType):
    values = np.random.default_rng(0).normal(size=30).tolist()
    low, high = scipy.stats.t.interval(0.95, 29, np.mean(values), scipy.stats.sem(values))
    found = variants.interval(values)
    assert found[0] < low
    assert high < found[1]


def test_one_seed_has_no_interval(variants: ModuleType):
    assert variants.interval([1.0]) is None
