"""A trained model that continues prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float, Int, PyTree

from rac3.generation.decode import Generated, Grammar, generate
from rac3.generation.sampling import Sampling
from rac3.model.transformer import Transformer
from rac3.tokens.vocabulary import Vocabulary


@dataclass(frozen=True)
class Generator:
    """The model, its parameters and its vocabulary; `tokens_per_image` is the number of codes of an image."""

    model: Transformer
    params: PyTree
    vocabulary: Vocabulary
    tokens_per_image: int

    def samples(
        self, prompts: Sequence[Int[np.ndarray, " _"]], grammar: Grammar, sampling: Sampling, count: int, seed: int
    ) -> tuple[list[list[Int[np.ndarray, " _"]]], Float[np.ndarray, "prompts samples"]]:
        """`count` continuations of each prompt, and their mean log probabilities: a function of (seed, prompt)."""
        repeated = [prompt for prompt in prompts for _ in range(count)]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), np.arange(len(repeated)))
        out: Generated = generate(self.model, self.params, self.vocabulary, repeated, grammar, sampling, keys)
        nested = [out.ids[start : start + count] for start in range(0, len(repeated), count)]
        return nested, out.mean_log_prob.reshape(len(prompts), count)
