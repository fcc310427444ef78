"""What reaches the engine, and what it gives: the last place before ids are drawn."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest

from rac3.generation.engine import Engine
from rac3.generation.request import Draw, Request, Sample
from rac3.generation.sampling import Sampling


class Call(NamedTuple):
    """One call of `Engine.run`."""

    requests: list[Request]
    samplings: list[Sampling]
    seeds: list[int]
    out: list[list[Sample]]

    @property
    def prompts(self) -> list[list[int]]:
        """The first prompt of each request."""
        return [request.prompts[0].ids.tolist() for request in self.requests]

    @property
    def keys(self) -> list[tuple[object, ...]]:
        """All that a sample depends on, besides the model."""
        return [
            (seed, tuple(prompt), request.first + number)
            for request, prompt, seed in zip(self.requests, self.prompts, self.seeds, strict=True)
            for number in range(request.samples)
        ]

    @property
    def sampling(self) -> Sampling:
        """That of all requests."""
        first, *others = self.samplings
        assert all(each == first for each in others)
        return first

    @property
    def draws(self) -> list[Draw]:
        """The only run of each request."""
        return [run for request in self.requests for run in request.grammar if isinstance(run, Draw)]

    def samples(self) -> list[tuple[list[int], list[list[int]], list[float]]]:
        """(prompt, ids of each sample, their mean log probabilities) of each request of one run."""
        return [
            (prompt, [sample.runs[0].tolist() for sample in samples], [sample.mean_log_prob for sample in samples])
            for prompt, samples in zip(self.prompts, self.out, strict=True)
        ]


def watch_decoding(monkeypatch: pytest.MonkeyPatch, real: bool = True) -> list[Call]:
    """The calls of the engine from now on, as they come; without `real`, its answers are made up (see `made_up`)."""
    calls: list[Call] = []
    run = Engine.run

    def watched(
        self: Engine,
        requests: Sequence[Request],
        samplings: Sequence[Sampling],
        seeds: Sequence[int],
        progress=None,
        steps=None,
    ):
        if real:
            found = dict(run(self, requests, samplings, seeds, progress, steps))
        else:
            found = {number: made_up(self, *each) for number, each in enumerate(zip(requests, seeds, strict=True))}
        out = [found[number] for number in range(len(requests))]
        calls.append(Call([*requests], [*samplings], [*seeds], out))
        return iter(found.items())

    monkeypatch.setattr(Engine, "run", watched)
    return calls


def made_up(engine: Engine, request: Request, seed: int) -> list[Sample]:
    """What the grammar allows, drawn evenly: without a model, hence at once."""
    longest = max(len(prompt.ids) for prompt in request.prompts)
    needed = sum(run.count + (run.stop >= 0) if isinstance(run, Draw) else len(run.ids) for run in request.grammar)
    assert longest + needed <= engine.model.max_positions
    samples = []
    for number in range(request.first, request.first + request.samples):
        key = hashlib.sha256(repr((seed, request.prompts[0].ids.tolist(), number)).encode()).digest()
        rng = np.random.default_rng([*key])
        runs, scores = [], []
        for run in request.grammar:
            if isinstance(run, Draw):
                count = run.count if run.stop < 0 else int(rng.integers(1, run.count + 1))
                allowed = np.setdiff1d(np.flatnonzero(run.allowed), [run.stop])
                runs.append(rng.choice(allowed, count).astype(np.int32))
                scores.append(-rng.random(count, np.float32))
        samples.append(Sample(runs, scores))
    return samples
