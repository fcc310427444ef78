"""ingest, embed and retrieve end with the same artifacts, whoever makes them and whatever is killed meanwhile.

Real processes and real signals, over the tiny world in many small shards.
"""

import importlib.util
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import ROOT, started, wait_until

from rac3.artifacts.workdir import MANIFEST, Workdir
from rac3.cli import run
from rac3.clip.encoder import query_dropout_keys
from rac3.config import InputError, load_config_module
from rac3.documents.store import TokenizedDocument
from rac3.run import Run

STAGES = ("documents", "embeddings", "queries", "neighbors")
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")

CONFIG = f"""
import os, signal, time
from dataclasses import dataclass, replace
from pathlib import Path
from rac3.config import load_config_module
from rac3.documents.world import World
from rac3.retrieval.exact import Exact

tiny = load_config_module({str(ROOT / "tests" / "tiny_config.py")!r}).get_config()
TRAPS = Path(__file__).parent / "traps"


@dataclass(frozen=True)
class Trapped:
    '''Two documents a shard. The files in `traps` say what befalls a shard, and are a log of who read it.'''

    world: World = replace(tiny.data.validation, documents_per_shard=2)

    def shards(self, data_dir):
        return self.world.shards(data_dir)

    def read(self, data_dir, shard):
        with (TRAPS / "log").open("a") as log:
            log.write(f"{{shard}}\\n")
        if (TRAPS / f"raise {{shard}}").exists():
            raise RuntimeError("the disk is broken")
        if (TRAPS / f"kill {{shard}}").exists():
            (TRAPS / f"kill {{shard}}").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        while (TRAPS / f"wait {{shard}}").exists():
            time.sleep(0.01)
        if (TRAPS / "slow").exists():
            time.sleep(0.1)
        yield from self.world.read(data_dir, shard)


@dataclass(frozen=True)
class SlowExact:
    '''A retriever of one's own.'''

    num_neighbors: int = 16

    def build(self, part, folder):
        (folder / "size").write_text(str(len(part)))

    def open(self, part, folder):
        assert (folder / "size").read_text() == str(len(part))
        return SlowIndex(Exact(self.num_neighbors).open(part, folder))


@dataclass(frozen=True)
class SlowIndex:
    index: object

    def search(self, queries, k):
        if (TRAPS / "slow").exists():
            time.sleep(0.05)
        return self.index.search(queries, k)


def get_config():
    data = replace(tiny.data, validation=Trapped())
    return replace(tiny, data=data, documents_per_shard=5, embedding_dtype="int8", retriever=SlowExact())
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    (folder / "traps").mkdir()
    (folder / "kills.py").write_text(CONFIG)
    return folder / "kills.py"


@pytest.fixture
def traps(config: Path) -> Iterator[Path]:
    yield config.parent / "traps"
    for path in (config.parent / "traps").iterdir():
        path.unlink()


@pytest.fixture(scope="module")
def whole(finished_workdir: tuple[Path, Path], config: Path) -> Path:
    """The workdir of a run that nothing befell."""
    workdir = with_encoders(finished_workdir[1], config.parent / "whole")
    run(["prepare", str(config), "--workdir", str(workdir), "--local.threads", "1"])
    return workdir


def with_encoders(finished: Path, workdir: Path) -> Path:
    workdir.mkdir()
    shutil.copy(finished / "workdir.json", workdir)
    for stage in ("text", "vqgan", "clip"):
        shutil.copytree(finished / stage, workdir / stage)
    return workdir


@pytest.fixture
def workdir(finished_workdir: tuple[Path, Path], tmp_path: Path) -> Path:
    """With encoders, and nothing else yet."""
    return with_encoders(finished_workdir[1], tmp_path / "workdir")


def content(workdir: Path) -> dict[str, Any]:
    """Every file of the three stages; of manifests, all but how long it took, and which command made it where."""
    found: dict[str, Any] = {}
    for stage in STAGES:
        for path in (workdir / stage).rglob("*"):
            name = str(path.relative_to(workdir))
            if path.name == MANIFEST:
                manifest = json.loads(path.read_text())
                del (
                    manifest["started"],
                    manifest["seconds"],
                    manifest["counts"]["throughput"],
                    manifest["command"],
                    manifest["checksum"],
                )
                found[name] = manifest
            elif path.is_file():
                found[name] = path.read_bytes()
    return found


def assert_same(workdir: Path, whole: Path) -> None:
    mine, other = content(workdir), content(whole)
    assert mine.keys() == other.keys()
    assert [name for name in mine if mine[name] != other[name]] == []


def killed_at(pattern: str, count: int, folder: Path, config: Path, workdir: Path, *arguments: str) -> None:
    """Kills the command once `count` files of the pattern are there."""
    with started(folder, "prepare", str(config), "--workdir", str(workdir), *arguments) as command:
        wait_until(lambda: len(list(workdir.glob(pattern))) >= count, command)
        command.kill()


def test_the_shards_are_many(whole: Path):
    """Else nothing below would be interrupted in the middle of anything."""
    sizes = {stage: len(list((whole / stage).glob("*/document/c/*/0"))) for stage in ("embeddings",)}
    assert sizes == {"embeddings": 8 + 3}
    assert len(list((whole / "documents").rglob("*.array_record"))) == 1 + 1 + 6 + 1 + 1
    assert not list(whole.rglob("*.tmp"))


@pytest.fixture
def opened(config: Path, whole: Path, traps: Path) -> Run:
    """What the others below are compared with, which is itself compared with the sources and the encoders."""
    return Run(load_config_module(str(config)).get_config(), Workdir(whole, "tiny"))


SPLITS = ("train", "memory", "validation", "test")


@pytest.mark.parametrize("split", SPLITS)
def test_documents_are_those_of_the_source_in_its_order(split: str, opened: Run):
    source = opened.experiment.data.sources()[split]
    expected = [document for shard in source.shards(Path()) for document in source.read(Path(), shard)]
    store = opened.documents(split)
    found = store.many(range(len(store)))
    assert [item.document for item in found] == expected
    tokenizer = opened.tokenizer
    for item in found:
        assert item.ids[0].tolist() == tokenizer.encode(item.document.text)
    codes = opened.images.encode([document.images[0] for document in expected])
    np.testing.assert_array_equal(np.stack([item.ids[1] for item in found]), codes)


@pytest.mark.parametrize("split", SPLITS)
def test_vectors_are_the_encoders_own_of_the_same_row(split: str, opened: Run):
    """Stored in int8: each number within half a 127th of the row's largest."""
    store = opened.documents(split)
    documents = [item.document for item in store.many(range(len(store)))]
    clip, texts = opened.encoder, [document.text for document in documents]
    images = [document.images[0] for document in documents]
    text, image = clip.embed_texts(texts), clip.embed_images(images)
    found = {}
    if split in ("train", "memory"):
        both = (text + image) / 2
        mixed = both / np.linalg.norm(both, axis=1, keepdims=True)
        found["document"] = opened.embeddings(split)[:], mixed
    if split == "train":
        keys = query_dropout_keys(opened.experiment.seed, [document.key for document in documents])
        dropout = {"drop_keys": keys, "drop_rate": opened.experiment.query_dropout}
        text, image = clip.embed_texts(texts, **dropout), clip.embed_images(images, **dropout)
    if split != "memory":
        found["text"] = opened.queries(split, "text")[:], text
        found["image"] = opened.queries(split, "image")[:], image
    for stored, expected in found.values():
        assert stored.shape == expected.shape
        step = np.abs(expected).max(1, keepdims=True) / 127
        assert (np.abs(stored - expected) <= 0.5 * step + 1e-4).all()


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_neighbors_are_the_best_that_the_rules_allow(split: str, opened: Run):
    """Each row against all inner products; near-ties may go either way."""
    limit, depth, eps = opened.experiment.selection.max_similarity, opened.experiment.selection.depth, 1e-5
    parts = ["train"] if split == "train" else ["train", "memory"]
    vectors, documents = [], []
    for part in parts:
        vectors.append(opened.embeddings(part)[:])
        store = opened.documents(part)
        documents += store.many(range(len(store)))
    memory = np.concatenate(vectors)
    to_each_other = memory @ memory.T
    ids, scores = (opened.neighbors(split, name)[:] for name in ("ids", "scores"))
    assert ids.shape == (len(opened.documents(split)), 2, depth)
    for number, part in enumerate(("text", "image")):
        queries = opened.queries(split, part)[:]
        for row, to_query in enumerate(queries @ memory.T):
            own = row if split == "train" else None
            taken = [each for each in ids[row, number].tolist() if each >= 0]
            np.testing.assert_allclose(scores[row, number, : len(taken)], to_query[taken], atol=eps)
            assert (np.diff(to_query[taken]) <= eps).all()
            assert set(ids[row, number, len(taken) :].tolist()) <= {-1}

            def forbidden(each: int, earlier: list[int], limit: float, own: int | None = own) -> bool:
                copies = own is not None and (each == own or same_part(documents[each], documents[own]))
                near = [to_query[each], *to_each_other[each, [*earlier, *([] if own is None else [own])]]]  # noqa: B023
                return copies or max(near) > limit

            for place, each in enumerate(taken):
                assert not forbidden(each, taken[:place], limit + eps)
            last = to_query[taken[-1]] if len(taken) == depth else -2.0
            for each in set(range(len(memory))) - set(taken):
                if to_query[each] > last + eps and (to_query > to_query[each] - eps).sum() <= 16:
                    before = [other for other in taken if to_query[other] > to_query[each] - eps]
                    assert forbidden(each, before, limit - eps)


