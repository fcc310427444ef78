"""Evaluation recomputed by hand: from the stored neighbors to prompts, perplexities, and the samples that are kept."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_spy import Call, watch_decoding

from rac3 import recipes
from rac3.artifacts.arrays import read_array
from rac3.artifacts.workdir import Workdir
from rac3.config import load_config_module
from rac3.documents.document import Image, Text
from rac3.documents.store import TokenizedDocument
from rac3.documents.world import World, draw
from rac3.evaluation.perplexity import make_token_cross_entropy
from rac3.evaluation.settings import EvaluationConfig
from rac3.experiment import Experiment, Split
from rac3.generation.sampling import Sampling
from rac3.retrieval.baselines import NoRetriever, Random
from rac3.retrieval.exact import Exact
from rac3.stages import evaluate as stage
from rac3.stages.embed import open_documents
from rac3.stages.evaluate import (
    _accuracies,
    _captions,
    _evaluate_split,
    _fitting,
    _HeldOut,
    _images,
    _perplexities,
    _segment_ids,
    _too_long,
    _write_samples,
    comparisons,
    evaluate,
    evaluate_all,
    evaluate_encoders,
    vanilla,
)
from rac3.stages.memory import OpenMemory
from rac3.stages.train import build_model, open_params

TEXT, IMAGE = 0, 1  # the parts of a query
FIRST_TEXT, FIRST_CODE, FIRST_MASK = 8, 308, 324  # of the tiny vocabulary: 8 specials, 300 text ids, 16 codes
SETTINGS = EvaluationConfig(
    num_retrieved=2,
    documents=4,
    image_samples=3,
    caption_samples=5,
    image_sampling=Sampling(0.9, 0.95),
    caption_sampling=Sampling(1.1),
    max_caption_tokens=6,
)


@pytest.fixture(scope="module")
def experiment(finished_workdir: tuple[Path, Path]) -> Experiment:
    return replace(load_config_module(str(finished_workdir[0])).get_config(), evaluation=SETTINGS)


@pytest.fixture(scope="module")
def held_out(experiment: Experiment, store: Workdir) -> _HeldOut:
    """The tiny model with its weights made larger: after six steps it hardly minds what is in context."""
    opened = _HeldOut.open(experiment, experiment, store)
    params = jax.tree.map(lambda leaf: 6 * leaf, opened.generator.params)
    return replace(opened, generator=replace(opened.generator, params=params))


@pytest.fixture(scope="module")
def items(experiment: Experiment, store: Workdir) -> list[TokenizedDocument]:
    """The test documents, a caption and a picture each."""
    return open_documents(experiment, store, "test").many(range(4))


@pytest.fixture(scope="module")
def neighbors(experiment: Experiment, store: Workdir) -> np.ndarray:
    """Memory ids [documents, parts, depth] as they are stored."""
    found = read_array(store.require(recipes.neighbors(experiment, "test"), "").folder / "ids")
    assert all(set(by_text) != set(by_image) for by_text, by_image in found[:, :, :2].tolist())
    return found


@pytest.fixture(scope="module")
def memory(experiment: Experiment, store: Workdir) -> list[TokenizedDocument]:
    """All documents of the memory, by memory id: the training documents, then the part of the unseen entities."""
    parts = [open_documents(experiment, store, split) for split in ("train", "memory")]
    assert [len(part) for part in parts] == [36, 12]
    return [item for part in parts for item in part.many(range(len(part)))]


@pytest.fixture
def no_perplexity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "_perplexities", no_perplexities)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    return watch_decoding(monkeypatch, real=False)


def spelled(item: TokenizedDocument) -> list[int]:
    """<img alt=" text " src=" codes "> <eod>"""
    text, codes = item.ids
    return [2, *(FIRST_TEXT + text), 3, *(FIRST_CODE + codes), 4, 1]


def image_prompt(documents: Sequence[TokenizedDocument], item: TokenizedDocument) -> list[int]:
    return [1, *(id for document in documents for id in spelled(document)), 2, *(FIRST_TEXT + item.ids[0]), 3]


def caption_prompt(documents: Sequence[TokenizedDocument], codes: np.ndarray) -> list[int]:
    before = [id for document in documents for id in spelled(document)]
    return [1, *before, 2, FIRST_MASK, 3, *(FIRST_CODE + codes), 4, FIRST_MASK]


def same_picture(a: np.ndarray, b: np.ndarray) -> bool:
    """Of equal codes; those of a batch of another size may round to the next value."""
    return np.abs(a.astype(int) - b).max() <= 1


def plain_perplexity(held_out: _HeldOut, sequences: Sequence[tuple[list[int], list[int]]]) -> float:
    """Of the ids that end each (context, scored) pair, by the model with no packing, loss or cache of ours."""
    model, params = held_out.generator.model, held_out.generator.params
    width = 192
    ids, places, segments = np.zeros((3, len(sequences), width), np.int32)
    for row, (context, scored) in enumerate(sequences):
        whole = [*context, *scored]
        ids[row, : len(whole)], segments[row, : len(whole)] = whole, 1
        for place, id in enumerate(whole):  # its place in its text or image, which markup ends
            places[row, place] = places[row, place - 1] + 1 if FIRST_TEXT <= id < FIRST_MASK else 0
    width = min(width, model.max_positions)

    @jax.jit
    def log_probs(params: Any, ids: Any, places: Any, segments: Any) -> Any:
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        hidden, _ = model.apply(params, ids, positions, places, segments)
        return jax.nn.log_softmax(model.apply(params, hidden, method="logits"))

    given = np.asarray(log_probs(params, ids[:, :width], places[:, :width], segments[:, :width]))
    nats = [
        -given[row, place - 1, ids[row, place]]
        for row, (context, scored) in enumerate(sequences)
        for place in range(len(context), len(context) + len(scored))
    ]
    return math.exp(np.mean(nats))


def by_hand(
    held_out: _HeldOut, items: Sequence[TokenizedDocument], documents: Sequence[Sequence[TokenizedDocument]], part: int
) -> float:
    """Perplexity of the images behind their captions, or (`IMAGE` asks) of the captions behind their images."""
    pairs = [
        (image_prompt(found, item), (FIRST_CODE + item.ids[1]).tolist())
        if part == TEXT
        else (caption_prompt(found, item.ids[1]), (FIRST_TEXT + item.ids[0]).tolist())
        for item, found in zip(items, documents, strict=True)
    ]
    return plain_perplexity(held_out, pairs)


class Evaluated(NamedTuple):
    """One evaluation of the test split: its numbers, its files, and what the decoder saw."""

    metrics: dict[str, Any]
    rows: list[dict[str, Any]]
    pictures: np.ndarray
    images: list[tuple[list[int], list[list[int]], list[float]]]  # prompt, samples, mean log probabilities
    captions: list[tuple[list[int], list[list[int]], list[float]]]
    calls: list[Call]


def no_perplexities(_: Any, __: Any, items: Any, neighbors: np.ndarray, k: int) -> dict[str, float]:
    """In place of `_perplexities`: by what they are asked for, which takes no time."""
    return {"image": 100.0 + k, "text": 200.0 + 10 * len(items) + k + float(neighbors[0, TEXT, 0]) / 100}


@pytest.fixture(scope="module")
def evaluated(held_out: _HeldOut, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    folder = tmp_path_factory.mktemp("evaluated")
    with pytest.MonkeyPatch.context() as patch:
        calls = watch_decoding(patch, real=False)
        patch.setattr(stage, "_perplexities", no_perplexities)
        metrics = _evaluate_split(held_out, "test", folder)
    rows, pictures = json.loads((folder / "test.json").read_text()), np.load(folder / "test.npy")
    assert len(calls) == 2
    images, captions = calls[0].samples(SETTINGS.image_samples), calls[1].samples(SETTINGS.caption_samples)
    return Evaluated(metrics, rows, pictures, images, captions, calls)


@pytest.mark.parametrize(("part", "modality"), [(TEXT, "image"), (IMAGE, "text")])
def test_perplexity_is_that_of_the_plain_model_behind_what_the_prompt_retrieved(
    held_out: _HeldOut, items, neighbors: np.ndarray, memory, part: int, modality: str
):
    """Images behind the neighbors of their text, texts behind those of their image, for each number of documents."""
    expected = [
        by_hand(held_out, items, [[memory[i] for i in row[part, :k]] for row in neighbors], part) for k in range(3)
    ]
    other = by_hand(held_out, items, [[memory[i] for i in row[1 - part, :2]] for row in neighbors], part)
    values = [*expected, other]
    assert min(abs(a / b - 1) for n, a in enumerate(values) for b in values[:n]) > 1e-3  # all can be told apart
    cross_entropy = make_token_cross_entropy(held_out.generator.model)
    found = [_perplexities(held_out, cross_entropy, items, neighbors, k)[modality] for k in range(3)]
    assert found == pytest.approx(expected, rel=1e-5)  # float32 sums of some 100 terms


def test_perplexities_are_kept_by_k(evaluated: Evaluated, neighbors: np.ndarray):
    first = float(neighbors[0, TEXT, 0]) / 100
    assert evaluated.metrics["perplexity_by_k"] == {
        "image": {"0": 100, "1": 101, "2": 102},
        "text": {"0": 240 + first, "1": 241 + first, "2": 242 + first},
    }
    assert evaluated.metrics["perplexity"] == {"image": 102, "text": 242 + first}


def test_a_prompt_holds_what_it_retrieved_and_never_its_target(
    evaluated: Evaluated, items, neighbors: np.ndarray, memory
):
    for item, row, (prompt, _, _) in zip(items, neighbors, evaluated.images, strict=True):
        assert prompt == image_prompt([memory[i] for i in row[TEXT, :2]], item)
    for item, row, (prompt, _, _) in zip(items, neighbors, evaluated.captions, strict=True):
        assert prompt == caption_prompt([memory[i] for i in row[IMAGE, :2]], item.ids[1])


def test_samples_are_drawn_as_the_settings_say(evaluated: Evaluated):
    images, captions = evaluated.calls
    assert (images.sampling, captions.sampling) == (SETTINGS.image_sampling, SETTINGS.caption_sampling)
    assert (images.grammar.count, captions.grammar.count) == (25, 6)
    assert (len(images.prompts), len(captions.prompts)) == (4 * 3, 4 * 5)
    for call in evaluated.calls:
        assert len(set(call.keys)) == len(call.keys)


def test_the_image_nearest_to_its_caption_is_kept(evaluated: Evaluated, held_out: _HeldOut, items):
    kept, scores = [], []
    for item, (_, samples, _), picture, row in zip(
        items, evaluated.images, evaluated.pictures, evaluated.rows, strict=True
    ):
        drawn = held_out.codec.decode(np.array(samples) - FIRST_CODE)
        text = held_out.encoder.embed_texts([item.document.text])[0]
        likeness = [float(vector @ text) for vector in held_out.encoder.embed_images(list(drawn))]
        kept.append(int(np.argmax(likeness)))
        scores.append(max(likeness))
        assert same_picture(picture, drawn[kept[-1]])
        assert row["text"] == item.document.text
    assert len(set(kept)) > 1
    assert evaluated.metrics["clip_score"] == pytest.approx(np.mean(scores), abs=1e-5)


def test_the_most_probable_caption_is_kept(evaluated: Evaluated, held_out: _HeldOut):
    best = [int(np.argmax(means)) for _, _, means in evaluated.captions]
    assert len(set(best)) > 1
    wanted = [
        held_out.tokenizer.decode([id - FIRST_TEXT for id in samples[choice]])
        for choice, (_, samples, _) in zip(best, evaluated.captions, strict=True)
    ]
    assert [row["caption"] for row in evaluated.rows] == wanted


def test_rows_say_what_was_retrieved(evaluated: Evaluated, items, neighbors: np.ndarray, memory):
    for item, row, stored in zip(items, evaluated.rows, neighbors, strict=True):
        assert row["key"] == item.document.key
        assert row["neighbors"] == stored.tolist()
        assert row["retrieved"] == {
            part: [memory[i].document.key for i in stored[number, :2]] for number, part in enumerate(("text", "image"))
        }


def test_accuracies_compare_each_row_with_its_own_document(held_out: _HeldOut, items, experiment: Experiment):
    world = World("test", seen=12, unseen=4)
    names = [str(item.document.metadata["entity"]) for item in items]
    assert len(set(names)) == 4
    pictures = np.stack([item.document.images[0].pixels() for item in items])
    captions = [f"the flag of {name}" for name in names]
    assert _accuracies(experiment, items, pictures, captions) == {"entity_accuracy": 1, "name_accuracy": 1}
    some = pictures.copy()
    some[[0, 2]] = pictures[[2, 0]]
    some[3] = draw(world.entities()[0], next(setting for _, setting in world._plan()))
    mixed = [captions[1], captions[0], *captions[2:]]
    assert _accuracies(experiment, items, some, mixed) == {"entity_accuracy": 1 / 4, "name_accuracy": 2 / 4}


def test_accuracies_without_meaning_are_none(items, experiment: Experiment):
    pictures, captions = np.zeros((4, 40, 40, 3), np.uint8), ["a"] * 4
    none = {"entity_accuracy": None, "name_accuracy": None}
    assert _accuracies(experiment, items, pictures[1:], captions[1:]) == none  # a document lacks a text, or an image
    seen = replace(experiment, data=replace(experiment.data, entity_field="seen"))
    assert _accuracies(seen, items, pictures, ["it is false", *captions[1:]])["name_accuracy"] == 1 / 4
    unnamed = replace(experiment, data=replace(experiment.data, entity_field=""))
    assert _accuracies(unnamed, items, pictures, captions)["name_accuracy"] is None

    class Other:
        """A source that draws no emblems."""

        shards = read = lambda *_: ()

    other = replace(experiment, data=replace(experiment.data, train=Other()))
    assert _accuracies(other, items, pictures, captions) == {"entity_accuracy": None, "name_accuracy": 0}


@pytest.mark.usefixtures("no_perplexity")
@pytest.mark.parametrize(("split", "k"), [("test", 0), ("validation", 1)])
def test_fewer_documents_in_context(
    held_out: _HeldOut, experiment: Experiment, store: Workdir, memory, calls, tmp_path: Path, split: Split, k: int
):
    """`num_retrieved` is how many are in the prompts and rows of either split, and the last of the perplexities."""
    items = open_documents(experiment, store, split).many(range(2))
    neighbors = read_array(store.require(recipes.neighbors(experiment, split), "").folder / "ids")
    few = replace(SETTINGS, num_retrieved=k, documents=2)
    metrics = _evaluate_split(replace(held_out, experiment=replace(experiment, evaluation=few)), split, tmp_path)
    assert metrics["documents"] == 2
    assert [list(values) for values in metrics["perplexity_by_k"].values()] == [[str(n) for n in range(k + 1)]] * 2
    prompts = [prompt for prompt, _, _ in calls[0].samples(3)]
    assert prompts == [image_prompt([memory[i] for i in neighbors[row, TEXT, :k]], items[row]) for row in range(2)]
    prompts = [prompt for prompt, _, _ in calls[1].samples(5)]
    assert prompts == [
        caption_prompt([memory[i] for i in neighbors[row, IMAGE, :k]], items[row].ids[1]) for row in range(2)
    ]
    rows = json.loads((tmp_path / f"{split}.json").read_text())
    assert [row["key"] for row in rows] == [item.document.key for item in items]
    assert [len(row["retrieved"]["image"]) for row in rows] == [k, k]


@pytest.mark.usefixtures("no_perplexity")
def test_a_model_that_does_not_retrieve_has_nothing_in_context(experiment: Experiment, store: Workdir, calls, tmp_path):
    alone = vanilla(experiment)
    held_out = _HeldOut.open(alone, alone, store)
    assert held_out.memory is None
    metrics = _evaluate_split(replace(held_out, experiment=replace(alone, seed=0)), "test", tmp_path)
    assert [list(values) for values in metrics["perplexity_by_k"].values()] == [["0"], ["0"]]
    assert {prompt[1:3].count(2) for prompt in calls[0].prompts} == {1}  # <eod>, then the main document at once
    assert {prompt.count(1) for call in calls for prompt in call.prompts} == {1}
    for row in json.loads((tmp_path / "test.json").read_text()):
        assert row["retrieved"] == {"text": [], "image": []}


def test_samples_are_a_function_of_the_seed(held_out: _HeldOut, items, neighbors: np.ndarray, calls: list[Call]):
    for seed in (0, 0, 1):
        seeded = replace(held_out, experiment=replace(held_out.experiment, seed=seed))
        _images(seeded, items, neighbors[:, TEXT], 0)
        _captions(seeded, items, neighbors[:, IMAGE], 0)
    for first, again, other in (calls[::2], calls[1::2]):
        assert first.keys == again.keys
        assert not set(first.keys) & set(other.keys)


def without(item: TokenizedDocument, kind: type) -> TokenizedDocument:
    """A document less its text, or its image."""
    document = item.document
    kept = [number for number, segment in enumerate(document.segments) if not isinstance(segment, kind)]
    segments = tuple(document.segments[number] for number in kept)
    return TokenizedDocument(replace(document, segments=segments), tuple(item.ids[number] for number in kept))


def test_documents_without_a_text_or_an_image(
    held_out: _HeldOut, items, neighbors: np.ndarray, memory, calls: list[Call], tmp_path: Path
):
    """They ask for nothing; what the others retrieve, and what they are scored against, stays theirs."""
    mixed = [without(items[0], Text), items[1], without(items[2], Image), items[3]]
    pictures, scores = _images(held_out, mixed, neighbors[:, TEXT], 1)
    captions = _captions(held_out, mixed, neighbors[:, IMAGE], 1)
    drawn, written = calls[0].samples(3), calls[1].samples(5)
    for (prompt, samples, _), picture, score, row in zip(drawn, pictures, scores, (1, 2, 3), strict=True):
        assert prompt == image_prompt([memory[neighbors[row, TEXT, 0]]], items[row])
        decoded = held_out.codec.decode(np.array(samples) - FIRST_CODE)
        text = held_out.encoder.embed_texts([items[row].document.text])[0]
        likeness = held_out.encoder.embed_images(list(decoded)) @ text
        assert same_picture(picture, decoded[likeness.argmax()])
        assert score == pytest.approx(likeness.max(), abs=1e-5)
    for (prompt, samples, means), caption, row in zip(written, captions, (0, 1, 3), strict=True):
        assert prompt == caption_prompt([memory[neighbors[row, IMAGE, 0]]], items[row].ids[1])
        assert caption == held_out.tokenizer.decode([id - FIRST_TEXT for id in samples[int(np.argmax(means))]])
    _write_samples(held_out, "test", tmp_path, mixed, neighbors, 1, pictures, captions)
    assert [row["caption"] for row in json.loads((tmp_path / "test.json").read_text())] == [None] * 4
    np.testing.assert_array_equal(np.load(tmp_path / "test.npy"), pictures)


def test_nothing_to_ask_for_draws_nothing(held_out: _HeldOut, items, neighbors: np.ndarray, calls: list[Call]):
    pictures, scores = _images(held_out, [without(item, Text) for item in items], neighbors[:, TEXT], 2)
    assert (pictures.shape, len(scores)) == ((0, 40, 40, 3), 0)
    assert _captions(held_out, [without(item, Image) for item in items], neighbors[:, IMAGE], 2) == []
    assert not calls


def test_a_document_asks_with_its_first_text_and_its_first_image(items):
    first, second = items[:2]
    document = replace(first.document, segments=(*first.document.segments, *second.document.segments))
    both = TokenizedDocument(document, (*first.ids, *second.ids))
    for item in (first, both):
        assert _segment_ids(item, Text) is item.ids[0]
        assert _segment_ids(item, Image) is item.ids[1]
    assert _segment_ids(without(first, Text), Text) is None


class Remembered(OpenMemory):
    """A memory of documents that are given, by number."""

    def __init__(self, items: Sequence[TokenizedDocument]) -> None:
        self.items = items

    def document(self, number: int) -> TokenizedDocument:
        return self.items[number]


def test_the_first_neighbors_that_have_something_to_show(held_out: _HeldOut, items):
    """-1 is no document; one that lacks what a group shows is passed over, not counted."""
    remembered = replace(held_out, memory=Remembered([items[0], without(items[1], Text), items[2], items[3]]))
    row = np.array([2, -1, 1, 0, 3])
    assert remembered.retrieved(row, 2) == [items[2], remembered.memory.items[1]]
    assert remembered.retrieved(row[1:3], 2) == [remembered.memory.items[1]]
    texts = replace(remembered, builder=replace(held_out.builder, retrieved="text"))
    assert texts.retrieved(row, 3) == [items[2], items[0], items[3]]
    assert texts.retrieved(row, 0) == []


def of_length(item: TokenizedDocument, size: int) -> TokenizedDocument:
    """The document with so much text that it has `size` ids."""
    text = np.arange(size - 4 - len(item.ids[1]), dtype=np.int32)
    changed = TokenizedDocument(item.document, (text, item.ids[1]))
    assert len(spelled(changed)) == size
    return changed


def in_context(held_out: _HeldOut, positions: int) -> _HeldOut:
    """The same model with fewer positions."""
    params = held_out.generator.params["params"]
    params = {"params": params | {"position_embedding": params["position_embedding"][:positions]}}
    model = held_out.generator.model.clone(max_positions=positions)
    return replace(held_out, generator=replace(held_out.generator, model=model, params=params))


@pytest.mark.parametrize(
    ("room", "kept"), [(119, [0, 1, 2]), (118, [0, 1]), (80, [0, 1]), (79, [0]), (40, [0]), (39, []), (0, [])]
)
def test_documents_fit_from_the_first_on(held_out: _HeldOut, items, room: int, kept: list[int]):
    """Of 40, 40 and 39 ids, in `room` beside 50 of the main document and 8 of markup. A later one never jumps in."""
    documents = [of_length(item, size) for item, size in zip(items, (40, 40, 39, 38), strict=False)]
    small = replace(in_context(held_out, room + 58), memory=Remembered(documents))
    fitting = _fitting(small, np.array([0, 1, 2]), 3, 50)
    assert [document.ids.tolist() for document in fitting] == [spelled(documents[number]) for number in kept]


def test_prompts_leave_room_for_what_is_generated(held_out: _HeldOut, items, calls: list[Call]):
    """A second document of 40 ids has room by itself, but not with 25 codes, or with 6 ids of a caption, to come."""
    documents = [of_length(item, 40) for item in items[:2]]
    main = of_length(items[2], 41)  # of 12 text ids
    row = np.array([[0, 1]])
    for positions, images, captions in ((124, 1, 2), (118, 1, 1)):
        model = held_out.generator.model.clone(max_positions=positions)
        small = replace(held_out, generator=replace(held_out.generator, model=model), memory=Remembered(documents))
        calls.clear()
        _images(small, [main], row, 2)
        _captions(small, [main], row, 2)
        assert calls[0].prompts[0] == image_prompt(documents[:images], main)
        assert calls[1].prompts[0] == caption_prompt(documents[:captions], main.ids[1])
        assert calls[1].grammar.count == SETTINGS.max_caption_tokens


def test_perplexity_drops_the_last_documents_that_do_not_fit(held_out: _HeldOut, items, neighbors, memory):
    """The longest group of two documents has exactly the positions of the model, or one more."""
    found = [[memory[i] for i in row[TEXT, :2]] for row in neighbors]
    lengths = [
        sum(len(spelled(document)) for document in documents) + len(spelled(item))
        for documents, item in zip(found, items, strict=True)
    ]
    for positions in (max(lengths), max(lengths) - 1):
        small = in_context(held_out, positions)
        fitting = [
            documents[: 2 if length <= positions else 1] for documents, length in zip(found, lengths, strict=True)
        ]
        value = _perplexities(small, make_token_cross_entropy(small.generator.model), items, neighbors, 2)["image"]
        assert value == pytest.approx(by_hand(small, items, fitting, TEXT), rel=1e-5)


@pytest.mark.parametrize(("part", "modality", "masks"), [(TEXT, "image", 0), (IMAGE, "text", 3)])
def test_a_document_longer_than_the_context_has_no_perplexity(
    held_out: _HeldOut, items, neighbors, part: int, modality: str, masks: int
):
    """A text behind its image has two sentinels and an <eoi> more."""
    lengths = [len(spelled(item)) + masks for item in items]
    small = in_context(held_out, max(lengths) - 1)
    fitting = [item for item, length in zip(items, lengths, strict=True) if length < max(lengths)]
    assert 0 < len(fitting) < 4
    value = _perplexities(small, make_token_cross_entropy(small.generator.model), items, neighbors, 2)[modality]
    assert value == pytest.approx(by_hand(small, fitting, [[]] * len(fitting), part), rel=1e-5)
    assert _too_long(small, items)[modality] == 4 - len(fitting)
    assert _too_long(in_context(held_out, max(lengths)), items)[modality] == 0
    tiny = in_context(held_out, min(lengths) - masks - 1)
    assert _too_long(tiny, items) == {"image": 4, "text": 4}
    assert _perplexities(tiny, make_token_cross_entropy(tiny.generator.model), items, neighbors, 2) == {
        "image": None,
        "text": None,
    }


def test_each_comparison_is_of_the_right_model_and_retriever(experiment: Experiment):
    cm3 = replace(experiment, retriever=NoRetriever())
    random = replace(experiment, retriever=Random(num_neighbors=16))
    assert vanilla(experiment) == cm3
    assert comparisons(experiment, experiment) == {
        "ra_cm3": (experiment, experiment),
        "cm3": (cm3, cm3),
        "ra_cm3_random": (random, experiment),
    }
    exact = replace(experiment, retriever=Exact(num_neighbors=5))
    assert comparisons(exact, experiment) == {
        "ra_cm3_exact": (exact, experiment),
        "cm3": (cm3, cm3),
        "ra_cm3_random": (replace(experiment, retriever=Random(num_neighbors=5)), experiment),
    }
    assert list(comparisons(random, experiment)) == ["ra_cm3_random", "cm3"]
    assert comparisons(random, experiment)["ra_cm3_random"] == (random, experiment)
    assert comparisons(cm3, cm3) == {"cm3": (cm3, cm3)}
    unretrieved = comparisons(cm3, experiment)
    assert list(unretrieved) == ["ra_cm3_noretriever", "cm3", "ra_cm3_random"]
    assert unretrieved["ra_cm3_random"] == (replace(experiment, retriever=Random(num_neighbors=1)), experiment)
    alone = replace(experiment, compare_with_cm3=False, evaluation=replace(SETTINGS, control=False))
    assert comparisons(alone, alone) == {"ra_cm3": (alone, alone)}


def test_all_comparisons_are_retrieved_for_and_evaluated(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    done: list[tuple[Any, ...]] = []
    monkeypatch.setattr(stage, "index", lambda inference, _: done.append(("index", inference)))
    monkeypatch.setattr(stage, "retrieve", lambda inference, _, splits: done.append(("retrieve", inference, splits)))

    def evaluated(inference: Experiment, model: Experiment, _: Workdir) -> dict[str, Any]:
        done.append(("evaluate", inference, model))
        return {"number": len(done)}

    monkeypatch.setattr(stage, "evaluate", evaluated)
    out = evaluate_all(experiment, experiment, Workdir(tmp_path, "tiny"))
    assert out == {"ra_cm3": {"number": 3}, "cm3": {"number": 6}, "ra_cm3_random": {"number": 9}}
    pairs = [*comparisons(experiment, experiment).values()]
    assert done == [
        step
        for inference, model in pairs
        for step in (
            ("index", inference),
            ("retrieve", inference, ("validation", "test")),
            ("evaluate", inference, model),
        )
    ]


def test_the_control_has_the_trained_model_and_its_own_retriever(experiment: Experiment, store: Workdir):
    random = replace(experiment, retriever=Random(num_neighbors=16))
    control = _HeldOut.open(random, experiment, store)
    assert control.memory is not None
    assert isinstance(control.memory.experiment.retriever, Random)
    assert len(control.memory.memory) == 48  # unseen entities too, which training never retrieves
    assert control.builder.retrieved == "document"
    texts = replace(random, batches=replace(experiment.batches, retrieved="text"))
    assert _HeldOut.open(texts, experiment, store).builder.retrieved == "text"
    model = build_model(experiment, control.generator.vocabulary, 25)
    ours, theirs = (
        jax.tree.leaves(open_params(each, store, model))
        for each in (experiment, replace(random, retriever=NoRetriever()))
    )
    held = jax.tree.leaves(control.generator.params)
    assert all(np.array_equal(a, b) for a, b in zip(held, ours, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(held, theirs, strict=True))


def test_an_evaluation_is_made_once_for_the_splits_that_there_are(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    opened, splits = [], []
    monkeypatch.setattr(_HeldOut, "open", lambda *what: opened.append(what[:2]) or "held out")

    def of_split(held_out: Any, split: str, folder: Path) -> dict[str, Any]:
        splits.append((held_out, split))
        (folder / f"{split}.json").write_text(split)
        return {"documents": len(splits)}

    monkeypatch.setattr(stage, "_evaluate_split", of_split)
    random = replace(experiment, retriever=Random(num_neighbors=16))
    workdir = Workdir(tmp_path / "new", "tiny")
    for _ in range(2):
        found = evaluate(random, experiment, workdir)
        assert found == {"validation": {"documents": 1}, "test": {"documents": 2}}
    assert opened == [(random, experiment)]
    assert splits == [("held out", "validation"), ("held out", "test")]
    only = replace(experiment, data=replace(experiment.data, validation=None))
    assert evaluate(only, only, workdir) == {"test": {"documents": 3}}
    folder = workdir.require(recipes.evaluation(only, only), "").folder
    assert {path.name for path in folder.iterdir()} == {"metrics.json", "test.json", "manifest.json"}


def test_encoders_are_judged_on_the_first_held_out_documents(
    experiment: Experiment, store: Workdir, held_out: _HeldOut
):
    """PSNR of the pictures drawn again from their codes, and ranks among as many documents as are evaluated."""
    found = evaluate_encoders(experiment, store)
    assert list(found) == ["validation", "test"]
    for split in found:
        documents = [item.document for item in open_documents(experiment, store, split).many(range(4))]
        pixels = np.stack([document.images[0].pixels() for document in documents])  # of the size of the VQGAN's
        codes = held_out.codec.encode(list(pixels))
        errors = ((held_out.codec.decode(codes) - pixels.astype(float)) ** 2).mean((1, 2, 3))
        assert found[split]["vqgan"]["psnr"] == pytest.approx(np.mean(10 * np.log10(255**2 / errors)), abs=1e-4)
        assert found[split]["vqgan"]["codebook_use"] == len(np.unique(codes)) / 16
        text = held_out.encoder.embed_texts([document.text for document in documents])
        image = held_out.encoder.embed_images(list(pixels))
        scores = text @ image.T
        clip = found[split]["clip"]
        assert clip["pairs"] == 4
        assert clip["text_to_image_recall_at_1"] == np.mean(scores.argmax(1) == np.arange(4))
        assert clip["image_to_text_recall_at_1"] == np.mean(scores.argmax(0) == np.arange(4))
        assert clip["text_to_image_recall_at_5"] == 1


def test_defaults_are_those_of_the_paper():
    defaults = EvaluationConfig()
    assert (defaults.num_retrieved, defaults.image_samples, defaults.caption_samples) == (2, 10, 32)
    assert defaults.control
