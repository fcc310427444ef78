"""Classify: which label is an image's caption, by demonstrations (paper, section 5.4).

    run 1  <eod> <img alt=" cat " src=" ... "> <eod> <img alt=" dog " src=" ... "> <eod>
           <img alt=" <mask:0> " src=" I0 I1 I2 I3 "> <mask:0> cat <eoi>

One run has one demonstration of each label. Of k runs, with other demonstrations, the probabilities are averaged. Every
second run has its demonstrations in reverse, so that no label gains by its place.

The probability of a label is that of the caption given the image, as in the paper, or by Bayes' rule with equal priors
that of the image given the caption (a noisy channel: Min et al., arXiv 2108.04106), for models that draw what a name
shows better than they name what an image shows. In both, the model has to find the demonstration that is like the
image. `apart` asks less of it: how probable the image is after the demonstration of one label alone, for each label.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float, Int

from rac3.config import InputError, quoted
from rac3.documents.store import Tokens
from rac3.generation.prompts import Context, Form, TextIds
from rac3.generation.tasks import score

# The caption given the image, or the image given the caption; after all demonstrations of a run, or its label's alone.
Scored = Literal["text", "image", "apart"]


class Asked(NamedTuple):
    """Captions of an image to be scored.

    Attributes:
      parts: for each run, for each label.
      notes: as in `rac3.generation.prompts.Asked`.
    """

    parts: list[list[score.Part]]
    notes: list[str]


def request(
    form: Form,
    codes: Int[np.ndarray, " tokens"],
    labels: Sequence[TextIds],
    demonstrations: Sequence[Sequence[Tokens]],
    scored: Scored = "text",
) -> Asked:
    """Each label as the caption of an image, after the demonstrations of each run.

    Args:
      demonstrations: of each run, its documents; no runs ask without demonstrations.
      scored: the caption given the image, the image given the caption, or that with its own demonstration alone.

    Raises:
      InputError: another `scored`, fewer than two labels, equal or empty ones, demonstrations that do not fit, or for
        `apart` a run without one of each label.
    """
    form.check_image(codes)
    if scored not in get_args(Scored):
        raise InputError(f"scored={quoted(scored)} is unknown; use {', '.join(get_args(Scored))}")
    if len(labels) < 2:
        raise InputError(f"{len(labels)} labels leave no choice; give at least 2")
    if not all(len(label) for label in labels) or len({tuple(label) for label in labels}) < len(labels):
        raise InputError("a label is empty, or given twice; give different ones")
    parts, notes = [], []
    for number, demonstrated in enumerate(demonstrations or [()]):
        if scored == "apart" and demonstrated and len(demonstrated) != len(labels):
            raise InputError(
                f"a run has {len(demonstrated)} demonstrations for {len(labels)} labels; give it one of each"
            )
        run, row = demonstrated[:: -1 if number % 2 else 1], []
        for place, label in enumerate(labels):
            document = (False, np.asarray(label, np.int32)), (True, codes)
            shown = demonstrated[place : place + 1] if scored == "apart" else run
            asked = score.request(form, document, int(scored != "text"), Context(shown), infill=scored == "text")
            if asked.dropped:
                raise InputError(
                    f"{len(shown)} demonstrations do not fit into one context next to the image; "
                    "use fewer labels, or scored='apart'"
                )
            row += asked.parts
            notes += [note for note in asked.notes if note not in notes]
        parts.append(row)
    return Asked(parts, notes)


def answer(log_probs: Sequence[Sequence[Float[np.ndarray, " _"]]]) -> Float[np.ndarray, " labels"]:
    """The probability of each label: among the labels, and averaged over runs.

    Args:
      log_probs: of the ids of each label, for each run.
    """
    totals = np.array([[float(label.sum()) for label in run] for run in log_probs])
    probs = np.exp(totals - totals.max(1, keepdims=True))
    return (probs / probs.sum(1, keepdims=True)).mean(0)
