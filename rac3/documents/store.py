"""Tokenized documents on disk: `array_record` shards of msgpack records, with random access.

A record is {"key", "ids": "<u2" | "<u4", "segments": [{"text" | "image", "ids"}, ...], "metadata"}. `image` holds the
encoded image. A segment's `ids` are the bytes of its text ids or image codes, in the type that the record's `ids`
names: little-endian, 2 or 4 bytes each. Nothing in a record is executable.
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
COLUMNS: dict[str, type[np.integer[Any]]] = {  # NAME.npy: one number per document, readable without the documents
    "lengths": np.int32,
    "text_lengths": np.int32,
    "key_hashes": np.uint64,
    "text_hashes": np.uint64,
    "image_hashes": np.uint64,
}

Shown = Literal["document", "image", "text"]
"""The part of a document that a model sees: all of it, only its images, or only its texts."""


@dataclass(frozen=True)
class TokenizedDocument:
    """A document with the ids of each segment, in the same order."""

    document: Document
    ids: tuple[Int[np.ndarray, " _"], ...]


def id_type(text_size: int, image_size: int) -> str:
    """The type of a store's ids: 2 bytes if the ids of each tokenizer fit into them, else 4."""
    return NARROW if max(text_size, image_size) <= 2**16 else WIDE


def pack_record(item: TokenizedDocument, kind: str) -> bytes:
    """Serialize a document, its ids as type `kind`.

    Raises:
      InputError: `kind` cannot hold an id.
    """
    limit = np.iinfo(kind).max
    segments: list[dict[str, Any]] = []
    for segment, ids in zip(item.document.segments, item.ids, strict=True):
        if ids.size and (ids.min() < 0 or ids.max() > limit):
            bad, what = (ids.min() if ids.min() < 0 else ids.max()), type(segment).__name__.lower()
            raise InputError(
                f"document {item.document.key!r} has the {what} id {bad}, outside the range [0, {limit}] of the "
                f"store's {np.dtype(kind).name}; use a tokenizer whose ids are all below its size"
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
    """Stream documents into one shard, their ids as type `kind`.

    Not atomic: the caller writes to a temporary name and renames.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    # With groups of one record, a random read decompresses only that record.
    writer = ArrayRecordWriter(str(path), "group_size:1")
    try:
        for item in items:
            writer.write(pack_record(item, kind))
    finally:
        writer.close()


def hash64(data: bytes) -> int:
    """A 64-bit hash: the same on every machine, and never 0."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1


def columns_of(item: TokenizedDocument, length: int) -> dict[str, int]:
    """The value of each of `COLUMNS` for a document.

    Equal `text_hashes` mean equal texts up to case and spacing. Equal `image_hashes` mean first images with equal
    codes, which look the same to a model. 0 means no text, or no image.

    Args:
      length: ids in the document's sequence, including the final `<eod>`.
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
    """Write each column from its pieces, which are in the order of the documents."""
    for name, dtype in COLUMNS.items():
        np.save(folder / f"{name}.npy", np.concatenate([np.zeros(0, dtype), *columns[name]]))


class DocumentStore:
    """The documents of one ingested split, in shard order. Pickles as its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def lengths(self) -> Int[np.ndarray, " documents"]:
        """The number of ids in each document's sequence, including the final `<eod>`."""
        return np.asarray(self.column("lengths"))

    def column(self, name: str) -> Integer[np.ndarray, " documents"]:
        """One of `COLUMNS`, memory-mapped.

        Raises:
          InputError: the file is missing: the documents come from a version that did not write this column.
        """
        path = self.folder / f"{name}.npy"
        if not path.is_file():
            raise InputError(f"{path} is missing; delete {self.folder} and run `rac3 ingest` again")
        return np.load(path, mmap_mode="r", allow_pickle=False)

    def shown_lengths(self, shown: Shown) -> Int[np.ndarray, " documents"]:
        """As `lengths`, but for the shown part of each document; 0 where it has no such part.

        Raises:
          InputError: as `column`.
        """
        if shown == "document":
            return self.lengths
        texts = self.column("text_lengths")
        lengths = texts + 1 if shown == "text" else self.lengths - texts  # each has an <eod>
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
        """The row of the document with this key, or None. Scans 8 bytes per document, not the documents.

        Raises:
          InputError: as `column`.
        """
        same = np.flatnonzero(self.column("key_hashes") == np.uint64(hash64(key.encode())))
        return next((row for row in same.tolist() if self[row].document.key == key), None)

    def many(self, indices: Sequence[int]) -> list[TokenizedDocument]:
        if len(indices) == 0:
            return []  # the reader rejects an empty list
        return [unpack_record(data) for data in self._source.__getitems__([int(i) for i in indices])]


class Texts(Sequence[str]):
    """The texts of the documents in a store, read on access."""

    def __init__(self, documents: DocumentStore) -> None:
        self.documents = documents

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, row):  # int -> str, slice -> list of str
        if isinstance(row, slice):
            return [self._of(item.document) for item in self.documents.many(range(*row.indices(len(self))))]
        if not -len(self) <= row < len(self):
            raise IndexError(row)  # ends a `for` over the sequence
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
