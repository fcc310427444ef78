"""Prompts: their documents, what fits, and what is said of the rest. Each is the start of a training group."""

from dataclasses import replace

import numpy as np
import pytest

from rac3.config import InputError
from rac3.documents.store import Tokens
from rac3.generation.prompts import Asked, Context, Form, ask, each_alone, given, sequence
from rac3.generation.request import Draw
from rac3.tokens.vocabulary import END_OF_INFILL, IMAGE_ALT, IMAGE_SOURCE


def document(text: int, size: int = 16) -> Tokens:
    """Of `size` ids: a text of one id again and again, an image of one code, shorter than real ones, and markup."""
    return (False, np.full(size - 5, text, np.int32)), (True, np.array([text], np.int32))


def spelled(text: int, size: int = 16) -> list[int]:
    return [2, *[8 + text] * (size - 5), 3, 48 + text, 4, 1]


MAIN = [IMAGE_ALT, 78, IMAGE_SOURCE]


def asked(form: Form, context: Context, count: int = 9, stop: int = -1, **more) -> Asked:
    """After one `<eod>`, the documents, and 3 ids."""
    text = form.draw_text(count, stop) if stop >= 0 else form.draw_codes(0, count)
    return ask(form, MAIN, [text], context, **more)


def prompts(asked: Asked) -> list[list[int]]:
    return [prompt.ids.tolist() for prompt in asked.request.prompts]


def test_pieces_have_offsets_from_where_they_are_in_their_text():
    ids, offsets = sequence([2, (np.array([8, 9]), 1), 78, (np.array([10]), 6), 3])
    assert ids.tolist() == [2, 8, 9, 78, 10, 3]
    assert offsets.tolist() == [0, 1, 2, 0, 6, 0]
    run = given([5, (np.array([60, 61]), 4)])
    assert (run.ids.tolist(), run.offsets.tolist()) == ([5, 60, 61], [0, 4, 5])


def test_documents_come_first_in_their_order(form: Form):
    out = asked(form, Context([document(1), document(2)]), samples=3, first=2)
    assert prompts(out) == [[1, *spelled(1), *spelled(2), 2, 78, 3]]
    offsets = out.request.prompts[0].offsets.tolist()
    assert offsets[:18] == [0, 0, *range(1, 12), 0, 1, 0, 0, 0]
    assert (out.request.samples, out.request.first) == (3, 2)
    assert (out.contexts, out.dropped, out.notes) == ([[0, 1]], [], [])


def test_documents_that_do_not_fit_are_dropped_and_said(form: Form):
    """64 positions: 4 are given, 9 are drawn, and 51 are left; three documents of 17 are 51."""
    three = [document(text, 17) for text in (1, 2, 3)]
    form = replace(form, max_documents=4)
    out = asked(form, Context(three))
    assert (len(out.request.prompts[0].ids), out.dropped) == (55, [])
    out = asked(form, Context([*three[:2], document(3, 18)]))
    assert (prompts(out), out.dropped) == ([[1, *spelled(1, 17), *spelled(2, 17), *MAIN]], [2])
    assert out.notes == ["1 of 3 documents do not fit into the context, and were dropped"]
    out = asked(form, Context([document(1, 52), *three]))  # the best one does not fit: those after it are worth less
    assert (prompts(out), out.contexts, out.dropped) == ([[1, *MAIN]], [[]], [0, 1, 2, 3])


def test_an_ensemble_has_no_more_documents_in_a_prompt_than_training(form: Form):
    out = asked(form, Context([document(text) for text in range(5)], ensemble=True))
    assert prompts(out) == [
        [1, *spelled(0), *spelled(1), *MAIN],
        [1, *spelled(2), *spelled(3), *MAIN],
        [1, *spelled(4), *MAIN],
    ]
    assert (out.contexts, out.dropped, out.notes) == ([[0, 1], [2, 3], [4]], [], [])


def test_an_ensemble_spreads_what_does_not_fit_together(form: Form):
    """51 ids of documents fit into a prompt."""
    sizes = (30, 30, 52, 20)
    out = asked(form, Context([document(text, size) for text, size in enumerate(sizes)], ensemble=True))
    assert (out.contexts, out.dropped) == ([[0], [1, 3]], [2])
    assert prompts(out)[1] == [1, *spelled(1, 30), *spelled(3, 20), *MAIN]


