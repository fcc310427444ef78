"""Perplexity of held-out documents by modality, with the documents that the prompt retrieves in context."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import PyTree

from rac3.batches.groups import GroupBuilder
from rac3.batches.masking import move_spans
from rac3.batches.packing import Group, PackedBatch, pack, packed_row
from rac3.model.losses import token_cross_entropy
from rac3.model.transformer import Transformer
from rac3.tokens.html import Sequenced

ROWS = 16  # rows of a batch


def image_group(builder: GroupBuilder, retrieved: Sequence[Sequenced], main: Sequenced) -> Group:
    """Caption to image: the documents that the text retrieved, then the main document as it is."""
    return builder.join([*retrieved, main])


def text_group(builder: GroupBuilder, retrieved: Sequence[Sequenced], main: Sequenced) -> Group:
    """Image to caption: the documents that the image retrieved, then the main document with all its text masked.

    main: <img alt=" <mask:0> " src=" I0 I1 I2 I3 "> <mask:0> a red fox <eoi> <eod>
    """
    text = builder.vocabulary.is_text(main.ids)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], text, [False]]).astype(int)))
    spans = [(int(start), int(end)) for start, end in edges.reshape(-1, 2)][: builder.vocabulary.num_masks]
    return builder.join([*retrieved, move_spans(builder.vocabulary, main, spans)])


def make_token_cross_entropy(model: Transformer) -> Callable[[PyTree, PackedBatch], jax.Array]:
    """(params, batch) -> -log p of each target in nats, jitted."""
    return jax.jit(lambda params, batch: token_cross_entropy(model, params, batch))


def perplexity(
    cross_entropy: Callable[[PyTree, PackedBatch], jax.Array],
    params: PyTree,
    groups: Sequence[Group],
    kind: int,
    row_length: int,
    max_groups: int = 0,
) -> float | None:
    """exp of the mean -log p over the targets of one kind; None without such targets.

    Args:
      cross_entropy: (params, batch) -> -log p of each target in nats.
      kind: `MAIN_TEXT` or `MAIN_IMAGE`.
      row_length: tokens of the rows that the groups are packed into.
      max_groups: the most groups in a row; 0 is any number.
    """
    rows = pack(np.array([len(group.tokens) for group in groups], np.int64), row_length, max_groups=max_groups)
    total, count = 0.0, 0
    for start in range(0, len(rows), ROWS):
        chosen = [packed_row([groups[number] for number in row], row_length) for row in rows[start : start + ROWS]]
        blank = jax.tree.map(np.zeros_like, chosen[0])
        padded = chosen + [blank] * (ROWS - len(chosen))
        batch = jax.tree.map(lambda *leaves: np.stack(leaves), *padded)
        nats = np.asarray(cross_entropy(params, batch), np.float64)
        total += float(nats[batch.kind == kind].sum())
        count += int((batch.kind == kind).sum())
    return float(np.exp(total / count)) if count else None
