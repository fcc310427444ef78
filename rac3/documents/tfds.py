"""Documents from TensorFlow Datasets, prepared in a random-access format. TensorFlow is not needed.

An example becomes a document of a caption and an image; its texts, labels and numbers become the metadata. Features
that only TensorFlow reads, such as videos, are left out.
"""

import functools
import io
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from rac3.config import InputError
from rac3.documents.document import (
    JSON,
    MAX_PIXELS,
    Document,
    Image,
    Note,
    Reject,
    SampleError,
    Text,
    decode_image,
    decode_text,
    plain_json,
)


@dataclass(frozen=True)
class Tfds:
    """One split of a dataset that `tfds` has prepared. A document's key is `split/index`.

    `image` and `text` name features; a nested feature is named by its path, such as `captions/text`. `image` is an
    Image, which keeps its encoding, or a uint8 Tensor. `text` is a string, or a ClassLabel, whose name becomes the
    text. A sequence gives its first element; the metadata keeps all its texts.
    """

    name: str  # "coco_captions", "my_data/config:1.0.0"
    split: str = "train"  # or a slice in tfds's syntax: "train[:10%]"
    image: str | None = "image"  # None: documents are text only
    text: str | None = None  # None: documents are images only
    folder: str = ""  # relative to the data folder; holds the dataset's own folder
    shard_size: int = 2000  # examples
    max_pixels: int = MAX_PIXELS  # of the decoded image

    def __post_init__(self) -> None:
        if self.image is None and self.text is None:
            raise InputError("source.image and source.text are both None; name at least one feature")
        if self.shard_size < 1 or self.max_pixels < 1:
            raise InputError(
                f"source.shard_size={self.shard_size} and source.max_pixels={self.max_pixels} must be at least 1"
            )

    def shards(self, data_dir: Path) -> Sequence[str]:
        """Ranges of `shard_size` examples, such as `000000000-000002000`; zero-padded, so that they sort.

        Raises:
          InputError: no such dataset, split or feature, an empty slice, or a format that needs TensorFlow.
        """
        count = len(self._open(data_dir)[1])
        starts = range(0, count, self.shard_size)
        return [f"{start:09d}-{min(start + self.shard_size, count):09d}" for start in starts]

    def files(self, data_dir: Path) -> Sequence[Path]:
        """The files of the prepared dataset, sorted."""
        folder = Path(_builder(self.name, data_dir / self.folder).data_dir)
        return sorted(path for path in folder.iterdir() if path.is_file())

    def read(self, data_dir: Path, shard: str) -> Iterator[Document | Reject | Note]:
        """The examples of one range. A damaged example does not affect the others."""
        features, examples = self._open(data_dir)
        start, stop = map(int, shard.split("-"))
        for name in _left_out(self.name, data_dir / self.folder):
            yield Note(f"examples without the feature {name!r}, which needs TensorFlow", stop - start)
        for index in range(start, stop):
            key = f"{self.split}/{index}"
            try:
                example = _example(examples, index)
                segments: tuple[Text | Image, ...] = (*self._texts(features, example), *self._images(example))
            except SampleError as error:
                yield Reject(key, str(error))
                continue
            yield Document(key, segments, _metadata(features, example))

    def _open(self, data_dir: Path) -> tuple[Any, Any]:
        """The dataset's features, and its examples with random access and encoded images."""
        builder = _builder(self.name, data_dir / self.folder)
        features = builder.info.features
        self._check(features)
        try:
            return features, builder.as_data_source(split=self.split, decoders=_leave_images_encoded(features))
        except NotImplementedError as error:
            raise InputError(
                f"tfds dataset {self.name!r} is stored as {builder.info.file_format.value}; only TensorFlow reads that;"
                " write it with file_format='array_record', or convert it with `tfds convert_format`"
            ) from error
        except ValueError as error:
            splits = ", ".join(f"{name} ({split.num_examples})" for name, split in sorted(builder.info.splits.items()))
            raise InputError(
                f"tfds dataset {self.name!r} has no split {self.split!r}: {_line(error)}"
                f"; its splits (examples): {splits}"
            ) from error

    def _check(self, features: Any) -> None:
        """Raises `InputError` unless the named features exist and hold images and texts."""
        for field, name, holds, kind in (
            ("image", self.image, _holds_images, "an Image or a uint8 Tensor"),
            ("text", self.text, _holds_texts, "a Text or a ClassLabel"),
        ):
            feature = features if name is None else _find(features, name)
            if feature is None:
                names = ", ".join(_names(features))
                raise InputError(f"tfds dataset {self.name!r} has no feature source.{field}={name!r}; it has: {names}")
            if name is not None and not holds(feature):
                raise InputError(
                    f"tfds dataset {self.name!r}: source.{field}={name!r} is a {type(feature).__name__};"
                    f" name {kind}, one of: {', '.join(n for n in _names(features) if holds(_find(features, n)))}"
                )

    def _texts(self, features: Any, example: Mapping[str, Any]) -> Iterator[Text]:
        if self.text is None:
            return
        value = _first(_value(example, self.text), element_rank=0)
        if not isinstance(value, bytes):
            value = _plain(_find(features, self.text), value)  # the name of a label
        if value is None:
            raise SampleError("missing text")
        yield Text(decode_text(value if isinstance(value, bytes) else str(value).encode()))

    def _images(self, example: Mapping[str, Any]) -> Iterator[Image]:
        if self.image is None:
            return
        data = _first(_value(example, self.image), element_rank=3)
        if data is None:
            raise SampleError("missing image")
        if isinstance(data, np.ndarray):  # decoded by tfds: a Tensor, or an Image inside a sequence
            png = io.BytesIO()
            PIL.Image.fromarray(data.squeeze(-1) if data.shape[-1] == 1 else data).save(png, "PNG")
            data = png.getvalue()
        decode_image(data, self.max_pixels)  # here, where a bad image can still be dropped
        yield Image(data)


