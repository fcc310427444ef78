"""Infilling and editing recomputed by hand: what the prompts hold, which pixels change, and how they are judged."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from decoding_spy import Call, watch_decoding
from replaced import with_members
from tiny_prompts import FIRST_CODE, FIRST_MASK, FIRST_TEXT, image_prompt, spelled

from rac3 import recipes
from rac3.artifacts.arrays import read_array
from rac3.artifacts.workdir import Workdir
from rac3.config import InputError
from rac3.documents.document import Image, Text
from rac3.documents.store import TokenizedDocument
from rac3.experiment import Experiment
from rac3.generation.prompts import Form
from rac3.generation.sampling import Guidance
from rac3.generation.tasks.score import Part
from rac3.run import Run
from rac3.stages import evaluate_infilling as stage
from rac3.stages.evaluate_infilling import (
    Infilling,
    evaluate_infilling,
    kept_pictures,
    middle,
    nameless,
    next_of_another,
)

# The middle 3 x 3 of 5 x 5 codes of 8 x 8 pixels each: rows 1 to 3, columns 1 to 3.
MASKED = [6, 7, 8, 11, 12, 13, 16, 17, 18]
MIDDLE = slice(8, 32)


class Told:
    """Log probabilities that are known: -1, -2, -3 ... in each part, times one more for each part."""

    def __init__(self) -> None:
        self.parts: list[Part] = []

    def log_probs(self, parts: Sequence[Part]) -> list[np.ndarray]:
        self.parts += parts
        return [
            -(number + 1) * np.arange(1.0, part.end - part.start + 1) ** 2 / 64 for number, part in enumerate(parts)
        ]


class Measured(NamedTuple):
    """One evaluation of the test split: its numbers, its pictures, and what was asked."""

    metrics: dict[str, Any]
    pictures: dict[str, np.ndarray]
    calls: list[Call]
    scored: list[Part]


@pytest.fixture(scope="module")
def run(experiment: Experiment, store: Workdir) -> Run:
    return Run(experiment, store)


@pytest.fixture(scope="module")
def items(run: Run) -> list[TokenizedDocument]:
    """The test documents, each of another entity."""
    return run.documents("test").many(range(4))


@pytest.fixture(scope="module")
def pixels(items) -> np.ndarray:
    return np.stack([item.document.images[0].pixels() for item in items])


@pytest.fixture(scope="module")
def found(run: Run, experiment: Experiment, store: Workdir) -> list[list[TokenizedDocument]]:
    """The first two documents that the text of each retrieved."""
    ids = read_array(store.require(recipes.neighbors(experiment, "test")).folder / "ids")
    memory = [
        item for part in ("train", "memory") for item in run.documents(part).many(range(len(run.documents(part))))
    ]
    return [[memory[i] for i in row[0, :2]] for row in ids]


def measured_of(run: Run, **members: Any) -> Measured:
    told = Told()
    with pytest.MonkeyPatch.context() as patch:
        calls = watch_decoding(patch, real=False)
        test = Infilling.open(with_members(run, scorer=told, **members), "test")
        return Measured(*test.measured(), calls, told.parts)


@pytest.fixture(scope="module")
def measured(run: Run) -> Measured:
    return measured_of(run)


def infill_prompt(
    documents: Sequence[TokenizedDocument], text: Sequence[int] | np.ndarray, codes: np.ndarray
) -> list[int]:
    """<eod> documents <img alt=" text " src=" codes <mask:0> codes "> <mask:0>"""
    before, after = (FIRST_CODE + codes[:6]).tolist(), (FIRST_CODE + codes[19:]).tolist()
    words = (FIRST_TEXT + np.asarray(text, np.int32)).tolist()
    shown = [id for document in documents for id in spelled(document)]
    return [1, *shown, 2, *words, 3, *before, FIRST_MASK, *after, 4, FIRST_MASK]


def psnr_of_the_middle(truth: np.ndarray, pictures: np.ndarray) -> float:
    values = []
    for a, b in zip(truth[:, MIDDLE, MIDDLE].astype(float), pictures[:, MIDDLE, MIDDLE].astype(float), strict=True):
        error = ((a - b) ** 2).mean()
        values.append(60.0 if error == 0 else min(60.0, 10 * math.log10(255**2 / error)))
    return sum(values) / len(values)


def filled(call: Call, items: Sequence[TokenizedDocument]) -> np.ndarray:
    """The codes of the images with those that were drawn."""
    codes = np.stack([item.ids[1] for item in items])
    for row, (sample,) in enumerate(call.out):
        codes[row, MASKED] = np.concatenate(sample.runs) - FIRST_CODE
    return codes


def plugged(pixels: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    out = pixels.copy()
    out[:, MIDDLE, MIDDLE] = drawn[:, MIDDLE, MIDDLE]
    return out


def test_infilling_is_given_the_text_the_rest_and_what_the_text_retrieved(measured: Measured, items, found):
    for k in range(3):
        assert measured.calls[k].prompts == [
            infill_prompt(documents[:k], item.ids[0], item.ids[1]) for item, documents in zip(items, found, strict=True)
        ]
        for request, item in zip(measured.calls[k].requests, items, strict=True):
            assert request.samples == 1
            known = [run.ids.tolist() for run in request.grammar if hasattr(run, "ids")]
            assert known == [(FIRST_CODE + item.ids[1][[a, a + 1]]).tolist() for a in (9, 14)]
    assert measured.calls[0].sampling.temperature == 0.2  # of images, as the config has it


def test_edits_have_no_text_and_the_documents_of_another_entity(measured: Measured, items, found):
    """Of the next test document, as each is of another entity."""
    assert len({item.document.metadata["entity"] for item in items}) == 4
    others = [*found[1:], found[0]]
    edits = [infill_prompt(given, [], item.ids[1]) for item, given in zip(items, others, strict=True)]
    assert measured.calls[3].prompts == edits
    assert len(measured.calls) == 5


def test_what_is_drawn_after_documents_has_no_name(measured: Measured, run: Run, items, found):
    others = [*found[1:], found[0]]
    texts = [f"something {item.document.text.split(' ', 1)[1]}" for item in items]
    assert measured.calls[4].prompts == [
        image_prompt(given, run.tokenizer.encode(text)) for text, given in zip(texts, others, strict=True)
    ]


def test_pixels_outside_the_middle_are_the_originals(measured: Measured, run: Run, items, pixels, found):
    """Bit for bit; those inside are of the codes that were drawn, or retrieved."""
    codes = {f"infilled {k}": filled(measured.calls[k], items) for k in range(3)}
    codes |= {
        "edited": filled(measured.calls[3], items),
        "reconstructed": np.stack([item.ids[1] for item in items]),
        "copied": np.stack([documents[0].ids[1] for documents in found]),
    }
    for kind, of_kind in codes.items():
        expected = plugged(pixels, run.images.decode(of_kind))
        np.testing.assert_array_equal(measured.pictures[kind], expected, err_msg=kind)
    white = plugged(pixels, np.full_like(pixels, 255))
    np.testing.assert_array_equal(measured.pictures["masked"], white)
    np.testing.assert_array_equal(measured.pictures["original"], pixels)
    firsts = np.stack([documents[0].ids[1] for documents in (*found[1:], found[0])])
    np.testing.assert_array_equal(measured.pictures["given"], run.images.decode(firsts))
    drawn = np.stack([sample.runs[0] - FIRST_CODE for (sample,) in measured.calls[4].out])
    np.testing.assert_array_equal(measured.pictures["controlled"], run.images.decode(drawn))


def test_psnr_is_of_the_middle_alone(measured: Measured, pixels):
    values = {**{f"infilled {k}": of_k for k, of_k in measured.metrics["infilling"].items()}}
    values |= {kind: measured.metrics[kind] for kind in ("copied", "reconstructed")}
    assert list(values) == ["infilled 0", "infilled 1", "infilled 2", "copied", "reconstructed"]
    for kind, of_kind in values.items():
        assert of_kind["psnr"] == pytest.approx(psnr_of_the_middle(pixels, measured.pictures[kind]), abs=1e-3), kind


def test_a_perfect_middle_counts_60_db(run: Run, pixels):
    test = Infilling.open(run, "test")
    some = pixels.copy()
    some[0, MIDDLE, MIDDLE] ^= 1  # an error of 1 everywhere: 48.13 dB
    assert test._compared(some)["psnr"] == pytest.approx((10 * math.log10(255**2) + 3 * 60) / 4)


def test_perplexity_is_of_the_masked_codes_alone(measured: Measured, items, found):
    """Known log probabilities of 13 codes and an <eoi>, of which codes 3, 4, 8 and 9 are known."""
    kept = np.array([1, 2, 3, 6, 7, 8, 11, 12, 13])
    expected = math.exp(np.mean([number * kept**2 / 64 for number in range(1, 5)]))
    for k in range(3):
        assert measured.metrics["infilling"][str(k)]["perplexity"] == pytest.approx(expected)
        parts = measured.scored[4 * k : 4 * k + 4]
        for part, item, documents in zip(parts, items, found, strict=True):
            group, codes = part.group, (FIRST_CODE + item.ids[1]).tolist()
            assert group.targets[part.start : part.end].tolist() == [*codes[6:19], 5]
            assert group.tokens[: part.start + 1].tolist() == infill_prompt(documents[:k], item.ids[0], item.ids[1])


def test_entities_are_those_of_the_pictures_in_their_order(
    run: Run, items, pixels, monkeypatch: pytest.MonkeyPatch, measured: Measured
):
    """Infilled with the emblem of the next one in two of four; edited as asked in one; drawn in the setting in one."""
    following = np.roll(pixels, -1, axis=0)
    emblem = plugged(pixels, following)  # in its own setting, the emblem of the next one
    half = np.stack([emblem[0], emblem[1], pixels[2], pixels[3]])
    edit = np.stack([emblem[0], pixels[1], emblem[2], emblem[3]])
    turned = np.stack([following[0], plugged(following, pixels)[1], pixels[2], following[3]])
    monkeypatch.setattr(Infilling, "_infilled", lambda *_: half)
    monkeypatch.setattr(Infilling, "_edited", lambda *_: edit)
    monkeypatch.setattr(Infilling, "_controlled", lambda *_: turned)
    metrics = measured_of(run).metrics
    assert metrics["documents"] == 4
    assert metrics["original"] == {"entity_accuracy": 1}
    assert [metrics["infilling"][k]["entity_accuracy"] for k in "012"] == [0.5] * 3
    assert metrics["editing"] == {"entity_accuracy": 3 / 4, "unchanged": 1 / 4}
    words = [item.document.text.split(" ", 1)[1] for item in items]
    own = [words[1] == words[0], words[2] == words[1], True, words[0] == words[3]]
    assert metrics["controlled"] == {"entity_accuracy": 2 / 4, "setting_accuracy": sum(own) / 4}


def mixed(items: Sequence[TokenizedDocument]) -> list[TokenizedDocument]:
    """The first without its text, the third without its image."""

    def kept(item: TokenizedDocument, number: int) -> TokenizedDocument:
        return TokenizedDocument(
            replace(item.document, segments=item.document.segments[number : number + 1]), (item.ids[number],)
        )

    assert [type(segment) for segment in items[0].document.segments] == [Text, Image]
    return [kept(items[0], 1), items[1], kept(items[2], 0), items[3]]


def with_items(monkeypatch: pytest.MonkeyPatch, run: Run, items: Sequence[TokenizedDocument], neighbors: bool = True):
    ids = run.neighbors("test")[:4] if neighbors else np.full((4, 2, 3), -1)
    monkeypatch.setattr(stage, "held_out", lambda *_: ([*items], ids[: len(items)]))


def test_a_document_without_a_text_or_an_image_is_left_out(
    run: Run, items, found, pixels, monkeypatch: pytest.MonkeyPatch
):
    with_items(monkeypatch, run, mixed(items))
    metrics, pictures, calls, _ = measured_of(run)
    assert metrics["documents"] == 2
    np.testing.assert_array_equal(pictures["original"], pixels[[1, 3]])
    assert calls[2].prompts == [infill_prompt(found[row], items[row].ids[0], items[row].ids[1]) for row in (1, 3)]
    assert calls[3].prompts == [infill_prompt(found[other], [], items[row].ids[1]) for row, other in ((1, 3), (3, 1))]


@pytest.mark.parametrize("why", ["one entity", "no entity field", "nothing retrieved", "k of 0", "no retriever"])
def test_nothing_is_edited_without_documents_of_another_entity(
    why: str, run: Run, items, pixels, monkeypatch: pytest.MonkeyPatch
):
    experiment = run.experiment
    if why == "one entity":
        alike = [replace(item, document=replace(item.document, metadata=items[0].document.metadata)) for item in items]
        with_items(monkeypatch, run, alike)
    elif why == "nothing retrieved":
        with_items(monkeypatch, run, items, neighbors=False)
    elif why == "no entity field":
        experiment = replace(experiment, data=replace(experiment.data, entity_field=""))
    elif why == "k of 0":
        experiment = replace(experiment, evaluation=replace(experiment.evaluation, num_retrieved=0))
    other = with_members(run, experiment, images=run.images, documents=lambda _, split: run.documents(split))
    if why == "no retriever":
        alone = experiment.vanilla()
        other = run.variant(alone, alone)
    metrics, pictures, calls, _ = measured_of(other)
    retrieves = why not in ("k of 0", "no retriever")
    assert ("editing" in metrics, "controlled" in metrics) == (False, False)
    assert list(metrics["infilling"]) == (["0", "1", "2"] if retrieves else ["0"])
    assert len(calls) == len(metrics["infilling"])
    assert ("copied" in metrics) == retrieves
    assert (metrics["original"]["entity_accuracy"] is None) == (why == "no entity field")
    if why == "nothing retrieved":
        np.testing.assert_array_equal(pictures["copied"], plugged(pixels, np.zeros_like(pixels)))
        assert calls[2].prompts == calls[0].prompts


def test_an_edit_has_no_text_to_be_guided_by(run: Run):
    """All else is compared with prompts without the text; edits are drawn as they are."""
    evaluation = run.experiment.evaluation
    sampling = replace(evaluation.image_sampling, guidance=Guidance(3.0, "text"))
    guided = replace(run.experiment, evaluation=replace(evaluation, image_sampling=sampling, num_retrieved=1))
    calls = measured_of(run.variant(guided, run.trained)).calls
    assert [{len(request.prompts) for request in call.requests} for call in calls] == [{2}, {2}, {1}, {2}]
    assert [call.sampling.without for call in calls] == ["text", "text", None, "text"]
    assert calls[2].sampling.temperature == evaluation.image_sampling.temperature


@pytest.mark.parametrize(
    ("names", "usable", "expected"),
    [
        ("aabc", {0, 1, 2, 3}, [2, 2, 3, 0]),
        ("aabc", {0, 1, 3}, [3, 3, 3, 0]),
        ("aabc", {0, 1}, []),  # nothing for the first
        ("aaa", {0, 1, 2}, []),
        ("", set(), []),
    ],
)
def test_the_next_one_of_another_entity(names: str, usable: set[int], expected: list[int]):
    assert next_of_another([*names], usable) == expected


def test_a_name_is_replaced_where_it_is_a_word():
    assert nameless("Art in a cart, by art.", "art") == "something in a cart, by something."
    assert nameless("c++ and c", "c++") == "something and c"


@pytest.mark.parametrize(
    ("codes", "resolution", "first", "last"),
    [(25, 40, 8, 31), (16, 8, 2, 5), (64, 8, 1, 5), (1, 4, 0, 3), (256, 256, 48, 207)],
)
def test_the_middle_is_three_fifths_of_the_side(codes: int, resolution: int, first: int, last: int, run: Run):
    rows, columns = np.nonzero(middle(replace(run.form, tokens_per_image=codes), resolution))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (first, last, first, last)
    assert len(rows) == (last - first + 1) ** 2


@pytest.mark.parametrize(("codes", "resolution"), [(18, 36), (9, 40)])
def test_codes_that_are_no_square_grid_are_refused(codes: int, resolution: int, run: Run):
    refused = f"the {codes} codes of an image of {resolution} x {resolution} pixels are no square grid"
    with pytest.raises(InputError, match=refused):
        middle(replace(run.form, tokens_per_image=codes), resolution)
    form: Form = replace(run.form, tokens_per_image=18)
    with pytest.raises(InputError, match="no square grid"):
        Infilling.open(with_members(run, form=form), "test")


def test_an_evaluation_is_made_once_for_the_splits_that_there_are(
    run: Run, items, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A split with nothing to infill has a count, and no pictures; others keep those of the first twelve."""
    opened: list[str] = []

    def measured(self: Infilling) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        opened.append(self.split)
        return {"documents": 4}, {"a": self.pixels, "b": 255 - self.pixels}

    monkeypatch.setattr(Infilling, "measured", measured)
    held = {"validation": [mixed(items)[0]], "test": items}
    monkeypatch.setattr(stage, "held_out", lambda _, split: (held[split], np.full((len(held[split]), 2, 1), -1)))
    own = Run(run.experiment, Workdir(tmp_path, "tiny"))
    new = with_members(own, images=run.images, form=run.form)
    for _ in range(2):
        metrics = evaluate_infilling(new)
        assert metrics == {
            "validation": {"documents": 0, "pictures": []},
            "test": {"documents": 4, "pictures": ["a", "b"]},
        }
    assert opened == ["test"]
    assert kept_pictures(new, "validation") == {}
    kept = kept_pictures(new, "test")
    np.testing.assert_array_equal(kept["a"], 255 - kept["b"])
    folder = own.workdir.require(recipes.infilling(own.experiment, own.trained)).folder
    assert json.loads((folder / "metrics.json").read_text()) == metrics


def test_an_evaluation_reads_no_more_than_its_recipe_names(
    experiment: Experiment, workdir: Path, monkeypatch: pytest.MonkeyPatch
):
    calls = watch_decoding(monkeypatch, real=False)
    run = Run(experiment, Workdir(workdir, "tiny"))
    metrics = evaluate_infilling(with_members(run, scorer=Told()))
    assert [values["documents"] for values in metrics.values()] == [4, 4]
    assert len(calls) == 10
    assert kept_pictures(run, "test").keys() == set(metrics["test"]["pictures"])


def test_the_first_pictures_are_kept(run: Run, items, pixels, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stage, "SHOWN", 3)
    assert {len(pictures) for pictures in measured_of(run).pictures.values()} == {3}
