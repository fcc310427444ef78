"""Controlled generation: caption to image, in the style or setting of demonstrations (paper, section 5.3)."""

from rac3.config import InputError
from rac3.generation.prompts import Asked, Context, Form, TextIds
from rac3.generation.tasks import draw


def request(form: Form, text: TextIds, context: Context, samples: int = 1, first: int = 0) -> Asked:
    """Images of a caption, like those of the given documents. The answer is read as that of `draw`.

    Raises:
      InputError: there are no demonstrations, or as `draw.request`.
    """
    if not context.documents:
        raise InputError("controlled generation follows demonstrations, and none is given; give --documents")
    return draw.request(form, text, context, samples, first)
