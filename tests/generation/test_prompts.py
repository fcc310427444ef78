"""A prompt is the start of a training group."""

import numpy as np
import pytest

from rac3.batches.masking import move_spans
from rac3.config import InputError
from rac3.generation.prompts import caption_to_image, image_to_caption
from rac3.tokens.html import Segment, Sequenced, encode
from rac3.tokens.vocabulary import END_OF_INFILL, EOD, IMAGE_END, Vocabulary

VOCABULARY = Vocabulary(text_size=40, image_size=30)


def document(text: list[int], codes: list[int]) -> Sequenced:
    return encode(VOCABULARY, [Segment(False, np.array(text)), Segment(True, np.array(codes))])


RETRIEVED = [document([1, 2], [3, 4, 5, 6]), document([7], [8, 9, 10, 11])]
MAIN = document([20, 21, 22], [12, 13, 14, 15])


@pytest.mark.parametrize("retrieved", [[], RETRIEVED])
def test_an_image_follows_its_caption(retrieved: list[Sequenced]):
    prompt = caption_to_image(VOCABULARY, retrieved, [20, 21, 22])
    whole = np.concatenate([[EOD], *[each.ids for each in retrieved], MAIN.ids])
    np.testing.assert_array_equal([*prompt, *VOCABULARY.from_image(np.array([12, 13, 14, 15])), IMAGE_END, EOD], whole)


@pytest.mark.parametrize("retrieved", [[], RETRIEVED])
def test_a_caption_follows_its_image_as_one_masked_span(retrieved: list[Sequenced]):
    """The training document whose whole caption is masked."""
    prompt = image_to_caption(VOCABULARY, retrieved, np.array([12, 13, 14, 15]))
    masked = move_spans(VOCABULARY, MAIN, [(1, 4)])
    whole = np.concatenate([[EOD], *[each.ids for each in retrieved], masked.ids])
    text = VOCABULARY.from_text(np.array([20, 21, 22]))
    np.testing.assert_array_equal([*prompt, *text, END_OF_INFILL, EOD], whole)


def test_an_empty_caption_is_refused():
    with pytest.raises(InputError, match="no text"):
        caption_to_image(VOCABULARY, RETRIEVED, [])
