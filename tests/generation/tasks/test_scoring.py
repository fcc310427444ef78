"""Log-likelihoods of parts of documents, and what is made of them: against the plain model, id by id."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from plain_engine import PlainEngine

from rac3.batches.masking import move_spans
from rac3.config import InputError
from rac3.documents.store import Tokens
from rac3.generation.prompts import Context, Form
from rac3.generation.tasks import classify, score
from rac3.tokens.html import Sequenced

CODES = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5])
TEXT = np.array([20, 21, 22, 23])
MAIN: Tokens = (False, TEXT), (True, CODES)
SHORT: Tokens = (True, CODES), (False, np.array([30]))
RETRIEVED: list[Tokens] = [((False, np.array([text])), (True, np.full(9, text))) for text in range(4)]


@pytest.fixture(scope="module")
def scorer(engine: PlainEngine) -> score.Scorer:
    return score.Scorer(engine.model, engine.params, 128)


def plain(
    form: Form, engine: PlainEngine, documents: list[Tokens], main: Sequenced, first: int, last: int
) -> list[float]:
    """Log p of the ids [first, last) of the main document, one after the other, with no packing."""
    before = [Sequenced(np.array([1]), np.array([0])), *[form.builder.sequence(each) for each in documents]]
    ids, offsets = (np.concatenate([part[n] for part in (*before, main)]) for n in (0, 1))
    start = len(ids) - len(main.ids)
    out = []
    for place in range(start + first, start + last):
        tokens, places = np.zeros((2, 1, form.max_positions), np.int32)
        tokens[0, :place], places[0, :place] = ids[:place], offsets[:place]
        logits = engine._logits(engine.params, tokens, places, np.array([place]))
        out.append(float(jax.nn.log_softmax(logits[0])[ids[place]]))
    return out


def test_parts_in_order(form: Form, engine: PlainEngine, scorer: score.Scorer):
    """A whole text, a whole image, a part of it, and another document: in one call, packed into rows."""
    asked = [
        (MAIN, 0, 0, None, RETRIEVED[:1], 1, 5),
        (MAIN, 1, 0, None, RETRIEVED[:2], 6, 15),
        (MAIN, 1, 2, 5, [], 8, 11),
        (SHORT, 1, 0, None, RETRIEVED[2:3], 12, 13),
    ]
    parts = [
        part
        for document, segment, start, end, documents, *_ in asked
        for part in score.request(form, document, segment, Context(documents), start, end).parts
    ]
    found = scorer.log_probs(parts)
    assert len(found) == 4
    for log_probs, (document, _, _, _, documents, first, last) in zip(found, asked, strict=True):
        expected = plain(form, engine, documents, form.builder.sequence(document), first, last)
        np.testing.assert_allclose(log_probs, expected, atol=1e-4)


@pytest.mark.parametrize(("segment", "start", "end"), [(0, 0, None), (0, 1, 3), (1, 4, 8)])
def test_an_infilled_part_is_given_all_the_rest(
    form: Form, engine: PlainEngine, scorer: score.Scorer, segment: int, start: int, end: int | None
):
    """With the <eoi> at its end."""
    asked = score.request(form, MAIN, segment, Context(RETRIEVED[:1]), start, end, infill=True)
    place = 1 if segment == 0 else 6
    stop = 4 if end is None else end
    main = move_spans(form.vocabulary, form.builder.sequence(MAIN), [(place + start, place + stop)])
    length = len(main.ids)
    assert main.ids[-2] == 5  # <eoi> <eod>
    expected = plain(form, engine, RETRIEVED[:1], main, length - 2 - (stop - start), length - 1)
    np.testing.assert_allclose(scorer.log_probs(asked.parts)[0], expected, atol=1e-4)


def test_more_rows_than_a_batch(form: Form, scorer: score.Scorer):
    """Each is what it is alone."""
    parts = [score.request(form, MAIN, 0, Context(RETRIEVED[: n % 3])).parts[0] for n in range(19)]
    single = replace(scorer, row_length=64, max_groups=1)
    alone = [single.log_probs([part])[0] for part in parts[:3]]
    for n, log_probs in enumerate(single.log_probs(parts)):
        np.testing.assert_allclose(log_probs, alone[n % 3], atol=1e-4)


def test_an_ensemble_averages_the_probabilities_of_each_id(form: Form, scorer: score.Scorer):
    asked = score.request(form, MAIN, 0, Context(RETRIEVED[:3], ensemble=True))
    assert (asked.contexts, len(asked.parts)) == ([[0, 1], [2]], 2)
    first, second = (np.exp(each) for each in scorer.log_probs(asked.parts))
    np.testing.assert_allclose(np.exp(score.answer(scorer.log_probs(asked.parts))), (first + second) / 2, rtol=1e-5)


def test_labels_are_scored_as_captions(form: Form, scorer: score.Scorer):
    """By hand: softmax over labels of the log-likelihood of the masked caption, then the mean over runs."""
    labels, runs = [[10], [11, 12], [13, 14, 15]], [RETRIEVED[:2], RETRIEVED[2:]]
    asked = classify.request(form, CODES, labels, runs)
    found = classify.answer([scorer.log_probs(run) for run in asked.parts])
    expected = []
    for documents in (RETRIEVED[:2], RETRIEVED[:1:-1]):  # the second run is reversed
        totals = [
            scorer.log_probs(
                score.request(form, ((False, np.array(label)), (True, CODES)), 0, Context(documents), infill=True).parts
            )[0].sum()
            for label in labels
        ]
        expected.append(np.exp(totals) / np.exp(totals).sum())
    np.testing.assert_allclose(found, np.mean(expected, axis=0), rtol=1e-4)
    assert asked.notes == []


def test_labels_without_demonstrations(form: Form):
    asked = classify.request(form, CODES, [[10], [11]], [])
    assert [len(run) for run in asked.parts] == [2]
    assert asked.parts[0][0].group.tokens.tolist() == [1, 2, 78, 3, *(48 + CODES), 4, 78, 18, 5]


def test_labels_are_scored_by_the_image(form: Form, engine: PlainEngine, scorer: score.Scorer):
    """The codes after each label, in order."""
    asked = classify.request(form, CODES, [[10], [11, 12]], [RETRIEVED[:1]], scored="image")
    for log_probs, label in zip(scorer.log_probs(asked.parts[0]), ([10], [11, 12]), strict=True):
        main, first = form.builder.sequence(((False, np.array(label)), (True, CODES))), len(label) + 2
        np.testing.assert_allclose(log_probs, plain(form, engine, RETRIEVED[:1], main, first, first + 9), atol=1e-4)


def test_each_label_has_its_own_demonstration_alone(form: Form, engine: PlainEngine, scorer: score.Scorer):
    """The codes after the label, after one document: in the second run, that of the same label again."""
    labels, runs = [[10], [11, 12]], [RETRIEVED[:2], RETRIEVED[2:]]
    asked = classify.request(form, CODES, labels, runs, scored="apart")
    for number, row in enumerate(asked.parts):
        for place, (log_probs, label) in enumerate(zip(scorer.log_probs(row), labels, strict=True)):
            main, first = form.builder.sequence(((False, np.array(label)), (True, CODES))), len(label) + 2
            expected = plain(form, engine, [RETRIEVED[2 * number + place]], main, first, first + 9)
            np.testing.assert_allclose(log_probs, expected, atol=1e-4)


def test_probabilities_of_tiny_likelihoods():
    """Far below what exp can hold."""
    found = classify.answer([[np.array([-3000.0, -1.0]), np.array([-3001.0])], [np.array([-5000.0]), np.array([-9.0])]])
    np.testing.assert_allclose(found, [0.25, 0.75])


BAD = [
    (lambda form: score.request(form, MAIN, 2, Context()), "segment 2 is not among the document's 2"),
    (lambda form: score.request(form, MAIN, 0, Context(), 2, 5), "ids 2 to 5 are not among the 4"),
    (lambda form: score.request(form, MAIN, 0, Context(), 2, 2), "ids 2 to 2 are not among the 4"),
    (
        lambda form: score.request(form, ((False, np.zeros(41, int)),), 0, Context()),
        "a document of 42 ids, 41 in a seg",
    ),
    (lambda form: score.request(form, ((True, CODES),) * 6, 0, Context()), "a document of 73 ids, 9 in a segment, exc"),
    (lambda form: classify.request(form, CODES, [[1]], []), "1 labels leave no choice"),
    (lambda form: classify.request(form, CODES, [[1], []], []), "a label is empty, or given twice"),
    (lambda form: classify.request(form, CODES, [[1], [1]], []), "a label is empty, or given twice"),
    (lambda form: classify.request(form, CODES[1:], [[1], [2]], []), "the image has 8 codes"),
    (lambda form: classify.request(form, CODES, [[1], [2]], [RETRIEVED]), "4 demonstrations do not fit"),
    (
        lambda form: classify.request(form, CODES, [[1], [2]], [RETRIEVED[:1]], scored="apart"),
        "a run has 1 demonstrations for 2 labels",
    ),
]


@pytest.mark.parametrize(("ask", "message"), BAD)
def test_bad_input_is_one_line(form: Form, ask, message: str):
    with pytest.raises(InputError, match=message):
        ask(form)
