"""Held-out documents as prompts: what each of them retrieved, and what the model answers."""

from collections.abc import Callable, Collection, Sequence
from itertools import islice

import numpy as np
from jaxtyping import Float, Int, UInt8

from rac3 import recipes
from rac3.documents.document import Image, Judge, Text, prepare_image
from rac3.documents.store import TokenizedDocument
from rac3.evaluation.entities import entity_of
from rac3.evaluation.features import Embedded
from rac3.experiment import Split
from rac3.generation.prompts import Asked, Context
from rac3.generation.request import Sample
from rac3.generation.rerank import best_by_clip, best_by_perplexity
from rac3.generation.sampling import Sampling
from rac3.generation.tasks import caption, draw
from rac3.run import PARTS, Run

SPLITS: tuple[Split, ...] = ("validation", "test")
JUDGED = 4  # pictures of the memory that stand for an entity
READ = 1024  # documents at a time
PART_DOCUMENTS = 64  # of an evaluation that goes on after a kill

Pictures = UInt8[np.ndarray, "n height width 3"]
EntityJudge = Callable[[Pictures], list[str]]  # the entity that each picture shows


def held_out_documents(run: Run, split: Split) -> list[TokenizedDocument]:
    """The documents of a split that are evaluated."""
    documents = run.documents(split)
    return documents.many(range(min(len(documents), run.experiment.evaluation.documents)))


def held_out(run: Run, split: Split) -> tuple[list[TokenizedDocument], Int[np.ndarray, "n parts depth"]]:
    """The documents of a split that are evaluated, and the neighbors of each of their parts; -1 is none."""
    items = held_out_documents(run, split)
    if not run.experiment.retrieves:
        return items, np.full((len(items), len(PARTS), run.experiment.selection.depth), -1)
    return items, run.neighbors(split)[: len(items)]


def retrieved(run: Run, neighbors: Int[np.ndarray, " depth"], k: int) -> list[TokenizedDocument]:
    """The first k neighbors that have something to show."""
    if not run.experiment.retrieves:
        return []
    memory, builder = run.memory(), run.builder
    documents = map(memory.document, neighbors[neighbors >= 0].tolist())
    return list(islice((item for item in documents if builder.shown(item.tokens) is not None), k))


def real_pictures(run: Run, split: Split) -> tuple[Embedded, Float[np.ndarray, "images embed"]]:
    """The features of the real pictures of a split by the network that `evaluation.features` names, and the encoder's.

    Raises:
      InputError: `rac3 evaluate` has not made them yet.
    """
    folder = run.artifact(recipes.reference, split).folder
    features, vectors = (
        np.concatenate([np.load(file, allow_pickle=False) for file in sorted(folder.glob(f"{kind}-*.npy"))])
        for kind in ("features", "vectors")
    )
    return Embedded(features), vectors


def context(run: Run, neighbors: Int[np.ndarray, " depth"], k: int, sampling: Sampling) -> Context:
    """The first k neighbors, as a prompt has them."""
    return Context([item.tokens for item in retrieved(run, neighbors, k)], without=sampling.without)


def sampled(run: Run, what: str, asked: Sequence[Asked], sampling: Sampling) -> list[list[Sample]]:
    """The samples of each request; says how many documents did not fit."""
    lost = sum(len(each.dropped) for each in asked)
    if lost:
        found = lost + sum(len(documents) for each in asked for documents in each.contexts)
        print(f"{what}: {lost} of {found} retrieved documents did not fit into the context")
    requests = [each.request for each in asked]
    out: dict[int, list[Sample]] = dict(
        run.engine.run(requests, [sampling] * len(requests), [run.experiment.seed] * len(requests))
    )
    return [out[number] for number in range(len(requests))]


def part_rows(count: int, size: int) -> list[range]:
    """The rows of each part of an evaluation that goes on after a kill."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def best_images(
    run: Run, split: Split, items: Sequence[TokenizedDocument], neighbors: Int[np.ndarray, "n depth"], k: int
) -> tuple[UInt8[np.ndarray, "images height width 3"], np.ndarray]:
    """For each document with a text, the image that CLIP scores best, and its score."""
    pixels, best, scores = drawn_images(run, split, items, neighbors, k)
    return pixels[np.arange(len(pixels)), best], scores


def drawn_images(
    run: Run, split: Split, items: Sequence[TokenizedDocument], neighbors: Int[np.ndarray, "n depth"], k: int
) -> tuple[UInt8[np.ndarray, "images samples height width 3"], Int[np.ndarray, " images"], np.ndarray]:
    """For each document with a text: all images as they came, the number of CLIP's favorite, and its score."""
    settings, codec = run.experiment.evaluation, run.images
    captions = {row: ids for row, item in enumerate(items) if (ids := segment_ids(item, Text)) is not None}
    chosen = list(captions)
    if not chosen:
        none = np.zeros((0, settings.image_samples, codec.resolution, codec.resolution, 3), np.uint8)
        return none, np.zeros(0, int), np.zeros(0)
    form = run.form
    asked = [
        draw.request(
            form, captions[row], context(run, neighbors[row], k, settings.image_sampling), settings.image_samples
        )
        for row in chosen
    ]
    drawn = sampled(run, f"{split} images", asked, settings.image_sampling)
    codes = np.array([[draw.answer(form, sample) for sample in samples] for samples in drawn])
    pixels = codec.decode(codes.reshape(-1, codes.shape[-1]))
    image_vectors = run.encoder.embed_images(list(pixels)).reshape(len(chosen), settings.image_samples, -1)
    text_vectors = run.encoder.embed_texts([items[row].document.text for row in chosen])
    best, scores = best_by_clip(text_vectors, image_vectors)
    return pixels.reshape(len(chosen), settings.image_samples, *pixels.shape[1:]), best, scores


