"""The tables of grammars, worked out by hand, and samples read off ids."""

import numpy as np
import pytest

from rac3.generation.grammar import allowed_ids, longest, parse, tabulate
from rac3.generation.request import Draw, Given, Sample

LETTERS = np.arange(10) < 4
STOP, MASK = 5, 9
# At most 3 letters until the stop, a mask, and two codes, the first at offset 2.
INFILL = [
    Draw(LETTERS, 3, STOP),
    Given(np.array([MASK], np.int32), np.zeros(1, np.int32)),
    Draw(~LETTERS, 2, offset=2),
]


def test_the_tables_are_those_that_are_drawn():
    table = tabulate(INFILL)
    assert table.forced.tolist() == [-1, -1, -1, STOP, MASK, -1, -1]
    assert table.run.tolist() == [0, 0, 0, 0, 1, 2, 2]
    assert table.stop.tolist() == [STOP, STOP, STOP, -1, -1, -1, -1]
    assert table.jump.tolist() == [4, 4, 4, 4, 5, 7, 7]
    assert table.offset.tolist() == [1, 2, 3, 0, 0, 2, 3]


def test_a_text_at_the_end_needs_no_stop():
    table = tabulate([Given(np.array([7, 8]), np.array([4, 0])), Draw(LETTERS, 2, STOP)])
    assert table.forced.tolist() == [7, 8, -1, -1]
    assert table.offset.tolist() == [4, 0, 1, 2]
    assert table.jump.tolist() == [2, 2, 4, 4]
    assert [column.shape for column in tabulate([])] == [(0,)] * 5


def test_the_stop_is_allowed_besides():
    assert np.flatnonzero(allowed_ids(INFILL[0], 10)).tolist() == [0, 1, 2, 3, STOP]
    assert np.flatnonzero(allowed_ids(INFILL[2], 10)).tolist() == [4, 5, 6, 7, 8, 9]
    assert allowed_ids(INFILL[1], 10).all()
    assert not LETTERS[STOP]


def runs_of(sample: Sample) -> list[tuple[list[int], list[float]]]:
    return [(ids.tolist(), terms.tolist()) for ids, terms in zip(*sample, strict=True)]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([1, STOP, MASK, 6, 7], [([1], [-0.0, -1.0]), ([6, 7], [-3.0, -4.0])]),
        ([STOP, MASK, 6, 7], [([], [-0.0]), ([6, 7], [-2.0, -3.0])]),
        ([1, 2, 3, STOP, MASK, 6, 7], [([1, 2, 3], [-0.0, -1.0, -2.0]), ([6, 7], [-5.0, -6.0])]),
        ([1, 2], [([1, 2], [-0.0, -1.0]), ([], [])]),
        ([1, STOP, MASK, STOP], [([1], [-0.0, -1.0]), ([STOP], [-3.0])]),  # no stop of the last run
        ([], [([], []), ([], [])]),
    ],
)
def test_samples_are_read_off_ids(ids: list[int], expected: list[tuple[list[int], list[float]]]):
    """The log probability of id i is -i. Stops that were drawn count, forced ones and given ids do not."""
    sample = parse(INFILL, tabulate(INFILL), np.array(ids, np.int32), -np.arange(len(ids), dtype=np.float32))
    assert runs_of(sample) == expected


def test_the_longest_output_has_every_stop_but_the_last():
    assert longest(INFILL) == 3 + 1 + 1 + 2
    assert longest([*INFILL, Draw(LETTERS, 4, STOP)]) == 7 + 4
    assert longest([]) == 0
