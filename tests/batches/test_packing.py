"""Packing groups into rows: every group once, none split, little padding; and the fields of a row."""

import time

import numpy as np
import pytest

from rac3.batches.packing import Group, pack, packed_row


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("max_groups", [0, 1, 3])
def test_every_group_lands_in_exactly_one_row_that_holds_it(seed: int, max_groups: int):
    lengths = np.random.default_rng(seed).integers(1, 101, 700)
    rows = pack(lengths, 100, max_groups=max_groups)
    assert sorted(group for row in rows for group in row) == list(range(700))
    assert all(0 < lengths[row].sum() <= 100 for row in rows)
    assert max(map(len, rows)) <= (max_groups or 700)
    assert rows == pack(lengths, 100, max_groups=max_groups)


def test_best_fit_is_that_of_a_plain_search():
    """The oracle looks at all rows for each group."""
    rng = np.random.default_rng(0)
    for low, high in ((1, 101), (20, 90), (30, 40)):
        lengths = rng.integers(low, high, 2000)
        rows: list[list[int]] = []
        room: list[int] = []
        for group, length in enumerate(lengths.tolist()):
            holding = [(left, row) for row, left in enumerate(room) if left >= length]
            if not holding:
                rows.append([])
                room.append(100)
                holding = [(100, len(rows) - 1)]
            _, row = min(holding)
            rows[row].append(group)
            room[row] -= length
        assert pack(lengths, 100) == rows


def test_a_number_of_rows_holds_the_first_groups():
    """As many as fit by best fit: with one more, all rows are as they were, and there is one more row."""
    lengths = np.random.default_rng(0).integers(5, 60, 2000)
    rows = pack(lengths, 100, max_rows=40)
    held = sum(map(len, rows))
    assert len(rows) == 40
    assert sorted(group for row in rows for group in row) == list(range(held))
    assert rows == pack(lengths[:held], 100)
    assert pack(lengths[: held + 1], 100) == [*rows, [held]]
    assert pack(lengths[:10], 100, max_rows=40) == pack(lengths[:10], 100)


@pytest.mark.parametrize(
    ("row_length", "documents", "least"), [(4096, 3, 0.74), (16_384, 15, 0.96), (32_768, 30, 0.96)]
)
def test_the_share_of_real_tokens_at_the_papers_size(row_length: int, documents: int, least: float):
    """1,024 rows of groups of up to three documents of 1,024 image ids and a caption of 30, with K in {0, 1, 2}.

    Only so many documents of 1,061 fit into a row: 3 fill 78% of 4,096, and 15 fill 97% of 16,384.
    """
    rng = np.random.default_rng(0)
    sizes = 1024 + 4 + rng.poisson(30, (20_000, 3)) + 3 * rng.poisson(1, (20_000, 3))
    lengths = (sizes * (np.arange(3) <= rng.integers(0, 3, (20_000, 1)))).sum(1)
    rows = pack(lengths, row_length, max_rows=1024)
    assert len(rows) == 1024
    share = sum(lengths[row].sum() for row in rows) / (1024 * row_length)
    assert least < share < 1.01 * documents * 1061 / row_length


def test_a_million_groups_are_packed_in_seconds():
    lengths = 1061 * np.random.default_rng(0).integers(1, 4, 1_000_000)
    started = time.process_time()
    pack(lengths, 16_384)
    assert time.process_time() - started < 10  # measured: 1


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
