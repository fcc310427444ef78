"""Infill text: the masked parts of a text, of an image or alone (paper, section 3.3).

    <eod> m1 <eod> <img alt=" a <mask:0> fox " src=" I0 I1 I2 I3 "> <mask:0>  ->  red <eoi>

The ids after a mask keep their offsets in training, which tell the model how long the masked part is. So a mask has an
assumed number of ids, unless it ends the text: several assumptions are several requests, of which the text that is most
probable as a whole is kept.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from rac3.config import InputError
from rac3.generation.prompts import Asked, Context, Form, Piece, TextIds, ask, given
from rac3.generation.request import Draw, Given, Sample
from rac3.tokens.vocabulary import END_OF_INFILL, IMAGE_ALT, IMAGE_END, IMAGE_SOURCE, NUM_SPECIALS


def request(
    form: Form,
    known: Sequence[TextIds],
    tokens: Sequence[int],
    context: Context,
    codes: Int[np.ndarray, " tokens"] | None = None,
    samples: int = 1,
    first: int = 0,
) -> Asked:
    """What is between the known parts of a text.

    Args:
      known: the ids before the first mask, between masks, and after the last one; parts may be empty.
      tokens: the assumed number of ids of each mask, which is also the most that are drawn.
      codes: of the image of which this is the alt text.

    Raises:
      InputError: no mask, more than there are sentinels, or one of no ids; no room.
    """
    vocabulary = form.vocabulary
    if not 1 <= len(tokens) <= vocabulary.num_masks:
        raise InputError(f"the text has {len(tokens)} masks; use 1 to {vocabulary.num_masks}")
    if len(known) != len(tokens) + 1:
        raise InputError(f"{len(tokens)} masks separate {len(tokens) + 1} known parts of a text, not {len(known)}")
    if min(tokens) < 1:
        raise InputError(f"a mask of {min(tokens)} tokens has nothing to fill in; use at least 1")
    text: list[Piece] = []
    grammar: list[Draw | Given] = []
    offset = 1
    for index, part in enumerate(known):
        if len(part):
            text.append(form.text_piece(part, offset))
        offset += len(part)
        if index < len(tokens):
            text.append(vocabulary.mask(index))
            if index:
                grammar.append(given([vocabulary.mask(index)]))
            grammar.append(form.draw_text(tokens[index], END_OF_INFILL, offset))
            offset += tokens[index]
    if codes is not None:
        form.check_image(codes)
        text = [IMAGE_ALT, *text, IMAGE_SOURCE, form.image_piece(codes), IMAGE_END]
    return ask(form, [*text, vocabulary.mask(0)], grammar, context, samples, first)


def answer(sample: Sample) -> list[Int[np.ndarray, " _"]]:
    """What fills each mask, as ids of the text tokenizer."""
    return [run - NUM_SPECIALS for run in sample.runs]
