"""How a CLIP or SigLIP wants its images: the settings that lie beside its weights, and the scaling that they mean."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from rac3.config import InputError
from rac3.documents.document import prepare_image

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)

LONGEST = 64  # a strip whose sides are further apart than this loses its ends before it is scaled, to bound memory


@dataclass(frozen=True)
class ClipImages:
    """Images to squares of the tower's size, normalized by `mean` and `std` (of 0..1).

    `square` computes on RGB pixels what the reference does, bit for bit, up to sides of `LONGEST` : 1. What comes
    before is `decode_image`'s, which differs from the references where these lose something: transparency is shown on
    white, EXIF orientation is applied, and 16-bit gray keeps its range.

    Attributes:
      steps: `scale, cut` scales the shorter side to the tower's size, then keeps the middle square: published CLIPs;
        `cut, scale` is `prepare_image`: CLIPs that are fitted here; `stretch` scales both sides: SigLIPs.
      resample: a Pillow filter, in lower case.
      rounding: where the middle square starts if an odd number of pixels is left over: `floor` as in `transformers`,
        `even` (the nearer even number) as in `torchvision`, which OpenCLIP uses.
    """

    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    resample: str = "bicubic"
    steps: Literal["scale, cut", "cut, scale", "stretch"] = "scale, cut"
    rounding: Literal["floor", "even"] = "floor"

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise InputError(f"clip images: mean={self.mean} and std={self.std} must be 3 numbers each, std above 0")
        if self.resample.upper() not in PIL.Image.Resampling.__members__:
            known = ", ".join(name.lower() for name in PIL.Image.Resampling.__members__)
            raise InputError(f"clip images: resample={self.resample!r} is unknown; use one of {known}")

    def square(self, pixels: UInt8[np.ndarray, "height width 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
        """With `scale, cut`, unlike `prepare_image`, the longer side is scaled to whole pixels first.

        1000 x 333 to 224: scaled to 672 (not 672.67) x 224, so the two scales differ by 0.1%, then columns 224 to 448.
        """
        if self.steps == "cut, scale":
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
        asked = {"size": edge, "crop_size": crop, "do_center_crop": given.get("do_center_crop", True)}
        _expect(asked, {"size": size, "crop_size": [size, size], "do_center_crop": True}, where)
        return cls(**_of_processor(given, OPENAI_MEAN, OPENAI_STD, PIL.Image.Resampling.BICUBIC, where))

    @classmethod
    def of_siglip(cls, settings: Mapping[str, Any], size: int, where: str) -> "ClipImages":
        """The same for `transformers`' SigLIP processor, which has no crop. Raises as `of_hugging_face`."""
        given = {name: value for name, value in settings.items() if value is not None}
        edges = given.get("size", 224)
        edges = {"height": edges, "width": edges} if isinstance(edges, int) else edges
        _expect({"size": edges}, {"size": {"height": size, "width": size}}, where)
        kind = _of_processor(given, SIGLIP_MEAN, SIGLIP_STD, PIL.Image.Resampling.BICUBIC, where)
        return cls(**kind, steps="stretch")

    @classmethod
    def of_naflex(cls, settings: Mapping[str, Any], where: str) -> "ClipImages":
        """The same for SigLIP 2's NaFlex processor, on square images; of others, the middle square is kept."""
        given = {name: value for name, value in settings.items() if value is not None}
        return cls(**_of_processor(given, SIGLIP_MEAN, SIGLIP_STD, PIL.Image.Resampling.BILINEAR, where))

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
            mean=_three(given.get("mean", OPENAI_MEAN), f"{where}: mean"),
            std=_three(given.get("std", OPENAI_STD), f"{where}: std"),
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


def _of_processor(
    given: Mapping[str, Any], mean: tuple[float, ...], std: tuple[float, ...], filter: int, where: str
) -> dict[str, Any]:
    """What the processors of `transformers` have in common, with the given defaults."""
    steps = ("do_resize", "do_rescale", "do_normalize")
    factor = given.get("rescale_factor", 1 / 255)
    asked = {"rescale_factor": round(factor, 6) if isinstance(factor, int | float) else factor}
    asked |= {name: given.get(name, True) for name in steps}
    _expect(asked, {"rescale_factor": round(1 / 255, 6), **dict.fromkeys(steps, True)}, where)
    return {
        "mean": _three(given.get("image_mean", mean), f"{where}: image_mean"),
        "std": _three(given.get("image_std", std), f"{where}: image_std"),
        "resample": _filter_name(given.get("resample", filter), where),
    }


def _three(values: Any, name: str) -> tuple[float, ...]:
    """One number for each channel."""
    each = [values] * 3 if isinstance(values, int | float) else values
    if not isinstance(each, list | tuple) or len(each) != 3 or not all(isinstance(v, int | float) for v in each):
        raise InputError(f"{name}={values!r} is not three numbers, one for each channel; correct it in its file")
    return tuple(float(value) for value in each)


def _filter_name(number: Any, where: str) -> str:
    try:
        return PIL.Image.Resampling(number).name.lower()
    except ValueError:
        raise InputError(f"{where}: resample={number!r} is no filter of Pillow; 3 is bicubic") from None
