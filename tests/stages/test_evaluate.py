"""Evaluation recomputed by hand: from the stored neighbors to prompts, perplexities, and the samples that are kept."""

import json
import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding_spy import Call, watch_decoding
from replaced import with_members
from tiny_prompts import FIRST_CODE, FIRST_MASK, FIRST_TEXT, caption_prompt, image_prompt, of_length, spelled

from rac3 import recipes
from rac3.artifacts.arrays import read_array
from rac3.artifacts.workdir import Workdir
from rac3.cli import STAGES
from rac3.config import InputError, load_config_module
from rac3.documents.document import Image, Text
from rac3.documents.store import TokenizedDocument
from rac3.documents.world import World, all_settings, draw
from rac3.evaluation.captions import caption_metrics
from rac3.evaluation.features import Embedded
from rac3.evaluation.settings import EvaluationConfig
from rac3.experiment import Experiment, Split
from rac3.generation.sampling import Sampling
from rac3.generation.tasks.score import make_token_cross_entropy
from rac3.held_out import best_captions, best_images, retrieved, segment_ids
from rac3.retrieval.baselines import NoRetriever, Random
from rac3.retrieval.exact import Exact
from rac3.retrieval.open_memory import OpenMemory
from rac3.retrieval.scann import Scann
from rac3.run import Run
from rac3.stages import evaluate as stage
from rac3.stages.evaluate import (
    MODALITIES,
    EvaluateOptions,
    _accuracies,
    _baseline_scores,
    _baselines,
    _caption_scores,
    _evaluate_split,
    _groups,
    _too_long,
    _write_samples,
    best_step,
    comparisons,
    evaluate,
    evaluate_encoders,
    perplexities,
)

TEXT, IMAGE = 0, 1  # the parts of a query
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
def run(experiment: Experiment, store: Workdir) -> Run:
    """The tiny model with its weights made larger: after six steps it hardly minds what is in context."""
    trained = Run(experiment, store)
    return with_members(trained, params=jax.tree.map(lambda leaf: 6 * leaf, trained.params))


@pytest.fixture(scope="module")
def items(run: Run) -> list[TokenizedDocument]:
    """The test documents, a caption and a picture each."""
    return run.documents("test").many(range(4))


@pytest.fixture(scope="module")
def neighbors(experiment: Experiment, store: Workdir) -> np.ndarray:
    """Memory ids [documents, parts, depth] as they are stored."""
    found = read_array(store.require(recipes.neighbors(experiment, "test")).folder / "ids")
    assert all(set(by_text) != set(by_image) for by_text, by_image in found[:, :, :2].tolist())
    return found


@pytest.fixture(scope="module")
def memory(run: Run) -> list[TokenizedDocument]:
    """All documents of the memory, by memory id: the training documents, then the part of the unseen entities."""
    parts = [run.documents(split) for split in ("train", "memory")]
    assert [len(part) for part in parts] == [36, 12]
    return [item for part in parts for item in part.many(range(len(part)))]


@pytest.fixture
def no_perplexity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "perplexities", no_perplexities)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    return watch_decoding(monkeypatch, real=False)


def same_picture(a: np.ndarray, b: np.ndarray) -> bool:
    """Of equal codes; those of a batch of another size may round to the next value."""
    return np.abs(a.astype(int) - b).max() <= 1


def plain_perplexity(run: Run, sequences: Sequence[tuple[list[int], list[int]]]) -> float:
    """Of the ids that end each (context, scored) pair, by the model with no packing, loss or cache of ours."""
    model, params = run.model, run.params
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
        hidden = model.apply(params, ids, positions, places, segments)
        return jax.nn.log_softmax(model.apply(params, hidden, method="logits"))

    given = np.asarray(log_probs(params, ids[:, :width], places[:, :width], segments[:, :width]))
    nats = [
        -given[row, place - 1, ids[row, place]]
        for row, (context, scored) in enumerate(sequences)
        for place in range(len(context), len(context) + len(scored))
    ]
    return math.exp(np.mean(nats))


def by_hand(
    run: Run, items: Sequence[TokenizedDocument], documents: Sequence[Sequence[TokenizedDocument]], part: int
) -> float:
    """Perplexity of the images after their captions, or (`IMAGE` asks) of the captions after their images."""
    pairs = [
        (image_prompt(found, item.ids[0]), (FIRST_CODE + item.ids[1]).tolist())
        if part == TEXT
        else (caption_prompt(found, item.ids[1]), (FIRST_TEXT + item.ids[0]).tolist())
        for item, found in zip(items, documents, strict=True)
    ]
    return plain_perplexity(run, pairs)


class Evaluated(NamedTuple):
    """One evaluation of the test split: its numbers, its files, and what the decoder saw."""

    metrics: dict[str, Any]
    rows: list[dict[str, Any]]
    pictures: np.ndarray
    images: list[tuple[list[int], list[list[int]], list[float]]]  # prompt, samples, mean log probabilities
    captions: list[tuple[list[int], list[list[int]], list[float]]]
    calls: list[Call]


