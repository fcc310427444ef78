"""The vectors that are embedded, and the neighbors that are found with them, against plain NumPy over the documents."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from handmade import ASKED as EMBEDDED
from handmade import document, experiment_of, unit, vector, workdir_of

from rac3 import recipes
from rac3.clip.encoder import query_dropout_keys
from rac3.config import InputError
from rac3.documents.document import Document
from rac3.experiment import Experiment, Split
from rac3.retrieval.faiss import Faiss
from rac3.retrieval.fixed import Fixed
from rac3.retrieval.memory import MemoryPart
from rac3.retrieval.retriever import Queries, ranked
from rac3.retrieval.scann import Scann
from rac3.retrieval.selection import Selection
from rac3.run import Run
from rac3.stages.embed import embed
from rac3.stages.ingest import ingest
from rac3.stages.retrieve import index, retrieve, shortage_line

PARTS = ("text", "image")
RATE = 0.3
SHARD = 5  # documents: the train split has three shards of vectors and neighbors
LIMIT = 0.5

TRAIN = [
    [
        document("t0", "a red fox", b"fox"),
        document("t1", "a blue bird", b"bird"),
        document("t2", "words alone"),
        document("t3", b"alone"),
        document("t4", "A  RED fox ", b"other fox"),  # the words of t0
        document("t5", "the bird again", b"bird"),  # the image of t1
        document("t6", b"first", "two pictures", b"second", "and an end"),
    ],
    [document(f"t{number}", f"number {number}", b"%d" % number) for number in range(7, 13)],
]
SPLITS = {
    "train": TRAIN,
    "memory": [[document(f"m{number}", f"of memory {number}", b"m%d" % number) for number in range(6)]],
    "news": [[document("n0", "news", b"n0"), document("t1", "t1 of the news", b"n1"), document("n2", "more", b"n2")]],
    "validation": [[document("v0", "a red fox", b"v0"), document("v1", b"v1")]],
    "test": [[document(f"q{number}", f"question {number}", b"q%d" % number) for number in range(6)]],
}
DOCUMENTS = {name: [each for shard in shards for each in shard] for name, shards in SPLITS.items()}


@dataclass(frozen=True)
class Ranked:
    """A retriever of a user's own: all inner products, sorted. It notes what it was asked."""

    num_neighbors: int = 9

    def build(self, part: MemoryPart, folder: Path) -> None:
        (folder / "built").write_text(part.name)

    def open(self, part: MemoryPart, folder: Path) -> "RankedIndex":
        assert (folder / "built").read_text() == part.name
        return RankedIndex(part)


@dataclass(frozen=True)
class RankedIndex:
    part: MemoryPart

    def search(self, queries: Queries, k: int) -> tuple[np.ndarray, np.ndarray]:
        ASKED.append((self.part.name, k, queries))
        products = queries.embeddings @ self.part.read(slice(0, len(self.part))).T
        rows = np.tile(np.arange(len(self.part)), (len(queries), 1))
        missing = ((0, 0), (0, max(0, k - len(self.part))))
        return ranked(np.pad(products, missing, constant_values=-np.inf), np.pad(rows, missing, constant_values=-1), k)


ASKED: list[tuple[str, int, Queries]] = []


class Made(NamedTuple):
    run: Run
    embedded: list[tuple[str | bytes, tuple[int, ...], float]]  # content, key and rate: all that CLIP was asked

    @property
    def experiment(self) -> Experiment:
        return self.run.experiment

    def changed(self, **fields: Any) -> Run:
        """A run of another experiment in this workdir."""
        return Run(replace(self.experiment, **fields), self.run.workdir)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """All of the offline stages, with shards of five documents and two views of each training query."""
    folder = tmp_path_factory.mktemp("retrieve")
    takedowns = folder / "takedowns"
    takedowns.write_text("t8\n news:t1 \n\nmemory:m3\ntrain:m4\n")
    experiment = experiment_of(
        SPLITS,
        retriever=Ranked(),
        selection=Selection(max_similarity=LIMIT, depth=4),
        documents_per_shard=SHARD,
        query_dropout=RATE,
        num_views=2,
        takedowns=str(takedowns),
        takedowns_missing_ok=True,
        max_reject_fraction=0.0,
    )
    run = Run(experiment, workdir_of(experiment, folder / "workdir"))
    EMBEDDED.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rac3.stages.embed.DOCUMENTS_AT_ONCE", 2)
        for stage in (ingest, embed, index, retrieve):
            stage(run)
    return Made(run, EMBEDDED.copy())


