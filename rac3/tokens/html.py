"""Documents as CM3 writes them, `<img alt="..." src="...">`, to ids and back, exactly.

    segments: text "a red fox", image I0 I1 I2 I3, text "it sleeps"
    ids     : <img alt=" a red fox " src=" I0 I1 I2 I3 "> it sleeps <eod>

The three pieces of markup are one id each. A caption therefore needs no quoting: what stands between them is text ids
only, whatever characters they spell. A text right before an image is its alt text; an image with no text before it
has an empty alt text.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from rac3.tokens.vocabulary import EOD, IMAGE_ALT, IMAGE_END, IMAGE_SOURCE, Vocabulary


class Segment(NamedTuple):
    """One text or image as the ids of its own tokenizer (text ids, or codes in raster order)."""

    is_image: bool
    ids: np.ndarray


class Sequenced(NamedTuple):
    """A document as ids of the one vocabulary.

    `offsets` is 1 + the place in its text, or in its image (raster order), and 0 at markup.
    """

    ids: Int[np.ndarray, " seq"]
    offsets: Int[np.ndarray, " seq"]


def encode(vocabulary: Vocabulary, segments: Sequence[Segment]) -> Sequenced:
    """Segments -> ids, closed by `<eod>`.

    Raises:
      ValueError: two texts in a row (they would come back as one), an empty segment, an id outside its range.
    """
    ids: list[Sequence[int] | np.ndarray] = []
    alt: np.ndarray | None = None
    for segment in segments:
        if len(segment.ids) == 0:
            raise ValueError("a segment has no ids; leave empty texts and images out of the document")
        if not segment.is_image:
            if alt is not None:
                raise ValueError("two texts in a row; join them, or put an image between them")
            alt = vocabulary.from_text(segment.ids)
            continue
        ids += [[IMAGE_ALT], alt if alt is not None else [], [IMAGE_SOURCE], vocabulary.from_image(segment.ids)]
        ids += [[IMAGE_END]]
        alt = None
    if alt is not None:
        ids.append(alt)
    flat = np.concatenate([np.asarray(part, np.int32) for part in [*ids, [EOD]]])
    return Sequenced(flat, segment_offsets(vocabulary, flat))


def segment_offsets(vocabulary: Vocabulary, ids: Int[np.ndarray, " seq"]) -> Int[np.ndarray, " seq"]:
    """1 + the place of each id in its run of text ids or of image codes; 0 at every other id."""
    inside = vocabulary.is_text(ids) | vocabulary.is_image(ids)  # two runs never touch: markup stands between
    index = np.arange(len(ids))
    run_start = np.maximum.accumulate(np.where(inside, -1, index))  # the last id before the run
    return np.where(inside, index - run_start, 0).astype(np.int32)


def decode(vocabulary: Vocabulary, ids: Int[np.ndarray, " seq"]) -> list[Segment]:
    """Ids of one document -> its segments; the inverse of `encode`. A missing final `<eod>` is allowed.

    Raises:
      ValueError: ids that no document encodes to; the message names the place.
    """
    ids = np.asarray(ids, np.int32)
    if ids.size and ids[-1] == EOD:
        ids = ids[:-1]
    segments: list[Segment] = []
    place = 0

    def run(wanted: np.ndarray, start: int, offset: int, is_image: bool) -> int:
        end = start
        while end < len(ids) and wanted[end]:
            end += 1
        if end > start:
            segments.append(Segment(is_image, ids[start:end] - offset))
        return end

    def expect(token: int, at: int, name: str) -> int:
        if at >= len(ids) or ids[at] != token:
            raise ValueError(f"place {at}: expected {name}, found {ids[at] if at < len(ids) else 'the end'}")
        return at + 1

    text, image = vocabulary.is_text(ids), vocabulary.is_image(ids)
    text_offset = vocabulary.image_start - vocabulary.text_size
    while place < len(ids):
        if text[place]:
            place = run(text, place, text_offset, False)
            if place < len(ids):
                raise ValueError(f"place {place}: a text outside an image is the end of a document")
            continue
        place = expect(IMAGE_ALT, place, '<img alt="')
        place = run(text, place, text_offset, False)
        place = expect(IMAGE_SOURCE, place, '" src="')
        before = place
        place = run(image, place, vocabulary.image_start, True)
        if place == before:
            raise ValueError(f"place {place}: an image without codes")
        place = expect(IMAGE_END, place, '">')
    return segments
