"""Embed: each document's text and image through frozen CLIP, into the vectors that retrieval reads.

embeddings  train, parts of the memory   document         mixed-modal, of text and image (paper, eq. 1)
queries     validation, test             text, image      of each part alone
            train                        text, image      the same with query dropout (paper, section 3.2), and
                                         text-1, ...      other views of it, if there are more
"""

import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from rac3 import recipes
from rac3.artifacts.arrays import Vectors
from rac3.artifacts.recipe import Recipe
from rac3.artifacts.workdir import Workdir
from rac3.clip.encoder import Encoder, mix, query_dropout_keys
from rac3.documents.store import DocumentStore, TokenizedDocument
from rac3.execution.shards import Shard, Tally, clear, run
from rac3.experiment import Experiment, Split
from rac3.retrieval.memory import EmbeddingRows
from rac3.stages.encoders import open_clip

DOCUMENTS_AT_ONCE = 1024  # that a thread holds in memory
DOCUMENT = "document"
PARTS = ("text", "image")
QUERIES = " queries"  # what ends the name of a part of the work that makes queries


def embed(experiment: Experiment, workdir: Workdir) -> None:
    """Makes the embeddings and the queries of every split that has none yet."""
    made: dict[str, Recipe] = {}
    for split in experiment.data.sources():
        role = experiment.data.role(split)
        made |= {split: recipes.embeddings(experiment, split)} if role != "held out" else {}
        made |= {split + QUERIES: recipes.queries(experiment, split)} if role != "memory" else {}
    missing = {part: recipe for part, recipe in made.items() if not workdir.find(recipe)}
    if not missing:
        return
    workdir.require(recipes.clip(experiment), "rac3 encoders")
    sizes = {part: len(open_documents(experiment, workdir, part.removesuffix(QUERIES))) for part in missing}
    with ExitStack() as stack:
        drafts = {part: stack.enter_context(workdir.write(recipe)) for part, recipe in missing.items()}
        shards = [
            shard
            for part, draft in drafts.items()
            for shard in document_shards(experiment, part, sizes[part], draft.folder)
        ]
        throughput = run(experiment.executor, _Embed(experiment, workdir), shards)
        for part, draft in drafts.items():
            draft.counts.update(documents=sizes[part], throughput=throughput)
        clear(shards)


def document_shards(experiment: Experiment, part: str, documents: int, folder: Path) -> list[Shard]:
    """Ranges of documents, each of which is one file of every array that is made from them."""
    starts = range(0, documents, experiment.documents_per_shard)
    names = [f"documents {start} to {min(start + starts.step, documents) - 1}" for start in starts]
    return [Shard(part, number, name, folder) for number, name in enumerate(names)]


def document_rows(experiment: Experiment, shard: Shard, documents: int) -> range:
    """The documents of a shard of `document_shards`."""
    start = shard.number * experiment.documents_per_shard
    return range(start, min(start + experiment.documents_per_shard, documents))


def open_documents(experiment: Experiment, workdir: Workdir, split: Split) -> DocumentStore:
    return DocumentStore(workdir.require(recipes.documents(experiment, split), "rac3 ingest").folder)


@dataclass(frozen=True)
class _Embed:
    """The job."""

    experiment: Experiment
    workdir: Workdir
    label: str = "embed"

    def open(self) -> "_Embedder":
        return _Embedder(self.experiment, self.workdir, open_clip(self.experiment, self.workdir))


def query_arrays(experiment: Experiment, split: Split) -> list[str]:
    """The arrays of query vectors of a split: for each view, one of each part."""
    views = range(experiment.num_views if split == "train" else 1)
    return [f"{part}-{view}" if view else part for view in views for part in PARTS]


class _Embedder:
    """Embeds the documents of a shard."""

    def __init__(self, experiment: Experiment, workdir: Workdir, encoder: Encoder) -> None:
        self.experiment, self.encoder = experiment, encoder
        self._documents = lru_cache(maxsize=1)(partial(open_documents, experiment, workdir))

    def __call__(self, shard: Shard, tally: Tally) -> dict[str, Any]:
        split = shard.part.removesuffix(QUERIES)
        store = self._documents(split)
        rows = document_rows(self.experiment, shard, len(store))
        names = [DOCUMENT] if split == shard.part else query_arrays(self.experiment, split)
        vectors = {name: np.zeros((len(rows), self.encoder.width), np.float32) for name in names}
        for start in range(0, len(rows), DOCUMENTS_AT_ONCE):
            block = rows[start : start + DOCUMENTS_AT_ONCE]
            items = store.many(block)
            for name in names:
                vectors[name][start : start + len(block)] = self._embed(items, name, dropped=split == "train")
            tally.add(len(block))
        shape = len(store), self.encoder.width
        for name in names:
            array = Vectors.create(
                shard.folder / name, shape, self.experiment.embedding_dtype, self.experiment.documents_per_shard
            )
            array.write_shard(shard.number, vectors[name])
        return {}

    def _embed(
        self, items: Sequence[TokenizedDocument], name: str, dropped: bool
    ) -> Float[np.ndarray, "documents embed"]:
        """The vectors `name` of some documents; a part that a document lacks is zeros."""
        if name == DOCUMENT:
            text, image = (self._embed_part(items, part, None) for part in PARTS)
            return mix(text, image, np.asarray(text.any(1)), np.asarray(image.any(1)))
        part, _, view = name.partition("-")
        return self._embed_part(items, part, int(view or 0) if dropped else None)

    def _embed_part(
        self, items: Sequence[TokenizedDocument], part: str, view: int | None
    ) -> Float[np.ndarray, "documents embed"]:
        """Vectors of the texts, or of the first images; `view` asks for query dropout, that of one view."""
        vectors = np.zeros((len(items), self.encoder.width), np.float32)
        documents = [item.document for item in items]
        rows = np.flatnonzero([bool(document.text if part == "text" else document.images) for document in documents])
        if not len(rows):
            return vectors
        chosen = [documents[row] for row in rows]
        names = [document.key for document in chosen]
        keys = None if view is None else query_dropout_keys(self.experiment.seed, names, view)
        rate = self.experiment.query_dropout
        vectors[rows] = (
            self.encoder.embed_texts([document.text for document in chosen], drop_keys=keys, drop_rate=rate)
            if part == "text"
            else self.encoder.embed_images([document.images[0] for document in chosen], drop_keys=keys, drop_rate=rate)
        )
        return vectors


def document_embeddings(folder: Path) -> EmbeddingRows:
    """The mixed-modal vectors of a split of the memory: read when asked for, or now if they are small.

    Small is a sixteenth of this machine's memory, on which there may be a worker for each of 8 GPUs.
    """
    vectors = Vectors(folder / DOCUMENT)
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return vectors[:] if 4 * math.prod(vectors.shape) <= machine // 16 else vectors


def open_queries(experiment: Experiment, workdir: Workdir, split: Split, name: str) -> Vectors:
    """The vectors of one of `query_arrays`; zeros where a document lacks the part. Those of `train` have dropout."""
    return Vectors(workdir.require(recipes.queries(experiment, split), "rac3 embed").folder / name)
