"""CM3 masking: spans of a document move to its end, after sentinels.

    in : <img alt=" a red fox "  src=" I0 I1 I2 I3 "> <eod>
    out: <img alt=" a <mask:0> " src=" I0 I1 I2 I3 "> <mask:0> red fox <eoi> <eod>

Sources: CM3 (arXiv 2201.07520, section 3.1); RA-CM3 (section 3.3); the public code of the authors' group
(github.com/facebookresearch/metaseq, branch `scaling_racm3`). By default the number of spans of a document may be 0, a
span stays inside one text or one image, and sentinels carry no loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from rac3.config import InputError
from rac3.tokens.html import Sequenced
from rac3.tokens.vocabulary import END_OF_INFILL, NUM_MASKS, Vocabulary

TOKENS_PER_SPAN = 3  # a span adds two sentinels and an <eoi>


@dataclass(frozen=True)
class Masking:
    """Config of the masking.

    Attributes:
      preset: `ra_cm3` (at least 0 spans in each document, each inside one text or image), `cm3` (at least 1, anywhere
        in the document, as in the CM3 paper), `cm3leon` (at least 1, each inside one text or image; our markup ids
        replace its `<break>`), `metaseq` (as the public code: at least 0 in a whole group, each inside one text or
        image) or `none`.
      mean_spans: mean of the Poisson draw before clamping.
      max_spans: the largest number of spans in one document.
      whole_segments: share of spans that are a whole text or image, each as likely as any other of its document,
        however long. Uniformly drawn ends mask a whole caption in a few percent of small documents, and almost never
        next to an image of 1,024 tokens; yet captioning asks for a whole caption after its image. The papers use 0.
    """

    preset: Literal["ra_cm3", "cm3", "cm3leon", "metaseq", "none"] = "ra_cm3"
    mean_spans: float = 1.0
    max_spans: int = 16
    whole_segments: float = 0.0

    def __post_init__(self) -> None:
        if self.mean_spans <= 0:
            raise InputError(
                f"masking.mean_spans={self.mean_spans} is not positive; use 1.0, or preset none to mask nothing"
            )
        if not 1 <= self.max_spans <= NUM_MASKS:
            raise InputError(
                f"masking.max_spans={self.max_spans} is outside 1 to {NUM_MASKS}, the number of mask sentinels; "
                f"use {NUM_MASKS}, as the papers do"
            )
        if not 0 <= self.whole_segments <= 1:
            raise InputError(f"masking.whole_segments={self.whole_segments} is outside 0 to 1; the papers use 0")
        if self.whole_segments and self.preset in ("cm3", "metaseq"):
            raise InputError(
                f"masking.whole_segments={self.whole_segments} has no meaning for preset {self.preset}, whose spans "
                "are drawn across segments; use 0, or preset ra_cm3"
            )

    @property
    def per_group(self) -> bool:
        """Whether spans are drawn for a group as a whole, by the draws of its main document."""
        return self.preset == "metaseq"

    @property
    def draws_per_document(self) -> int:
        return 1 + (2 * self.max_spans**2 if self.per_group else 3 * self.max_spans)

    def num_spans(self, draws: Float[np.ndarray, "documents draws"]) -> Int[np.ndarray, " documents"]:
        """The number of spans to draw for each document; overlapping spans are dropped later."""
        if self.preset == "none":
            return np.zeros(len(draws), np.int64)
        drawn = np.searchsorted(self._cumulative, draws[:, 0], side="right")
        return np.clip(drawn, 1 if self.preset in ("cm3", "cm3leon") else 0, self.max_spans)

    @cached_property
    def _cumulative(self) -> Float[np.ndarray, " max_spans"]:
        """The chances of at most 0, 1, ... spans."""
        k = np.arange(self.max_spans)
        factorials = np.cumprod(np.maximum(k, 1).astype(np.float64))
        return np.cumsum(np.exp(-self.mean_spans) * self.mean_spans**k / factorials)


def mask_group(
    masking: Masking,
    vocabulary: Vocabulary,
    documents: Sequence[Sequenced],
    draws: Float[np.ndarray, "documents draws"],
) -> list[Sequenced]:
    """Mask the documents of a group, the main one last, each with `masking.draws_per_document` uniform draws.

    Every document ends with `<eod>`. It gets at most `TOKENS_PER_SPAN * masking.num_spans(draws)` longer; the whole
    group does if `masking.per_group`, by the draws of the main document.
    """
    if masking.per_group:
        spans = choose_group_spans(masking, documents, draws[-1])
    else:
        spans = [choose_spans(masking, *each) for each in zip(documents, draws, strict=True)]
    return [move_spans(vocabulary, *each) for each in zip(documents, spans, strict=True)]


def move_spans(vocabulary: Vocabulary, document: Sequenced, spans: Sequence[tuple[int, int]]) -> Sequenced:
    """Move each of the sorted [start, end) `spans` to the end of the document, after its sentinel."""
    if not spans:
        return document
    length = len(document.ids) + TOKENS_PER_SPAN * len(spans)
    ids, offsets = np.empty(length, np.int32), np.zeros(length, np.int32)
    place = 0

    def emit(start: int, end: int) -> None:
        nonlocal place
        ids[place : place + end - start] = document.ids[start:end]
        offsets[place : place + end - start] = document.offsets[start:end]
        place += end - start

    def emit_special(token: int) -> None:
        nonlocal place
        ids[place] = token
        place += 1

    begin = 0
    for index, (start, end) in enumerate(spans):
        emit(begin, start)
        emit_special(vocabulary.mask(index))
        begin = end
    emit(begin, len(document.ids) - 1)
    for index, (start, end) in enumerate(spans):
        emit_special(vocabulary.mask(index))
        emit(start, end)
        emit_special(END_OF_INFILL)
    emit(len(document.ids) - 1, len(document.ids))
    return Sequenced(ids, offsets)


def choose_spans(masking: Masking, document: Sequenced, draws: Float[np.ndarray, " draws"]) -> list[tuple[int, int]]:
    """Draw sorted, non-overlapping [start, end) spans, which never include the final `<eod>`.

    The ends of a span are two uniform draws over the document. For spans inside segments, the first end is drawn from
    text and image ids, and its segment clips the second end. A third draw decides whether the span is a whole segment
    instead, which the first one chooses. A span that would overlap an earlier one is dropped.
    """
    wanted = int(masking.num_spans(draws[None])[0])
    if wanted == 0:
        return []
    length = len(document.ids) - 1
    segments = [(0, length)] if masking.preset == "cm3" else segments_of(document)
    candidates = sum(high - low for low, high in segments)
    spans: list[tuple[int, int]] = []
    for first_draw, second_draw, whole_draw in draws[1 : 1 + 3 * wanted].reshape(-1, 3).tolist():
        if whole_draw < masking.whole_segments:
            start, end = segments[int(first_draw * len(segments))]
        else:
            first, (low, high) = _nth(segments, int(first_draw * candidates))
            second = min(max(int(second_draw * length), low), high - 1)
            start, end = min(first, second), max(first, second) + 1
        if all(end <= other_start or other_end <= start for other_start, other_end in spans):
            spans.append((start, end))
    return sorted(spans)


def choose_group_spans(
    masking: Masking, documents: Sequence[Sequenced], draws: Float[np.ndarray, " draws"]
) -> list[list[tuple[int, int]]]:
    """Draw the spans of a group as metaseq does; returns those of each document, as `choose_spans` does.

    For k spans there are k^2 candidates, whose ends are two uniform draws over the group. The first k that do not
    overlap are kept. Each is then clipped to the text or image that it covers most of, in whichever document.
    """
    spans: list[list[tuple[int, int]]] = [[] for _ in documents]
    wanted = int(masking.num_spans(draws[None])[0])
    if wanted == 0:
        return spans
    starts = np.cumsum([0, *(len(document.ids) for document in documents)]).tolist()
    segments = [
        (number, starts[number] + low, starts[number] + high)
        for number, document in enumerate(documents)
        for low, high in segments_of(document)
    ]
    kept: list[tuple[int, int]] = []
    for pair in draws[1 : 1 + 2 * wanted**2].reshape(-1, 2).tolist():
        start, end = int(min(pair) * starts[-1]), int(max(pair) * starts[-1] + 0.5)
        if start == end or any(start < other_end and other_start < end for other_start, other_end in kept):
            continue
        kept.append((start, end))
        shares = [min(end, high) - max(start, low) for _, low, high in segments]
        number, low, high = segments[int(np.argmax(shares))]
        if max(shares) > 0:  # else it covers markup alone
            spans[number].append((max(start, low) - starts[number], min(end, high) - starts[number]))
        if len(kept) == wanted:
            break
    return [sorted(each) for each in spans]


def segments_of(document: Sequenced) -> list[tuple[int, int]]:
    """The [start, end) of each text and image of a document that is not masked."""
    markup = np.flatnonzero(document.offsets == 0)
    edges = zip([-1, *markup[:-1].tolist()], markup.tolist(), strict=True)
    return [(before + 1, after) for before, after in edges if after > before + 1]


def _nth(segments: Sequence[tuple[int, int]], number: int) -> tuple[int, tuple[int, int]]:
    """The place of the id that has this number among those of all segments, and its segment."""
    for low, high in segments:
        if number < high - low:
            return low + number, (low, high)
        number -= high - low
    raise ValueError(f"there are {number} ids too few")
