"""Evaluate: a trained model on the held-out splits, with a retriever (its own, or another one) at inference."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int, UInt8

from rac3 import recipes
from rac3.artifacts.workdir import write_atomic
from rac3.batches.groups import GroupBuilder
from rac3.batches.packing import MAIN_IMAGE, MAIN_TEXT, Group
from rac3.documents.document import Judge
from rac3.documents.store import TokenizedDocument
from rac3.evaluation.captions import caption_metrics
from rac3.evaluation.entities import entity_of, named_accuracy, shown_accuracy, values_of
from rac3.evaluation.perplexity import image_group, perplexity, text_group
from rac3.evaluation.pictures import clipscore, set_metrics
from rac3.evaluation.recall import clip_metrics
from rac3.evaluation.reconstruction import reconstruction_metrics
from rac3.execution.progress import Progress
from rac3.experiment import Experiment, Split
from rac3.generation.tasks.score import make_token_cross_entropy
from rac3.held_out import (
    SPLITS,
    Pictures,
    baseline_pictures,
    best_captions,
    best_images,
    held_out,
    held_out_documents,
    real_pictures,
    retrieved,
)
from rac3.retrieval.baselines import Random
from rac3.run import PARTS, Run
from rac3.tokens.html import Sequenced

METRICS = "metrics.json"
ACCURACIES = ("entity_accuracy", "joint_accuracy", "name_accuracy", "joint_name_accuracy")  # of images, of captions
# What is scored, in the order of the `PARTS` that ask: a text asks for an image, an image for a text.
MODALITIES = (("image", image_group, MAIN_IMAGE), ("text", text_group, MAIN_TEXT))


@dataclass(frozen=True)
class EvaluateOptions:
    """What `rac3 evaluate` evaluates.

    Attributes:
      task: generation, of images and captions of the held-out documents; infilling, of the middle of their images, with
        edits by documents given by hand (paper, sections 5.2 and 5.3); few-shot, classification by demonstrations
        (5.4); knowledge, whether images that name an entity show it (5.1); coco, images and captions of MS-COCO with
        and without retrieval (4.2); or retrieval, which needs no model: recall, what approximate search costs, what
        selection drops, and a page of queries with what they retrieved.
    """

    task: Literal["generation", "infilling", "few-shot", "knowledge", "coco", "retrieval"] = "generation"


def evaluate(run: Run) -> dict[str, Any]:
    """The metrics of the run's model with its retriever, made or read.

    The artifact holds `metrics.json`, and for each split `SPLIT.json` (prompts, what was retrieved, captions) and
    `SPLIT.npy` (the generated images).

    Raises:
      InputError: the model is not trained yet, or its checkpoint has another shape.
    """
    recipe = run.evaluation_recipe
    artifact = run.workdir.find(recipe)
    if artifact is None:
        with run.workdir.write(recipe) as draft:
            metrics = {}
            for split in SPLITS:
                if split in run.experiment.data.sources():
                    metrics[split] = _evaluate_split(run, split, draft.folder)
            write_atomic(draft.folder / METRICS, json.dumps(metrics, indent=2) + "\n")
        artifact = run.evaluation()
    return json.loads((artifact.folder / METRICS).read_text(encoding="utf-8"))


def best_step(run: Run) -> int:
    """The step of the run's checkpoint that is best on the tuning documents, made or read.

    Of all checkpoints that were kept, it has the lowest product of image and text perplexity, with as many documents in
    context as an evaluation has at most. The artifact holds `metrics.json`, with both perplexities of each.

    Raises:
      InputError: the model is not trained yet.
    """
    recipe = run.recipe(recipes.best)
    if run.workdir.find(recipe) is None:
        steps, label = run.kept_steps(), f"best step of {run.model_name}"
        with run.workdir.write(recipe) as draft, Progress(label, len(steps), "checkpoints") as bar:
            items, neighbors = held_out(run, "tuning")
            most = run.experiment.evaluation.num_retrieved if run.experiment.retrieves else 0
            cross_entropy, found = make_token_cross_entropy(run.model), {}
            for step in steps:
                at_step = type(run)(run.experiment, run.workdir, run.trained, step)  # whose parameters are not kept
                found[step] = perplexities(at_step, cross_entropy, items, neighbors, most)
                bar.update()
            best = min(found, key=lambda step: sum(math.log(each) for each in found[step].values() if each is not None))
            metrics = {"step": best, "perplexity": found, "documents": len(items)}
            write_atomic(draft.folder / METRICS, json.dumps(metrics, indent=2) + "\n")
        print(f"{label}: {best}, of {', '.join(map(str, steps))}")
    return json.loads((run.artifact(recipes.best).folder / METRICS).read_text(encoding="utf-8"))["step"]


def comparisons(run: Run) -> dict[str, Run]:
    """The runs to evaluate, by name: this one, the vanilla CM3 at its best, if there are documents to tell, and at its
    last step, and the model with random documents."""
    experiment, trained = run.experiment, run.trained
    name = trained.model_name
    swapped = type(experiment.retriever).__name__.lower()
    out = {name if experiment.retriever == trained.retriever else f"{name}_{swapped}": run}
    if name != "cm3":
        if experiment.compare_with_cm3:
            vanilla = run.variant(trained.vanilla(), trained.vanilla())
            if experiment.data.tuning is not None:
                out["cm3_best"] = vanilla.variant(vanilla.experiment, vanilla.trained, best_step(vanilla))
            out["cm3"] = vanilla
        if experiment.evaluation.control and not isinstance(experiment.retriever, Random):
            out[f"{name}_random"] = run.with_retriever(Random(num_neighbors=max(1, experiment.retriever.num_neighbors)))
    return out


def evaluate_encoders(run: Run) -> dict[str, Any]:
    """Reconstruction by the VQGAN and recall of CLIP (text to image and back, own pair) on held-out documents."""
    out: dict[str, Any] = {}
    for split in SPLITS:
        if split not in run.experiment.data.sources():
            continue
        items = held_out_documents(run, split)
        images = [image for item in items for image in item.document.images]
        text, image = (run.queries(split, part)[: len(items)] for part in PARTS)
        out[split] = {
            "vqgan": reconstruction_metrics(run.images, images) if images else None,
            "clip": clip_metrics([item.document for item in items], text, image),
        }
    return out


def _evaluate_split(run: Run, split: Split, folder: Path) -> dict[str, Any]:
    experiment, settings = run.experiment, run.experiment.evaluation
    items, neighbors = held_out(run, split)
    most = settings.num_retrieved if experiment.retrieves else 0
    name = run.model_name
    if experiment.retrieves and experiment.retriever != run.trained.retriever:
        name += f" with {type(experiment.retriever).__name__.lower()}"
    with Progress(f"evaluate {name} on {split}", most + 3, "parts") as bar:
        by_k: dict[str, dict[str, float | None]] = {"image": {}, "text": {}}
        fewer: dict[str, dict[str, int]] = {"image": {}, "text": {}}
        cross_entropy = make_token_cross_entropy(run.model)
        for k in range(most + 1):
            for modality, value in perplexities(run, cross_entropy, items, neighbors, k).items():
                by_k[modality][str(k)] = value
            for number, (modality, build, _) in enumerate(MODALITIES):
                fewer[modality][str(k)] = _groups(run, build, items, neighbors[:, number], k)[1]
            bar.update()
        images, scores = best_images(run, split, items, neighbors[:, 0], most)
        bar.update()
        captions = best_captions(run, split, items, neighbors[:, 1], most)
        bar.update()
    _write_samples(run, split, folder, items, neighbors, most, images, captions)
    too_long = _too_long(run, items)
    named = sum(entity_of(item.document, experiment.data.entity_field) is not None for item in items)
    for modality, count in too_long.items():
        if count:
            print(f"{count} of {len(items)} {split} documents exceed the context, and have no {modality} perplexity")
    for modality, counts in fewer.items():
        if short := counts[str(most)]:
            print(
                f"{short} of {len(items)} {split} documents have fewer than {most} documents in context for their "
                f"{modality}: too few are retrieved, or the context has no room"
            )
    return {
        "documents": len(items),
        "with_entity": named,
        "too_long": too_long,
        "fewer_than_k": fewer,
        "perplexity": {modality: values[str(most)] for modality, values in by_k.items()},
        "perplexity_by_k": by_k,
        "clip_score": float(scores.mean()) if len(scores) else None,
        "captions": _caption_scores(items, captions),
        "pictures": _picture_scores(run, split, images, scores),
        **_accuracies(experiment, items, images, captions),
        "baselines": {
            name: _baseline_scores(run, split, items, *made)
            for name, made in _baselines(run, items, neighbors, most).items()
        },
    }


def perplexities(
    run: Run,
    cross_entropy: Any,
    items: list[TokenizedDocument],
    neighbors: Int[np.ndarray, "n parts depth"],
    k: int,
) -> dict[str, float | None]:
    """Perplexity of images after their text's neighbors, and of texts after their image's: the prompt retrieves.

    The documents that `_too_long` counts are left out.
    """
    out = {}
    for number, (modality, build, kind) in enumerate(MODALITIES):
        groups, _ = _groups(run, build, items, neighbors[:, number], k)
        length = max([run.experiment.batches.row, *(len(group.tokens) for group in groups)])
        out[modality] = perplexity(cross_entropy, run.params, groups, kind, length, run.experiment.batches.max_groups)
    return out


def _groups(
    run: Run,
    build: Callable[[GroupBuilder, Sequence[Sequenced], Sequenced], Group],
    items: list[TokenizedDocument],
    neighbors: Int[np.ndarray, "n depth"],
    k: int,
) -> tuple[list[Group], int]:
    """Each document after k that are retrieved for it, and how many documents have fewer than k before them."""
    builder, most, groups, fewer = run.builder, run.model.max_positions, [], 0
    for item, row in zip(items, neighbors, strict=True):
        documents = builder.retrieved_sequences([each.tokens for each in retrieved(run, row, k)])
        main = builder.sequence(item.tokens)
        group = build(builder, documents, main)
        while len(group.tokens) > most and documents:
            documents = documents[:-1]  # as in training: the least relevant goes first
            group = build(builder, documents, main)
        if len(group.tokens) <= most:
            groups.append(group)
            fewer += len(documents) < k
    return groups, fewer


def _too_long(run: Run, items: list[TokenizedDocument]) -> dict[str, int]:
    """By modality, how many documents exceed the context by themselves, in the form that is scored."""
    builder, most = run.builder, run.model.max_positions
    mains = [builder.sequence(item.tokens) for item in items]
    return {
        modality: sum(len(build(builder, [], main).tokens) > most for main in mains)
        for modality, build, _ in MODALITIES
    }


def _caption_scores(items: list[TokenizedDocument], captions: list[str]) -> dict[str, Any]:
    """The captions of the documents with an image against their texts; those without a text do not count."""
    texts = [item.document.text for item in items if item.document.images]
    pairs = [(made, right) for made, right in zip(captions, texts, strict=True) if right]
    return caption_metrics([made for made, _ in pairs], [[right] for _, right in pairs])


def _picture_scores(
    run: Run, split: Split, images: UInt8[np.ndarray, "n height width 3"], similarities: Float[np.ndarray, " n"]
) -> dict[str, Any]:
    """CLIPScore, and against the real pictures of the split what `evaluation.features` asks for."""
    return {"clipscore": clipscore(similarities), **_distances(run, split, images)}


def _distances(run: Run, split: Split, images: Pictures) -> dict[str, Any]:
    """Of pictures from the real ones of the split; empty if `evaluation.features` names no network."""
    if not run.experiment.evaluation.features:
        return {}
    real, vectors = real_pictures(run, split)
    return set_metrics(run.encoder, run.features, [*images], real, vectors)


def _baselines(
    run: Run, items: list[TokenizedDocument], neighbors: Int[np.ndarray, "n parts depth"], k: int
) -> dict[str, tuple[Pictures, list[str]]]:
    """The pictures of `baseline_pictures`, and captions where there are any.

    Those of `copied` are the text of the first document that each image retrieved ("" where it retrieved nothing),
    those of `original` the documents' own.
    """
    captions = {"original": [item.document.text for item in items]}
    if k:
        firsts = [retrieved(run, by_image, 1) for _, by_image in neighbors]
        captions["copied"] = [documents[0].document.text if documents else "" for documents in firsts]
    pictures = baseline_pictures(run, items, neighbors[:, 0], k)
    return {name: (made, captions.get(name, [])) for name, made in pictures.items()}


def _baseline_scores(
    run: Run, split: Split, items: list[TokenizedDocument], images: Pictures, captions: list[str]
) -> dict[str, Any]:
    """What a model's pictures and captions are scored by too; `captions` is empty where there are none."""
    illustrated = bool(captions) and all(item.document.images for item in items)
    return {
        **_accuracies(run.experiment, items, images, captions),
        "captions": _caption_scores(items, captions) if illustrated else {},
        "pictures": _distances(run, split, images),
    }