def test_more_documents_than_in_training_are_said(form: Form):
    out = asked(replace(form, max_documents=1), Context([document(1), document(2)]))
    assert out.contexts == [[0, 1]]
    (note,) = out.notes
    assert "a prompt of 2 documents is unlike training, where there were at most 1" in note


def test_one_prompt_is_as_if_there_were_no_other(form: Form):
    """A caption next to a long prompt is as long as alone: there is no call to be the longest of."""
    long, short = (asked(form, Context(), 50, END_OF_INFILL).request, asked(form, Context(), 8, END_OF_INFILL).request)
    assert [run.count for run in (*long.grammar, *short.grammar)] == [40, 8]


@pytest.mark.parametrize(("positions", "count"), [(64, 20), (30, 20), (25, 20), (24, 19), (6, 1)])
def test_a_text_ends_where_its_context_does(form: Form, positions: int, count: int):
    """After 4 ids, with its stop id: documents make room for it, and where there is none it is said."""
    out = asked(replace(form, max_positions=positions), Context([document(1, 40)]), 20, END_OF_INFILL)
    (run,) = out.request.grammar
    assert isinstance(run, Draw)
    assert run.count == count
    assert out.dropped == [0]
    said = [f"there is room for a text of {count} tokens, not of 20"] if count < 20 else []
    assert [note for note in out.notes if "room" in note] == said


def test_a_text_is_as_long_as_in_training(form: Form):
    out = ask(form, MAIN, [form.draw_text(30, END_OF_INFILL, 31), given([78]), form.draw_codes(0, 2)], Context())
    assert [run.count for run in out.request.grammar if isinstance(run, Draw)] == [10, 2]
    assert out.notes == ["there is room for a text of 10 tokens, not of 30"]


@pytest.mark.parametrize(("positions", "count", "stop"), [(12, 9, -1), (5, 20, END_OF_INFILL)])
def test_no_room_is_refused(form: Form, positions: int, count: int, stop: int):
    with pytest.raises(
        InputError, match=rf"a prompt of 4 ids without its documents, and .* exceed the {positions} pos"
    ):
        asked(replace(form, max_positions=positions), Context(), count, stop)


def test_a_given_text_longer_than_in_training_is_refused(form: Form):
    with pytest.raises(InputError, match="a text of 41 tokens exceeds the 40"):
        ask(form, [form.text_piece([1] * 41)], [form.draw_codes(0, 1)], Context())


@pytest.mark.parametrize("ensemble", [False, True])
def test_guidance_adds_the_prompts_that_lack_something(form: Form, ensemble: bool):
    documents, bare = [document(1), document(2), document(3)], [IMAGE_ALT, IMAGE_SOURCE]
    before = [[1, 2], [3]] if ensemble else [[1, 2, 3]]
    before = [[id for text in each for id in spelled(text, 16)] for each in before]
    form = replace(form, max_positions=96, max_documents=2 if ensemble else 3)
    out = asked(form, Context(documents, ensemble, "text"), bare=bare)
    assert prompts(out) == [*([1, *each, *MAIN] for each in before), *([1, *each, *bare] for each in before)]
    streams = len(before)  # with and without the text, after the same documents: shared up to its <img alt="
    assert (out.request.endings, out.request.shared.tolist()) == (2, [2 + len(each) for each in before])
    alone = each_alone(out)
    assert [(len(each.prompts), each.endings, *each.shared) for each in alone] == [
        (2, 2, 2 + len(each)) for each in before
    ]
    out = asked(form, Context(documents, ensemble, "documents"), bare=bare)
    assert (out.request.endings, len(out.request.shared)) == (1, streams + 1)
    assert prompts(out) == [*([1, *each, *MAIN] for each in before), [1, *MAIN]]
    assert out.notes == []


def test_guidance_without_what_there_is_not(form: Form):
    with pytest.raises(InputError, match="guidance without the text has no text to leave out"):
        asked(form, Context([document(1)], without="text"))
    out = asked(form, Context(without="documents"))
    assert prompts(out) == [[1, *MAIN]] * 2
    assert out.notes == ["guidance without the documents changes nothing: there are none in the prompt"]


def test_documents_are_shown_as_in_training(form: Form):
    form = replace(form, builder=replace(form.builder, retrieved="image"))
    assert prompts(asked(form, Context([document(4)]))) == [[1, 2, 3, 52, 4, 1, *MAIN]]
    with pytest.raises(InputError, match=r"document 1 has no image, .* \(batches.retrieved\)"):
        asked(form, Context([document(4), ((False, np.array([1], np.int32)),)]))
