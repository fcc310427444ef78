"""A main document and its retrieved ones as one training sequence."""

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
from rac3.documents.document import Image
from rac3.documents.store import TokenizedDocument
from rac3.tokens.html import Segment, Sequenced, encode
from rac3.tokens.vocabulary import EOD, Vocabulary


@dataclass(frozen=True)
class GroupBuilder:
    """Builds groups with one vocabulary, masking and weight of retrieved documents (paper, eq. 2-3)."""

    vocabulary: Vocabulary
    masking: Masking
    retrieved_weight: float

    def sequence(self, item: TokenizedDocument) -> Sequenced:
        """A document as ids, `<eod>` last."""
        pairs = zip(item.document.segments, item.ids, strict=True)
        return encode(self.vocabulary, [Segment(isinstance(segment, Image), ids) for segment, ids in pairs])

    def build(self, documents: Sequence[TokenizedDocument], draws: Float[np.ndarray, "documents draws"]) -> Group:
        """The group of `documents`, the main one last; `draws` are the masking draws of each."""
        return self.join(
            [
                mask_document(self.masking, self.vocabulary, self.sequence(item), row)
                for item, row in zip(documents, draws, strict=True)
            ]
        )

    def join(self, masked: Sequence[Masked]) -> Group:
        """Retrieved documents and the main one (last), masked already, as one group."""
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
