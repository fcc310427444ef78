"""The page of retrieval: each query with its own answers, each number in its place."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from html_page import Card, Page

from rac3 import recipes
from rac3.artifacts.arrays import Vectors
from rac3.artifacts.workdir import Workdir
from rac3.documents.document import Document
from rac3.experiment import Experiment
from rac3.report import retrieval as report
from rac3.report.plots import Line
from rac3.report.retrieval import retrieval_report, retrieval_summary
from rac3.run import Run

WAYS = ("text_to_image", "image_to_text", "text_to_document", "image_to_document")
RULES = ("withdrawn", "main_document", "duplicate", "similar_to_main", "similar_to_query", "redundant")


@pytest.fixture
def plots(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Line]]:
    """The lines of each plot, by its title."""
    drawn: dict[str, list[Line]] = {}

    def plot(title: str, x: str, y: str, lines: list[Line], markers: bool = False) -> str:
        drawn[title] = lines
        return ""

    monkeypatch.setattr(report, "plot", plot)
    return drawn


@pytest.fixture
def metrics() -> dict[str, Any]:
    """Numbers of which hardly one stands twice."""
    splits = {
        split: {
            "documents": 1000 + place,
            "with_entity": 1000 + place,
            "pairs": {"pairs": 9}
            | {
                f"{way}_recall_at_{k}": (100 * place + 10 * number + k) / 1000
                for number, way in enumerate(WAYS)
                for k in (1, 5, 10)
            },
            "entities": {"text": {"1": 0.3, "5": 0.4, "10": 0.5 + place / 10}},
        }
        for place, split in enumerate(("validation", "test"))
    }
    shares = {
        "first": [0.25 if bin in (70, 72) else 0.5 if bin == 71 else 0.0 for bin in range(100)],
        "kept": [1.0 if bin == 40 else 0.0 for bin in range(100)],
    }
    selection = {
        split: {
            "queries": 2000 + place,
            "queries_without_neighbors": 3 + place,
            "neighbors_per_query": 7.5 + place,
            "dropped": {rule: (number + 10 * place) / 100 for number, rule in enumerate(RULES)},
            "similarities": {"text": shares, "image": {"first": [0.0] * 100, "kept": shares["first"]}},
        }
        for place, split in enumerate(("train", "validation", "test"))
    }
    search = {
        "retriever": "Scann",
        "memory": 48,
        "queries": 16,
        "k": 10,
        "exact_queries_per_second": 1000.0,
        "points": [
            {"effort": "as configured", "recall": 0.9, "queries_per_second": 5000.0},
            {"effort": "1 leaf", "recall": 0.5, "queries_per_second": 9000.0},
        ],
    }
    return {"splits": splits, "selection": selection, "search": search, "entity_field": "entity"}


@pytest.fixture(scope="module")
def run(experiment: Experiment, store: Workdir) -> Run:
    return Run(experiment, store)


@pytest.fixture(scope="module")
def cards(run: Run) -> list[Card]:
    return Page(report._queries(run, "validation")).cards


def test_each_query_is_shown_with_what_it_retrieved(
    cards: list[Card], run: Run, experiment: Experiment, store: Workdir
):
    """By text, then by image: the five nearest documents of a plain search, with their similarities."""
    documents = [item.document for item in run.documents("validation").many(range(12))]
    memory: list[Document] = []
    for split in ("train", "memory"):
        documents_of_part = run.documents(split)
        memory += [item.document for item in documents_of_part.many(range(len(documents_of_part)))]
    folders = [store.require(recipes.embeddings(experiment, split)).folder for split in ("train", "memory")]
    vectors = np.concatenate([Vectors(folder / "document")[:] for folder in folders])
    assert len(cards) == 24
    marks = set()
    for number, card in enumerate(cards):
        part, document = ("text", "image")[number // 12], documents[number % 12]
        figures = list(card.figures)
        if part == "image":
            asked = figures.pop(0)
            assert (asked.label, asked.caption) == ("asked", "")
            np.testing.assert_array_equal(asked.pixels, document.images[0].pixels())
        assert card.heading == (document.text if part == "text" else "")
        query = Vectors(store.require(recipes.queries(experiment, "validation")).folder / part)[:][number % 12]
        found: list[int] = []
        for i in np.argsort(-(vectors @ query)):
            if max([vectors[i] @ query, *(vectors[found] @ vectors[i])]) <= 0.999:  # as the selection of the config
                found.append(int(i))
        assert len(figures) == 5
        for figure, i in zip(figures, found, strict=False):
            same = memory[i].metadata["entity"] == document.metadata["entity"]
            assert figure.label == f"{vectors[i] @ query:.2f}"
            assert figure.caption == f"{memory[i].text} {'✓ same' if same else '✗ other'}"
            np.testing.assert_array_equal(figure.pixels, memory[i].images[0].pixels())
            marks.add(same)
    assert marks == {True, False}


def test_recall_is_by_split_way_and_k(metrics: dict[str, Any]):
    (table,) = Page(report._recall(metrics["splits"])).tables
    assert table == [
        ["split", "looked for", "recall at 1", "recall at 5", "recall at 10"],
        ["validation", "own image of a text", "0.1%", "0.5%", "1.0%"],
        ["validation", "own text of an image", "1.1%", "1.5%", "2.0%"],
        ["validation", "own document of a text", "2.1%", "2.5%", "3.0%"],
        ["validation", "own document of an image", "3.1%", "3.5%", "4.0%"],
        ["validation", "its entity in the memory, by its text", "30.0%", "40.0%", "50.0%"],
        ["test", "own image of a text", "10.1%", "10.5%", "11.0%"],
        ["test", "own text of an image", "11.1%", "11.5%", "12.0%"],
        ["test", "own document of a text", "12.1%", "12.5%", "13.0%"],
        ["test", "own document of an image", "13.1%", "13.5%", "14.0%"],
        ["test", "its entity in the memory, by its text", "30.0%", "40.0%", "60.0%"],
    ]
    metrics["splits"]["test"] |= {"pairs": {"pairs": 0}, "entities": {}}
    (table,) = Page(report._recall(metrics["splits"])).tables
    assert [row[0] for row in table] == ["split"] + ["validation"] * 5


def test_search_is_a_point_for_each_effort(metrics: dict[str, Any], plots: dict[str, list[Line]]):
    (table,) = Page(report._searching(metrics["search"])).tables
    assert table == [
        ["Scann", "recall", "queries/s"],
        ["as configured", "90.00%", "5,000"],
        ["1 leaf", "50.00%", "9,000"],
        ["exact search", "100.00%", "1,000"],
    ]
    assert [(line.label, line.points) for line in plots["Recall over speed"]] == [
        ("Scann, by effort", [(5000, 0.9), (9000, 0.5)]),
        ("exact", [(1000, 1)]),
    ]


def test_selection_is_by_split_and_rule(metrics: dict[str, Any], plots: dict[str, list[Line]]):
    (table,) = Page(report._selection(metrics["selection"])).tables
    assert table == [
        ["", "train", "validation", "test"],
        ["queries", "2,000", "2,001", "2,002"],
        ["without any neighbor", "3", "4", "5"],
        ["neighbors per query", "7.50", "8.50", "9.50"],
        ["dropped: withdrawn", "0.00%", "10.00%", "20.00%"],
        ["dropped: the main document itself", "1.00%", "11.00%", "21.00%"],
        ["dropped: its text or image again", "2.00%", "12.00%", "22.00%"],
        ["dropped: too similar to it", "3.00%", "13.00%", "23.00%"],
        ["dropped: too similar to the query", "4.00%", "14.00%", "24.00%"],
        ["dropped: too similar to one taken", "5.00%", "15.00%", "25.00%"],
    ]
    assert list(plots) == [f"Similarity to the query, {split}" for split in ("train", "validation", "test")]
    lines = {line.label: (line.dashed, line.points) for line in plots["Similarity to the query, test"]}
    shown = [pytest.approx(point) for point in ((0.41, 25), (0.43, 50), (0.45, 25))]  # the middles of the full bins
    assert lines == {
        "text query, best": (False, shown),
        "text query, all": (True, [pytest.approx((-0.19, 100))]),
        "image query, best": (False, [pytest.approx((-0.99, 0))]),  # nothing at all
        "image query, all": (True, shown),
    }


def test_the_summary_names_what_was_measured(metrics: dict[str, Any]):
    lines = retrieval_summary(metrics).splitlines()
    assert len(lines) == 12
    assert lines[5] == "test: recall of own image of a text: 10.1% at 1, 10.5% at 5, 11.0% at 10"
    assert lines[9] == "test: recall of its entity in the memory, by its text: 30.0% at 1, 40.0% at 5, 60.0% at 10"
    assert lines[11] == "Scann, 1 leaf: 50.0% of the exact 10 neighbors, 9,000 queries/s (exact: 1,000)"


def test_the_page_has_the_queries_of_each_split(
    metrics: dict[str, Any], experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plots
):
    monkeypatch.setattr(report, "evaluate_retrieval", lambda *_: metrics)
    monkeypatch.setattr(report, "_queries", lambda _, split: f"<p>those of {split}</p>")
    path = retrieval_report(Run(replace(experiment, name="mine"), Workdir(tmp_path, "mine")))
    assert path == tmp_path / "report" / "retrieval.html"
    html = path.read_text()
    assert "<h1>mine: retrieval</h1>" in html
    for split in ("test", "validation"):
        assert f'<section id="{split}"><h2>Queries: {split}</h2><p>those of {split}</p></section>' in html
