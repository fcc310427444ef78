"""Batches over all devices: order, padding, shapes, and preparation ahead of the devices."""

import threading

import jax
import numpy as np
import pytest

from rac3.config import InputError
from rac3.devices.batches import DeviceBatches, power_of_two


def run(batches: DeviceBatches, rows: np.ndarray, apply=lambda arrays: arrays[0] * 2) -> list[np.ndarray]:
    return list(batches.run(rows, lambda some: (some.astype(np.float32), some[:, None]), apply))


@pytest.mark.parametrize("total", [0, 1, 7, 8, 9, 37, 64, 65, 80, 101])
def test_every_row_once_in_order(total):
    """Up to eight for each of the devices, one by one."""
    rows = np.random.default_rng(0).permutation(total)
    parts = run(DeviceBatches(16), rows)
    size = 8 if total <= 64 else 16
    assert [len(part) for part in parts] == [min(size, total - start) for start in range(0, total, size)]
    np.testing.assert_array_equal(np.concatenate([np.zeros(0), *parts]), rows * 2)


def test_few_shapes_over_all_devices():
    shapes = set()

    def apply(arrays):
        numbers, column = arrays
        assert len(numbers.sharding.device_set) == jax.local_device_count() == 8
        assert numbers.sharding.shard_shape(numbers.shape) == (len(numbers) // 8,)
        shapes.add((numbers.shape, column.shape))
        return numbers

    batches = DeviceBatches(30)  # rounded up to 32
    for total in range(1, 65):
        run(batches, np.arange(total), apply)
    assert shapes == {((8,), (8, 1))}
    for total in range(65, 101):
        run(batches, np.arange(total), apply)
    assert shapes == {((size,), (size, 1)) for size in (8, 16, 32)}


def test_rows_are_prepared_ahead_by_another_thread():
    started, main = [], threading.current_thread()

    def prepare(rows):
        assert threading.current_thread() is not main
        started.append(rows[0])
        return rows

    results = DeviceBatches(8).run(np.arange(80), prepare, lambda rows: rows)
    next(results)
    next(results)
    assert len(started) < 10  # not all of them, which would not fit into memory
    np.testing.assert_array_equal(np.concatenate(list(results)), np.arange(16, 80))
    assert started == list(range(0, 80, 8))


def test_an_error_of_preparing_is_raised():
    def prepare(rows):
        if 20 in rows:
            raise ValueError("row 20")
        return rows

    with pytest.raises(ValueError, match="row 20"):
        list(DeviceBatches(8).run(np.arange(80), prepare, lambda rows: rows))


def test_each_keeps_the_order():
    assert DeviceBatches(1).each(lambda x: x * x, range(100)) == [x * x for x in range(100)]


def test_power_of_two():
    assert [power_of_two(n) for n in (1, 2, 3, 4, 5, 1023)] == [1, 2, 4, 4, 8, 1024]


def test_bad_size():
    with pytest.raises(InputError, match="batch_size=0"):
        DeviceBatches(0)
