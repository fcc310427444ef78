"""Captions of images: the prompt, the sample that is kept, and how long it may be."""

import numpy as np
import pytest
from decoding_spy import Call

from rac3.config import InputError
from rac3.generation.captions import generate_captions
from rac3.generation.generator import Generator
from rac3.generation.sampling import Sampling
from rac3.tokens.html import Segment, Sequenced, encode
from rac3.tokens.vocabulary import Vocabulary

IMAGES = [np.arange(start, start + 9, dtype=np.int32) for start in (0, 10, 20)]
MASK = 78  # after the 8 specials, 40 text ids and 30 codes


def document(vocabulary: Vocabulary, size: int) -> Sequenced:
    """Of `size` ids: a text, and an image of one code, shorter than real ones."""
    return encode(vocabulary, [Segment(False, np.arange(size - 5)), Segment(True, np.array([3]))])


def test_each_image_gets_its_most_probable_caption(generator: Generator, calls: list[Call]):
    """As ids of the text tokenizer, which begin at 0."""
    retrieved = [[document(generator.vocabulary, 8)], [], [document(generator.vocabulary, 10)]]
    captions = generate_captions(generator, IMAGES, retrieved, Sampling(), 5, 6, seed=3)
    kept = []
    for caption, codes, documents, (prompt, samples, means) in zip(
        captions, IMAGES, retrieved, calls[0].samples(5), strict=True
    ):
        before = [id for document in documents for id in document.ids]
        assert prompt == [1, *before, 2, MASK, 3, *(48 + codes), 4, MASK]
        kept.append(int(np.argmax(means)))
        assert caption.tolist() == [id - 8 for id in samples[kept[-1]]]
    assert set(kept) != {0}  # or the order of the samples would decide


def test_samples_and_seed_are_passed_on(generator: Generator, calls: list[Call]):
    sampling = Sampling(0.7, 0.9)
    for seed in (0, 1):
        generate_captions(generator, IMAGES, [[]] * 3, sampling, 2, 4, seed)
    assert [len(call.prompts) for call in calls] == [6, 6]
    assert [call.sampling for call in calls] == [sampling, sampling]
    assert not set(calls[0].keys) & set(calls[1].keys)


def lengths(call: Call, samples: int) -> list[int]:
    """Of the longest sample of each prompt."""
    return [max(map(len, ids)) for _, ids, _ in call.samples(samples)]


@pytest.mark.parametrize(("asked", "limits"), [(2, (2, 2)), (3, (3, 3)), (4, (3, 4)), (50, (3, 49))])
def test_a_caption_ends_where_its_context_does(
    generator: Generator, calls: list[Call], asked: int, limits: tuple[int, int]
):
    """One prompt has 61 of the 64 positions, and the other one 15."""
    longest = [document(generator.vocabulary, 39), document(generator.vocabulary, 7)]
    captions = generate_captions(generator, IMAGES[:2], [longest, []], Sampling(), 40, asked, seed=0)
    assert [len(prompt) for prompt, _, _ in calls[0].samples(40)] == [61, 15]
    first, second = lengths(calls[0], 40)
    assert first == limits[0]
    assert limits[0] < second <= limits[1] or second == limits[1]
    assert len(captions[0]) <= limits[0]


def test_a_caption_next_to_a_long_prompt_is_the_caption_alone(generator: Generator, calls: list[Call]):
    """And the other way around: neither prompt changes how long the captions of the other may be."""
    longest = [document(generator.vocabulary, 39), document(generator.vocabulary, 7)]
    both, *alone = (
        [caption.tolist() for caption in generate_captions(generator, images, retrieved, Sampling(), 20, 30, seed=1)]
        for images, retrieved in ((IMAGES[:2], [longest, []]), (IMAGES[:1], [longest]), (IMAGES[1:2], [[]]))
    )
    assert both == [caption for captions in alone for caption in captions]
    together, *parts = ([(ids, means) for _, ids, means in call.samples(20)] for call in calls)
    for (ids, means), (own_ids, own_means) in zip(together, [part for each in parts for part in each], strict=True):
        assert ids == own_ids
        np.testing.assert_allclose(means, own_means, atol=1e-4)
    assert lengths(calls[0], 20)[0] == 3 < lengths(calls[0], 20)[1]


def test_a_prompt_that_leaves_no_room_for_a_caption_is_refused(generator: Generator):
    longest = [document(generator.vocabulary, 39), document(generator.vocabulary, 10)]
    with pytest.raises(InputError, match="a prompt of 64 tokens and 1 to generate exceed the 64 positions"):
        generate_captions(generator, IMAGES[:1], [longest], Sampling(), 1, 5, seed=0)
