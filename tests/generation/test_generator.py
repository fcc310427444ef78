"""Samples of several prompts: whose each is, and that all are drawn apart."""

import numpy as np
import pytest
from decoding_spy import Call

from rac3.generation.generator import Generator
from rac3.generation.request import Draw
from rac3.generation.sampling import Sampling
from rac3.tokens.vocabulary import END_OF_INFILL

ALL = np.arange(128)
TEXT, IMAGE = (ALL >= 8) & (ALL < 48), (ALL >= 48) & (ALL < 78)
PROMPTS = [np.array([1, 2, *text, 3], np.int32) for text in ([8, 9, 10], [20, 21, 22, 23, 24], [40])]


def test_samples_stand_with_their_prompt(generator: Generator):
    """At temperature 0 they are the best ids, which the prompt alone gives too."""
    text = Draw(TEXT, 6, END_OF_INFILL)
    nested, means = generator.samples(PROMPTS, text, Sampling(temperature=0.0), 2, seed=0)
    assert means.shape == (3, 2)
    assert len({tuple(samples[0].tolist()) for samples in nested}) == 3
    for prompt, samples, row in zip(PROMPTS, nested, means, strict=True):
        (alone,), (mean,) = generator.samples([prompt], text, Sampling(temperature=0.0), 1, seed=1)
        assert [ids.tolist() for ids in samples] == [alone[0].tolist()] * 2
        np.testing.assert_allclose(row, mean[0], atol=1e-4)


def test_all_samples_of_all_prompts_are_drawn_apart(generator: Generator, calls: list[Call]):
    nested, _ = generator.samples(PROMPTS, Draw(IMAGE, 9), Sampling(), 4, seed=0)
    assert len(set(calls[0].keys)) == 12
    assert len({tuple(ids.tolist()) for samples in nested for ids in samples}) == 12


def test_a_sample_depends_on_its_prompt_and_number_alone(generator: Generator):
    """Not on the other prompts of the call, on their order, or on how many samples are drawn."""
    grammar = Draw(IMAGE, 9)

    def drawn(prompts: list[np.ndarray], count: int) -> list[list[list[int]]]:
        nested, _ = generator.samples(prompts, grammar, Sampling(), count, seed=3)
        return [[ids.tolist() for ids in samples] for samples in nested]

    together = drawn(PROMPTS, 3)
    assert drawn(PROMPTS[::-1], 3) == together[::-1]
    assert [drawn([prompt], 3)[0] for prompt in PROMPTS] == together
    assert drawn([PROMPTS[1], PROMPTS[0], PROMPTS[1]], 2) == [together[number][:2] for number in (1, 0, 1)]
    assert [samples[:3] for samples in drawn(PROMPTS, 5)] == together


@pytest.mark.parametrize("seed", [0, 5])
def test_samples_are_a_function_of_the_seed(generator: Generator, seed: int):
    def drawn(seed: int) -> list[list[int]]:
        nested, _ = generator.samples(PROMPTS, Draw(IMAGE, 9), Sampling(), 2, seed)
        return [ids.tolist() for samples in nested for ids in samples]

    first = drawn(seed)
    assert drawn(seed) == first
    assert not [ids for ids in drawn(seed + 1) if ids in first]
