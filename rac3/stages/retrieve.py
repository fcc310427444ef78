"""Index and retrieve: memory parts -> indexes -> selected neighbors of every document, for each query part."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

from rac3.arrays import create_array, read_array
from rac3.artifacts import Workdir
from rac3.documents.document import Document
from rac3.documents.store import DocumentStore, TokenizedDocument
from rac3.experiment import Experiment, Split
from rac3.progress import Progress
from rac3.retrieval.fixed import Fixed
from rac3.retrieval.memory import Memory, MemoryPart
from rac3.retrieval.retriever import Index, Queries, search_memory
from rac3.retrieval.selection import select
from rac3.stages import recipes
from rac3.stages.embed import PARTS, document_embeddings, open_documents, query_embeddings

BLOCK = 16_384  # queries at once


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
    for split in experiment.data.sources():
        recipe = recipes.neighbors(experiment, split)
        if split not in splits or workdir.find(recipe) is not None:
            continue
        memory = OpenMemory(experiment, workdir, recipes.memory_splits(experiment, split))
        documents = open_documents(experiment, workdir, split)
        folder = workdir.require(recipes.embeddings(experiment, split), "rac3 embed").folder
        training = split == "train"
        shape = (len(documents), len(PARTS), experiment.selection.depth)
        with workdir.write(recipe) as draft, Progress(f"retrieve {split}", 2 * len(documents), "queries") as bar:
            ids = create_array(draft.folder / "ids", shape, "int64", fill=-1)
            scores = create_array(draft.folder / "scores", shape, "float32")
            for number, part in enumerate(PARTS):
                vectors = query_embeddings(folder, part, training)
                for start in range(0, len(documents), BLOCK):
                    rows = np.arange(start, min(start + BLOCK, len(documents)))
                    found = _retrieve_block(memory, documents, part, vectors[rows], rows, training)
                    ids[start : start + len(rows), number].write(found[0]).result()
                    scores[start : start + len(rows), number].write(found[1]).result()
                    bar.update(len(rows))
            draft.counts["documents"] = len(documents)


def _retrieve_block(
    memory: OpenMemory,
    documents: DocumentStore,
    part: str,
    vectors: Float[np.ndarray, "queries embed"],
    rows: Int[np.ndarray, " queries"],
    training: bool,
) -> tuple[Int[np.ndarray, "queries depth"], Float[np.ndarray, "queries depth"]]:
    """Neighbors of one block by one query part; none for a document that lacks it. In training, never itself.

    The query is that part alone: a text beside an image would lead a retriever that reads to the caption's own words.
    """
    items = documents.many(rows.tolist())
    texts = [item.document.text if part == "text" else "" for item in items]
    queries = Queries([item.document.key for item in items], vectors, texts)
    exclude = rows if training else np.full(len(rows), -1)
    ids, scores = memory.retrieve(queries, exclude)
    lacks = ~np.asarray(vectors.any(1, keepdims=True))
    return np.where(lacks, -1, ids), np.where(lacks, 0, scores).astype(np.float32)


def read_neighbors(experiment: Experiment, workdir: Workdir, split: Split) -> Int[np.ndarray, "documents parts depth"]:
    """Global memory ids by document and query part (text, image)."""
    return read_array(workdir.require(recipes.neighbors(experiment, split), "rac3 retrieve").folder / "ids")