def _accuracies(
    experiment: Experiment, items: list[TokenizedDocument], images: Pictures, captions: list[str]
) -> dict[str, float | None]:
    """Accuracy of images, as far as the training source can judge them, and of captions: of the entity alone, and
    jointly with all else that the source judges. None where it has no meaning.

    Documents that name no entity do not count.
    """
    field, source = experiment.data.entity_field, experiment.data.train
    judged = list(source.judged) if isinstance(source, Judge) else []
    rows = [row for row, item in enumerate(items) if entity_of(item.document, field) is not None]
    alone, jointly = ([values_of(items[row].document, fields) for row in rows] for fields in ([field], judged))
    joint = field in judged and all(right.keys() == set(judged) for right in jointly)
    found: dict[str, float | None] = dict.fromkeys(ACCURACIES)
    if rows and isinstance(source, Judge) and field in judged and len(images) == len(items):
        shown = source.shown(images[rows])
        found["entity_accuracy"] = shown_accuracy(shown, alone)
        found["joint_accuracy"] = shown_accuracy(shown, jointly) if joint else None
    if rows and len(captions) == len(items):
        chosen = [captions[row] for row in rows]
        found["name_accuracy"] = named_accuracy(chosen, alone)
        found["joint_name_accuracy"] = named_accuracy(chosen, jointly) if joint else None
    return found


def _write_samples(
    run: Run,
    split: Split,
    folder: Path,
    items: list[TokenizedDocument],
    neighbors: Int[np.ndarray, "n parts depth"],
    k: int,
    images: np.ndarray,
    captions: list[str],
) -> None:
    """What the report and the notebook show."""
    rows = []
    for number, (item, row) in enumerate(zip(items, neighbors, strict=True)):
        found = {
            part: [document.document.key for document in retrieved(run, row[index], k)]
            for index, part in enumerate(PARTS)
        }
        caption = captions[number] if len(captions) == len(items) else None
        rows.append(
            {
                "key": item.document.key,
                "text": item.document.text,
                "caption": caption,
                "retrieved": found,
                "neighbors": row.tolist(),
            }
        )
    write_atomic(folder / f"{split}.json", json.dumps(rows, ensure_ascii=False) + "\n")
    np.save(folder / f"{split}.npy", images)
