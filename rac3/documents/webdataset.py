"""Documents from webdataset shards, in img2dataset's layout or with other fields.

00000.tar       000000000.jpg 000000000.txt 000000000.json 000000001.jpg ...
00000.parquet   one row per sample, including failed downloads, which are not in the tar
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
from rac3.documents.shard_table import ShardTable
from rac3.documents.tar import Sample, TarShard, TruncatedTarError

SUFFIXES = (".tar", ".tar.gz", ".tgz")
METADATA = "json"  # the field that holds it
LISTED = 8  # kinds of members that a message lists


_FILE = re.compile(r"\.(tar|tar\.gz|tgz|parquet)$")


@dataclass(frozen=True)
class WebDataset:
    """The shards of one folder: `*.tar`, `*.tar.gz` or `*.tgz`. A sample is an image, a caption and optionally JSON.

    The members of a sample follow each other. Their names are its key, a dot and a field: `photo 2.0.jpg` is the field
    `jpg` of `photo 2.0`. A sample is a `Reject` if its image or caption is missing, its image does not decode, its
    caption is not UTF-8, or its JSON does not parse, even where another file repeats the caption. Without JSON, its
    metadata is its row of the table, or empty if there is no table. A document's key is `shard/sample`.
    """

    folder: str = ""  # relative to the data folder
    caption_field: str | None = None  # the metadata field that holds the caption; None takes the field `text`
    max_pixels: int = MAX_PIXELS  # of the decoded image
    image: str = "jpg;jpeg;png;webp"  # the field of the image, or several: a sample has one of them
    text: str = "txt"  # the field of the caption: "caption.txt" of `0.caption.txt`

    def __post_init__(self) -> None:
        if self.max_pixels < 1:
            raise InputError(f"source.max_pixels={self.max_pixels} allows no image; use 1 or more")
        for name in ("image", "text"):
            if not all(getattr(self, name).strip(".").split(";")):
                raise InputError(f"source.{name}={getattr(self, name)!r} names no field; use one such as 'input.jpg'")
        if twice := set(_fields(self.image)) & {*_fields(self.text), METADATA}:
            raise InputError(f"source.image names {twice.pop()!r}, which holds text; use the field of the pictures")

    def shards(self, data_dir: Path) -> Sequence[str]:
        """The names of the files without their suffixes, sorted.

        Raises:
          InputError: the folder does not exist or holds no tar, or two with one name.
        """
        folder = data_dir / self.folder
        if not folder.is_dir():
            raise InputError(f"data folder {str(folder)!r} does not exist; give a folder of .tar shards")
        names = sorted(path.name.removesuffix(suffix) for suffix in SUFFIXES for path in folder.glob(f"[!.]*{suffix}"))
        if not names:
            below = sorted({path.parent.name for suffix in SUFFIXES for path in folder.glob(f"*/*{suffix}")})
            hint = f"; its subfolders that do: {', '.join(below)}" if below else "; give a folder of .tar shards"
            raise InputError(f"data folder {str(folder)!r} holds no .tar file{hint}")
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise InputError(f"data folder {str(folder)!r} holds {twice[0]!r} plain and compressed; keep one of them")
        return names

    def files(self, data_dir: Path) -> Sequence[Path]:
        """The shards and the tables next to them, sorted."""
        return sorted(path for path in (data_dir / self.folder).glob("[!.]*") if _FILE.search(path.name))

    def read(self, data_dir: Path, shard: str) -> Iterator[Document | Reject | Note]:
        """The samples of `shard` in the order of the tar. A damaged sample does not affect the others.

        Samples that lack a part come last: it may turn up later, away from the rest. A truncated tar gives its complete
        samples, then a `truncated tar` reject for the sample in which it ends and, if there is a table, a `lost after
        truncated tar` reject for each later one.

        Raises:
          InputError: no member of the tar belongs to a sample.
        """
        folder = data_dir / self.folder
        path = next((folder / (shard + suffix) for suffix in SUFFIXES if _there(folder / (shard + suffix))), None)
        fields = {name: kind for kind in ("image", "text") for name in _fields(getattr(self, kind))}
        name = os.fsencode(shard).decode("utf-8", "replace")  # in any locale: it becomes part of keys
        return _Reading(self, name, path or folder / f"{shard}.tar", TarShard(fields | {METADATA: "json"})).items()


def _fields(names: str) -> list[str]:
    return [name.strip(".").lower() for name in names.split(";")]


def _there(path: Path) -> bool:
    """Whether there is such a file, or a link that leads nowhere."""
    return path.exists() or path.is_symlink()


class _MissingError(SampleError):
    """A sample without a part."""


@dataclass
class _Reading:
    """The reading of one shard."""

    source: WebDataset
    shard: str
    path: Path
    tar: TarShard
    seen: set[str] = field(default_factory=set)  # samples that were given
    lacking: dict[str, str] = field(default_factory=dict)  # why others can't be
    whole: bool = False  # whether a sample had two parts
    table: ShardTable = field(init=False)

    def __post_init__(self) -> None:
        suffix = next(suffix for suffix in SUFFIXES if self.path.name.endswith(suffix))
        self.table = ShardTable(self.path.with_name(f"{self.path.name.removesuffix(suffix)}.parquet"))

    def items(self) -> Iterator[Document | Reject | Note]:
        lost: list[Reject] = []
        try:
            for sample in self.tar.samples(self.path):
                yield from self._item(sample)
        except TruncatedTarError as truncated:
            lost = list(self._lost("truncated tar", truncated.key, str(truncated)))
        except (IsADirectoryError, FileNotFoundError) as error:
            lost = list(self._lost("unreadable shard", None, error.strerror or str(error)))
        if not self.whole and not lost and self.tar.members:
            self._refuse()
        for key, reason in self.lacking.items():
            yield self._reject(key, reason)
        yield from lost
        if self.table.defect:
            yield Reject(f"{self.shard}.parquet", self.table.defect)
        if not self.tar.members and not lost:
            yield Note("shard without members", 1, self.path.name)
        yield from self._notes()

    def _item(self, sample: Sample) -> Iterator[Document | Reject]:
        key = sample.key
        self.whole |= len(sample.files) > 1
        if key in self.lacking:
            self.whole = True
            self.lacking[key] = "members not adjacent: those of a sample must follow each other in the tar"
            return
        if key in self.seen:
            again = {"image", "text"} <= sample.files.keys()
            later = "members not adjacent: its " + " and ".join(sample.files) + " comes after other samples"
            yield self._reject(key, "duplicate key" if again else later)
            return
        try:
            if sample.defect:
                raise SampleError(sample.defect)
            document = self._document(sample)
        except _MissingError as error:
            self.lacking[key] = str(error)
            return
        except SampleError as error:
            self.seen.add(key)
            yield self._reject(key, str(error))
            return
        self.seen.add(key)
        yield document

    def _reject(self, key: str, reason: str) -> Reject:
        return Reject(f"{self.shard}/{key}", reason)

    def _document(self, sample: Sample) -> Document:
        image = sample.files.get("image")
        if image is None:
            raise _MissingError("missing image")
        metadata = self._metadata(sample)
        text = self._caption(sample, metadata)
        decode_image(image, self.source.max_pixels)  # here, where a bad image can still be dropped; kept encoded
        return Document(f"{self.shard}/{sample.key}", (Text(text), Image(image)), metadata)

    def _caption(self, sample: Sample, metadata: Mapping[str, JSON]) -> str:
        caption: object = sample.files.get("text")
        if self.source.caption_field is not None:
            caption = metadata.get(self.source.caption_field)
            if isinstance(caption, list) and caption:
                caption = caption[0]
        if isinstance(caption, str):
            caption = caption.encode("utf-8", "replace")
        if not isinstance(caption, bytes):
            raise _MissingError("missing text")
        return decode_text(caption)

    def _metadata(self, sample: Sample) -> Mapping[str, JSON]:
        if "json" not in sample.files:
            return self.table.row(sample.key)
        try:
            metadata = json.loads(sample.files["json"])
            if not isinstance(metadata, dict):
                raise ValueError(f"expected an object, found {type(metadata).__name__}")
            return {str(plain_json(key)): plain_json(value) for key, value in metadata.items()}
        except (ValueError, RecursionError) as error:
            raise SampleError(f"broken json: {' '.join(str(error).split())[:120]}") from error

    def _lost(self, what: str, key: str | None, why: str) -> Iterator[Reject]:
        """Rejects for the samples lost with the rest of the tar; without a table, one that stands for all of them."""
        rows = self.table.rows
        where = self.shard if key is None else f"{self.shard}/{key}"
        if not rows:
            yield Reject(where, f"{what}: {why}; the rest of the shard is lost", documents=None)
            return
        if key is not None:
            yield Reject(where, f"{what}: {why}")
        for name, row in rows.items():
            known = name in self.seen or name in self.lacking or name == key
            if not known and row.get("status", "success") == "success":
                yield self._reject(name, f"lost after {what}" if what == "truncated tar" else f"{what}: {why}")

    def _refuse(self) -> None:
        """Raises `InputError`, which says what the shard holds instead of samples."""
        members = self.tar.members
        listed = ", ".join(f"{count} {name}" for name, (count, _) in list(members.items())[:LISTED])
        example = next(iter(members.values()))[1]
        raise InputError(
            f"{self.path} holds no sample of an image and a text, but {listed} (such as {example!r}); name the fields, "
            "as in WebDataset(image='input.jpg', text='caption.txt'), or take the file away"
        )

    def _notes(self) -> Iterator[Note]:
        for name, (count, example) in self.tar.others.items():
            yield Note(f"{name} of no sample", count, f"{self.shard}/{example}")
        yield from self.table.notes()
