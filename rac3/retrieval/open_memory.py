"""A memory opened for search: its parts, their indexes and their documents."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Int

from rac3.documents.store import DocumentStore, TokenizedDocument
from rac3.retrieval.memory import Memory, MemoryPart
from rac3.retrieval.retriever import Chosen, Index, Queries, Retriever, search_memory
from rac3.retrieval.selection import Selected, Selection, select


@dataclass(eq=False)
class IndexedPart:
    """A part of the memory, its documents, and the folder that holds its index."""

    part: MemoryPart
    documents: DocumentStore
    folder: Path
    _opened: list[tuple[Retriever, Index]] = field(default_factory=list, init=False, repr=False)

    def index(self, retriever: Retriever) -> Index:
        """The index, opened on first use and again only for another retriever."""
        if not self._opened or self._opened[0][0] != retriever:
            self._opened[:] = [(retriever, retriever.open(self.part, self.folder))]
        return self._opened[0][1]


@dataclass(frozen=True, eq=False)
class OpenMemory:
    """The parts of a memory, searched with one retriever and one selection."""

    parts: Sequence[IndexedPart]
    retriever: Retriever
    configured_selection: Selection

    @cached_property
    def memory(self) -> Memory:
        return Memory(tuple(each.part for each in self.parts))

    @cached_property
    def indexes(self) -> list[Index]:
        indexes = [each.index(self.retriever) for each in self.parts]
        if isinstance(self.retriever, Chosen):
            self.retriever.check(self.memory)
        return indexes

    @property
    def selection(self) -> Selection:
        """The configured selection, without a similarity limit for documents that a person has chosen."""
        selection = self.configured_selection
        return replace(selection, max_similarity=1.0) if isinstance(self.retriever, Chosen) else selection

    def retrieve(self, queries: Queries, exclude: Int[np.ndarray, " queries"]) -> Selected:
        """The documents selected for each query; `exclude` as in `select`."""
        wanted = min(self.retriever.num_neighbors, len(self.memory))  # a small memory has no more to give
        _, ids = search_memory(self.indexes, self.memory, queries, wanted)
        return select(self.selection, queries.embeddings, ids, self.memory, exclude)

    def document(self, number: int) -> TokenizedDocument:
        """The document with this global id."""
        part = int(np.searchsorted(self.memory.offsets, number, side="right")) - 1
        return self.parts[part].documents[number - int(self.memory.offsets[part])]
