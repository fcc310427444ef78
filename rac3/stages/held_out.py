"""Held-out documents as prompts: what each of them retrieved, and what the model answers."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import numpy as np
from jaxtyping import Int, UInt8

from rac3.documents.document import Image, Text
from rac3.documents.store import TokenizedDocument
from rac3.documents.world import World, nearest_entities
from rac3.experiment import Split
from rac3.generation.prompts import Asked, Context
from rac3.generation.request import Sample
from rac3.generation.sampling import Sampling
from rac3.run import PARTS, Run

SPLITS: tuple[Split, ...] = ("validation", "test")
JUDGED = 4  # pictures of the memory that stand for an entity

Judge = Callable[[UInt8[np.ndarray, "n height width 3"]], list[str]]  # the entity that each image shows


def held_out(run: Run, split: Split) -> tuple[list[TokenizedDocument], Int[np.ndarray, "n parts depth"]]:
    """The documents of a split that are evaluated, and the neighbors of each of their parts; -1 is none."""
    documents = run.documents(split)
    items = documents.many(range(min(len(documents), run.experiment.evaluation.documents)))
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


def context(run: Run, neighbors: Int[np.ndarray, " depth"], k: int, sampling: Sampling) -> Context:
    """The first k neighbors."""
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


def segment_ids(item: TokenizedDocument, kind: type[Text] | type[Image]) -> np.ndarray | None:
    """The ids of the first text, or of the first image."""
    pairs = zip(item.document.segments, item.ids, strict=True)
    return next((ids for segment, ids in pairs if isinstance(segment, kind)), None)


def entity(run: Run, item: TokenizedDocument) -> str:
    """What a document shows by its metadata; "" if they do not say."""
    found = item.document.metadata.get(run.experiment.data.entity_field)
    return "" if found is None else str(found)


def memory_of(run: Run, split: Split, names: Iterable[str]) -> dict[str, list[TokenizedDocument]]:
    """Of each entity, its documents with an image in the memory that queries of a split search, where there are any."""
    wanted, found = set(names) - {""}, defaultdict(list)
    for part in run.experiment.data.memory_splits(split):
        documents = run.documents(part)
        for item in documents.many(range(len(documents))):
            name = entity(run, item)
            if name in wanted and item.document.images:
                found[name].append(item)
    return dict(found)


def judge(run: Run, split: Split, names: Iterable[str]) -> Judge:
    """Tells which entity an image shows: of the procedural world the one of the nearest emblem, in pixels; else, of
    these entities, the one whose pictures in the memory are nearest to the image for the encoder, on average."""
    world = run.experiment.data.train
    if isinstance(world, World):
        entities = world.entities()
        return lambda images: nearest_entities(images, entities)[0]
    shown = {name: items[:JUDGED] for name, items in memory_of(run, split, names).items()}
    vectors = [
        run.encoder.embed_images([item.document.images[0] for item in items]).mean(0) for items in shown.values()
    ]
    return lambda images: [[*shown][n] for n in (run.encoder.embed_images([*images]) @ np.stack(vectors).T).argmax(1)]
