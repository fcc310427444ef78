"""`torch.save` files without torch, and without running the code in them.

Such a file is a pickle plus the raw bytes of the tensors. A pickle is a program: unpickling calls any function that it
names. So it is not unpickled here. `_Plain` walks its opcodes and builds only plain data: tensors, parameters,
`OrderedDict` and `torch.Size`. Anything else (a training framework's callbacks, a project's classes) becomes a
`_Foreign`, a placeholder that does nothing.

    pickle: {"state_dict": {"conv.weight": <tensor of storage 0>}, "callbacks": {...: <foreign>}}
    out   : {"conv.weight": array}
"""

import mmap
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from rac3.config import InputError
from rac3.weights.checkpoint_files import mistaken_for, plain_names

AGAIN = "download it again"
RESAVE = "save its state_dict() with torch.save and give that file"
NESTED = ("state_dict", "model", "ema")
"""Where the weights may be, the first that holds tensors; else they are the entries of the file's own dictionary."""

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_HEAD = b"\x80\x02\x8a\x0a"  # how the pickle of that number begins
_DTYPES = {
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.BoolStorage": np.dtype(np.bool_),
    "torch.ComplexFloatStorage": np.dtype(np.complex64),
    "torch.ComplexDoubleStorage": np.dtype(np.complex128),
}
_DAMAGE = (ValueError, TypeError, LookupError, OverflowError, AttributeError, MemoryError, RecursionError)
"""The errors that walking a damaged pickle may raise."""


@dataclass(frozen=True)
class TorchFile:
    """The tensors of a `torch.save` file by their plain names, read-only; and the names of the foreign classes and
    functions in it, in their order."""

    tensors: dict[str, np.ndarray]
    foreign: tuple[str, ...]
    entry: str = ""  # of the file's dictionary, where the tensors are; "" for the dictionary itself


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """The tensors of `read_torch_file`."""
    return read_torch_file(path).tensors


def read_torch_file(path: Path, entries: Sequence[str] = NESTED) -> TorchFile:
    """Read the weights from a file that `torch.save` wrote, in its zip format or the one before torch 1.6.

    If the file's dictionary has one of the `entries`, with tensors, the first that it has is read, else the dictionary
    itself. Entries that are no tensors are left out, and so are tensors inside foreign objects. Only the storages that
    are needed are read.

    Raises:
      InputError: there is no such file; it is empty, truncated, a web page, no `torch.save` file; it holds a whole
        module instead of tensors; a tensor is of an unsupported kind or reaches beyond its storage.
    """
    if not path.is_file():
        raise InputError(f"weights {str(path)!r} do not exist; give a file that torch.save wrote")
    with path.open("rb") as file:
        head = file.read(256)
        if head.startswith(b"PK"):
            return _read_zip(path, file, entries)
        if head.startswith(_LEGACY_HEAD):
            return _read_legacy(path, file, entries)
    other = "no torch.save file (neither a zip archive nor the format before torch 1.6); check the path"
    raise InputError(f"weights {str(path)!r} are {mistaken_for(head) or other}")


def _read_zip(path: Path, file: IO[bytes], nested: Sequence[str]) -> TorchFile:
    """The entries: `archive/data.pkl`, `archive/byteorder`, and `archive/data/KEY` for each storage, uncompressed."""
    try:
        archive = zipfile.ZipFile(file)
        entries = {info.filename: info for info in archive.infolist()}
        pickle = next((name for name in entries if name.split("/")[1:] == ["data.pkl"]), None)
        if pickle is None:
            raise InputError(f"weights {str(path)!r} are a zip archive without data.pkl; give a file of torch.save")
        folder = pickle.removesuffix("data.pkl")
        if f"{folder}constants.pkl" in entries:
            raise InputError(f"weights {str(path)!r} are a TorchScript program; load it with torch.jit.load, {RESAVE}")

        def check(info: zipfile.ZipInfo) -> zipfile.ZipInfo:
            """torch.save compresses nothing; what is compressed may grow to any size."""
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > path.stat().st_size:
                raise ValueError(f"{info.filename[:40]!r} is compressed, or larger than the file")
            return info

        if f"{folder}byteorder" in entries and archive.read(check(entries[f"{folder}byteorder"])) != b"little":
            raise InputError(f"weights {str(path)!r} were written by a big-endian machine; {RESAVE}")

        def read(key: str) -> bytes:
            return archive.read(check(entries[f"{folder}data/{key}"]))

        with archive.open(check(entries[pickle])) as opcodes:
            plain = _Plain()
            top = plain.run(opcodes)
        return _torch_file(path, top, read, plain, nested)
    except InputError:
        raise
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, OSError, struct.error, *_DAMAGE) as error:
        raise InputError(f"weights {str(path)!r} are damaged or truncated ({_line(error)}); {AGAIN}") from error


