"""Evaluate: a trained model on the held-out splits, with a retriever (its own, or another one) at inference."""

import json
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import numpy as np
from jaxtyping import Int, UInt8

from rac3 import recipes
from rac3.artifacts.workdir import Workdir, write_atomic
from rac3.batches.groups import GroupBuilder
from rac3.batches.masking import Masking
from rac3.batches.packing import MAIN_IMAGE, MAIN_TEXT
from rac3.clip.encoder import Encoder
from rac3.documents.document import Image, Text
from rac3.documents.store import TokenizedDocument
from rac3.documents.world import World
from rac3.evaluation.entities import emblem_accuracy, name_accuracy
from rac3.evaluation.perplexity import image_group, make_token_cross_entropy, perplexity, text_group
from rac3.evaluation.reconstruction import reconstruction_metrics
from rac3.execution.progress import Progress
from rac3.experiment import Experiment, Split
from rac3.generation.captions import generate_captions
from rac3.generation.generator import Generator
from rac3.generation.images import generate_images
from rac3.generation.rerank import best_by_clip
from rac3.retrieval.baselines import NoRetriever, Random
from rac3.stages.embed import PARTS, open_documents, open_queries
from rac3.stages.encoders import open_clip, open_text, open_vqgan
from rac3.stages.evaluate_retrieval import clip_metrics
from rac3.stages.ingest import vocabulary_of
from rac3.stages.memory import OpenMemory
from rac3.stages.retrieve import index, read_neighbors, retrieve
from rac3.stages.train import build_model, model_name, open_params
from rac3.tokens.html import Sequenced
from rac3.tokens.text import Tokenizer
from rac3.vqgan.codec import ImageTokenizer

METRICS = "metrics.json"
SPLITS: tuple[Split, ...] = ("validation", "test")
# What is scored, in the order of the `PARTS` that ask: a text asks for an image, an image for a text.
MODALITIES = (("image", image_group, MAIN_IMAGE), ("text", text_group, MAIN_TEXT))


@dataclass(frozen=True)
class EvaluateOptions:
    """What `rac3 evaluate` evaluates.

    Attributes:
      task: generation, of the trained model on the held-out documents; or retrieval, which needs no model: recall,
        what approximate search costs, what selection drops, and a page of queries with what they retrieved.
    """

    task: Literal["generation", "retrieval"] = "generation"


def evaluate(experiment: Experiment, trained: Experiment, workdir: Workdir) -> dict[str, Any]:
    """The metrics of the model of `trained` with the retriever of `experiment`, made or read.

    The artifact holds `metrics.json`, and for each split `SPLIT.json` (prompts, what was retrieved, captions) and
    `SPLIT.npy` (the generated images).

    Raises:
      InputError: the model is not trained yet, or its checkpoint has another shape.
    """
    recipe = recipes.evaluation(experiment, trained)
    artifact = workdir.find(recipe)
    if artifact is None:
        with workdir.write(recipe) as draft:
            held_out = _HeldOut.open(experiment, trained, workdir)
            metrics = {}
            for split in SPLITS:
                if split in experiment.data.sources():
                    metrics[split] = _evaluate_split(held_out, split, draft.folder)
            write_atomic(draft.folder / METRICS, json.dumps(metrics, indent=2) + "\n")
        artifact = workdir.require(recipe, "rac3 evaluate")
    return json.loads((artifact.folder / METRICS).read_text())


def vanilla(experiment: Experiment) -> Experiment:
    """The CM3 of the same size, data and compute: no retrieval (paper, section 4.1)."""
    return replace(experiment, retriever=NoRetriever())


def comparisons(experiment: Experiment, trained: Experiment) -> dict[str, tuple[Experiment, Experiment]]:
    """What is evaluated side by side: name -> (retriever at inference, model)."""
    name = model_name(trained)
    swapped = type(experiment.retriever).__name__.lower()
    out = {name if experiment.retriever == trained.retriever else f"{name}_{swapped}": (experiment, trained)}
    if name != "cm3":
        if experiment.compare_with_cm3:
            out["cm3"] = (vanilla(trained), vanilla(trained))
        if experiment.evaluation.control and not isinstance(experiment.retriever, Random):
            number = max(1, experiment.retriever.num_neighbors)
            out[f"{name}_random"] = (replace(experiment, retriever=Random(num_neighbors=number)), trained)
    return out


def evaluate_all(experiment: Experiment, trained: Experiment, workdir: Workdir) -> dict[str, dict[str, Any]]:
    """All of `comparisons`, by name; retrieves for the held-out splits first where a retriever has not done so."""
    out = {}
    for name, (inference, model) in comparisons(experiment, trained).items():
        index(inference, workdir)
        retrieve(inference, workdir, SPLITS)
        out[name] = evaluate(inference, model, workdir)
    return out


