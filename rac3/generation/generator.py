"""A trained model that continues prompts."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

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
        """`count` continuations of each prompt, and their mean log probabilities.

        Sample i of a prompt is a function of (seed, prompt, i) alone: neither the other prompts of the call, nor their
        order, nor `count` changes it.
        """
        repeated = [prompt for prompt in prompts for _ in range(count)]
        keys = sample_keys(seed, prompts, count).reshape(-1)
        out: Generated = generate(self.model, self.params, self.vocabulary, repeated, grammar, sampling, keys)
        nested = [out.ids[start : start + count] for start in range(0, len(repeated), count)]
        return nested, out.mean_log_prob.reshape(len(prompts), count)


def sample_keys(seed: int, prompts: Sequence[Int[np.ndarray, " _"]], count: int) -> Key[Array, "prompts {count}"]:
    """The random key of each sample: a function of the seed, the prompt's ids and the sample's number."""
    digests = [hashlib.blake2b(np.asarray(prompt, "<i4").tobytes(), digest_size=4).digest() for prompt in prompts]
    hashes = np.array([int.from_bytes(digest, "little") for digest in digests], np.uint32)
    of_prompts = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), hashes)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(of_prompts, np.arange(count))
