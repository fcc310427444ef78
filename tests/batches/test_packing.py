"""Packing groups into rows: every group once, none split, little padding; and the fields of a row."""

import numpy as np
import pytest

from rac3.batches.packing import Group, pack, packed_row


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("open_rows", [1, 3, 64])
def test_every_group_lands_in_exactly_one_row_that_holds_it(seed: int, open_rows: int):
    lengths = np.random.default_rng(seed).integers(1, 101, 700)
    rows = pack(lengths, 100, open_rows)
    assert sorted(group for row in rows for group in row) == list(range(700))
    assert all(0 < lengths[row].sum() <= 100 for row in rows)
    assert rows == pack(lengths, 100, open_rows)


def test_rows_fill_well():
    """Groups of one to three documents of 1,100 tokens in rows of 16,384; next fit wastes most of one per row."""
    rng = np.random.default_rng(0)
    lengths = 1100 * rng.integers(1, 4, 4000) + rng.integers(-60, 60, 4000)
    in_order = 1
    room = 16_384
    for length in lengths:
        if length > room:
            in_order, room = in_order + 1, 16_384
        room -= length
    rows = pack(lengths, 16_384)
    fill = lengths.sum() / (len(rows) * 16_384)
    assert len(rows) < in_order
    assert fill > 0.95  # 14 documents of 1,100 fill 94%


def test_best_fit_chooses_the_row_with_least_room_left():
    #  row 0: 60, row 1: 70, row 2: 80; 20 fits all and goes where it fits exactly; 30 then fits rows 0 and 1
    assert pack(np.array([60, 70, 80, 20, 30, 40, 100]), 100) == [[0, 5], [1, 4], [2, 3], [6]]


def test_edges():
    assert pack(np.zeros(0, np.int64), 10) == []
    assert pack(np.array([10, 10]), 10) == [[0], [1]]
    with pytest.raises(ValueError, match="a group of 11 tokens exceeds the row length of 10; use"):
        pack(np.array([3, 11]), 10)


def group(rng: np.random.Generator, size: int) -> Group:
    ids = rng.integers(1, 50, (4, size)).astype(np.int32)
    return Group(ids[0], ids[1], ids[2], rng.random(size).astype(np.float32), ids[3] % 6)


def test_a_row_holds_its_groups_side_by_side():
    rng = np.random.default_rng(0)
    groups = [group(rng, size) for size in (4, 1, 6)]
    row = packed_row(groups, 16)
    start = 0
    for number, each in enumerate(groups, 1):
        place = slice(start, start + len(each.tokens))
        for name in ("tokens", "targets", "offsets", "loss_weight", "kind"):
            np.testing.assert_array_equal(getattr(row, name)[place], getattr(each, name))
        assert (row.segments[place] == number).all()
        np.testing.assert_array_equal(row.positions[place], np.arange(len(each.tokens)))
        start = place.stop
    for name in ("tokens", "targets", "segments", "positions", "offsets", "loss_weight", "kind"):
        field = getattr(row, name)
        assert field.shape == (16,)
        assert field.dtype == (np.float32 if name == "loss_weight" else np.int32)
        assert not field[start:].any()


def test_a_row_may_be_exactly_full():
    assert packed_row([group(np.random.default_rng(0), 5)], 5).segments.tolist() == [1] * 5
