"""Documents from webdataset shards in img2dataset's layout.

00000.tar       000000000.jpg 000000000.txt 000000000.json 000000001.jpg ...
00000.parquet   one row per sample, including failed downloads, which are not in the tar
"""

import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from rac3.config import InputError
from rac3.documents.document import (
    JSON,
    MAX_PIXELS,
    Document,
    Image,
    Reject,
    SampleError,
    Text,
    decode_image,
    decode_text,
    plain_json,
)

_KINDS = {"jpg": "image", "jpeg": "image", "png": "image", "webp": "image", "txt": "text", "json": "json"}


_FILE = re.compile(r"\.(tar|tar\.gz|tgz|parquet)$")


@dataclass(frozen=True)
class WebDataset:
    """The shards `*.tar` of one folder. A sample is an image, a caption and optionally a JSON object.

    A sample is a `Reject` if its image or caption is missing, its image does not decode, its caption is not UTF-8, or
    its JSON does not parse, even where another file repeats the caption. Without JSON, its metadata is its row of the
    table, or empty if there is no table. A document's key is `shard/sample`.
    """

    folder: str = ""  # relative to the data folder
    caption_field: str | None = None  # the metadata field that holds the caption; None takes the .txt file
    max_pixels: int = MAX_PIXELS  # of the decoded image

    def __post_init__(self) -> None:
        if self.max_pixels < 1:
            raise InputError(f"source.max_pixels={self.max_pixels} allows no image; use 1 or more")

    def shards(self, data_dir: Path) -> Sequence[str]:
        """The names of the tar files without `.tar`, sorted.

        Raises:
          InputError: the folder does not exist or holds no tar.
        """
        folder = data_dir / self.folder
        if not folder.is_dir():
            raise InputError(f"data folder {str(folder)!r} does not exist; give a folder of .tar shards")
        names = sorted(path.stem for path in folder.glob("[!.]*.tar"))
        if not names:
            below = sorted({path.parent.name for path in folder.glob("*/*.tar")})
            hint = f"; its subfolders that do: {', '.join(below)}" if below else "; give a folder of .tar shards"
            raise InputError(f"data folder {str(folder)!r} holds no .tar file{hint}")
        return names

    def files(self, data_dir: Path) -> Sequence[Path]:
        """The shards and the tables next to them, sorted."""
        return sorted(path for path in (data_dir / self.folder).glob("[!.]*") if _FILE.search(path.name))

    def read(self, data_dir: Path, shard: str) -> Iterator[Document | Reject]:
        """The samples of `shard` in the order of the tar. A damaged sample does not affect the others.

        A truncated tar gives its complete samples, then a `truncated tar` reject for the sample in which it ends and,
        if there is a table, a `lost after truncated tar` reject for each later one.
        """
        path = data_dir / self.folder / f"{shard}.tar"
        table = _Table(path.with_suffix(".parquet"))
        seen: set[str] = set()
        try:
            for sample in _samples(path):
                key = f"{shard}/{sample.key}"
                yield Reject(key, "duplicate key") if sample.key in seen else self._document(key, sample, table)
                seen.add(sample.key)
        except _TruncatedTarError as truncated:
            yield from _lost(shard, truncated, seen, table)
        if table.defect:
            yield Reject(f"{shard}.parquet", table.defect)

    def _document(self, key: str, sample: "_Sample", table: "_Table") -> Document | Reject:
        try:
            image = sample.files.get("image")
            if image is None:
                raise SampleError("missing image")
            metadata = _metadata(sample, table)
            text = self._caption(sample, metadata)
            decode_image(image, self.max_pixels)  # here, where a bad image can still be dropped; kept encoded
        except SampleError as error:
            return Reject(key, str(error))
        return Document(key, (Text(text), Image(image)), metadata)

    def _caption(self, sample: "_Sample", metadata: Mapping[str, JSON]) -> str:
        caption: object = sample.files.get("text")
        if self.caption_field is not None:
            caption = metadata.get(self.caption_field)
            if isinstance(caption, list) and caption:
                caption = caption[0]
        if isinstance(caption, str):
            caption = caption.encode()
        if not isinstance(caption, bytes):
            raise SampleError("missing text")
        return decode_text(caption)


