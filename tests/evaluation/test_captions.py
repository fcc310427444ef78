"""Scores of captions, by hand, by short oracles, and as pycocoevalcap 1.2 has them."""

import json
import math
import shutil
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from rac3.evaluation.captions import (
    bleu,
    bleu_counts,
    caption_metrics,
    cider_d,
    java_metrics,
    rouge_l,
    tokenize,
)

CAPTIONS = [
    "a red kite over the old harbor",
    "two goats on a roof",
    "two goats",
    "an empty bench in the snow",
    "a bench a bench a bench",
]
REFERENCES = [
    ["A red kite flies over the harbor.", "The old harbor, and a kite over it!"],
    ["Two goats stand on the roof of a shed.", "goats on a roof"],
    ["Two goats, on a roof."],
    ["A bench in deep snow.", "An empty bench, in the snow.", "snow"],
    ["A bench.", "The bench is empty."],
]
MADE = [caption.split() for caption in CAPTIONS]
RIGHT = [[tokenize(reference) for reference in each] for each in REFERENCES]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("The baker's oven, isn't it?", "the baker 's oven is n't it"),
        ("Don't! They can't, won't, I'm sure.", "do n't they ca n't wo n't i 'm sure"),
        ("the boys' kites; 'blue' \"green\" “red”", "the boys kites blue green red"),
        ("a sign (in red) - and -- one... more", "a sign -lrb- in red -rrb- and one more"),
        ("7th & Oak St. at 5 p.m., $3.50, 20%", "7th & oak st. at 5 p.m. $ 3.50 20 %"),
        ("Mr. Fox of the U.S. and Dr. Owl", "mr. fox of the u.s. and dr. owl"),
        ("the end. of it. no. 7, no. seven", "the end of it no. 7 no seven"),
        ("a two-year-old T-shirt and/or 3,000 x-rays", "a two-year-old t-shirt and/or 3,000 x-rays"),
        ("seven o'clock, rock 'n' roll, O'Neill", "seven o'clock rock 'n' roll o'neill"),
        ("I cannot, gonna", "i can not gon na"),
        ("really?! yes!! no!", "really ?! yes !! no"),
        ("Crème brûlée\tand\nsoufflé", "crème brûlée and soufflé"),
        ("AT&T &amp; A &lt; B", "at&t & a < b"),
        ("one 1 1/2 cup", "one 1\N{NO-BREAK SPACE}1/2 cup"),
        ("the sea.A boat", "the sea.a boat"),
        ("£5 €6 7¢ ½", "# 5 $ 6 7 cents 1/2"),
        ("a man, a dog,a cat.", "a man a dog a cat"),
        (" . , ; : ! ? ", ""),
    ],
)
def test_tokens_are_those_of_the_treebank(text: str, tokens: str) -> None:
    """What CoreNLP's tokenizer, run with pycocoevalcap's options and list of punctuation, makes of them."""
    assert tokenize(text) == (tokens.split(" ") if tokens else [])


def test_bleu_by_hand() -> None:
    """the cat sat on the mat / the cat is on the mat: 5 of 6, 3 of 5, 1 of 4 and 0 of 3; lengths are equal.

    Then a caption of two tokens, whose nearest reference has three: exp(1 - 3 / 2).
    """
    counts = bleu_counts(
        [["the", "cat", "sat", "on", "the", "mat"]], [[["the", "cat", "is", "on", "the", "mat"], ["the"] * 9]]
    )
    assert counts.tolist() == [[5, 3, 1, 0, 6, 5, 4, 3, 6, 6]]
    one, two, three, four = bleu(counts)
    assert [one, two, three] == pytest.approx([5 / 6, (5 / 6 * 3 / 5) ** (1 / 2), (5 / 6 * 3 / 5 / 4) ** (1 / 3)])
    assert four < 1e-3
    short = bleu_counts([["a", "b"]], [[["a", "c", "b"], ["a", "b", "c", "d"]]])
    assert bleu(short)[0] == pytest.approx(math.exp(-1 / 2))


