"""What reaches the engine, and what it gives: the last place before ids are drawn."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest

from rac3.generation.engine import Engine, prompt_digest
from rac3.generation.grammar import shortest
from rac3.generation.request import Draw, Request, Sample
from rac3.generation.sampling import Sampling


class Call(NamedTuple):
    """One call of `Engine.run` whose requests draw one run; its rows are prompts, each as often as it has samples."""

    prompts: list[list[int]]
    grammar: Draw
    sampling: Sampling
    keys: list[tuple[int, int, int]]  # what the noise of each row is a function of
    out: list[Sample]

    def samples(self, count: int) -> list[tuple[list[int], list[list[int]], list[float]]]:
        """(prompt, ids of each sample, their mean log probabilities) of each prompt, of `count` samples each."""
        found = []
        for start in range(0, len(self.prompts), count):
            own = slice(start, start + count)
            (prompt,) = {tuple(each) for each in self.prompts[own]}  # all rows have the one prompt
            ids = [sample.runs[0].tolist() for sample in self.out[own]]
            found.append((list(prompt), ids, [sample.mean_log_prob for sample in self.out[own]]))
        return found


def watch_decoding(monkeypatch: pytest.MonkeyPatch, real: bool = True) -> list[Call]:
    """The calls of engines from now on, as they come; without `real`, their answers are made up (see `made_up`)."""
    calls: list[Call] = []
    run = Engine.run

    def watched(self: Engine, requests, samplings, seed, on_progress=None) -> Iterator[tuple[int, list[Sample]]]:
        keys = [[(seed, prompt_digest(each.prompts[0]), n) for n in range(each.samples)] for each in requests]
        if real:
            out = dict(run(self, requests, samplings, seed, on_progress))
        else:
            positions = self.model.max_positions
            out = {index: made_up(request, positions, keys[index]) for index, request in enumerate(requests)}
        prompts = [each.prompts[0].tolist() for each in requests for _ in range(each.samples)]
        rows = [sample for index in range(len(requests)) for sample in out[index]]
        (grammar,), *_ = (each.grammar for each in requests)
        (sampling,) = set(samplings)
        calls.append(Call(prompts, grammar, sampling, [key for own in keys for key in own], rows))
        return iter(out.items())

    monkeypatch.setattr(Engine, "run", watched)
    return calls


def made_up(request: Request, positions: int, keys: list[tuple[int, int, int]]) -> list[Sample]:
    """What the grammar allows, drawn evenly by each sample's key: without a model, hence at once."""
    (run,) = request.grammar
    room = positions - len(request.prompts[0])
    assert room >= shortest(request.grammar)
    allowed = np.setdiff1d(np.flatnonzero(run.allowed), [run.stop])
    samples = []
    for key in keys:
        rng = np.random.default_rng(key)
        limit = min(run.count, room)
        count = limit if run.stop < 0 else int(rng.integers(1, limit + 1))
        ids, log_probs = rng.choice(allowed, count).astype(np.int32), np.full(count, -rng.random(), np.float32)
        samples.append(Sample([ids], [log_probs]))
    return samples
