"""What is asked of a model: prompts to answer, passages to score, and the pictures and masks in them."""

import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import PIL.Image
from jaxtyping import Bool, Shaped, UInt8

from rac3.config import InputError, quoted
from rac3.documents.document import Document, ImageError, decode_image
from rac3.generation.sampling import Sampling
from rac3.generation.tasks.continuation import Kind

Task = Literal["draw", "caption", "infill_image", "infill_text", "edit", "controlled", "continue"]
Ensemble = Literal["", "mean", "best"]
Pixels = UInt8[np.ndarray, "_ _ 3"]
PixelMask = Bool[np.ndarray, "_ _"]
Picture = Pixels | PIL.Image.Image | str | os.PathLike[str]  # pixels, or a file
# What is not zero is drawn, or what is white; or left, top, right, bottom.
Mask = Shaped[np.ndarray, "_ _"] | PIL.Image.Image | tuple[int, int, int, int]
MASK = "<mask>"  # in the text of a prompt: a part to fill in


@dataclass(frozen=True, eq=False)
class Prompt:
    """What is asked of a model.

    Attributes:
      task: `draw` an image of the text, as `controlled` does in the manner of the given documents; `caption` the image;
        `infill_image` under the mask, as `edit` does by what the given documents show; `infill_text` where the text
        says <mask>; `continue` with `follow` after text and image, or after a document.
      text, image, mask: what the task starts from. The mask is True at the pixels to draw, and has the image's size.
      documents: given by hand, in context before those that are retrieved; they need not be in the memory.
      retrieve: the number of documents to retrieve.
      ensemble: what to do with more documents than in training, which go into several prompts with some of them each
        (paper, section 5.4): `mean` averages the distributions of each id over the prompts; `best` answers each prompt
        apart, `samples` times, and keeps the best answers of all. "" has all documents in one prompt.
      document: of `continue`, what it starts from in place of text and image: texts and images in any order.
      follow: kinds of segments, in order.
      samples: how many to draw; the answer has them best first.
      seed: another one draws other samples.
      sampling: None is what the experiment evaluates with.

    Raises:
      InputError: an unknown task, a value of another type or out of its range, or a mask of another size.
    """

    task: Task = "draw"
    text: str = ""
    image: Pixels | None = None
    mask: PixelMask | None = None
    documents: Sequence[Document] = ()
    retrieve: int = 2
    ensemble: Ensemble = ""
    document: Document | None = None
    follow: Sequence[Kind] = ()
    samples: int = 4
    seed: int = 0
    sampling: Sampling | None = None

    def __post_init__(self) -> None:
        if self.task not in get_args(Task):
            raise InputError(f"task={quoted(self.task)} is unknown; use {', '.join(get_args(Task))}")
        if self.ensemble not in get_args(Ensemble):
            raise InputError(f"ensemble={quoted(self.ensemble)} is unknown; use mean, best, or '' for none")
        if not isinstance(self.text, str):
            raise InputError(f"text={quoted(self.text)} is no text; give a str")
        for name, least in (("retrieve", 0), ("samples", 1), ("seed", 0)):
            object.__setattr__(self, name, checked_int(name, getattr(self, name), least))
        if not isinstance(self.sampling, Sampling | None):
            raise InputError(f"sampling={quoted(self.sampling)} is no Sampling; give such as Sampling(temperature=0.5)")
        if self.image is not None:
            _check_pixels(self.image)
        if self.mask is not None and not (isinstance(self.mask, np.ndarray) and self.mask.dtype == bool):
            raise InputError(f"the mask is {quoted(self.mask)}; give a bool array of shape (height, width)")
        if self.mask is not None and self.mask.ndim != 2:
            raise InputError(f"the mask has the shape {self.mask.shape}; give one of shape (height, width)")
        if self.mask is not None and self.image is not None and self.mask.shape != self.image.shape[:2]:
            size, wanted = (f"{x.shape[1]} x {x.shape[0]}" for x in (self.mask, self.image))
            raise InputError(f"the mask has {size} pixels, but the image {wanted}; give one of the same size")
        if self.document is not None:
            _check_document(self.document)
            if self.task != "continue" or self.text or self.image is not None:
                raise InputError("a document is for the task continue, in place of a text and an image; give only one")
        if self.task in ("draw", "controlled", "infill_text") and not self.text.strip():
            raise InputError(f"the task {self.task} needs a text; give one, such as 'a red fox'")

    @property
    def query(self) -> str | Pixels | None:
        """What retrieves: the text, or else the image, whose masked pixels get the mean color of the others.

        Raises:
          ImageError: the image of the document can't be decoded.
        """
        if self.document is not None:
            return self.document.text or self.document.images[0].pixels()
        text = " ".join(self.text.replace(MASK, " ").split())
        if text or self.image is None or self.mask is None or self.mask.all():
            return text or self.image
        known = self.image[~self.mask].mean(0).round().astype(np.uint8)
        return np.where(self.mask[..., None], known, self.image)


