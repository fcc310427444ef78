"""The paper's filter of LAION samples (section 4.1)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rac3.config import InputError
from rac3.documents.document import JSON


@dataclass(frozen=True)
class LaionFilter:
    """Drops images that are probably watermarked, probably unsafe, or small.

    Reads the columns that LAION and img2dataset write: `pwatermark`, `punsafe`, and `original_width`,
    `original_height` (or else `width`, `height`). A missing value or NaN passes its check: LAION lacks some scores.
    """

    max_watermark: float = 0.5  # probability
    max_unsafe: float = 0.5  # probability
    min_side: int = 256  # pixels, of the downloaded image

    def __post_init__(self) -> None:
        for name in ("max_watermark", "max_unsafe"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"filter.{name}={getattr(self, name)} is not a probability; use 0 to 1")
        if self.min_side < 0:
            raise InputError(f"filter.min_side={self.min_side} is negative; use 0 to keep every size")

    def reason(self, metadata: Mapping[str, JSON]) -> str | None:
        """Why to drop the sample: "watermark", "unsafe" or "small"; None to keep it."""
        if _number(metadata, "pwatermark", default=0.0) > self.max_watermark:
            return "watermark"
        if _number(metadata, "punsafe", default=0.0) > self.max_unsafe:
            return "unsafe"
        width = _number(metadata, "original_width", "width", default=math.inf)
        height = _number(metadata, "original_height", "height", default=math.inf)
        return "small" if min(width, height) < self.min_side else None


def _number(metadata: Mapping[str, JSON], *names: str, default: float) -> float:
    """The first of the named fields that holds a number."""
    for name in names:
        value = metadata.get(name)
        if isinstance(value, int | float) and not math.isnan(value):
            return float(value)
    return default
