"""CM3 masking: nothing is lost, nothing leaks, and spans have the right places and number."""

import math

import numpy as np
import pytest

from rac3.batches import draws
from rac3.batches.masking import TOKENS_PER_SPAN, Masking, choose_group_spans, choose_spans, mask_group, segments_of
from rac3.config import InputError
from rac3.tokens.html import Segment, Sequenced, encode
from rac3.tokens.vocabulary import END_OF_INFILL, EOD, IMAGE_ALT, IMAGE_END, IMAGE_SOURCE, NUM_MASKS, Vocabulary

VOCABULARY = Vocabulary(text_size=40, image_size=30)
MARKUP = (IMAGE_ALT, IMAGE_SOURCE, IMAGE_END, EOD)


def document(*sizes: int, rng: np.random.Generator) -> Sequenced:
    """A document of alternating texts and images with `sizes` ids; a size of 0 leaves one out."""
    segments = [
        Segment(bool(n % 2), rng.integers(0, 30 if n % 2 else 40, size)) for n, size in enumerate(sizes) if size
    ]
    return encode(VOCABULARY, segments)


SHAPES = [(6, 16), (5, 0), (0, 9), (3, 9, 4, 12, 2), (1, 1), (0, 4, 0, 4)]


def drawn(masking: Masking, shape: tuple[int, ...], count: int) -> list[tuple[Sequenced, np.ndarray]]:
    """`count` documents of a shape, each with its draws."""
    rng = np.random.default_rng(0)
    rows = draws.uniform(3, 0, np.arange(count), draws.MASK, masking.draws_per_document)
    return [(document(*shape, rng=rng), row) for row in rows]


def mask_one(masking: Masking, document: Sequenced, row: np.ndarray) -> Sequenced:
    return mask_group(masking, VOCABULARY, [document], row[None])[0]


def many(masking: Masking, shape: tuple[int, ...], count: int) -> list[tuple[Sequenced, np.ndarray, Sequenced]]:
    return [(sequence, row, mask_one(masking, sequence, row)) for sequence, row in drawn(masking, shape, count)]


