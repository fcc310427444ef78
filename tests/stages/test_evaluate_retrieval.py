"""The evaluation of retrieval, recomputed: recalls from stored vectors, what selection kept, what a search misses."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from rac3 import recipes
from rac3.artifacts.arrays import Vectors, create_array, read_array, write_shard
from rac3.artifacts.workdir import Workdir
from rac3.documents.document import Document, Image, Text
from rac3.experiment import Experiment
from rac3.retrieval.baselines import NoRetriever
from rac3.retrieval.memory import MemoryPart
from rac3.retrieval.open_memory import IndexedPart, OpenMemory
from rac3.retrieval.retriever import Queries, Retriever, Tunable, no_candidates
from rac3.retrieval.selection import Dropped
from rac3.run import Run
from rac3.stages import evaluate_retrieval as stage
from rac3.stages.evaluate_retrieval import (
    Questions,
    _entity_recalls,
    _queries,
    _search,
    _selection,
    _timed,
    entity_recall,
    evaluate_retrieval,
)


@pytest.fixture(scope="module")
def run(experiment: Experiment, store: Workdir) -> Run:
    return Run(experiment, store)


@pytest.fixture(scope="module")
def opened(run: Run) -> OpenMemory:
    return run.memory()


@pytest.fixture(scope="module")
def vectors(experiment: Experiment, store: Workdir) -> np.ndarray:
    """Of the documents of the memory, as they are stored."""
    folders = [store.require(recipes.embeddings(experiment, split)).folder for split in ("train", "memory")]
    return np.concatenate([Vectors(folder / "document")[:] for folder in folders])


def entities(run: Run, *splits: str) -> list[str]:
    parts = [run.documents(split) for split in splits]
    return [str(item.document.metadata["entity"]) for part in parts for item in part.many(range(len(part)))]


def query_vectors(experiment: Experiment, store: Workdir, split: str, part: str) -> np.ndarray:
    return Vectors(store.require(recipes.queries(experiment, split)).folder / part)[:]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_entity_recall_is_that_of_the_selected_neighbors(run: Run, split: str):
    remembered, asked = entities(run, "train", "memory"), entities(run, split)
    ids = read_array(run.workdir.require(recipes.neighbors(run.experiment, split)).folder / "ids")
    assert len(asked) == {"validation": 12, "test": 4}[split]
    shares = []
    for k in range(1, 9):
        found = entity_recall(run, split, k)
        for number, part in enumerate(("text", "image")):
            hits = [
                wanted in [remembered[i] for i in row[number, :k] if i >= 0]
                for wanted, row in zip(asked, ids, strict=True)
            ]
            assert found[part] == sum(hits) / len(hits)
            shares.append(found[part])
    assert len(set(shares)) > 2


def test_entity_recall_without_meaning_is_none(experiment: Experiment, store: Workdir):
    for other in (
        replace(experiment, retriever=NoRetriever()),
        replace(experiment, data=replace(experiment.data, test=None)),
        replace(experiment, data=replace(experiment.data, entity_field="")),
        replace(experiment, data=replace(experiment.data, entity_field="concept")),  # two missing names are not equal
    ):
        assert entity_recall(Run(other, store), "test", 1) is None


def test_recall_before_selection_is_that_of_a_plain_ranking(
    experiment: Experiment, run: Run, opened: OpenMemory, vectors: np.ndarray
):
    """By text, by image, and by both; a document that lacks a part does not ask with it."""
    whole = Questions.open(run, "validation")
    text = whole.vectors["text"].copy()
    text[1] = 0
    asked = Questions(whole.documents, {**whole.vectors, "text": text})
    remembered = entities(run, "train", "memory")
    found = _entity_recalls(experiment, opened, asked)
    assert list(found) == ["text", "image", "both"]
    shares = set()
    for kind, queries in asked.vectors.items():
        for k in (1, 5, 10):
            hits = [
                str(document.metadata["entity"]) in [remembered[i] for i in np.argsort(-(vectors @ query))[:k]]
                for document, query in zip(asked.documents, queries, strict=True)
                if query.any()
            ]
            assert len(hits) == (3 if kind == "text" else 4)
            assert found[kind][str(k)] == np.mean(hits)
            shares.add(found[kind][str(k)])
    assert len(shares) > 1
    unnamed = replace(experiment, data=replace(experiment.data, entity_field=""))
    assert _entity_recalls(unnamed, opened, asked) == {}
    nothing = Questions(asked.documents, {**asked.vectors, "image": np.zeros_like(text)})
    assert list(_entity_recalls(experiment, opened, nothing)) == ["text", "both"]


def test_questions_are_the_first_documents_with_the_vectors_of_each(experiment: Experiment, store: Workdir):
    few = replace(experiment, evaluation=replace(experiment.evaluation, documents=3))
    asked = Questions.open(Run(few, store), "validation")
    assert [document.key for document in asked.documents] == [f"validation/{number:06d}" for number in range(3)]
    text, image = (query_vectors(experiment, store, "validation", part)[:3] for part in ("text", "image"))
    both = (text + image) / 2
    np.testing.assert_array_equal(asked.vectors["text"], text)
    np.testing.assert_array_equal(asked.vectors["image"], image)
    both /= np.linalg.norm(both, axis=1, keepdims=True)
    np.testing.assert_allclose(asked.vectors["both"], both, atol=1e-6)


def test_a_query_that_is_an_image_brings_no_words():
    segments = ((Text("a fox"), Image(b"1")), (Text("an owl"), Image(b"2")), (Text("an elk"), Image(b"3")))
    documents = [Document(f"k{number}", parts, {}) for number, parts in enumerate(segments)]
    vectors = {name: np.random.default_rng(n).normal(size=(3, 4)) for n, name in enumerate(("text", "image", "both"))}
    asked = Questions(documents, vectors)
    for kind, texts in (("text", ["an elk", "a fox"]), ("both", ["an elk", "a fox"]), ("image", ["", ""])):
        queries = _queries(asked, kind, [2, 0])
        assert (queries.keys, queries.texts) == (["k2", "k0"], texts)
        np.testing.assert_array_equal(queries.embeddings, vectors[kind][[2, 0]])


def test_what_selection_kept_is_counted(experiment: Experiment, tmp_path: Path):
    """Neighbors of two documents, made by hand: two views, each of a text and an image query, and two places deep."""
    two_views = replace(experiment, num_views=2)
    ids = np.array([[[7, -1], [3, 4], [5, 6], [-1, -1]], [[1, 2], [-1, -1], [-1, -1], [8, 9]]])
    scores = np.array([[[0.11, 0], [0.51, 0.31], [0.13, 0.91], [0, 0]], [[0.11, -0.71], [0, 0], [0, 0], [0.99, 0.33]]])
    workdir = Workdir(tmp_path / "new", "tiny")
    with workdir.write(recipes.neighbors(two_views, "train")) as draft:
        for name, values in (("ids", ids), ("scores", scores.astype(np.float32))):
            write_shard(create_array(draft.folder / name, (2, 4, 2), str(values.dtype), 2), 0, values)
        draft.counts.update(queries=8, neighbors=9, queries_without_neighbors=3)
        draft.counts.update({f"dropped_{rule}": number for number, rule in enumerate(Dropped._fields, 1)})
    found = _selection(Run(two_views, workdir), "train")
    assert (found["queries"], found["queries_without_neighbors"]) == (8, 3)
    assert found["neighbors_per_query"] == 9 / 8
    assert found["dropped"] == {rule: number / 30 for number, rule in enumerate(Dropped._fields, 1)}  # 9 + 1 + ... + 6

    def histogram(values: list[float]) -> list[float]:
        """Of a hundred bins of 0.02 from -1 to 1."""
        shares = [0.0] * 100
        for value in values:
            shares[int((value + 1) / 0.02)] += 1 / len(values)
        return shares

    text, image = (found["similarities"][part] for part in ("text", "image"))
    assert text["first"] == pytest.approx(histogram([0.11, 0.13, 0.11]))
    assert text["kept"] == pytest.approx(histogram([0.11, 0.13, 0.91, 0.11, -0.71]))
    assert image["first"] == pytest.approx(histogram([0.51, 0.99]))
    assert image["kept"] == pytest.approx(histogram([0.51, 0.31, 0.99, 0.33]))


@dataclass(frozen=True)
class Lazy:
    """Exact search, but every `wrong`-th query gets the last documents instead of the first; 0 for none."""

    wrong: int = 0
    num_neighbors: int = 4

    def build(self, part: MemoryPart, folder: Path) -> None:
        """Writes nothing."""

    def open(self, part: MemoryPart, folder: Path) -> "LazyIndex":
        return LazyIndex(self.wrong, np.asarray(part.embeddings[:]))

    def efforts(self, documents: int) -> Mapping[str, Retriever]:
        return {f"none of {documents}": Lazy(1), "half": Lazy(2), "all": Lazy()}


@dataclass(frozen=True, eq=False)
class LazyIndex:
    wrong: int
    vectors: np.ndarray

    def search(self, queries: Queries, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores = queries.embeddings @ self.vectors.T
        order = np.argsort(-scores, axis=1)
        if self.wrong:
            order[:: self.wrong] = order[:: self.wrong, ::-1]
        rows = order[:, :k]
        found = np.take_along_axis(scores, rows, 1)
        down = np.argsort(-found, axis=1)  # best first, as a retriever must give them
        return np.take_along_axis(found, down, 1).astype(np.float32), np.take_along_axis(rows, down, 1)


def test_search_is_judged_by_the_exact_neighbors(experiment: Experiment, run: Run, opened: OpenMemory):
    """Of the queries of all splits and parts, those that have the part; by each effort that the retriever offers."""
    lazy = replace(experiment, retriever=Lazy(4))
    assert isinstance(lazy.retriever, Tunable)
    questions = [Questions.open(run, split) for split in ("validation", "test")]
    image = questions[1].vectors["image"].copy()
    image[0] = 0
    questions[1] = Questions(questions[1].documents, {**questions[1].vectors, "image": image})
    found = _search(lazy, opened, questions)
    assert (found["retriever"], found["memory"], found["queries"], found["k"]) == ("Lazy", 48, 15, 10)
    recalls = {point["effort"]: point["recall"] for point in found["points"]}
    assert list(recalls) == ["as configured", "none of 36", "half", "all"]
    assert recalls["all"] == 1
    asked = np.concatenate(
        [each.vectors[part][each.vectors[part].any(1)] for each in questions for part in ("text", "image")]
    )
    parts = [np.asarray(part.embeddings[:]) for part in opened.memory.parts]
    for name, wrong in (("as configured", 4), ("none of 36", 1), ("half", 2)):
        hits = []
        for number, query in enumerate(asked):
            best = set(np.argsort(-(np.concatenate(parts) @ query))[:10].tolist())
            rows = []
            for offset, part in zip((0, 36), parts, strict=True):
                order = np.argsort(-(part @ query))
                rows += [(offset + i, part[i] @ query) for i in (order[::-1] if number % wrong == 0 else order)[:10]]
            given = [i for i, _ in sorted(rows, key=lambda pair: -pair[1])[:10]]
            hits.append(len(best & set(given)) / 10)
        assert recalls[name] == pytest.approx(np.mean(hits))
        assert recalls[name] < 1


class Bare(IndexedPart):
    """A part of these vectors, without documents."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.part, self.folder = MemoryPart("train", vectors, [""] * len(vectors)), Path()


