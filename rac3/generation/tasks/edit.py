"""Edit an image: infill it by documents that are given, so that it shows what they do (paper, section 5.3)."""

import numpy as np
from jaxtyping import Bool, Int

from rac3.config import InputError
from rac3.generation.prompts import Asked, Context, Form, TextIds
from rac3.generation.tasks import infill_image


def request(
    form: Form,
    codes: Int[np.ndarray, " tokens"],
    masked: Bool[np.ndarray, " tokens"],
    context: Context,
    text: TextIds = (),
    samples: int = 1,
    first: int = 0,
) -> Asked:
    """The masked codes of an image, as the documents have it. The answer is read as that of `infill_image`.

    Raises:
      InputError: there are no documents, or as `infill_image.request`.
    """
    if not context.documents:
        raise InputError("an edit follows documents, and none is given; give --documents, or use the task infill_image")
    return infill_image.request(form, codes, masked, context, text, samples, first)
