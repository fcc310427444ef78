"""Documents, which are sequences of texts and images (paper, section 3.1), and the protocol of their sources."""

import contextlib
import dataclasses
import io
import math
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import PIL.Image
from jaxtyping import UInt8
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

JSON = str | int | float | bool | list | dict | None  # not recursive: run-time type checkers cannot follow it

MAX_PIXELS = 89_478_485  # 1 GiB at 12 bytes per pixel (decoded, oriented, composited); also Pillow's limit

_DECODERS: tuple[tuple[bytes, type[ImageFile]], ...] = (
    (b"\x89PNG\r\n\x1a\n", PngImageFile),
    (b"\xff\xd8\xff", JpegImageFile),
    (b"RIFF", WebPImageFile),
)

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}

Framing = Literal["crop", "pad-white", "pad-border"]
"""How a picture becomes square: by its middle square; or whole, on white or on the mean color of its border."""

PADDED_SIDE = 4096  # pixels: a longer side is scaled to it before padding, to bound memory

_WARNING_FILTERS = threading.Lock()


class SampleError(ValueError):
    """A sample that cannot become a document. The message is one line: a category, a colon, the details."""


class ImageError(SampleError):
    """Bytes that are not a usable image: empty, not an image, truncated, or a decompression bomb."""


@dataclass(frozen=True)
class Text:
    """A text segment.

    Raises:
      ValueError: the text is empty.
    """

    text: str

    def __post_init__(self) -> None:
        if not self.text:
            raise ValueError("a Text needs at least one character; leave the segment out instead")


@dataclass(frozen=True)
class Image:
    """An image segment: `data` is a PNG, JPEG or WebP file."""

    data: bytes
    framing: Framing = "crop"

    def pixels(self) -> UInt8[np.ndarray, "height width 3"]:
        """RGB in 0..255, as `frame` has it. Raises `ImageError` as `decode_image` does."""
        return frame(decode_image(self.data), self.framing)


Picture = Image | np.ndarray
"""An encoded image, or its pixels: uint8 RGB of shape (height, width, 3)."""


def pixels_of(picture: Picture) -> UInt8[np.ndarray, "height width 3"]:
    """RGB in 0..255. Raises `ImageError` as `decode_image` does."""
    return picture.pixels() if isinstance(picture, Image) else picture


@dataclass(frozen=True)
class Document:
    """A sequence of texts and images. `key` is unique within its source; `metadata` comes from the source.

    Raises:
      ValueError: no segments, or two adjacent texts (they are one text).
    """

    key: str
    segments: tuple[Text | Image, ...]
    metadata: Mapping[str, JSON]

    def __post_init__(self) -> None:
        if not self.segments:
            raise ValueError(f"document {self.key!r} has no segments; give it at least one text or image")
        for left, right in zip(self.segments, self.segments[1:], strict=False):
            if isinstance(left, Text) and isinstance(right, Text):
                raise ValueError(f"document {self.key!r} has two adjacent texts; join them into one")

    @property
    def text(self) -> str:
        """All texts joined by spaces; empty if there are none."""
        return " ".join(segment.text for segment in self.segments if isinstance(segment, Text))

    @property
    def images(self) -> tuple[Image, ...]:
        return tuple(segment for segment in self.segments if isinstance(segment, Image))


@dataclass(frozen=True)
class Reject:
    """A sample that was dropped. `reason` is a fixed category, or a category, a colon and the details.

    Attributes:
      documents: how many are lost with it; None for the rest of a shard, which counts as what other shards hold.
    """

    key: str
    reason: str
    documents: int | None = 1


@dataclass(frozen=True)
class Note:
    """Something odd about the data that costs no document. Notes with the same words are counted together.

    Attributes:
      example: of what it is about.
      hidden: the metadata fields that documents lack because of it; "*" stands for all.
    """

    what: str
    count: int = 1
    example: str = ""
    hidden: tuple[str, ...] = ()


@runtime_checkable
class Source(Protocol):
    """A source of documents: a frozen dataclass with these two methods. Keys are unique across its shards."""

    def shards(self, data_dir: Path) -> Sequence[str]:
        """The names of the shards, sorted; the same on every call.

        Raises:
          InputError: the data is missing, or has no shards.
        """
        ...

    def read(self, data_dir: Path, shard: str) -> Iterator[Document | Reject | Note]:
        """All samples of one shard, usable or rejected, in the same order on every call; and notes about it."""
        ...


@runtime_checkable
class Stored(Protocol):
    """A source that names the files that it reads. Optional for your own source: without it, documents stay current
    when a file changes and the shards keep their names.
    """

    def files(self, data_dir: Path) -> Sequence[Path]:
        """All of them, sorted. Documents are current while these have the same names, sizes and times of change."""
        ...


@runtime_checkable
class Judge(Protocol):
    """A source that can tell what a picture shows. Optional for your own source: without it, entities are judged by the
    encoder, and nothing else is.
    """

    @property
    def judged(self) -> Sequence[str]:
        """The fields of its documents' metadata that `shown` tells."""
        ...

    def shown(self, pictures: UInt8[np.ndarray, "pictures height width 3"]) -> list[dict[str, str]]:
        """What each picture shows: of each field, the value whose look is nearest to the picture.

        Raises:
          InputError: the pictures can't be judged, for their size, say.
        """
        ...


