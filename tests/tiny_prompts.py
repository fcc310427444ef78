"""Sequences of the tiny config, spelled by hand: 8 special ids, 300 text ids, 16 codes, then the sentinels."""

from collections.abc import Iterable, Sequence

import numpy as np

from rac3.documents.store import TokenizedDocument

FIRST_TEXT, FIRST_CODE, FIRST_MASK = 8, 308, 324


def spelled(item: TokenizedDocument) -> list[int]:
    """<img alt=" text " src=" codes "> <eod>"""
    text, codes = item.ids
    return [2, *(FIRST_TEXT + text), 3, *(FIRST_CODE + codes), 4, 1]


def image_prompt(documents: Iterable[TokenizedDocument], text: Sequence[int] | np.ndarray) -> list[int]:
    """<eod> documents <img alt=" text " src=" """
    return [1, *(id for document in documents for id in spelled(document)), 2, *(FIRST_TEXT + np.asarray(text)), 3]


def caption_prompt(documents: Iterable[TokenizedDocument], codes: np.ndarray) -> list[int]:
    """<eod> documents <img alt=" <mask:0> " src=" codes "> <mask:0>"""
    before = [id for document in documents for id in spelled(document)]
    return [1, *before, 2, FIRST_MASK, 3, *(FIRST_CODE + codes), 4, FIRST_MASK]


def of_length(item: TokenizedDocument, size: int) -> TokenizedDocument:
    """The document with so much text that it has `size` ids."""
    text = np.arange(size - 4 - len(item.ids[1]), dtype=np.int32)
    changed = TokenizedDocument(item.document, (text, item.ids[1]))
    assert len(spelled(changed)) == size
    return changed
