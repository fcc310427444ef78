"""Which true pictures judge a question, and whose is nearest, by hand."""

import numpy as np
import pytest

from rac3.evaluation.gallery import UNDECIDED, nearest, standing

OF = np.array([0, 0, 0, 0, 1, 1, 2])
PICTURES = [b"a0", b"a1", b"a2", b"a3", b"b0", b"b1", b"c0"]


def test_the_first_pictures_that_are_not_hidden_stand():
    hidden = [set(), {b"a1"}, {b"a0", b"a2", b"a3", b"b0"}, {b"c0", b"other"}]
    assert standing(OF, PICTURES, hidden, 2).astype(int).tolist() == [
        [1, 1, 0, 0, 1, 1, 1],
        [1, 0, 1, 0, 1, 1, 1],
        [0, 1, 0, 0, 0, 1, 1],
        [1, 1, 0, 0, 1, 1, 0],
    ]
    assert standing(OF, PICTURES, hidden[:1], 3).astype(int).tolist() == [[1, 1, 1, 0, 1, 1, 1]]


def test_a_picture_under_two_keys_is_hidden_twice():
    assert standing(np.array([0, 0, 1]), [b"a", b"a", b"b"], [{b"a"}], 4).tolist() == [[False, False, True]]


def test_nothing_stands_where_nothing_is_shown():
    assert standing(np.zeros(0, int), [], [set()], 4).shape == (1, 0)


def at(*degrees: float) -> np.ndarray:
    """Vectors of norm 1: the nearest is that of the nearest angle."""
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


@pytest.mark.parametrize(
    ("angle", "standing", "entity"),
    [
        (12, [1, 1, 1, 1], 0),
        (49, [1, 1, 1, 1], 1),
        (49, [1, 0, 1, 1], 2),  # 10 and 70 are left of the first two: 70 is nearer
        (49, [1, 0, 0, 0], 0),
        (25, [1, 1, 1, 1], UNDECIDED),  # 10 and 40 are as near
        (25, [1, 0, 1, 1], 0),
        (75, [1, 1, 1, 1], 2),  # 70 and 80 are as near, and of one entity
        (75, [0, 0, 0, 0], UNDECIDED),
    ],
)
def test_the_nearest_picture_that_stands_tells(angle: float, standing: list[int], entity: int):
    found = nearest(at(angle), at(10, 40, 70, 80), np.array([0, 1, 2, 2]), np.array([standing], bool))
    assert found.tolist() == [entity]


def test_each_picture_has_its_own_judges():
    stand = np.array([[1, 0], [0, 1], [1, 1]], bool)
    assert nearest(at(10, 10, 10), at(10, 40), np.array([0, 1]), stand).tolist() == [0, 1, 0]
