"""Which answers of a model count as right: a stand-in that gives known ones, and the real tiny run to the end."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from commands import ROOT

from rac3.documents.document import Document, Image, Text, encode_png
from rac3.documents.world import World

NAMES = "alpha", "beta", "gamma", "delta"
CAPTIONS = [f"{name} on sand" for name in NAMES]


@pytest.fixture(scope="module")
def tasks(path: None) -> ModuleType:
    return importlib.import_module("tasks")


class Judging(World):
    """Sees the second and the fourth entity where they are."""

    def shown(self, pictures: np.ndarray) -> list[dict[str, str]]:
        return [{"entity": name} for name, _ in zip(("beta", "beta", "alpha", "delta"), pictures, strict=True)]


@pytest.fixture
def model(tasks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Fills in the third caption alone as it was; scores a caption by its length."""
    pixels = np.zeros((8, 8, 3), np.uint8)
    items = [
        SimpleNamespace(document=Document(name, (Text(text), Image(encode_png(pixels))), {"entity": name}))
        for name, text in zip(NAMES, CAPTIONS, strict=True)
    ]
    monkeypatch.setattr(tasks, "held_out_documents", lambda model, split: items if split == "test" else [])
    monkeypatch.setattr(tasks, "entity", lambda model, item: item.document.metadata["entity"])
    filled = iter(["alpha on sand on sand", "bet on sand", "gamma on sand", " delta on sand"])

    def answers(prompts: list[Any]) -> Any:
        for number, prompt in enumerate(prompts):
            assert [each.key for each in prompt.documents] == ["memory"]
            if prompt.task == "infill_text":
                assert prompt.text == "<mask> on sand"
                yield number, SimpleNamespace(texts=[next(filled), "alpha on sand"])
            else:
                assert (prompt.task, prompt.image, prompt.follow) == ("continue", None, ("image",))
                yield number, SimpleNamespace(images=[pixels])

    def scores(passages: list[Any]) -> list[Any]:
        assert {each.document.segments[each.segment].text for each in passages} <= set(CAPTIONS)
        return [SimpleNamespace(log_probs=-np.ones(len(each.document.text))) for each in passages]

    memory = SimpleNamespace(document=Document("memory", (Image(encode_png(pixels)), Text("b")), {"entity": "gamma"}))
    return SimpleNamespace(
        experiment=SimpleNamespace(data=SimpleNamespace(test=Judging(), entity_field="entity")),
        retrieve_many=lambda pictures, k: [[memory] * k for _ in pictures],
        answers=answers,
        scores=scores,
    )


def test_what_counts_as_right(tasks: ModuleType, model: Any):
    """The shortest caption, beta's, wins each choice that it is in: all, since three others are all there are."""
    assert tasks.right(model, 1) == {
        "infill_text": [False, False, True, False],
        "continue": [False, True, False, True],
        "score": [False, True, False, False],
    }


def test_what_a_copy_has_right(tasks: ModuleType, model: Any):
    """The first document is gamma's by its metadata."""
    of_name = [False, False, True, False]
    drawn = [False, True, False, True]
    assert tasks.copied(model) == {"infill_text": of_name, "continue": drawn, "score": of_name}


@pytest.mark.slow
def test_a_finished_run_has_all_figures(finished_workdir: tuple[Path, Path], tmp_path: Path):
    out = tmp_path / "out.json"
    script = [sys.executable, "benchmarks/tasks.py", str(finished_workdir[1]), "--out", str(out)]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(out.read_text(encoding="utf-8"))["results"].values()
    assert found.pop("questions") > 0
    assert [*found] == [
        "RA-CM3, 2 documents",
        "RA-CM3, no documents",
        "CM3 at its best",
        "the first document, copied",
    ]
    for figures in found.values():
        assert figures.keys() == {"infill_text", "continue", "score"}
        assert all(0 <= value <= 1 for value in figures.values())
