"""Groups: a main document and its retrieved documents as one training sequence."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

from rac3.batches.masking import Masking, mask_group
from rac3.batches.packing import (
    IGNORED,
    MAIN_IMAGE,
    MAIN_TEXT,
    MARKUP,
    RETRIEVED_IMAGE,
    RETRIEVED_TEXT,
    Group,
)
from rac3.documents.store import Shown, Tokens
from rac3.tokens.html import Sequenced, encode
from rac3.tokens.vocabulary import EOD, Vocabulary


@dataclass(frozen=True)
class GroupBuilder:
    """Builds groups (paper, eq. 2-3).

    Attributes:
      vocabulary: the joint vocabulary.
      masking: how documents are masked.
      retrieved_weight: loss weight of retrieved documents, the paper's alpha.
      retrieved: the part of a retrieved document that a group shows: all of it, only its images or only its texts
        (appendix C.3).
    """

    vocabulary: Vocabulary
    masking: Masking
    retrieved_weight: float
    retrieved: Shown = "document"

    def sequence(self, document: Tokens) -> Sequenced:
        """A document as ids, with a final `<eod>`."""
        return encode(self.vocabulary, document)

    def shown(self, document: Tokens) -> Tokens | None:
        """The part of a retrieved document that a group shows, texts joined into one; None if it has no such part."""
        if self.retrieved == "document":
            return document
        wanted = self.retrieved == "image"
        segments = tuple((is_image, ids) for is_image, ids in document if is_image == wanted)
        if not segments:
            return None
        return segments if wanted else ((False, np.concatenate([ids for _, ids in segments])),)

    def retrieved_sequences(self, documents: Sequence[Tokens]) -> list[Sequenced]:
        """The shown parts of retrieved documents, as ids; leaves out documents without one."""
        return [self.sequence(part) for part in map(self.shown, documents) if part is not None]

    def build(self, documents: Sequence[Tokens], draws: Float[np.ndarray, "documents draws"]) -> Group:
        """Build the group of `documents`, the main one last; `draws` are the masking draws of each.

        Every retrieved document must have a part to show.
        """
        sequences = [*self.retrieved_sequences(documents[:-1]), self.sequence(documents[-1])]
        return self.join(mask_group(self.masking, self.vocabulary, sequences, draws))

    def join(self, documents: Sequence[Sequenced]) -> Group:
        """Join masked documents, the main one last, into one group. Sentinels have no weight as targets."""
        ids = np.concatenate([_EOD, *[each.ids for each in documents]])
        offsets = np.concatenate([_MARKUP, *[each.offsets for each in documents]])
        targets = ids[1:]
        main = len(targets) - len(documents[-1].ids)
        kinds = np.concatenate([self._retrieved_kinds[targets[:main]], self._main_kinds[targets[main:]]])
        weight = np.full(len(targets), self.retrieved_weight, np.float32)
        weight[main:] = 1.0
        weight[kinds == IGNORED] = 0.0
        return Group(ids[:-1], targets, offsets[:-1], weight, kinds)

    @cached_property
    def _main_kinds(self) -> Int[np.ndarray, " vocab"]:
        return self._kinds(MAIN_TEXT, MAIN_IMAGE)

    @cached_property
    def _retrieved_kinds(self) -> Int[np.ndarray, " vocab"]:
        return self._kinds(RETRIEVED_TEXT, RETRIEVED_IMAGE)

    def _kinds(self, text: int, image: int) -> Int[np.ndarray, " vocab"]:
        """The kind of each id as a target."""
        ids = np.arange(self.vocabulary.size)
        kinds = np.full(len(ids), MARKUP, np.int32)
        kinds[self.vocabulary.is_text(ids)] = text
        kinds[self.vocabulary.is_image(ids)] = image
        kinds[self.vocabulary.is_mask(ids)] = IGNORED
        return kinds


_EOD, _MARKUP = np.array([EOD], np.int32), np.zeros(1, np.int32)  # the first id of a group, and its offset
