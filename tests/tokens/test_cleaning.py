"""What is done to a text before OpenCLIP's tokenizers read it, by hand and against OpenCLIP itself."""

import json
from pathlib import Path

import numpy as np
import pytest

from rac3.tokens.text import Clean, cleaned, load_clip_tokenizer

ODD = {
    "The Fox\u2019s \u201cden\u201d": 'the fox\'s "den"',
    "\ufb01re \ufb02ower": "fire flower",
    "\uff26\uff4f\uff58 \uff11\uff12": "fox 12",
    "salt &amp;amp; pepper &lt;b&gt;": "salt & pepper <b>",
    "a < b &amp;amp; c": "a < b & c",  # beside a tag, ftfy leaves entities alone
    "caf\u00c3\u00a9": "caf\u00e9",  # UTF-8 that was read as Latin-1
    "  two \t\n spaces\u00a0here ": "two spaces here",
    "cafe\u0301": "caf\u00e9",
}


@pytest.mark.parametrize(("text", "expected"), ODD.items())
def test_texts_cleaned_by_hand(text: str, expected: str):
    assert cleaned(text, "lower") == expected
    assert cleaned(text, "") == text


def test_each_way_of_cleaning():
    text = " A \u201cRed_Fox\u201d,  isn\u2019t it? "
    ways: dict[Clean, str] = {
        "lowercase": " a \u201cred_fox\u201d,  isn\u2019t it? ",
        "lower": 'a "red_fox", isn\'t it?',
        "whitespace": 'A "Red_Fox", isn\'t it?',
        "canonicalize": "a red fox isnt it",
    }
    assert {clean: cleaned(text, clean) for clean in ways} == ways


PIECES = (
    *(
        "The fox\u2019s",
        "\u201cquoted\u201d",
        "\ufb01n",
        "\uff21\uff22\uff23",
        "&amp;",
        "&amp;lt;br&gt;",
        "&#39;s",
        "\u2026",
    ),
    *("caf\u00c3\u00a9", "na\u00efve", "\u72d0\u72f8", "\u30ad\u30c4\u30cd", "\u043b\u0438\u0441\u0430", "\U0001f98a"),
    *(
        "don\u2019t",
        "I\u2018m",
        "\u00bd",
        "\u00a0",
        "\u200b",
        "\ufeff",
        "x\u0301",
        "_",
        "$4.50",
        "50%",
        "#1",
        "a\tb",
        "\u0130",
    ),
    *(
        "\u00e2\u20ac\u2122",
        "\u00e2\u20ac\u0153",
        "\x1b[31mred\x1b[0m",
        "\ud83e",
        "\u1e9e",
        "\u03a3\u03a3",
        "https://a.b/?c=d&e",
    ),
)


def test_ids_are_open_clips(tmp_path: Path):
    """2,000 strings of odd pieces, with OpenCLIP's own vocabulary as Hugging Face has it."""
    theirs = pytest.importorskip("open_clip.tokenizer").SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): number for token, number in theirs.encoder.items()}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = sorted(theirs.bpe_ranks, key=theirs.bpe_ranks.get)
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]), encoding="utf-8")
    tokenizer = load_clip_tokenizer(tmp_path).cleaning("lower")
    random = np.random.default_rng(0)
    texts = [*ODD, *PIECES]
    texts += [
        random.choice([" ", "", ", "]).join(random.choice(PIECES, random.integers(1, 6)).tolist()) for _ in range(2000)
    ]
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    different = {text: (tokenizer.encode(text), theirs.encode(text)) for text in texts}
    different = {text: ids for text, ids in different.items() if ids[0] != ids[1]}
    assert not different
