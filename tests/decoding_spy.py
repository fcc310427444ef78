"""What reaches the decoder, and what it gives: the last place before ids are drawn."""

from typing import NamedTuple

import jax
import numpy as np
import pytest

from rac3.generation import generator
from rac3.generation.decode import Generated, Grammar
from rac3.generation.sampling import Sampling


class Call(NamedTuple):
    """One call of `decode.generate`: its rows are prompts, each as often as it has samples."""

    prompts: list[list[int]]
    grammar: Grammar
    sampling: Sampling
    keys: list[tuple[int, ...]]  # their bits, one a row
    out: Generated

    def samples(self, count: int) -> list[tuple[list[int], list[list[int]], list[float]]]:
        """(prompt, ids of each sample, their mean log probabilities) of each prompt, of `count` samples each."""
        found = []
        for start in range(0, len(self.prompts), count):
            own = slice(start, start + count)
            (prompt,) = {tuple(each) for each in self.prompts[own]}  # all rows have the one prompt
            found.append(
                (list(prompt), [ids.tolist() for ids in self.out.ids[own]], self.out.mean_log_prob[own].tolist())
            )
        return found


def watch_decoding(monkeypatch: pytest.MonkeyPatch, real: bool = True) -> list[Call]:
    """The calls of the decoder from now on, as they come; without `real`, its answers are made up (see `made_up`)."""
    calls: list[Call] = []
    decode = generator.generate

    def generate(model, params, vocabulary, prompts, grammar, sampling, keys):
        bits = [tuple(row) for row in np.asarray(jax.random.key_data(keys)).tolist()]
        if real:
            out = decode(model, params, vocabulary, prompts, grammar, sampling, keys)
        else:
            room = [model.max_positions - len(prompt) for prompt in prompts]
            assert min(room) >= grammar.shortest
            out = made_up(grammar, bits, room)
        calls.append(Call([prompt.tolist() for prompt in prompts], grammar, sampling, bits, out))
        return out

    monkeypatch.setattr(generator, "generate", generate)
    return calls


def made_up(grammar: Grammar, keys: list[tuple[int, ...]], room: list[int]) -> Generated:
    """What the grammar allows, drawn evenly by each row's key: without a model, hence at once."""
    allowed = np.setdiff1d(np.flatnonzero(grammar.allowed), [grammar.stop])
    ids, scores = [], []
    for key, limit in zip(keys, np.minimum(grammar.count, room).tolist(), strict=True):
        rng = np.random.default_rng(key)
        count = limit if grammar.stop < 0 else int(rng.integers(1, limit + 1))
        ids.append(rng.choice(allowed, count).astype(np.int32))
        scores.append(-rng.random())
    return Generated(ids, np.array(scores, np.float32))
