"""Score: the log-likelihood of any part of a document, given its documents and the rest of it.

in order  <eod> m1 <eod> <img alt=" a red fox " src=" I0 I1 I2 I3 "> <eod>           what came before is given
infilled  <eod> m1 <eod> <img alt=" a <mask:0> fox " src=" ... "> <mask:0> red <eoi>   all the rest is given
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, PyTree

from rac3.batches.masking import move_spans, segments_of
from rac3.batches.packing import Group, PackedBatch, pack, packed_row
from rac3.config import InputError
from rac3.devices.batches import power_of_two
from rac3.documents.store import Tokens
from rac3.generation.prompts import Context, Form, fit
from rac3.model.losses import token_cross_entropy
from rac3.model.transformer import Transformer

ROWS = 16  # of a batch, at most
CrossEntropy = Callable[[PyTree, PackedBatch], Array]  # -log p of each target in nats


class Part(NamedTuple):
    """A part of a document that is scored: targets [start, end) of the group of the document and its context."""

    group: Group
    start: int
    end: int


class Parts(NamedTuple):
    """A part of a document after each prompt of its context; the rest is as in `rac3.generation.prompts.Asked`."""

    parts: list[Part]
    contexts: list[list[int]]
    dropped: list[int]
    notes: list[str]


def request(
    form: Form,
    document: Tokens,
    segment: int,
    context: Context,
    start: int = 0,
    end: int | None = None,
    infill: bool = False,
) -> Parts:
    """A segment of a document, or its ids [start, end), to be scored.

    Args:
      infill: given all the rest of the document, with the `<eoi>` at the end; else given what is before, in order.

    Raises:
      InputError: there are no such ids, or the document is too long.
    """
    if not 0 <= segment < len(document):
        raise InputError(f"segment {segment} is not among the document's {len(document)}; the first one is 0")
    count = len(document[segment][1])
    end = count if end is None else end
    if not 0 <= start < end <= count:
        raise InputError(f"ids {start} to {end} are not among the {count} of the segment; use 0 to {count}")
    main = form.builder.sequence(document)
    low, _ = segments_of(main)[segment]
    if infill:
        main = move_spans(form.vocabulary, main, [(low + start, low + end)])
        first, last = len(main.ids) - 2 - (end - start), len(main.ids) - 1
    else:
        first, last = low + start, low + end
    longest, room = int(main.offsets.max()), form.max_positions - len(main.ids)
    if longest > form.max_segment_tokens or room < 0:
        raise InputError(
            f"a document of {len(main.ids)} ids, {longest} in a segment, exceeds the {form.max_positions} positions of "
            f"the model, or the {form.max_segment_tokens} of a segment; use a shorter one"
        )
    fitted = fit(form, context, room)
    parts = []
    for documents in fitted.sequences:
        before = sum(len(each.ids) for each in documents)
        parts.append(Part(form.builder.join([*documents, main]), before + first, before + last))
    return Parts(parts, fitted.contexts, fitted.dropped, fitted.notes)


def answer(log_probs: Sequence[Float[np.ndarray, " ids"]]) -> Float[np.ndarray, " ids"]:
    """Of each id, the logarithm of its mean probability over the prompts of its context, in nats."""
    return np.logaddexp.reduce(log_probs, axis=0) - np.log(len(log_probs))


@dataclass(frozen=True, eq=False)
class Scorer:
    """Log probabilities by the packed forward pass of training.

    Attributes:
      row_length: ids of a row, into which groups are packed.
      max_groups: the most groups in a row; 0 is any number.
    """

    model: Transformer
    params: PyTree
    row_length: int
    max_groups: int = 0

    def log_probs(self, parts: Sequence[Part]) -> list[Float[np.ndarray, " _"]]:
        """Of each part, the log probability of each id, in nats, among all ids."""
        groups = [part.group for part in parts]
        longest = max([self.row_length, *(len(group.tokens) for group in groups)])
        nats = group_nats(make_token_cross_entropy(self.model), self.params, groups, longest, self.max_groups)
        return [-of_group[part.start : part.end] for of_group, part in zip(nats, parts, strict=True)]


def make_token_cross_entropy(model: Transformer) -> CrossEntropy:
    """(params, batch) -> -log p of each target in nats; equal models share their compiled programs."""
    return partial(_nats, model)


def group_nats(
    cross_entropy: CrossEntropy, params: PyTree, groups: Sequence[Group], row_length: int, max_groups: int = 0
) -> list[Float[np.ndarray, " _"]]:
    """-log p of each target of each group, in nats, by packing the groups into rows."""
    lengths = np.array([len(group.tokens) for group in groups], np.int64)
    rows = pack(lengths, row_length, max_groups=max_groups)
    size = ROWS if len(rows) > ROWS else power_of_two(max(1, len(rows)))  # of every batch, so that one program serves
    found: dict[int, np.ndarray] = {}
    for start in range(0, len(rows), size):
        chosen = rows[start : start + size]
        packed = [packed_row([groups[number] for number in row], row_length) for row in chosen]
        packed += [jax.tree.map(np.zeros_like, packed[0])] * (size - len(chosen))
        nats = np.asarray(cross_entropy(params, jax.tree.map(lambda *leaves: np.stack(leaves), *packed)))
        for row, numbers in zip(nats, chosen, strict=False):
            ends = np.cumsum(lengths[numbers]).tolist()
            found |= {number: row[end - lengths[number] : end] for number, end in zip(numbers, ends, strict=True)}
    return [found[number] for number in range(len(groups))]


@partial(jax.jit, static_argnums=0)
def _nats(model: Transformer, params: PyTree, batch: PackedBatch) -> Float[Array, "rows seq"]:
    return token_cross_entropy(model, params, batch)
