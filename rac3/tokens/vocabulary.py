"""The joint vocabulary: one id space for specials, text, image codes and mask sentinels."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

PAD = 0
EOD = 1  # before a group and after every document
IMAGE_ALT = 2  # `<img alt="`
IMAGE_SOURCE = 3  # `" src="`
IMAGE_END = 4  # `">`
END_OF_INFILL = 5
NUM_SPECIALS = 8  # including two spares
NUM_MASKS = 16  # sentinels: the CM3 paper masks up to 16 spans

SPECIAL_NAMES = ("<pad>", "<eod>", '<img alt="', '" src="', '">', "<eoi>", "<spare:0>", "<spare:1>")


@dataclass(frozen=True)
class Vocabulary:
    """The id ranges, in this order: specials, text, image codes, mask sentinels.

    Sentinels come last, so that their number does not shift text or image ids.
    """

    text_size: int
    image_size: int
    num_masks: int = NUM_MASKS

    @property
    def image_start(self) -> int:
        return NUM_SPECIALS + self.text_size

    @property
    def mask_start(self) -> int:
        return self.image_start + self.image_size

    @property
    def size(self) -> int:
        return self.mask_start + self.num_masks

    @property
    def padded_size(self) -> int:
        """The size of the embedding table: a multiple of 128, so that tensor parallelism can shard it."""
        return -(-self.size // 128) * 128

    def from_text(self, ids: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Ids of the text tokenizer -> joint ids."""
        return self._shift(ids, NUM_SPECIALS, self.text_size, "text id")

    def from_image(self, codes: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Codes of the image tokenizer -> joint ids."""
        return self._shift(codes, self.image_start, self.image_size, "image code")

    def mask(self, index: int) -> int:
        """The id of `<mask:index>`."""
        if not 0 <= index < self.num_masks:
            raise ValueError(f"mask {index} is outside the {self.num_masks} sentinels; use 0 to {self.num_masks - 1}")
        return self.mask_start + index

    def is_text(self, ids: Int[np.ndarray, "*shape"]) -> Bool[np.ndarray, "*shape"]:
        return (ids >= NUM_SPECIALS) & (ids < self.image_start)

    def is_image(self, ids: Int[np.ndarray, "*shape"]) -> Bool[np.ndarray, "*shape"]:
        return (ids >= self.image_start) & (ids < self.mask_start)

    def is_mask(self, ids: Int[np.ndarray, "*shape"]) -> Bool[np.ndarray, "*shape"]:
        return (ids >= self.mask_start) & (ids < self.size)

    def _shift(self, ids: Int[np.ndarray, " n"], start: int, size: int, what: str) -> Int[np.ndarray, " n"]:
        ids = np.asarray(ids, np.int32)
        if ids.size and (ids.min() < 0 or ids.max() >= size):
            bad = ids.min() if ids.min() < 0 else ids.max()
            raise ValueError(f"{what} {bad} is outside the vocabulary's {size}; use 0 to {size - 1}")
        return ids + np.int32(start)
