"""The memory after training: parts that join and leave it, documents that are taken down, and what must not leak."""

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_config

from rac3 import recipes
from rac3.artifacts.workdir import MANIFEST, Workdir
from rac3.batches.loader import StreamState
from rac3.cli import parse
from rac3.clip.encoder import query_dropout_keys
from rac3.config import InputError
from rac3.documents.document import Document
from rac3.documents.webdataset import WebDataset
from rac3.documents.world import World
from rac3.experiment import Data, Experiment
from rac3.run import Run
from rac3.stages.embed import embed
from rac3.stages.evaluate_retrieval import evaluate_retrieval
from rac3.stages.retrieve import retrieve

TINY = tiny_config.__file__
Command = Callable[..., int]

pytestmark = pytest.mark.slow


def write_shard(path: Path, documents: list[Document]) -> None:
    """A shard in img2dataset's layout."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, document in enumerate(documents):
            files = {"txt": document.text.encode(), "png": document.images[0].data}
            for suffix, data in (files | {"json": json.dumps(dict(document.metadata)).encode()}).items():
                info = tarfile.TarInfo(f"{number:09d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def artifacts(workdir: Path) -> set[str]:
    return {str(path.parent.relative_to(workdir)) for path in workdir.glob(f"*/*/{MANIFEST}")}


def without_memory(experiment: Experiment) -> Experiment:
    return replace(experiment, data=replace(experiment.data, memory={}, fit_on=("train",)))


def test_a_part_joins_the_memory_of_a_trained_model_and_leaves_it(workdir: Path, rac3: Command, tmp_path: Path, capsys):
    """The test documents themselves, so that it shows in recall; nothing that was there is made again."""
    experiment = tiny_config.get_config()
    run = Run(experiment, Workdir(workdir, "tiny"))
    tests = [item.document for item in run.documents("test").many(range(4))]
    write_shard(tmp_path / "shards" / "00000.tar", tests)
    place, before = ["--workdir", str(workdir)], artifacts(workdir)
    added = ["--add-memory", f"news={tmp_path / 'shards'}"]
    assert rac3("prepare", TINY, *place, *added) == 0
    new = sorted(path.split("/")[0] for path in artifacts(workdir) - before)
    assert new == ["documents", "embeddings", "index", *["neighbors"] * 3]  # of all that is held out
    assert rac3("evaluate", TINY, *place, *added, "--task", "retrieval") == 0
    more, _ = parse("evaluate", experiment, [*added, *place])
    assert list(more.data.memory) == ["memory", "news"]
    grown = run.variant(more, more)
    opened = grown.memory("test")
    assert [part.name for part in opened.memory.parts] == ["train", "memory", "news"]
    assert more.data.memory_splits("train") == ["train"]
    neighbors = grown.neighbors("test")[:]
    joined = neighbors >= opened.memory.offsets[2]
    assert joined.any()
    assert {opened.document(int(i)).document.text for i in neighbors[joined]} <= {each.text for each in tests}
    before_and_after = [evaluate_retrieval(each)["splits"]["test"]["entities"]["both"]["1"] for each in (run, grown)]
    assert before_and_after[0] < before_and_after[1] == 1
    assert "recall of its entity in the memory, by both: 100.0% at 1" in capsys.readouterr().out

    made = artifacts(workdir)
    assert rac3("evaluate", TINY, *place, *added, "--no-compare-with-cm3", "--evaluation.no-control") == 0
    assert {path.split("/")[0] for path in artifacts(workdir) - made} == {"evaluation"}  # of the model there is
    made = artifacts(workdir)
    assert rac3("prepare", TINY, *place, *added, "--withdraw-memory", "news") == 0  # what there was before
    assert artifacts(workdir) == made
    assert rac3("prepare", TINY, *place, "--withdraw-memory", "memory") == 0
    assert sorted(path.split("/")[0] for path in artifacts(workdir) - made) == ["neighbors", "neighbors"]


def test_retrieval_is_evaluated_with_any_retriever(workdir: Path, rac3: Command, capsys):
    command = ["evaluate", TINY, "--workdir", str(workdir), "--task", "retrieval"]
    assert rac3(*command, "retriever:random", "--retriever.num-neighbors", "16") == 0
    assert "Random, as configured: " in capsys.readouterr().out
    assert (workdir / "report" / "retrieval.html").is_file()
    assert rac3(*command, "retriever:none") == 2
    assert "retriever:none retrieves nothing, so there is nothing to evaluate" in capsys.readouterr().err


def test_a_wrong_memory_is_refused():
    experiment, world = tiny_config.get_config(), World("memory")
    for arguments, says in (
        (["--add-memory", "folder"], "'folder' is not NAME=FOLDER"),
        (["--add-memory", "=folder"], "is not NAME=FOLDER"),
        (["--add-memory", "memory=x"], "has a part 'memory' already"),
        (["--add-memory", "test=x"], "names a part 'test'; use another name"),
        (["--add-memory", "a=x", "b=x"], "a and b are the same source"),
        (["--withdraw-memory", "x"], "'x', which is no part of the memory; there are: memory"),
    ):
        with pytest.raises(InputError, match=says):
            parse("evaluate", experiment, arguments)
    with pytest.raises(InputError, match=r"fit_on names 'test'; use train, or parts of the memory.*: news"):
        Data(World("train"), {"news": world}, fit_on=("test",))
    with pytest.raises(InputError, match="fit_on is empty"):
        Data(World("train"), fit_on=())


def test_encoders_depend_on_what_they_are_fitted_on_alone():
    experiment = tiny_config.get_config()
    more = {**experiment.data.memory, "news": WebDataset("nowhere")}
    grown = replace(experiment, data=replace(experiment.data, memory=more))
    assert recipes.clip(grown).fingerprint == recipes.clip(experiment).fingerprint
    assert recipes.train(grown).fingerprint == recipes.train(experiment).fingerprint
    left = replace(experiment, data=replace(experiment.data, withdrawn=("memory",)))
    assert recipes.clip(left).fingerprint == recipes.clip(experiment).fingerprint
    assert left.data.memory_splits("test") == ["train"]
    assert recipes.clip(without_memory(experiment)).fingerprint != recipes.clip(experiment).fingerprint


def test_what_is_taken_down_is_neither_retrieved_nor_trained_on(workdir: Path, rac3: Command, tmp_path: Path, capsys):
    experiment = tiny_config.get_config()
    run = Run(experiment, Workdir(workdir, "tiny"))
    documents = run.documents("train")
    gone = np.array([1, 5, 17])
    keys = [item.document.key for item in documents.many(gone.tolist())]
    takedowns = tmp_path / "keys.txt"
    lines = [f"\ufeff{keys[0]}", "", f"train:{keys[1]}", f" {keys[2]}"]
    takedowns.write_bytes("\r\n".join(lines).encode())
    taken_down = replace(experiment, takedowns=str(takedowns))
    later = run.variant(taken_down, taken_down)
    np.testing.assert_array_equal(later.withdrawn_rows("train"), gone)
    assert rac3("retrieve", TINY, "--workdir", str(workdir), "--takedowns", str(takedowns)) == 0
    before = {split: run.neighbors(split)[:] for split in ("train", "test")}
    after = {split: later.neighbors(split)[:] for split in ("train", "test")}
    for split in before:
        assert np.isin(before[split], gone).any()
        assert not np.isin(after[split], gone).any()
    stream = later.training_stream()
    groups = stream.groups(np.arange(len(documents) - 3))
    assert set(groups.main.tolist()) == set(range(len(documents))) - set(gone.tolist())
    next(stream.batches(StreamState()))
    assert rac3("audit", TINY, "--workdir", str(workdir), "--takedowns", str(takedowns)) == 0
    capsys.readouterr()
    assert rac3("retrieve", TINY, "--workdir", str(workdir), "--takedowns", "/nowhere") == 2
    assert "takedowns file '/nowhere' does not exist" in capsys.readouterr().err
    retrieve = ("retrieve", TINY, "--workdir", str(workdir), "--takedowns", str(takedowns))
    for wrong in (f"{keys[0]}.jpg", keys[1].rpartition("/")[2], f"memory:{keys[0]}", f"test:{keys[0]}", "nowhere"):
        takedowns.write_text(f"{keys[0]}\n{wrong}\n", encoding="utf-8")
        assert rac3(*retrieve) == 2
        assert f"names 1 of 2 keys that no document has, such as {wrong!r}; " in capsys.readouterr().err
    assert rac3(*retrieve, "--takedowns-missing-ok") == 0
    takedowns.write_bytes(keys[0].encode() + b"\ncaf\xe9\n")
    capsys.readouterr()
    assert rac3(*retrieve) == 2
    assert "is not UTF-8: invalid continuation byte at byte" in (err := capsys.readouterr().err)
    assert err.count("\n") == 1


def test_each_view_of_a_query_has_a_dropout_of_its_own(workdir: Path):
    experiment = replace(tiny_config.get_config(), num_views=3, query_dropout=0.5)
    run, before = Run(experiment, Workdir(workdir, "tiny")), artifacts(workdir)
    embed(run)
    retrieve(run)
    assert sorted(path.split("/")[0] for path in artifacts(workdir) - before) == ["neighbors", "queries"]
    documents = [item.document for item in run.documents("train").many(range(4))]
    encoder, vectors = run.encoder, []
    for view in range(3):
        keys = query_dropout_keys(experiment.seed, [document.key for document in documents], view)
        text = encoder.embed_texts([document.text for document in documents], drop_keys=keys, drop_rate=0.5)
        vectors.append(run.queries("train", f"text-{view}" if view else "text")[:4])
        np.testing.assert_allclose(vectors[-1], text, atol=1e-5)
    assert not np.allclose(vectors[0], vectors[1], atol=1e-3)
    assert not np.allclose(vectors[1], vectors[2], atol=1e-3)
    neighbors = run.neighbors("train")[:]
    assert neighbors.shape == (36, 6, experiment.selection.depth)
    assert run.neighbors("test").shape == (4, 2, experiment.selection.depth)
    groups = run.training_stream().groups(np.arange(100 * 36))
    candidates = experiment.batches.candidates
    used = set()
    for document, drawn in zip(groups.main.tolist(), groups.neighbors.tolist(), strict=True):
        pools = [set(pool.tolist()) for pool in neighbors[document, :, :candidates]]
        kept = {each for each in drawn if each >= 0}
        fitting = [number for number, pool in enumerate(pools) if kept <= pool]
        assert fitting  # all of a group's neighbors are of one query
        if len(fitting) == 1:
            used.add(fitting[0])
    assert used == set(range(6))
    for wrong in ({"num_views": 0}, {"num_views": 2, "query_dropout": 0.0}):
        with pytest.raises(InputError, match="num_views="):
            replace(experiment, **wrong)