def key_of(experiment: Experiment, document: Document, view: int) -> list[int]:
    return jax.random.key_data(query_dropout_keys(experiment.seed, [document.key], view))[0].tolist()


def part_of(document: Document, part: str) -> str | bytes | None:
    if part == "text":
        return document.text or None
    return document.images[0].data if document.images else None


def document_vectors(documents: Sequence[Document]) -> np.ndarray:
    """Equation 1: the mean of the parts, each of norm 1, scaled to norm 1."""
    parts = [[vector(content) for part in PARTS if (content := part_of(each, part))] for each in documents]
    return unit(np.stack([np.mean(each, axis=0) for each in parts]))


def query_vectors(made: Made, split: Split, name: str) -> np.ndarray:
    """Of one part alone; in training with the dropout of the view."""
    part, _, view = name.partition("-")
    rows = []
    for each in DOCUMENTS[split]:
        content = part_of(each, part)
        dropout = (key_of(made.experiment, each, int(view or 0)), RATE) if split == "train" else ()
        rows.append(np.zeros(8, np.float32) if content is None else vector(content, *dropout))
    return np.stack(rows)


NAMES = {"train": ["text", "image", "text-1", "image-1"], "validation": ["text", "image"], "test": ["text", "image"]}


@pytest.mark.parametrize("split", ["train", "memory", "news"])
def test_a_document_has_the_vector_of_all_its_parts(split: Split, made: Made):
    np.testing.assert_allclose(made.run.embeddings(split)[:], document_vectors(DOCUMENTS[split]), atol=1e-6)


@pytest.mark.parametrize("split", NAMES)
def test_a_query_has_the_vector_of_one_part_alone(split: Split, made: Made):
    """Zeros where a document lacks it. Of two images the first asks, and all of the texts; in training with dropout."""
    for name in NAMES[split]:
        stored = made.run.queries(split, name)[:]
        np.testing.assert_allclose(stored, query_vectors(made, split, name), atol=1e-6, err_msg=name)


def test_each_document_and_view_has_its_own_dropout(made: Made):
    dropped = {(content, key) for content, key, _ in made.embedded if key}
    assert len({key for _, key in dropped}) == 2 * len(DOCUMENTS["train"])  # views; both parts of a document share it
    assert {rate for _, key, rate in made.embedded if key} == {RATE}
    other = query_dropout_keys(made.experiment.seed + 1, [each.key for each in DOCUMENTS["train"]])
    assert not {tuple(key) for key in np.asarray(jax.random.key_data(other)).tolist()} & {key for _, key in dropped}


def test_held_out_documents_and_parts_of_the_memory_are_embedded_without_dropout(made: Made):
    plain = {content for content, key, _ in made.embedded if not key}
    everything = {
        content
        for split in DOCUMENTS
        for each in DOCUMENTS[split]
        for part in PARTS
        if (content := part_of(each, part))
    }
    assert plain == everything  # those of train too, as documents


