"""Continue a document: texts and images in a given order (paper, sections 1 and 3.3).

given   text, image; then text, image, text
prompt  <eod> m1 <eod> <img alt=" a red fox " src=" I0 I1 I2 I3 "> <img alt="
grammar draw text until " src=" | draw an image | given "> | draw text until <eod>
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

from rac3.config import InputError, quoted
from rac3.documents.store import Tokens
from rac3.generation.prompts import Asked, Context, Form, Piece, ask, given
from rac3.generation.request import Draw, Given, Sample
from rac3.tokens.html import Segment
from rac3.tokens.vocabulary import EOD, IMAGE_ALT, IMAGE_END, IMAGE_SOURCE, NUM_SPECIALS

Kind = Literal["text", "image"]


def request(
    form: Form,
    document: Tokens,
    follow: Sequence[Kind],
    context: Context,
    max_tokens: int,
    samples: int = 1,
    first: int = 0,
) -> Asked:
    """What follows a document. A text that follows a text continues it.

    Args:
      document: its start; no segments start a new one.
      follow: what follows, in this order.
      max_tokens: ids that are drawn of each text.

    Raises:
      InputError: nothing or something else is to follow, two texts in a row, an image of another size, or no room.
    """
    if not follow:
        raise InputError("nothing is to follow the document; give an order, such as text image")
    if unknown := [kind for kind in follow if kind not in get_args(Kind)]:
        raise InputError(f"follow={quoted(unknown[0])} is unknown; use {', '.join(get_args(Kind))}")
    kinds: list[Kind] = ["image" if is_image else "text" for is_image, _ in document]
    if ("text", "text") in pairwise(kinds) or ("text", "text") in pairwise(follow):
        raise InputError("two texts in a row are one text; join them, or put an image between them")
    main: list[Piece] = []
    offset = 1  # of the text that is drawn next
    for number, (is_image, ids) in enumerate(document):
        if is_image:
            form.check_image(ids)
            alt = [] if number and kinds[number - 1] == "text" else [IMAGE_ALT]
            main += [*alt, IMAGE_SOURCE, form.image_piece(ids), IMAGE_END]
            offset = 1
        else:
            before_image = "image" in (*kinds[number + 1 :], *follow)
            main += [*([IMAGE_ALT] if before_image else []), form.text_piece(ids)]
            offset = len(ids) + 1
    grammar: list[Draw | Given] = []
    last = kinds[-1] if kinds else "image"
    for number, kind in enumerate(follow):
        markup: list[Piece] = [IMAGE_END] if number and last == "image" else []
        if kind == "text":
            is_alt = number + 1 < len(follow)
            markup += [IMAGE_ALT] if is_alt and last == "image" else []
            drawn = form.draw_text(max_tokens, IMAGE_SOURCE if is_alt else EOD, offset)
        else:
            # A text that was drawn has ended with the markup that starts the image.
            markup += [IMAGE_SOURCE] if number == 0 and last == "text" else []
            markup += [IMAGE_ALT, IMAGE_SOURCE] if last == "image" else []
            drawn = form.draw_image()
        if number == 0:
            main += markup
        elif markup:
            grammar.append(given(markup))
        grammar.append(drawn)
        last, offset = kind, 1
    return ask(form, main, grammar, context, samples, first)


def answer(form: Form, follow: Sequence[Kind], sample: Sample) -> list[Segment]:
    """The texts and images that follow; texts of no ids are left out."""
    start = {"text": NUM_SPECIALS, "image": form.vocabulary.image_start}
    segments = [Segment(kind == "image", run - start[kind]) for kind, run in zip(follow, sample.runs, strict=True)]
    return [each for each in segments if len(each.ids)]
