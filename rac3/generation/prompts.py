"""Prompts: documents, then the given part of the main document.

    <eod> m1 <eod> m2 <eod> <img alt=" a red fox " src="

A prompt is the start of a training group (paper, section 3.3; documents as in `rac3.tokens.html`): it has the same ids,
positions and offsets, and never more of them than the model was built for. What does not fit is decided for each prompt
alone, and said.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isqrt
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from rac3.batches.groups import GroupBuilder
from rac3.config import InputError
from rac3.documents.store import Tokens
from rac3.generation.request import Draw, Given, Request
from rac3.tokens.html import Sequenced
from rac3.tokens.vocabulary import EOD, Vocabulary

TextIds = Sequence[int] | Int[np.ndarray, " _"]  # of the text tokenizer
Piece = int | tuple[np.ndarray, int]  # markup, or joint ids and the offset of the first of them


@dataclass(frozen=True)
class Form:
    """What the sequences of a model are made of, and how long they may be.

    Attributes:
      builder: makes sequences of documents, as in training.
      tokens_per_image: codes of every image.
      max_positions: ids of the longest group.
      max_segment_tokens: ids of the longest text or image.
      max_documents: the most retrieved documents of a training group.
    """

    builder: GroupBuilder
    tokens_per_image: int
    max_positions: int
    max_segment_tokens: int
    max_documents: int = 2

    @property
    def vocabulary(self) -> Vocabulary:
        return self.builder.vocabulary

    @property
    def image_width(self) -> int:
        """Codes in a row of an image; 0 if images are not square."""
        width = isqrt(self.tokens_per_image)
        return width if width**2 == self.tokens_per_image else 0

    def draw_image(self) -> Draw:
        """Exactly one image."""
        return Draw(self.vocabulary.is_image(self._ids), self.tokens_per_image)

    def draw_codes(self, first: int, count: int) -> Draw:
        """`count` codes of an image, from number `first` on."""
        return Draw(self.vocabulary.is_image(self._ids), count, offset=first + 1)

    def draw_text(self, count: int, stop: int, offset: int = 1) -> Draw:
        """Text of at most `count` ids, until `stop`."""
        return Draw(self.vocabulary.is_text(self._ids), count, stop, offset)

    @property
    def _ids(self) -> Int[np.ndarray, " vocab"]:
        return np.arange(self.vocabulary.padded_size)

    def text_piece(self, ids: TextIds, offset: int = 1) -> Piece:
        """Text ids as a piece of a sequence; `offset` is that of the first."""
        return self.vocabulary.from_text(np.asarray(ids, np.int32)), offset

    def image_piece(self, codes: Int[np.ndarray, " n"], offset: int = 1) -> Piece:
        """Image codes as a piece of a sequence; `offset` is that of the first."""
        return self.vocabulary.from_image(codes), offset

    def check_image(self, codes: Int[np.ndarray, " n"]) -> None:
        """Raises InputError if these are not the codes of one image."""
        if len(codes) != self.tokens_per_image:
            raise InputError(
                f"the image has {len(codes)} codes, but this model's images have {self.tokens_per_image}; "
                "encode it with the run's own VQGAN"
            )


@dataclass(frozen=True, eq=False)
class Context:
    """The documents in a prompt.

    Attributes:
      documents: best first; retrieved ones, given ones that need not be in any memory, or both.
      ensemble: spread the documents over several prompts, none with more than in training, and average their
        distributions (paper, section 5.4). Otherwise, all are in one prompt.
      without: for `Sampling.guidance`: adds the prompts that lack the text or the documents.
    """

    documents: Sequence[Tokens] = ()
    ensemble: bool = False
    without: Literal["text", "documents"] | None = None


class Asked(NamedTuple):
    """A request, and what became of the documents.

    Attributes:
      contexts: the numbers of the documents in each prompt that has its text and documents.
      dropped: the numbers of the documents that did not fit.
      notes: one line each, for the user: what was dropped, truncated, or is unlike training.
    """

    request: Request
    contexts: list[list[int]]
    dropped: list[int]
    notes: list[str]


def sequence(pieces: Sequence[Piece]) -> Sequenced:
    """Markup and runs of ids as one sequence."""
    ids: list[np.ndarray] = [np.zeros(0, np.int32)]
    offsets: list[np.ndarray] = [np.zeros(0, np.int32)]
    for piece in pieces:
        run, first = (np.array([piece], np.int32), 0) if isinstance(piece, int) else piece
        ids.append(run)
        offsets.append(np.arange(first, first + len(run)))
    return Sequenced(np.concatenate(ids).astype(np.int32), np.concatenate(offsets).astype(np.int32))


def given(pieces: Sequence[Piece]) -> Given:
    """Markup and runs of ids as a known run of a grammar."""
    return Given(*sequence(pieces))


def ask(
    form: Form,
    main: Sequence[Piece],
    grammar: Sequence[Draw | Given],
    context: Context,
    samples: int = 1,
    first: int = 0,
    bare: Sequence[Piece] | None = None,
) -> Asked:
    """The request for what follows `main`, the given part of the main document, after the documents of `context`.

    If the prompt without documents leaves less room than asked for, a text at the end of the grammar gets what there
    is. Documents that do not fit next to all of this are dropped, the last first.

    Args:
      bare: `main` without its text, for guidance.

    Raises:
      InputError: no room for the shortest output, a text longer than in training, a document without the part that is
        shown in training, or guidance without a text that there is none of.
    """
    notes: list[str] = []
    own = sequence(main)
    longest = int(own.offsets.max(initial=0))
    if longest > form.max_segment_tokens:
        raise InputError(
            f"a text of {longest} tokens exceeds the {form.max_segment_tokens} that the model was trained for "
            "(max_text_tokens); use a shorter one"
        )
    grammar = _fitted(form, 1 + len(own.ids), grammar, notes)
    room = form.max_positions - 1 - len(own.ids) - sum(map(_longest, grammar))
    fitted = fit(form, context, room)
    notes += fitted.notes
    prompts = [_joined(each, own) for each in fitted.sequences]
    if context.without == "text":
        if bare is None:
            raise InputError("guidance without the text has no text to leave out here; use without=documents")
        prompts += [_joined(each, sequence(bare)) for each in fitted.sequences]
    if context.without == "documents":
        if not any(fitted.contexts):
            notes.append("guidance without the documents changes nothing: there are none in the prompt")
        prompts.append(_joined([], own))
    endings = 2 if context.without == "text" else 1
    return Asked(Request(prompts, grammar, samples, first, endings), fitted.contexts, fitted.dropped, notes)


def each_alone(asked: Asked) -> list[Request]:
    """A request for each prompt of an ensemble, in place of the one that averages over them."""
    count = len(asked.contexts)
    prompts, lacking = asked.request.prompts[:count], asked.request.prompts[count:]
    if len(lacking) == 1:  # the prompt without documents is the same for all
        lacking = [*lacking] * count
    return [
        replace(asked.request, prompts=[prompt, *lacking[number : number + 1]]) for number, prompt in enumerate(prompts)
    ]


class Fitted(NamedTuple):
    """The documents of a context that fit; the other fields are as in `Asked`.

    Attributes:
      sequences: the documents of each prompt, of which there is at least one.
    """

    sequences: list[list[Sequenced]]
    contexts: list[list[int]]
    dropped: list[int]
    notes: list[str]


def fit(form: Form, context: Context, room: int) -> Fitted:
    """The documents that fit into `room` ids of each prompt.

    Raises:
      InputError: a document without the part that is shown in training.
    """
    sequences = [_shown(form, number, document) for number, document in enumerate(context.documents)]
    contexts, dropped = _contexts(form, [len(each.ids) for each in sequences], room, context.ensemble)
    notes, most = [], max(map(len, contexts))
    if dropped:
        notes.append(f"{len(dropped)} of {len(sequences)} documents do not fit into the context, and were dropped")
    if most > form.max_documents:
        notes.append(
            f"a prompt of {most} documents is unlike training, where there were at most {form.max_documents}; "
            "an ensemble spreads them over several prompts"
        )
    return Fitted([[sequences[number] for number in each] for each in contexts], contexts, dropped, notes)


def _fitted(form: Form, given: int, grammar: Sequence[Draw | Given], notes: list[str]) -> list[Draw | Given]:
    """The grammar with texts as long as in training, the last one also as long as `given` ids before it allow."""
    fitted = [*grammar]
    for number, run in enumerate(fitted):
        if isinstance(run, Draw) and run.stop >= 0:
            most = form.max_segment_tokens + 1 - run.offset
            if number == len(fitted) - 1:
                most = min(most, form.max_positions - given - sum(map(_longest, fitted[:-1])) - 1)
            if 0 < most < run.count:
                notes.append(f"there is room for a text of {most} tokens, not of {run.count}")
            fitted[number] = replace(run, count=max(1, min(run.count, most)))
    drawn = sum(map(_longest, fitted))
    if given + drawn > form.max_positions:
        raise InputError(
            f"a prompt of {given} ids without its documents, and {drawn} to draw, exceed the {form.max_positions} "
            "positions of the model; use a shorter prompt"
        )
    return fitted


def _longest(run: Draw | Given) -> int:
    """The largest number of ids of a run, stop ids included."""
    return len(run.ids) if isinstance(run, Given) else run.count + (run.stop >= 0)


def _shown(form: Form, number: int, document: Tokens) -> Sequenced:
    part = form.builder.shown(document)
    if part is None:
        wanted = form.builder.retrieved
        raise InputError(
            f"document {number} has no {wanted}, which is all that this model was shown of documents in training "
            f"(batches.retrieved); give documents with one"
        )
    return form.builder.sequence(part)


def _contexts(form: Form, lengths: Sequence[int], room: int, ensemble: bool) -> tuple[list[list[int]], list[int]]:
    """The documents of each prompt, of which there is at least one, and those that fit into none."""
    contexts: list[list[int]] = [[]]
    dropped: list[int] = []
    for number, length in enumerate(lengths):
        last = contexts[-1]
        fits = sum(lengths[each] for each in last) + length <= room
        if not ensemble:
            (last if fits and not dropped else dropped).append(number)
        elif fits and len(last) < max(1, form.max_documents):
            last.append(number)
        elif length <= room:
            contexts.append([number])
        else:
            dropped.append(number)
    return contexts, dropped


def _joined(documents: Sequence[Sequenced], main: Sequenced) -> Sequenced:
    parts = [sequence([EOD]), *documents, main]
    return Sequenced(np.concatenate([each.ids for each in parts]), np.concatenate([each.offsets for each in parts]))
