"""The notebook is short, holds no outputs, and runs."""

import ast
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "tour.ipynb"


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


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
    assert [name for name in imported if name.split(".")[0] == "rac3"] == ["rac3"]


def test_it_runs(notebook: nbformat.NotebookNode, finished_workdir: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("RAC3_WORKDIR", str(finished_workdir[1]))
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # one device, as a reader of it has
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert len(pictures) == 4  # documents, retrieved ones, generated ones, losses
    assert "36 documents" in printed
    assert "2 documents: " in printed
    assert "truth: " in printed
