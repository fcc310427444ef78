"""Every file that rac3 opens as text names its encoding: what a locale would choose is another one elsewhere."""

import ast
from pathlib import Path

import pytest

import rac3

FILES = sorted(Path(rac3.__file__).parent.rglob("*.py"))
OTHERS = ("os", "tarfile", "PIL.Image", "job")  # whose `open` opens no text


def unnamed(source: str) -> list[int]:
    """The lines that open a text without its encoding."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        function = node.func
        owner = ast.unparse(function.value) if isinstance(function, ast.Attribute) else ""
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        modes = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        if name in ("read_text", "write_text") or (
            name == "open"
            and owner not in OTHERS
            and not any(isinstance(mode, str) and "b" in mode for mode in modes)
            and len(node.args) == len(modes) + (owner == "")  # `open` of ours takes no mode
        ):
            lines.append(node.lineno)
    return lines


def test_it_finds_what_it_looks_for():
    source = 'open(x)\nopen(x, "rb")\nopen(x, "w")\np.open()\np.open("rb")\np.read_text()\np.write_text(a)\nos.open(x)'
    assert unnamed(source) == [1, 3, 4, 6, 7]
    assert unnamed('p.read_text(encoding="utf-8")\nopen(x, encoding="utf-8")') == []


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_files_name_their_encoding(path: Path):
    assert unnamed(path.read_text(encoding="utf-8")) == []
