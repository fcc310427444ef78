"""Random numbers as a pure function of (seed, epoch, document, stream).

A counter-based generator (the splitmix64 finalizer over the mixed-in words) has no state: any host can draw the numbers
of any document at any time, and a restart draws the same ones.
"""

import numpy as np
from jaxtyping import Float, Int

NUM_RETRIEVED = 0  # the streams: the purpose of a draw
QUERY = 1
NEIGHBOR = 2
MASK = 64  # and above: one stream per position of a document in its group
ORDER = 1 << 20  # and above: one stream per round of the order's network
FEISTEL_ROUNDS = 6


def uniform(
    seed: int,
    epoch: Int[np.ndarray, " n"] | int,
    document: Int[np.ndarray, " n"] | int,
    stream: Int[np.ndarray, " n"] | int,
    count: int = 1,
) -> Float[np.ndarray, "n {count}"]:
    """`count` doubles in [0, 1) per document, from 53 random bits each."""
    document = np.atleast_1d(np.asarray(document)).astype(np.uint64)
    with np.errstate(over="ignore"):
        state = _mix(_state(seed, epoch, stream) ^ document * np.uint64(0xABC98388FB8FAC03))
        counters = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        bits = _mix(state[:, None] + counters[None, :])
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permuted(seed: int, epoch: int, size: int, places: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """The numbers at some places of a permutation of range(size), each found on its own.

    A Feistel network permutes the numbers below a power of four that is at least 256 and `size`. A number that it takes
    past the end goes through again until it is inside, which keeps it a permutation (cycle walking).
    """
    half = np.uint64(max(4, (int(size - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    keys = [_state(seed, epoch, ORDER + number) for number in range(FEISTEL_ROUNDS)]
    found = places.astype(np.uint64)
    outside = np.arange(len(found))
    while len(outside):
        number = found[outside]
        left, right = number >> half, number & low
        for key in keys:
            left, right = right, left ^ (_mix(key ^ right * np.uint64(0xABC98388FB8FAC03)) & low)
        found[outside] = left << half | right
        outside = outside[found[outside] >= size]
    return found.astype(np.int64)


def _state(seed: int, epoch: np.ndarray | int, stream: np.ndarray | int) -> np.ndarray:
    with np.errstate(over="ignore"):
        state = _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF], np.uint64) + np.uint64(0x9E3779B97F4A7C15))
        state = _mix(state ^ (np.atleast_1d(epoch).astype(np.uint64) + np.uint64(0xD1B54A32D192ED03)))
        return _mix(state ^ np.atleast_1d(stream).astype(np.uint64) * np.uint64(0x8CB92BA72F3D8DD7))


def _mix(x: np.ndarray) -> np.ndarray:
    x = x ^ (x >> np.uint64(30))
    x = x * np.uint64(0xBF58476D1CE4E5B9)
    x = x ^ (x >> np.uint64(27))
    x = x * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
