"""Jitted functions over many rows, in batches of few shapes; threads prepare batches ahead of the devices."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, PyTree

from rac3.config import InputError

T = TypeVar("T")
R = TypeVar("R")
AHEAD = 2  # batches prepared while the devices work on one
FEW = 8  # rows per device that are not worth a program: one at a time costs about as much


class DeviceBatches:
    """Runs functions over rows on all of this process's devices.

        threads:  prepare 0 | prepare 1 | prepare 2 | ...
        devices:            | apply 0   | apply 1   | ...

    A batch has `size` rows, rounded up to a multiple of the device count; a smaller last batch is padded to a power of
    two per device. A few rows in all run one per device at a time. So each jitted function compiles for only a few
    shapes, for any number of rows, and for one shape however few they are.

    Raises:
      InputError: `size` is below 1.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise InputError(f"encoder batch_size={size} is below 1; use at least 1, and hundreds for speed")
        devices = jax.local_devices()
        mesh = Mesh(np.array(devices), ("batch",), axis_types=(AxisType.Auto,))
        self.devices = len(devices)
        self.size = -(-size // self.devices) * self.devices
        self.by_row = NamedSharding(mesh, PartitionSpec("batch"))
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self._applying = Lock()
        self._rows = ThreadPoolExecutor(min(32, os.cpu_count() or 1), "prepare-row")

    def each(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Map `function` over the items in threads: for work that releases the GIL, such as decoding and resizing."""
        return list(self._rows.map(function, items))

    def run(
        self,
        rows: Int[np.ndarray, " total"],
        prepare: Callable[[Int[np.ndarray, " batch"]], PyTree],
        apply: Callable[[PyTree], Array],
    ) -> Iterator[np.ndarray]:
        """Yield the results of `apply` for each batch, in the order of `rows`, without padding.

        Args:
          rows: row numbers, split into batches in this order.
          prepare: row numbers -> arrays with that many rows. Runs in another thread.
          apply: these arrays, padded and sharded by row -> an array with as many rows. Must not wait for its result.
        """
        running: tuple[Array, int] | None = None
        for arrays, count in self._prepared(rows, prepare):
            with self._applying:  # of threads with the same new shape, only the first compiles it
                started = apply(arrays), count
            if running is not None:
                yield _take(*running)
            running = started
        if running is not None:
            yield _take(*running)

    def _prepared(self, rows: np.ndarray, prepare: Callable[[np.ndarray], PyTree]) -> Iterator[tuple[PyTree, int]]:
        """Yield the batches, on the devices, and how many of their rows are not padding."""
        waiting: deque[Future[tuple[PyTree, int]]] = deque()
        size = self.devices if len(rows) <= FEW * self.devices else self.size
        with ThreadPoolExecutor(1, "prepare-batch") as thread:
            for start in range(0, len(rows), size):
                waiting.append(thread.submit(self._put, rows[start : start + size], prepare))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _put(self, rows: np.ndarray, prepare: Callable[[np.ndarray], PyTree]) -> tuple[PyTree, int]:
        count = len(rows)
        padded = min(self.size, self.devices * power_of_two(-(-count // self.devices)))
        repeat = np.minimum(np.arange(padded), count - 1)
        arrays = jax.tree.map(lambda x: x[repeat] if padded > count else x, prepare(rows))
        return jax.device_put(arrays, self.by_row), count


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def _take(result: Array, count: int) -> np.ndarray:
    return np.asarray(result)[:count]
