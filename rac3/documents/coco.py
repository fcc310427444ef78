"""Documents from MS-COCO, as its archives unpack: one JSON file of captions, and a folder of images.

annotations/captions_val2014.json    {"images": [{"id": 42, "file_name": "COCO_val2014_000000000042.jpg", ...}, ...],
                                      "annotations": [{"id": 7, "image_id": 42, "caption": "..."}, ...]}
val2014/COCO_val2014_000000000042.jpg
"""

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rac3.config import InputError
from rac3.documents.document import (
    MAX_PIXELS,
    Document,
    Image,
    Note,
    Reject,
    SampleError,
    Text,
    decode_image,
)

CAPTIONS = "captions"  # the metadata field of all captions of an image


class Captioned(NamedTuple):
    """An image of the annotations, with its captions in their order."""

    id: int
    file: str
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Coco:
    """Images of MS-COCO, each with one of its captions, drawn by the seed; `captions` in the metadata has all of them.

    A document's key is the name of its image file. An image is a `Reject` if its file is missing or does not decode, or
    if it has no caption.

    Attributes:
      annotations: the JSON file, and `images` the folder; relative to the data folder.
      documents: images, drawn by the seed; 0 takes all.
      shard_size: images.
    """

    annotations: str = "annotations/captions_val2014.json"
    images: str = "val2014"
    documents: int = 0
    seed: int = 0
    shard_size: int = 1000
    max_pixels: int = MAX_PIXELS  # of the decoded image

    def __post_init__(self) -> None:
        if self.shard_size < 1 or self.max_pixels < 1 or self.documents < 0:
            raise InputError(
                f"source.shard_size={self.shard_size} and source.max_pixels={self.max_pixels} must be at least 1, and "
                f"source.documents={self.documents} at least 0"
            )

    def shards(self, data_dir: Path) -> Sequence[str]:
        """Ranges of `shard_size` images, such as `000000000-000001000`; zero-padded, so that they sort.

        Raises:
          InputError: the folder or the file is missing, or the file is not of COCO's captions.
        """
        if not (data_dir / self.images).is_dir():
            raise InputError(
                f"image folder {str(data_dir / self.images)!r} does not exist; give source.images, such as 'val2014'"
            )
        count = len(self._chosen(data_dir))
        return [f"{start:09d}-{min(start + self.shard_size, count):09d}" for start in range(0, count, self.shard_size)]

    def files(self, data_dir: Path) -> Sequence[Path]:
        """The annotations, and the folder of the images, which changes when a file joins or leaves it."""
        return [data_dir / self.annotations, data_dir / self.images]

    def read(self, data_dir: Path, shard: str) -> Iterator[Document | Reject | Note]:
        """The images of one range, by their ids. A damaged image does not affect the others."""
        start, stop = map(int, shard.split("-"))
        for item in self._chosen(data_dir)[start:stop]:
            try:
                data = self._data(data_dir, item)
                texts = [caption.strip() for caption in item.captions if caption.strip()]
                if not texts:
                    raise SampleError("no caption")
            except SampleError as error:
                yield Reject(item.file, str(error))
                continue
            text = texts[int(np.random.default_rng([self.seed, item.id]).integers(len(texts)))]
            metadata: dict[str, Any] = {CAPTIONS: texts, "image_id": item.id}
            yield Document(item.file, (Text(text), Image(data)), metadata)

    def _data(self, data_dir: Path, item: Captioned) -> bytes:
        if Path(item.file).name != item.file:
            raise SampleError(f"no file name: {item.file[:80]!r} leads out of the folder")
        path = data_dir / self.images / item.file
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise SampleError("missing image") from error
        decode_image(data, self.max_pixels)
        return data

    def _chosen(self, data_dir: Path) -> Sequence[Captioned]:
        path = data_dir / self.annotations
        if not path.is_file():
            raise InputError(
                f"annotations {str(path)!r} do not exist; give source.annotations, such as "
                "'annotations/captions_val2014.json'"
            )
        found = _read(path, path.stat().st_mtime_ns)
        if not self.documents:
            return found
        if self.documents > len(found):
            raise InputError(
                f"source.documents={self.documents} exceeds the {len(found)} images of {str(path)!r}; use at most that"
            )
        rows = np.random.default_rng(self.seed).permutation(len(found))[: self.documents]
        return [found[row] for row in np.sort(rows).tolist()]


@functools.lru_cache(maxsize=4)
def _read(path: Path, changed: int) -> Sequence[Captioned]:
    """All images of a file of annotations, by their ids.

    Args:
      changed: when, so that a file that is another one now is read again.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        captions: dict[int, list[str]] = {int(each["id"]): [] for each in content["images"]}
        files = {int(each["id"]): str(each["file_name"]) for each in content["images"]}
        for each in content["annotations"]:
            captions[int(each["image_id"])].append(str(each["caption"]))
    except (ValueError, TypeError, LookupError) as error:
        what = f"{type(error).__name__}: {error}"[:160]
        raise InputError(
            f"annotations {str(path)!r} are not COCO's captions ({what}); give a file such as captions_val2014.json, "
            "whose images have id and file_name, and whose annotations have image_id and caption"
        ) from error
    if not files:
        raise InputError(f"annotations {str(path)!r} name no images; download them again")
    return [Captioned(id, files[id], tuple(captions[id])) for id in sorted(files)]
