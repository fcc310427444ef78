"""Documents to ids and back, losslessly, in CM3's HTML: `<img alt="..." src="...">`.

    segments: text "a red fox", image I0 I1 I2 I3, text "it sleeps"
    ids     : <img alt=" a red fox " src=" I0 I1 I2 I3 "> it sleeps <eod>

Each of the three pieces of markup is one id, so captions need no quoting: no text id is markup, whichever characters it
spells. The text right before an image is its alt text; an image without one has an empty alt text.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from rac3.tokens.vocabulary import EOD, IMAGE_ALT, IMAGE_END, IMAGE_SOURCE, Vocabulary


class Segment(NamedTuple):
    """One text or image as ids of its own tokenizer: text ids, or image codes in raster order."""

    is_image: bool
    ids: np.ndarray


class Sequenced(NamedTuple):
    """A document as ids of the joint vocabulary.

    `offsets` is 1 + the position within the text or image (raster order), and 0 at markup.
    """

    ids: Int[np.ndarray, " seq"]
    offsets: Int[np.ndarray, " seq"]


def encode(vocabulary: Vocabulary, segments: Sequence[tuple[bool, np.ndarray]]) -> Sequenced:
    """Segments -> ids, with a final `<eod>`. A segment is a `Segment`, or another such pair.

    Raises:
      ValueError: two adjacent texts (which would decode to one), an empty segment, an id outside its range.
    """
    pieces: list[int | np.ndarray] = []  # markup, and the ids of texts and images
    alt: np.ndarray | None = None
    for is_image, own in segments:
        if len(own) == 0:
            raise ValueError("a segment has no ids; leave empty texts and images out of the document")
        if not is_image:
            if alt is not None:
                raise ValueError("two adjacent texts; join them into one")
            alt = vocabulary.from_text(own)
            continue
        pieces += [IMAGE_ALT] if alt is None else [IMAGE_ALT, alt]
        pieces += [IMAGE_SOURCE, vocabulary.from_image(own), IMAGE_END]
        alt = None
    pieces += [EOD] if alt is None else [alt, EOD]
    length = sum(1 if isinstance(piece, int) else len(piece) for piece in pieces)
    ids, offsets = np.empty(length, np.int32), np.zeros(length, np.int32)
    place = 0
    for piece in pieces:
        if isinstance(piece, int):
            ids[place] = piece
            place += 1
        else:
            inside = slice(place, place + len(piece))
            ids[inside], offsets[inside] = piece, np.arange(1, len(piece) + 1)
            place = inside.stop
    return Sequenced(ids, offsets)


def segment_offsets(vocabulary: Vocabulary, ids: Int[np.ndarray, " seq"]) -> Int[np.ndarray, " seq"]:
    """1 + the position of each id in its run of text ids or image codes; 0 at all other ids."""
    inside = vocabulary.is_text(ids) | vocabulary.is_image(ids)  # runs never touch: markup separates them
    index = np.arange(len(ids))
    run_start = np.maximum.accumulate(np.where(inside, -1, index))  # the last id before the run
    return np.where(inside, index - run_start, 0).astype(np.int32)


def decode(vocabulary: Vocabulary, ids: Int[np.ndarray, " seq"]) -> list[Segment]:
    """Ids of one document -> its segments; the inverse of `encode`. The final `<eod>` may be missing.

    Raises:
      ValueError: no document encodes to these ids; the message names the position.
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
                raise ValueError(f"place {place}: a text outside an image must end the document")
            continue
        place = expect(IMAGE_ALT, place, '<img alt="')
        place = run(text, place, text_offset, False)
        place = expect(IMAGE_SOURCE, place, '" src="')
        before = place
        place = run(image, place, vocabulary.image_start, True)
        if place == before:
            raise ValueError(f"place {place}: expected image codes, found none")
        place = expect(IMAGE_END, place, '">')
    return segments
