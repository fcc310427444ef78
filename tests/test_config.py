"""Fingerprints, and the errors of wrong config files."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from rac3.config import InputError, canonical, check_settings, fingerprint, load_config_module, shipped_configs
from rac3.experiment import Data, Experiment
from rac3.retrieval.exact import Exact
from rac3.retrieval.scann import Scann


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 1.0
    sizes: tuple[int, ...] = (1, 2)


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str = "a"
    count: int = 3
    on: bool = False
    nothing: str | None = None
    folder: Path = Path("x")
    inner: Inner = dataclasses.field(default_factory=Inner)


@dataclasses.dataclass(frozen=True)
class OtherInner(Inner):
    pass


class Odd(Inner):
    """A part of a config that its owner defines, which does not check what it takes."""


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("config", "name"),
    [
        (lambda x: Inner(rate=x), "rate"),
        (lambda x: Outer(inner=Odd(rate=x)), "inner.rate"),
        (lambda x: {"a": [Inner(), (1.0, x)]}, "a.1.1"),
    ],
)
def test_a_setting_that_is_not_finite_is_refused(value: float, config, name: str):
    with pytest.raises(InputError, match=f"^{name}={value} is not a finite number"):
        check_settings(config(value))
    check_settings(config(1.0))


@dataclasses.dataclass(frozen=True)
class Every:
    """A setting of each type."""

    seed: int = 0
    rate: float = 1.0
    name: str = ""
    kind: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] = (1,)
    limit: int | None = None
    on: bool = False
    inner: Inner = dataclasses.field(default_factory=Inner)
    parts: Mapping[str, Inner] = dataclasses.field(default_factory=dict)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"seed": -1}, "seed=-1 is negative; use 0 or more"),
        ({"seed": 2**63}, "seed=9223372036854775808 needs more than 64 bits"),
        ({"limit": -(2**63) - 1}, "limit=-9223372036854775809 needs more than 64 bits"),
        ({"seed": 1.5}, "seed=1.5 is no int; give one"),
        ({"seed": True}, "seed=True is no int; give one"),
        ({"rate": "0.1"}, "rate='0.1' is no float; give one"),
        ({"name": None}, "name=None is no str; give one"),
        ({"kind": "c"}, "kind='c' is no "),
        ({"sizes": 3}, "sizes=3 is no tuple; give one"),
        ({"inner": None}, "inner=None is no Inner; give one"),
        ({"inner": Inner}, r"inner is the class Inner; give an object of it: Inner\(\.\.\.\)"),
        ({"inner": lambda: Inner()}, "inner=<function .* is no Inner; give one"),
        ({"parts": {"a": Inner}}, "parts.a is the class Inner"),
        ({"parts": [Inner()]}, "parts=.* is no Mapping"),
        ({"inner": Odd(rate=Inner)}, "inner.rate is the class Inner"),  # type: ignore[arg-type]
    ],
)
def test_a_setting_of_another_kind_is_refused(fields: dict[str, Any], says: str):
    with pytest.raises(InputError, match=f"^{says}") as error:
        check_settings(Every(**fields))
    assert "\n" not in str(error.value)


def test_settings_of_their_types_are_taken():
    check_settings(
        Every(seed=2**63 - 1, rate=1, kind="b", sizes=(), limit=-7, on=True, inner=Odd(), parts={"x": Odd()})
    )


def float_settings(config: object, name: str = "") -> list[str]:
    found = []
    for field in dataclasses.fields(config):
        value, path = getattr(config, field.name), f"{name}.{field.name}" if name else field.name
        if dataclasses.is_dataclass(value):
            found += float_settings(value, path)
        elif isinstance(value, float):
            found.append(path)
    return found


def with_value(config, path: str, value: float):
    name, _, rest = path.partition(".")
    return dataclasses.replace(config, **{name: with_value(getattr(config, name), rest, value) if rest else value})


def test_every_number_of_every_shipped_config_must_be_finite():
    for name in shipped_configs():
        experiment = load_config_module(name).get_config()
        paths = float_settings(experiment)
        assert len(paths) > 20
        for path in paths:
            for value in (float("nan"), float("inf")):
                with pytest.raises(InputError):
                    with_value(experiment, path, value)


CHANGES = [
    {"name": "b"},
    {"count": 4},
    {"on": True},
    {"nothing": ""},
    {"folder": Path("y")},
    {"inner": Inner(rate=0.5)},
    {"inner": Inner(sizes=(2, 1))},
    {"inner": Inner(sizes=(1, 2, 3))},
    {"inner": OtherInner()},  # equal fields, but it builds something else
]


def test_equal_configs_have_equal_fingerprints():
    assert fingerprint(Outer()) == fingerprint(Outer(inner=Inner(sizes=(1, 2))))
    assert fingerprint(Outer()) == fingerprint(dataclasses.replace(Outer(), count=3))
    assert fingerprint(Inner(rate=1)) == fingerprint(Inner(rate=1.0))  # 1 == 1.0, so Inner(1) == Inner(1.0)
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": (2,), "a": 1})
    assert len(fingerprint(Outer())) == 12


def test_every_field_changes_the_fingerprint():
    all_of_them = [fingerprint(Outer()), *(fingerprint(dataclasses.replace(Outer(), **change)) for change in CHANGES)]
    assert len(set(all_of_them)) == len(all_of_them)


def test_a_fingerprint_is_the_same_in_every_process():
    """Pinned: a change here would make every artifact on every disk stale."""
    assert fingerprint({"a": [1, 2.5, "é", None, True]}) == "4e2e0c24ee9a"


@pytest.mark.parametrize("value", [len, {1, 2}, object(), np.zeros(2), Inner])
def test_only_plain_data_is_canonical(value: object):
    with pytest.raises(InputError, match="plain data"):
        canonical({"value": value})


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_config_file_is_loaded(tmp_path: Path):
    path = write(
        tmp_path / "mine.py",
        "import dataclasses\n@dataclasses.dataclass(frozen=True)\nclass Mine:\n    k: 'int' = 3\n"
        "def get_config():\n    return Mine()\n",
    )
    assert load_config_module(path).get_config().k == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_of_this_name", "fails to import: ModuleNotFoundError"),
        ("def get_config(:", "fails to import: SyntaxError"),
        ("import sys\nsys.exit(0)", "fails to import: SystemExit: 0"),
        ("raise ValueError('two\\nlines')", "fails to import: ValueError: two lines"),
        ("x = 1 / 0", "fails to import: ZeroDivisionError: division by zero"),
        ("x = 1", r"has no get_config\(\)"),
        ("get_config = 3", r"has no get_config\(\)"),
    ],
)
def test_a_broken_config_file_is_one_line(tmp_path: Path, text: str, message: str):
    with pytest.raises(InputError, match=message) as error:
        load_config_module(write(tmp_path / "broken.py", text))
    assert str(tmp_path) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_the_input_error_of_a_config_file_is_passed_on(tmp_path: Path):
    path = write(tmp_path / "bad.py", "from rac3.batches.loader import BatchConfig\nBatchConfig(rows=0)\n")
    with pytest.raises(InputError, match=r"^batches.rows=0"):
        load_config_module(path)


@pytest.mark.parametrize(
    ("name", "message"), [("no_such_config", "shipped config; use one of: "), ("no/such/file.py", "does not exist")]
)
def test_a_config_that_is_not_there(name: str, message: str):
    with pytest.raises(InputError, match=message):
        load_config_module(name)


def test_an_experiment_has_a_fingerprint_that_follows_its_retriever():
    class_of_one = Experiment("a", Data(train=Shards()))
    swapped = dataclasses.replace(class_of_one, retriever=Exact())
    assert isinstance(class_of_one.retriever, Scann)
    assert fingerprint(class_of_one) == fingerprint(Experiment("a", Data(train=Shards())))
    assert fingerprint(class_of_one) != fingerprint(swapped)


@dataclasses.dataclass(frozen=True)
class Shards:
    """A user's own document source."""

    def shards(self, data_dir: Path) -> list[str]:
        return []

    def read(self, data_dir: Path, shard: str):
        yield from ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_reject_fraction": 1.5}, "max_reject_fraction=1.5"),
        ({"query_dropout": 1.0}, "query_dropout=1.0"),
    ],
)
def test_an_experiment_checks_its_fields(change: dict[str, float], message: str):
    with pytest.raises(InputError, match=message):
        Experiment("a", Data(train=Shards()), **change)
