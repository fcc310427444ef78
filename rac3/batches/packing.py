"""Packing: which row each group goes into, and the arrays of a packed batch.

group: <eod> retrieved <eod> retrieved <eod> main <eod>      (the last id is a target only)
row  : group 1 | group 2 | ... | padding
"""

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


class Group(NamedTuple):
    """One main document after its retrieved ones; arrays over the input positions."""

    tokens: Int[np.ndarray, " seq"]
    targets: Int[np.ndarray, " seq"]
    offsets: Int[np.ndarray, " seq"]
    loss_weight: Float[np.ndarray, " seq"]
    kind: Int[np.ndarray, " seq"]


def pack(lengths: Int[np.ndarray, " groups"], row_length: int, open_rows: int = 64) -> list[list[int]]:
    """Assign groups to rows by best fit over `open_rows` open rows; returns the group numbers of each row.

    Deterministic; every group is in exactly one row. If no open row has room, the fullest one is closed.

    Raises:
      ValueError: a group is longer than a row.
    """
    if len(lengths) and lengths.max() > row_length:
        raise ValueError(f"a group of {lengths.max()} tokens exceeds the row length of {row_length}; use longer rows")
    rows: list[list[int]] = []
    room = np.zeros(open_rows, np.int64)  # 0 fits nothing, since lengths are positive
    slot_row = np.zeros(open_rows, np.int64)
    for group, length in enumerate(lengths):
        left = room - length
        slot = int(np.where(left >= 0, left, row_length + 1).argmin())
        if left[slot] < 0:
            slot = int(room.argmin())
            room[slot] = row_length
            slot_row[slot] = len(rows)
            rows.append([])
        rows[slot_row[slot]].append(group)
        room[slot] -= length
    return rows


def packed_row(groups: list[Group], row_length: int) -> PackedBatch:
    """Concatenate groups and pad to `row_length`: a batch without its rows axis."""

    def join(parts: list[np.ndarray], dtype: type) -> np.ndarray:
        row: np.ndarray = np.zeros(row_length, dtype)
        flat = np.concatenate(parts)
        row[: len(flat)] = flat
        return row

    sizes = [len(group.tokens) for group in groups]
    return PackedBatch(
        tokens=join([g.tokens for g in groups], np.int32),
        targets=join([g.targets for g in groups], np.int32),
        segments=join([np.full(size, number) for number, size in enumerate(sizes, 1)], np.int32),
        positions=join([np.arange(size) for size in sizes], np.int32),
        offsets=join([g.offsets for g in groups], np.int32),
        loss_weight=join([g.loss_weight for g in groups], np.float32),
        kind=join([g.kind for g in groups], np.int32),
    )
