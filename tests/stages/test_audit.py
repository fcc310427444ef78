"""Each leak by itself, planted in what the stages have made: the audit names that one and no other."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tensorstore
from handmade import WIDTH, PlainEncoder, document, experiment_of, workdir_of

from rac3 import recipes
from rac3.artifacts.arrays import read_array
from rac3.artifacts.workdir import MANIFEST, Workdir
from rac3.config import InputError
from rac3.documents.store import NARROW, TokenizedDocument, write_id_starts, write_shard
from rac3.experiment import Experiment
from rac3.retrieval.baselines import NoRetriever
from rac3.retrieval.fixed import Fixed
from rac3.retrieval.scann import Scann
from rac3.retrieval.selection import Selection
from rac3.run import Run
from rac3.stages.audit import audit
from rac3.stages.embed import embed
from rac3.stages.ingest import ingest
from rac3.stages.retrieve import index, retrieve

TRAIN, MEMORY, HELD_OUT = 12, 4, 7
SPLITS = {
    "train": [[document(f"t{number}", f"train {number}", b"t%d" % number) for number in range(TRAIN)]],
    "memory": [[document(f"m{number}", f"memory {number}", b"m%d" % number) for number in range(MEMORY)]],
    "validation": [[document(f"v{number}", f"validation {number}", b"v%d" % number) for number in range(HELD_OUT)]],
    "test": [[document(f"q{number}", f"question {number}", b"q%d" % number) for number in range(HELD_OUT)]],
}
LAST = 7  # of the neighbors kept: too deep for training to draw it


class Made(NamedTuple):
    experiment: Experiment
    workdir: Workdir

    @property
    def run(self) -> Run:
        """Opened again each time: artifacts change in place."""
        return Run(self.experiment, self.workdir)

    def folder(self, kind: str, split: str) -> Path:
        return self.workdir.require(getattr(recipes, kind)(self.experiment, split)).folder

    def neighbors_for(self, other: Experiment) -> None:
        """Passes the neighbors off as those of another experiment."""
        for split in ("train", "validation", "test"):
            folder, recipe = self.folder("neighbors", split), recipes.neighbors(other, split)
            copy = shutil.copytree(folder, folder.with_name(recipe.fingerprint))
            manifest = json.loads((copy / MANIFEST).read_text()) | {"fingerprint": recipe.fingerprint}
            del manifest["checksum"]
            (copy / MANIFEST).write_text(json.dumps(manifest))

    def rewrite(self, kind: str, split: str, array: str, change: Callable[[np.ndarray], object]) -> None:
        """Changes an array of an artifact in place, which then has no record of its files: it would not be read."""
        path = self.folder(kind, split) / array
        manifest = json.loads((path.parent / MANIFEST).read_text())
        kept = {name: value for name, value in manifest.items() if name not in ("files", "checksum")}
        (path.parent / MANIFEST).write_text(json.dumps(kept))
        if path.with_suffix(".npy").is_file():
            values = np.load(path.with_suffix(".npy"))
            change(values)
            np.save(path.with_suffix(".npy"), values)
            return
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}, "open": True}
        values = read_array(path).copy()
        change(values)
        tensorstore.open(spec).result().write(values).result()

    def neighbor(self, split: str, row: int, query: int, place: int, value: int) -> None:
        def change(ids: np.ndarray) -> None:
            ids[row, query, place] = value

        self.rewrite("neighbors", split, "ids", change)

    def leaks(self, experiment: Experiment | None = None) -> tuple[dict[str, int], list[str]]:
        """What the audit finds, each kind of leak with its number, and by name. Its file says the same as its error."""
        with pytest.raises(InputError, match=r"^leaks: ") as error:
            audit(Run(experiment or self.experiment, self.workdir))
        found = json.loads((self.workdir.path / "report" / "audit.json").read_text())
        assert all(f"{count} x {what}" in str(error.value) for what, count in found["leaks"].items())
        assert found["named"][0] in str(error.value)
        return found["leaks"], found["named"]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """A run that is clean, and keeps all neighbors but copies: no two documents are alike."""
    experiment = experiment_of(
        SPLITS, retriever=Scann(num_neighbors=16), selection=Selection(max_similarity=1.0, depth=LAST + 1)
    )
    folder = tmp_path_factory.mktemp("audit") / "workdir"
    workdir = workdir_of(experiment, folder)
    for stage in (ingest, embed, index, retrieve):
        stage(Run(experiment, workdir))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rac3.stages.audit.DOCUMENTS_AT_ONCE", 5)
        patch.setattr("rac3.stages.audit.GROUPS", 10 * TRAIN)
        yield Made(experiment, workdir)


@pytest.fixture
def made(clean: Made, tmp_path: Path) -> Made:
    """A copy to plant a leak in."""
    copy = shutil.copytree(clean.workdir.path, tmp_path / "workdir")
    return Made(clean.experiment, Workdir(copy, clean.experiment.name))


def test_a_clean_run_has_no_leak_and_everything_was_looked_at(made: Made):
    lines = audit(made.run).splitlines()
    assert lines[-1] == "audit: no leak"
    found = json.loads((made.workdir.path / "report" / "audit.json").read_text())
    assert found["leaks"] == {}
    assert found["named"] == []
    assert found["counts"] == {
        "neighbors of training documents": TRAIN * 2 * (LAST + 1),
        "groups of training": 10 * TRAIN,
        "validation: queries embedded again": 2 * HELD_OUT,
        "validation: documents retrieved": 2 * HELD_OUT * (LAST + 1),
        "test: queries embedded again": 2 * HELD_OUT,
        "test: documents retrieved": 2 * HELD_OUT * (LAST + 1),
    }


def test_a_training_document_that_retrieves_itself(made: Made):
    """One without hashes, as of a text and an image that nothing repeats."""
    made.neighbor("train", 7, 1, LAST, 7)
    for column in ("text_hashes", "image_hashes"):
        made.rewrite("documents", "train", column, lambda hashes: hashes.__setitem__(7, 0))
    leaks, named = made.leaks()
    assert leaks == {"training document retrieves itself": 1}
    assert named == ["training document retrieves itself: t7 -> t7"]


@pytest.mark.parametrize("column", ["text_hashes", "image_hashes"])
def test_a_training_document_that_retrieves_a_copy(column: str, made: Made):
    made.neighbor("train", 11, 0, LAST, 2)
    made.rewrite("neighbors", "train", "ids", lambda ids: ids[11, 1].fill(-1))
    made.rewrite("neighbors", "train", "ids", lambda ids: ids[2].fill(-1))
    made.rewrite("documents", "train", column, lambda hashes: hashes.__setitem__(11, hashes[2]))
    count = int((read_array(made.folder("neighbors", "train") / "ids")[11] == 2).sum())
    leaks, named = made.leaks()
    assert leaks == {"training document retrieves its own text or image": count}
    assert set(named) == {"training document retrieves its own text or image: t11 -> t2"}


def test_a_training_document_that_retrieves_what_selection_would_have_dropped(made: Made):
    """The neighbors were selected without a limit, and are looked at with one."""
    strict = replace(made.experiment, selection=replace(made.experiment.selection, max_similarity=0.5))
    made.neighbors_for(strict)
    vectors = read_array(made.folder("embeddings", "train") / "document")
    ids = read_array(made.folder("neighbors", "train") / "ids").reshape(TRAIN, -1)
    above = int((np.einsum("de,dne->dn", vectors, vectors[ids]) > 0.5).sum())
    assert above > 0
    assert made.leaks(strict)[0] == {"training document retrieves a document more similar than max_similarity": above}


def test_a_training_document_that_retrieves_what_is_withdrawn(made: Made, tmp_path: Path):
    """Taken down after the neighbors were selected."""
    (tmp_path / "takedowns").write_text("t3\nmemory:t4\n")
    down = replace(made.experiment, takedowns=str(tmp_path / "takedowns"), takedowns_missing_ok=True)
    made.neighbors_for(down)
    ids = read_array(made.folder("neighbors", "train") / "ids")
    leaks, named = made.leaks(down)
    assert leaks == {"training document retrieves what is withdrawn": int((ids == 3).sum())}
    assert all(name.endswith("-> t3") for name in named)


@pytest.mark.parametrize("segment", [0, 1])
def test_a_group_of_training_that_has_a_copy_of_the_main_text_or_image(segment: int, made: Made):
    """The copy has the same ids and, as a broken column would have it, another hash."""
    store = made.run.documents("train")
    items = store.many(range(TRAIN))
    ids = list(items[0].ids)
    ids[segment] = items[9].ids[segment]
    ids[1 - segment] = ids[1 - segment].copy()
    items[0] = TokenizedDocument(items[0].document, tuple(ids))
    folder = made.folder("documents", "train")
    write_id_starts(folder, [write_shard(folder, 0, items, NARROW)])
    made.rewrite("neighbors", "train", "ids", lambda neighbors: np.copyto(neighbors[9], [3, 0, *[-1] * (LAST - 1)]))
    what = "group of training whose main image or text is among the retrieved"
    leaks, named = made.leaks()
    assert set(leaks) == {what}
    stream = made.run.training_stream()
    first = stream.groups(np.arange(10 * TRAIN))
    groups = list(zip(first.main.tolist(), first.neighbors.tolist(), strict=True))
    together = sum((main == 9 and 0 in others) or (main == 0 and 9 in others) for main, others in groups)
    assert leaks[what] == together >= 3
    assert any(main == 9 and others[1] == 0 for main, others in groups)  # in the second place as well
    assert f"{what}: t9 -> t0" in named


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("part", ["text", "image"])
def test_a_held_out_query_that_is_not_of_its_part_alone(part: str, split: str, made: Made):
    other = read_array(made.folder("queries", split) / ("image" if part == "text" else "text"))

    def mixed(vectors: np.ndarray) -> None:
        mean = vectors[3] + other[3]
        vectors[3] = mean / np.linalg.norm(mean)

    made.rewrite("queries", split, part, mixed)
    what = f"{split}: {part} query that is not of the {part} alone"
    assert made.leaks() == ({what: 1}, [f"{what}: {SPLITS[split][0][3].key}"])


@pytest.mark.parametrize(("split", "copied"), [("validation", 2), ("test", TRAIN + 3)])
@pytest.mark.parametrize(("target", "query"), [("image", 0), ("text", 1)])
def test_a_target_that_is_retrieved(target: str, query: int, split: str, copied: int, made: Made):
    """From the training documents or from another part of the memory; a copy of the prompt itself may come."""
    row = 6  # not in the first block that is looked at
    part, number = ("train", copied) if copied < TRAIN else ("memory", copied - TRAIN)
    hashes = np.load(made.folder("documents", part) / f"{target}_hashes.npy")
    made.rewrite("documents", split, f"{target}_hashes", lambda own: own.__setitem__(row, hashes[number]))
    made.rewrite("neighbors", split, "ids", lambda ids: ids[row].fill(-1))
    made.neighbor(split, row, 1 - query, 0, copied)  # asked for by the part that is the same: no leak
    made.neighbor(split, row, query, LAST, copied)
    what = f"{split}: {target} that is retrieved"
    names = f"{SPLITS[split][0][row].key} -> {SPLITS[part][0][number].key}"
    assert made.leaks() == ({what: 1}, [f"{what}: {names}"])


def test_what_is_not_there_is_no_copy_of_a_target(made: Made):
    """A document and what it retrieves both lack an image; another has the image of document 0, and no neighbor."""
    first = np.load(made.folder("documents", "train") / "image_hashes.npy")[0]
    made.rewrite("documents", "train", "image_hashes", lambda hashes: hashes.__setitem__(2, 0))
    made.rewrite("documents", "test", "image_hashes", lambda hashes: hashes.put([5, 6], [0, first]))
    made.neighbor("test", 5, 0, 0, 2)
    made.rewrite("neighbors", "test", "ids", lambda ids: ids[6].fill(-1))
    assert audit(made.run).endswith("audit: no leak")


def test_documents_that_a_person_names_may_be_similar(made: Made):
    named = replace(made.experiment, retriever=Fixed(("t1", "t2", "t3")), selection=Selection(0.001, LAST + 1))
    for stage in (index, retrieve):
        stage(Run(named, made.workdir))
    assert audit(Run(named, made.workdir)).endswith("audit: no leak")


@pytest.mark.parametrize(("stored", "other"), [("int8", 100), ("bfloat16", 0.9)])
def test_vectors_of_a_byte_or_two_per_number_are_no_leak(stored: str, other: float, made: Made):
    """A hundredth of each vector is lost in rounding; what is not of the part alone is still found."""
    small = Made(replace(made.experiment, embedding_dtype=stored), made.workdir)
    for stage in (embed, index, retrieve):
        stage(small.run)
    for kind, array in (("embeddings", "document"), ("queries", "text"), ("queries", "image")):
        assert read_array(small.folder(kind, "train") / array).dtype.name == stored
    assert audit(small.run).endswith("audit: no leak")
    small.rewrite("queries", "test", "image", lambda numbers: numbers[5].fill(other))
    assert small.leaks()[0] == {"test: image query that is not of the image alone": 1}


def test_a_similarity_is_a_leak_only_beyond_rounding(made: Made):
    vectors = read_array(made.folder("embeddings", "train") / "document")
    ids = read_array(made.folder("neighbors", "train") / "ids").reshape(TRAIN, -1)
    highest = float(np.einsum("de,dne->dn", vectors, vectors[ids]).max())
    for below, leaks in ((5e-6, False), (1e-4, True)):
        near = replace(made.experiment, selection=replace(made.experiment.selection, max_similarity=highest - below))
        made.neighbors_for(near)
        if leaks:
            assert "more similar than max_similarity" in next(iter(made.leaks(near)[0]))
        else:
            assert audit(Run(near, made.workdir)).endswith("audit: no leak")


def test_a_query_may_differ_by_the_rounding_of_its_encoder(made: Made):
    """By a hundredth where CLIP computes in bfloat16, and not where it does in float32."""
    coarse = Made(replace(made.experiment, clip=PlainEncoder("bfloat16")), made.workdir)
    for stage in (embed, index, retrieve):
        stage(coarse.run)
    for each in (made, coarse):
        each.rewrite("queries", "test", "text", lambda vectors: np.add(vectors, [0.01] + [0] * 7, out=vectors))
    assert made.leaks()[0] == {"test: text query that is not of the text alone": HELD_OUT}
    assert audit(coarse.run).endswith("audit: no leak")


def test_of_many_leaks_the_first_are_named_and_all_are_counted(made: Made, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rac3.stages.audit.DOCUMENTS_AT_ONCE", 8192)  # one block has more than are named
    made.rewrite("queries", "test", "text", lambda vectors: vectors.fill(WIDTH**-0.5))
    made.rewrite("neighbors", "train", "ids", lambda ids: ids[:, :, LAST].fill(-1))
    for row in range(TRAIN):
        for query in range(2):
            made.neighbor("train", row, query, LAST, row)
    leaks, named = made.leaks()
    assert leaks["training document retrieves itself"] == 2 * TRAIN
    assert leaks["test: text query that is not of the text alone"] == HELD_OUT
    assert len(named) == 20


def test_nothing_is_audited_of_a_model_without_retrieval(made: Made):
    vanilla = replace(made.experiment, retriever=NoRetriever())
    assert audit(Run(vanilla, made.workdir)) == "audit: retriever:none retrieves nothing"
