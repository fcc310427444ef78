"""Documents to ids and back, losslessly; anything else raises."""

import numpy as np
import pytest

from rac3.tokens.html import Segment, decode, encode, segment_offsets
from rac3.tokens.vocabulary import EOD, IMAGE_ALT, IMAGE_END, IMAGE_SOURCE, PAD, Vocabulary

VOCABULARY = Vocabulary(text_size=50, image_size=20)
FIRST_TEXT, FIRST_IMAGE, MASK = 8, 58, 78  # the first text id, image id and sentinel


def text(*ids: int) -> Segment:
    return Segment(False, np.array(ids))


def image(*codes: int) -> Segment:
    return Segment(True, np.array(codes))


def random_segments(rng: np.random.Generator) -> list[Segment]:
    """A random document: images and texts in any order, without adjacent texts."""
    segments: list[Segment] = []
    for _ in range(rng.integers(1, 8)):
        is_image = bool(rng.random() < 0.5) or (bool(segments) and not segments[-1].is_image)
        segments.append(Segment(is_image, rng.integers(0, 20 if is_image else 50, rng.integers(1, 9))))
    return segments


def test_the_form_of_each_kind_of_document():
    def t(ids: list[int]) -> list[int]:
        return [FIRST_TEXT + id for id in ids]

    def i(codes: list[int]) -> list[int]:
        return [FIRST_IMAGE + code for code in codes]

    cases = {
        "caption and image": ([text(4, 2), image(1, 3)], [IMAGE_ALT, *t([4, 2]), IMAGE_SOURCE, *i([1, 3]), IMAGE_END]),
        "text alone": ([text(7)], [*t([7])]),
        "image alone": ([image(5)], [IMAGE_ALT, IMAGE_SOURCE, *i([5]), IMAGE_END]),
        "nothing": ([], []),
        "interleaved": (
            [text(1), image(2), image(3), text(4)],
            [
                IMAGE_ALT,
                *t([1]),
                IMAGE_SOURCE,
                *i([2]),
                IMAGE_END,
                IMAGE_ALT,
                IMAGE_SOURCE,
                *i([3]),
                IMAGE_END,
                *t([4]),
            ],
        ),
    }
    for name, (segments, ids) in cases.items():
        np.testing.assert_array_equal(encode(VOCABULARY, segments).ids, [*ids, EOD], err_msg=name)


def test_round_trip_of_random_documents():
    rng = np.random.default_rng(0)
    kinds = set()
    for _ in range(150):
        segments = random_segments(rng)
        ids, _ = encode(VOCABULARY, segments)
        assert ids.dtype == np.int32
        for given in (ids, ids[:-1]):  # the final <eod> may be missing
            back = decode(VOCABULARY, given)
            assert [segment.is_image for segment in back] == [segment.is_image for segment in segments]
            for one, other in zip(back, segments, strict=True):
                np.testing.assert_array_equal(one.ids, other.ids)
        kinds.add((any(s.is_image for s in segments), any(not s.is_image for s in segments)))
    assert kinds == {(True, True), (True, False), (False, True)}


def test_offsets_count_the_ids_of_each_segment_from_one():
    rng = np.random.default_rng(1)
    for _ in range(50):
        segments = random_segments(rng)
        ids, offsets = encode(VOCABULARY, segments)
        counts = [n for segment in segments for n in range(1, 1 + len(segment.ids))]
        np.testing.assert_array_equal(offsets[offsets > 0], counts)
        np.testing.assert_array_equal(offsets > 0, VOCABULARY.is_image(ids) | VOCABULARY.is_text(ids))
    assert segment_offsets(VOCABULARY, np.zeros(0, np.int32)).shape == (0,)
    np.testing.assert_array_equal(segment_offsets(VOCABULARY, VOCABULARY.from_image(np.zeros(3, int))), [1, 2, 3])


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([text(1), text(2)], "two adjacent texts"),
        ([image()], "no ids"),
        ([text()], "no ids"),
        ([text(50)], "text id 50"),
        ([image(20)], "image code 20"),
    ],
)
def test_what_is_no_document_is_not_encoded(segments: list[Segment], message: str):
    with pytest.raises(ValueError, match=message):
        encode(VOCABULARY, segments)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([IMAGE_ALT, FIRST_TEXT, IMAGE_SOURCE, IMAGE_END], "place 3: expected image codes"),
        ([IMAGE_ALT, FIRST_TEXT, IMAGE_SOURCE, FIRST_IMAGE], 'place 4: expected ">, found the end'),
        ([IMAGE_ALT, FIRST_TEXT, FIRST_IMAGE], r'place 2: expected " src=", found 58'),
        ([IMAGE_ALT, FIRST_TEXT, IMAGE_SOURCE, FIRST_IMAGE, FIRST_TEXT, IMAGE_END], 'place 4: expected ">, found 8'),
        ([FIRST_TEXT, IMAGE_ALT, IMAGE_SOURCE, FIRST_IMAGE, IMAGE_END], "place 1: a text outside an image"),
        ([FIRST_IMAGE], r'place 0: expected <img alt="'),
        ([EOD, FIRST_TEXT], r'place 0: expected <img alt="'),
        ([FIRST_TEXT, PAD], "place 1"),
        ([IMAGE_ALT, MASK, IMAGE_SOURCE, FIRST_IMAGE, IMAGE_END], r'place 1: expected " src=", found 78'),
        ([FIRST_TEXT, 500], "place 1"),
        ([FIRST_TEXT, EOD, EOD], "place 1"),
    ],
)
def test_ids_that_no_document_has_raise_with_their_place(ids: list[int], message: str):
    with pytest.raises(ValueError, match=message):
        decode(VOCABULARY, np.array(ids))


def test_whatever_is_decoded_is_encoded_to_the_same_ids():
    """`decode` accepts only what `encode` writes: tested on documents with one id changed, some truncated."""
    rng = np.random.default_rng(2)
    alphabet = np.array([PAD, EOD, IMAGE_ALT, IMAGE_SOURCE, IMAGE_END, FIRST_TEXT, FIRST_IMAGE, MASK])
    accepted = refused = 0
    for _ in range(400):
        ids = encode(VOCABULARY, random_segments(rng)).ids[:-1]
        ids[rng.integers(len(ids))] = rng.choice(alphabet)
        ids = ids[: rng.integers(max(1, len(ids) - 2), len(ids) + 1)]
        try:
            segments = decode(VOCABULARY, ids)
        except ValueError:
            refused += 1
            continue
        accepted += 1
        np.testing.assert_array_equal(encode(VOCABULARY, segments).ids[: len(ids)], ids)
    assert accepted > 20
    assert refused > 20
