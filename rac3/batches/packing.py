"""Packing: which row each group goes into, and the arrays of a packed batch.

group: <eod> retrieved <eod> retrieved <eod> main <eod>      (the last id is a target only)
row  : group 1 | group 2 | ... | padding
"""

from bisect import bisect_left, insort
from dataclasses import fields
from typing import NamedTuple, no_type_check

import flax.struct
import numpy as np
from jaxtyping import Array, Float, Int

# The kind of a target, by which the loss is reported. Markup and <eoi> are trained on, but not reported.
IGNORED, MAIN_TEXT, MAIN_IMAGE, RETRIEVED_TEXT, RETRIEVED_IMAGE, MARKUP = range(6)
KIND_NAMES = {1: "main/text", 2: "main/image", 3: "retrieved/text", 4: "retrieved/image"}


@no_type_check  # of the constructor: JAX rebuilds pytrees with leaves of any type
class PackedBatch(flax.struct.PyTreeNode):
    """Rows of packed groups; all fields are aligned. A single row has no `rows` axis.

    Attributes:
      tokens: input ids.
      targets: the id after each token; 0 at padding.
      segments: the number of the token's group in its row, from 1; 0 at padding.
      positions: the token's position in its group, from 0.
      offsets: 1 + the token's position in its text or image; 0 at markup.
      loss_weight: of the target: 1 in main documents, alpha in retrieved ones, 0 for sentinels and padding.
      kind: of the target, see `KIND_NAMES`.
    """

    tokens: Int[Array | np.ndarray, "*rows seq"]
    targets: Int[Array | np.ndarray, "*rows seq"]
    segments: Int[Array | np.ndarray, "*rows seq"]
    positions: Int[Array | np.ndarray, "*rows seq"]
    offsets: Int[Array | np.ndarray, "*rows seq"]
    loss_weight: Float[Array | np.ndarray, "*rows seq"]
    kind: Int[Array | np.ndarray, "*rows seq"]


FIELDS = tuple(field.name for field in fields(PackedBatch))


class Group(NamedTuple):
    """One main document after its retrieved ones; arrays over the input positions."""

    tokens: Int[np.ndarray, " seq"]
    targets: Int[np.ndarray, " seq"]
    offsets: Int[np.ndarray, " seq"]
    loss_weight: Float[np.ndarray, " seq"]
    kind: Int[np.ndarray, " seq"]


def pack(
    lengths: Int[np.ndarray, " groups"], row_length: int, max_rows: int | None = None, max_groups: int = 0
) -> list[list[int]]:
    """Assign groups to rows by best fit; returns the group numbers of each row.

    A group goes into the row with the least room that holds it, or into a new one. If that would be more than
    `max_rows`, packing ends before this group: the rows hold the first groups, as many as there was room for.

    Args:
      max_groups: a row has at most this many groups; 0 is any number.

    Raises:
      ValueError: a group is longer than a row.
    """
    if len(lengths) and lengths.max() > row_length:
        raise ValueError(f"a group of {lengths.max()} tokens exceeds the row length of {row_length}; use longer rows")
    shortest = int(lengths.min(initial=row_length))
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # of each row that may take another group, and its number; sorted
    for group, length in enumerate(lengths.tolist()):
        place = bisect_left(room, (length, 0))
        if place < len(room):
            left, row = room.pop(place)
        elif len(rows) == max_rows:
            break
        else:
            left, row = row_length, len(rows)
            rows.append([])
        rows[row].append(group)
        if left - length >= shortest and len(rows[row]) != max_groups:
            insort(room, (left - length, row))
    return rows


def packed_row(groups: list[Group], row_length: int) -> PackedBatch:
    """Concatenate groups and pad to `row_length`: a batch without its rows axis."""
    row = PackedBatch(*(np.zeros(row_length, np.float32 if name == "loss_weight" else np.int32) for name in FIELDS))
    place = 0
    for number, group in enumerate(groups, 1):
        inside = slice(place, place + len(group.tokens))
        row.tokens[inside] = group.tokens
        row.targets[inside] = group.targets
        row.segments[inside] = number
        row.positions[inside] = np.arange(len(group.tokens))
        row.offsets[inside] = group.offsets
        row.loss_weight[inside] = group.loss_weight
        row.kind[inside] = group.kind
        place = inside.stop
    return row
