"""Prompts: retrieved documents, then the given part of the main document.

    caption to image: <eod> m1 <eod> m2 <eod> <img alt=" a red fox " src="
    image to caption: <eod> m1 <eod> m2 <eod> <img alt=" <mask:0> " src=" I0 I1 I2 I3 "> <mask:0>

(paper, section 3.3; documents as in `rac3.tokens.html`)
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from rac3.config import InputError
from rac3.tokens.html import Sequenced
from rac3.tokens.vocabulary import EOD, IMAGE_ALT, IMAGE_END, IMAGE_SOURCE, Vocabulary


def caption_to_image(
    vocabulary: Vocabulary, retrieved: Sequence[Sequenced], text_ids: Sequence[int] | Int[np.ndarray, " n"]
) -> Int[np.ndarray, " seq"]:
    """The prompt whose continuation is an image.

    Raises:
      InputError: the caption is empty.
    """
    if len(text_ids) == 0:
        raise InputError("the prompt has no text; give a caption, such as --prompt 'a red fox'")
    text = vocabulary.from_text(np.asarray(text_ids, np.int32))
    return _join(retrieved, [[IMAGE_ALT], text, [IMAGE_SOURCE]])


def image_to_caption(
    vocabulary: Vocabulary, retrieved: Sequence[Sequenced], codes: Int[np.ndarray, " n"]
) -> Int[np.ndarray, " seq"]:
    """The prompt whose continuation is a caption."""
    mask = [vocabulary.mask(0)]
    return _join(retrieved, [[IMAGE_ALT], mask, [IMAGE_SOURCE], vocabulary.from_image(codes), [IMAGE_END], mask])


def _join(retrieved: Sequence[Sequenced], main: Sequence[Sequence[int] | np.ndarray]) -> Int[np.ndarray, " seq"]:
    parts = [[EOD], *[document.ids for document in retrieved], *main]
    return np.concatenate([np.asarray(part, np.int32) for part in parts])