def evaluate_encoders(experiment: Experiment, workdir: Workdir) -> dict[str, Any]:
    """Reconstruction by the VQGAN and recall of CLIP (text to image and back, own pair) on held-out documents."""
    codec = open_vqgan(experiment, workdir)
    out: dict[str, Any] = {}
    for split in SPLITS:
        if split not in experiment.data.sources():
            continue
        documents = open_documents(experiment, workdir, split)
        items = documents.many(range(min(len(documents), experiment.evaluation.documents)))
        images = [image for item in items for image in item.document.images]
        text, image = (open_queries(experiment, workdir, split, part)[: len(items)] for part in PARTS)
        out[split] = {
            "vqgan": reconstruction_metrics(codec, images) if images else None,
            "clip": clip_metrics([item.document for item in items], text, image),
        }
    return out


@dataclass(frozen=True)
class _HeldOut:
    """All that evaluation opens once."""

    experiment: Experiment
    workdir: Workdir
    generator: Generator
    builder: GroupBuilder
    tokenizer: Tokenizer
    codec: ImageTokenizer
    encoder: Encoder
    memory: OpenMemory | None
    name: str

    @classmethod
    def open(cls, experiment: Experiment, trained: Experiment, workdir: Workdir) -> "_HeldOut":
        tokenizer, codec = open_text(experiment, workdir), open_vqgan(experiment, workdir)
        vocabulary = vocabulary_of(tokenizer, codec)
        model = build_model(experiment, vocabulary, codec.tokens_per_image)
        generator = Generator(model, open_params(trained, workdir, model), vocabulary, codec.tokens_per_image)
        memory = None
        if recipes.retrieves(experiment):
            memory = OpenMemory(experiment, workdir, recipes.memory_splits(experiment, "test"))
        name = model_name(trained)
        if memory is not None and experiment.retriever != trained.retriever:
            name += f" with {type(experiment.retriever).__name__.lower()}"
        return cls(
            experiment,
            workdir,
            generator,
            GroupBuilder(vocabulary, Masking("none"), 1.0, experiment.batches.retrieved),
            tokenizer,
            codec,
            open_clip(experiment, workdir),
            memory,
            name,
        )

    def retrieved(self, neighbors: Int[np.ndarray, " depth"], k: int) -> list[TokenizedDocument]:
        """The first k neighbors that have something to show."""
        if self.memory is None:
            return []
        documents = map(self.memory.document, neighbors[neighbors >= 0].tolist())
        return list(islice((item for item in documents if self.builder.shown(item) is not None), k))

    def sequences(self, documents: list[TokenizedDocument]) -> list[Sequenced]:
        return self.builder.retrieved_sequences(documents)


def _evaluate_split(held_out: _HeldOut, split: Split, folder: Any) -> dict[str, Any]:
    settings = held_out.experiment.evaluation
    documents = open_documents(held_out.experiment, held_out.workdir, split)
    items = documents.many(range(min(len(documents), settings.documents)))
    depth = held_out.experiment.selection.depth
    neighbors = np.full((len(items), len(PARTS), depth), -1)
    if held_out.memory is not None:
        neighbors = read_neighbors(held_out.experiment, held_out.workdir, split)[: len(items)]
    most = settings.num_retrieved if held_out.memory is not None else 0
    with Progress(f"evaluate {held_out.name} on {split}", most + 3, "parts") as bar:
        by_k: dict[str, dict[str, float | None]] = {"image": {}, "text": {}}
        cross_entropy = make_token_cross_entropy(held_out.generator.model)
        for k in range(most + 1):
            for modality, value in _perplexities(held_out, cross_entropy, items, neighbors, k).items():
                by_k[modality][str(k)] = value
            bar.update()
        images, scores = _images(held_out, items, neighbors[:, 0], most)
        bar.update()
        captions = _captions(held_out, items, neighbors[:, 1], most)
        bar.update()
    _write_samples(held_out, split, folder, items, neighbors, most, images, captions)
    too_long = _too_long(held_out, items)
    for modality, count in too_long.items():
        if count:
            print(f"{count} of {len(items)} {split} documents exceed the context, and have no {modality} perplexity")
    return {
        "documents": len(items),
        "too_long": too_long,
        "perplexity": {modality: values[str(most)] for modality, values in by_k.items()},
        "perplexity_by_k": by_k,
        "clip_score": float(scores.mean()) if len(scores) else None,
        **_accuracies(held_out.experiment, items, images, captions),
    }