def encode_png(pixels: UInt8[np.ndarray, "height width 3"]) -> bytes:
    """A PNG file."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def captioned(key: str, text: str, data: bytes) -> Document:
    """A document of a text, unless it is empty, and an encoded image."""
    texts = (Text(text.strip()),) if text.strip() else ()
    return Document(key, (*texts, Image(data)), {})


def decode_text(data: bytes) -> str:
    """Decode UTF-8 and strip white space and the byte order mark.

    Raises:
      SampleError: `undecodable text` or `empty text`.
    """
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise SampleError(f"undecodable text: {error.reason} at byte {error.start}") from error
    if not text:
        raise SampleError("empty text")
    return text


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "height width 3"]:
    """Decode a PNG, JPEG or WebP file to RGB in 0..255: upright by its EXIF orientation, transparency on white.

    Checks the size in the header first, so that a small file cannot claim gigabytes of memory. Takes the first frame
    of an animation.

    Raises:
      ImageError: `empty image`, `not an image`, `truncated image` (or otherwise damaged: decoders cannot tell) or
        `decompression bomb`.
    """
    if not data:
        raise ImageError("empty image")
    decoder = next((decoder for magic, decoder in _DECODERS if data.startswith(magic)), None)
    if decoder is None:
        raise ImageError(f"not an image: PNG, JPEG and WebP files do not start with {data[:12]!r}")
    try:
        with _no_warnings():
            image: PIL.Image.Image = decoder(io.BytesIO(data))  # PIL.Image.open would apply its own limit
        width, height = image.size
        if width * height > max_pixels:
            raise ImageError(f"decompression bomb: {width}x{height} exceeds {max_pixels} pixels")
        image.load()
        orientation = _orientation(image)
        rgb = _rgb(image)
    except (ImageError, MemoryError):
        raise
    except PIL.Image.DecompressionBombError as error:
        raise ImageError(f"decompression bomb: {error}") from error
    except Exception as error:  # the decoders raise a dozen types on damaged files
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ImageError(f"truncated image: {reason}") from error
    return np.asarray(rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb)


def image_size(data: bytes) -> tuple[int, int]:
    """The sides of a PNG, JPEG or WebP file in pixels, by its header alone, before its EXIF orientation.

    Raises:
      ImageError: it has no such header.
    """
    decoder = next((decoder for magic, decoder in _DECODERS if data.startswith(magic)), None)
    if decoder is None:
        raise ImageError("not an image")
    try:
        with _no_warnings():
            return decoder(io.BytesIO(data)).size
    except Exception as error:  # as in `decode_image`
        raise ImageError(f"truncated image: {' '.join(str(error).split())}") from error


def framed(document: Document, framing: Framing) -> Document:
    """The document with all images framed so."""
    if framing == "crop":
        return document
    segments = (
        dataclasses.replace(each, framing=framing) if isinstance(each, Image) else each for each in document.segments
    )
    return dataclasses.replace(document, segments=tuple(segments))


def frame(pixels: UInt8[np.ndarray, "height width 3"], framing: Framing) -> UInt8[np.ndarray, "_ _ 3"]:
    """A picture padded to a square; unchanged with `crop`: `prepare_image` keeps the middle square.

    3 x 1  ->  3 x 3     . . .
    a b c                a b c
                         . . .
    """
    height, width, _ = pixels.shape
    if framing == "crop" or height == width:
        return pixels
    if (longest := max(height, width)) > PADDED_SIDE:
        size = max(1, width * PADDED_SIDE // longest), max(1, height * PADDED_SIDE // longest)
        return frame(np.asarray(PIL.Image.fromarray(pixels).resize(size, PIL.Image.Resampling.BICUBIC)), framing)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    color = border.mean(0).round() if framing == "pad-border" else np.full(3, 255)
    square = np.tile(color.astype(np.uint8), (longest, longest, 1))
    square[framed_place(height, width)] = pixels
    return square


def framed_place(height: int, width: int) -> tuple[slice, slice]:
    """The rows and columns of a picture in its padded square."""
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    return slice(top, top + height), slice(left, left + width)


def prepare_image(pixels: UInt8[np.ndarray, "height width 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Resize the shorter side to `size` pixels (bicubic, antialiased) and keep the center square.

    Crops first: the pixels are the same, and a very long strip never becomes a huge image.
    """
    rows, columns = center_square(pixels)
    if rows.stop - rows.start == size:
        return pixels[rows, columns]
    box = (columns.start, rows.start, columns.stop, rows.stop)
    return np.asarray(PIL.Image.fromarray(pixels).resize((size, size), PIL.Image.Resampling.BICUBIC, box=box))


def center_square(pixels: UInt8[np.ndarray, "height width 3"]) -> tuple[slice, slice]:
    """The rows and columns of the middle square."""
    height, width, _ = pixels.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return slice(top, top + side), slice(left, left + side)


def plain_json(value: object) -> JSON:
    """Convert `value` to plain JSON data.

    NumPy scalars and arrays become numbers and lists; NaN and infinity become None; anything without a JSON form (a
    date) becomes its string. Characters that UTF-8 cannot encode become "?".
    """
    if value is None or isinstance(value, bool | np.bool_):
        return None if value is None else bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, Mapping):
        return {str(k): plain_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain_json(v) for v in value]
    return str(value).encode("utf-8", "replace").decode()


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """Silence Pillow's warnings about damaged headers. Warning filters are global to the process, hence the lock."""
    with _WARNING_FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _orientation(image: PIL.Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8. Damaged EXIF counts as upright: the image itself is fine."""
    with _no_warnings():
        try:
            return int(image.getexif().get(_EXIF_ORIENTATION, 1))
        except Exception:  # damaged EXIF raises many types
            return 1


def _rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Convert any mode to RGB: 16-bit gray by its high byte (Pillow would clip it), transparency on white."""
    if image.mode.startswith("I"):
        image = PIL.Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = PIL.Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white.convert("RGB")