def test_bleu_adds_up_before_it_divides() -> None:
    """1 of 1 and 0 of 3 are 1 of 4, not a half; a repeated token counts as often as one reference has it."""
    counts = bleu_counts([["a"], ["x", "x", "x"]], [[["a"]], [["a", "b", "c"]]])
    assert bleu(counts)[0] == pytest.approx(1 / 4)
    clipped = bleu_counts([["a"] * 5], [[["a", "a", "b", "b", "c"], ["a", "c", "c", "d", "d"]]])
    assert clipped[0, 0] == 2


def test_the_reference_of_the_nearest_length_counts() -> None:
    assert bleu_counts([["a"] * 4], [[["b"] * 6, ["b"] * 5, ["b"] * 3]])[0, -1] == 3  # the shorter of two
    assert bleu_counts([["a"] * 4], [[["b"] * 6, ["b"] * 5, ["b"] * 2]])[0, -1] == 5


def test_rouge_by_hand() -> None:
    """a b c d / a x c d y: the longest common subsequence is a c d; precision 3 / 4, recall 3 / 5."""
    score = (1 + 1.44) * (3 / 4) * (3 / 5) / (3 / 5 + 1.44 * 3 / 4)
    assert rouge_l([list("abcd")], [[list("axcdy")]]).tolist() == pytest.approx([score])
    # The best precision and the best recall may be of different references: 3 / 4, and 1 / 1.
    both = (1 + 1.44) * (3 / 4) * 1 / (1 + 1.44 * 3 / 4)
    assert rouge_l([list("abcd")], [[list("axcdy"), ["b"]]]).tolist() == pytest.approx([both])
    assert rouge_l([[], ["a"]], [[["a"]], [["b"]]]).tolist() == [0, 0]


def test_rouge_agrees_with_all_subsequences() -> None:
    def longest(a: list[str], b: list[str]) -> int:
        def is_within(part: tuple[str, ...], whole: list[str]) -> bool:
            rest = iter(whole)
            return all(token in rest for token in part)

        return max((n for n in range(len(a) + 1) for part in combinations(a, n) if is_within(part, b)), default=0)

    for caption, each, score in zip(MADE, RIGHT, rouge_l(MADE, RIGHT), strict=True):
        precision = max(longest(caption, reference) / len(caption) for reference in each)
        recall = max(longest(caption, reference) / len(reference) for reference in each)
        assert score == pytest.approx((1 + 1.44) * precision * recall / (recall + 1.44 * precision))