def same_part(one: TokenizedDocument, other: TokenizedDocument) -> bool:
    """Equal texts, or images of equal codes."""
    return one.document.text == other.document.text or np.array_equal(one.ids[1], other.ids[1])


def test_a_command_that_is_killed_in_every_stage_goes_on(
    config: Path, traps: Path, whole: Path, workdir: Path, tmp_path: Path
):
    (traps / "slow").touch()
    rng = random.Random(0)
    for stage, most in (("documents", 5), ("embeddings", 6), ("queries", 9), ("neighbors", 9)):
        killed_at(f"{stage}/*.partial/0*.json", rng.randint(1, most), tmp_path, config, workdir)
        assert list((workdir / stage).glob("*.partial")), "it had ended already"
    (traps / "slow").unlink()
    run(["prepare", str(config), "--workdir", str(workdir)])
    assert_same(workdir, whole)


def test_a_second_command_is_turned_away_and_the_first_ends(
    config: Path, traps: Path, whole: Path, workdir: Path, tmp_path: Path
):
    (traps / "wait 000004").touch()
    with started(tmp_path, "prepare", str(config), "--workdir", str(workdir)) as first:
        wait_until(lambda: bool(list(workdir.glob("documents/*.partial/*.json"))), first)
        with pytest.raises(InputError, match=r"^\S+ is being written by another process; wait for it, or "):
            run(["prepare", str(config), "--workdir", str(workdir)])
        (traps / "wait 000004").unlink()
        assert first.wait() == 0, first.err()
    assert_same(workdir, whole)


