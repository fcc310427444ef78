"""How a published CLIP wants its images: the settings that lie beside its weights, and the scaling that they mean."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from rac3.config import InputError

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

LONGEST = 64  # a strip whose sides are further apart than this loses its ends before it is scaled, to bound memory


@dataclass(frozen=True)
class ClipImages:
    """Scale the shorter side to CLIP's image size, keep the middle square, normalize by `mean` and `std` (of 0..1).

    `square` computes on RGB pixels what the reference does, bit for bit, up to sides of `LONGEST` : 1. What comes
    before is `decode_image`'s, which differs from the references where these lose something: transparency is shown on
    white, EXIF orientation is applied, and 16-bit gray keeps its range.

    Attributes:
      resample: a Pillow filter, in lower case.
      rounding: where the middle square starts if an odd number of pixels is left over: `floor` as in `transformers`,
        `even` (the nearer even number) as in `torchvision`, which OpenCLIP uses.
    """

    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    resample: str = "bicubic"
    rounding: Literal["floor", "even"] = "floor"

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise InputError(f"clip images: mean={self.mean} and std={self.std} must be 3 numbers each, std above 0")
        if self.resample.upper() not in PIL.Image.Resampling.__members__:
            known = ", ".join(name.lower() for name in PIL.Image.Resampling.__members__)
            raise InputError(f"clip images: resample={self.resample!r} is unknown; use one of {known}")

    def square(self, pixels: UInt8[np.ndarray, "height width 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
        """Unlike `prepare_image`, the longer side is scaled to whole pixels before the middle is cut out.

        1000 x 333 to 224: scaled to 672 (not 672.67) x 224, so the two scales differ by 0.1%, then columns 224 to 448.
        """
        height, width, _ = pixels.shape
        most = LONGEST * min(height, width)
        top, left = max(height - most, 0) // 2, max(width - most, 0) // 2
        pixels = pixels[top : top + most, left : left + most]
        height, width, _ = pixels.shape
        short = min(height, width)
        high, wide = size * height // short, size * width // short
        filter = PIL.Image.Resampling[self.resample.upper()]
        scaled = np.asarray(PIL.Image.fromarray(pixels).resize((wide, high), filter))
        top, left = self._middle(high - size), self._middle(wide - size)
        return scaled[top : top + size, left : left + size]

    def _middle(self, rest: int) -> int:
        return rest // 2 if self.rounding == "floor" else round(rest / 2)

    @classmethod
    def of_hugging_face(cls, settings: Mapping[str, Any], size: int, where: str) -> "ClipImages":
        """From the content of `preprocessor_config.json`, whose defaults are those of `transformers`' CLIP processor.

        Args:
          size: the image size of the tower.
          where: names the file in messages.

        Raises:
          InputError: it asks for something else than scaling, middle square and normalization for a tower of `size`.
        """
        given = {name: value for name, value in settings.items() if value is not None}
        edge, crop = given.get("size", 224), given.get("crop_size", 224)
        edge = edge.get("shortest_edge", edge) if isinstance(edge, Mapping) else edge
        crop = list(crop.values()) if isinstance(crop, Mapping) else [crop, crop]
        steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
        asked = {"size": edge, "crop_size": crop, "rescale_factor": round(given.get("rescale_factor", 1 / 255), 6)}
        asked |= {name: given.get(name, True) for name in steps}
        known = {
            "size": size,
            "crop_size": [size, size],
            "rescale_factor": round(1 / 255, 6),
            **dict.fromkeys(steps, True),
        }
        _expect(asked, known, where)
        return cls(
            mean=_three(given.get("image_mean", OPENAI_MEAN)),
            std=_three(given.get("image_std", OPENAI_STD)),
            resample=_filter_name(given.get("resample", 3), where),
        )

    @classmethod
    def of_open_clip(cls, settings: Mapping[str, Any], size: int, where: str) -> "ClipImages":
        """From `preprocess_cfg` of `open_clip_config.json`, with OpenCLIP's defaults. Raises as `of_hugging_face`."""
        given = {name: value for name, value in settings.items() if value is not None}
        edge = given.get("size", size)
        asked = {
            "size": [edge, edge] if isinstance(edge, int) else list(edge)[-2:],
            "mode": given.get("mode", "RGB"),
            "resize_mode": given.get("resize_mode", "shortest"),
        }
        _expect(asked, {"size": [size, size], "mode": "RGB", "resize_mode": "shortest"}, where)
        resample = given.get("interpolation", "bicubic")
        return cls(
            mean=_three(given.get("mean", OPENAI_MEAN)),
            std=_three(given.get("std", OPENAI_STD)),
            resample="bicubic" if resample == "random" else resample,  # random while training only
            rounding="even",
        )


def _expect(asked: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    for name, value in asked.items():
        if value != known[name]:
            raise InputError(
                f"{where}: {name}={value!r} is another preprocessing than {name}={known[name]!r}, which this tower has "
                "here; give a checkpoint that uses that"
            )


def _three(values: Any) -> tuple[float, ...]:
    """One number for each channel."""
    return (float(values),) * 3 if isinstance(values, int | float) else tuple(float(value) for value in values)


def _filter_name(number: Any, where: str) -> str:
    try:
        return PIL.Image.Resampling(number).name.lower()
    except ValueError:
        raise InputError(f"{where}: resample={number!r} is no filter of Pillow; 3 is bicubic") from None
