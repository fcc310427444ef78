"""The memory as the offline stages have written it, open to be searched: parts, their indexes, their documents."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
from jaxtyping import Int

from rac3 import recipes
from rac3.artifacts.workdir import Workdir
from rac3.documents.store import DocumentStore, Keys, Texts, TokenizedDocument, hash64
from rac3.experiment import Experiment, Split
from rac3.retrieval.fixed import Fixed
from rac3.retrieval.memory import Memory, MemoryPart
from rac3.retrieval.retriever import Index, Queries, search_memory
from rac3.retrieval.selection import Selected, Selection, select
from rac3.stages.embed import document_embeddings, open_documents


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

    def retrieve(self, queries: Queries, exclude: Int[np.ndarray, " queries"]) -> Selected:
        """The documents selected for each query; `exclude` as in `select`."""
        _, ids = search_memory(self.indexes, self.memory, queries, self.experiment.retriever.num_neighbors)
        return select(self.selection, queries.embeddings, ids, self.memory, exclude)

    @property
    def selection(self) -> Selection:
        """The experiment's; but nothing that a person has chosen is redundant."""
        selection = self.experiment.selection
        return replace(selection, max_similarity=1.0) if isinstance(self.experiment.retriever, Fixed) else selection

    def document(self, number: int) -> TokenizedDocument:
        """A document by its global id."""
        part = int(np.searchsorted(self.memory.offsets, number, side="right")) - 1
        return self.stores[part][number - int(self.memory.offsets[part])]


def memory_part(experiment: Experiment, workdir: Workdir, split: Split) -> MemoryPart:
    folder = workdir.require(recipes.embeddings(experiment, split), "rac3 embed").folder
    documents = open_documents(experiment, workdir, split)
    hashes = documents.column("text_hashes"), documents.column("image_hashes")
    withdrawn = withdrawn_rows(experiment, documents, split)
    return MemoryPart(split, document_embeddings(folder), Texts(documents), Keys(documents), hashes, withdrawn)


def withdrawn_rows(experiment: Experiment, documents: DocumentStore, split: Split) -> Int[np.ndarray, " rows"]:
    """The documents of a split that `takedowns` names, ascending."""
    keys = recipes.takedown_keys(experiment)
    own = {key.removeprefix(f"{split}:") for key in keys}
    if not own:
        return np.zeros(0, np.int64)
    hashes = np.array([hash64(key.encode()) for key in own], np.uint64)
    rows = np.flatnonzero(np.isin(documents.column("key_hashes"), hashes))
    found = [item.document.key for item in documents.many(rows.tolist())]
    return rows[[key in own for key in found]]
