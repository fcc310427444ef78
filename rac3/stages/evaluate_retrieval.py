"""Evaluate retrieval, without a model: does what was asked for come back, and what does approximation cost?"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from rac3 import recipes
from rac3.artifacts.workdir import Workdir, write_atomic
from rac3.clip.encoder import mix
from rac3.config import InputError
from rac3.documents.document import Document
from rac3.documents.store import DocumentStore
from rac3.evaluation.recall import pair_recall, recall_at
from rac3.execution.progress import Progress
from rac3.experiment import Experiment, Split
from rac3.retrieval.exact import Exact
from rac3.retrieval.retriever import Queries, Retriever, Tunable, search_memory
from rac3.retrieval.selection import Dropped
from rac3.stages.embed import PARTS, open_documents, open_queries
from rac3.stages.memory import OpenMemory
from rac3.stages.retrieve import read_neighbors

METRICS = "metrics.json"
KS = (1, 5, 10)
SEARCHED = 10  # neighbors by which an approximate search is judged
TIE = 1e-6
BINS = np.linspace(-1, 1, 101)  # of similarities
COUNTED = 100_000  # documents whose neighbors' similarities are counted
REPEATS = 3  # of a timed search, of which the fastest counts


def evaluate_retrieval(experiment: Experiment, workdir: Workdir) -> dict[str, Any]:
    """The metrics of retrieval, made or read: by held-out split, of the training neighbors, and of the search.

    Raises:
      InputError: the neighbors are not made yet, or the retriever is `none`.
    """
    if not recipes.retrieves(experiment):
        raise InputError("retriever:none retrieves nothing that could be evaluated; name another retriever")
    recipe = recipes.retrieval(experiment)
    artifact = workdir.find(recipe)
    if artifact is None:
        held_out = [split for split in experiment.data.sources() if experiment.data.role(split) == "held out"]
        splits: list[Split] = ["train", *held_out]
        selection = {split: _selection(experiment, workdir, split) for split in splits}
        opened = OpenMemory(experiment, workdir, recipes.memory_splits(experiment, "test"))
        questions = {split: Questions.open(experiment, workdir, split) for split in held_out}
        with workdir.write(recipe) as draft, Progress("evaluate retrieval", len(held_out) + 1, "parts") as bar:
            metrics: dict[str, Any] = {"selection": selection, "splits": {}}
            for split, asked in questions.items():
                metrics["splits"][split] = {
                    "documents": len(asked.documents),
                    "pairs": clip_metrics(asked.documents, asked.vectors["text"], asked.vectors["image"]),
                    "entities": _entity_recalls(experiment, opened, asked),
                }
                bar.update()
            metrics["search"] = _search(experiment, opened, list(questions.values()))
            bar.update()
            write_atomic(draft.folder / METRICS, json.dumps(metrics, indent=2) + "\n")
        artifact = workdir.require(recipe, "rac3 evaluate")
    return json.loads((artifact.folder / METRICS).read_text())


@dataclass(frozen=True)
class Questions:
    """The first documents of a held-out split, and the vectors of what they ask with; zeros where they lack a part."""

    documents: Sequence[Document]
    vectors: Mapping[str, Float[np.ndarray, "documents embed"]]  # text, image, and their mixture

    @classmethod
    def open(cls, experiment: Experiment, workdir: Workdir, split: Split) -> "Questions":
        store = open_documents(experiment, workdir, split)
        items = store.many(range(min(len(store), experiment.evaluation.documents)))
        text, image = (open_queries(experiment, workdir, split, part)[: len(items)] for part in PARTS)
        both = mix(text, image, np.asarray(text.any(1)), np.asarray(image.any(1)))
        return cls([item.document for item in items], {"text": text, "image": image, "both": both})


def clip_metrics(
    documents: Sequence[Document],
    text: Float[np.ndarray, "documents embed"],
    image: Float[np.ndarray, "documents embed"],
) -> dict[str, int | float]:
    """Recall at 1, 5 and 10, among the documents that have a text and an image, of the other half of each, and of the
    mixture that the memory holds of it (what the paper's appendix C.1 measures, for any source of pairs).

    `pairs` alone if no document has both.
    """
    rows = np.flatnonzero(text.any(1) & image.any(1)).tolist()
    metrics: dict[str, int | float] = {"pairs": len(rows)}
    if not rows:
        return metrics
    contents = [documents[row].text for row in rows], [documents[row].images[0].data for row in rows]
    captions, pictures = (np.unique(np.array(each, object), return_inverse=True)[1] for each in contents)
    text, image = text[rows], image[rows]
    has = np.ones(len(rows), bool)
    both = mix(text, image, has, has)
    for name, queries, answers in (
        ("text_to_image", text, image),
        ("image_to_text", image, text),
        ("text_to_document", text, both),
        ("image_to_document", image, both),
    ):
        recalls = pair_recall(KS, queries, answers, captions, pictures)
        metrics |= {f"{name}_recall_at_{k}": share for k, share in recalls.items()}
    return metrics


def entity_recall(experiment: Experiment, workdir: Workdir, split: Split, k: int) -> dict[str, float] | None:
    """By query part: the share of the queries with a document of their entity among the first k selected neighbors."""
    field = experiment.data.entity_field
    if not field or not recipes.retrieves(experiment) or split not in experiment.data.sources():
        return None
    memory = [
        entity
        for part in recipes.memory_splits(experiment, split)
        for entity in _entities(open_documents(experiment, workdir, part), field)
    ]
    queries = _entities(open_documents(experiment, workdir, split), field)
    neighbors = read_neighbors(experiment, workdir, split)[:]
    return {part: recall_at(k, neighbors[:, number], queries, memory) for number, part in enumerate(PARTS)}


def _entities(documents: DocumentStore, field: str) -> list[str]:
    return [_entity(item.document, field) for item in documents.many(range(len(documents)))]


def _entity(document: Document, field: str) -> str:
    return str(document.metadata.get(field, ""))


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
            found = {i: _entity(opened.document(i).document, field) for i in np.unique(ids[ids >= 0]).tolist()}
            wanted = [_entity(asked.documents[row], field) for row in rows]
            recalls[kind] = {str(k): recall_at(k, ids, wanted, found) for k in KS}
    return recalls


def _queries(asked: Questions, kind: str, rows: list[int]) -> Queries:
    documents = [asked.documents[row] for row in rows]
    texts = [document.text if kind != "image" else "" for document in documents]
    return Queries([document.key for document in documents], asked.vectors[kind][rows], texts)


def _selection(experiment: Experiment, workdir: Workdir, split: Split) -> dict[str, Any]:
    """What selection did with the candidates of a split, and the similarities of what it kept."""
    counts = workdir.require(recipes.neighbors(experiment, split), "rac3 retrieve").manifest["counts"]
    dropped = {rule: counts[f"dropped_{rule}"] for rule in Dropped._fields}
    considered = counts["neighbors"] + sum(dropped.values())
    ids, scores = (read_neighbors(experiment, workdir, split, name)[:COUNTED] for name in ("ids", "scores"))
    histograms = {}
    for number, part in enumerate(PARTS):
        kept, similarity = (each[:, number :: len(PARTS)] for each in (ids >= 0, scores))
        histograms[part] = {"first": _histogram(similarity[..., 0][kept[..., 0]]), "kept": _histogram(similarity[kept])}
    return {
        "queries": counts["queries"],
        "queries_without_neighbors": counts["queries_without_neighbors"],
        "neighbors_per_query": counts["neighbors"] / max(1, counts["queries"]),
        "dropped": {rule: count / max(1, considered) for rule, count in dropped.items()},
        "similarities": histograms,
    }


def _histogram(values: Float[np.ndarray, " n"]) -> list[float]:
    """Shares of the values in `BINS`."""
    return (np.histogram(values, BINS)[0] / max(1, len(values))).tolist()


def _search(experiment: Experiment, opened: OpenMemory, questions: Sequence[Questions]) -> dict[str, Any]:
    """Recall against exact search and queries per second: as configured, and with more and less effort."""
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
    indexes = [retriever.open(*each) for each in zip(opened.memory.parts, opened.folders, strict=True)]
    scores, ids = search_memory(indexes, opened.memory, queries, k)
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        search_memory(indexes, opened.memory, queries, k)
        seconds.append(time.perf_counter() - started)
    return scores, ids, min(seconds)
