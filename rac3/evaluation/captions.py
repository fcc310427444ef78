"""Scores of captions against references: CIDEr-D, BLEU-1 to 4 and ROUGE-L, as pycocoevalcap 1.2 computes them.

    BLEU-n  = brevity * (p_1 ... p_n)^(1/n)            p_k: share of k-grams that a reference has (Papineni et al. 2002)
    ROUGE-L = (1 + b^2) P R / (R + b^2 P), b = 1.2     P, R: longest common subsequence over the lengths (Lin 2004)
    CIDEr-D = 10 mean_{n, refs} penalty * min(g_c, g_r) . g_r / (|g_c| |g_r|)       g: tf-idf of n-grams, n = 1 to 4
                                                       penalty = exp(-(l_c - l_r)^2 / (2 * 6^2)) (arXiv 1411.5726)

All scores are of tokens as the Penn Treebank has them, in lower case and without punctuation. CIDEr-D is 10 for a
caption that is its only reference; figures of MS-COCO are often given as 100 times that (89.1 is 0.891 here). Document
frequencies come from the references that are evaluated: a score depends on the other captions next to it, and is 0
where there is only one.
"""

import html
import importlib.util
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from rac3.evaluation.bootstrap import bootstrap, mean_of

ORDERS = 4  # the longest n-grams
SIGMA = 6.0  # of CIDEr-D's penalty, in tokens
BETA = 1.2  # ROUGE-L weighs recall this much more than precision
SMALL, TINY = 1e-9, 1e-15  # BLEU adds them to counts, so that no count is 0

Tokens = Sequence[str]
Scores = Float[np.ndarray, " captions"]

# The tokenizer.

