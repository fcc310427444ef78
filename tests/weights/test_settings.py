"""Settings of other people's files: bounded in size, in work and in what a message quotes."""

import json
import time
from pathlib import Path

import pytest

from rac3.config import QUOTED, InputError, quoted
from rac3.weights.settings import read_settings

MERGES = "\n".join(
    ["a0: &a0 {x: 1, y: 2}", *(f"a{n}: &a{n} {{<<: [{', '.join(['*a' + str(n - 1)] * 9)}]}}" for n in range(1, 12))]
)
LISTS = "\n".join(["a0: &a0 [1]", *(f"a{n}: &a{n} [{', '.join(['*a' + str(n - 1)] * 9)}]" for n in range(1, 12))])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MERGES, "an alias stands for more than one value"),
        (LISTS, "an alias stands for more than one value"),
        ("a: " + "[" * 5000 + "]" * 5000, "settings are more than 100 levels deep"),
        ("a: !!python/object/apply:os.system [true]", "is not YAML"),
        ("a: !model {}", "is not YAML"),
        ("a: [1", "is not YAML"),
        ("- 1", "holds no settings by name"),
        ("", "holds no settings by name"),
    ],
)
def test_hostile_yaml_is_one_line_in_bounded_time(tmp_path: Path, text: str, message: str):
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    started = time.monotonic()
    with pytest.raises(InputError, match=message) as error:
        read_settings(tmp_path / "a.yaml")
    assert time.monotonic() - started < 5
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_an_alias_of_one_value_is_that_value(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("a: &size 256\nb: *size\n", encoding="utf-8")
    assert read_settings(tmp_path / "a.yaml").values == {"a": 256, "b": 256}


def test_deep_json_is_one_line(tmp_path: Path):
    (tmp_path / "a.json").write_text('{"a": ' * 100_000 + "}" * 100_000, encoding="utf-8")
    with pytest.raises(InputError, match=r"a\.json' is not JSON \(maximum recursion depth"):
        read_settings(tmp_path / "a.json")


@pytest.mark.parametrize("value", [10**30, -(10**30), 2**31])
def test_a_size_has_the_range_of_sizes(tmp_path: Path, value: int):
    (tmp_path / "a.json").write_text(json.dumps({"a": value, "b": [1, value], "c": [1] * 101}), encoding="utf-8")
    settings = read_settings(tmp_path / "a.json")
    with pytest.raises(InputError, match=r"a=.* is too large"):
        settings.get("a", int)
    for name in ("b", "c"):
        with pytest.raises(InputError, match=rf"{name}=.* is not a list of whole numbers"):
            settings.numbers(name)


@pytest.mark.parametrize("value", ["x" * 10**6, ["y" * 1000] * 1000, {str(n): n for n in range(10**5)}, 10**1000])
def test_a_message_quotes_little(value: object):
    assert len(quoted(value)) <= QUOTED
    assert quoted([1, "a"]) == "[1, 'a']"
