"""The id ranges: disjoint, in order and without gaps."""

import numpy as np
import pytest

from rac3.tokens.vocabulary import (
    END_OF_INFILL,
    EOD,
    IMAGE_ALT,
    IMAGE_END,
    IMAGE_SOURCE,
    NUM_SPECIALS,
    PAD,
    SPECIAL_NAMES,
    Vocabulary,
)

VOCABULARY = Vocabulary(text_size=300, image_size=64)


def test_every_id_is_of_one_range():
    ids = np.arange(VOCABULARY.padded_size)
    ranges = [ids < NUM_SPECIALS, VOCABULARY.is_text(ids), VOCABULARY.is_image(ids), VOCABULARY.is_mask(ids)]
    assert [int(each.sum()) for each in ranges] == [8, 300, 64, 16]
    np.testing.assert_array_equal(sum(each.astype(int) for each in ranges), ids < VOCABULARY.size)
    assert len(SPECIAL_NAMES) == NUM_SPECIALS


def test_each_special_has_its_own_id_and_name():
    specials = {PAD: "<pad>", EOD: "<eod>", IMAGE_ALT: '<img alt="', IMAGE_SOURCE: '" src="', IMAGE_END: '">'}
    specials |= {END_OF_INFILL: "<eoi>", 6: "<spare:0>", 7: "<spare:1>"}
    assert specials == dict(enumerate(SPECIAL_NAMES))


def test_shifts_fill_their_ranges_in_order():
    ids = np.arange(VOCABULARY.size)
    np.testing.assert_array_equal(VOCABULARY.from_text(np.arange(300)), ids[VOCABULARY.is_text(ids)])
    np.testing.assert_array_equal(VOCABULARY.from_image(np.arange(64)), ids[VOCABULARY.is_image(ids)])
    np.testing.assert_array_equal([VOCABULARY.mask(i) for i in range(16)], ids[VOCABULARY.is_mask(ids)])
    assert VOCABULARY.from_text(np.zeros(0, np.int64)).dtype == np.int32


def test_text_and_image_ids_stay_where_they_are_with_more_sentinels():
    more = Vocabulary(300, 64, num_masks=32)
    np.testing.assert_array_equal(more.from_image(np.arange(64)), VOCABULARY.from_image(np.arange(64)))


def test_the_table_is_a_multiple_of_128():
    assert VOCABULARY.size == 388
    assert VOCABULARY.padded_size == 512
    assert Vocabulary(104, 0).size == Vocabulary(104, 0).padded_size == 128


@pytest.mark.parametrize(("ids", "bad"), [([0, 300], 300), ([-1, 5], -1)])
def test_an_id_outside_its_range_is_named(ids: list[int], bad: int):
    with pytest.raises(ValueError, match=f"text id {bad} is outside the vocabulary's 300; use 0 to 299"):
        VOCABULARY.from_text(np.array(ids))
    with pytest.raises(ValueError, match=f"image code {bad} is outside the vocabulary's 64; use 0 to 63"):
        VOCABULARY.from_image(np.array(ids))


@pytest.mark.parametrize("index", [-1, 16])
def test_there_are_sixteen_masks(index: int):
    with pytest.raises(ValueError, match=f"mask {index} is outside the 16 sentinels; use 0 to 15"):
        VOCABULARY.mask(index)
