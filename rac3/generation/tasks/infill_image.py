"""Infill an image: the codes under a mask, given the others (paper, section 5.2).

    mask     <eod> m1 <eod> <img alt=" a red fox " src=" I0 <mask:0> I3 "> <mask:0>
    . x      ->  I1 I2
    x .

A mask is given in pixels. Each code that shows a masked pixel is drawn, and of its pixels the masked ones are taken:
all others stay as they were, bit for bit. The codes from the first masked one to the last are one span, as most are in
training, and the known ones in between are given where they come. With one span for each row, all known codes would
stand before what is drawn, but so many spans are rare in training.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
from jaxtyping import Bool, Int, UInt8

from rac3.config import InputError
from rac3.generation.prompts import Asked, Context, Form, Piece, TextIds, ask, given
from rac3.generation.request import Draw, Given, Sample
from rac3.tokens.vocabulary import IMAGE_ALT, IMAGE_END, IMAGE_SOURCE

PixelMask = Bool[np.ndarray, "height width"]


def masked_codes(form: Form, mask: PixelMask) -> Bool[np.ndarray, " tokens"]:
    """Which codes show a masked pixel.

    Raises:
      InputError: nothing is masked, or the grid of codes does not divide the image.
    """
    width = form.image_width
    if not mask.any():
        raise InputError("the mask covers nothing; mark what is to be drawn")
    if not width or mask.shape[0] != mask.shape[1] or mask.shape[0] % width:
        raise InputError(
            f"a mask of {mask.shape[1]} x {mask.shape[0]} pixels does not divide into {form.tokens_per_image} codes; "
            "give one of the size of the run's images"
        )
    side = mask.shape[0] // width
    return mask.reshape(width, side, width, side).any((1, 3)).reshape(-1)


def request(
    form: Form,
    codes: Int[np.ndarray, " tokens"],
    masked: Bool[np.ndarray, " tokens"],
    context: Context,
    text: TextIds = (),
    samples: int = 1,
    first: int = 0,
) -> Asked:
    """The masked codes of an image, given the others.

    Args:
      text: the image's caption, if there is one.

    Raises:
      InputError: these are no image's codes, nothing is masked, or there is no room.
    """
    form.check_image(codes)
    if not masked.any():
        raise InputError("the mask covers nothing; mark what is to be drawn")
    start, end = int(masked.argmax()), len(masked) - int(masked[::-1].argmax())
    before = [form.image_piece(codes[:start])] if start else []
    after = [form.image_piece(codes[end:], end + 1)] if end < len(codes) else []
    mask, no_text = form.vocabulary.mask(0), form.vocabulary.mask(1)

    def prompt(text: Sequence[Piece], mask: int) -> list[Piece]:
        return [IMAGE_ALT, *text, IMAGE_SOURCE, *before, mask, *after, IMAGE_END, mask]

    if not len(text):
        return ask(form, prompt([], mask), [*_runs(form, codes, masked, start, end)], context, samples, first)
    main, bare = prompt([form.text_piece(text)], mask), prompt([mask], no_text)
    return ask(form, main, [*_runs(form, codes, masked, start, end)], context, samples, first, bare)


def _runs(form: Form, codes: np.ndarray, masked: np.ndarray, start: int, end: int) -> Iterator[Draw | Given]:
    """The codes of a span: drawn where masked, else known."""
    for is_masked, group in groupby(range(start, end), key=lambda place: bool(masked[place])):
        places = [*group]
        if is_masked:
            yield form.draw_codes(places[0], len(places))
        else:
            yield given([form.image_piece(codes[places], places[0] + 1)])


def answer(
    form: Form, sample: Sample, codes: Int[np.ndarray, " tokens"], masked: Bool[np.ndarray, " tokens"]
) -> Int[np.ndarray, " tokens"]:
    """The codes of the whole image."""
    filled = codes.copy()
    filled[masked] = np.concatenate(sample.runs) - form.vocabulary.image_start
    return filled


def plug(
    original: UInt8[np.ndarray, "height width 3"], drawn: UInt8[np.ndarray, "height width 3"], mask: PixelMask
) -> UInt8[np.ndarray, "height width 3"]:
    """The original with the drawn pixels under the mask."""
    return np.where(mask[..., None], drawn, original)
