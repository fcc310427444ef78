"""Few-shot questions and their answers by hand: who is asked about, what the prompts hold, how runs are averaged."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import handmade
import numpy as np
import pytest
from replaced import with_members
from tiny_prompts import FIRST_CODE, FIRST_MASK, FIRST_TEXT

from rac3.artifacts.workdir import Workdir
from rac3.config import InputError
from rac3.documents.document import Document, Image, Text
from rac3.documents.store import TokenizedDocument
from rac3.experiment import Experiment
from rac3.generation.tasks.score import Part
from rac3.retrieval.exact import Exact
from rac3.run import Run
from rac3.stages import evaluate_few_shot as stage
from rac3.stages.evaluate_few_shot import (
    LABELS,
    Question,
    _accuracies,
    _evaluate_split,
    _probabilities,
    _similarities,
    evaluate_few_shot,
    questions,
)


class Told:
    """A scorer whose log probabilities are known: of each id of part number n, -n² / 300."""

    def __init__(self) -> None:
        self.parts: list[Part] = []

    def log_probs(self, parts: Sequence[Part]) -> list[np.ndarray]:
        self.parts = [*parts]
        return [np.full(part.end - part.start, -(number**2) / 300) for number, part in enumerate(parts)]


@pytest.fixture(scope="module")
def run(experiment: Experiment, store: Workdir) -> Run:
    return Run(experiment, store)


@pytest.fixture(scope="module")
def asked(run: Run) -> list[Question]:
    return questions(run, "test")


def name_of(item: TokenizedDocument) -> str:
    return str(item.document.metadata["entity"])


@pytest.mark.parametrize(("split", "part"), [("test", "memory"), ("validation", "train")])
def test_each_question_is_of_two_entities_under_the_right_labels(run: Run, split: str, part: str):
    """Four documents are evaluated, each of another entity, of which the memory has three documents: two are shown."""
    asked = questions(run, split)
    assert [question.item.document.key for question in asked] == [f"{split}/{number:06d}" for number in range(4)]
    assert [question.truth for question in asked] == [0, 1, 0, 1]
    documents = run.documents(part).many(range(len(run.documents(part))))
    names = {name_of(question.item) for question in asked}
    for question in asked:
        right, wrong = question.demonstrations[question.truth], question.demonstrations[1 - question.truth]
        assert name_of(right[0]) == name_of(question.item)
        assert name_of(wrong[0]) in names - {name_of(question.item)}
        for shown in (right, wrong):
            first = [item.document.key for item in documents if name_of(item) == name_of(shown[0])][:2]
            assert [item.document.key for item in shown] == first


def test_questions_are_drawn_by_the_seed(run: Run, asked: list[Question]):
    def others(seed: int) -> list[str]:
        seeded = with_members(run, replace(run.experiment, seed=seed), documents=lambda _, split: run.documents(split))
        return [name_of(each.demonstrations[1 - each.truth][0]) for each in questions(seeded, "test")]

    assert others(0) == [name_of(each.demonstrations[1 - each.truth][0]) for each in asked]
    assert len({tuple(others(seed)) for seed in range(4)}) > 1


def item(name: str, number: int, image: bool = True) -> TokenizedDocument:
    segments = (Text(f"{name} {number}"), Image(f"{name} {number}".encode())) if image else (Text(name),)
    ids = (np.arange(3, dtype=np.int32), np.arange(4, dtype=np.int32))
    return TokenizedDocument(Document(f"{name}-{number}", segments, {"entity": name}), ids[: len(segments)])


@pytest.mark.parametrize(
    ("counts", "names", "shots"),
    [
        ({"a": 8, "b": 3, "c": 1}, {"a", "b"}, 2),  # more than half of the three have 2
        ({"a": 8, "b": 5, "c": 4, "d": 1}, {"a", "b", "c"}, 4),
        ({"a": 8, "b": 1}, {"a", "b"}, 1),
        ({"a": 8, "b": 0}, set(), 0),
        ({"a": 8}, set(), 0),
        ({}, set(), 0),
    ],
)
def test_all_questions_have_as_many_demonstrations_as_most_entities_allow(
    counts: dict[str, int], names: set[str], shots: int, run: Run, monkeypatch: pytest.MonkeyPatch
):
    """Documents without an image, or of no entity, are neither asked about nor shown."""
    asked_of = [item(name, 100) for name in counts] + [item("a", 101, image=False), item("", 102)]
    monkeypatch.setattr(stage, "held_out_documents", lambda *_: asked_of)

    def shown(_: Run, split: str, wanted: set[str], most: int) -> dict[str, list[TokenizedDocument]]:
        assert (wanted, most) == ({*counts, ""}, 8)
        return {name: [item(name, number) for number in range(count)] for name, count in counts.items() if count}

    monkeypatch.setattr(stage, "shown_in_memory", shown)
    found = questions(run, "test")
    assert {name_of(each.item) for each in found} == names
    assert len(found) == len(names)
    assert {len(shown) for each in found for shown in each.demonstrations} == ({shots} if shots else set())
    if not found:
        assert _evaluate_split(run, "test") == {"questions": 0, "shots": []}


def labelled(document: TokenizedDocument, label: Sequence[int]) -> list[int]:
    """<img alt=" label " src=" codes "> <eod>: without the document's own text, which names its entity."""
    return [2, *label, 3, *(FIRST_CODE + document.ids[1]).tolist(), 4, 1]


