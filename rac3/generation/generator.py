"""A trained model that continues prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from rac3.generation.engine import Engine
from rac3.generation.request import Draw, Request
from rac3.generation.sampling import Sampling
from rac3.tokens.vocabulary import Vocabulary


@dataclass(frozen=True)
class Generator:
    """The engine; `tokens_per_image` is the number of codes of an image."""

    engine: Engine
    tokens_per_image: int

    @property
    def vocabulary(self) -> Vocabulary:
        return self.engine.vocabulary

    def samples(
        self, prompts: Sequence[Int[np.ndarray, " _"]], run: Draw, sampling: Sampling, count: int, seed: int
    ) -> tuple[list[list[Int[np.ndarray, " _"]]], Float[np.ndarray, "prompts samples"]]:
        """`count` continuations of each prompt, and their mean log probabilities.

        Sample i of a prompt is a function of (seed, prompt, i) alone: neither the other prompts of the call, nor their
        order, nor `count` changes it.
        """
        requests = [Request([prompt], [run], count) for prompt in prompts]
        finished = dict(self.engine.run(requests, [sampling] * len(requests), seed))
        samples = [finished[index] for index in range(len(requests))]
        means = np.array([[each.mean_log_prob for each in row] for row in samples], np.float32)
        return [[each.runs[0] for each in row] for row in samples], means.reshape(len(prompts), count)