def _read_legacy(path: Path, file: IO[bytes], nested: Sequence[str]) -> TorchFile:
    """Five pickles (a magic number, the version, sizes of the machine, the data, the storages' keys), then for each key
    the number of elements (8 bytes) and the elements."""
    try:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # reads no further than the file is long
        plain = _Plain()
        magic, _, machine, top, keys = (plain.run(mapped) for _ in range(5))
        if magic != _LEGACY_MAGIC:
            raise ValueError("no magic number")
        if not machine["little_endian"]:
            raise InputError(f"weights {str(path)!r} were written by a big-endian machine; {RESAVE}")
        storages, start = {}, mapped.tell()
        for key in keys:
            size = int.from_bytes(mapped[start : start + 8], "little") * plain.storages[key].dtype.itemsize
            storages[key] = memoryview(mapped)[start + 8 : start + 8 + size]
            start += 8 + size
        return _torch_file(path, top, storages.__getitem__, plain, nested)
    except InputError:
        raise
    except _DAMAGE as error:
        raise InputError(f"weights {str(path)!r} are damaged or truncated ({_line(error)}); {AGAIN}") from error


def _torch_file(
    path: Path, top: Any, read: Callable[[str], bytes | memoryview], plain: "_Plain", nested: Sequence[str]
) -> TorchFile:
    tensors, entry = _tensors(path, top, read, nested)
    names = plain_names(tensors)
    return TorchFile({names[name]: array for name, array in tensors.items()}, tuple(plain.foreign), entry)


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


@dataclass(frozen=True)
class _Global:
    """A class or function that the pickle names."""

    name: str


@dataclass(frozen=True)
class _Foreign:
    """A placeholder for the result of calling an unknown class or function."""

    name: str


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    elements: int


