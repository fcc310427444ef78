"""What is known when an id is drawn, and what may change how it is drawn."""

from typing import Protocol, no_type_check, runtime_checkable

import flax.struct
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rac3.tokens.vocabulary import Vocabulary


@no_type_check  # of the constructor: JAX rebuilds pytrees with leaves of any type
class Step(flax.struct.PyTreeNode):
    """The sequences so far, for the ids that are drawn next.

    Attributes:
      prompts: ids; 0 after the end.
      prompt_offsets: 1 + the place of each id in its text or image; 0 at markup and after the end.
      lengths: ids of each prompt.
      drawn: the ids after the prompt, known ones included; 0 after the end.
      drawn_offsets: as `prompt_offsets`.
      count: how many ids `drawn` holds.
      offset: of the id to draw.
      word_starts: whether each id of the vocabulary begins a word; None is unknown.
      vocabulary: what the ids mean.
      image_width: codes in a row of an image; 0 is unknown.
    """

    prompts: Int[Array, "requests streams prompt"]
    prompt_offsets: Int[Array, "requests streams prompt"]
    lengths: Int[Array, "requests streams"]
    drawn: Int[Array, "requests samples drawn"]
    drawn_offsets: Int[Array, "requests samples drawn"]
    count: Int[Array, "requests samples"]
    offset: Int[Array, "requests samples"]
    word_starts: Bool[Array | np.ndarray, " vocab"] | None = None
    vocabulary: Vocabulary = flax.struct.field(pytree_node=False, kw_only=True)
    image_width: int = flax.struct.field(pytree_node=False, default=0)


@runtime_checkable
class Processor(Protocol):
    """Changes the distribution that ids are drawn from. A user's own is a frozen dataclass in a config."""

    def __call__(
        self, log_probs: Float[Array, "requests samples vocab"], step: Step
    ) -> Float[Array, "requests samples vocab"]:
        """Log probabilities of the next id -> logits. Ids that the grammar does not allow are -inf, and stay so."""
        ...
