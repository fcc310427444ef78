"""Random damage to bytes, and odd values in the place of others: all drawn from a `random.Random`."""

import random
from typing import Any

NUMBERS = (0, -1, 1, 127, 255, 2**16, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, -(10**30), 1e-320, 1e308, 0.5)
TEXTS = (
    "",
    "a" * 5000,
    "\x00",
    "\ud800",
    "../../../etc/passwd",
    "/",
    "nan",
    "1e999",
    "草原",
    "\ufeff",
    "\u202e",
    "%s{}",
    "-1",
)
VALUES = (None, True, False, [], {}, [[]], float("nan"), float("inf"), -float("inf"), *NUMBERS, *TEXTS)
"""Odd values for a setting, a field of metadata, an entry of a header."""

DEEP = 100_000  # levels of nesting


def changed_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to four of `BYTE_CHANGES`."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice(BYTE_CHANGES)(data, rng)
    return data


def _flipped(data: bytes, rng: random.Random) -> bytes:
    return _with(data, rng, lambda old: bytes([old[0] ^ (1 << rng.randrange(8))]), 1)


def _with(data: bytes, rng: random.Random, new: Any, size: int) -> bytes:
    if not data:
        return bytes([rng.randrange(256)])
    place = rng.randrange(len(data))
    return data[:place] + new(data[place : place + size]) + data[place + size :]


BYTE_CHANGES = (
    _flipped,
    _flipped,
    lambda data, rng: _with(data, rng, lambda old: rng.randbytes(1), 1),
    lambda data, rng: data[: rng.randrange(len(data) + 1)],
    lambda data, rng: _with(data, rng, lambda old: b"", rng.choice((1, 4, 100))),
    lambda data, rng: _with(data, rng, lambda old: old * rng.choice((2, 50)), rng.choice((1, 8, 600))),
    lambda data, rng: _with(
        data, rng, lambda old: rng.choice((b"\0", b"\xff", b" ", b"9")) * len(old), rng.choice((4, 64))
    ),
    lambda data, rng: _with(data, rng, lambda old: rng.choice((b"\xff\xff\xff\x7f", b"\xff" * 8, b"\0" * 8)), 4),
    lambda data, rng: _with(data, rng, lambda old: rng.randbytes(len(old)), 32),
)


def changed_value(value: Any, rng: random.Random, deep: int = DEEP) -> Any:
    """JSON with one of its values replaced by an odd one, moved, deleted, repeated, or buried in lists."""
    if isinstance(value, dict | list) and value and rng.random() < 0.9:
        return _changed_inside(value, rng, deep)
    if rng.random() < 0.05:
        for _ in range(rng.choice((10, deep))):
            value = [value]
        return value
    if isinstance(value, int | float) and rng.random() < 0.3:
        return rng.choice((value + 1, -value, value * 1000, str(value), [value]))
    return rng.choice(VALUES)


def _changed_inside(value: dict[str, Any] | list[Any], rng: random.Random, deep: int) -> Any:
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = rng.choice(keys)
    new: Any = dict(value) if isinstance(value, dict) else list(value)
    kind = rng.random()
    if kind < 0.1:
        del new[key]
    elif kind < 0.2 and isinstance(new, dict):
        new[rng.choice(TEXTS)] = new.pop(key)
    elif kind < 0.2:
        new.insert(key, new[rng.choice(keys)])
    elif kind < 0.3:
        new[key] = new[rng.choice(keys)]
    else:
        new[key] = changed_value(new[key], rng, deep)
    return new
