"""By how probable texts are as a whole: which documents they are judged with, and what is left out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rac3
from rac3.answering import Model
from rac3.generation.prompts import Context
from rac3.generation.tasks.score import Scorer
from rac3.ranking import Ranked, by_likelihood
from rac3.tokens.vocabulary import EOD


@pytest.fixture
def model(finished_workdir: tuple[Path, Path]) -> Model:
    return rac3.load(finished_workdir[1])


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is scored; each id gets the same."""
    found: list[Any] = []

    def log_probs(self: Scorer, asked: list[Any]) -> list[np.ndarray]:
        found.extend(asked)
        return [np.full(part.end - part.start, -1.0) for part in asked]

    monkeypatch.setattr(Scorer, "log_probs", log_probs)
    return found


def test_all_texts_are_judged_with_the_documents_that_fit_next_to_each(model: Model, parts: list[Any]):
    """Of two documents, one fits next to the long text. Each document ends with <eod>, before which there is one."""
    store = model.documents("memory")
    context = Context([store[number].tokens for number in (0, 1)])
    encode = model.tokenizer.encode
    room = model.form.max_positions - len(model.form.builder.sequence(context.documents[0]).ids)
    long = "o " * (room // 2)
    while len(encode(long)) + 10 > room:
        long = long[:-2]
    by_likelihood(model.form, model.scorer, encode, ["a fox"], None, context)
    by_likelihood(model.form, model.scorer, encode, ["a fox", long], None, context)
    assert [np.count_nonzero(part.group.tokens == EOD) for part in parts] == [3, 2, 2]


def test_texts_that_are_too_long_are_left_out_and_counted(model: Model, parts: list[Any]):
    def rank(*texts: str) -> Ranked:
        return by_likelihood(model.form, model.scorer, model.tokenizer.encode, [*texts], None, Context())

    long = "o " * model.form.max_positions
    ranked = rank("a fox", long, "an owl")
    assert {text for (text,) in ranked.samples} == {"a fox", "an owl"}
    assert ranked.notes == ("1 of 3 texts are too long once they are filled in, and were left out",)
    assert rank(long).samples == []
    assert rank("a fox").notes == ()