@pytest.mark.parametrize("scored", ["text", "image", "apart"])
def test_prompts_have_a_label_for_each_name(scored: Any, run: Run, asked: list[Question]):
    """Two runs, each with a demonstration of each label, the second in reverse; then each label for the question."""
    told = Told()
    found = _probabilities(with_members(run, scorer=told), asked, scored)
    assert LABELS == ("animal x", "animal y")
    labels = [(FIRST_TEXT + np.array(run.tokenizer.encode(label))).tolist() for label in LABELS]
    parts = iter(told.parts)
    assert len(told.parts) == 4 * 2 * 2
    expected, number = np.zeros((4, 2, 2)), 0
    for row, question in enumerate(asked):
        codes = (FIRST_CODE + question.item.ids[1]).tolist()
        for shown in (0, 1):
            pair = [labelled(question.demonstrations[n][shown], labels[n]) for n in (0, 1)]
            before = [1, *(id for each in (pair[::-1] if shown else pair) for id in each)]
            for n, label in enumerate(labels):
                before = [1, *pair[n]] if scored == "apart" else before
                part = next(parts)
                tokens = part.group.tokens[: part.start + 1].tolist()
                targets = part.group.targets[part.start : part.end].tolist()
                if scored == "text":
                    assert tokens == [*before, 2, FIRST_MASK, 3, *codes, 4, FIRST_MASK]
                    assert targets == [*label, 5]
                else:
                    assert tokens == [*before, 2, *label, 3]
                    assert targets[:25] == codes
                expected[row, shown, n] = np.exp(-(number**2) / 300 * len(targets))
                number += 1
    expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_first_k_runs_are_averaged():
    """The mean of probabilities: neither a vote, nor a product, nor the last run alone."""
    scores = np.array(
        [
            [[0.9, 0.1], [0.0, 1.0], [0.3, 0.7], [0.9, 0.1]],
            [[0.6, 0.4], [0.6, 0.4], [0.6, 0.4], [0.1, 0.9]],
            [[0.2, 0.8], [0.2, 0.8], [0.9, 0.1], [0.6, 0.4]],
        ]
    )  # labels 0, 0, 1 for k = 1; 1, 0, 1 for 2; 0, 1, 1 for 4, though the last run has 0, 1, 0
    asked = [Question(item("a", number), ((), ()), truth) for number, truth in enumerate((0, 0, 1))]
    assert _accuracies(scores, asked, [1, 2, 4]) == {"1": 1, "2": 2 / 3, "4": 2 / 3}


def test_the_encoder_compares_the_images_alone(run: Run, asked: list[Question]):
    """With a hand-made encoder: a vector for each image, of its content alone."""
    found = _similarities(with_members(run, encoder=handmade.PlainEncoder()), asked)
    assert found.shape == (4, 2, 2)

    def vector(item: TokenizedDocument) -> np.ndarray:
        return handmade.vector(item.document.images[0].data)

    for row, question in enumerate(asked):
        for number in (0, 1):
            for label in (0, 1):
                shown = question.demonstrations[label][number]
                assert found[row, number, label] == pytest.approx(vector(question.item) @ vector(shown), abs=1e-6)


def test_a_split_has_the_accuracies_of_each_way(run: Run, monkeypatch: pytest.MonkeyPatch):
    """Questions with truths 0, 1, 0, 1: the label's way always says 0, the image's is right, the encoder's wrong."""
    right = np.eye(2)[[0, 1, 0, 1]][:, None].repeat(2, 1)

    def probabilities(_: Run, some: list[Question], scored: str) -> np.ndarray:
        own = np.eye(2)[[question.truth for question in some]][:, None].repeat(2, 1)
        return {"text": np.tile([0.7, 0.3], (len(some), 2, 1)), "image": own, "apart": 1 - own}[scored]

    monkeypatch.setattr(stage, "_probabilities", probabilities)
    monkeypatch.setattr(stage, "_similarities", lambda *_: 1 - right)
    monkeypatch.setattr(stage, "AT_ONCE", 3)
    assert _evaluate_split(run, "test") == {
        "questions": 4,
        "shots": [1, 2],
        "text": {"1": 0.5, "2": 0.5},
        "image": {"1": 1, "2": 1},
        "apart": {"1": 0, "2": 0},
        "encoder": {"1": 0, "2": 0},
    }


def test_an_evaluation_reads_no_more_than_its_recipe_names(experiment: Experiment, workdir: Path):
    """No neighbors: with this retriever, none were ever searched for."""
    exact = replace(experiment, retriever=Exact())
    run = Run(exact, Workdir(workdir, "tiny"), experiment)
    told = with_members(run, scorer=Told(), encoder=handmade.PlainEncoder())
    metrics = evaluate_few_shot(told)
    assert [values["questions"] for values in metrics.values()] == [4, 4]
    assert metrics["test"]["text"] == {"1": 0.5, "2": 0.5}  # the first of two labels is always more probable


def test_an_evaluation_is_made_once_for_the_splits_that_there_are(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    done: list[str] = []
    monkeypatch.setattr(stage, "_evaluate_split", lambda _, split: done.append(split) or {"questions": len(done)})
    workdir = Workdir(tmp_path, "tiny")
    for _ in range(2):
        assert evaluate_few_shot(Run(experiment, workdir)) == {"validation": {"questions": 1}, "test": {"questions": 2}}
    only = replace(experiment, data=replace(experiment.data, validation=None))
    assert evaluate_few_shot(Run(only, workdir)) == {"test": {"questions": 3}}
    unnamed = replace(experiment, data=replace(experiment.data, entity_field=""))
    with pytest.raises(InputError, match=r"^data\.entity_field is empty; name the field"):
        evaluate_few_shot(Run(unnamed, workdir))
    assert done == ["validation", "test", "test"]
