"""Documents that go on, text by text and image by image."""

from collections.abc import Callable

import numpy as np
import pytest

from rac3.config import InputError
from rac3.documents.store import Tokens
from rac3.generation.prompts import Context, Form
from rac3.generation.request import Draw, Sample
from rac3.generation.tasks import continuation
from rac3.tokens.vocabulary import EOD

T1, T2, T3 = np.array([1, 2, 3]), np.array([4]), np.array([5, 6])
I1, I2 = np.arange(9), np.arange(9) + 20
RETRIEVED: Tokens = (False, np.array([7, 8])), (True, I2)

# What is given, the order of what follows, and what follows; a text after a text is its end.
CASES = [
    ([], ["text"], [T1]),
    ([], ["image"], [I1]),
    ([], ["text", "image", "text"], [T1, I1, T2]),
    ([], ["image", "image", "text", "image"], [I1, I2, T1, I2]),
    ([T1], ["image"], [I1]),
    ([T1], ["text"], [T2]),
    ([T1], ["text", "image"], [T2, I1]),
    ([T1, I1], ["text"], [T2]),
    ([T1, I1], ["text", "image", "text"], [T2, I2, T3]),
    ([T1, I1], ["image"], [I2]),
    ([I1, T1], ["image", "text"], [I2, T3]),
    ([T1, I1, T2], ["text", "image", "image"], [T3, I2, I1]),
]


def tokens(parts: list[np.ndarray]) -> Tokens:
    return tuple((len(part) == 9, part) for part in parts)


def whole(given: list[np.ndarray], follow: list[np.ndarray]) -> Tokens:
    """The document that comes of it."""
    parts = [*given]
    for part in follow:
        if parts and len(part) < 9 and len(parts[-1]) < 9:
            parts[-1] = np.concatenate([parts[-1], part])
        else:
            parts.append(part)
    return tokens(parts)


@pytest.mark.parametrize(("start", "follow", "parts"), CASES)
def test_a_document_goes_on_as_it_would_in_training(form: Form, completed: Callable, start, follow, parts):
    asked = continuation.request(form, tokens(start), follow, Context([RETRIEVED]), max_tokens=5)
    runs = [part + (48 if len(part) == 9 else 8) for part in parts]
    (got,) = completed(asked.request, runs)
    sequences = [form.builder.sequence(each) for each in (RETRIEVED, whole(start, parts))]
    ids = [EOD, *np.concatenate([each.ids for each in sequences]).tolist()]
    offsets = [0, *np.concatenate([each.offsets for each in sequences]).tolist()]
    expected = list(zip(ids, offsets, strict=True))
    # Markup after the last image is known, and not asked for.
    assert got == expected[: len(got)]
    assert len(expected) - len(got) == (2 if follow[-1] == "image" else 0)
    draws = [run.count for run in asked.request.grammar if isinstance(run, Draw)]
    assert draws == [9 if kind == "image" else 5 for kind in follow]


def test_the_answer_is_segments_in_their_order(form: Form):
    sample = Sample([8 + T1, 48 + I1, np.zeros(0, np.int32)], [np.zeros(1, np.float32)] * 3)
    segments = continuation.answer(form, ["text", "image", "text"], sample)
    assert [(each.is_image, each.ids.tolist()) for each in segments] == [(False, T1.tolist()), (True, I1.tolist())]


BAD = [
    ([], [], "nothing is to follow"),
    ([], ["text", "text"], "two texts in a row are one text"),
    ([T1, T2], ["image"], "two texts in a row are one text"),
    ([I1[:4] + 20], ["text"], "the image has 4 codes"),
]


@pytest.mark.parametrize(("start", "follow", "message"), BAD)
def test_bad_input_is_one_line(form: Form, start, follow, message: str):
    document = tuple((bool(part.max() > 8), part) for part in start)
    with pytest.raises(InputError, match=message):
        continuation.request(form, document, follow, Context(), 5)