@dataclass(frozen=True)
class _Tensor:
    """Offset and stride count elements of the storage."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def array(self, data: bytes | memoryview) -> np.ndarray:
        """A view of `data`; NumPy raises ValueError for one that would reach beyond its end."""
        dtype = self.storage.dtype
        if len(data) < self.storage.elements * dtype.itemsize:
            raise ValueError(f"storage {self.storage.key} has {len(data)} bytes for {self.storage.elements} {dtype}")
        if len(self.stride) != len(self.size) or min((self.offset, *self.size, *self.stride)) < 0:
            raise ValueError(f"size {self.size} with stride {self.stride} and offset {self.offset} is no tensor's")
        if 0 in self.size:
            return np.zeros(self.size, dtype)
        strides = [dtype.itemsize * step for step in self.stride]
        return np.ndarray(self.size, dtype, data, dtype.itemsize * self.offset, strides)


def _tensors(
    path: Path, top: Any, read: Callable[[str], bytes | memoryview], nested: Sequence[str]
) -> tuple[dict[str, np.ndarray], str]:
    """The tensors of the dictionary that holds the weights, each storage read once; and which entry that is."""
    if not isinstance(top, dict):
        found = f"a {top.name} object" if isinstance(top, _Foreign) else f"a {type(top).__name__.strip('_')}"
        raise InputError(f"weights {str(path)!r} hold {found}, not tensors by name; load it with its project, {RESAVE}")
    entry = next((name for name in nested if _holds_tensors(top.get(name))), "")
    inner = top[entry] if entry else top
    data: dict[str, bytes | memoryview] = {}
    out = {}
    for name, value in inner.items():
        if isinstance(value, _Foreign) and value.name.startswith(("torch._utils._rebuild", "torch.storage")):
            raise InputError(
                f"weights {str(path)!r}: {name!r} is made by {value.name}, not a plain tensor; convert it to one "
                f"(contiguous, not quantized or sparse), {RESAVE}"
            )
        if not isinstance(value, _Tensor):
            continue
        key = value.storage.key
        if key not in data:
            data[key] = read(key)
        out[name] = _array(path, name, value, data[key])
    if not out:
        raise InputError(f"weights {str(path)!r} hold no tensors by name; {RESAVE}")
    return out, entry


def _array(path: Path, name: str, tensor: _Tensor, data: bytes | memoryview) -> np.ndarray:
    try:
        array = tensor.array(data)
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"weights {str(path)!r}: tensor {name!r} is damaged ({_line(error)}); {AGAIN}") from error
    if array.nbytes > max(len(data), path.stat().st_size):  # one number, repeated by a stride of 0
        raise InputError(f"weights {str(path)!r}: tensor {name!r} of shape {array.shape} exceeds its file; {AGAIN}")
    array.flags.writeable = False
    return array


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(entry, _Tensor) for entry in value.values())


_MARK = object()
_KNOWN: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": lambda storage, offset, size, stride, *_: _tensor(storage, offset, size, stride),
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch.Size": lambda size: tuple(size),
    "collections.OrderedDict": lambda pairs=(): {key: value for key, value in pairs if isinstance(key, str)},
}


def _tensor(storage: Any, offset: Any, size: Any, stride: Any) -> "_Tensor | _Foreign":
    if isinstance(storage, _Foreign):
        return storage
    if not isinstance(storage, _Storage) or not all(isinstance(x, int) for x in (offset, *size, *stride)):
        raise ValueError("a tensor without storage, size or stride")
    return _Tensor(storage, offset, tuple(size), tuple(stride))


@dataclass
class _Plain:
    """The stack machine that a pickle is written for; it builds plain data and calls nothing that the pickle names.

    Dictionaries keep the entries whose keys are text; attributes of objects are dropped.
    """

    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    storages: dict[str, _Storage] = field(default_factory=dict)
    foreign: dict[str, None] = field(default_factory=dict)  # in the order of the pickle

    def run(self, opcodes: Any) -> Any:
        """The object of the pickle that `opcodes`, a readable file, is at; raises one of `_DAMAGE` if it has none."""
        self.stack, self.memo = [], {}
        for opcode, argument, _ in pickletools.genops(opcodes):
            if opcode.name == "STOP":
                return self.stack.pop()
            self.step(opcode.name, argument)
        raise ValueError("a pickle without an end")

    def step(self, opcode: str, argument: Any) -> None:
        """Run one opcode. The function is long because it lists all of them."""
        stack, pop, push = self.stack, self.stack.pop, self.stack.append
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                push(_MARK)
            case "POP" | "BUILD":  # BUILD would set attributes of the object below
                pop()
            case "POP_MARK":
                self.since_mark()
            case "DUP":
                push(stack[-1])
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                push({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET":
                push({"EMPTY_TUPLE": (), "EMPTY_LIST": [], "EMPTY_DICT": {}, "EMPTY_SET": []}[opcode])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [pop() for _ in range(int(opcode[-1]))]
                push(tuple(reversed(items)))
            case "TUPLE":
                push(tuple(self.since_mark()))
            case "LIST" | "FROZENSET":
                push(self.since_mark())
            case "DICT":
                items = self.since_mark()
                push({})
                self.set_items(items)
            case "APPEND":
                self.extend([pop()])
            case "APPENDS" | "ADDITEMS":
                self.extend(self.since_mark())
            case "SETITEM":
                value, key = pop(), pop()
                self.set_items([key, value])
            case "SETITEMS":
                self.set_items(self.since_mark())
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                push(self.memo[argument])
            case "GLOBAL":
                push(self.named(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                name, module = pop(), pop()
                push(self.named(f"{module}.{name}"))
            case "REDUCE" | "NEWOBJ":
                arguments, called = pop(), pop()
                push(self.made(called, arguments))
            case "NEWOBJ_EX":
                _, arguments, called = pop(), pop(), pop()
                push(self.made(called, arguments))
            case "OBJ":
                called, *arguments = self.since_mark()
                push(self.made(called, arguments))
            case "INST":
                push(self.made(self.named(argument.replace(" ", ".")), self.since_mark()))
            case "BINPERSID":
                push(self.storage(pop()))
            case "EXT1" | "EXT2" | "EXT4" | "PERSID" | "NEXT_BUFFER" | "READONLY_BUFFER":
                raise ValueError(f"opcode {opcode}, which torch.save does not write")
            case _:  # the rest are numbers and strings, each in the opcode's argument
                push(argument)

    def since_mark(self) -> list[Any]:
        items = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def extend(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], dict):
            pairs = zip(items[::2], items[1::2], strict=True)
            self.stack[-1].update({key: value for key, value in pairs if isinstance(key, str)})

    def named(self, name: str) -> _Global:
        if name not in _KNOWN and name not in _DTYPES:
            self.foreign[name] = None
        return _Global(name)

    def made(self, called: Any, arguments: Any) -> Any:
        """The result of calling `called`, if it is one of the few known ones."""
        if isinstance(called, _Global) and called.name in _KNOWN:
            return _KNOWN[called.name](*arguments)
        return _Foreign(called.name if isinstance(called, _Global | _Foreign) else type(called).__name__)

    def storage(self, persistent: Any) -> "_Storage | _Foreign":
        """The storage of `("storage", class, key, device, elements, ...)`."""
        kind, storage_class, key, _, elements, *view = persistent
        if kind != "storage" or not isinstance(key, str) or not isinstance(elements, int) or any(view):
            raise ValueError(f"an unknown kind of storage, {kind!r}")
        if storage_class.name not in _DTYPES:
            return _Foreign(f"torch.storage {storage_class.name}")
        self.storages[key] = _Storage(key, _DTYPES[storage_class.name], elements)
        return self.storages[key]
