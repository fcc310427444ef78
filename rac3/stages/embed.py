"""Embed: each document's text and image through frozen CLIP, into the vectors that retrieval reads.

embeddings  train, parts of the memory   document         mixed-modal, of text and image (paper, eq. 1)
queries     validation, test             text, image      of each part alone
            train                        text, image      the same with query dropout (paper, section 3.2), and
                                         text-1, ...      other views of it, if there are more
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from rac3 import recipes
from rac3.artifacts.arrays import Vectors
from rac3.artifacts.recipe import Recipe
from rac3.clip.encoder import mix, query_dropout_keys
from rac3.documents.store import TokenizedDocument
from rac3.execution.shards import Shard, Tally, clear, document_rows, document_shards
from rac3.execution.shards import run as run_shards
from rac3.experiment import Split
from rac3.run import DOCUMENT, PARTS, Run

DOCUMENTS_AT_ONCE = 1024  # that a thread holds in memory
EMBEDDINGS, QUERIES = "embeddings", "queries"  # the kinds of vectors that are made of a split


def embed(run: Run) -> None:
    """Makes the embeddings and the queries of every split that has none yet."""
    experiment, workdir = run.experiment, run.workdir
    work: list[tuple[str, Split, Recipe]] = []
    for split in experiment.data.sources():
        role = experiment.data.role(split)
        work += [(EMBEDDINGS, split, run.recipe(recipes.embeddings, split))] if role != "held out" else []
        work += [(QUERIES, split, run.recipe(recipes.queries, split))] if role != "memory" else []
    missing = [each for each in work if not workdir.find(each[2])]
    if not missing:
        return
    run.require_encoders(recipes.clip)
    sizes = {split: len(run.documents(split)) for _, split, _ in missing}
    with ExitStack() as stack:
        shards: list[Shard] = []
        drafts = [(split, stack.enter_context(workdir.write(recipe))) for _, split, recipe in missing]
        for (kind, split, _), (_, draft) in zip(missing, drafts, strict=True):
            per_shard = experiment.documents_per_shard
            shards += document_shards(split, sizes[split], per_shard, draft.folder, kind)
        throughput = run_shards(experiment.executor, _Embed(run), shards)
        for split, draft in drafts:
            draft.counts.update(documents=sizes[split], throughput=throughput)
        clear(shards)


@dataclass(frozen=True)
class _Embed:
    """The job."""

    run: Run
    label: str = "embed"

    def open(self) -> "_Embedder":
        return _Embedder(self.run)


class _Embedder:
    """Embeds the documents of a shard."""

    def __init__(self, run: Run) -> None:
        self.run, self.experiment, self.encoder = run, run.experiment, run.encoder

    def __call__(self, shard: Shard, tally: Tally) -> dict[str, Any]:
        split, per_shard = shard.part, self.experiment.documents_per_shard
        store = self.run.documents(split)
        rows = document_rows(shard, len(store), per_shard)
        names = [DOCUMENT] if shard.kind == EMBEDDINGS else self.run.query_arrays(split)
        vectors = {name: np.zeros((len(rows), self.encoder.width), np.float32) for name in names}
        for start in range(0, len(rows), DOCUMENTS_AT_ONCE):
            block = rows[start : start + DOCUMENTS_AT_ONCE]
            items = store.many(block)
            for name in names:
                vectors[name][start : start + len(block)] = self._embed(items, name, dropped=split == "train")
            tally.add(len(block))
        shape = len(store), self.encoder.width
        for name in names:
            array = Vectors.create(shard.folder / name, shape, self.experiment.embedding_dtype, per_shard)
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
