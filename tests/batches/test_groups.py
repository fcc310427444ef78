"""Groups: retrieved documents, then the main one, with the weight and kind of each target."""

import numpy as np

from rac3.batches import draws
from rac3.batches.groups import GroupBuilder
from rac3.batches.masking import Masking
from rac3.batches.packing import (
    IGNORED,
    MAIN_IMAGE,
    MAIN_TEXT,
    MARKUP,
    RETRIEVED_IMAGE,
    RETRIEVED_TEXT,
)
from rac3.documents.store import Tokens
from rac3.tokens.vocabulary import END_OF_INFILL, EOD, IMAGE_ALT, IMAGE_END, IMAGE_SOURCE, Vocabulary

VOCABULARY = Vocabulary(text_size=40, image_size=30)


def item(text: list[int], codes: list[int]) -> Tokens:
    parts = ((False, np.array(text, np.int32)), (True, np.array(codes, np.int32)))
    return tuple(part for part in parts if len(part[1]))


ITEMS = [item([1, 2], [3, 4, 5]), item([6], []), item([7, 8], [9, 10])]


def test_an_unmasked_group_by_hand():
    builder = GroupBuilder(VOCABULARY, Masking("none"), 0.1)
    group = builder.build(ITEMS, np.zeros((3, builder.masking.draws_per_document)))
    t, i = 8, 48
    retrieved = [IMAGE_ALT, t + 1, t + 2, IMAGE_SOURCE, i + 3, i + 4, i + 5, IMAGE_END, EOD, t + 6, EOD]
    main = [IMAGE_ALT, t + 7, t + 8, IMAGE_SOURCE, i + 9, i + 10, IMAGE_END, EOD]
    np.testing.assert_array_equal(group.tokens, [EOD, *retrieved, *main[:-1]])
    np.testing.assert_array_equal(group.targets, [*retrieved, *main])
    np.testing.assert_array_equal(group.offsets, [0, 0, 1, 2, 0, 1, 2, 3, 0, 0, 1, 0, 0, 1, 2, 0, 1, 2, 0])
    np.testing.assert_array_equal(group.loss_weight, np.float32([0.1] * len(retrieved) + [1.0] * len(main)))
    text, image = RETRIEVED_TEXT, RETRIEVED_IMAGE
    kinds = [MARKUP, text, text, MARKUP, image, image, image, MARKUP, MARKUP, text, MARKUP]
    kinds += [MARKUP, MAIN_TEXT, MAIN_TEXT, MARKUP, MAIN_IMAGE, MAIN_IMAGE, MARKUP, MARKUP]
    np.testing.assert_array_equal(group.kind, kinds)


def test_weights_and_kinds_of_masked_groups():
    """The oracle walks over the targets, counting the documents, which the targets alone do not tell."""
    builder = GroupBuilder(VOCABULARY, Masking("cm3leon"), 0.25)
    rows = draws.uniform(0, 0, np.arange(300), draws.MASK, builder.masking.draws_per_document).reshape(100, 3, -1)
    seen = set()
    for row in rows:
        group = builder.build(ITEMS, row)
        document = 0
        assert group.tokens[0] == EOD
        np.testing.assert_array_equal(group.tokens[1:], group.targets[:-1])
        for target, weight, kind in zip(group.targets, group.loss_weight, group.kind, strict=True):
            main, one = document == 2, np.array([target])
            if VOCABULARY.is_mask(one)[0]:
                expected = (0.0, IGNORED)
            elif VOCABULARY.is_text(one)[0]:
                expected = (1.0, MAIN_TEXT) if main else (0.25, RETRIEVED_TEXT)
            elif VOCABULARY.is_image(one)[0]:
                expected = (1.0, MAIN_IMAGE) if main else (0.25, RETRIEVED_IMAGE)
            else:
                expected = (1.0 if main else 0.25, MARKUP)
            assert (weight, kind) == expected
            seen.add(expected)
            document += target == EOD
        assert document == 3
    assert len(seen) == 7


