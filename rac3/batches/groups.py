"""Groups: a main document and its retrieved documents as one training sequence."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from rac3.batches.masking import Masked, Masking, mask_document
from rac3.batches.packing import (
    IGNORED,
    MAIN_IMAGE,
    MAIN_TEXT,
    MARKUP,
    RETRIEVED_IMAGE,
    RETRIEVED_TEXT,
    Group,
)
from rac3.documents.document import Document, Image, Text
from rac3.documents.store import Shown, TokenizedDocument
from rac3.tokens.html import Segment, Sequenced, encode
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

    def sequence(self, item: TokenizedDocument) -> Sequenced:
        """A document as ids, with a final `<eod>`."""
        pairs = zip(item.document.segments, item.ids, strict=True)
        return encode(self.vocabulary, [Segment(isinstance(segment, Image), ids) for segment, ids in pairs])

    def shown(self, item: TokenizedDocument) -> TokenizedDocument | None:
        """The part of a retrieved document that a group shows, texts joined into one; None if it has no such part."""
        if self.retrieved == "document":
            return item
        wanted = Image if self.retrieved == "image" else Text
        pairs = [pair for pair in zip(item.document.segments, item.ids, strict=True) if isinstance(pair[0], wanted)]
        if not pairs:
            return None
        segments, ids = zip(*pairs, strict=True)
        if wanted is Text:
            segments, ids = (Text(item.document.text),), (np.concatenate(ids),)
        return TokenizedDocument(Document(item.document.key, segments, item.document.metadata), ids)

    def retrieved_sequences(self, items: Sequence[TokenizedDocument]) -> list[Sequenced]:
        """The shown parts of retrieved documents, as ids; leaves out documents without one."""
        return [self.sequence(item) for item in map(self.shown, items) if item is not None]

    def build(self, documents: Sequence[TokenizedDocument], draws: Float[np.ndarray, "documents draws"]) -> Group:
        """Build the group of `documents`, the main one last; `draws` are the masking draws of each.

        Every retrieved document must have a part to show.
        """
        sequences = [*self.retrieved_sequences(documents[:-1]), self.sequence(documents[-1])]
        masked = [
            mask_document(self.masking, self.vocabulary, sequence, row)
            for sequence, row in zip(sequences, draws, strict=True)
        ]
        return self.join(masked)

    def join(self, masked: Sequence[Masked]) -> Group:
        """Join masked documents, the main one last, into one group."""
        ids = np.concatenate([[EOD], *[part.ids for part in masked]]).astype(np.int32)
        offsets = np.concatenate([[0], *[part.offsets for part in masked]]).astype(np.int32)
        scored = np.concatenate([part.scored for part in masked])
        main = np.concatenate([np.full(len(part.ids), part is masked[-1]) for part in masked])
        targets = ids[1:]
        weight = np.where(main, 1.0, self.retrieved_weight) * scored
        return Group(ids[:-1], targets, offsets[:-1], weight.astype(np.float32), self._kinds(targets, main, scored))

    def _kinds(self, targets: Int[np.ndarray, " seq"], main: np.ndarray, scored: np.ndarray) -> Int[np.ndarray, " seq"]:
        kinds = np.where(scored, MARKUP, IGNORED)
        kinds = np.where(self.vocabulary.is_text(targets), np.where(main, MAIN_TEXT, RETRIEVED_TEXT), kinds)
        return np.where(self.vocabulary.is_image(targets), np.where(main, MAIN_IMAGE, RETRIEVED_IMAGE), kinds)
