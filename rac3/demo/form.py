"""What a visitor has entered, and the documents on the page: from there to a prompt."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import PIL.Image

from rac3.config import InputError
from rac3.documents.document import Document, ImageError, captioned, decode_image
from rac3.generation.sampling import Contrast, Guidance, Sampling
from rac3.prompt import Prompt, mask_of
from rac3.run import Found

Task = Literal["draw", "caption", "infill_image", "edit"]
MASKED = ("infill_image", "edit")
MAX_PIXELS = 16_000_000  # of an uploaded picture
CANVAS = 384, 768  # pixels of the longer side of the picture to brush on, at least and at most


@dataclass(frozen=True, eq=False)  # gradio compares by hash
class Listed:
    """A document on the page, and its similarity to the query; None if it is the visitor's own."""

    document: Document
    similarity: float | None = None


@dataclass(frozen=True, eq=False)
class Context:
    """The documents on the page.

    Attributes:
      found_for: the query and the number of documents that the retrieved ones are for.
    """

    listed: tuple[Listed, ...] = ()
    found_for: tuple[str, int] = ("", 0)

    def find(self, query: str, k: int, retrieve: Callable[[int], Sequence[Found]]) -> "Context":
        """`k` documents for a query: the visitor's own stay where they are, retrieved ones fill the other places.

        The same query and k leave everything as it is, so that a removed document stays away.
        """
        if (query, k) == self.found_for:
            return self
        own = [each for each in self.listed if each.similarity is None]
        retrieved = retrieve(max(0, k - len(own))) if query else []
        found = iter([Listed(each.document, each.score) for each in retrieved])
        kept = [each if each.similarity is None else next(found, None) for each in self.listed]
        return Context(tuple(each for each in [*kept, *found] if each is not None), (query, k))

    def removed(self, number: int) -> "Context":
        """Without one document."""
        return replace(self, listed=self.listed[:number] + self.listed[number + 1 :])

    def replaced(self, number: int, document: Document) -> "Context":
        """With the visitor's own in the place of another."""
        return replace(self, listed=(*self.listed[:number], Listed(document), *self.listed[number + 1 :]))

    def added(self, document: Document) -> "Context":
        """With one more of the visitor's own, which takes the place of the last retrieved one if there are `k`."""
        retrieved = [number for number, each in enumerate(self.listed) if each.similarity is not None]
        full = self if len(self.listed) < self.found_for[1] or not retrieved else self.removed(retrieved[-1])
        return replace(full, listed=(*full.listed, Listed(document)))

    def captioned(self, number: int, text: str) -> "Context":
        """With another text of one of the visitor's own documents."""
        document = self.listed[number].document
        return self.replaced(number, captioned("yours", text, document.images[0].data))


@dataclass(frozen=True)
class Form:
    """What a visitor has entered.

    Attributes:
      picture: the file; None is none.
      mask: the brush's strokes, as `data:image/png` of any size; "" is none.
      guidance: 1 is none.
      without: what guidance leaves out; the documents, if there is no text.
      copying: 0 is none.
    """

    task: Task
    text: str
    picture: bytes | None
    mask: str
    samples: int
    seed: int
    temperature: float
    guidance: float
    without: Literal["text", "documents"]
    copying: float

    def prompt(self, context: Context, configured: Sampling) -> Prompt:
        """The prompt for the model: what is listed is its context, and nothing is retrieved besides."""
        text = "" if self.task == "caption" else self.text.strip()
        image = None if self.task == "draw" or self.picture is None else decode_image(self.picture, MAX_PIXELS)
        mask = None if image is None or not self.mask else mask_of(brushed(self.mask, image), image)
        guidance = Guidance(float(self.guidance), self.without if text else "documents")
        return Prompt(
            task=self.task,
            text=text,
            image=image,
            mask=mask if self.task in MASKED else None,
            documents=[each.document for each in context.listed],
            retrieve=0,
            ensemble="mean",
            samples=int(self.samples),
            seed=int(self.seed),
            sampling=replace(
                configured,
                temperature=float(self.temperature),
                guidance=guidance,
                contrast=configured.contrast if guidance.scale == 1 else Contrast(),
                copying=replace(configured.copying, weight=float(self.copying)),
            ),
        )


def picture_of(data: bytes, max_bytes: int) -> bytes:
    """An uploaded file, if it is a picture that the demo takes.

    Raises:
      InputError: it is too large, or no PNG, JPEG or WebP file.
    """
    if len(data) > max_bytes:
        raise InputError(f"the file has {len(data) / 2**20:.1f} MB, more than the {max_bytes / 2**20:g} MB allowed")
    try:
        decode_image(data, MAX_PIXELS)
    except ImageError as error:
        raise InputError(f"the file is not usable: {error}; upload a PNG, JPEG or WebP picture") from error
    return data


def brushed(mask: str, image: np.ndarray) -> PIL.Image.Image:
    """White at the pixels of the image that are covered by the brush's strokes, at least half of each.

    Raises:
      InputError: the mask is no PNG picture of the canvas.
    """
    try:
        data = base64.b64decode(mask.removeprefix("data:image/png;base64,"), validate=True)
        with PIL.Image.open(io.BytesIO(data), formats=["PNG"]) as strokes:
            if max(strokes.size) > 2 * CANVAS[1]:
                raise InputError(f"the mask has {strokes.width} x {strokes.height} pixels; brush it again")
            alpha = strokes.convert("RGBA").getchannel("A")
    except (ValueError, OSError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError("the mask is no picture; brush it again") from error
    return alpha.resize((image.shape[1], image.shape[0]), PIL.Image.Resampling.BOX)
