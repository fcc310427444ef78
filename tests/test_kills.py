"""ingest, embed and retrieve end with the same artifacts, whoever makes them and whatever is killed meanwhile.

Real processes and real signals, over the tiny world in many small shards.
"""

import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rac3.artifacts import MANIFEST
from rac3.cli import run

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-c", "from rac3.cli import main; main()"]
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
    """Every file of the three stages; of manifests, all but how long it took."""
    found: dict[str, Any] = {}
    for stage in STAGES:
        for path in (workdir / stage).rglob("*"):
            name = str(path.relative_to(workdir))
            if path.name == MANIFEST:
                manifest = json.loads(path.read_text())
                del manifest["seconds"], manifest["counts"]["throughput"]
                found[name] = manifest
            elif path.is_file():
                found[name] = path.read_bytes()
    return found


def assert_same(workdir: Path, whole: Path) -> None:
    mine, other = content(workdir), content(whole)
    assert mine.keys() == other.keys()
    assert [name for name in mine if mine[name] != other[name]] == []


def start(config: Path, workdir: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [*COMMAND, "prepare", str(config), "--workdir", str(workdir), *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def prepare(config: Path, workdir: Path, *arguments: str) -> None:
    process = start(config, workdir, *arguments)
    _, err = process.communicate()
    assert process.returncode == 0, err


def kill_at(pattern: str, count: int, config: Path, workdir: Path, *arguments: str) -> None:
    """Kills the command, and nothing else, once `count` files of the pattern are there."""
    with start(config, workdir, *arguments) as process:
        while len(list(workdir.glob(pattern))) < count:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


def test_the_shards_are_many(whole: Path):
    """Else nothing below would be interrupted in the middle of anything."""
    sizes = {stage: len(list((whole / stage).glob("*/document/c/*/0"))) for stage in ("embeddings",)}
    assert sizes == {"embeddings": 8 + 3}
    assert len(list((whole / "documents").rglob("*.array_record"))) == 1 + 1 + 6 + 1
    assert not list(whole.rglob("*.tmp"))


def test_a_command_that_is_killed_in_every_stage_goes_on(config: Path, traps: Path, whole: Path, workdir: Path):
    (traps / "slow").touch()
    rng = random.Random(0)
    for stage, most in (("documents", 5), ("embeddings", 6), ("queries", 9), ("neighbors", 9)):
        kill_at(f"{stage}/*.partial/0*.json", rng.randint(1, most), config, workdir)
        assert list((workdir / stage).glob("*.partial")), "it had ended already"
    prepare(config, workdir)
    assert_same(workdir, whole)


def test_a_second_command_is_turned_away_and_the_first_ends(config: Path, traps: Path, whole: Path, workdir: Path):
    (traps / "wait 000004").touch()
    with start(config, workdir) as first:
        while not list(workdir.glob("documents/*.partial/*.json")):
            assert first.poll() is None
            time.sleep(0.01)
        second = start(config, workdir)
        _, err = second.communicate()
        assert second.returncode == 2
        assert re.fullmatch(r"rac3: \S+ is being written by another process; wait for it, or .*\n", err)
        (traps / "wait 000004").unlink()
        first.communicate()
    assert first.returncode == 0
    assert_same(workdir, whole)


def test_a_poisoned_shard_is_named_and_then_alone_made(config: Path, traps: Path, whole: Path, workdir: Path):
    (traps / "raise 000006").touch()
    (traps / "log").write_text("")
    with start(config, workdir) as process:
        _, err = process.communicate()
    assert process.returncode == 2
    line = err.splitlines()[-1]
    assert "ingest: 1 shard failed 3 times each: validation 000006 (RuntimeError: the disk is broken)" in line
    assert (traps / "log").read_text().split().count("000006") == 3
    assert not list((workdir / "documents").glob(f"*/{MANIFEST}"))
    (traps / "raise 000006").unlink()
    (traps / "log").write_text("")
    prepare(config, workdir)
    assert (traps / "log").read_text().split() == ["000006"]
    assert_same(workdir, whole)


@needs_ray
def test_ray_makes_what_local_makes_though_a_worker_is_killed(config: Path, traps: Path, whole: Path, workdir: Path):
    """The source and the retriever are classes of the config file, which no worker can import."""
    (traps / "kill 000008").touch()
    (traps / "log").write_text("")
    prepare(config, workdir, "--executor", "ray", "--ray.workers", "2")
    assert not (traps / "kill 000008").exists()
    assert (traps / "log").read_text().split().count("000008") == 2
    assert_same(workdir, whole)


@needs_ray
def test_what_ray_has_begun_is_ended_by_local(config: Path, traps: Path, whole: Path, workdir: Path):
    """The command is killed, so that its workers are orphans for a moment, which may still write."""
    (traps / "slow").touch()
    kill_at("documents/*.partial/0*.json", 2, config, workdir, "--executor", "ray")
    prepare(config, workdir)
    assert_same(workdir, whole)
