"""Index and retrieve: memory parts -> indexes -> selected neighbors of every document, for each query part."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from threading import Lock
from typing import Any, cast

import numpy as np
from jaxtyping import Float, Int

from rac3.arrays import Rows, create_array, write_shard
from rac3.artifacts import Workdir
from rac3.documents.document import Document
from rac3.documents.store import DocumentStore, TokenizedDocument
from rac3.executors import Shard, Tally, clear, run
from rac3.experiment import Experiment, Split
from rac3.progress import Progress
from rac3.retrieval.fixed import Fixed
from rac3.retrieval.memory import Memory, MemoryPart
from rac3.retrieval.retriever import Index, Queries, search_memory
from rac3.retrieval.selection import select
from rac3.stages import recipes
from rac3.stages.embed import (
    PARTS,
    document_embeddings,
    document_rows,
    document_shards,
    open_documents,
    query_embeddings,
)

NEIGHBORS_CHUNK = 16 * 2**10  # bytes: training reads the neighbors of documents in random order


class Texts(Sequence[str]):
    """The texts of the documents of a split, read when asked for."""

    def __init__(self, documents: DocumentStore) -> None:
        self.documents = documents

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, row):  # int -> str, slice -> list, as of any sequence
        if isinstance(row, slice):
            return [self._of(item.document) for item in self.documents.many(range(*row.indices(len(self))))]
        if not -len(self) <= row < len(self):
            raise IndexError(row)  # what ends a `for` over a sequence
        return self._of(self.documents[row % len(self)].document)

    def _of(self, document: Document) -> str:
        return document.text


class Keys(Texts):
    """The keys of the documents of a split; `index` looks one up without reading the documents."""

    def _of(self, document: Document) -> str:
        return document.key

    def index(self, value: str, *_: int) -> int:
        row = self.documents.row_of(value)
        if row is None:
            raise ValueError(f"{value!r} is not a key of {self.documents.folder}")
        return row


class OpenMemory:
    """A memory that can be searched: its parts, their indexes, and their documents."""

    def __init__(self, experiment: Experiment, workdir: Workdir, splits: Sequence[Split]) -> None:
        self.experiment = experiment
        self.stores = [open_documents(experiment, workdir, split) for split in splits]
        self.memory = Memory(tuple(memory_part(experiment, workdir, split) for split in splits))
        self.folders = [workdir.require(recipes.index(experiment, split), "rac3 index").folder for split in splits]

    @cached_property
    def indexes(self) -> list[Index]:
        retriever = self.experiment.retriever
        indexes = [retriever.open(*each) for each in zip(self.memory.parts, self.folders, strict=True)]
        if isinstance(retriever, Fixed):
            retriever.check(self.memory)
        return indexes

    def retrieve(
        self, queries: Queries, exclude: Int[np.ndarray, " queries"]
    ) -> tuple[Int[np.ndarray, "queries depth"], Float[np.ndarray, "queries depth"]]:
        """Global ids (-1 is none) and similarities of the selected documents, best first."""
        retriever, selection = self.experiment.retriever, self.experiment.selection
        _, ids = search_memory(self.indexes, self.memory, queries, retriever.num_neighbors)
        if isinstance(retriever, Fixed):
            selection = replace(selection, max_similarity=1.0)  # what a person has chosen is not redundant
        selected = select(selection, queries.embeddings, ids, self.memory, exclude)
        return selected.ids, selected.scores

    def document(self, number: int) -> TokenizedDocument:
        """A document by its global id."""
        part = int(np.searchsorted(self.memory.offsets, number, side="right")) - 1
        return self.stores[part][number - int(self.memory.offsets[part])]


def memory_part(experiment: Experiment, workdir: Workdir, split: Split) -> MemoryPart:
    folder = workdir.require(recipes.embeddings(experiment, split), "rac3 embed").folder
    documents = open_documents(experiment, workdir, split)
    return MemoryPart(split, document_embeddings(folder), Texts(documents), Keys(documents))


def index(experiment: Experiment, workdir: Workdir) -> None:
    """Makes the index of each part of the memory that has none yet."""
    if not recipes.retrieves(experiment):
        return
    for split in recipes.memory_splits(experiment, "test"):
        recipe = recipes.index(experiment, split)
        if workdir.find(recipe) is None:
            part = memory_part(experiment, workdir, split)
            with workdir.write(recipe) as draft, Progress(f"index {split}", 1, "parts") as bar:
                experiment.retriever.build(part, draft.folder)
                draft.counts["documents"] = len(part)
                bar.update()


def retrieve(
    experiment: Experiment, workdir: Workdir, splits: Sequence[Split] = ("train", "validation", "test")
) -> None:
    """Makes the neighbors of each split; `memory` is never a query."""
    if not recipes.retrieves(experiment):
        return
    missing = [
        split
        for split in experiment.data.sources()
        if split in splits and not workdir.find(recipes.neighbors(experiment, split))
    ]
    for split in missing:
        for part in recipes.memory_splits(experiment, split):
            workdir.require(recipes.index(experiment, part), "rac3 index")
        workdir.require(recipes.embeddings(experiment, split), "rac3 embed")
    documents = {split: len(open_documents(experiment, workdir, split)) for split in missing}
    with ExitStack() as stack:
        drafts = {split: stack.enter_context(workdir.write(recipes.neighbors(experiment, split))) for split in missing}
        shards = [
            shard
            for split, draft in drafts.items()
            for shard in document_shards(experiment, split, documents[split], draft.folder)
        ]
        throughput = run(experiment.executor, _Retrieve(experiment, workdir), shards)
        for split, draft in drafts.items():
            draft.counts.update(documents=documents[split], throughput=throughput)
        clear(shards)


@dataclass(frozen=True)
class _Retrieve:
    """The job."""

    experiment: Experiment
    workdir: Workdir
    label: str = "retrieve"

    def open(self) -> "_Searcher":
        return _Searcher(self.experiment, self.workdir)


class _Searcher:
    """Finds the neighbors of the documents of a shard, for each part of the query.

    One search runs at a time, since a retriever may take all cores, and its author need not think of threads.
    """

    def __init__(self, experiment: Experiment, workdir: Workdir) -> None:
        self.experiment, self.workdir = experiment, workdir
        self._searching = Lock()
        self._open = lru_cache(maxsize=1)(partial(OpenMemory, experiment, workdir))  # the shards come split by split

    def __call__(self, shard: Shard, tally: Tally) -> dict[str, Any]:
        experiment, split = self.experiment, cast(Split, shard.part)
        store = open_documents(experiment, self.workdir, split)
        folder = self.workdir.require(recipes.embeddings(experiment, split), "rac3 embed").folder
        rows = document_rows(experiment, shard, len(store))
        documents = [item.document for item in store.many(rows)]
        keys, texts = [document.key for document in documents], [document.text for document in documents]
        del documents  # with their images
        shape = (len(rows), len(PARTS), experiment.selection.depth)
        ids, scores = np.full(shape, -1, np.int64), np.zeros(shape, np.float32)
        for number, part in enumerate(PARTS):
            # the query is that part alone: a text beside an image would lead a retriever that reads to its own words
            words = texts if part == "text" else [""] * len(texts)
            queries = Queries(keys, query_embeddings(folder, part)[rows.start : rows.stop], words)
            ids[:, number], scores[:, number] = self._search(split, queries, np.array(rows))
            tally.add(0)
        tally.add(len(rows))
        for name, values, fill in (("ids", ids, -1), ("scores", scores, 0)):
            whole = (len(store), *shape[1:])
            array = create_array(
                shard.folder / name, whole, str(values.dtype), experiment.documents_per_shard, fill, NEIGHBORS_CHUNK
            )
            write_shard(array, shard.number, values)
        return {}

    def _search(
        self, split: Split, queries: Queries, rows: Int[np.ndarray, " queries"]
    ) -> tuple[Int[np.ndarray, "queries depth"], Float[np.ndarray, "queries depth"]]:
        """Neighbors; none for a document that lacks the query part. In training, never itself."""
        exclude = rows if split == "train" else np.full(len(rows), -1)
        with self._searching:
            memory = self._open(tuple(recipes.memory_splits(self.experiment, split)))
            ids, scores = memory.retrieve(queries, exclude)
        lacks = ~np.asarray(queries.embeddings.any(1, keepdims=True))
        return np.where(lacks, -1, ids), np.where(lacks, 0, scores).astype(np.float32)


def read_neighbors(experiment: Experiment, workdir: Workdir, split: Split) -> Rows:
    """Global memory ids [documents, parts, depth] by document and query part (text, image)."""
    return Rows(workdir.require(recipes.neighbors(experiment, split), "rac3 retrieve").folder / "ids")
