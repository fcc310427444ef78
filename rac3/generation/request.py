"""What is asked of the engine: prompts, and the runs of ids that follow them.

    infill <mask:0> of  <eod> <img alt=" a <mask:0> " src=" I0 <mask:1> I3 "> <mask:0>
    grammar: Draw text until <eoi> | Given <mask:1> | Draw 2 image codes, the first at offset 2

A request names no task: `generation/tasks` turns tasks into requests, and reads the answer off the samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from rac3.config import InputError
from rac3.tokens.html import Sequenced


@dataclass(frozen=True, eq=False)
class Draw:
    """A run of ids that the model draws.

    Attributes:
      allowed: True at the ids that may be drawn; the stop id is allowed besides.
      count: the largest number of ids before the stop id; without a stop id, the exact number.
      stop: the id that ends the run, and belongs to the sequence; -1 is none.
      offset: of the first id in its text or image; 1 at its start.
    """

    allowed: Bool[np.ndarray, " vocab"]
    count: int
    stop: int = -1
    offset: int = 1


@dataclass(frozen=True, eq=False)
class Given:
    """A run of ids that are known: markup, sentinels, or the kept part of an image.

    Attributes:
      offsets: as in `rac3.tokens.html.Sequenced`.
    """

    ids: Int[np.ndarray, " n"]
    offsets: Int[np.ndarray, " n"]


@dataclass(frozen=True, eq=False)
class Request:
    """Samples that continue one prompt.

    Attributes:
      prompts: one, or several whose distributions `Sampling` combines for each id: the prompt with and without its
        text (guidance), or with other documents (ensemble). Each is at least one id, with the offset of each id: after
        a masked span, offsets go on from where the span ended in the document.
      grammar: what follows, the same after each of the prompts.
      samples: how many to draw.
      first: the number of the first sample; sample i is the same in every request that asks for it.
      endings: how many prompts end differently after the same documents, whose keys and values they then share. The
        prompts are those of the first ending, then as many of the second, in the same order of documents.
    """

    prompts: Sequence[Sequenced]
    grammar: Sequence[Draw | Given]
    samples: int = 1
    first: int = 0
    endings: int = 1

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise InputError(f"samples={self.samples} is below 1; use at least 1")
        if self.endings < 1 or len(self.prompts) % self.endings:
            raise InputError(f"{len(self.prompts)} prompts can't have {self.endings} endings each; use a divisor")

    @property
    def shared(self) -> Int[np.ndarray, " streams"]:
        """How many ids the endings of each prompt begin with in common; the last id of a prompt is never one."""
        streams = len(self.prompts) // self.endings
        return np.array([_common(self.prompts[stream::streams]) for stream in range(streams)], np.int32)


def _common(prompts: Sequence[Sequenced]) -> int:
    most = min(len(prompt.ids) for prompt in prompts) - 1
    rows = np.array([[prompt.ids[:most], prompt.offsets[:most]] for prompt in prompts])
    differs = (rows != rows[0]).any(axis=(0, 1))
    return int(differs.argmax()) if differs.any() else most


class Sample(NamedTuple):
    """One continuation.

    Attributes:
      runs: the ids of each `Draw` of the grammar, without stop ids.
      log_probs: for each of these runs, the log probability of its ids, and of the stop id if it was drawn, in nats,
        among the allowed ids at temperature 1.
    """

    runs: list[Int[np.ndarray, " _"]]
    log_probs: list[Float[np.ndarray, " _"]]

    @property
    def mean_log_prob(self) -> float:
        """Of all ids that were drawn, stop ids included."""
        return float(np.concatenate(self.log_probs).mean())
