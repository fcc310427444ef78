"""Loading config files, the canonical form and fingerprint of a config, and the error that bad input raises."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import math
import reprlib
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

QUOTED = 80  # characters of a value in a message
CONFIG_MODULE = "rac3_config_"  # prefix of the module names of config files


class InputError(ValueError):
    """Bad user input. The message is one line: the value, the limit and the fix. The command exits with code 2."""


def quoted(value: Any) -> str:
    """A value of someone else's file for a message: at most `QUOTED` characters, whatever it is, in bounded time."""
    brief = reprlib.Repr()
    brief.maxlevel, brief.maxdict, brief.maxlist = 2, 3, 4
    brief.maxstring = brief.maxlong = brief.maxother = QUOTED
    text = brief.repr(value)
    return text if len(text) <= QUOTED else f"{text[: QUOTED - 3]}..."


def check_settings(value: Any, name: str = "") -> None:
    """Refuses what no setting may be, in a config and in all that it holds.

    NaN and infinity, numbers of more than 64 bits, negative seeds, a class in place of an object of it, and a value of
    another type than that of its field.

    Raises:
      InputError: names the setting.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{name}={value} is not a finite number; give one")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise InputError(f"{name}={_short(value)} needs more than 64 bits; use a smaller number")
    if isinstance(value, int) and value < 0 and name.rpartition(".")[2] == "seed":
        raise InputError(f"{name}={value} is negative; use 0 or more")
    if isinstance(value, type):
        raise InputError(f"{name} is the class {value.__name__}; give an object of it: {value.__name__}(...)")
    parts: Iterable[tuple[Any, Any]] = ()
    if dataclasses.is_dataclass(value):
        parts = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
        _check_types(type(value), dict(parts), f"{name}." if name else "")
    elif isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    for part, each in parts:
        check_settings(each, f"{name}.{part}" if name else str(part))


def _check_types(config: type, values: Mapping[str, Any], prefix: str) -> None:
    try:
        wanted = typing.get_type_hints(config)
    except (NameError, TypeError):  # of a class defined in a function, say
        return
    for name, value in values.items():
        if not isinstance(value, type) and not _fits(value, wanted[name]):
            kind = getattr(wanted[name], "__name__", str(wanted[name]))
            raise InputError(f"{prefix}{name}={_short(value)} is no {kind}; give one")


def _fits(value: Any, wanted: Any) -> bool:
    """Whether a value has the type of its field. Of protocols only the names of the members are compared."""
    kind, parts = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted is Any or isinstance(wanted, typing.TypeVar):
        return True
    if kind is typing.Annotated:
        return _fits(value, parts[0])
    if kind in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in parts)
    if kind is Literal:
        return value in parts
    if kind is not None and issubclass(kind, Mapping):
        return isinstance(value, Mapping) and all(isinstance(x, type) or _fits(x, parts[1]) for x in value.values())
    if kind is tuple:
        return isinstance(value, tuple | list)
    if wanted in (int, float):
        return isinstance(value, int if wanted is int else int | float) and not isinstance(value, bool)
    if getattr(wanted, "_is_protocol", False):
        members = [name for name in vars(wanted) if not name.startswith("_")]
        fields = getattr(value, "__dataclass_fields__", {})
        return all(hasattr(type(value), name) or name in fields for name in members)  # no property is called
    return isinstance(value, kind or wanted) if isinstance(kind or wanted, type) else True


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def canonical(value: Any) -> Any:
    """`value` as plain JSON data, the same for equal configs. A dataclass becomes its class name and fields.

    Raises:
      InputError: a value has no canonical form (a function, an open file).
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: canonical(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": type(value).__qualname__, **fields}
    if isinstance(value, Mapping):
        return {str(k): canonical(v) for k, v in sorted(value.items())}
    if isinstance(value, list | tuple):
        return [canonical(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)  # 1 and 1.0 are equal values
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise InputError(
        f"a config holds plain data only, not {type(value).__name__}: {_short(value)}; make it a dataclass"
    )


def fingerprint(value: Any) -> str:
    """12 hex digits of a hash of the canonical form of `value`."""
    text = json.dumps(canonical(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:12]  # paths in an ASCII locale


def to_plain(value: Any) -> Any:
    """A config as JSON data that `from_plain` reads back. A dataclass is its class's full name and its fields.

    Raises:
      InputError: for a value that is no plain data (a function, an open file).
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        fields = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": f"{kind.__module__}.{kind.__qualname__}", **fields}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise InputError(
        f"a config holds plain data only, not {type(value).__name__}: {_short(value)}; make it a dataclass"
    )


def from_plain(value: Any, module: ModuleType | None = None) -> Any:
    """The config that `to_plain` wrote; its sequences are tuples.

    Classes are those of rac3, and with `module`, a config that was imported, its own and those that it has imported.
    No other module is imported, whatever the data says.

    Raises:
      KeyError: a class that is none of these.
      InputError, TypeError: the fields are not those of the class.
    """
    if isinstance(value, dict):
        fields = {name: from_plain(each, module) for name, each in value.items() if name != "class"}
        name = value.get("class")
        if isinstance(name, str):
            return _config_class(name, module)(**fields)
        return fields | ({"class": from_plain(name, module)} if "class" in value else {})
    return tuple(from_plain(each, module) for each in value) if isinstance(value, list) else value


def _config_class(name: str, module: ModuleType | None) -> Any:
    where, _, own = name.rpartition(".")
    if where.startswith("rac3."):
        with contextlib.suppress(ImportError):
            importlib.import_module(where)
    elif module is None:
        raise KeyError(name)
    source = module if where.startswith(CONFIG_MODULE) else sys.modules.get(where)
    found = getattr(source, own, None)
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise KeyError(name)
    return found


def shipped_configs() -> dict[str, Path]:
    """The configs that ship in the package, by name."""
    spec = importlib.util.find_spec("rac3.configs")
    folders = list(spec.submodule_search_locations or []) if spec else []
    return {path.stem: path for folder in folders for path in sorted(Path(folder).glob("[!_]*.py"))}


def load_config_module(name_or_path: str) -> ModuleType:
    """Import a config: a path to a Python file, or the name of one that ships with rac3.

    Raises:
      InputError: no such file or name, the file fails to import, or it has no `get_config`.
    """
    path = Path(name_or_path)
    if path.suffix != ".py":
        shipped = shipped_configs()
        if name_or_path not in shipped:
            raise InputError(
                f"config {name_or_path!r} is neither a .py file nor a shipped config; use one of: {', '.join(shipped)}"
            )
        path = shipped[name_or_path]
    if not path.is_file():
        raise InputError(f"config {name_or_path!r} does not exist; give a path to a .py file with get_config()")
    spec = importlib.util.spec_from_file_location(f"{CONFIG_MODULE}{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"config {name_or_path!r} is not a Python file; give a .py file with get_config()")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module while they are defined
    try:
        spec.loader.exec_module(module)
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # a config is not to end the command
        reason = " ".join(str(error).split())
        raise InputError(f"config {name_or_path!r} fails to import: {type(error).__name__}: {reason}") from error
    if not callable(getattr(module, "get_config", None)):
        raise InputError(f"config {name_or_path!r} has no get_config(); define one that returns an Experiment")
    return module