def test_a_poisoned_shard_is_named_and_then_alone_made(config: Path, traps: Path, whole: Path, workdir: Path):
    (traps / "raise 000006").touch()
    (traps / "log").write_text("")
    failed = "^ingest: 1 shard failed 3 times each: validation 000006 .RuntimeError: the disk is broken"
    with pytest.raises(InputError, match=failed):
        run(["prepare", str(config), "--workdir", str(workdir)])
    assert (traps / "log").read_text().split().count("000006") == 3
    assert not list((workdir / "documents").glob(f"*/{MANIFEST}"))
    (traps / "raise 000006").unlink()
    (traps / "log").write_text("")
    run(["prepare", str(config), "--workdir", str(workdir)])
    assert (traps / "log").read_text().split() == ["000006"]
    assert_same(workdir, whole)


@pytest.mark.slow
@needs_ray
def test_ray_makes_what_local_makes_though_a_worker_is_killed(
    config: Path, traps: Path, whole: Path, workdir: Path, tmp_path: Path
):
    """The source and the retriever are classes of the config file, which no worker can import."""
    (traps / "kill 000008").touch()
    (traps / "log").write_text("")
    ray = ["--executor", "ray", "--ray.workers", "2"]
    with started(tmp_path, "prepare", str(config), "--workdir", str(workdir), *ray) as command:
        assert command.wait() == 0, command.err()
    assert not (traps / "kill 000008").exists()
    assert (traps / "log").read_text().split().count("000008") == 2
    assert_same(workdir, whole)


@pytest.mark.slow
@needs_ray
def test_what_ray_has_begun_is_ended_by_local(config: Path, traps: Path, whole: Path, workdir: Path, tmp_path: Path):
    """The command is killed, so that its workers are orphans for a moment, which may still write."""
    (traps / "slow").touch()
    killed_at("documents/*.partial/0*.json", 2, tmp_path, config, workdir, "--executor", "ray")
    run(["prepare", str(config), "--workdir", str(workdir)])
    assert_same(workdir, whole)


@pytest.mark.slow
def test_a_file_of_prompts_is_answered_as_if_nothing_had_been_killed(
    finished_workdir: tuple[Path, Path], tmp_path: Path
):
    """Killed three times, at other numbers of answers each; at the end all files are those of one run."""
    config, workdir = finished_workdir
    prompts, whole, part = (tmp_path / name for name in ("prompts.jsonl", "whole", "part"))
    lines = [{"prompt": f"picture {number}", "seed": number, "samples": 1} for number in range(320)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def generate(out: Path) -> tuple[str, ...]:
        return "generate", str(config), "--workdir", str(workdir), "--prompts", str(prompts), "--out", str(out)

    with started(tmp_path, *generate(whole)) as command:
        assert command.wait() == 0, command.err()
    for count in (20, 80, 150):
        with started(tmp_path, *generate(part)) as command:
            wait_until(lambda: len(list(part.glob("*.png"))) >= count, command)  # noqa: B023
            command.kill()
    assert len((part / "answers.jsonl").read_text().splitlines()) < 320
    with started(tmp_path, *generate(part)) as command:
        assert command.wait() == 0, command.err()
    answers = [json.loads(line) for line in (part / "answers.jsonl").read_text().splitlines()]
    assert [answer["number"] for answer in answers] == [*range(320)]
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (whole, part)]
    assert files[0].keys() == files[1].keys()
    assert len(files[0]) == 321
    assert [name for name in files[0] if files[0][name] != files[1][name]] == []
