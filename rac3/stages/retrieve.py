"""Index and retrieve: memory parts -> indexes -> selected neighbors of every document, for each query part."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
from jaxtyping import Int

from rac3 import recipes
from rac3.artifacts.arrays import create_array, write_shard
from rac3.execution.progress import Progress
from rac3.execution.shards import Shard, Tally, clear, document_rows, document_shards
from rac3.execution.shards import run as run_shards
from rac3.experiment import Split
from rac3.retrieval.retriever import Adjustable, Queries
from rac3.retrieval.selection import Dropped, Selected
from rac3.run import Run

NEIGHBORS_CHUNK = 16 * 2**10  # bytes: training reads the neighbors of documents in random order


def index(run: Run) -> None:
    """Makes the index of each part of the memory that has none yet."""
    if not run.experiment.retrieves:
        return
    for split in run.experiment.data.memory_splits("test"):
        recipe = run.recipe(recipes.index, split)
        if run.workdir.find(recipe) is None:
            part = run.memory_part(split)
            with run.workdir.write(recipe) as draft, Progress(f"index {split}", 1, "parts") as bar:
                run.experiment.retriever.build(part, draft.folder)
                draft.counts["documents"] = len(part)
                bar.update()


def retrieve(run: Run, splits: Sequence[Split] = ("train", "validation", "tuning", "test")) -> None:
    """Makes the neighbors of each split. The documents of other parts of the memory are never queries."""
    experiment, workdir = run.experiment, run.workdir
    if not experiment.retrieves:
        return
    found = {split: run.recipe(recipes.neighbors, split) for split in experiment.data.sources() if split in splits}
    missing = {split: recipe for split, recipe in found.items() if not workdir.find(recipe)}
    for split in missing:
        for part in experiment.data.memory_splits(split):
            run.artifact(recipes.index, part)
        run.artifact(recipes.queries, split)
    documents = {split: len(run.documents(split)) for split in missing}
    with ExitStack() as stack:
        drafts = {split: stack.enter_context(workdir.write(recipe)) for split, recipe in missing.items()}
        shards = [
            shard
            for split, draft in drafts.items()
            for shard in document_shards(split, documents[split], experiment.documents_per_shard, draft.folder)
        ]
        throughput = run_shards(experiment.executor, _Retrieve(run), shards)
        for split, draft in drafts.items():
            draft.counts.update(documents=documents[split], throughput=throughput)
            summaries = [shard.read_summary() for shard in shards if shard.part == split]
            draft.counts.update({name: sum(summary[name] for summary in summaries) for name in summaries[0]})
        clear(shards)


def shortage_line(run: Run, split: Split) -> str:
    """What is missing to `selection.depth` neighbors of each query, with the settings to raise; "" if nothing is."""
    counts, experiment = run.artifact(recipes.neighbors, split).manifest["counts"], run.experiment
    memory = [len(run.documents(part)) for part in experiment.data.memory_splits(split)]
    others = sum(memory) - (split == "train")  # a document is not its own neighbor
    wanted = counts["queries"] * min(experiment.selection.depth, others)
    if counts["neighbors"] >= wanted:
        return ""
    without = counts["queries_without_neighbors"]
    dropped = sum(counts[f"dropped_{rule}"] for rule in Dropped._fields)
    retriever = experiment.retriever
    knobs = [effort] if isinstance(retriever, Adjustable) and (effort := retriever.effort(max(memory))) else []
    knobs += [f"retriever.num_neighbors={retriever.num_neighbors}"]
    knobs += [f"selection.max_similarity={experiment.selection.max_similarity}"] if dropped else []
    return (
        f"{split}: {counts['neighbors']:,} of {wanted:,} neighbors, {without:,} of {counts['queries']:,} queries "
        f"without any; selection dropped {dropped:,} candidates; for more, raise {' or '.join(knobs)}"
    )


@dataclass(frozen=True)
class _Retrieve:
    """The job."""

    run: Run
    label: str = "retrieve"

    def open(self) -> "_Searcher":
        return _Searcher(self.run)


class _Searcher:
    """Finds the neighbors of the documents of a shard, for each part of the query.

    One search runs at a time, since a retriever may take all cores, and its author need not think of threads.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._searching = Lock()

    def __call__(self, shard: Shard, tally: Tally) -> dict[str, Any]:
        experiment, split = self.run.experiment, shard.part
        store = self.run.documents(split)
        rows = document_rows(shard, len(store), experiment.documents_per_shard)
        documents = [item.document for item in store.many(rows)]
        keys, texts = [document.key for document in documents], [document.text for document in documents]
        del documents  # with their images
        arrays = self.run.query_arrays(split)
        shape = (len(rows), len(arrays), experiment.selection.depth)
        ids, scores = np.full(shape, -1, np.int64), np.zeros(shape, np.float32)
        queries, dropped = 0, np.zeros(len(Dropped._fields), np.int64)
        for number, name in enumerate(arrays):
            vectors = self.run.queries(split, name)[rows.start : rows.stop]
            asked = np.flatnonzero(vectors.any(1))  # the others lack the part
            # the query is that part alone: a text next to an image would lead a retriever that reads to its own words
            words = [texts[row] if name.startswith("text") else "" for row in asked]
            found = self._search(
                split, Queries([keys[row] for row in asked], vectors[asked], words), rows.start + asked
            )
            ids[asked, number], scores[asked, number] = found.ids, found.scores
            queries, dropped = queries + len(asked), dropped + found.dropped
            tally.add(0)
        tally.add(len(rows))
        for name, values in (("ids", ids), ("scores", scores)):
            whole, per_shard = (len(store), *shape[1:]), experiment.documents_per_shard
            array = create_array(shard.folder / name, whole, str(values.dtype), per_shard, NEIGHBORS_CHUNK)
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
            return self.run.memory(split).retrieve(queries, exclude)
