"""A grammar as tables over its places: what the engine looks up for each id, and how samples are read off the ids.

    grammar: Draw text, at most 3, until <eoi> | Given <mask:1> | Draw 2 image codes, the first at offset 2
    place  :   0    1    2     3         4      5   6
    forced :   -    -    -   <eoi>   <mask:1>   -   -
    stop   : <eoi> <eoi> <eoi>   -       -      -   -
    jump   :   4    4    4     -         -      -   -
    offset :   1    2    3     0         0      2   3

A row begins at place 0. An id that is the stop of its place leads to `jump`, any other id to the next place; after the
last place the row has ended. Place 3 is reached only if the text has all of its 3 ids.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from rac3.generation.request import Draw, Given, Sample


class Table(NamedTuple):
    """What is true at each place.

    Attributes:
      forced: the id that must come; -1 if it is drawn.
      run: the run that the place belongs to.
      stop: the id that ends the run; -1 is none.
      jump: the place after the run.
      offset: of the id in its text or image.
    """

    forced: Int[np.ndarray, " places"]
    run: Int[np.ndarray, " places"]
    stop: Int[np.ndarray, " places"]
    jump: Int[np.ndarray, " places"]
    offset: Int[np.ndarray, " places"]


def longest(grammar: Sequence[Draw | Given]) -> int:
    """The number of ids of the longest output, which is the number of places."""
    return sum(_places(run, number == len(grammar) - 1) for number, run in enumerate(grammar))


def _places(run: Draw | Given, last: bool) -> int:
    if isinstance(run, Given):
        return len(run.ids)
    return run.count + (run.stop >= 0 and not last)


def tabulate(grammar: Sequence[Draw | Given]) -> Table:
    """The tables of a grammar."""
    columns: list[np.ndarray] = []
    end = 0
    for number, run in enumerate(grammar):
        places = _places(run, number == len(grammar) - 1)
        end += places
        if isinstance(run, Given):
            forced, offset, stop = run.ids, run.offsets, np.full(places, -1)
        else:
            inside = np.arange(places) < run.count
            forced = np.where(inside, -1, run.stop)
            offset = np.where(inside, run.offset + np.arange(places), 0)
            stop = np.where(inside, run.stop, -1)
        columns.append(np.array([forced, np.full(places, number), stop, np.full(places, end), offset], np.int32))
    return Table(*np.concatenate([np.zeros((5, 0), np.int32), *columns], axis=1))


def allowed_ids(run: Draw | Given, size: int) -> Bool[np.ndarray, " vocab"]:
    """True at the ids that may come in a run, its stop included."""
    if isinstance(run, Given):
        return np.ones(size, bool)
    allowed = run.allowed.copy()
    if run.stop >= 0:
        allowed[run.stop] = True
    return allowed


def parse(
    grammar: Sequence[Draw | Given], table: Table, ids: Int[np.ndarray, " n"], log_probs: Float[np.ndarray, " n"]
) -> Sample:
    """The runs of a sample, which may be partial.

    Args:
      log_probs: of `ids`; those of given ids have no meaning.
    """
    drawn: list[list[int]] = [[] for _ in grammar]
    scores: list[list[float]] = [[] for _ in grammar]
    place = 0
    for id, log_prob in zip(ids.tolist(), log_probs.tolist(), strict=True):
        run = table.run[place]
        stopped = id == table.stop[place]
        if table.forced[place] < 0:
            scores[run].append(log_prob)
            if not stopped:
                drawn[run].append(id)
        place = int(table.jump[place]) if stopped else place + 1
    of_draws = [number for number, run in enumerate(grammar) if isinstance(run, Draw)]
    return Sample(
        [np.array(drawn[number], np.int32) for number in of_draws],
        [np.array(scores[number], np.float32) for number in of_draws],
    )
