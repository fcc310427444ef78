"""The CM3 loss in plain NumPy and float64, one group at a time: what the loss and the step are tested against."""

import jax
import numpy as np
from jaxtyping import PyTree
from plain_transformer import plain_logits, plain_nats, plain_turns

from rac3.batches.groups import GroupBuilder
from rac3.batches.masking import Masking, move_spans
from rac3.batches.packing import PackedBatch, packed_row
from rac3.documents.store import Tokens
from rac3.model.transformer import TransformerConfig
from rac3.tokens.vocabulary import END_OF_INFILL, EOD, IMAGE_ALT, IMAGE_END, IMAGE_SOURCE, Vocabulary

VOCAB = 128
MODEL = TransformerConfig(
    num_layers=2, embed=32, num_heads=4, mlp=64, dtype="float32", remat="dots", init_std=0.1, rotary_offsets=True
).build(VOCAB, 24, 9)
VOCABULARY = Vocabulary(text_size=40, image_size=30)
FIRST_TEXT, FIRST_IMAGE, MASK = 8, 48, 78
RETRIEVED, MAIN = "retrieved", "main"


def item(text: list[int], codes: list[int]) -> Tokens:
    parts = ((False, np.array(text, np.int32)), (True, np.array(codes, np.int32)))
    return tuple(part for part in parts if len(part[1]))


def spelled(text: list[int], codes: list[int]) -> list[tuple[int, int]]:
    """A document as (id, offset) pairs, by hand."""
    pairs = [(FIRST_TEXT + each, place) for place, each in enumerate(text, 1)]
    if codes:
        image = [(FIRST_IMAGE + each, place) for place, each in enumerate(codes, 1)]
        pairs = [(IMAGE_ALT, 0), *pairs, (IMAGE_SOURCE, 0), *image, (IMAGE_END, 0)]
    return [*pairs, (EOD, 0)]


DOCUMENTS = [([1, 2], [3, 4, 5]), ([6], []), ([7, 8], [9, 10])]
#  <img alt=" 7 <mask:0> " src=" 9 10 "> <mask:0> 8 <eoi> <eod>
MASKED = [*spelled([7], [9, 10])[:2], (MASK, 0), *spelled([7], [9, 10])[2:-1]]
MASKED += [(MASK, 0), (FIRST_TEXT + 8, 2), (END_OF_INFILL, 0), (EOD, 0)]


def packed(alpha: float) -> PackedBatch:
    """Two rows: (A, B retrieved; C main) and (B main); (A retrieved; C main, "8" masked)."""
    builder = GroupBuilder(VOCABULARY, Masking("none"), alpha)
    a, b, c = (item(*each) for each in DOCUMENTS)
    no_draws = np.zeros((3, builder.masking.draws_per_document))
    masked = builder.join([builder.sequence(a), move_spans(VOCABULARY, builder.sequence(c), [(2, 3)])])
    rows = [[builder.build([a, b, c], no_draws), builder.build([b], no_draws[:1])], [masked]]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *[packed_row(row, 24) for row in rows])


def plain_cm3_loss(params: PyTree, alpha: float) -> tuple[float, dict[str, float]]:
    """Equations 2 and 3 of the paper, one group at a time, per unit of weight; and the mean loss by kind.

    Two passes over each group: log p(memory), without the main document, and log p(main | memory).
    """
    a, b, c = (spelled(*each) for each in DOCUMENTS)
    nats: dict[str, list[float]] = {}
    for *retrieved, main in [(a, b, c), (b,), (a, MASKED)]:
        memory = [pair for document in retrieved for pair in document]
        for part, context, scored in ((RETRIEVED, [], memory), (MAIN, memory, main)):
            ids, offsets = np.array([(EOD, 0), *context, *scored]).T
            logits = (
                plain_logits(params, 4, ids[:-1], offsets[:-1], plain_turns(offsets[:-1], 8, 9)) if scored else None
            )
            losses = [] if logits is None else plain_nats(logits, ids[1:])
            for target, loss in zip(ids[len(context) + 1 :], losses[len(context) :], strict=True):
                if target != MASK:
                    kind = "text" if 8 <= target < 48 else "image" if 48 <= target < 78 else "markup"
                    nats.setdefault(part, []).append(loss)
                    nats.setdefault(f"{part}/{kind}", []).append(loss)
    total = sum(nats[MAIN]) + alpha * sum(nats[RETRIEVED])
    weight = len(nats[MAIN]) + alpha * len(nats[RETRIEVED])
    return total / weight, {name: float(np.mean(losses)) for name, losses in nats.items()}