def test_cider_agrees_with_dense_vectors() -> None:
    """Equation 1 and 2 of arXiv 1411.5726 over the whole vocabulary, with the clipping and the penalty of CIDEr-D."""

    def ngrams(tokens: list[str], n: int) -> list[str]:
        return [" ".join(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]

    scores = np.zeros(len(MADE))
    for n in (1, 2, 3, 4):
        sets = [[Counter(ngrams(reference, n)) for reference in each] for each in RIGHT]
        every = sorted({gram for each in [*RIGHT, MADE] for tokens in each for gram in ngrams(tokens, n)})
        idf = [math.log(len(MADE) / max(1, sum(any(gram in one for one in each) for each in sets))) for gram in every]
        for row, (caption, each) in enumerate(zip(MADE, RIGHT, strict=True)):
            ours = np.array([ngrams(caption, n).count(gram) for gram in every]) * idf
            for reference, counts in zip(each, sets[row], strict=True):
                right = np.array([counts[gram] for gram in every]) * idf
                norms = np.linalg.norm(ours) * np.linalg.norm(right)
                shorter = max(0, len(caption) - 1) - max(0, len(reference) - 1)
                cosine = np.minimum(ours, right) @ right / norms if norms else 0.0
                scores[row] += 10 * math.exp(-(shorter**2) / 72) * cosine / len(each) / 4
    assert cider_d(MADE, RIGHT) == pytest.approx(scores)
    assert scores.min() > 0.1


def test_cider_at_its_ends() -> None:
    """10 for a caption that is its only reference; 0 for an empty one, and where no other image is there."""
    words = ["one", "small", "boat", "sails", "home"]
    assert cider_d([words, [], ["x"]], [[words], [["a", "b"]], [["c"]]]).tolist() == pytest.approx([10, 0, 0])
    assert cider_d([words], [[words]]).tolist() == [0]


def test_all_scores_with_intervals() -> None:
    metrics = caption_metrics(CAPTIONS, REFERENCES)
    assert metrics["captions"] == 5
    assert metrics["cider_d"]["value"] == pytest.approx(cider_d(MADE, RIGHT).mean())
    assert metrics["rouge_l"]["value"] == pytest.approx(rouge_l(MADE, RIGHT).mean())
    each = bleu(bleu_counts(MADE, RIGHT))
    assert [metrics[f"bleu_{n}"]["value"] for n in (1, 2, 3, 4)] == pytest.approx(each.tolist())
    for name in ("cider_d", "bleu_1", "bleu_4", "rouge_l"):
        assert metrics[name]["low"] < metrics[name]["value"] < metrics[name]["high"]
    assert caption_metrics(CAPTIONS, REFERENCES) == metrics


def test_a_score_over_nothing_is_no_number() -> None:
    assert set(caption_metrics([], []).values()) == {0, None}
    one = caption_metrics(CAPTIONS[:1], REFERENCES[:1])
    assert one["cider_d"] is None
    assert one["rouge_l"]["low"] == one["rouge_l"]["value"] == one["rouge_l"]["high"]


@pytest.mark.slow  # Java reads a table of paraphrases
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves pipes open
def test_meteor_where_it_is_installed() -> None:
    """1 for its own reference, in any case and with any punctuation; far less for another."""
    pytest.importorskip("pycocoevalcap", exc_type=ImportError)
    if not shutil.which("java"):
        pytest.skip("needs Java")
    reference = ["Two small goats stand on the roof of a shed."]
    same = java_metrics(["two small goats stand on the roof of a shed"], [reference])["meteor"]
    other = java_metrics(["a train in the snow"], [reference])["meteor"]
    assert same == pytest.approx(1, abs=1e-6)
    assert other < 0.3
    assert java_metrics([], []) == {"meteor": None, "spice": None}


@pytest.mark.shared_data
def test_scores_are_those_of_pycocoevalcap(shared_data: Path) -> None:
    known = json.loads((shared_data / "caption-scores" / "pycocoevalcap-1.2.json").read_text(encoding="utf-8"))
    for case in known["ptb_tokenizer_cases"]:
        assert " ".join(tokenize(case["text"])) == case["tokens"]
    captions = [each["candidate"] for each in known["captions"]]
    references = [each["references"] for each in known["captions"]]
    for each in known["captions"]:
        assert " ".join(tokenize(each["candidate"])) == each["tokenized_candidate"]
        assert [" ".join(tokenize(text)) for text in each["references"]] == each["tokenized_references"]
    metrics = caption_metrics(captions, references)
    assert metrics["cider_d"]["value"] == pytest.approx(known["CIDEr_D"], abs=1e-6)
    assert metrics["rouge_l"]["value"] == pytest.approx(known["ROUGE_L"], abs=1e-6)
    bleus = [metrics[f"bleu_{n}"]["value"] for n in (1, 2, 3, 4)]
    assert bleus == pytest.approx(known["BLEU_1_to_4"], abs=1e-6)
    made, right = list(map(tokenize, captions)), [list(map(tokenize, each)) for each in references]
    assert cider_d(made, right) == pytest.approx(known["CIDEr_D_each"], abs=1e-6)
    assert rouge_l(made, right) == pytest.approx(known["ROUGE_L_each"], abs=1e-6)
    assert [bleu(row[None])[3] for row in bleu_counts(made, right)] == pytest.approx(known["BLEU_4_each"], abs=1e-6)
    few = known["first_five_captions_one_reference_each"]
    made, right = made[:5], [each[:1] for each in right[:5]]
    assert cider_d(made, right) == pytest.approx(few["CIDEr_each"], abs=1e-6)
    assert bleu(bleu_counts(made, right)) == pytest.approx(few["BLEU"], abs=1e-6)
    assert rouge_l(made, right).mean() == pytest.approx(few["ROUGE_L"], abs=1e-6)
