"""Copying from the documents in the prompt, without training."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rac3.config import InputError
from rac3.generation.step import Step
from rac3.tokens.vocabulary import EOD, NUM_SPECIALS

TEXT_NEIGHBORS = 16  # ids before a place of a text that are compared
OUTSIDE = -1  # the id of a neighbor beyond the edge of a text or image


@dataclass(frozen=True)
class Copying:
    """A mixture of the model's distribution and that of the documents in its prompt.

        p(id) = (1 - weight) p_model(id) + weight p_documents(id)
        p_documents(id) ~ sum over places that hold the id of exp(sharpness * matches(place))

    For images this is AR-RAG's DAiD (arXiv 2506.06962): `matches` counts the codes to the left, above left, above, and
    above right that equal those of the place to draw. It compares codes, not their vectors. For texts it is a kNN-LM
    (arXiv 1911.00172, eq. 2-3) over the context: `matches` is the number of ids before the place, nearest first, that
    equal those before the place to draw. In both, the edges of a text or image match edges. The end of a text stands
    for the id that ends the text to draw. Where no place has the right kind of id, the model is alone.

    Attributes:
      weight: of what the documents say; 0 is the model alone.
      sharpness: a place counts exp(sharpness) times as much as one whose neighborhood matches by one id less.
    """

    weight: float = 0.3
    sharpness: float = 3.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise InputError(f"sampling.copying.weight={self.weight} is outside 0 to 1; use 0 to copy nothing")
        if not 0 <= self.sharpness < math.inf:
            raise InputError(f"sampling.copying.sharpness={self.sharpness} is not a number from 0; use 1 to 5")

    def __call__(
        self, log_probs: Float[Array, "requests samples vocab"], step: Step
    ) -> Float[Array, "requests samples vocab"]:
        raise NotImplementedError
