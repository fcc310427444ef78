"""Tokenized documents on disk, with random access. Their ids are apart from the rest, so that training reads ids alone.

    000000.array_record   msgpack records {"key", "segments": [{"text" | "image", "framing"?}, ...], "metadata"}
    000000.u2, or .u4     the ids of the same documents, in 2 or 4 bytes each
    id_starts.npy         where the ids of each document begin, as if the files of all shards were one
    id_shards.npy         where those of each shard begin

`image` holds the encoded image. The ids of a document are those of its segments, text ids or image codes, after a head
of 4-byte numbers. All numbers are little-endian, and nothing is executable:

    CRC-32 of the rest | number of segments | 2 * length + (1 if image) of each | ids
"""

import contextlib
import hashlib
import os
import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import msgpack
import numpy as np
from jaxtyping import Int, Integer

from rac3.artifacts.files import damaged
from rac3.artifacts.workdir import temporary_path
from rac3.config import InputError
from rac3.documents.document import Document, Image, Text

FORMAT = 2  # of these files; part of the recipe of documents
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


Tokens = tuple[tuple[bool, Int[np.ndarray, " _"]], ...]
"""The ids of a document: of each segment, whether it is an image, and its text ids or image codes."""


@dataclass(frozen=True)
class TokenizedDocument:
    """A document with the ids of each segment, in the same order."""

    document: Document
    ids: tuple[Int[np.ndarray, " _"], ...]

    @property
    def tokens(self) -> Tokens:
        pairs = zip(self.document.segments, self.ids, strict=True)
        return tuple((isinstance(segment, Image), ids) for segment, ids in pairs)


def id_type(text_size: int, image_size: int) -> str:
    """The type of a store's ids: 2 bytes if the ids of each tokenizer fit into them, else 4."""
    return NARROW if max(text_size, image_size) <= 2**16 else WIDE


def pack_record(document: Document) -> bytes:
    """A document without its ids."""
    segments = [{"text": each.text} if isinstance(each, Text) else _packed(each) for each in document.segments]
    return msgpack.packb({"key": document.key, "segments": segments, "metadata": dict(document.metadata)})


def _packed(image: Image) -> dict[str, Any]:
    return {"image": image.data} | ({} if image.framing == "crop" else {"framing": image.framing})


def unstorable(document: Document) -> str | None:
    """Why a document can't be stored, in a few words; None if it can. Metadata may hold what no file format has."""
    texts = [segment.text for segment in document.segments if isinstance(segment, Text)]
    try:
        msgpack.packb([document.key, texts, dict(document.metadata)])
    except (ValueError, TypeError, OverflowError, RecursionError) as error:  # surrogates are a ValueError
        return " ".join(str(error).split())[:120]
    return None


def unpack_record(data: bytes) -> Document:
    record = msgpack.unpackb(data)
    segments = tuple(
        Text(s["text"]) if "text" in s else Image(s["image"], s.get("framing", "crop")) for s in record["segments"]
    )
    return Document(record["key"], segments, record["metadata"])


def pack_ids(item: TokenizedDocument, kind: str) -> bytes:
    """The ids of a document as type `kind`.

    Raises:
      InputError: `kind` cannot hold an id.
    """
    limit = np.iinfo(kind).max
    for is_image, ids in item.tokens:
        if ids.size and (ids.min() < 0 or ids.max() > limit):
            bad, what = (ids.min() if ids.min() < 0 else ids.max()), "image" if is_image else "text"
            raise InputError(
                f"document {item.document.key!r} has the {what} id {bad}, outside the range [0, {limit}] of the "
                f"store's {np.dtype(kind).name}; use a tokenizer whose ids are all below its size"
            )
    head = [len(item.ids), *(2 * len(ids) + is_image for is_image, ids in item.tokens)]
    body = b"".join([np.array(head, WIDE).tobytes(), *(ids.astype(kind).tobytes() for ids in item.ids)])
    return struct.pack("<I", zlib.crc32(body)) + body


def unpack_ids(data: bytes, kind: str) -> Tokens:
    """The inverse of `pack_ids`.

    Raises:
      ValueError: the checksum is not that of the rest.
    """
    if len(data) < 8 or struct.unpack_from("<I", data)[0] != zlib.crc32(memoryview(data)[4:]):
        raise ValueError("the checksum is wrong")
    (count,) = struct.unpack_from("<I", data, 4)
    place, tokens = 8 + 4 * count, []
    for head in struct.unpack_from(f"<{count}I", data, 8):
        stored = np.frombuffer(data, kind, head >> 1, place)
        tokens.append((bool(head & 1), stored.astype(np.int32)))
        place += stored.nbytes
    return tuple(tokens)