@dataclass(frozen=True, eq=False)
class Passage:
    """A part of a document to be scored.

    Attributes:
      segment: its number.
      start, end: of the segment, the ids [start, end): of `Model.tokenizer` for a text, `Model.images` for an image.
        None is its end.
      infill: given also what follows the part; else only what is before it.
      documents, retrieve, ensemble: the context, as in `Prompt`, of which `best` has nothing to rank. What retrieves is
        the rest of the document, without the segment: its text, or else its image.

    Raises:
      InputError: a value of another type or out of its range.
    """

    document: Document
    segment: int = 0
    start: int = 0
    end: int | None = None
    infill: bool = False
    documents: Sequence[Document] = ()
    retrieve: int = 0
    ensemble: Ensemble = ""

    def __post_init__(self) -> None:
        _check_document(self.document)
        for name in ("segment", "start", "retrieve"):
            object.__setattr__(self, name, checked_int(name, getattr(self, name)))
        if self.end is not None:
            object.__setattr__(self, "end", checked_int("end", self.end))
        if self.ensemble not in ("", "mean"):
            raise InputError(
                f"ensemble={quoted(self.ensemble)}: a score has no samples to rank; use mean, or '' for none"
            )


def pixels_of(picture: Picture) -> Pixels:
    """RGB in 0..255 of a picture, or of a file.

    Raises:
      InputError: the file does not exist or is no image, or pixels of another type or shape.
    """
    if isinstance(picture, PIL.Image.Image):
        picture = np.asarray(picture.convert("RGB"))
    if not isinstance(picture, str | os.PathLike):
        _check_pixels(picture)
        return picture
    path = Path(picture)
    if not path.is_file():
        raise InputError(f"image {path} does not exist; give a png, jpeg or webp file")
    try:
        return decode_image(path.read_bytes())
    except ImageError as error:
        raise InputError(f"image {path} cannot be read: {error}") from error


def _check_pixels(pixels: object) -> None:
    """Raises InputError unless these are RGB in 0..255 of at least one pixel."""
    what = quoted(pixels)
    if isinstance(pixels, np.ndarray):
        if pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size:
            return
        what = f"{pixels.dtype} of shape {pixels.shape}"
    raise InputError(f"the image is {what}; give uint8 of shape (height, width, 3) in 0..255, or a file")


def _check_document(document: object) -> None:
    """Raises InputError unless this is one."""
    if not isinstance(document, Document):
        raise InputError(f"document={quoted(document)} is no Document; give such as rac3.Document(...)")


def checked_int(name: str, value: object, least: int = 0) -> int:
    """The value as an int of Python.

    Raises:
      InputError: it is no int of 64 bits from `least` on, of Python or NumPy.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value < 2**63:
        raise InputError(f"{name}={quoted(value)} is no int from {least} to 2**63 - 1; give one")
    return int(value)


def mask_of(mask: Mask, image: Pixels) -> PixelMask:
    """True at the pixels to draw: those that are white in a mask, or inside a rectangle.

    Raises:
      InputError: something else, or a rectangle that is empty or not inside the image.
    """
    height, width, _ = image.shape
    if isinstance(mask, np.ndarray):
        return mask.astype(bool)
    if isinstance(mask, PIL.Image.Image):
        return np.asarray(mask.convert("L")) > 127
    try:
        left, top, right, bottom = map(operator.index, mask)
    except (TypeError, ValueError) as error:
        raise InputError(f"the mask is {quoted(mask)}; give an array, a picture, or left,top,right,bottom") from error
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise InputError(
            f"the rectangle {left},{top},{right},{bottom} is empty or not inside the image of {width} x {height} "
            "pixels; give left,top,right,bottom"
        )
    inside = np.zeros((height, width), bool)
    inside[top:bottom, left:right] = True
    return inside


def scaled_mask(mask: Bool[np.ndarray, "side side"], size: int) -> Bool[np.ndarray, "size size"]:
    """A square mask at another size: True where a pixel has any part of a masked one in it."""
    if len(mask) == size:
        return mask
    grey = PIL.Image.fromarray(mask.astype(np.float32))
    return np.asarray(grey.resize((size, size), PIL.Image.Resampling.BOX)) > 0
