"""Groups into rows: which group goes where, and the arrays of a packed batch.

group: <eod> retrieved <eod> retrieved <eod> main <eod>      (the last id is a target only)
row  : group 1 | group 2 | ... | padding
"""

from typing import NamedTuple, no_type_check

import flax.struct
import numpy as np
from jaxtyping import Array, Float, Int

# What a target is; the loss is reported by kind. Markup and <eoi> are learned but reported under none.
IGNORED, MAIN_TEXT, MAIN_IMAGE, RETRIEVED_TEXT, RETRIEVED_IMAGE, MARKUP = range(6)
KIND_NAMES = {1: "main/text", 2: "main/image", 3: "retrieved/text", 4: "retrieved/image"}


@no_type_check  # of the constructor at run time: JAX rebuilds it with leaves of any kind
class PackedBatch(flax.struct.PyTreeNode):
    """Rows of packed groups; all fields are aligned. One row alone has no `rows` axis.

    Attributes:
      tokens: input ids.
      targets: the id after each; 0 at padding.
      segments: the group of a token, from 1 within its row; 0 is padding.
      positions: its place in the group, from 0.
      offsets: 1 + the place of a token in its text or image, 0 at markup.
      loss_weight: of the target: 1 main, alpha retrieved, 0 sentinel targets and padding.
      kind: what the target is, see `KIND_NAMES`.
    """

    tokens: Int[Array | np.ndarray, "*rows seq"]
    targets: Int[Array | np.ndarray, "*rows seq"]
    segments: Int[Array | np.ndarray, "*rows seq"]
    positions: Int[Array | np.ndarray, "*rows seq"]
    offsets: Int[Array | np.ndarray, "*rows seq"]
    loss_weight: Float[Array | np.ndarray, "*rows seq"]
    kind: Int[Array | np.ndarray, "*rows seq"]


class Group(NamedTuple):
    """One main document behind its retrieved ones; arrays over the input positions."""

    tokens: Int[np.ndarray, " seq"]
    targets: Int[np.ndarray, " seq"]
    offsets: Int[np.ndarray, " seq"]
    loss_weight: Float[np.ndarray, " seq"]
    kind: Int[np.ndarray, " seq"]


def pack(lengths: Int[np.ndarray, " groups"], row_length: int, open_rows: int = 64) -> list[list[int]]:
    """Group numbers of each row: best fit among the last `open_rows` rows that still have room.

    Deterministic; every group lands in exactly one row.

    Raises:
      ValueError: a group longer than a row.
    """
    if len(lengths) and lengths.max() > row_length:
        raise ValueError(f"a group of {lengths.max()} tokens exceeds the row of {row_length}")
    rows: list[list[int]] = []
    room = np.zeros(open_rows, np.int64)  # -1 would be a closed slot; 0 fits nothing, as lengths are positive
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
    """The groups side by side, padded to `row_length`: a batch without its rows axis."""

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