def test_each_document_is_masked_by_its_own_row_of_draws():
    """One span in the first document: "2" of "1 2"; two in the last: "7", and "9 10"."""
    builder = GroupBuilder(VOCABULARY, Masking(), 0.1)
    rows = np.zeros((3, builder.masking.draws_per_document))
    rows[0, :3] = 0.5, 1.5 / 5, 2.5 / 8  # from the 2nd of 5 text and image ids to position 2 of 8
    rows[2, :7] = 0.8, 0.5 / 4, 1.5 / 7, 0, 2.5 / 4, 5.5 / 7, 0
    t, i, mask = 8, 48, VOCABULARY.mask(0)
    retrieved = [IMAGE_ALT, t + 1, mask, IMAGE_SOURCE, i + 3, i + 4, i + 5, IMAGE_END, mask, t + 2, END_OF_INFILL, EOD]
    main = [IMAGE_ALT, mask, t + 8, IMAGE_SOURCE, mask + 1, IMAGE_END]
    main += [mask, t + 7, END_OF_INFILL, mask + 1, i + 9, i + 10, END_OF_INFILL, EOD]
    group = builder.build(ITEMS, rows)
    np.testing.assert_array_equal(group.targets, [*retrieved, t + 6, EOD, *main])
    weight = np.float32([0.1] * (len(retrieved) + 2) + [1.0] * len(main))
    np.testing.assert_array_equal(group.loss_weight, weight * ~VOCABULARY.is_mask(group.targets))


def test_a_document_may_be_its_own_neighbor_by_content():
    """Web data has duplicates: the same document twice is one retrieved and one main document."""
    builder = GroupBuilder(VOCABULARY, Masking("none"), 0.0)
    group = builder.build([ITEMS[0], ITEMS[0]], np.zeros((2, builder.masking.draws_per_document)))
    half = len(group.targets) // 2
    np.testing.assert_array_equal(group.loss_weight, [0.0] * half + [1.0] * half)


def test_a_group_of_one():
    builder = GroupBuilder(VOCABULARY, Masking("none"), 0.1)
    group = builder.build(ITEMS[1:2], np.zeros((1, builder.masking.draws_per_document)))
    np.testing.assert_array_equal(group.targets, [14, EOD])
    np.testing.assert_array_equal(group.loss_weight, [1.0, 1.0])


def test_a_group_shows_of_retrieved_documents_what_it_should():
    between = ((False, np.array([1])), (True, np.array([3, 4])), (False, np.array([2])))
    documents, t, i = [*ITEMS[:2], between, ITEMS[2]], 8, 48
    main = [IMAGE_ALT, t + 7, t + 8, IMAGE_SOURCE, i + 9, i + 10, IMAGE_END, EOD]
    texts = GroupBuilder(VOCABULARY, Masking("none"), 0.1, "text")
    no_draws = np.zeros((4, texts.masking.draws_per_document))
    group = texts.build(documents, no_draws)
    retrieved = [t + 1, t + 2, EOD, t + 6, EOD, t + 1, t + 2, EOD]
    np.testing.assert_array_equal(group.targets, [*retrieved, *main])
    assert not (group.kind == RETRIEVED_IMAGE).any()
    images = GroupBuilder(VOCABULARY, Masking("none"), 0.1, "image")
    assert images.shown(ITEMS[1]) is None
    group = images.build([documents[0], *documents[2:]], no_draws[1:])
    head, tail = [IMAGE_ALT, IMAGE_SOURCE], [IMAGE_END, EOD]
    retrieved = [*head, i + 3, i + 4, i + 5, *tail, *head, i + 3, i + 4, *tail]
    np.testing.assert_array_equal(group.targets, [*retrieved, *main])
    assert not (group.kind == RETRIEVED_TEXT).any()
    for builder, lengths in ((texts, [3, 2, 3, 3]), (images, [7, 6, 6])):
        assert [len(each.ids) for each in builder.retrieved_sequences(documents)] == lengths