def _builder(name: str, folder: Path) -> Any:
    """The reader of a prepared dataset, from its files alone: the code that wrote it is not needed.

    Raises:
      InputError: no such dataset in the folder.
    """
    from tensorflow_datasets.core import read_only_builder

    try:
        directory = _directory(name, folder)
        if directory is not None and _left_out(name, folder):
            return read_only_builder.builder_from_directory(_linked(directory))
        return read_only_builder.builder_from_files(name, data_dir=str(folder))
    except ValueError as error:  # not found, or not a name at all
        there = sorted({path.parent.relative_to(folder).as_posix() for path in folder.glob("*/**/features.json")})
        raise InputError(
            f"tfds dataset {name!r} is not prepared in {str(folder)!r}, which holds: {', '.join(there) or 'none'};"
            f" run `tfds build {name} --data_dir={folder} --file_format=array_record`"
        ) from error


FEATURES = "features.json"


def _directory(name: str, folder: Path) -> Path | None:
    """Where a prepared dataset is; None if there is none."""
    from tensorflow_datasets.core import read_only_builder

    try:
        found = read_only_builder._find_builder_dir(name, data_dir=str(folder))
    except (ValueError, AttributeError):  # no name; or tfds has more to say, and a context for it elsewhere
        return None
    return Path(found) if found else None


@functools.cache
def _left_out(name: str, folder: Path) -> tuple[str, ...]:
    """The features that can't even be named without TensorFlow."""
    directory = _directory(name, folder)
    return () if directory is None else tuple(_unreadable(directory / FEATURES))


def _unreadable(path: Path) -> Iterator[str]:
    from tensorflow_datasets.core.features.feature import FeatureConnector

    try:
        named = json.loads(path.read_bytes())["featuresDict"]["features"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # tfds itself says what is wrong
    for name, feature in sorted(named.items()):
        try:
            FeatureConnector.from_json(feature)
        except ImportError:
            yield name
        except Exception:
            continue


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="rac3-tfds-")


@functools.cache
def _linked(directory: Path) -> str:
    """A folder that links to the files of a dataset, without those features; kept while the process runs."""
    linked = Path(_temporary().name) / directory.relative_to(directory.parents[1])
    linked.mkdir(parents=True)
    for path in directory.iterdir():
        if path.name != FEATURES:
            (linked / path.name).symlink_to(path.resolve())
    content = json.loads((directory / FEATURES).read_bytes())
    for name in _unreadable(directory / FEATURES):
        del content["featuresDict"]["features"][name]
    (linked / FEATURES).write_text(json.dumps(content), encoding="utf-8")
    return str(linked)


