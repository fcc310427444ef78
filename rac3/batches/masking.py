"""CM3 masking: spans of a document move to its end, after sentinels.

    in : <img alt=" a red fox "  src=" I0 I1 I2 I3 "> <eod>
    out: <img alt=" a <mask:0> " src=" I0 I1 I2 I3 "> <mask:0> red fox <eoi> <eod>

Sources: CM3 (arXiv 2201.07520, section 3.1); RA-CM3 (section 3.3). By default the number of spans may be 0, a span
stays inside one text or one image, and sentinels carry no loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from rac3.config import InputError
from rac3.tokens.html import Sequenced
from rac3.tokens.vocabulary import END_OF_INFILL, NUM_MASKS, Vocabulary

TOKENS_PER_SPAN = 3  # a span adds two sentinels and an <eoi>


@dataclass(frozen=True)
class Masking:
    """Config of the masking.

    Attributes:
      preset: `ra_cm3` (at least 0 spans, each inside one text or image), `cm3` (at least 1, anywhere in the document,
        as in the CM3 paper), `cm3leon` (at least 1, each inside one text or image; our markup ids replace its
        `<break>`) or `none`.
      mean_spans: mean of the Poisson draw before clamping.
      max_spans: the largest number of spans in one document.
      whole_segments: share of spans that grow to the whole text or image they are in. Uniformly drawn ends mask a whole
        caption in a few percent of small documents, and almost never next to an image of 1,024 tokens; yet captioning
        asks for a whole caption after its image. The papers use 0.
    """

    preset: Literal["ra_cm3", "cm3", "cm3leon", "none"] = "ra_cm3"
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
        if self.whole_segments and self.preset == "cm3":
            raise InputError(
                f"masking.whole_segments={self.whole_segments} has no meaning for preset cm3, whose spans cross "
                "segments; use 0, or preset ra_cm3"
            )

    @property
    def draws_per_document(self) -> int:
        return 1 + 3 * self.max_spans

    def num_spans(self, draws: Float[np.ndarray, "documents draws"]) -> Int[np.ndarray, " documents"]:
        """The number of spans to draw for each document; overlapping spans are dropped later."""
        if self.preset == "none":
            return np.zeros(len(draws), np.int64)
        k = np.arange(self.max_spans)
        factorials = np.cumprod(np.maximum(k, 1).astype(np.float64))
        cumulative = np.cumsum(np.exp(-self.mean_spans) * self.mean_spans**k / factorials)
        drawn = np.searchsorted(cumulative, draws[:, 0], side="right")
        return np.clip(drawn, 1 if self.preset in ("cm3", "cm3leon") else 0, self.max_spans)


class Masked(NamedTuple):
    """A masked document. `scored` is False for ids without loss as targets: the sentinels."""

    ids: Int[np.ndarray, " seq"]
    offsets: Int[np.ndarray, " seq"]
    scored: Bool[np.ndarray, " seq"]


def mask_document(
    masking: Masking, vocabulary: Vocabulary, document: Sequenced, draws: Float[np.ndarray, " draws"]
) -> Masked:
    """Mask one document, which ends with `<eod>`, with `masking.draws_per_document` uniform draws.

    The result is at most `TOKENS_PER_SPAN * masking.num_spans(draws)` longer.
    """
    return move_spans(vocabulary, document, choose_spans(masking, vocabulary, document.ids, draws))


def move_spans(vocabulary: Vocabulary, document: Sequenced, spans: Sequence[tuple[int, int]]) -> Masked:
    """Move each of the sorted [start, end) `spans` to the end of the document, after its sentinel."""
    ids, offsets = document
    pieces, all_offsets, scored = [], [], []

    def emit(new_ids: np.ndarray, new_offsets: np.ndarray, counts: bool) -> None:
        pieces.append(new_ids)
        all_offsets.append(new_offsets)
        scored.append(np.full(len(new_ids), counts))

    def emit_special(token: int, counts: bool) -> None:
        emit(np.array([token], np.int32), np.zeros(1, np.int32), counts)

    place = 0
    for index, (start, end) in enumerate(spans):
        emit(ids[place:start], offsets[place:start], True)
        emit_special(vocabulary.mask(index), False)
        place = end
    emit(ids[place:-1], offsets[place:-1], True)
    for index, (start, end) in enumerate(spans):
        emit_special(vocabulary.mask(index), False)
        emit(ids[start:end], offsets[start:end], True)
        emit_special(END_OF_INFILL, True)
    emit(ids[-1:], offsets[-1:], True)
    return Masked(np.concatenate(pieces), np.concatenate(all_offsets), np.concatenate(scored))


def choose_spans(
    masking: Masking, vocabulary: Vocabulary, ids: Int[np.ndarray, " seq"], draws: Float[np.ndarray, " draws"]
) -> list[tuple[int, int]]:
    """Draw sorted, non-overlapping [start, end) spans, which never include the final `<eod>`.

    The ends of a span are two uniform draws over the document. For spans inside segments, the first end is drawn from
    text and image ids, and its segment clips the second end. A third draw decides whether the span grows to the whole
    segment. A span that would overlap an earlier one is dropped.
    """
    wanted = int(masking.num_spans(draws[None])[0])
    if wanted == 0:
        return []
    inside = masking.preset != "cm3"
    length = len(ids) - 1
    candidates = np.flatnonzero(vocabulary.is_text(ids) | vocabulary.is_image(ids)) if inside else np.arange(length)
    taken = np.zeros(len(ids), bool)
    spans: list[tuple[int, int]] = []
    for first_draw, second_draw, whole_draw in draws[1 : 1 + 3 * wanted].reshape(-1, 3):
        if len(candidates) == 0:
            break
        first = int(candidates[int(first_draw * len(candidates))])
        second = int(second_draw * length)
        if inside:
            low, high = _segment_around(vocabulary, ids, first)
            second = min(max(second, low), high - 1)
            if whole_draw < masking.whole_segments:
                first, second = low, high - 1
        start, end = min(first, second), max(first, second) + 1
        if not taken[start:end].any():
            taken[start:end] = True
            spans.append((start, end))
    return sorted(spans)


def _segment_around(vocabulary: Vocabulary, ids: np.ndarray, place: int) -> tuple[int, int]:
    """The [start, end) of the text or image around `place`."""
    image = vocabulary.is_image(ids)
    same = image if image[place] else vocabulary.is_text(ids)
    others = np.flatnonzero(~same)
    after = int(np.searchsorted(others, place))
    return (int(others[after - 1]) + 1 if after else 0), (int(others[after]) if after < len(others) else len(ids))