def unmask(ids: np.ndarray, offsets: np.ndarray) -> tuple[list[int], list[int]]:
    """Undo masking: put each span back in place of its sentinel."""
    pairs = list(zip(ids.tolist(), offsets.tolist(), strict=True))
    masks = [n for n, (token, _) in enumerate(pairs) if VOCABULARY.mask_start <= token]
    body, tail = pairs[: masks[len(masks) // 2]] if masks else pairs[:-1], []
    spans: dict[int, list[tuple[int, int]]] = {}
    if masks:
        tail = pairs[masks[len(masks) // 2] : -1]
        for token in tail:
            if token[0] >= VOCABULARY.mask_start:
                spans[token[0]] = current = []
            elif token[0] != END_OF_INFILL:
                current.append(token)
    restored = [each for token in body for each in spans.get(token[0], [token])]
    restored.append(pairs[-1])
    return [token for token, _ in restored], [place for _, place in restored]


def test_the_example_of_the_module():
    t, i = [8, 9, 10], [48, 49, 50, 51]
    sequence = Sequenced(
        np.array([IMAGE_ALT, *t, IMAGE_SOURCE, *i, IMAGE_END, EOD], np.int32),
        np.array([0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 0], np.int32),
    )
    row = np.zeros(Masking().draws_per_document)
    row[0] = 0.5  # one span, as 0.368 < 0.5 < 0.736
    row[1:3] = 1.5 / 7, 3.5 / 10  # from the 2nd of 7 candidates to position 3 of 10: "red fox"
    masked = mask_one(Masking(), sequence, row)
    mask = VOCABULARY.mask(0)
    expected = [IMAGE_ALT, t[0], mask, IMAGE_SOURCE, *i, IMAGE_END, mask, *t[1:], END_OF_INFILL, EOD]
    np.testing.assert_array_equal(masked.ids, expected)
    np.testing.assert_array_equal(masked.offsets, [0, 1, 0, 0, 1, 2, 3, 4, 0, 0, 2, 3, 0, 0])


@pytest.mark.parametrize("preset", ["ra_cm3", "cm3", "cm3leon", "metaseq", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_unmasking_gives_the_document_back(preset, shape):
    masking = Masking(preset, mean_spans=3.0)
    for sequence, row, (ids, offsets) in many(masking, shape, 40):
        assert unmask(ids, offsets) == (sequence.ids.tolist(), sequence.offsets.tolist())
        assert len(ids) <= len(sequence.ids) + TOKENS_PER_SPAN * int(masking.num_spans(row[None])[0])
        assert ids.dtype == offsets.dtype == np.int32


@pytest.mark.parametrize("preset", ["ra_cm3", "cm3", "cm3leon"])
def test_spans_are_sorted_apart_and_inside_one_segment(preset):
    masking = Masking(preset, mean_spans=4.0)
    crossing = 0
    for sequence, row in drawn(masking, (6, 16, 5, 9), 150):
        spans = choose_spans(masking, sequence, row)
        flat = [edge for span in spans for edge in span]
        assert flat == sorted(flat)
        assert all(start < end < len(sequence.ids) for start, end in spans)  # never the final <eod>
        crossing += sum(bool(np.isin(sequence.ids[start:end], MARKUP).any()) for start, end in spans)
    assert (crossing > 0) == (preset == "cm3")  # markup separates any two segments


def test_masked_ids_are_never_seen_before_their_infill():
    """A span's ids occur nowhere before their infill, which would give away their loss."""
    rng = np.random.default_rng(0)
    sequence = encode(VOCABULARY, [Segment(False, rng.permutation(40)[:12]), Segment(True, rng.permutation(30)[:16])])
    masking = Masking("cm3", mean_spans=3.0)
    for row in draws.uniform(0, 0, np.arange(100), draws.MASK, masking.draws_per_document):
        ids = mask_one(masking, sequence, row).ids
        content = ids[(VOCABULARY.is_text(ids)) | (VOCABULARY.is_image(ids))]
        assert len(np.unique(content)) == len(content) == 28


def test_the_number_of_spans_is_poisson():
    """36.8% none, 36.8% one, 18.4% two, ...; standard deviations over 40,000 draws are below 0.0025."""
    masking = Masking()
    number = masking.num_spans(draws.uniform(0, 0, np.arange(40_000), draws.MASK))
    for k in range(5):
        assert (number == k).mean() == pytest.approx(math.exp(-1) / math.factorial(k), abs=0.01)
    for preset in ("cm3", "cm3leon"):
        clamped = Masking(preset).num_spans(draws.uniform(0, 0, np.arange(40_000), draws.MASK))
        np.testing.assert_array_equal(clamped, np.maximum(number, 1))
    assert not Masking("none").num_spans(draws.uniform(0, 0, np.arange(100), draws.MASK)).any()
    assert Masking(mean_spans=50.0, max_spans=5).num_spans(draws.uniform(0, 0, np.arange(100), 0)).max() == 5
    assert Masking(max_spans=2).num_spans(np.array([[0.0], [np.nextafter(1.0, 0.0)]])).tolist() == [0, 2]


def test_whole_captions_and_images_are_masked_now_and_then():
    """As in the prompts of captioning and image generation: `<img alt=" <mask:0> " src=" ...`."""
    wholes = {"text": 0, "image": 0}
    masking = Masking("cm3leon")
    for sequence, row in drawn(masking, (4, 9), 800):
        for start, end in choose_spans(masking, sequence, row):
            wholes["text"] += (start, end) == (1, 5)
            wholes["image"] += (start, end) == (6, 15)
    assert min(wholes.values()) >= 5


def test_a_share_of_the_spans_grows_to_the_whole_segment():
    """Over some 300 spans per setting, three standard deviations of a share are below 0.09."""

    def share_of_wholes(whole_segments: float) -> float:
        masking = Masking(whole_segments=whole_segments)
        spans = [
            span for sequence, row in drawn(masking, (12, 16), 400) for span in choose_spans(masking, sequence, row)
        ]
        return sum(span in ((1, 13), (14, 30)) for span in spans) / len(spans)

    by_chance = share_of_wholes(0.0)
    assert by_chance < 0.1
    assert share_of_wholes(0.5) == pytest.approx(0.5 + 0.5 * by_chance, abs=0.09)
    assert share_of_wholes(1.0) == 1


def test_a_short_caption_is_as_often_a_whole_span_as_a_long_image():
    """Of some 400 spans; by their ids, a caption would be in one of 35."""
    masking = Masking(whole_segments=1.0, mean_spans=0.5)
    spans = [span for sequence, row in drawn(masking, (30, 1024), 800) for span in choose_spans(masking, sequence, row)]
    assert np.mean([span == (1, 31) for span in spans]) == pytest.approx(0.5, abs=0.08)


#  <img alt=" t t t t " src=" i i i i i i "> <eod>     13 ids and <eod>; 10 of them are text or image
#  0          1 2 3 4 5       6 ...     11 12 13
FIRST, PLACE = 1 / 10, 1 / 13  # one draw picks one of the 10, the next one of the 13


@pytest.mark.parametrize(
    ("masking", "spans", "expected"),
    [
        (Masking(), [], []),
        (Masking(), [(2.5 * FIRST, 2.5 * PLACE, 0)], [(2, 4)]),
        (Masking(), [(0, 0, 0)], [(1, 2)]),  # one id; <img is never a candidate
        (Masking(), [(7.5 * FIRST, 11.5 * PLACE, 0), (2.5 * FIRST, 2.5 * PLACE, 0)], [(2, 4), (9, 12)]),  # sorted
        (Masking(), [(0.5 * FIRST, 12.5 * PLACE, 0), (9.5 * FIRST, 0, 0)], [(1, 5), (6, 12)]),  # clipped to segments
        (Masking(), [(0.5 * FIRST, 3.5 * PLACE, 0), (3.5 * FIRST, 4.5 * PLACE, 0)], [(1, 4), (4, 5)]),  # adjacent
        (Masking(), [(0.5 * FIRST, 3.5 * PLACE, 0), (3.5 * FIRST, 2.5 * PLACE, 0)], [(1, 4)]),  # an overlap: dropped
        (Masking("cm3leon"), [(3.5 * FIRST, 12.5 * PLACE, 0)], [(4, 5)]),
        (Masking("cm3"), [(11.5 * PLACE, 2.5 * PLACE, 0)], [(2, 12)]),  # over all 13 ids, markup included
        (Masking("cm3"), [(12.5 * PLACE, 0, 0)], [(0, 13)]),  # all but <eod>
        (Masking(whole_segments=0.5), [(1.5 * FIRST, 0, 0.4), (5.5 * FIRST, 0, 0.6)], [(1, 5), (6, 8)]),
        (
            Masking(whole_segments=0.5),
            [(4.5 * FIRST, 0.9, 0.4)],
            [(1, 5)],
        ),  # by number, although this id is the image's
        (Masking(whole_segments=0.5), [(5.5 * FIRST, 0, 0.4)], [(6, 12)]),
    ],
)
def test_spans_of_given_draws_by_hand(masking, spans, expected):
    sequence = document(4, 6, rng=np.random.default_rng(0))
    row = np.full(masking.draws_per_document, 0.99)
    row[0] = (0.3, 0.5, 0.8)[len(spans)]  # below 36.8% none, below 73.6% one, below 92.0% two
    row[1 : 1 + 3 * len(spans)] = np.ravel(spans)
    assert choose_spans(masking, sequence, row) == expected


def masked_contexts(preset: str, count: int) -> dict[str, float]:
    """How contexts of the paper's size are masked: two retrieved documents and the main one, of 30 and 1,024 ids."""
    masking = Masking(preset)
    one = document(30, 1024, rng=np.random.default_rng(0))
    rows = draws.uniform(0, 0, np.arange(3 * count), draws.MASK, masking.draws_per_document).reshape(count, 3, -1)
    spans = without = main = caption = tokens = 0
    for row in rows:
        if masking.per_group:
            chosen = choose_group_spans(masking, [one] * 3, row[-1])
        else:
            chosen = [choose_spans(masking, one, each) for each in row]
        spans += sum(map(len, chosen))
        without += not any(chosen)
        main += bool(chosen[-1])
        caption += any(start < 31 for start, _ in chosen[-1])
        tokens += sum(end - start for each in chosen for start, end in each)
    share = tokens / (3 * len(one.ids))
    figures = {"spans": spans, "without": without, "main": main, "caption": caption, "tokens": share}
    return {name: figure / count for name, figure in figures.items()}


@pytest.mark.parametrize(
    ("preset", "figures"),
    [
        ("metaseq", {"spans": 0.87, "without": 0.37, "main": 0.21, "caption": 0.0006, "tokens": 0.16}),
        ("ra_cm3", {"spans": 2.27, "without": 0.048, "main": 0.64, "caption": 0.029, "tokens": 0.22}),
    ],
)
def test_contexts_are_masked_as_often_as_by_the_public_code(preset: str, figures: dict[str, float]):
    """Measured with metaseq's own data sets (branch `scaling_racm3`), and before spans of a group were drawn at once.

    Over 10,000 contexts a share p has a standard deviation of sqrt(p (1 - p)) / 100, the number of spans (of variance
    below 3) of 0.017, and the masked share of 0.0022; five of them are allowed, and half of the figure's last digit.
    """
    found = masked_contexts(preset, 10_000)
    digit = {0.0006: 0.00005, 0.048: 0.0005, 0.029: 0.0005}
    deviations = {name: math.sqrt(figure * max(1 - figure, 0)) / 100 for name, figure in figures.items()}
    for name, figure in figures.items():
        deviation = (deviations | {"spans": 0.017, "tokens": 0.0022})[name]
        assert found[name] == pytest.approx(figure, abs=5 * deviation + digit.get(figure, 0.005)), name


#  <img alt=" t t t t " src=" i i i i i i "> <eod> t t t <eod>
#  0          1 2 3 4 5       6 ...     11 12 13  14    17        18 ids
GROUP = 1 / 18


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([(2.2, 4.2)], [[(2, 4)], []]),
        ([(4.2, 2.2)], [[(2, 4)], []]),  # the ends in any order
        ([(0.0, 17.9)], [[(6, 12)], []]),  # everything: clipped to the image, which is longest
        ([(3.2, 8.2)], [[(3, 5)], []]),  # two of the text and two of the image: the first
        ([(3.2, 9.2)], [[(6, 9)], []]),
        ([(10.2, 17.2)], [[], [(0, 3)]]),  # two of the image and the whole text of the next document
        ([(12.2, 14.2)], [[], []]),  # markup alone
        ([(7.1, 7.2)], [[], []]),  # empty: nothing is masked, where the public code masks the id after it
        ([(0.0, 0.1)], [[], []]),
        ([(2.2, 4.2), (3.2, 8.2), (6.2, 8.2), (14.2, 16.2)], [[(2, 4), (6, 8)], []]),  # the first two of four
        ([(6.2, 8.2), (2.2, 4.2), (0, 0), (0, 0)], [[(2, 4), (6, 8)], []]),  # sorted
        ([(8.2, 9.2), (10.2, 15.2), (0.2, 12.2), (0, 0)], [[(8, 9), (10, 12)], []]),
    ],
)
def test_spans_of_a_group_by_hand(pairs, expected):
    """Given in places of the group; candidates are k^2, which overlap or not before they are clipped."""
    documents = [document(4, 6, rng=np.random.default_rng(0)), document(3, rng=np.random.default_rng(1))]
    masking = Masking("metaseq")
    row = np.full(masking.draws_per_document, 0.5)
    row[0] = {1: 0.5, 4: 0.8}[len(pairs)]  # one span, or two
    row[1 : 1 + 2 * len(pairs)] = np.ravel(pairs) * GROUP
    assert choose_group_spans(masking, documents, row) == expected
    others = np.full((1, masking.draws_per_document), 0.7)
    masked = mask_group(masking, VOCABULARY, documents, np.concatenate([others, row[None]]))
    for one, whole, spans in zip(masked, documents, expected, strict=True):
        assert unmask(*one) == (whole.ids.tolist(), whole.offsets.tolist())
        assert len(one.ids) == len(whole.ids) + 3 * len(spans)


def test_the_segments_of_a_document():
    for shape in SHAPES:
        sequence = document(*shape, rng=np.random.default_rng(0))
        runs, start = [], None
        for place, token in enumerate(sequence.ids):
            if token in MARKUP:
                runs += [(start, place)] if start is not None else []
                start = None
            elif start is None:
                start = place
        assert segments_of(sequence) == runs


def test_as_many_spans_as_there_are_sentinels():
    masking = Masking(mean_spans=200.0)
    assert masking.max_spans == VOCABULARY.num_masks == NUM_MASKS
    for sequence, row, (ids, offsets) in many(masking, (3,) * 100, 20):
        number = len(choose_spans(masking, sequence, row))
        assert 12 <= number <= 16  # of 16 in 100 segments, a pair or two hit the same one
        assert unmask(ids, offsets) == (sequence.ids.tolist(), sequence.offsets.tolist())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mean_spans": 0.0}, "mean_spans=0.0"),
        ({"max_spans": 0}, "max_spans=0"),
        ({"whole_segments": 1.5}, "whole_segments=1.5 is outside 0 to 1"),
        ({"preset": "metaseq", "whole_segments": 0.5}, "whole_segments=0.5 has no meaning for preset metaseq"),
        ({"preset": "cm3", "whole_segments": 0.5}, "whole_segments=0.5 has no meaning for preset cm3"),
        ({"max_spans": NUM_MASKS + 1}, "max_spans=17 is outside 1 to 16"),
    ],
)
def test_fields_are_checked(fields: dict, message: str):
    with pytest.raises(InputError, match=message):
        Masking(**fields)