def no_perplexities(_: Any, __: Any, items: Any, neighbors: np.ndarray, k: int) -> dict[str, float]:
    """In place of `perplexities`: by what they are asked for, which takes no time."""
    return {"image": 100.0 + k, "text": 200.0 + 10 * len(items) + k + float(neighbors[0, TEXT, 0]) / 100}


@pytest.fixture(scope="module")
def evaluated(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    folder = tmp_path_factory.mktemp("evaluated")
    with pytest.MonkeyPatch.context() as patch:
        calls = watch_decoding(patch, real=False)
        patch.setattr(stage, "perplexities", no_perplexities)
        metrics = _evaluate_split(run, "test", folder)
    rows, pictures = json.loads((folder / "test.json").read_text()), np.load(folder / "test.npy")
    assert len(calls) == 2
    images, captions = calls[0].samples(), calls[1].samples()
    return Evaluated(metrics, rows, pictures, images, captions, calls)


@pytest.mark.parametrize(("part", "modality"), [(TEXT, "image"), (IMAGE, "text")])
def test_perplexity_is_that_of_the_plain_model_after_what_the_prompt_retrieved(
    run: Run, items, neighbors: np.ndarray, memory, part: int, modality: str
):
    """Images after the neighbors of their text, texts after those of their image, for each number of documents."""
    expected = [by_hand(run, items, [[memory[i] for i in row[part, :k]] for row in neighbors], part) for k in range(3)]
    other = by_hand(run, items, [[memory[i] for i in row[1 - part, :2]] for row in neighbors], part)
    values = [*expected, other]
    assert min(abs(a / b - 1) for n, a in enumerate(values) for b in values[:n]) > 1e-3  # all can be told apart
    cross_entropy = make_token_cross_entropy(run.model)
    found = [perplexities(run, cross_entropy, items, neighbors, k)[modality] for k in range(3)]
    assert found == pytest.approx(expected, rel=1e-5)  # float32 sums of some 100 terms


def test_captions_are_scored_against_the_text_of_their_image(evaluated: Evaluated, items):
    """Documents without a text, or without an image, do not count."""
    captions = [row["caption"] for row in evaluated.rows]
    assert evaluated.metrics["captions"] == caption_metrics(captions, [[item.document.text] for item in items])
    some = [without(items[0], Image), items[1], without(items[2], Text), items[3]]
    kept = [[items[1].document.text], [items[3].document.text]]
    assert _caption_scores(some, ["a red", "a blue", "a red flag"]) == caption_metrics(["a red", "a red flag"], kept)


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
        assert prompt == image_prompt([memory[i] for i in row[TEXT, :2]], item.ids[0])
    for item, row, (prompt, _, _) in zip(items, neighbors, evaluated.captions, strict=True):
        assert prompt == caption_prompt([memory[i] for i in row[IMAGE, :2]], item.ids[1])


def test_samples_are_drawn_as_the_settings_say(evaluated: Evaluated):
    images, captions = evaluated.calls
    assert (images.sampling, captions.sampling) == (SETTINGS.image_sampling, SETTINGS.caption_sampling)
    assert ({run.count for run in images.draws}, {run.count for run in captions.draws}) == ({25}, {6})
    assert (len(images.keys), len(captions.keys)) == (4 * 3, 4 * 5)
    for call in evaluated.calls:
        assert len(set(call.keys)) == len(call.keys)


def test_the_image_nearest_to_its_caption_is_kept(evaluated: Evaluated, run: Run, items):
    kept, scores = [], []
    for item, (_, samples, _), picture, row in zip(
        items, evaluated.images, evaluated.pictures, evaluated.rows, strict=True
    ):
        drawn = run.images.decode(np.array(samples) - FIRST_CODE)
        text = run.encoder.embed_texts([item.document.text])[0]
        likeness = [float(vector @ text) for vector in run.encoder.embed_images(list(drawn))]
        kept.append(int(np.argmax(likeness)))
        scores.append(max(likeness))
        assert same_picture(picture, drawn[kept[-1]])
        assert row["text"] == item.document.text
    assert len(set(kept)) > 1
    assert evaluated.metrics["clip_score"] == pytest.approx(np.mean(scores), abs=1e-5)


def test_the_most_probable_caption_is_kept(evaluated: Evaluated, run: Run):
    best = [int(np.argmax(means)) for _, _, means in evaluated.captions]
    assert len(set(best)) > 1
    assert {len(samples) for _, samples, _ in evaluated.captions} == {5}
    wanted = [
        run.tokenizer.decode([id - FIRST_TEXT for id in samples[choice]])
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


def test_accuracies_compare_each_row_with_its_own_document(run: Run, items, experiment: Experiment):
    world = World("test", seen=12, unseen=4)
    names = [str(item.document.metadata["entity"]) for item in items]
    assert len(set(names)) == 4
    pictures = np.stack([item.document.images[0].pixels() for item in items])
    captions = [f"the flag of {name}" for name in names]
    found = _accuracies(experiment, items, pictures, captions)
    assert found == {"entity_accuracy": 1, "joint_accuracy": 1, "name_accuracy": 1, "joint_name_accuracy": 0}
    some = pictures.copy()
    some[[0, 2]] = pictures[[2, 0]]
    some[3] = draw(world.entities()[0], next(setting for _, setting in world._plan()))
    mixed = [captions[1], captions[0], *captions[2:]]
    found = _accuracies(experiment, items, some, mixed)
    assert (found["entity_accuracy"], found["name_accuracy"]) == (1 / 4, 2 / 4)


def test_joint_accuracies_ask_for_the_setting_too(run: Run, items, experiment: Experiment):
    """Of four pictures and captions, one of each has another setting, and another one another entity."""
    entities = {entity.name: entity for entity in World(seen=12, unseen=4).entities()}
    names = [str(item.document.metadata["entity"]) for item in items]
    texts = [item.document.text for item in items]
    settings = {setting.words: setting for setting in all_settings()}
    own = [settings[text.split(" ", 1)[1]] for text in texts]
    other = next(each for each in all_settings() if each.frame != own[0].frame and each.ground == own[0].ground)
    drawn = [draw(entities[names[0]], other), draw(entities[names[2]], own[1])]
    drawn += [draw(entities[name], setting) for name, setting in zip(names[2:], own[2:], strict=True)]
    captions = [f"{names[0]} {other.words}", texts[1].replace(names[1], names[2]), *texts[2:]]
    assert _accuracies(experiment, items, np.stack(drawn), captions) == {
        "entity_accuracy": 3 / 4,
        "joint_accuracy": 2 / 4,
        "name_accuracy": 3 / 4,
        "joint_name_accuracy": 2 / 4,
    }
    bare = [
        replace(item, document=replace(item.document, metadata={"entity": names[i]})) for i, item in enumerate(items)
    ]
    unknown = _accuracies(experiment, bare, np.stack(drawn), captions)  # documents that do not say all that is judged
    assert (unknown["entity_accuracy"], unknown["joint_accuracy"], unknown["joint_name_accuracy"]) == (
        3 / 4,
        None,
        None,
    )


def test_copying_takes_the_first_document_that_each_part_retrieved(run: Run, items, neighbors: np.ndarray, memory):
    """The picture of what the text retrieved, as its codes have it, and the text of what the image retrieved."""
    images, captions = _baselines(run, items, neighbors, 2)["copied"]
    for row, image, caption in zip(neighbors, images, captions, strict=True):
        by_text, by_image = memory[row[TEXT, 0]], memory[row[IMAGE, 0]]
        assert same_picture(image, run.images.decode(by_text.ids[1][None])[0])
        assert caption == by_image.document.text
    images, captions = _baselines(run, items[:1], np.full_like(neighbors[:1], -1), 2)["copied"]
    assert (images.max(), captions) == (0, [""])


def test_the_mean_is_of_the_documents_in_context(run: Run, items, neighbors: np.ndarray, memory):
    """In pixels, of as many as there are: of the first row, only one."""
    some = neighbors.copy()
    some[0, TEXT, 1:] = -1
    images, captions = _baselines(run, items, some, 2)["mean"]
    assert captions == []
    for number, (row, image) in enumerate(zip(some, images, strict=True)):
        decoded = run.images.decode(np.stack([memory[i].ids[1] for i in row[TEXT, : 2 if number else 1]]))
        assert np.abs(image - decoded.astype(float).mean(0)).max() <= 1.5  # rounding, twice


def test_the_truth_and_its_codes_are_baselines(run: Run, items, neighbors: np.ndarray):
    made = _baselines(run, items, neighbors, 2)
    assert list(made) == ["copied", "mean", "reconstructed", "original"]
    pictures = np.stack([item.document.images[0].pixels() for item in items])
    np.testing.assert_array_equal(made["original"][0], pictures)
    assert made["original"][1] == [item.document.text for item in items]
    again = run.images.decode(np.stack([item.ids[1] for item in items]))
    assert all(map(same_picture, made["reconstructed"][0], again))
    assert list(_baselines(run, items, neighbors, 0)) == ["reconstructed", "original"]  # nothing is retrieved
    text = replace(
        items[0], document=replace(items[0].document, segments=items[0].document.segments[:1]), ids=items[0].ids[:1]
    )
    assert list(_baselines(run, [text, *items[1:]], neighbors, 2)) == ["copied", "mean"]


def test_what_baselines_score_is_in_the_metrics(
    evaluated: Evaluated, run: Run, items, experiment: Experiment, neighbors
):
    made, found = _baselines(run, items, neighbors, 2), evaluated.metrics["baselines"]
    texts = [[item.document.text] for item in items]
    for name, (images, captions) in made.items():
        accuracies = _accuracies(experiment, items, images, captions)
        scores = caption_metrics(captions, texts) if captions else {}
        assert found[name] == {**accuracies, "captions": scores, "pictures": {}}  # no network is named
    truth = found["original"]
    assert [truth[name] for name in accuracies] == [1] * len(accuracies)
    assert truth["captions"]["rouge_l"]["value"] == pytest.approx(1)
    assert found["copied"]["joint_accuracy"] == 0  # the setting is always another one


class Mean:
    """A network of one feature."""

    name = "FID"

    def embed(self, pictures: Sequence[Any]) -> Embedded:
        return Embedded(np.array([[np.mean(picture)] for picture in pictures], np.float32), None)


def test_copies_are_compared_with_the_real_pictures(
    run: Run, items, neighbors: np.ndarray, monkeypatch: pytest.MonkeyPatch
):
    """Of one feature, the Frechet distance is (m - m')^2 + (s - s')^2, with the deviations of n - 1."""
    items, neighbors = 2 * items, np.concatenate(2 * [neighbors])  # of fewer than eight pictures there is no distance
    means = [float(np.mean(item.document.images[0].pixels())) for item in items]
    real = Embedded(np.array(means, np.float32)[:, None], None)
    vectors = run.encoder.embed_images([item.document.images[0] for item in items])
    monkeypatch.setattr(stage, "real_pictures", lambda run, split: {"test": (real, vectors)}[split])
    settings = replace(run.experiment.evaluation, features="net.pth")
    named = with_members(run, replace(run.experiment, evaluation=settings), features=Mean())
    images, captions = _baselines(run, items, neighbors, 2)["copied"]
    found = _baseline_scores(named, "test", items, images, captions)["pictures"]
    copied = images.mean((1, 2, 3))
    distance = (copied.mean() - np.mean(means)) ** 2 + (copied.std(ddof=1) - np.std(means, ddof=1)) ** 2
    assert found["FID"]["frechet"]["value"] == pytest.approx(distance, rel=1e-3)
    assert found["FID"]["images"] == found["FID"]["real_images"] == len(items)


def test_captions_are_not_scored_where_a_document_has_no_picture(run: Run, items, neighbors: np.ndarray):
    """They are asked for by pictures, so rows would not be those of the documents."""
    images, captions = _baselines(run, items, neighbors, 2)["copied"]
    bare = replace(items[0], document=replace(items[0].document, segments=items[0].document.segments[:1]))
    assert _baseline_scores(run, "test", [bare, *items[1:]], images, captions)["captions"] == {}


BY_STEP = {3: {"image": 6.0, "text": 5.95}, 5: {"image": 7.0, "text": 5.0}, 6: {"image": 3.0, "text": 12.5}}


def test_the_best_step_has_the_lowest_product_of_perplexities(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """35, against 35.7 (of a smaller sum) and 37.5, on the tuning documents, after as many as an evaluation has."""
    asked: list[tuple[Any, ...]] = []

    def by_step(run: Run, _: Any, items: Any, neighbors: np.ndarray, k: int) -> dict[str, float | None]:
        asked.append((run.step, run.experiment, run.trained, [*items], k))
        return BY_STEP[run.step]

    monkeypatch.setattr(stage, "perplexities", by_step)
    monkeypatch.setattr(stage, "held_out", lambda run, split: ([split], np.zeros((1, 2, 3), int)))
    monkeypatch.setattr(Run, "kept_steps", lambda run: [3, 5, 6])
    monkeypatch.setattr(Run, "model", None)
    monkeypatch.setattr(stage, "make_token_cross_entropy", lambda model: None)
    for each, k in ((experiment, 2), (experiment.vanilla(), 0)):
        run = Run(each, Workdir(tmp_path, "tiny"))
        assert [best_step(run), best_step(run)] == [5, 5]
        assert asked == [(step, each, each, ["tuning"], k) for step in (3, 5, 6)]  # once
        assert capsys.readouterr().out == f"best step of {each.model_name}: 5, of 3, 5, 6\n"
        asked.clear()
        folder = run.artifact(recipes.best).folder
        found = json.loads((folder / "metrics.json").read_text())
        assert found["perplexity"] == {str(step): values for step, values in BY_STEP.items()}
    monkeypatch.setitem(BY_STEP, 3, {"image": 4.0, "text": None})  # a modality that there is not
    longer = replace(experiment, training=replace(experiment.training, keep=20))
    assert best_step(Run(longer, Workdir(tmp_path, "tiny"))) == 3


def test_a_step_has_its_own_parameters(experiment: Experiment, store: Workdir):
    """Those of its checkpoint, whatever is open already; of the tiny run, steps 3 and 6 are kept."""
    last = Run(experiment, store)
    assert last.kept_steps() == [3, 6]
    leaves = [
        jax.tree.leaves(each.params)
        for each in (last, last.variant(experiment, experiment, 3), last.variant(experiment, experiment, 6))
    ]
    same = [all(np.array_equal(a, b) for a, b in zip(leaves[0], each, strict=True)) for each in leaves[1:]]
    assert same == [False, True]
    third = last.variant(experiment, experiment, 3)
    assert [each.step for each in (third, third.with_retriever(Exact()), pickle.loads(pickle.dumps(third)))] == [3] * 3
    assert third.model_name == "ra_cm3_best"
    assert third.engine is not last.engine
    assert third.evaluation_recipe.fingerprint != last.evaluation_recipe.fingerprint
    with pytest.raises(InputError, match="holds no checkpoint of step 4, only of 3, 6"):
        _ = last.variant(experiment, experiment, 4).params


def test_accuracies_without_meaning_are_none(items, experiment: Experiment):
    pictures, captions = np.zeros((4, 40, 40, 3), np.uint8), ["a"] * 4
    none = dict.fromkeys(("entity_accuracy", "joint_accuracy", "name_accuracy", "joint_name_accuracy"))
    assert _accuracies(experiment, items, pictures[1:], captions[1:]) == none  # a document lacks a text, or an image
    seen = replace(experiment, data=replace(experiment.data, entity_field="seen"))
    assert _accuracies(seen, items, pictures, ["it is false", *captions[1:]])["name_accuracy"] == 1 / 4
    assert (
        _accuracies(
            replace(experiment, data=replace(experiment.data, entity_field="concept")), items, pictures, [""] * 4
        )
        == none
    )
    unnamed = replace(experiment, data=replace(experiment.data, entity_field=""))
    assert _accuracies(unnamed, items, pictures, captions)["name_accuracy"] is None

    class Other:
        """A source that draws no emblems."""

        shards = read = lambda *_: ()

    other = replace(experiment, data=replace(experiment.data, train=Other()))
    assert _accuracies(other, items, pictures, captions) == none | {"name_accuracy": 0}


def test_documents_that_name_no_entity_are_left_out(items, experiment: Experiment):
    """An empty name would be in every caption: three of four documents have one, and one caption is right."""
    names = [str(item.document.metadata["entity"]) for item in items]
    metadata: list[dict[str, Any]] = [{"entity": names[0]}, {"entity": ""}, {"entity": names[2]}, {}]
    some = [
        replace(item, document=replace(item.document, metadata=each))
        for item, each in zip(items, metadata, strict=True)
    ]
    pictures = np.stack([item.document.images[0].pixels() for item in items])
    found = _accuracies(experiment, some, pictures, [f"a {names[0]}", "a", "a", "a"])
    assert (found["entity_accuracy"], found["name_accuracy"]) == (1, 1 / 2)


@pytest.mark.usefixtures("no_perplexity")
@pytest.mark.parametrize(("split", "k"), [("test", 0), ("validation", 1)])
def test_fewer_documents_in_context(
    run: Run, experiment: Experiment, store: Workdir, memory, calls, tmp_path: Path, split: Split, k: int
):
    """`num_retrieved` is how many are in the prompts and rows of either split, and the last of the perplexities."""
    items = run.documents(split).many(range(2))
    neighbors = read_array(store.require(recipes.neighbors(experiment, split)).folder / "ids")
    few = replace(SETTINGS, num_retrieved=k, documents=2)
    metrics = _evaluate_split(with_members(run, replace(experiment, evaluation=few)), split, tmp_path)
    assert metrics["documents"] == 2
    assert [list(values) for values in metrics["perplexity_by_k"].values()] == [[str(n) for n in range(k + 1)]] * 2
    prompts = [prompt for prompt, _, _ in calls[0].samples()]
    assert prompts == [
        image_prompt([memory[i] for i in neighbors[row, TEXT, :k]], items[row].ids[0]) for row in range(2)
    ]
    prompts = [prompt for prompt, _, _ in calls[1].samples()]
    assert prompts == [
        caption_prompt([memory[i] for i in neighbors[row, IMAGE, :k]], items[row].ids[1]) for row in range(2)
    ]
    rows = json.loads((tmp_path / f"{split}.json").read_text())
    assert [row["key"] for row in rows] == [item.document.key for item in items]
    assert [len(row["retrieved"]["image"]) for row in rows] == [k, k]


@pytest.mark.usefixtures("no_perplexity")
def test_a_model_that_does_not_retrieve_has_nothing_in_context(run: Run, calls, tmp_path):
    alone = run.experiment.vanilla()
    metrics = _evaluate_split(run.variant(alone, alone), "test", tmp_path)
    assert [list(values) for values in metrics["perplexity_by_k"].values()] == [["0"], ["0"]]
    assert {prompt[1:3].count(2) for prompt in calls[0].prompts} == {1}  # <eod>, then the main document at once
    assert {prompt.count(1) for call in calls for prompt in call.prompts} == {1}
    for row in json.loads((tmp_path / "test.json").read_text()):
        assert row["retrieved"] == {"text": [], "image": []}


def test_samples_are_a_function_of_the_seed(run: Run, items, neighbors: np.ndarray, calls: list[Call]):
    for seed in (0, 0, 1):
        fitted = dict(images=run.images, encoder=run.encoder, memory=lambda _: run.memory())  # with the first seed
        seeded = with_members(run, replace(run.experiment, seed=seed), **fitted)
        best_images(seeded, "test", items, neighbors[:, TEXT], 0)
        best_captions(seeded, "test", items, neighbors[:, IMAGE], 0)
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
    run: Run, items, neighbors: np.ndarray, memory, calls: list[Call], tmp_path: Path
):
    """They ask for nothing; what the others retrieve, and what they are scored against, stays theirs."""
    mixed = [without(items[0], Text), items[1], without(items[2], Image), items[3]]
    pictures, scores = best_images(run, "test", mixed, neighbors[:, TEXT], 1)
    captions = best_captions(run, "test", mixed, neighbors[:, IMAGE], 1)
    drawn, written = calls[0].samples(), calls[1].samples()
    for (prompt, samples, _), picture, score, row in zip(drawn, pictures, scores, (1, 2, 3), strict=True):
        assert prompt == image_prompt([memory[neighbors[row, TEXT, 0]]], items[row].ids[0])
        decoded = run.images.decode(np.array(samples) - FIRST_CODE)
        text = run.encoder.embed_texts([items[row].document.text])[0]
        likeness = run.encoder.embed_images(list(decoded)) @ text
        assert same_picture(picture, decoded[likeness.argmax()])
        assert score == pytest.approx(likeness.max(), abs=1e-5)
    for (prompt, samples, means), caption, row in zip(written, captions, (0, 1, 3), strict=True):
        assert prompt == caption_prompt([memory[neighbors[row, IMAGE, 0]]], items[row].ids[1])
        assert caption == run.tokenizer.decode([id - FIRST_TEXT for id in samples[int(np.argmax(means))]])
    _write_samples(run, "test", tmp_path, mixed, neighbors, 1, pictures, captions)
    assert [row["caption"] for row in json.loads((tmp_path / "test.json").read_text())] == [None] * 4
    np.testing.assert_array_equal(np.load(tmp_path / "test.npy"), pictures)


def test_nothing_to_ask_for_draws_nothing(run: Run, items, neighbors: np.ndarray, calls: list[Call]):
    pictures, scores = best_images(run, "test", [without(item, Text) for item in items], neighbors[:, TEXT], 2)
    assert (pictures.shape, len(scores)) == ((0, 40, 40, 3), 0)
    assert best_captions(run, "test", [without(item, Image) for item in items], neighbors[:, IMAGE], 2) == []
    assert not calls


def test_a_document_asks_with_its_first_text_and_its_first_image(items):
    first, second = items[:2]
    document = replace(first.document, segments=(*first.document.segments, *second.document.segments))
    both = TokenizedDocument(document, (*first.ids, *second.ids))
    for item in (first, both):
        assert segment_ids(item, Text) is item.ids[0]
        assert segment_ids(item, Image) is item.ids[1]
    assert segment_ids(without(first, Text), Text) is None


class Remembered(OpenMemory):
    """A memory of documents that are given, by number."""

    def __init__(self, items: Sequence[TokenizedDocument]) -> None:
        self.items = items

    def document(self, number: int) -> TokenizedDocument:
        return self.items[number]


def test_the_first_neighbors_that_have_something_to_show(run: Run, items):
    """-1 is no document; one that lacks what a group shows is passed over, not counted."""
    remembered = Remembered([items[0], without(items[1], Text), items[2], items[3]])
    whole = with_members(run, memory=lambda _: remembered)
    row = np.array([2, -1, 1, 0, 3])
    assert retrieved(whole, row, 2) == [items[2], remembered.items[1]]
    assert retrieved(whole, row[1:3], 2) == [remembered.items[1]]
    texts = with_members(whole, builder=replace(run.builder, retrieved="text"))
    assert retrieved(texts, row, 3) == [items[2], items[0], items[3]]
    assert retrieved(texts, row, 0) == []


def in_context(run: Run, positions: int) -> Run:
    """The same model with fewer positions."""
    params = run.params["params"]
    params = {"params": params | {"position_embedding": params["position_embedding"][:positions]}}
    return with_members(run, model=run.model.clone(max_positions=positions), params=params)


def test_prompts_leave_room_for_what_is_generated(
    run: Run, items, calls: list[Call], capsys: pytest.CaptureFixture[str]
):
    """A second document of 40 ids has room by itself, but not with 25 codes, or with 6 ids of a caption, to come."""
    documents = [of_length(item, 40) for item in items[:2]]
    main = of_length(items[2], 41)  # of 12 text ids
    row = np.array([[0, 1]])
    for positions, images, captions in ((120, 2, 2), (119, 1, 2), (118, 1, 2), (117, 1, 1)):
        model = run.model.clone(max_positions=positions)
        small = with_members(run, model=model, memory=lambda _: Remembered(documents))
        calls.clear()
        best_images(small, "validation", [main], row, 2)
        best_captions(small, "test", [main], row, 2)
        assert calls[0].prompts[0] == image_prompt(documents[:images], main.ids[0])
        assert calls[1].prompts[0] == caption_prompt(documents[:captions], main.ids[1])
        assert calls[1].draws[0].count == SETTINGS.max_caption_tokens
        said = [
            f"{what}: {2 - kept} of 2 retrieved documents did not fit into the context"
            for what, kept in (("validation images", images), ("test captions", captions))
            if kept < 2
        ]
        assert capsys.readouterr().out.splitlines() == said


def test_perplexity_drops_the_last_documents_that_do_not_fit(run: Run, items, neighbors, memory):
    """The longest group of two documents has exactly the positions of the model, or one more."""
    found = [[memory[i] for i in row[TEXT, :2]] for row in neighbors]
    lengths = [
        sum(len(spelled(document)) for document in documents) + len(spelled(item))
        for documents, item in zip(found, items, strict=True)
    ]
    for positions in (max(lengths), max(lengths) - 1):
        small = in_context(run, positions)
        fitting = [
            documents[: 2 if length <= positions else 1] for documents, length in zip(found, lengths, strict=True)
        ]
        value = perplexities(small, make_token_cross_entropy(small.model), items, neighbors, 2)["image"]
        assert value == pytest.approx(by_hand(small, items, fitting, TEXT), rel=1e-5)


def test_perplexity_packs_no_more_groups_than_a_row_may_have(run: Run, items, neighbors):
    """The number of groups in the fullest row, on long rows."""
    batches = replace(run.experiment.batches, row_length=4096, max_groups=2)
    limited = run.variant(replace(run.experiment, batches=batches), run.trained)
    most: list[int] = []

    def cross_entropy(params, batch):
        most.append(int(batch.segments.max()))
        return np.zeros(batch.tokens.shape)

    perplexities(limited, cross_entropy, items, neighbors, 0)
    assert max(most) == 2


@pytest.mark.parametrize(("part", "modality", "masks"), [(TEXT, "image", 0), (IMAGE, "text", 3)])
def test_a_document_longer_than_the_context_has_no_perplexity(
    run: Run, items, neighbors, part: int, modality: str, masks: int
):
    """A text after its image has two sentinels and an <eoi> more."""
    lengths = [len(spelled(item)) + masks for item in items]
    small = in_context(run, max(lengths) - 1)
    fitting = [item for item, length in zip(items, lengths, strict=True) if length < max(lengths)]
    assert 0 < len(fitting) < 4
    value = perplexities(small, make_token_cross_entropy(small.model), items, neighbors, 2)[modality]
    assert value == pytest.approx(by_hand(small, fitting, [[]] * len(fitting), part), rel=1e-5)
    assert _groups(small, MODALITIES[part][1], items, neighbors[:, part], 2)[1] == len(fitting)  # none has room
    assert _groups(small, MODALITIES[part][1], items, neighbors[:, part], 0)[1] == 0
    assert _too_long(small, items)[modality] == 4 - len(fitting)
    assert _too_long(in_context(run, max(lengths)), items)[modality] == 0
    tiny = in_context(run, min(lengths) - masks - 1)
    assert _too_long(tiny, items) == {"image": 4, "text": 4}
    assert perplexities(tiny, make_token_cross_entropy(tiny.model), items, neighbors, 2) == {
        "image": None,
        "text": None,
    }


def pairs(compared: Mapping[str, Run]) -> dict[str, tuple[Experiment, Experiment]]:
    """Name -> (retriever at inference, model)."""
    return {name: (each.experiment, each.trained) for name, each in compared.items()}


def test_each_comparison_is_of_the_right_model_and_retriever(experiment: Experiment, store: Workdir):
    cm3 = replace(experiment, retriever=NoRetriever())
    random = replace(experiment, retriever=Random(num_neighbors=16))
    assert experiment.vanilla() == cm3
    run = Run(experiment, store)
    compared = comparisons(run)
    assert pairs(compared) == {
        "ra_cm3": (experiment, experiment),
        "cm3_best": (cm3, cm3),
        "cm3": (cm3, cm3),
        "ra_cm3_random": (random, experiment),
    }
    assert compared["ra_cm3"] is run
    best = best_step(run.variant(cm3, cm3))
    assert {name: each.step for name, each in compared.items() if each.step is not None} == {"cm3_best": best}
    untuned = replace(experiment, data=replace(experiment.data, tuning=None))
    assert list(comparisons(Run(untuned, store))) == ["ra_cm3", "cm3", "ra_cm3_random"]
    exact = replace(experiment, retriever=Exact(num_neighbors=5))
    assert pairs(comparisons(Run(exact, store, experiment))) == {
        "ra_cm3_exact": (exact, experiment),
        "cm3_best": (cm3, cm3),
        "cm3": (cm3, cm3),
        "ra_cm3_random": (replace(experiment, retriever=Random(num_neighbors=5)), experiment),
    }
    swapped = pairs(comparisons(Run(random, store, experiment)))
    assert list(swapped) == ["ra_cm3_random", "cm3_best", "cm3"]
    assert swapped["ra_cm3_random"] == (random, experiment)
    assert pairs(comparisons(Run(cm3, store))) == {"cm3": (cm3, cm3)}
    unretrieved = pairs(comparisons(Run(cm3, store, experiment)))
    assert list(unretrieved) == ["ra_cm3_noretriever", "cm3_best", "cm3", "ra_cm3_random"]
    assert unretrieved["ra_cm3_random"] == (replace(experiment, retriever=Random(num_neighbors=1)), experiment)
    alone = replace(experiment, compare_with_cm3=False, evaluation=replace(SETTINGS, control=False))
    assert pairs(comparisons(Run(alone, store))) == {"ra_cm3": (alone, alone)}


def test_all_comparisons_are_retrieved_for_and_evaluated(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """`rac3 evaluate`, with another retriever than the model was trained with."""
    done: list[tuple[Any, ...]] = []
    # The report comes first: it imports `evaluate`, which would be what it is replaced with from then on.
    monkeypatch.setattr("rac3.report.experiment.collect", lambda run: (run.experiment, run.trained))
    monkeypatch.setattr("rac3.report.experiment.summary", lambda found: f"of {found == (exact, experiment)}")
    monkeypatch.setattr(stage, "best_step", lambda run: 3)
    for module, name in (("retrieve", "index"), ("retrieve", "retrieve"), ("evaluate", "evaluate")):
        monkeypatch.setattr(
            f"rac3.stages.{module}.{name}",
            lambda run, *splits, name=name: done.append((name, run.experiment, run.trained, *splits)),
        )
    exact = replace(experiment, retriever=Exact())
    run = Run(exact, Workdir(tmp_path, "tiny"), experiment)
    STAGES["evaluate"].work(run, EvaluateOptions())
    compared = pairs(comparisons(run))
    assert len(compared) == 4
    assert done == [
        step
        for pair in compared.values()
        for step in (("index", *pair), ("retrieve", *pair, ("validation", "test")), ("evaluate", *pair))
    ]
    assert capsys.readouterr().out == "of True\n"


def test_the_control_has_the_trained_model_and_its_own_retriever(experiment: Experiment, store: Workdir):
    random = replace(experiment, retriever=Random(num_neighbors=16))
    control = Run(random, store, experiment)
    assert isinstance(control.memory().retriever, Random)
    assert isinstance(Run(experiment, store).memory().retriever, Scann)
    assert len(control.memory().memory) == 48  # unseen entities too, which training never retrieves
    assert control.builder.retrieved == "document"
    texts = replace(random, batches=replace(experiment.batches, retrieved="text"))
    assert Run(texts, store, experiment).builder.retrieved == "text"
    ours, theirs = (
        jax.tree.leaves(Run(each, store).params) for each in (experiment, replace(random, retriever=NoRetriever()))
    )
    held = jax.tree.leaves(control.params)
    assert all(np.array_equal(a, b) for a, b in zip(held, ours, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(held, theirs, strict=True))


def test_an_evaluation_is_made_once_for_the_splits_that_there_are(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    splits: list[tuple[Experiment, Experiment, str]] = []

    def of_split(run: Run, split: str, folder: Path) -> dict[str, Any]:
        splits.append((run.experiment, run.trained, split))
        (folder / f"{split}.json").write_text(split)
        return {"documents": len(splits)}

    monkeypatch.setattr(stage, "_evaluate_split", of_split)
    random = replace(experiment, retriever=Random(num_neighbors=16))
    workdir = Workdir(tmp_path / "new", "tiny")
    for _ in range(2):
        found = evaluate(Run(random, workdir, experiment))
        assert found == {"validation": {"documents": 1}, "test": {"documents": 2}}
    assert splits == [(random, experiment, "validation"), (random, experiment, "test")]
    only = replace(experiment, data=replace(experiment.data, validation=None))
    assert evaluate(Run(only, workdir)) == {"test": {"documents": 3}}
    folder = workdir.require(recipes.evaluation(only, only)).folder
    assert {path.name for path in folder.iterdir()} == {"metrics.json", "test.json", "manifest.json"}


def test_encoders_are_judged_on_the_first_held_out_documents(run: Run):
    """PSNR of the pictures drawn again from their codes, and ranks among as many documents as are evaluated."""
    found = evaluate_encoders(run)
    assert list(found) == ["validation", "test"]
    for split in found:
        documents = [item.document for item in run.documents(split).many(range(4))]
        pixels = np.stack([document.images[0].pixels() for document in documents])  # of the size of the VQGAN's
        codes = run.images.encode(list(pixels))
        errors = ((run.images.decode(codes) - pixels.astype(float)) ** 2).mean((1, 2, 3))
        assert found[split]["vqgan"]["psnr"] == pytest.approx(np.mean(10 * np.log10(255**2 / errors)), abs=1e-4)
        assert found[split]["vqgan"]["codebook_use"] == len(np.unique(codes)) / 16
        text = run.encoder.embed_texts([document.text for document in documents])
        image = run.encoder.embed_images(list(pixels))
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
