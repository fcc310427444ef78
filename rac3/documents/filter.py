"""The paper's filter of LAION samples (section 4.1)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rac3.config import InputError
from rac3.documents.document import JSON, Note, SampleError


@dataclass(frozen=True)
class LaionFilter:
    """Drops images that are probably watermarked, probably unsafe, or small.

    Reads the columns that LAION and img2dataset write, in any case: `pwatermark`, `punsafe`, and `original_width`,
    `original_height` (or else `width`, `height`), as numbers or as text. A missing value or NaN passes its check: LAION
    lacks some scores. A value that is no number does not pass: it may be a score.
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
        """Why to drop the sample: "watermark", "unsafe" or "small"; None to keep it.

        Raises:
          SampleError: a value that decides is no number.
        """
        values = {name.casefold(): value for name, value in metadata.items() if value is not None}
        values |= {name: value for name, value in metadata.items() if value is not None}  # the usual case first
        if self.max_watermark < 1 and _number(values, "pwatermark", default=0.0) > self.max_watermark:
            return "watermark"
        if self.max_unsafe < 1 and _number(values, "punsafe", default=0.0) > self.max_unsafe:
            return "unsafe"
        if self.min_side == 0:
            return None
        width = _number(values, "original_width", "width", default=math.inf)
        height = _number(values, "original_height", "height", default=math.inf)
        return "small" if min(width, height) < self.min_side else None

    def check(self, note: Note, where: str) -> None:
        """Refuses data whose scores can't be known, where this would let unsafe samples pass.

        Raises:
          InputError: the note is about metadata that holds a score.
        """
        limits = {"punsafe": self.max_unsafe, "pwatermark": self.max_watermark}
        read = {name for name, limit in limits.items() if limit < 1}
        hidden = {name.casefold() for name in note.hidden}
        if missing := sorted(read if "*" in hidden else read & hidden):
            raise InputError(
                f"{where}: {note.what} ({note.count} samples; {note.example}), so that the filter would pass samples "
                f"whose {' and '.join(missing)} it does not know; correct the table, or turn the filter off with "
                "--filter.max-unsafe 1 --filter.max-watermark 1"
            )


def _number(values: Mapping[str, JSON], *names: str, default: float) -> float:
    """The first of the named fields that has a value.

    Raises:
      SampleError: it is no number.
    """
    for name in names:
        value = values.get(name)
        if isinstance(value, str):
            value = value.strip() or None
        if value is None:
            continue
        try:
            if not isinstance(value, int | float | str):
                raise ValueError
            number = float(value)
        except (ValueError, OverflowError):
            raise SampleError(f"unreadable score: {name}={str(value)[:40]!r}") from None
        if not math.isnan(number):
            return number
    return default