def write_shard(folder: Path, number: int, items: Iterable[TokenizedDocument], kind: str) -> list[int]:
    """Stream documents into the two files of a shard, their ids as type `kind`. Each appears whole or not at all.

    Returns:
      The bytes that the ids of each document take, for `write_id_starts`.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    records, ids = folder / f"{number:06d}.array_record", _ids_path(folder, number, kind)
    temporary_records, temporary_ids = temporary_path(records), temporary_path(ids)
    sizes = []
    # With groups of one record, a random read decompresses only that record.
    writer = ArrayRecordWriter(str(temporary_records), "group_size:1")
    try:
        with temporary_ids.open("wb") as file:
            for item in items:
                sizes.append(file.write(pack_ids(item, kind)))
                writer.write(pack_record(item.document))
        writer.close()
    except BaseException:
        with contextlib.suppress(RuntimeError):  # it can't write the rest either
            writer.close()
        for path in (temporary_ids, temporary_records):
            path.unlink(missing_ok=True)  # they take room on a disk that may be full
        raise
    temporary_ids.replace(ids)
    temporary_records.replace(records)
    return sizes


def write_id_starts(folder: Path, sizes: Sequence[Sequence[int] | Int[np.ndarray, " _"]]) -> None:
    """Write where ids begin, from the bytes of each document of each shard."""
    starts = np.cumsum(np.concatenate([[0], *sizes]).astype(np.int64))
    np.save(folder / "id_starts.npy", starts)
    np.save(folder / "id_shards.npy", starts[np.cumsum([0, *map(len, sizes[:-1])])])


def _ids_path(folder: Path, number: int, kind: str) -> Path:
    return folder / f"{number:06d}.{kind[1:]}"


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
        """One of `COLUMNS`, or of the starts of ids, memory-mapped.

        Raises:
          InputError: the file is missing, or is no array.
        """
        path = self.folder / f"{name}.npy"
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError as error:
            raise damaged(path, "is missing") from error
        except (ValueError, EOFError) as error:
            raise damaged(path, "is damaged: it holds no array") from error

    def shown_lengths(self, shown: Shown, rows: slice | np.ndarray = slice(None)) -> Int[np.ndarray, "..."]:
        """As `lengths`, but for the shown part of each document; 0 where it has no such part.

        Raises:
          InputError: as `column`.
        """
        if shown == "document":
            return self.lengths[rows]
        texts = self.column("text_lengths")[rows]
        lengths = texts + 1 if shown == "text" else self.lengths[rows] - texts  # each has an <eod>
        return np.where(lengths > 1, lengths, 0)

    @cached_property
    def _source(self) -> Any:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        paths = sorted(self.folder.glob("*.array_record"))
        try:
            source = ArrayRecordDataSource([str(path) for path in paths])
        except RuntimeError as error:
            raise damaged(next(filter(_is_damaged, paths), self.folder), "is damaged: it holds no records") from error
        if len(source) != len(self):
            raise damaged(self.folder, f"has {len(source):,} documents in its .array_record files, not {len(self):,}")
        return source

    def _records(self, rows: Sequence[int]) -> list[bytes]:
        try:
            if len(rows) == 1:
                return [self._source[rows[0]]]
            return self._source.__getitems__(rows)  # by a pool of threads, which each call starts
        except RuntimeError as error:
            for row in rows:  # the reader's error does not name the file
                try:
                    self._source[row]
                except RuntimeError:
                    path = self.folder / f"{self._shard(row):06d}.array_record"
                    raise damaged(path, f"is damaged: document {row} does not match its checksum") from error
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> TokenizedDocument:
        return self._tokenized(index, self._records([int(index)])[0])

    def tokens(self, index: int) -> Tokens:
        """The ids of a document; reads nothing else.

        A file is open only while it is read: there may be more shards than a process may open files. Threads that
        read do not hold the interpreter's lock.

        Raises:
          InputError: the ids are damaged; or as `column`.
        """
        start, stop = self._id_starts[index : index + 2].tolist()
        shard = self._shard(index)
        path = _ids_path(self.folder, shard, self._kind)
        try:
            file = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise damaged(path, "is missing") from error
        try:
            data = os.pread(file, stop - start, start - self._id_shards[shard])
        finally:
            os.close(file)
        try:
            return unpack_ids(data, self._kind)
        except ValueError as error:
            raise damaged(path, f"is damaged: the ids of document {index}, {error}") from error

    def _shard(self, index: int) -> int:
        """The number of the files that hold a document."""
        return bisect_right(self._id_shards, int(self._id_starts[index])) - 1

    @cached_property
    def _id_starts(self) -> Int[np.ndarray, " starts"]:
        return self.column("id_starts")

    @cached_property
    def _id_shards(self) -> list[int]:
        return self.column("id_shards").tolist()

    @cached_property
    def _kind(self) -> str:
        return NARROW if _ids_path(self.folder, 0, NARROW).is_file() else WIDE

    def _tokenized(self, index: int, record: bytes) -> TokenizedDocument:
        return TokenizedDocument(unpack_record(record), tuple(ids for _, ids in self.tokens(index)))

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
        rows = [int(index) for index in indices]
        return [self._tokenized(*each) for each in zip(rows, self._records(rows), strict=True)]


def _is_damaged(records: Path) -> bool:
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        ArrayRecordReader(str(records)).close()
    except RuntimeError:
        return True
    return False


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
