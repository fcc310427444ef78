"""All listed mistakes can be planted, and benchmarks/mutants.py tells killed from survived ones."""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]

CODE = "def share(part, whole):\n    return part / whole if whole else 0.0\n"
TESTS = """
import pytest
from rac3.shop import share

def test_half():
    assert share(1, 2) == 0.5

@pytest.mark.skipif(True, reason="never runs")
def test_skipped():
    assert share(1, 0) == 0

def test_none():
    assert share(1, 0) == 1
"""
UPSIDE_DOWN = ("upside down", "part / whole", "whole / part", "test_half")
ONE_FOR_NOTHING = ("one for nothing", "else 0.0", "else 1.0", "test_half")

Plant = Callable[..., int]


@pytest.fixture(scope="module")
def mutants() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        module = importlib.import_module("mutants")
        patch.setattr(module, "START_METHOD", "spawn")  # a fork server started by another test has imported rac3
        yield module


@pytest.fixture
def plant(mutants: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Plants mistakes, each (name, find, replace, test), in a project of one function; returns the exit code."""
    for name in ("JAX_COMPILATION_CACHE_DIR", "RAC3_TEST_WORKDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))

    def run(*mistakes: tuple[str, str, str, str]) -> int:
        for name, content in {"rac3/__init__.py": "", "rac3/shop.py": CODE, "tests/test_shop.py": TESTS}.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(content)
        entries = [
            f"[[mistake]]\nname = {name!r}\nfile = 'rac3/shop.py'\nfind = {find!r}\nreplace = {replace!r}\n"
            f"tests = ['tests/test_shop.py::{test}']\n"
            for name, find, replace, test in mistakes
        ]
        (tmp_path / "benchmarks" / "mistakes").mkdir(parents=True)
        (tmp_path / "benchmarks" / "mistakes" / "shop.toml").write_text("\n".join(entries))
        code = mutants.main(["--workers", "1"], tmp_path)
        assert (tmp_path / "rac3" / "shop.py").read_text() == CODE
        return code

    return run


def test_every_mistake_of_the_list_can_be_planted(mutants: ModuleType, capsys: pytest.CaptureFixture[str]):
    code = mutants.main(["--check"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert int(captured.out.split()[0]) >= 120


def test_a_survivor_is_named(plant: Plant, capsys: pytest.CaptureFixture[str]):
    assert plant(UPSIDE_DOWN, ONE_FOR_NOTHING) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "SURVIVED shop: one for nothing"
    assert lines[-2].split() == ["all", "2", "1", "1"]


def test_all_are_killed(plant: Plant, capsys: pytest.CaptureFixture[str]):
    assert plant(UPSIDE_DOWN) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "none survived"


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (("moved", "part // whole", "part", "test_half"), "its text occurs 0 times in rac3/shop.py, not once"),
        (("ambiguous", "whole", "part", "test_half"), "its text occurs 3 times"),
        (("empty", "part / whole", "part  /  whole", "test_half"), "changes nothing"),
        (("broken", "part / whole", "part / / whole", "test_half"), "is not valid Python"),
        (("untested", "part / whole", "whole / part", "test_third"), "there is no test tests/test_shop.py::test_third"),
        (("hopeless", "part / whole", "whole / part", "test_none"), "the tests fail without any mistake"),
        (("skipped", "else 0.0", "else 1.0", "test_skipped"), "tests are skipped"),
    ],
)
def test_a_mistake_that_tells_nothing_fails(
    mistake: tuple[str, str, str, str], says: str, plant: Plant, capsys: pytest.CaptureFixture[str]
):
    assert plant(UPSIDE_DOWN, mistake) == 2
    assert says in capsys.readouterr().err


def test_an_import_that_fails_kills_nothing(plant: Plant, capsys: pytest.CaptureFixture[str]):
    assert plant(("renamed", "def share(", "def part_of(", "test_half")) == 2
    assert "pytest ended with code" in capsys.readouterr().err
