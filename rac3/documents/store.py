"""Tokenized documents on disk: `array_record` shards of msgpack records, read at random.

A record is {"key", "ids": "<u2" | "<u4", "segments": [{"text" | "image", "ids"}, ...], "metadata"}; `image` holds the
encoded picture, a segment's `ids` the bytes of its text ids or image codes, in the record's type: little-endian, of 2
or 4 bytes. Nothing in it is executable.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import msgpack
import numpy as np
from jaxtyping import Int

from rac3.config import InputError
from rac3.documents.document import Document, Image, Text

LENGTHS = "lengths.npy"
TEXT_LENGTHS = "text_lengths.npy"
KEY_HASHES = "key_hashes.npy"
NARROW, WIDE = "<u2", "<u4"

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


def key_hash(key: str) -> int:
    """64 bits that are the same everywhere."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


class DocumentStore:
    """The documents of one ingested split, in shard order. Safe to send to another process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def lengths(self) -> Int[np.ndarray, " documents"]:
        """Ids of each document as one sequence, its final `<eod>` included."""
        return np.load(self.folder / LENGTHS, allow_pickle=False)

    def shown_lengths(self, shown: Shown) -> Int[np.ndarray, " documents"]:
        """As `lengths`, of each document or of its images or texts alone; 0 where it has none.

        Raises:
          InputError: the documents were ingested before the lengths of their texts were kept.
        """
        if shown == "document":
            return self.lengths
        texts = np.load(self._require(TEXT_LENGTHS), allow_pickle=False)
        lengths = texts + 1 if shown == "text" else self.lengths - texts  # the <eod> is in both
        return np.where(lengths > 1, lengths, 0)

    def _require(self, name: str) -> Path:
        path = self.folder / name
        if not path.is_file():
            raise InputError(f"{path} is missing; delete {self.folder} and run `rac3 ingest` again")
        return path

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
        path = self._require(KEY_HASHES)
        same = np.flatnonzero(np.load(path, mmap_mode="r", allow_pickle=False) == np.uint64(key_hash(key)))
        return next((row for row in same.tolist() if self[row].document.key == key), None)

    def many(self, indices: Sequence[int]) -> list[TokenizedDocument]:
        if len(indices) == 0:
            return []  # the reader refuses to read nothing
        return [unpack_record(data) for data in self._source.__getitems__([int(i) for i in indices])]