@dataclass(frozen=True)
class Blind:
    """Finds the best document of the first query, and nothing else."""

    num_neighbors: int = 3

    def build(self, part: MemoryPart, folder: Path) -> None:
        """Writes nothing."""

    def open(self, part: MemoryPart, folder: Path) -> "Blind":
        return self

    def search(self, queries: Queries, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores, rows = no_candidates(len(queries), k)
        rows[0, 0], scores[0, 0] = 0, -0.1
        return scores, rows


def test_no_document_is_no_neighbor_and_the_last_neighbor_is_one(experiment: Experiment):
    """All inner products are below 0, which is that with no document: -0.1, -0.5 and -0.9 for the first query."""
    vectors = np.array([[-0.1, -0.9], [-0.5, -0.4], [-0.9, -0.1]], np.float32)
    documents = [Document(key, (Text("x"),), {}) for key in "ab"]
    text, image = np.array([[1, 0], [0, 1]], np.float32), np.array([[0, 0], [0, 0]], np.float32)
    asked = Questions(documents, {"text": text, "image": image, "both": text})
    for retriever, recall in ((Blind(), 1 / 6), (Lazy(), 1)):
        opened = OpenMemory([Bare(vectors)], retriever, experiment.selection)
        found = _search(replace(experiment, retriever=retriever), opened, [asked])
        assert found["points"][0]["recall"] == pytest.approx(recall)
        assert (found["k"], found["queries"]) == (3, 2)


def test_the_fastest_search_counts(opened: OpenMemory, monkeypatch: pytest.MonkeyPatch):
    clock = itertools.accumulate([0.0, 5.0, 0.0, 2.0, 0.0, 3.0])  # three searches, of 5, 2 and 3 seconds
    monkeypatch.setattr(stage.time, "perf_counter", lambda: next(clock))
    vectors = np.eye(3, opened.memory.embed_dim, dtype=np.float32)
    scores, ids, seconds = _timed(opened, Lazy(), Queries(["a", "b", "c"], vectors, ["", "", ""]), 2)
    assert seconds == 2
    assert scores.shape == ids.shape == (3, 2)


def test_each_held_out_split_is_judged_by_its_own_vectors(
    experiment: Experiment, workdir: Path, monkeypatch: pytest.MonkeyPatch
):
    store = Workdir(workdir, "tiny")
    monkeypatch.setattr(stage, "_search", lambda *_: {"points": []})
    metrics = evaluate_retrieval(Run(experiment, store))
    assert list(metrics["splits"]) == ["validation", "tuning", "test"]
    assert list(metrics["selection"]) == ["train", "validation", "tuning", "test"]
    for split in ("validation", "test"):
        values = metrics["splits"][split]
        text, image = (query_vectors(experiment, store, split, part)[:4] for part in ("text", "image"))
        assert (values["documents"], values["pairs"]["pairs"]) == (4, 4)
        ranks = (text @ image.T > np.diag(text @ image.T)[:, None]).sum(1)
        assert values["pairs"]["text_to_image_recall_at_1"] == np.mean(ranks < 1)
        ranks = (image @ text.T > np.diag(text @ image.T)[:, None]).sum(1)
        assert values["pairs"]["image_to_text_recall_at_1"] == np.mean(ranks < 1)
    counts = store.require(recipes.neighbors(experiment, "test")).manifest["counts"]
    assert metrics["selection"]["test"]["neighbors_per_query"] == counts["neighbors"] / 8
    monkeypatch.setattr(stage, "Questions", None)
    assert evaluate_retrieval(Run(experiment, store)) == metrics  # read, not made again
