"""The scripts of `benchmarks/`, which import one another by name."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="session", autouse=True)
def path() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


@pytest.fixture(scope="session")
def variants(path: None) -> ModuleType:
    return importlib.import_module("variants")


@pytest.fixture(scope="session")
def ablations(path: None) -> ModuleType:
    return importlib.import_module("ablations")


@pytest.fixture(scope="session")
def masking(path: None) -> ModuleType:
    return importlib.import_module("masking")


@pytest.fixture(scope="session")
def scaling(path: None) -> ModuleType:
    return importlib.import_module("scaling")


@pytest.fixture(scope="session")
def emoji_data(path: None) -> ModuleType:
    return importlib.import_module("emoji_data")


@pytest.fixture(scope="session")
def seeds(path: None) -> ModuleType:
    return importlib.import_module("seeds")


@pytest.fixture(scope="session")
def emoji_seeds(path: None) -> ModuleType:
    return importlib.import_module("emoji_seeds")


@pytest.fixture(scope="session")
def quickstart_seeds(path: None) -> ModuleType:
    return importlib.import_module("quickstart_seeds")


@pytest.fixture(scope="session")
def few_shot(path: None) -> ModuleType:
    return importlib.import_module("few_shot")