def best_captions(
    run: Run, split: Split, items: Sequence[TokenizedDocument], neighbors: Int[np.ndarray, "n depth"], k: int
) -> list[str]:
    """The caption of lowest perplexity of each document's image."""
    settings = run.experiment.evaluation
    images = {row: codes for row, item in enumerate(items) if (codes := segment_ids(item, Image)) is not None}
    if not images:
        return []
    form, most = run.form, settings.max_caption_tokens
    asked = [
        caption.request(
            form, codes, context(run, neighbors[row], k, settings.caption_sampling), most, settings.caption_samples
        )
        for row, codes in images.items()
    ]
    drawn = sampled(run, f"{split} captions", asked, settings.caption_sampling)
    log_probs = np.array([[sample.mean_log_prob for sample in samples] for samples in drawn])
    best = best_by_perplexity(log_probs).tolist()
    kept = [samples[choice] for samples, choice in zip(drawn, best, strict=True)]
    return [run.tokenizer.decode(caption.answer(form, sample).tolist()) for sample in kept]


def segment_ids(item: TokenizedDocument, kind: type[Text] | type[Image]) -> np.ndarray | None:
    """The ids of the first text, or of the first image."""
    pairs = zip(item.document.segments, item.ids, strict=True)
    return next((ids for segment, ids in pairs if isinstance(segment, kind)), None)


def entity(run: Run, item: TokenizedDocument) -> str:
    """What a document shows by its metadata; "" if they do not say."""
    return entity_of(item.document, run.experiment.data.entity_field) or ""


def copied(run: Run, neighbors: Int[np.ndarray, "n depth"], k: int = 1) -> Pictures:
    """The simplest use of retrieval, which a model must beat: the picture of the first document of each row, as its
    codes have it; or the mean of those of the first k. Black where there is none."""
    codes = [
        [ids for item in retrieved(run, row, k) if (ids := segment_ids(item, Image)) is not None] for row in neighbors
    ]
    pictures = np.zeros((len(neighbors), run.images.resolution, run.images.resolution, 3), np.uint8)
    if any(codes):
        decoded = iter(run.images.decode(np.stack([ids for of_row in codes for ids in of_row])))
        for row, of_row in enumerate(codes):
            if of_row:
                pictures[row] = np.round(np.mean([next(decoded) for _ in of_row], axis=0))
    return pictures


def baseline_pictures(
    run: Run, items: Sequence[TokenizedDocument], neighbors: Int[np.ndarray, "n depth"], k: int
) -> dict[str, Pictures]:
    """Pictures that no model draws, one for each document.

    copied         that of the first document that its text retrieved
    mean           the mean, in pixels, of those of the k documents that its text retrieved
    reconstructed  that of its own codes
    original       its own: what the judge says of the truth

    Args:
      neighbors: of the text of each.
      k: documents in context; without any there is nothing to copy.
    """
    made = {"copied": copied(run, neighbors, 1), "mean": copied(run, neighbors, k)} if k else {}
    codes = [ids for item in items if (ids := segment_ids(item, Image)) is not None]
    if len(codes) == len(items):
        made["reconstructed"] = run.images.decode(np.stack(codes))
        made["original"] = true_pictures(run, items)
    return made


def true_pictures(run: Run, items: Sequence[TokenizedDocument]) -> Pictures:
    """The first picture of each document, as the models see it."""
    size = run.images.resolution
    return np.stack([prepare_image(item.document.images[0].pixels(), size) for item in items])


def shown_in_memory(run: Run, split: Split, names: Collection[str], most: int) -> dict[str, list[TokenizedDocument]]:
    """Of each of these entities, its first documents with an image in the memory that queries of a split search.

    Entities without any are left out, and so are documents that `takedowns` names.
    """
    found: dict[str, list[TokenizedDocument]] = {name: [] for name in names if name}
    for part in run.experiment.data.memory_splits(split):
        documents, withdrawn = run.documents(part), set(run.withdrawn_rows(part).tolist())
        for start in range(0, len(documents), READ):
            if all(len(items) == most for items in found.values()):
                break
            rows = [row for row in range(start, min(start + READ, len(documents))) if row not in withdrawn]
            for item in documents.many(rows):
                items = found.get(entity(run, item))
                if items is not None and len(items) < most and item.document.images:
                    items.append(item)
    return {name: items for name, items in found.items() if items}


def source_judge(run: Run) -> EntityJudge | None:
    """The source of the training documents, if it can tell entities by their looks."""
    source, field = run.experiment.data.train, run.experiment.data.entity_field
    if not isinstance(source, Judge) or field not in source.judged:
        return None
    return lambda pictures: [each[field] for each in source.shown(pictures)]


def judge(run: Run, split: Split, names: Collection[str]) -> EntityJudge | None:
    """Tells which entity a picture shows; None if the memory shows none of `names`.

    The source of the training documents judges if it can. Elsewhere it is the one of `names` whose pictures in the
    memory are most similar to it for the encoder, on average.
    """
    if (by_source := source_judge(run)) is not None:
        return by_source
    encoder, shown = run.encoder, shown_in_memory(run, split, names, JUDGED)
    if not shown:
        return None
    means = [encoder.embed_images([item.document.images[0] for item in items]).mean(0) for items in shown.values()]

    def by_encoder(pictures: Pictures) -> list[str]:
        similarities = encoder.embed_images([*pictures]) @ np.stack(means).T
        return [[*shown][best] for best in similarities.argmax(1).tolist()]

    return by_encoder
