"""The report of few-shot classification: accuracies by k for each way, and the first questions."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from html_page import Page

from rac3.artifacts.workdir import Workdir
from rac3.experiment import Experiment
from rac3.report import few_shot as report
from rac3.report.few_shot import few_shot_report, few_shot_summary
from rac3.report.plots import Line
from rac3.run import Run
from rac3.stages.evaluate_few_shot import questions


@pytest.fixture
def metrics() -> dict[str, dict[str, Any]]:
    """46 questions: half of an interval is 5.5% at 0 and 1, and 14.1% at a half."""
    ours = {"text": {"1": 0.5, "2": 1.0}, "image": {"1": 0.0, "2": 0.5}, "apart": {"1": 0.5, "2": 0.5}}
    cm3 = {"text": {"1": 0.0, "2": 0.0}, "image": {"1": 0.5, "2": 0.0}, "apart": {"1": 0.0, "2": 1.0}}
    common = {"questions": 46, "shots": [1, 2], "encoder": {"1": 1.0, "2": 0.5}}
    return {
        name: {"validation": {"questions": 0, "shots": []}, "test": common | values}
        for name, values in (("ra_cm3", ours), ("cm3", cm3))
    }


def test_the_summary_has_a_line_for_each_way(metrics: dict[str, Any]):
    assert few_shot_summary(metrics).splitlines() == [
        "validation: no questions: fewer than two entities have images both here and in the memory",
        "test: 46 questions",
        "  RA-CM3, label given the image: 50.0% ± 14.1% at k = 1, 100.0% ± 5.5% at k = 2",
        "  RA-CM3, image given the label: 0.0% ± 5.5% at k = 1, 50.0% ± 14.1% at k = 2",
        "  RA-CM3, image after one label's demonstrations: 50.0% ± 14.1% at k = 1, 50.0% ± 14.1% at k = 2",
        "  CM3, label given the image: 0.0% ± 5.5% at k = 1, 0.0% ± 5.5% at k = 2",
        "  CM3, image given the label: 50.0% ± 14.1% at k = 1, 0.0% ± 5.5% at k = 2",
        "  CM3, image after one label's demonstrations: 0.0% ± 5.5% at k = 1, 100.0% ± 5.5% at k = 2",
        "  encoder without a model: 100.0% ± 5.5% at k = 1, 50.0% ± 14.1% at k = 2",
        "  guessing: 50.0% at k = 1, 50.0% at k = 2",
    ]


def test_the_page_has_the_figures_and_the_first_questions(
    metrics: dict[str, Any], experiment: Experiment, store: Workdir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    drawn: list[Line] = []
    monkeypatch.setattr(report, "plot", lambda *given, **_: drawn.extend(given[3]) or "")
    finished = Run(experiment, store)
    asked = questions(finished, "test")
    monkeypatch.setattr(report, "questions", lambda _, split: {"test": asked}[split])
    monkeypatch.setattr(report, "SHOWN", 3)
    path = few_shot_report(Run(experiment, Workdir(tmp_path, "tiny")), metrics)
    assert path == tmp_path / "report" / "few_shot.html"
    html = path.read_text()
    assert "<h1>tiny: few-shot classification</h1>" in html
    assert html.index('<section id="test">') < html.index('<section id="validation">')
    assert "46 questions, in which either label is right equally often" in html
    assert "No questions: fewer than two entities" in html.split('<section id="validation">')[1]
    page = Page(html)
    (table,) = page.tables
    assert table[:2] == [
        ["k, demonstrations of each label", "1", "2"],
        ["RA-CM3, label given the image", "50.0% ± 14.1%", "100.0% ± 5.5%"],
    ]
    assert [(line.label, line.dashed) for line in drawn] == [
        ("RA-CM3, label given the image", False),
        ("RA-CM3, image given the label", True),
        ("CM3, label given the image", False),
        ("CM3, image given the label", True),
        ("encoder without a model", False),
        ("guessing", True),
        ("RA-CM3, image after one label's demonstrations", False),
        ("CM3, image after one label's demonstrations", False),
        ("encoder without a model", False),
        ("guessing", True),
    ]
    assert drawn[1].points == [(1, 0), (2, 50)]
    assert len({line.color for line in drawn[:4]}) == 2
    assert len(page.cards) == 3
    for card, question in zip(page.cards, asked, strict=False):
        assert [figure.label for figure in card.figures] == ["animal x", "animal y", "asked"]
        shown = [documents[0] for documents in question.demonstrations] + [question.item]
        for figure, item in zip(card.figures, shown, strict=True):
            np.testing.assert_array_equal(figure.pixels, item.document.images[0].pixels())
        entities = [item.document.metadata["entity"] for item in shown]
        assert card.figures[2].caption == f"is animal {'xy'[entities.index(entities[2])]}"