def neighbors_by_hand(made: Made, split: Split, row: int, query: np.ndarray) -> tuple[list[int], list[float]]:
    """Section 3.2 for one query, over lists."""
    parts = ["train"] if split == "train" else ["train", "memory", "news"]
    memory = [each for part in parts for each in DOCUMENTS[part]]
    gone = {"t8"} | ({"m3"} if split != "train" else set())
    vectors = document_vectors(memory)
    main = DOCUMENTS["train"][row] if split == "train" else None
    taken: list[int] = []
    for i in np.argsort(-(vectors @ query), kind="stable")[: made.experiment.retriever.num_neighbors].tolist():
        each = memory[i]
        if each.key in gone or (split != "train" and i == len(DOCUMENTS["train"]) + 6 + 1):  # t1 of the news
            continue
        if main is not None:
            words = [" ".join(text.split()).lower() for text in (main.text, each.text)]
            pictures = [document.images[:1] for document in (main, each)]
            if each is main or (words[0] and words[0] == words[1]) or (pictures[0] and pictures[0] == pictures[1]):
                continue
            if vectors[i] @ vectors[row] > LIMIT:
                continue
        if vectors[i] @ query > LIMIT or any(vectors[i] @ vectors[j] > LIMIT for j in taken):
            continue
        taken.append(i)
    taken = taken[:4]
    return taken, [float(vectors[i] @ query) for i in taken]


@pytest.mark.parametrize("split", NAMES)
def test_each_query_has_the_neighbors_of_a_walk_by_hand(split: Split, made: Made):
    """Over three shards of training documents, each of which knows the global ids of its own."""
    ids = made.run.neighbors(split)[:]
    scores = made.run.neighbors(split, "scores")[:]
    assert ids.shape == scores.shape == (len(DOCUMENTS[split]), len(NAMES[split]), 4)
    kept = nothing = 0
    for number, name in enumerate(NAMES[split]):
        queries = query_vectors(made, split, name)
        for row, query in enumerate(queries):
            wanted, products = neighbors_by_hand(made, split, row, query) if query.any() else ([], [])
            assert ids[row, number].tolist() == wanted + [-1] * (4 - len(wanted)), (split, name, row)
            np.testing.assert_allclose(scores[row, number, : len(wanted)], products, atol=1e-6)
            kept, nothing = kept + len(wanted), nothing + (query.any() and not wanted)
    counts = made.run.artifact(recipes.neighbors, split).manifest["counts"]
    asked = sum(query_vectors(made, split, name).any(1).sum() for name in NAMES[split])
    assert (counts["documents"], counts["queries"], counts["neighbors"]) == (len(ids), asked, kept)
    assert counts["queries_without_neighbors"] == nothing


def test_a_training_document_never_retrieves_itself_or_its_copies_in_any_shard(made: Made):
    """Whatever the similarity allows: the walk above drops it by that too."""
    loose = made.changed(selection=Selection(max_similarity=1.0, depth=4))
    retrieve(loose, ["train"])
    assert loose.workdir.find(loose.recipe(recipes.neighbors, "test")) is None  # which was not asked for
    ids = loose.neighbors("train")[:]
    assert not (ids == np.arange(len(ids))[:, None, None]).any()
    assert not set(ids[0].ravel().tolist() + ids[4].ravel().tolist()) & {0, 4}
    assert not set(ids[1].ravel().tolist() + ids[5].ravel().tolist()) & {1, 5}
    counts = loose.artifact(recipes.neighbors, "train").manifest["counts"]
    assert counts["dropped_main_document"] > 20  # of 48 queries, one in most
    assert counts["dropped_duplicate"] > 0
    assert counts["dropped_similar_to_main"] == counts["dropped_similar_to_query"] == counts["dropped_redundant"] == 0


def test_a_retriever_sees_of_a_query_what_asks_and_nothing_else(made: Made):
    """Its key, its vector, and the words of a text; never the words that stand beside an image."""
    ASKED.clear()
    again = made.changed(retriever=Ranked(num_neighbors=7))
    index(again)
    retrieve(again)
    texts = {split: {each.key: each.text for each in DOCUMENTS[split]} for split in NAMES}
    parts = {"train": {"train"}, "validation": {"train", "memory", "news"}, "test": {"train", "memory", "news"}}
    searched: dict[str, set[str]] = {split: set() for split in NAMES}
    for part, k, queries in ASKED:
        assert k == 7
        (split,) = [split for split in NAMES if set(queries.keys) <= set(texts[split])]
        searched[split].add(part)
        for key, words, asks in zip(queries.keys, queries.texts, queries.embeddings, strict=True):
            each = next(document for document in DOCUMENTS[split] if document.key == key)
            content = part_of(each, "text" if words else "image")
            assert words in ("", texts[split][key])
            dropped = [(key_of(again.experiment, each, view), RATE) for view in range(2)] if split == "train" else [()]
            assert min(np.abs(asks - vector(content, *dropout)).max() for dropout in dropped) < 1e-6
    assert searched == parts


