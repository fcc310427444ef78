"""Index and retrieve: memory parts -> indexes -> selected neighbors of every document, for each query part."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache, partial
from threading import Lock
from typing import Any, cast

import numpy as np
from jaxtyping import Int

from rac3 import recipes
from rac3.artifacts.arrays import Rows, create_array, write_shard
from rac3.artifacts.workdir import Workdir
from rac3.execution.progress import Progress
from rac3.execution.shards import Shard, Tally, clear, run
from rac3.experiment import Experiment, Split
from rac3.retrieval.retriever import Queries
from rac3.retrieval.selection import Dropped, Selected
from rac3.stages.embed import document_rows, document_shards, open_documents, open_queries, query_arrays
from rac3.stages.memory import OpenMemory, memory_part

NEIGHBORS_CHUNK = 16 * 2**10  # bytes: training reads the neighbors of documents in random order


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
    """Makes the neighbors of each split. The documents of other parts of the memory are never queries."""
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
        workdir.require(recipes.queries(experiment, split), "rac3 embed")
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
            summaries = [shard.read_summary() for shard in shards if shard.part == split]
            draft.counts.update({name: sum(summary[name] for summary in summaries) for name in summaries[0]})
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
        rows = document_rows(experiment, shard, len(store))
        documents = [item.document for item in store.many(rows)]
        keys, texts = [document.key for document in documents], [document.text for document in documents]
        del documents  # with their images
        arrays = query_arrays(experiment, split)
        shape = (len(rows), len(arrays), experiment.selection.depth)
        ids, scores = np.full(shape, -1, np.int64), np.zeros(shape, np.float32)
        queries, dropped = 0, np.zeros(len(Dropped._fields), np.int64)
        for number, name in enumerate(arrays):
            vectors = open_queries(experiment, self.workdir, split, name)[rows.start : rows.stop]
            asked = np.flatnonzero(vectors.any(1))  # the others lack the part
            # the query is that part alone: a text beside an image would lead a retriever that reads to its own words
            words = [texts[row] if name.startswith("text") else "" for row in asked]
            found = self._search(
                split, Queries([keys[row] for row in asked], vectors[asked], words), rows.start + asked
            )
            ids[asked, number], scores[asked, number] = found.ids, found.scores
            queries, dropped = queries + len(asked), dropped + found.dropped
            tally.add(0)
        tally.add(len(rows))
        for name, values, fill in (("ids", ids, -1), ("scores", scores, 0)):
            whole = (len(store), *shape[1:])
            array = create_array(
                shard.folder / name, whole, str(values.dtype), experiment.documents_per_shard, fill, NEIGHBORS_CHUNK
            )
            write_shard(array, shard.number, values)
        kept = (ids >= 0).sum(axis=2)
        return {
            "queries": queries,
            "neighbors": int(kept.sum()),
            "queries_without_neighbors": queries - int((kept > 0).sum()),
            **{f"dropped_{rule}": int(count) for rule, count in zip(Dropped._fields, dropped, strict=True)},
        }

    def _search(self, split: Split, queries: Queries, rows: Int[np.ndarray, " queries"]) -> Selected:
        """In training, documents of the memory ask: never for themselves."""
        exclude = rows if split == "train" else np.full(len(rows), -1)
        with self._searching:
            return self._open(tuple(recipes.memory_splits(self.experiment, split))).retrieve(queries, exclude)


def read_neighbors(experiment: Experiment, workdir: Workdir, split: Split, name: str = "ids") -> Rows:
    """Global memory ids [documents, queries, depth] of each of `query_arrays`, -1 is none; or their `scores`."""
    return Rows(workdir.require(recipes.neighbors(experiment, split), "rac3 retrieve").folder / name)
