"""Images of captions: the prompt, and the order of the samples."""

import numpy as np
from decoding_spy import Call

from rac3.generation.generator import Generator
from rac3.generation.images import generate_images
from rac3.generation.sampling import Sampling
from rac3.tokens.html import Segment, encode

CAPTIONS = [[0, 1, 2], [39], [5, 5, 6, 7]]


def test_codes_stand_by_caption_and_sample(generator: Generator, calls: list[Call]):
    retrieved = [[], [encode(generator.vocabulary, [Segment(True, np.arange(9)), Segment(False, np.arange(4))])], []]
    sampling = Sampling(0.9, 0.8)
    codes = generate_images(generator, CAPTIONS, retrieved, sampling, 2, seed=1)
    assert codes.shape == (3, 2, 9)
    assert calls[0].sampling == sampling
    for drawn, caption, documents, (prompt, samples, _) in zip(
        codes, CAPTIONS, retrieved, calls[0].samples(2), strict=True
    ):
        before = [id for document in documents for id in document.ids]
        assert prompt == [1, *before, 2, *(8 + id for id in caption), 3]
        assert drawn.tolist() == [[id - 48 for id in ids] for ids in samples]


def test_the_seed_is_passed_on(generator: Generator):
    first, second = (generate_images(generator, CAPTIONS, [[]] * 3, Sampling(), 2, seed) for seed in (0, 1))
    assert (first != second).any(axis=2).all()
