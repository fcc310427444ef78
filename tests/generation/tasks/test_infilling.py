"""Prompts and answers of the tasks that infill or draw a part: with the answer, each is a masked training group."""

from collections.abc import Callable

import numpy as np
import pytest
from plain_engine import PlainEngine

from rac3.batches.masking import move_spans
from rac3.config import InputError
from rac3.documents.store import Tokens
from rac3.generation.copying import Copying
from rac3.generation.engine import Engine
from rac3.generation.prompts import Context, Form
from rac3.generation.request import Draw, Sample
from rac3.generation.sampling import Guidance, Sampling
from rac3.generation.tasks import caption, controlled, draw, edit, infill_image, infill_text
from rac3.tokens.vocabulary import END_OF_INFILL, EOD, IMAGE_END

CODES = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5])
TEXT = np.array([20, 21, 22, 23, 24, 25])
MAIN: Tokens = (False, TEXT), (True, CODES)
RETRIEVED: Tokens = (False, np.array([7, 8])), (True, np.arange(9))


def training(
    form: Form, spans: list[tuple[int, int]], main: Tokens = MAIN, retrieved: tuple[Tokens, ...] = (RETRIEVED,)
):
    """The masked group as (id, offset) of each place; spans of the text count from 0, those of the image from 100."""
    starts = {False: 1, True: len(main[0][1]) + 2 - 100}
    spans = [(low + starts[low >= 100], high + starts[low >= 100]) for low, high in spans]
    sequences = [form.builder.sequence(each) for each in (*retrieved, main)]
    sequences[-1] = move_spans(form.vocabulary, sequences[-1], spans)
    ids = [EOD, *np.concatenate([each.ids for each in sequences])]
    return list(zip(map(int, ids), [0, *np.concatenate([each.offsets for each in sequences]).tolist()], strict=True))


def sample(*runs: np.ndarray) -> Sample:
    return Sample([np.asarray(run, np.int32) for run in runs], [np.zeros(len(run), np.float32) for run in runs])


CONTEXT = Context([RETRIEVED])


def test_an_image_follows_its_caption(form: Form, completed: Callable):
    (got,) = completed(draw.request(form, TEXT, CONTEXT).request, [48 + CODES])
    assert [*got, (IMAGE_END, 0), (EOD, 0)] == training(form, [])
    assert draw.answer(form, sample(48 + CODES)).tolist() == CODES.tolist()


def test_guidance_draws_with_a_mask_for_the_text(form: Form, completed: Callable):
    """As in training where the whole caption is masked."""
    _, bare = completed(draw.request(form, TEXT, Context([RETRIEVED], without="text")).request, [48 + CODES])
    masked = training(form, [(0, 6)])
    assert bare == masked[: len(bare)]
    assert masked[len(bare)] == (IMAGE_END, 0)


def test_a_caption_is_a_masked_text(form: Form, completed: Callable):
    (got,) = completed(caption.request(form, CODES, CONTEXT, 10).request, [8 + TEXT])
    assert [*got, (EOD, 0)] == training(form, [(0, 6)])
    assert caption.answer(form, sample(8 + TEXT)).tolist() == TEXT.tolist()


def test_a_caption_may_follow_its_image(form: Form, completed: Callable):
    (got,) = completed(caption.request(form, CODES, CONTEXT, 10, infill=False).request, [8 + TEXT])
    assert got == training(form, [], ((True, CODES), (False, TEXT)))


@pytest.mark.parametrize("spans", [[(2, 4)], [(0, 2)], [(4, 6)], [(0, 6)], [(1, 2), (3, 5)], [(0, 1), (1, 2), (5, 6)]])
@pytest.mark.parametrize("image", [False, True])
def test_parts_of_a_text_are_masked_spans(form: Form, completed: Callable, spans: list[tuple[int, int]], image: bool):
    edges = [0, *(edge for span in spans for edge in span), 6]
    known = [TEXT[low:high] for low, high in zip(edges[::2], edges[1::2], strict=True)]
    lengths = [high - low for low, high in spans]
    asked = infill_text.request(form, known, lengths, CONTEXT, CODES if image else None)
    runs = [8 + TEXT[low:high] for low, high in spans]
    (got,) = completed(asked.request, runs)
    if image:
        assert [*got, (EOD, 0)] == training(form, spans)
    else:
        text = form.builder.sequence(((False, TEXT),))
        masked = move_spans(form.vocabulary, text, spans)
        assert got[-len(masked.ids) + 1 :] == list(
            zip(masked.ids[:-1].tolist(), masked.offsets[:-1].tolist(), strict=True)
        )
    assert [run.tolist() for run in infill_text.answer(sample(*runs))] == [
        TEXT[low:high].tolist() for low, high in spans
    ]


