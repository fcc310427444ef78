"""The image preprocessing of a CLIP or SigLIP: settings that are published next to its weights, and what they mean."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from rac3.config import InputError, quoted
from rac3.documents.document import prepare_image

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

LONGEST = 64  # times the shorter side; a longer strip is cropped to it before scaling, to bound memory


@dataclass(frozen=True)
class ClipImages:
    """Images to squares of the tower's size, normalized by `mean` and `std` (of 0..1).

    `square` computes on RGB pixels what the reference does, bit for bit, up to sides of `LONGEST` : 1. Decoding is
    `decode_image`'s, which differs from the references where they lose something: transparency is shown on white, EXIF
    orientation is applied, and 16-bit gray keeps its range.

    Attributes:
      steps: `scale, crop` scales the shorter side to the tower's size, then keeps the middle square: published CLIPs;
        `crop, scale` is `prepare_image`: CLIPs that are fitted here; `stretch` scales both sides: SigLIPs.
      resample: a Pillow filter, in lower case.
      rounding: where the middle square starts if an odd number of pixels is left over: `floor` as in `transformers`,
        `even` (the nearer even number) as in `torchvision`, which OpenCLIP uses.
    """

    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    resample: str = "bicubic"
    steps: Literal["scale, crop", "crop, scale", "stretch"] = "scale, crop"
    rounding: Literal["floor", "even"] = "floor"

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise InputError(f"clip images: mean={self.mean} and std={self.std} must be 3 numbers each, std above 0")
        if self.resample.upper() not in PIL.Image.Resampling.__members__:
            known = ", ".join(name.lower() for name in PIL.Image.Resampling.__members__)
            raise InputError(f"clip images: resample={self.resample!r} is unknown; use one of {known}")

    def square(self, pixels: UInt8[np.ndarray, "height width 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
        """With `scale, crop`, unlike `prepare_image`, the longer side is scaled to whole pixels first.

        1000 x 333 to 224: scaled to 672 (not 672.67) x 224, so the two scales differ by 0.1%, then columns 224 to 448.
        """
        if self.steps == "crop, scale":
            return prepare_image(pixels, size)
        filter = PIL.Image.Resampling[self.resample.upper()]
        if self.steps == "stretch":
            return np.asarray(PIL.Image.fromarray(pixels).resize((size, size), filter))
        height, width, _ = pixels.shape
        most = LONGEST * min(height, width)
        top, left = max(height - most, 0) // 2, max(width - most, 0) // 2
        pixels = pixels[top : top + most, left : left + most]
        height, width, _ = pixels.shape
        short = min(height, width)
        high, wide = size * height // short, size * width // short
        scaled = np.asarray(PIL.Image.fromarray(pixels).resize((wide, high), filter))
        top, left = self._middle(high - size), self._middle(wide - size)
        return scaled[top : top + size, left : left + size]

    def _middle(self, rest: int) -> int:
        return rest // 2 if self.rounding == "floor" else round(rest / 2)


def require_preprocessing(file: Path, asked: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse other preprocessing than ours; `file` has the settings that ask for it."""
    for name, value in asked.items():
        if value != wanted[name]:
            raise InputError(
                f"{file}: {name}={quoted(value)} is another preprocessing than {name}={wanted[name]!r}, which this "
                "tower has here; give a checkpoint that uses that"
            )


def per_channel(file: Path, name: str, values: Any) -> tuple[float, ...]:
    """A setting as three numbers; a single one is that of each channel.

    Raises:
      InputError: it is neither.
    """
    each = [values] * 3 if isinstance(values, int | float) else values
    if not isinstance(each, list | tuple) or len(each) != 3 or not all(isinstance(v, int | float) for v in each):
        raise InputError(
            f"{file}: {name}={quoted(values)} is not three numbers, one for each channel; correct it there"
        )
    return tuple(float(value) for value in each)
