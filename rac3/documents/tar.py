"""The samples of a webdataset tar, plain or gzipped: in bounded memory whatever its headers claim, no member unnoticed.

a.jpg a.txt a.json a.mask.png b.jpg ...   ->   a {image, text, json}; "1 .mask.png of no sample"; b ...
"""

import contextlib
import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from rac3.documents.document import MAX_PIXELS

MAX_BYTES = 3 * MAX_PIXELS  # of a member, or of a header: the largest image, if nothing were compressed
RELATED = 64  # samples with related names that are held at once
KINDS = 1000  # of members that are counted apart
GZIP = b"\x1f\x8b"
_DAMAGE = (
    *(tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile),
    *(ValueError, TypeError, LookupError, OverflowError, MemoryError, RecursionError),
)
"""What reading a damaged tar may raise; `tarfile` does not check the numbers in its headers."""


class TruncatedTarError(Exception):
    """A tar that ends early or becomes unreadable; `key` is the sample where it does, None if between two."""

    def __init__(self, key: str | None, reason: str):
        super().__init__(reason)
        self.key = key


@dataclass
class Sample:
    """The members with one key.

    Attributes:
      files: contents by kind: image, text, json.
      fields: by kind, the end of the member's name.
      defect: why it can be no document, as a category, a colon and the details; "" if its members are fine.
    """

    key: str
    files: dict[str, bytes] = field(default_factory=dict)
    fields: dict[str, str] = field(default_factory=dict)
    defect: str = ""