def rectangle(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    """A mask of 12 x 12 pixels."""
    mask = np.zeros((12, 12), bool)
    mask[top:bottom, left:right] = True
    return mask


@pytest.mark.parametrize("masked", [[4, 5, 6], [0, 1, 3, 4], [2, 5, 8], [1], range(9)])
@pytest.mark.parametrize("text", [(), TEXT])
def test_the_masked_part_of_an_image_is_one_span(form: Form, completed: Callable, masked, text):
    """From its first code to its last; the known codes in between are given."""
    under = np.isin(np.arange(9), masked)
    asked = infill_image.request(form, CODES, under, CONTEXT, text)
    drawn = sum(isinstance(run, Draw) for run in asked.request.grammar)
    runs = np.split(np.array(masked), 1 + np.flatnonzero(np.diff(masked) > 1))
    assert drawn == len(runs)
    (got,) = completed(asked.request, [48 + CODES[run] for run in runs])
    span = (min(masked), max(masked) + 1)
    if len(text):
        assert [*got, (END_OF_INFILL, 0), (EOD, 0)] == training(form, [(100 + span[0], 100 + span[1])])
    else:
        whole = move_spans(form.vocabulary, form.builder.sequence(((True, CODES),)), [(2 + span[0], 2 + span[1])])
        assert got[-len(whole.ids) + 2 :] == list(
            zip(whole.ids[:-2].tolist(), whole.offsets[:-2].tolist(), strict=True)
        )


def test_only_masked_codes_change(form: Form):
    under = np.isin(np.arange(9), [0, 4, 5])
    filled = infill_image.answer(form, sample([58], [59, 60]), CODES, under)
    assert filled.tolist() == [10, 1, 4, 1, 11, 12, 2, 6, 5]
    assert CODES.tolist() == [3, 1, 4, 1, 5, 9, 2, 6, 5]


def test_masked_codes_are_those_that_show_a_masked_pixel(form: Form):
    """12 x 12 pixels are 3 x 3 codes of 4 x 4: a rectangle of pixels 3 to 4 touches four of them."""
    assert np.flatnonzero(infill_image.masked_codes(form, rectangle(3, 3, 5, 5))).tolist() == [0, 1, 3, 4]
    assert np.flatnonzero(infill_image.masked_codes(form, rectangle(4, 8, 8, 12))).tolist() == [7]
    assert np.flatnonzero(infill_image.masked_codes(form, rectangle(0, 0, 12, 1))).tolist() == [0, 1, 2]


def test_outside_the_mask_every_pixel_stays():
    rng = np.random.default_rng(0)
    original, drawn = rng.integers(0, 256, (2, 12, 12, 3), np.uint8)
    mask = rectangle(3, 2, 7, 9)
    plugged = infill_image.plug(original, drawn, mask)
    np.testing.assert_array_equal(plugged[~mask], original[~mask])
    np.testing.assert_array_equal(plugged[2:9, 3:7], drawn[2:9, 3:7])


def test_guidance_infills_with_a_mask_for_the_text(form: Form):
    """As in training where both are masked, the text first; the text's span would come after the image's."""
    under = np.isin(np.arange(9), [3, 4])
    asked = infill_image.request(form, CODES, under, Context(without="text"), TEXT)
    image = [*(48 + CODES[:3]), *(48 + CODES[5:])]
    assert [prompt.ids.tolist() for prompt in asked.request.prompts] == [
        [1, 2, *(8 + TEXT), 3, *image[:3], 78, *image[3:], 4, 78],
        [1, 2, 78, 3, *image[:3], 79, *image[3:], 4, 79],
    ]


@pytest.mark.parametrize("module", [edit, controlled])
def test_tasks_by_given_documents_need_some(form: Form, module):
    given = (TEXT,) if module is controlled else (CODES, CODES == 1)
    plain = draw if module is controlled else infill_image
    asked, same = (each.request(form, *given, CONTEXT, samples=2, first=3).request for each in (module, plain))
    assert [prompt.ids.tolist() for prompt in asked.prompts] == [prompt.ids.tolist() for prompt in same.prompts]
    assert (asked.samples, asked.first) == (2, 3)
    with pytest.raises(InputError, match="and none is given"):
        module.request(form, *given, Context())


BAD = [
    (lambda form: draw.request(form, [], CONTEXT), "the prompt has no text"),
    (
        lambda form: caption.request(form, CODES[:4], CONTEXT, 5),
        "the image has 4 codes, but this model's images have 9",
    ),
    (lambda form: infill_image.request(form, CODES[:4], CODES[:4] > 0, CONTEXT), "the image has 4 codes"),
    (lambda form: infill_image.request(form, CODES, CODES > 90, CONTEXT), "the mask covers nothing"),
    (lambda form: infill_image.masked_codes(form, np.zeros((12, 12), bool)), "the mask covers nothing"),
    (lambda form: infill_image.masked_codes(form, np.ones((12, 8), bool)), "a mask of 8 x 12 pixels does not divide"),
    (lambda form: infill_image.masked_codes(form, np.ones((10, 10), bool)), "a mask of 10 x 10 pixels does not divide"),
    (lambda form: infill_text.request(form, [TEXT], [], CONTEXT), "the text has 0 masks; use 1 to 16"),
    (lambda form: infill_text.request(form, [TEXT[:1]] * 18, [1] * 17, CONTEXT), "the text has 17 masks"),
    (lambda form: infill_text.request(form, [TEXT], [1], CONTEXT), "1 masks separate 2 known parts of a text, not 1"),
    (lambda form: infill_text.request(form, [TEXT, []], [0], CONTEXT), "a mask of 0 tokens has nothing to fill in"),
]


@pytest.mark.parametrize(("ask", "message"), BAD)
def test_bad_input_is_one_line(form: Form, ask: Callable, message: str):
    with pytest.raises(InputError, match=message) as raised:
        ask(form)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_the_engine_draws_as_the_plain_one(form: Form, engine: PlainEngine):
    """With a random model, guidance, an ensemble, and copying where there are documents and words."""
    under = np.isin(np.arange(9), [0, 4, 5])
    three = [((False, TEXT[1 + text : 4]), (True, CODES[::-1])) for text in range(3)]
    asked = [
        draw.request(form, TEXT[:3], Context([RETRIEVED], without="text"), samples=2),
        caption.request(form, CODES, Context(three, ensemble=True), 6, samples=2),
        infill_text.request(form, [TEXT[:2], TEXT[3:]], [4], CONTEXT),
        infill_image.request(form, CODES, under, CONTEXT),
    ]
    copying = Sampling(copying=Copying(0.5), top_p=0.9)
    samplings = [Sampling(guidance=Guidance(2.0), top_k=9), copying, copying, copying]
    starts = np.arange(form.vocabulary.padded_size) % 3 > 0
    plain = PlainEngine(engine.model, engine.params, form.vocabulary, 3, starts)
    real = Engine(engine.model, engine.params, form.vocabulary, image_width=3, word_starts=starts, rows=8)
    requests = [each.request for each in asked]
    results, expected = (dict(each.run(requests, samplings, [0] * 4)) for each in (real, plain))
    for number in range(4):
        for got, wanted in zip(results[number], expected[number], strict=True):
            assert [run.tolist() for run in got.runs] == [run.tolist() for run in wanted.runs]
            np.testing.assert_allclose(np.concatenate(got.log_probs), np.concatenate(wanted.log_probs), atol=1e-4)
    assert [draw.answer(form, each).shape for each in results[0]] == [(9,)] * 2
    filled = infill_image.answer(form, results[3][0], CODES, under)
    assert (filled[~under] == CODES[~under]).all()