def test_a_view_is_another_query_with_neighbors_of_its_own(made: Made):
    ids = made.run.neighbors("train")[:]
    assert (ids[:, 0] != ids[:, 2]).any()
    assert (ids[:, 1] != ids[:, 3]).any()


@pytest.mark.parametrize(("split", "gone"), [("train", [8]), ("memory", [3]), ("news", [1])])
def test_a_takedown_of_one_split_leaves_the_others(split: Split, gone: list[int], made: Made):
    """`t8` is of any split, `news:t1` leaves t1 of train, and `train:m4` names nothing."""
    assert made.run.withdrawn_rows(split).tolist() == gone


def test_two_keys_of_one_hash_are_told_apart(made: Made, monkeypatch: pytest.MonkeyPatch):
    store = made.run.documents("train")
    column = type(store).column
    monkeypatch.setattr(
        type(store), "column", lambda self, name: np.repeat(column(self, name)[8:9], 13) if "key" in name else ...
    )
    assert made.run.withdrawn_rows("train").tolist() == [8]


def test_a_document_is_found_by_its_global_id(made: Made):
    opened = made.run.memory()
    everything = [*DOCUMENTS["train"], *DOCUMENTS["memory"], *DOCUMENTS["news"]]
    assert [opened.document(number).document for number in range(len(opened.memory))] == everything


def test_documents_that_a_person_names_are_never_redundant(made: Made):
    """But a document of training is not its own neighbor, nor is one that is withdrawn."""
    fixed = made.changed(retriever=Fixed(("t4", "train:t1", "m3", "n2")), selection=Selection(0.01, 4))
    index(fixed)
    retrieve(fixed, ["test"])
    assert (fixed.neighbors("test")[:] == [4, 1, 13 + 6 + 2, -1]).all()
    unknown = made.changed(retriever=Fixed(("nobody",)), selection=Selection(0.01, 4))
    index(unknown)
    with pytest.raises(InputError, match="has the key 'nobody'"):
        retrieve(unknown, ["test"])


def test_what_is_short_is_said_with_what_to_raise(made: Made, monkeypatch: pytest.MonkeyPatch):
    """Counted from the neighbors on disk, of queries for at most four each."""
    lacking = {"train": 0, "test": 0, "validation": 0}
    for split in lacking:
        ids = made.run.neighbors(split)[:]
        arrays = made.run.query_arrays(split)
        asks = np.stack([made.run.queries(split, name)[:].any(1) for name in arrays], axis=1)
        kept = (ids >= 0).sum(2)
        line = shortage_line(made.run, split)
        lacking[split] = 4 * int(asks.sum()) - int(kept.sum())
        expected = (
            f"{split}: {kept.sum()} of {4 * asks.sum()} neighbors, {(asks & (kept == 0)).sum()} of {asks.sum()} queries"
        )
        assert line.startswith(expected) if lacking[split] else line == ""
        if line:
            assert "raise retriever.num_neighbors=9 or selection.max_similarity=" in line
    assert max(lacking.values()) > 0
    monkeypatch.setattr(Ranked, "effort", lambda self, documents: f"retriever.leaves={documents}", raising=False)
    short = next(split for split, count in lacking.items() if count)
    assert "raise retriever.leaves=13 or retriever.num_neighbors=9" in shortage_line(made.run, short)


def test_the_setting_that_finds_more():
    assert Faiss(factory="IVF16,Flat").effort(1000) == "retriever.search='nprobe=1'"
    assert Faiss(factory="IVF16,Flat", search="nprobe=4").effort(1000) == "retriever.search='nprobe=4'"
    assert Faiss(factory="Flat").effort(1000) == ""
    assert Scann().effort(1000) == ""  # which are searched one by one
    assert Scann(num_leaves=40).effort(1000) == "retriever.num_leaves_to_search=2"
