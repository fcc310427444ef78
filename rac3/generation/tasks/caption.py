"""Caption: image to text (paper, section 4.2), by filling in the masked caption, or by plain continuation.

<eod> m1 <eod> m2 <eod> <img alt=" <mask:0> " src=" I0 I1 I2 I3 "> <mask:0>  ->  a red fox <eoi>
<eod> m1 <eod> m2 <eod> <img alt=" " src=" I0 I1 I2 I3 ">                    ->  a red fox <eod>
"""

import numpy as np
from jaxtyping import Int

from rac3.generation.prompts import Asked, Context, Form, Piece, ask
from rac3.generation.request import Sample
from rac3.tokens.vocabulary import END_OF_INFILL, EOD, IMAGE_ALT, IMAGE_END, IMAGE_SOURCE, NUM_SPECIALS


def request(
    form: Form,
    codes: Int[np.ndarray, " tokens"],
    context: Context,
    max_tokens: int,
    samples: int = 1,
    first: int = 0,
    infill: bool = True,
) -> Asked:
    """Captions of an image, of at most `max_tokens` ids.

    Args:
      infill: the caption is the image's masked alt text; else, a text that follows the image.

    Raises:
      InputError: these are no image's codes, or there is no room for a caption.
    """
    form.check_image(codes)
    mask: list[Piece] = [form.vocabulary.mask(0)] if infill else []
    main = [IMAGE_ALT, *mask, IMAGE_SOURCE, form.image_piece(codes), IMAGE_END, *mask]
    text = form.draw_text(max_tokens, END_OF_INFILL if infill else EOD)
    return ask(form, main, [text], context, samples, first)


def answer(form: Form, sample: Sample) -> Int[np.ndarray, " _"]:
    """The caption, as ids of the text tokenizer."""
    return sample.runs[0] - NUM_SPECIALS
