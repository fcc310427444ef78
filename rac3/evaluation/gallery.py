"""Which entity a picture shows, by the true pictures of all entities: that of the picture most similar to it."""

from collections.abc import Collection, Hashable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from rac3.evaluation.recall import TIE

UNDECIDED = -1  # no picture stands for any entity, or those of two entities are as similar


def standing(
    of: Int[np.ndarray, " shown"], pictures: Sequence[Hashable], hidden: Sequence[Collection[Hashable]], most: int
) -> Bool[np.ndarray, "questions shown"]:
    """Which pictures of a gallery stand for their entities at each question: the first that are not hidden from it.

    of                      0 0 0 0 1 1
    hidden from a question  . x . . . .
    stand, most = 2         1   1   1 1

    Args:
      of: the number of each picture's entity, ascending from 0 without gaps.
      pictures: what tells them apart.
      hidden: from each question; pictures that are not in the gallery too.
      most: pictures of each entity.
    """
    starts = np.searchsorted(of, np.arange(of.max(initial=-1) + 1))
    stand = np.zeros((len(hidden), len(of)), bool)
    for row, each in enumerate(hidden):
        left = np.array([picture not in each for picture in pictures], bool)
        counts = np.cumsum(left)
        before = np.concatenate([[0], counts])[starts][of]  # of other entities
        stand[row] = left & (counts - before <= most)
    return stand


def nearest(
    pictures: Float[np.ndarray, "pictures width"],
    gallery: Float[np.ndarray, "shown width"],
    of: Int[np.ndarray, " shown"],
    stand: Bool[np.ndarray, "pictures shown"],
) -> Int[np.ndarray, " pictures"]:
    """The number of the entity that each picture shows, or `UNDECIDED`: an encoder that gives all pictures the same
    vector tells nothing.

    Args:
      pictures, gallery: vectors of L2 norm 1.
      of: the number of the entity of each of the gallery's pictures.
      stand: those that a picture is compared with.
    """
    similarities = np.where(stand, pictures @ gallery.T, -np.inf)
    best = of[similarities.argmax(1)]
    highest = similarities.max(1)
    others = np.max(similarities, axis=1, where=of != best[:, None], initial=-np.inf)
    return np.where(others < highest - TIE, best, UNDECIDED)