_DROPPED = {"'", "`", '"', ".", "?", "!", ",", ":", "...", ";"}
_ABBREVIATIONS = (
    "adj adm adv al ala apr ariz assn assoc asst attys? aug ave bancorp bhd bldg blvd brig bros calif capt cf cmdr "
    "cos? col colo comdr conn corp cpl ct dak dec dept det drs? elec ens esq est etc ext feb fla fri ft ga gen "
    "govs? hon inc ind insp intl invt jan jr jul jun kans? ky lieut lt ltd maj mar md messrs mfg mich minn mlle mme "
    "mo mon mont mrs? ms msgr mt mtg natl neb nev nov oct okla penn pfc ph plc pres profs? pte ptys? pvt rd reps? "
    "rev rt sens? sept? sfc sgt spc sq sr ste? supts? sys tel tenn thu thurs tues? univ va vs vt wed wisc? wyo"
).replace(" ", "|")
_CAPITALIZED = "Ark|Az|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash"
_BEFORE_NUMBERS = "ca|figs?|nos?|op|pp"
_LETTER = r"[^\W\d_]"
_TOKEN = re.compile(
    rf"""
      </?[a-z!][^<>]*>                                                  # a tag
    | https?://[^\s"<>|()]*[^\s"<>|().!?,;:'-]                          # an address
    | [\w.+-]+@[\w-]+(?:\.[\w-]+)+
    | [@#][a-z_]\w*
    | (?:{_LETTER}\.)+{_LETTER}\b\.?(?!\w) | {_LETTER}\.(?!\w)          # U.S. p.m. J.
    | ph\.d\.
    | \b(?:{_ABBREVIATIONS}|(?-i:{_CAPITALIZED}))\.(?!\w)
    | \b(?:{_BEFORE_NUMBERS})\.(?=\s*\d)
    | (?:\d{{1,4}}[ -])?\d{{1,4}}/\d{{1,4}}(?![\w/])                    # 1 1/2 is one token
    | \d{{1,2}}[/-]\d{{1,2}}[/-]\d{{2,4}}
    | &(?:amp|lt|gt|quot|apos|nbsp);
    | [:;=]-?[()dp](?!\w)                                               # :-)
    | c\+\+
    | \b(?:can(?=not\b)|gon(?=na\b)|wan(?=na\b)|got(?=ta\b)|lem(?=me\b)|gim(?=me\b))
    | (?<=\bcan)not\b|(?<=\b(?:gon|wan))na\b|(?<=\bgot)ta\b|(?<=\b(?:lem|gim))me\b
    | '(?:n'|n\b|em\b|\d0s\b|\d\d\b|till?\b)                                # rock 'n' roll
    | 't(?=(?:is|was)\b)
    | n't\b
    | '(?:s|m|d|re|ve|ll)\b
    | {_LETTER}+?(?=n't\b)                                              # do n't
    | o'clock | \by'(?={_LETTER})
    | (?-i:[A-HJ-XZ])'{_LETTER}{{3,}} | [dlj]'{_LETTER}{{3,}} | {_LETTER}*[aeiouy]'[aeiou]{_LETTER}*  # O'Brien ma'am
    | [a-z]+(?:&[a-z]+)+(?-i:(?<=[A-Z]))                                # AT&T
    | {_LETTER}+\.(?=[,;:])
    | [a-z0-9]+(?:-[a-z]+){{0,2}}(?:/[a-z0-9]+(?:-[a-z]+){{0,2}}){{1,2}}  # and/or
    | \w[\w.,]*(?:-\w+)+                                                # 3.5-inch
    | \d+(?:\.\d+)*(?:\.[a-z]\w*)+                                      # 3.x
    | \d+(?:[.,:]\d+)+ | [.,]\d+(?:[.,:]\d+)* | (?<!\w)[+-]\d+(?:[.,:]\d+)*
    | {_LETTER}\w*(?:[.!?]{_LETTER}\w*)*                                # "beach.A" is one token
    | \w+
    | \.{{3}} | -{{2,}} | [?!]+ | \*+ | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)
_WRITTEN = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"} | {
    "€": "$",
    "£": "#",
    "¢": "cents",
}
_PLAIN = str.maketrans(
    {"’": "'", "‘": "'", "“": '"', "”": '"', "„": '"', "«": '"', "»": '"', "–": "--", "—": "--", "…": "..."}
    | {"½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3", "\N{SOFT HYPHEN}": None}
)


def tokenize(text: str) -> list[str]:
    """Tokens of the Penn Treebank in lower case, without punctuation.

    in : A man's hat, isn't it? (Red & $5.00)
    out: a man 's hat is n't it -lrb- red & $ 5.00 -rrb-

    As CoreNLP's PTBTokenizer 3.4.1 on captions and plain prose; not on telephone numbers, paths of files, and other
    rarities.
    """
    tokens = []
    for match in _TOKEN.finditer(text.translate(_PLAIN)):
        token = html.unescape(match[0].lower())
        for bracket, name in _WRITTEN.items():
            token = token.replace(bracket, name)
        if token.strip("-") and token not in _DROPPED:
            tokens.append(token.replace(" ", "\N{NO-BREAK SPACE}"))
    return tokens


# The scores.


def caption_metrics(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """CIDEr-D, BLEU-1 to 4 and ROUGE-L of captions, each with its 95% interval; and how many captions there are.

    A score of no captions is None, and so is CIDEr-D of a single one. The intervals are over the captions, with the
    document frequencies of all of them.

    Args:
      references: at least one for each caption.
    """
    named = ["cider_d", *(f"bleu_{n}" for n in range(1, ORDERS + 1)), "rouge_l"]
    metrics: dict[str, Any] = {"captions": len(captions), **dict.fromkeys(named)}
    if not captions:
        return metrics
    made, right = list(map(tokenize, captions)), [list(map(tokenize, each)) for each in references]
    counts = bleu_counts(made, right)
    figures = bootstrap(lambda rows: bleu(counts[rows]).tolist(), len(captions))
    metrics |= {f"bleu_{n}": figure for n, figure in enumerate(figures, 1)}
    metrics["rouge_l"] = mean_of(rouge_l(made, right))
    if len(captions) > 1:
        metrics["cider_d"] = mean_of(cider_d(made, right))
    return metrics


def bleu_counts(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> Int[np.ndarray, "captions 10"]:
    """What BLEU adds up over captions: right n-grams of each order, all n-grams of each, its length, and that of its
    reference of the nearest length (the shorter of two).

    An n-gram is right as often as the reference that has it most often.
    """
    rows = []
    for caption, each in zip(captions, references, strict=True):
        found = _ngrams(caption)
        most: Counter[Tokens] = Counter()
        for reference in each:
            most |= _ngrams(reference)
        right, made = ([_of_order(counts, n).total() for n in range(1, ORDERS + 1)] for counts in (found & most, found))
        nearest = min((abs(len(reference) - len(caption)), len(reference)) for reference in each)[1]
        rows.append([*right, *made, len(caption), nearest])
    return np.array(rows).reshape(-1, 2 * ORDERS + 2)


def bleu(counts: Int[np.ndarray, "captions 10"]) -> Float[np.ndarray, "4"]:
    """BLEU-1 to 4 of all captions together, by their `bleu_counts`."""
    total = counts.sum(0).astype(np.float64)
    right, made, (length, nearest) = total[:ORDERS], total[ORDERS:-2], total[-2:]
    means = np.cumprod((right + TINY) / (made + SMALL)) ** (1 / np.arange(1, ORDERS + 1))
    ratio = (length + TINY) / (nearest + SMALL)
    return means * np.exp(min(0.0, 1 - 1 / ratio))


def rouge_l(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> Scores:
    """ROUGE-L of each caption: of its highest precision and its highest recall over the references."""
    scores = []
    for caption, each in zip(captions, references, strict=True):
        common = [_common(caption, reference) for reference in each]
        precision = max(common) / max(1, len(caption))
        recall = max(length / max(1, len(reference)) for length, reference in zip(common, each, strict=True))
        scores.append((1 + BETA**2) * precision * recall / (recall + BETA**2 * precision) if precision else 0.0)
    return np.array(scores, np.float64)


def cider_d(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> Scores:
    """CIDEr-D of each caption, 0 to 10. The penalty compares the numbers of bigrams, as pycocoevalcap's does."""
    counted = [[_ngrams(reference) for reference in each] for each in references]
    frequency = Counter(ngram for each in counted for ngram in set().union(*each))  # in how many sets of references

    def weighted(counts: Counter[Tokens]) -> list[dict[Tokens, float]]:
        """tf-idf of the n-grams of each order; one that no reference has counts as in one set."""
        idf = {ngram: np.log(len(references)) - np.log(max(1, frequency[ngram])) for ngram in counts}
        return [
            {ngram: count * idf[ngram] for ngram, count in _of_order(counts, n).items()} for n in range(1, ORDERS + 1)
        ]

    scores = []
    for caption, each in zip(map(_ngrams, captions), counted, strict=True):
        made, bigrams = weighted(caption), _of_order(caption, 2).total()
        similarities = []
        for reference in each:
            penalty = np.exp(-((bigrams - _of_order(reference, 2).total()) ** 2) / (2 * SIGMA**2))
            pairs = zip(made, weighted(reference), strict=True)
            similarities.append(penalty * np.mean([_clipped_cosine(ours, right) for ours, right in pairs]))
        scores.append(10 * np.mean(similarities))
    return np.array(scores, np.float64)


def _clipped_cosine(ours: dict[Tokens, float], right: dict[Tokens, float]) -> float:
    """Cosine of two vectors, where ours has no more of an n-gram than the reference."""
    product = sum(min(weight, right[ngram]) * right[ngram] for ngram, weight in ours.items() if ngram in right)
    norms = [np.sqrt(sum(weight**2 for weight in each.values())) for each in (ours, right)]
    return float(product / (norms[0] * norms[1])) if all(norms) else 0.0


def _ngrams(tokens: Tokens) -> Counter[Tokens]:
    """How often each n-gram of each order occurs."""
    return Counter(
        tuple(tokens[start : start + n]) for n in range(1, ORDERS + 1) for start in range(len(tokens) - n + 1)
    )


def _of_order(counts: Counter[Tokens], n: int) -> Counter[Tokens]:
    return Counter({ngram: count for ngram, count in counts.items() if len(ngram) == n})


def _common(a: Tokens, b: Tokens) -> int:
    """The length of the longest common subsequence."""
    lengths = [0] * (len(b) + 1)
    for token in a:
        above = lengths
        lengths = [0]
        for place, other in enumerate(b):
            lengths.append(above[place] + 1 if token == other else max(above[place + 1], lengths[place]))
    return lengths[-1]


def java_metrics(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float | None]:
    """METEOR and SPICE by the Java programs of pycocoevalcap (extra `rac3[coco]`); None without it, Java, or captions.

    SPICE needs the models of Stanford's parser too, which `python -m pycocoevalcap.spice.get_stanford_models` fetches
    (400 MB).
    """
    found = importlib.util.find_spec("pycocoevalcap")
    metrics: dict[str, float | None] = {"meteor": None, "spice": None}
    if found is None or not found.submodule_search_locations or not shutil.which("java") or not captions:
        return metrics
    made = {row: [" ".join(tokenize(caption))] for row, caption in enumerate(captions)}
    right = {row: [" ".join(tokenize(text)) for text in each] for row, each in enumerate(references)}
    from pycocoevalcap.meteor.meteor import Meteor

    metrics["meteor"] = float(Meteor().compute_score(right, made)[0])
    if (Path(found.submodule_search_locations[0]) / "spice" / "lib" / "stanford-corenlp-3.6.0-models.jar").is_file():
        from pycocoevalcap.spice.spice import Spice

        metrics["spice"] = float(Spice().compute_score(right, made)[0])
    return metrics
