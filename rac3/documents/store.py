"""Tokenized documents on disk: `array_record` shards of msgpack records, read at random.

A record is {"key", "ids": "<u2" | "<u4", "segments": [{"text" | "image", "ids"}, ...], "metadata"}; `image` holds the
encoded picture, a segment's `ids` the bytes of its text ids or image codes, in the record's type: little-endian, of 2
or 4 bytes. Nothing in it is executable.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import msgpack
import numpy as np
from jaxtyping import Int, Integer

from rac3.config import InputError
from rac3.documents.document import Document, Image, Text

NARROW, WIDE = "<u2", "<u4"
COLUMNS: dict[str, type[np.integer[Any]]] = {  # NAME.npy: a number per document, for which no document need be read
    "lengths": np.int32,
    "text_lengths": np.int32,
    "key_hashes": np.uint64,
    "text_hashes": np.uint64,
    "image_hashes": np.uint64,
}

Shown = Literal["document", "image", "text"]
"""What a model sees of a document: all of it, or its images or texts alone."""


@dataclass(frozen=True)
class TokenizedDocument:
    """A document with the ids of each of its segments, in the same order."""

    document: Document
    ids: tuple[Int[np.ndarray, " _"], ...]


def id_type(text_size: int, image_size: int) -> str:
    """The type of all ids of a store: 2 bytes if those of both tokenizers, each in a range of its own, fit, else 4."""
    return NARROW if max(text_size, image_size) <= 2**16 else WIDE


def pack_record(item: TokenizedDocument, kind: str) -> bytes:
    """The record of a document, its ids as `kind`.

    Raises:
      InputError: an id that `kind` cannot hold.
    """
    limit = np.iinfo(kind).max
    segments: list[dict[str, Any]] = []
    for segment, ids in zip(item.document.segments, item.ids, strict=True):
        if ids.size and (ids.min() < 0 or ids.max() > limit):
            bad, what = (ids.min() if ids.min() < 0 else ids.max()), type(segment).__name__.lower()
            raise InputError(
                f"document {item.document.key!r} has the {what} id {bad}, outside [0, {limit}] that its store of "
                f"{np.dtype(kind).name} holds; use a tokenizer that gives ids below its size only"
            )
        content = {"text": segment.text} if isinstance(segment, Text) else {"image": segment.data}
        segments.append({**content, "ids": ids.astype(kind).tobytes()})
    record = {"key": item.document.key, "ids": kind, "segments": segments, "metadata": dict(item.document.metadata)}
    return msgpack.packb(record)


def unpack_record(data: bytes) -> TokenizedDocument:
    record = msgpack.unpackb(data)
    segments = tuple(Text(s["text"]) if "text" in s else Image(s["image"]) for s in record["segments"])
    ids = tuple(np.frombuffer(s["ids"], record["ids"]).astype(np.int32) for s in record["segments"])
    return TokenizedDocument(Document(record["key"], segments, record["metadata"]), ids)


def write_shard(path: Path, items: Iterable[TokenizedDocument], kind: str) -> None:
    """Writes one shard, each document as it comes, its ids as `kind`.

    The caller makes it atomic (a temporary name, then a rename).
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    # Groups of one record make every random read one record's decompression.
    writer = ArrayRecordWriter(str(path), "group_size:1")
    try:
        for item in items:
            writer.write(pack_record(item, kind))
    finally:
        writer.close()


def hash64(data: bytes) -> int:
    """64 bits that are the same everywhere, and never 0."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1


def columns_of(item: TokenizedDocument, length: int) -> dict[str, int]:
    """The numbers of a document, by column.

    Equal `text_hashes` are equal texts but for case and spacing; equal `image_hashes` are first images of equal codes,
    which are the same picture to a model; 0 is none.

    Args:
      length: of the document as one sequence of ids, its final `<eod>` included.
    """
    pairs = list(zip(item.document.segments, item.ids, strict=True))
    text = " ".join(item.document.text.casefold().split())
    image = next((ids for segment, ids in pairs if isinstance(segment, Image)), None)
    return {
        "lengths": length,
        "text_lengths": sum(len(ids) for segment, ids in pairs if isinstance(segment, Text)),
        "key_hashes": hash64(item.document.key.encode()),
        "text_hashes": hash64(text.encode()) if text else 0,
        "image_hashes": 0 if image is None else hash64(image.astype(WIDE).tobytes()),
    }


def write_columns(folder: Path, columns: Mapping[str, Sequence[np.ndarray]]) -> None:
    """Writes the columns, each in pieces in the order of the documents."""
    for name, dtype in COLUMNS.items():
        np.save(folder / f"{name}.npy", np.concatenate([np.zeros(0, dtype), *columns[name]]))


class DocumentStore:
    """The documents of one ingested split, in shard order. Safe to send to another process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def lengths(self) -> Int[np.ndarray, " documents"]:
        """Ids of each document as one sequence, its final `<eod>` included."""
        return np.asarray(self.column("lengths"))

    def column(self, name: str) -> Integer[np.ndarray, " documents"]:
        """One of `COLUMNS`, mapped into memory.

        Raises:
          InputError: the documents were ingested before this column was kept.
        """
        path = self.folder / f"{name}.npy"
        if not path.is_file():
            raise InputError(f"{path} is missing; delete {self.folder} and run `rac3 ingest` again")
        return np.load(path, mmap_mode="r", allow_pickle=False)

    def shown_lengths(self, shown: Shown) -> Int[np.ndarray, " documents"]:
        """As `lengths`, of each document or of its images or texts alone; 0 where it has none.

        Raises:
          InputError: the documents were ingested before the lengths of their texts were kept.
        """
        if shown == "document":
            return self.lengths
        texts = self.column("text_lengths")
        lengths = texts + 1 if shown == "text" else self.lengths - texts  # the <eod> is in both
        return np.where(lengths > 1, lengths, 0)

    @cached_property
    def _source(self) -> Any:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        return ArrayRecordDataSource([str(path) for path in sorted(self.folder.glob("*.array_record"))])

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> TokenizedDocument:
        return unpack_record(self._source[int(index)])

    def row_of(self, key: str) -> int | None:
        """The number of the document with this key, if there is one; reads 8 bytes per document, not the documents.

        Raises:
          InputError: the documents were ingested before their keys were kept.
        """
        same = np.flatnonzero(self.column("key_hashes") == np.uint64(hash64(key.encode())))
        return next((row for row in same.tolist() if self[row].document.key == key), None)

    def many(self, indices: Sequence[int]) -> list[TokenizedDocument]:
        if len(indices) == 0:
            return []  # the reader refuses to read nothing
        return [unpack_record(data) for data in self._source.__getitems__([int(i) for i in indices])]


class Texts(Sequence[str]):
    """The texts of the documents in a store, read on access."""

    def __init__(self, documents: DocumentStore) -> None:
        self.documents = documents

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, row):  # int -> str, slice -> list, as of any sequence
        if isinstance(row, slice):
            return [self._of(item.document) for item in self.documents.many(range(*row.indices(len(self))))]
        if not -len(self) <= row < len(self):
            raise IndexError(row)  # what ends a `for` over a sequence
        return self._of(self.documents[row % len(self)].document)

    def _of(self, document: Document) -> str:
        return document.text


class Keys(Texts):
    """The keys of the documents in a store. `index` looks one up by its hash, without reading every document."""

    def _of(self, document: Document) -> str:
        return document.key

    def index(self, value: str, *_: int) -> int:
        row = self.documents.row_of(value)
        if row is None:
            raise ValueError(f"{value!r} is not a key of {self.documents.folder}")
        return row