def _example(examples: Any, index: int) -> Mapping[str, Any]:
    try:
        return examples[index]
    except MemoryError:
        raise
    except Exception as error:  # from array_record, protobuf or tfds, depending on the damage
        raise SampleError(f"unreadable example: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200].removesuffix(".")


def _leave_images_encoded(features: Any) -> dict[str, Any]:
    """Decoders that return an Image as its encoded file. Inside a sequence, tfds would need TensorFlow for this."""
    import tensorflow_datasets as tfds

    decoders: dict[str, Any] = {}
    for name, feature in features.items():
        if isinstance(feature, tfds.features.FeaturesDict):
            decoders[name] = _leave_images_encoded(feature)
        elif isinstance(feature, tfds.features.Image):
            decoders[name] = tfds.decode.SkipDecoding()
    return decoders


def _unwrap(feature: Any) -> Any:
    """The element feature of a (nested) sequence; any other feature as it is."""
    from tensorflow_datasets import features as kinds

    # A Dataset is a Sequence too, but yields its examples from an iterator.
    while isinstance(feature, kinds.Sequence) and not isinstance(feature, kinds.Dataset):
        feature = feature.feature
    return feature


def _children(feature: Any) -> Mapping[str, Any]:
    """The named features inside this one; none for a leaf. tfds stores a sequence of dicts as a dict of sequences."""
    from tensorflow_datasets import features as kinds

    inner = _unwrap(feature)
    # Sorted: tfds reads them from an unordered map.
    return dict(sorted(inner.items())) if isinstance(inner, kinds.FeaturesDict) else {}


def _names(features: Any) -> Iterator[str]:
    """The paths of the leaves: image, captions/text, ..."""
    for name, feature in _children(features).items():
        below = [f"{name}/{path}" for path in _names(feature)]
        yield from below or [name]


def _find(features: Any, path: str) -> Any:
    """The feature at a path, or None. Names may hold slashes themselves: `image/filename` next to `image`."""
    children = _children(features)
    if path in children:
        return children[path]
    found = (_find(feature, path[len(name) + 1 :]) for name, feature in children.items() if path.startswith(f"{name}/"))
    return next((feature for feature in found if feature is not None), None)


def _value(example: Any, path: str) -> Any:
    """The value at a path that `_find` finds."""
    if path in example:
        return example[path]
    name = next(name for name in example if path.startswith(f"{name}/") and isinstance(example[name], dict))
    return _value(example[name], path[len(name) + 1 :])


def _first(value: Any, element_rank: int) -> Any:
    """The first element of (nested) sequences of elements with `element_rank` axes; None if there is none."""
    while isinstance(value, list) or (isinstance(value, np.ndarray) and value.ndim > element_rank):
        if len(value) == 0:
            return None
        value = value[0]
    return value


def _holds_images(feature: Any) -> bool:
    from tensorflow_datasets import features as kinds

    feature = _unwrap(feature)
    if isinstance(feature, kinds.Image):  # float32 images are stored as raw float bits
        return feature.np_dtype != np.float32
    is_pixels = isinstance(feature, kinds.Tensor) and feature.np_dtype == np.uint8
    return is_pixels and len(feature.shape) == 3 and feature.shape[-1] in (1, 3, 4)


def _holds_texts(feature: Any) -> bool:
    from tensorflow_datasets import features as kinds

    feature = _unwrap(feature)
    is_string = isinstance(feature, kinds.Tensor) and np.dtype(feature.np_dtype).kind in "OSU"
    return isinstance(feature, kinds.ClassLabel) or (is_string and feature.shape == ())


def _is_plain(feature: Any) -> bool:
    """Whether a feature is or contains a text, a label or a number, which metadata keeps."""
    from tensorflow_datasets import features as kinds

    children = _children(feature)
    leaf = _unwrap(feature)
    return any(map(_is_plain, children.values())) or (isinstance(leaf, kinds.Tensor) and leaf.shape == ())


def _metadata(features: Any, example: Any) -> dict[str, JSON]:
    return {name: _plain(child, example[name]) for name, child in _children(features).items() if _is_plain(child)}


def _plain(feature: Any, value: Any) -> JSON:
    """A feature's value as JSON data: labels by name, None for a label that is not set."""
    if _children(feature):
        return _metadata(feature, value)
    if isinstance(value, list | np.ndarray):
        return [_plain(feature, element) for element in value]
    leaf = _unwrap(feature)
    if hasattr(leaf, "int2str"):
        return leaf.int2str(value) if value is not None and 0 <= value < leaf.num_classes else None
    return plain_json(value)