def _perplexities(
    held_out: _HeldOut,
    cross_entropy: Any,
    items: list[TokenizedDocument],
    neighbors: Int[np.ndarray, "n parts depth"],
    k: int,
) -> dict[str, float | None]:
    """Perplexity of images behind their text's neighbors, and of texts behind their image's: the prompt retrieves.

    The documents that `_too_long` counts are left out.
    """
    out, most = {}, held_out.generator.model.max_positions
    for number, (modality, build, kind) in enumerate(MODALITIES):
        groups = []
        for item, row in zip(items, neighbors[:, number], strict=True):
            documents = held_out.sequences(held_out.retrieved(row, k))
            main = held_out.builder.sequence(item)
            group = build(held_out.builder, documents, main)
            while len(group.tokens) > most and documents:
                documents = documents[:-1]  # as in training: the least relevant goes first
                group = build(held_out.builder, documents, main)
            if len(group.tokens) <= most:
                groups.append(group)
        length = max([held_out.experiment.batches.row, *(len(group.tokens) for group in groups)])
        out[modality] = perplexity(cross_entropy, held_out.generator.params, groups, kind, length)
    return out


def _too_long(held_out: _HeldOut, items: list[TokenizedDocument]) -> dict[str, int]:
    """By modality, the documents that exceed the context by themselves, as they stand when that modality is scored."""
    most, mains = held_out.generator.model.max_positions, [held_out.builder.sequence(item) for item in items]
    return {
        modality: sum(len(build(held_out.builder, [], main).tokens) > most for main in mains)
        for modality, build, _ in MODALITIES
    }


def _segment_ids(item: TokenizedDocument, kind: type[Text] | type[Image]) -> np.ndarray | None:
    """The ids of the first text, or of the first image."""
    pairs = zip(item.document.segments, item.ids, strict=True)
    return next((ids for segment, ids in pairs if isinstance(segment, kind)), None)


def _images(
    held_out: _HeldOut, items: list[TokenizedDocument], neighbors: Int[np.ndarray, "n depth"], k: int
) -> tuple[UInt8[np.ndarray, "images height width 3"], np.ndarray]:
    """The best image of each document's text by CLIP, and its score; none of a document without a text."""
    settings = held_out.experiment.evaluation
    codec = held_out.codec
    captions = {row: ids for row, item in enumerate(items) if (ids := _segment_ids(item, Text)) is not None}
    chosen = list(captions)
    if not chosen:
        return np.zeros((0, codec.resolution, codec.resolution, 3), np.uint8), np.zeros(0)
    retrieved = [_fitting(held_out, neighbors[row], k, codec.tokens_per_image + len(captions[row])) for row in chosen]
    codes = generate_images(
        held_out.generator,
        list(captions.values()),
        retrieved,
        settings.image_sampling,
        settings.image_samples,
        held_out.experiment.seed,
    )
    pixels = codec.decode(codes.reshape(-1, codes.shape[-1]))
    image_vectors = held_out.encoder.embed_images(list(pixels)).reshape(len(chosen), settings.image_samples, -1)
    text_vectors = held_out.encoder.embed_texts([items[row].document.text for row in chosen])
    best, scores = best_by_clip(text_vectors, image_vectors)
    return pixels.reshape(len(chosen), settings.image_samples, *pixels.shape[1:])[np.arange(len(chosen)), best], scores


def _captions(
    held_out: _HeldOut, items: list[TokenizedDocument], neighbors: Int[np.ndarray, "n depth"], k: int
) -> list[str]:
    """The caption of lowest perplexity of each document's image."""
    settings = held_out.experiment.evaluation
    images = {row: codes for row, item in enumerate(items) if (codes := _segment_ids(item, Image)) is not None}
    if not images:
        return []
    room = held_out.codec.tokens_per_image + settings.max_caption_tokens
    ids = generate_captions(
        held_out.generator,
        list(images.values()),
        [_fitting(held_out, neighbors[row], k, room) for row in images],
        settings.caption_sampling,
        settings.caption_samples,
        settings.max_caption_tokens,
        held_out.experiment.seed,
    )
    return [held_out.tokenizer.decode(row.tolist()) for row in ids]


def _fitting(held_out: _HeldOut, neighbors: Int[np.ndarray, " depth"], k: int, main: int) -> list[Sequenced]:
    """The first k neighbors as far as the context has room for them beside `main` ids (and markup)."""
    room = held_out.generator.model.max_positions - main - 8
    kept: list[Sequenced] = []
    for document in held_out.sequences(held_out.retrieved(neighbors, k)):
        room -= len(document.ids)
        if room < 0:
            break
        kept.append(document)
    return kept


def _accuracies(
    experiment: Experiment, items: list[TokenizedDocument], images: np.ndarray, captions: list[str]
) -> dict[str, float | None]:
    """Entity accuracy of images (procedural world only) and of captions; None where it has no meaning."""
    field = experiment.data.entity_field
    wanted = [str(item.document.metadata.get(field, "")) for item in items]
    world = experiment.data.train if len(images) == len(items) else None
    named = bool(field) and len(captions) == len(items)
    return {
        "entity_accuracy": emblem_accuracy(images, wanted, world.entities()) if isinstance(world, World) else None,
        "name_accuracy": name_accuracy(captions, wanted) if named else None,
    }


def _write_samples(
    held_out: _HeldOut,
    split: Split,
    folder: Any,
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
            part: [document.document.key for document in held_out.retrieved(row[index], k)]
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