class _Sample(NamedTuple):
    key: str
    files: dict[str, bytes]  # by kind: image, text, json


class _TruncatedTarError(Exception):
    """A tar that ends early or becomes unreadable; `key` is the sample where it does, None if between two."""

    def __init__(self, key: str | None, reason: str):
        super().__init__(reason)
        self.key = key


class _Table:
    """The parquet table next to a tar. Read on first use: most shards never need it."""

    def __init__(self, path: Path):
        self._path = path
        self.defect: str | None = None  # set once a damaged table was read

    @cached_property
    def rows(self) -> dict[str, dict[str, JSON]]:
        """Rows by sample key; empty if the table is missing or unreadable."""
        import pyarrow
        import pyarrow.parquet

        if not self._path.is_file():
            return {}
        try:
            rows = pyarrow.parquet.ParquetFile(self._path).read().to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            self.defect = f"broken table: {' '.join(str(error).split())}"
            return {}
        return {str(row["key"]): {k: plain_json(v) for k, v in row.items()} for row in rows if "key" in row}


def _samples(path: Path) -> Iterator[_Sample]:
    """Group consecutive files with the same key into samples; a second file of a kind starts a new sample.

    Raises:
      _TruncatedTarError: after the last complete sample, if the tar does not end with an end-of-archive mark.
    """
    sample: _Sample | None = None
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                key, kind = _key_and_kind(member.name)
                content = tar.extractfile(member) if key and kind and member.isfile() else None
                if content is None:  # a folder, a link, a file of another kind
                    continue
                if sample is not None and (key != sample.key or kind in sample.files):
                    yield sample
                    sample = None
                sample = sample or _Sample(key, {})
                sample.files[kind] = content.read()
            _check_end(file.seek(tar.offset), file.read(tarfile.BLOCKSIZE))
    except (tarfile.TarError, ValueError) as error:  # ValueError: from numbers in a damaged header
        if sample is not None and len(sample.files) == 3:  # truncated after its image, caption and JSON
            yield sample
            sample = None
        raise _TruncatedTarError(sample.key if sample else None, str(error)) from error
    if sample is not None:
        yield sample


def _check_end(offset: int, block: bytes) -> None:
    """Raise unless the tar ended properly: `tarfile` also stops silently at a missing end mark or a damaged header."""
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"no end-of-archive mark at byte {offset}")
    if any(block):
        raise tarfile.ReadError(f"damaged header at byte {offset}")


def _key_and_kind(name: str) -> tuple[str, str]:
    """Parse a member's name: './a/000.JPG' -> ('a/000', 'image').

    As in webdataset, the key ends at the first dot of the file name. Key or kind is empty for a file of no sample.
    """
    path = PurePosixPath(name.lstrip("/"))
    stem, _, extension = path.name.partition(".")
    key = str(path.with_name(stem)) if stem else ""
    # Names that are not UTF-8 contain surrogates, which cannot be written to a manifest.
    return key.encode("utf-8", "replace").decode(), _KINDS.get(extension.lower(), "")


def _metadata(sample: _Sample, table: _Table) -> Mapping[str, JSON]:
    if "json" not in sample.files:
        return table.rows.get(sample.key, {})
    try:
        metadata = json.loads(sample.files["json"])
    except (ValueError, RecursionError) as error:
        raise SampleError(f"broken json: {' '.join(str(error).split())}") from error
    if not isinstance(metadata, dict):
        raise SampleError(f"broken json: expected an object, found {type(metadata).__name__}")
    return {key: plain_json(value) for key, value in metadata.items()}


def _lost(shard: str, truncated: _TruncatedTarError, seen: set[str], table: _Table) -> Iterator[Reject]:
    """Rejects for the samples lost to a truncated tar; without a table, one reject for the shard."""
    if truncated.key is not None:
        yield Reject(f"{shard}/{truncated.key}", f"truncated tar: {truncated}")
    elif not table.rows:
        yield Reject(shard, f"truncated tar: {truncated}")
    for key, row in table.rows.items():
        if key not in seen and key != truncated.key and row.get("status", "success") == "success":
            yield Reject(f"{shard}/{key}", "lost after truncated tar")