@dataclass
class TarShard:
    """Reads one tar.

    Attributes:
      kinds: what a field holds: image, text or json.
      members: by the end of their names, how many there are, and the first one's name.
      others: the same of those that belong to no sample.
    """

    kinds: Mapping[str, str]
    members: dict[str, tuple[int, str]] = field(default_factory=dict)
    others: dict[str, tuple[int, str]] = field(default_factory=dict)

    def samples(self, path: Path) -> Iterator[Sample]:
        """Consecutive members with one key are a sample; the same field again starts a new one.

        Raises:
          TruncatedTarError: after the last complete sample, if the tar does not end with an end-of-archive mark.
          OSError: the file can't be opened.
        """
        group: dict[str, Sample] = {}
        with _opened(path) as file:
            try:
                with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:  # type: ignore[call-overload]
                    for member in tar:
                        if member.size < 0:
                            raise tarfile.ReadError(f"a member of {member.size} bytes")
                        if member.isdir():
                            continue
                        key, name = self._key_and_field(member.name)
                        _count(self.members, _extension(member.name), member.name)
                        if not name:
                            _count(self.others, _extension(member.name), member.name)
                            continue
                        kind = self.kinds[name]
                        if group and (
                            not _related(key, group)
                            or (key in group and group[key].fields.get(kind) == name)
                            or (key not in group and len(group) == RELATED)
                        ):
                            yield from self._split(group)
                            group = {}
                        self._add(group.setdefault(key, Sample(key)), kind, name, tar, member)
                    _check_end(file.seek(tar.offset), file.read(tarfile.BLOCKSIZE))
            except _DAMAGE as error:
                whole = [key for key, sample in group.items() if len(sample.files) == 3]  # image, caption and JSON
                yield from (group[key] for key in whole)
                left = [key for key in group if not any(f"{key}.".startswith(f"{each}.") for each in whole)]
                reason = " ".join((str(error) or type(error).__name__).split())[:120]
                raise TruncatedTarError(min(left, key=len, default=None), reason) from error
        yield from self._split(group)

    def _key_and_field(self, name: str) -> tuple[str, str]:
        """The key and the field of a member: './a/photo 2.0.JPG' -> ('a/photo 2.0', 'jpg').

        The longest field that ends the name counts. Both are empty for a file of no sample.
        """
        path = PurePosixPath(name.lstrip("/"))
        ends = [each for each in self.kinds if path.name[-len(each) - 1 :].lower() == f".{each}"]
        found = max(ends, key=len, default="")
        if not found or path.name.startswith("."):
            return "", ""
        key = str(path.with_name(path.name[: -len(found) - 1]))
        return key.encode("utf-8", "replace").decode(), found  # a name that is not UTF-8 could not be written anywhere

    def _add(self, sample: Sample, kind: str, name: str, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        """Reads a member into its sample."""
        if kind in sample.files:
            first = sample.fields[kind]
            sample.defect = f"two {kind}s: .{first} and .{name}; name one field, as in WebDataset({kind}={first!r})"
        elif member.issym() or member.islnk():
            sample.defect = f"a link: .{name} is not in the tar itself"
        elif not member.isreg() or member.issparse():
            sample.defect = f"not a plain file: .{name} is {'sparse' if member.isreg() else 'a device'}"
        elif member.size > MAX_BYTES:
            sample.defect = f"too large: .{name} has {member.size:,} bytes, more than {MAX_BYTES:,}"
        content = None if sample.defect else tar.extractfile(member)
        sample.fields.setdefault(kind, name)
        sample.files.setdefault(kind, b"" if content is None else content.read())

    def _split(self, group: dict[str, Sample]) -> Iterator[Sample]:
        """The samples among related names; `a.mask.png` next to `a.jpg` is none, but another field of `a`."""
        for sample in group.values():
            owner = next((key for key in group if sample.key.startswith(f"{key}.")), None)
            if owner is None or {"image", "text"} <= sample.files.keys():
                yield sample
                continue
            for name in sample.fields.values():
                _count(self.others, f"{sample.key.removeprefix(owner)}.{name}", f"{sample.key}.{name}")


def _related(key: str, group: Mapping[str, Sample]) -> bool:
    """Whether a key is, begins or continues the shortest of the group."""
    shortest = min(group, key=len)
    return key == shortest or key.startswith(f"{shortest}.") or shortest.startswith(f"{key}.")


def _extension(name: str) -> str:
    """What tells kinds of members apart: all after the first dot of the file name."""
    _, dot, rest = PurePosixPath(name).name.lstrip(".").partition(".")
    text = f"{dot}{rest}"[-40:] if len(rest) < 40 else f".{rest.rpartition('.')[2][-40:]}"
    return text.encode("utf-8", "replace").decode() or "a file without extension"


def _count(counts: dict[str, tuple[int, str]], kind: str, name: str) -> None:
    if kind not in counts and len(counts) >= KINDS:
        kind = "another file"
    count, first = counts.get(kind, (0, name.encode("utf-8", "replace").decode()[:120]))
    counts[kind] = count + 1, first


@contextlib.contextmanager
def _opened(path: Path) -> Iterator["_Bounded"]:
    """The bytes of a tar, decompressed if they are gzipped, whatever the file is called."""
    with path.open("rb") as raw:
        zipped = raw.read(2) == GZIP
        raw.seek(0)
        plain = io.BufferedReader(gzip.GzipFile(fileobj=raw), 2**20) if zipped else raw
        yield _Bounded(plain)


@dataclass
class _Bounded:
    """A file for `tarfile`, which would ask for as many bytes at once as a header claims."""

    file: io.BufferedIOBase

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_BYTES + tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"a header asks for {size} bytes")
        return self.file.read(size)

    def seek(self, place: int) -> int:
        if not 0 <= place < 2**62:
            raise tarfile.ReadError(f"a header points to byte {place}")
        return self.file.seek(place)

    def tell(self) -> int:
        return self.file.tell()


def _check_end(offset: int, block: bytes) -> None:
    """Raise unless the tar ended properly: `tarfile` also stops silently at a missing end mark or a damaged header."""
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"no end-of-archive mark at byte {offset}")
    if any(block):
        raise tarfile.ReadError(f"damaged header at byte {offset}")
