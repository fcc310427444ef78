"""Perplexity of held-out documents by modality, with the documents that the prompt retrieves in context."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import PyTree

from rac3.batches.groups import GroupBuilder
from rac3.batches.masking import move_spans
from rac3.batches.packing import Group
from rac3.generation.tasks.score import CrossEntropy, group_nats
from rac3.tokens.html import Sequenced


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


def perplexity(
    cross_entropy: CrossEntropy,
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
    nats = group_nats(cross_entropy, params, groups, row_length, max_groups)
    scored = [row[group.kind == kind].astype(np.float64) for row, group in zip(nats, groups, strict=True)]
    count = sum(map(len, scored))
    return float(np.exp(sum(row.sum() for row in scored) / count)) if count else None
