"""Draw: caption to image (paper, section 4.2).

<eod> m1 <eod> m2 <eod> <img alt=" a red fox " src="  ->  I0 I1 I2 I3
"""

import numpy as np
from jaxtyping import Int

from rac3.config import InputError
from rac3.generation.prompts import Asked, Context, Form, TextIds, ask
from rac3.generation.request import Sample
from rac3.tokens.vocabulary import IMAGE_ALT, IMAGE_SOURCE


def request(form: Form, text: TextIds, context: Context, samples: int = 1, first: int = 0) -> Asked:
    """Images of a caption.

    Raises:
      InputError: the caption is empty, or leaves no room for an image.
    """
    if len(text) == 0:
        raise InputError("the prompt has no text; give a caption, such as --prompt 'a red fox'")
    main = [IMAGE_ALT, form.text_piece(text), IMAGE_SOURCE]
    bare = [IMAGE_ALT, form.vocabulary.mask(0), IMAGE_SOURCE]
    return ask(form, main, [form.draw_image()], context, samples, first, bare)


def answer(form: Form, sample: Sample) -> Int[np.ndarray, " tokens"]:
    """The image's codes."""
    return sample.runs[0] - form.vocabulary.image_start
