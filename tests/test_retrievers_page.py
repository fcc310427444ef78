"""docs/retrievers.md, followed to the letter over the tiny config rather than the quickstart."""

import re
import shlex
import shutil
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from rac3 import recipes
from rac3.artifacts.arrays import read_array
from rac3.artifacts.workdir import Workdir
from rac3.cli import RETRIEVERS, run
from rac3.config import load_config_module
from rac3.retrieval.memory import MemoryPart
from rac3.retrieval.retriever import Index, Queries, Retriever

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "retrievers.md").read_text()


def config_of_the_page(folder: Path) -> Path:
    """The page's code as a file; the artifacts of its base config are those of a run that is finished."""
    code = "\n\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.S))
    code, imports = re.subn(
        r"from rac3.configs.quickstart import get_config as base",
        f"from rac3.config import load_config_module\nbase = load_config_module({str(ROOT / 'tests/tiny_config.py')!r})"
        ".get_config",
        code,
    )
    code, names = re.subn('name="bm25"', 'name="tiny"', code)
    assert (imports, names) == (1, 1)
    path = folder / "bm25.py"
    path.write_text(code)
    return path


@pytest.fixture
def module(tmp_path: Path) -> ModuleType:
    return load_config_module(str(config_of_the_page(tmp_path)))


@pytest.mark.slow
def test_the_commands_of_the_page_run(
    finished_workdir: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = config_of_the_page(tmp_path)
    workdir = shutil.copytree(finished_workdir[1], tmp_path / "tiny")
    commands = [shlex.split(line)[1:] for line in re.findall(r"^ {4}(rac3 \w+ bm25\.py.*)$", PAGE, re.M)]
    assert [command[0] for command in commands] == ["run", "generate", "evaluate"]
    indexes = len(list((workdir / "index").iterdir()))
    for stage, name, *rest in commands:
        assert name == "bm25.py"
        place = next((i for i, word in enumerate(rest) if word.startswith("retriever:")), len(rest))
        rest[place:place] = ["--workdir", str(workdir)]
        run([stage, str(config), *rest])
    output = capsys.readouterr().out
    assert "retrieved " in output
    # BM25 over two parts, BM25 with another k1 over two parts, exact over two parts, and the controls that are there.
    assert len(list((workdir / "index").iterdir())) >= indexes + 6
    recipe = recipes.neighbors(load_config_module(str(config)).get_config(), "train")
    ids = read_array(Workdir(workdir, "tiny").require(recipe).folder / "ids")
    assert (ids[:, 0, 0] >= 0).all()
    assert (ids[:, 0] != np.arange(len(ids))[:, None]).all()
    assert (ids[:, 1] == -1).all()  # a query that is an image has no text, though its document has


def test_bm25_of_the_page_is_bm25(module: ModuleType, tmp_path: Path):
    texts = ["a red fox", "A red, red house and a red door", "the fox and the owl", "", "an owl"]
    queries = ["red fox", "the owl owl", "unknown words", ""]
    part = MemoryPart("train", np.zeros((5, 2), np.float32), texts)
    retriever = module.BM25(k1=1.5, b=0.6)
    assert isinstance(retriever, Retriever)
    retriever.build(part, tmp_path)
    index = retriever.open(part, tmp_path)
    assert isinstance(index, Index)
    scores, rows = index.search(Queries(queries, np.zeros((4, 2), np.float32), queries), 3)

    documents = [module.words(text) for text in texts]
    mean = np.mean([len(document) for document in documents])

    def score(query: str, document: list[str]) -> float:
        total = 0.0
        for word in set(module.words(query)):
            has, n = sum(word in other for other in documents), Counter(document)[word]
            idf = np.log(1 + (5 - has + 0.5) / (has + 0.5))
            total += idf * n * (1.5 + 1) / (n + 1.5 * (1 - 0.6 + 0.6 * len(document) / mean))
        return total

    wanted = np.array([[score(query, document) for document in documents] for query in queries])
    for q in range(4):
        order = [row for row in np.argsort(-wanted[q], kind="stable") if wanted[q, row] > 0][:3]
        assert rows[q].tolist() == order + [-1] * (3 - len(order))
        np.testing.assert_allclose(scores[q, : len(order)], wanted[q, order], rtol=1e-6)
        assert (scores[q, len(order) :] == -np.inf).all()


def test_the_page_lists_the_retrievers_of_the_command():
    assert re.findall(r"^\| `(\w+)` \|", PAGE, re.M) == [name for name in RETRIEVERS]
