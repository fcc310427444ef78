"""Evaluate retrieval, without a model: does the right document come back, and what does approximation cost?"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from rac3 import recipes
from rac3.artifacts.workdir import write_atomic
from rac3.clip.encoder import mix
from rac3.config import InputError
from rac3.documents.document import Document, Image, Text
from rac3.documents.store import DocumentStore
from rac3.evaluation.entities import entity_of
from rac3.evaluation.recall import KS, clip_metrics, recall_at
from rac3.execution.progress import Progress
from rac3.experiment import Experiment, Split
from rac3.retrieval.exact import Exact
from rac3.retrieval.open_memory import OpenMemory
from rac3.retrieval.retriever import Queries, Retriever, Tunable, search_memory
from rac3.retrieval.selection import Dropped
from rac3.run import PARTS, Run

METRICS = "metrics.json"
SEARCHED = 10  # neighbors by which an approximate search is judged
TIE = 1e-6
BINS = np.linspace(-1, 1, 101)  # of similarities
COUNTED = 100_000  # documents whose neighbors' similarities are counted
DOCUMENTS_AT_ONCE = 1024  # read at once, with their pictures
REPEATS = 3  # of a timed search, of which the fastest counts


def evaluate_retrieval(run: Run) -> dict[str, Any]:
    """The metrics of retrieval, made or read: by held-out split, of the training neighbors, and of the search.

    Raises:
      InputError: the neighbors are not made yet, or the retriever is `none`.
    """
    experiment, workdir = run.experiment, run.workdir
    if not experiment.retrieves:
        raise InputError("retriever:none retrieves nothing, so there is nothing to evaluate; name another retriever")
    recipe = run.recipe(recipes.retrieval)
    artifact = workdir.find(recipe)
    if artifact is None:
        held_out = [split for split in experiment.data.sources() if experiment.data.role(split) == "held out"]
        splits: list[Split] = ["train", *held_out]
        selection = {split: _selection(run, split) for split in splits}
        opened = run.memory()
        questions = {split: Questions.open(run, split) for split in held_out}
        with workdir.write(recipe) as draft, Progress("evaluate retrieval", len(held_out) + 1, "parts") as bar:
            field = experiment.data.entity_field
            metrics: dict[str, Any] = {"selection": selection, "entity_field": field, "splits": {}}
            for split, asked in questions.items():
                metrics["splits"][split] = {
                    "documents": len(asked.documents),
                    "with_entity": sum(entity_of(each, field) is not None for each in asked.documents),
                    "pairs": clip_metrics(asked.documents, asked.vectors["text"], asked.vectors["image"]),
                    "entities": _entity_recalls(experiment, opened, asked),
                }
                bar.update()
            metrics["search"] = _search(experiment, opened, list(questions.values()))
            bar.update()
            write_atomic(draft.folder / METRICS, json.dumps(metrics, indent=2) + "\n")
        artifact = run.artifact(recipes.retrieval)
    return json.loads((artifact.folder / METRICS).read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Questions:
    """The first documents of a held-out split, and the vectors of what they ask with; zeros where they lack a part."""

    documents: Sequence[Document]
    vectors: Mapping[str, Float[np.ndarray, "documents embed"]]  # text, image, and their mixture

    @classmethod
    def open(cls, run: Run, split: Split) -> "Questions":
        store = run.documents(split)
        items = store.many(range(min(len(store), run.experiment.evaluation.documents)))
        text, image = (run.queries(split, part)[: len(items)] for part in PARTS)
        both = mix(text, image, np.asarray(text.any(1)), np.asarray(image.any(1)))
        return cls([item.document for item in items], {"text": text, "image": image, "both": both})


def entity_recall(run: Run, split: Split, k: int) -> dict[str, float] | None:
    """By query part: the share of the queries with a document of their entity among the first k selected neighbors.

    None if it has no meaning: no document of the split, or none of the memory, names an entity.
    """
    data, field = run.experiment.data, run.experiment.data.entity_field
    if not field or not run.experiment.retrieves or split not in data.sources():
        return None
    memory = [entity_of(each, field) for part in data.memory_splits(split) for each in _all(run.documents(part))]
    if not any(memory):
        return None
    asking = list(_all(run.documents(split)))
    neighbors = run.neighbors(split)[:]
    recalls = {}
    for number, (part, kind) in enumerate(zip(PARTS, (Text, Image), strict=True)):
        has = [any(isinstance(segment, kind) for segment in each.segments) for each in asking]
        entities = [
            entity_of(each, field) if part_is_there else None for each, part_is_there in zip(asking, has, strict=True)
        ]
        recall = recall_at(k, neighbors[:, number], entities, memory)
        if recall is not None:
            recalls[part] = recall
    return recalls or None


def _all(documents: DocumentStore) -> Iterator[Document]:
    """All documents, some at a time."""
    for start in range(0, len(documents), DOCUMENTS_AT_ONCE):
        yield from (
            each.document for each in documents.many(range(start, min(start + DOCUMENTS_AT_ONCE, len(documents))))
        )


def _entity_recalls(experiment: Experiment, opened: OpenMemory, asked: Questions) -> dict[str, dict[str, float]]:
    """As `entity_recall`, of what the retriever ranks first, before selection, for each kind of query."""
    field = experiment.data.entity_field
    if not field:
        return {}
    recalls = {}
    for kind, vectors in asked.vectors.items():
        rows = np.flatnonzero(vectors.any(1)).tolist()
        if rows:
            _, ids = search_memory(opened.indexes, opened.memory, _queries(asked, kind, rows), max(KS))
            found = {i: entity_of(opened.document(i).document, field) for i in np.unique(ids[ids >= 0]).tolist()}
            wanted = [entity_of(asked.documents[row], field) for row in rows]
            known = {str(k): share for k in KS if (share := recall_at(k, ids, wanted, found)) is not None}
            if known and any(found.values()):
                recalls[kind] = known
    return recalls


def _queries(asked: Questions, kind: str, rows: list[int]) -> Queries:
    documents = [asked.documents[row] for row in rows]
    texts = [document.text if kind != "image" else "" for document in documents]
    return Queries([document.key for document in documents], asked.vectors[kind][rows], texts)


def _selection(run: Run, split: Split) -> dict[str, Any]:
    """What selection did with the candidates of a split, and the similarities of what it kept."""
    counts = run.artifact(recipes.neighbors, split).manifest["counts"]
    dropped = {rule: counts[f"dropped_{rule}"] for rule in Dropped._fields}
    considered = counts["neighbors"] + sum(dropped.values())
    ids, scores = (run.neighbors(split, name)[:COUNTED] for name in ("ids", "scores"))
    histograms = {}
    for number, part in enumerate(PARTS):
        kept, similarity = (each[:, number :: len(PARTS)] for each in (ids >= 0, scores))
        histograms[part] = {"first": _histogram(similarity[..., 0][kept[..., 0]]), "kept": _histogram(similarity[kept])}
    return {
        "queries": counts["queries"],
        "queries_without_neighbors": counts["queries_without_neighbors"],
        "neighbors_per_query": counts["neighbors"] / counts["queries"] if counts["queries"] else None,
        "dropped": {rule: count / considered if considered else None for rule, count in dropped.items()},
        "similarities": histograms,
    }


def _histogram(values: Float[np.ndarray, " n"]) -> list[float]:
    """Shares of the values in `BINS`."""
    return (np.histogram(values, BINS)[0] / max(1, len(values))).tolist()


def _search(experiment: Experiment, opened: OpenMemory, questions: Sequence[Questions]) -> dict[str, Any]:
    """Recall against exact search, and queries per second, as configured and with more and less effort."""
    parts = [
        _queries(asked, part, np.flatnonzero(asked.vectors[part].any(1)).tolist())
        for asked in questions
        for part in PARTS
    ]
    queries = Queries(
        [key for each in parts for key in each.keys],
        np.concatenate([each.embeddings for each in parts]),
        [text for each in parts for text in each.texts],
    )
    retriever, memory = experiment.retriever, opened.memory
    k = min(SEARCHED, len(memory))
    if not len(queries) or not k:
        raise InputError(
            f"there is nothing to search: {len(queries)} queries, {len(memory)} documents in the memory; give held-out "
            "documents (data.validation or data.test) and a memory"
        )
    exact = Exact(num_neighbors=k)
    truth, _, seconds = _timed(opened, exact, queries, k)
    settings: dict[str, Retriever] = {"as configured": retriever}
    if isinstance(retriever, Tunable):
        settings |= retriever.efforts(max(len(part) for part in memory.parts))
    points = []
    for label, setting in settings.items():
        _, ids, spent = _timed(opened, setting, queries, k)
        reached = np.matmul(memory.embeddings_of(ids), queries.embeddings[:, :, None])[:, :, 0]
        right: Bool[np.ndarray, "queries k"] = (ids >= 0) & (reached > truth[:, -1:] - TIE)
        points.append({"effort": label, "recall": float(right.mean()), "queries_per_second": len(queries) / spent})
    return {
        "retriever": type(retriever).__name__,
        "memory": len(memory),
        "queries": len(queries),
        "k": k,
        "exact_queries_per_second": len(queries) / seconds,
        "points": points,
    }


def _timed(
    opened: OpenMemory, retriever: Retriever, queries: Queries, k: int
) -> tuple[Float[np.ndarray, "queries k"], Int[np.ndarray, "queries k"], float]:
    """Scores, ids, and the seconds of the fastest search; the first, which may compile, does not count."""
    indexes = [retriever.open(each.part, each.folder) for each in opened.parts]
    scores, ids = search_memory(indexes, opened.memory, queries, k)
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        search_memory(indexes, opened.memory, queries, k)
        seconds.append(time.perf_counter() - started)
    return scores, ids, min(seconds)
