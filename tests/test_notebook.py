"""The notebooks are short, hold no outputs, and run."""

import ast
import os
from pathlib import Path

import nbformat
import pytest
from workdir_files import linked

ROOT = Path(__file__).parents[1]
PICTURES = {"tour": 4, "generate": 0, "infill_and_edit": 0, "few_shot": 1, "evaluate": 6}  # drawn by Matplotlib
ANSWERS = {"tour": 0, "generate": 5, "infill_and_edit": 4, "few_shot": 0, "evaluate": 0}  # that show themselves
PRINTED = {
    "tour": ["36 documents", "2 documents: ", "truth: "],
    "generate": ["4 pictures of (40, 40)", "CLIP score ", "copied: ", "truth: "],
    "infill_and_edit": ["same outside the mask: True", "filled: "],
    "few_shot": ["questions about", "2 shots: ", " right", "2 documents: -"],
    "evaluate": ["other, best: ", "other, worst: "],
}


def test_all_notebooks_are_tested():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(PRINTED)


@pytest.fixture(params=sorted(PRINTED))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def notebook(name: str) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_is_valid_and_holds_no_outputs(notebook: nbformat.NotebookNode):
    nbformat.validate(notebook)
    for cell in code_cells(notebook):
        assert cell.outputs == []
        assert cell.execution_count is None


def test_it_is_short_and_defines_nothing(notebook: nbformat.NotebookNode):
    sources = [cell.source for cell in code_cells(notebook)]
    lines = [line for source in sources for line in source.splitlines() if line.strip()]
    assert len(lines) <= 60
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    assert not [node for source in sources for node in ast.walk(ast.parse(source)) if isinstance(node, definitions)]


def test_it_needs_nothing_of_rac3_but_the_package(notebook: nbformat.NotebookNode):
    imported = [
        name
        for cell in code_cells(notebook)
        for node in ast.walk(ast.parse(cell.source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    ]
    own = [each for each in imported if each.split(".")[0] == "rac3"]
    assert own[0] == "rac3"
    shows = {"rac3.report.page", "rac3.report.samples", "rac3.report.table", "rac3.stages.evaluate"}
    assert set(own[1:]) <= {"rac3.generation.copying", "rac3.generation.sampling", "rac3.prompt", *shows}


def test_it_runs(
    name: str,
    notebook: nbformat.NotebookNode,
    finished_workdir: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    from nbclient import NotebookClient

    monkeypatch.setenv("RAC3_WORKDIR", str(finished_workdir[1]))
    if name == "evaluate":
        monkeypatch.setenv("RAC3_OTHER_WORKDIR", str(linked(finished_workdir[1], tmp_path / "other")))
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    monkeypatch.setenv("XLA_FLAGS", " ".join(flags))  # one device, as a reader of it has
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == PICTURES[name]
    assert sum("<figure" in output.get("data", {}).get("text/html", "") for output in outputs) == ANSWERS[name]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    for words in PRINTED[name]:
        assert words in printed


def test_one_of_two_workdirs_is_enough(
    finished_workdir: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("RAC3_WORKDIR", str(finished_workdir[1]))
    monkeypatch.setenv("RAC3_OTHER_WORKDIR", str(tmp_path / "other"))
    names: dict[str, object] = {}
    for cell in code_cells(nbformat.read(ROOT / "notebooks" / "evaluate.ipynb", as_version=4))[:2]:
        exec(cell.source, names)
    assert (
        capsys.readouterr().out
        == f"{tmp_path / 'other'} is no folder, so that one run is shown; make it, or name another workdir\n"
    )
    assert names["head"][:2] == ["", f"RA-CM3 ({finished_workdir[1]})"]
