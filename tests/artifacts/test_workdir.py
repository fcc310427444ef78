"""Artifacts appear whole or not at all, resume, and belong to one config."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rac3.artifacts.files import damage, describe
from rac3.artifacts.recipe import Recipe
from rac3.artifacts.workdir import MANIFEST, OWNER, TEMPORARY, Workdir, temporary_path, write_atomic
from rac3.config import InputError
from rac3.tokens.vocabulary import Vocabulary

TEXT = Recipe("text", {"vocab_size": 300})
RECIPE = Recipe("documents", {"size": 3}, {"text": TEXT})


class StopHereError(Exception):
    pass


@pytest.fixture
def workdir(tmp_path: Path) -> Workdir:
    return Workdir(tmp_path / "run", "quickstart")


def test_a_complete_artifact_is_found_with_its_manifest(workdir: Workdir):
    recipe = Recipe("documents", Vocabulary(7, 9), {"text": TEXT})
    assert workdir.find(recipe) is None
    with workdir.write(recipe) as draft:
        (draft.folder / "data").write_text("x")
        draft.counts["documents"] = 5
        assert workdir.find(recipe) is None
    artifact = workdir.require(recipe)
    assert artifact.folder == workdir.path / "documents" / recipe.fingerprint
    assert (artifact.folder / "data").read_text() == "x"
    assert artifact.fingerprint == recipe.fingerprint
    manifest = artifact.manifest
    assert manifest["stage"] == "documents"
    assert manifest["fingerprint"] == recipe.fingerprint
    assert manifest["config"] == {"class": "Vocabulary", "text_size": 7, "image_size": 9, "num_masks": 16}
    assert manifest["inputs"] == {"text": TEXT.fingerprint}
    assert manifest["counts"] == {"documents": 5}
    assert manifest["versions"].keys() >= {"python", "jax", "numpy"}
    assert sorted(path.name for path in artifact.folder.parent.iterdir()) == [recipe.fingerprint]


def test_the_fingerprint_hashes_stage_config_and_inputs():
    others = [
        Recipe("index", {"size": 3}, {"text": TEXT}),
        Recipe("documents", {"size": 4}, {"text": TEXT}),
        Recipe("documents", {"size": 3}, {"text": Recipe("text", {"vocab_size": 301})}),
        Recipe("documents", {"size": 3}, {"clip": TEXT}),
        Recipe("documents", {"size": 3}),
    ]
    assert len({RECIPE.fingerprint, *(recipe.fingerprint for recipe in others)}) == 6
    equal = Recipe("documents", {"size": 3}, {"text": Recipe("text", {"vocab_size": 300})})
    assert equal.fingerprint == RECIPE.fingerprint


def test_a_fingerprint_changes_with_the_inputs_of_inputs():
    embeddings, other = (
        Recipe("embeddings", {}, {"documents": Recipe("documents", {}, {"text": Recipe("text", {"vocab_size": size})})})
        for size in (300, 301)
    )
    assert embeddings.fingerprint != other.fingerprint


def _write_and_stop(workdir: Workdir) -> None:
    with workdir.write(RECIPE) as draft:
        (draft.folder / "shard 0").write_text("done")
        raise StopHereError


def test_an_interrupted_write_goes_on_in_the_same_draft(workdir: Workdir):
    with pytest.raises(StopHereError):
        _write_and_stop(workdir)
    assert workdir.find(RECIPE) is None
    with pytest.raises(InputError, match=r"documents is missing in .*; run `rac3 prepare`"):
        workdir.require(RECIPE)
    with workdir.write(RECIPE) as draft:
        assert (draft.folder / "shard 0").read_text() == "done"
        (draft.folder / "shard 1").write_text("done")
    found = workdir.require(RECIPE)
    assert sorted(path.name for path in found.folder.iterdir()) == [MANIFEST, "shard 0", "shard 1"]


def test_other_settings_are_stale_rather_than_missing(workdir: Workdir):
    with workdir.write(RECIPE):
        pass
    with pytest.raises(InputError, match=r"documents is stale .*run `rac3 prepare`"):
        workdir.require(Recipe("documents", {"size": 4}, {"text": TEXT}))


def test_a_workdir_of_another_config_is_refused(workdir: Workdir):
    with workdir.write(RECIPE):
        pass
    Workdir(workdir.path, "quickstart")
    with pytest.raises(InputError, match="'quickstart', not 'ra_cm3'"):
        Workdir(workdir.path, "ra_cm3")


def test_a_folder_of_other_files_is_refused(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="did not write"):
        Workdir(tmp_path, "quickstart")
    with pytest.raises(InputError, match="is a file"):
        Workdir(tmp_path / "thesis.tex", "quickstart")
    (tmp_path / "empty").mkdir()
    Workdir(tmp_path / "empty", "quickstart")


def test_what_a_system_puts_into_a_folder_does_not_make_it_foreign(tmp_path: Path):
    """A new disk has `lost+found`, a file browser leaves `.DS_Store`, and a full disk the start of our first file."""
    (tmp_path / "lost+found").mkdir()
    (tmp_path / ".DS_Store").write_text("x")
    temporary_path(tmp_path / OWNER).touch()
    with Workdir(tmp_path, "quickstart").write(RECIPE):
        pass
    (tmp_path / OWNER).unlink()
    with pytest.raises(InputError, match=r"did not write, such as documents;"):
        Workdir(tmp_path, "quickstart")


WRITER = """
import sys, time
from pathlib import Path
from rac3.artifacts.files import damage
from rac3.artifacts.recipe import Recipe
from rac3.artifacts.workdir import Workdir
recipe = Recipe("documents", {"size": 3}, {"text": Recipe("text", {"vocab_size": 300})})
with Workdir(Path(sys.argv[1]), "quickstart").write(recipe) as draft:
    (draft.folder / "shard 0").write_text("done")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_is_refused_until_the_first_dies(workdir: Workdir):
    """A real process that holds the draft, then is killed as hard as can be: no lock and no loss."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(workdir.path)], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        with pytest.raises(InputError, match="is being written by another process"), workdir.write(RECIPE):
            pytest.fail("two writers at once")
        os.kill(process.pid, signal.SIGKILL)
    assert workdir.find(RECIPE) is None
    with workdir.write(RECIPE) as draft:
        assert (draft.folder / "shard 0").read_text() == "done"


def test_a_writer_that_comes_too_late_leaves_the_artifact_alone(workdir: Workdir):
    """Another process has completed the artifact between `find` and `write`."""
    with workdir.write(RECIPE) as draft:
        (draft.folder / "data").write_text("first")
    with pytest.raises(InputError, match="completed by another process"), workdir.write(RECIPE):
        pytest.fail("the work is done a second time")
    folder = workdir.require(RECIPE).folder
    assert (folder / "data").read_text() == "first"
    assert not folder.with_name(folder.name + ".partial").exists()


def test_write_atomic_replaces_and_leaves_nothing_behind(tmp_path: Path):
    write_atomic(tmp_path / "a.json", json.dumps({"é": 1}))
    write_atomic(tmp_path / "a.json", b"\x00\x01")
    assert (tmp_path / "a.json").read_bytes() == b"\x00\x01"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_without_a_manifest_is_no_artifact(workdir: Workdir):
    """As an interrupted copy leaves it. Nor is a draft with a manifest: it was killed before it got its name."""
    with workdir.write(TEXT):
        pass
    folder = workdir.path / "documents" / RECIPE.fingerprint
    folder.mkdir(parents=True)
    (folder / "data").write_text("x")
    says = re.escape(f"{folder}/manifest.json is missing; put back a copy, or run `rm -r {folder} && rac3 prepare`")
    for use in (workdir.find, workdir.require, lambda recipe: workdir.write(recipe).__enter__()):
        with pytest.raises(InputError, match=f"^{says}$"):
            use(RECIPE)
    folder.rename(folder.with_name(folder.name + ".partial"))
    (folder.with_name(folder.name + ".partial") / MANIFEST).write_text("{}")
    assert workdir.find(RECIPE) is None


def test_a_draft_has_no_manifest_before_its_block_ends(workdir: Workdir):
    with workdir.write(RECIPE) as draft:
        assert draft.folder == workdir.path / "documents" / f"{RECIPE.fingerprint}.partial"
        assert list(draft.folder.iterdir()) == []
        assert json.loads((workdir.path / "workdir.json").read_text())["config"] == "quickstart"


def test_one_process_does_not_write_an_artifact_twice_at_once(workdir: Workdir):
    with workdir.write(RECIPE) as draft:
        with pytest.raises(InputError, match="is being written by another process"), workdir.write(RECIPE):
            pytest.fail("two writers at once")
        with workdir.write(Recipe("documents", {"size": 4}, {})):
            pass  # another artifact of the stage
        (draft.folder / "data").write_text("x")
    assert (workdir.require(RECIPE).folder / "data").read_text() == "x"


def test_two_processes_fill_one_draft_and_the_first_completes_it(workdir: Workdir):
    other = Workdir(workdir.path, "quickstart")
    with workdir.write(RECIPE) as draft, other.join(RECIPE) as joined:
        assert joined.folder == draft.folder
        (joined.folder / "data").write_text("x")
        joined.counts["documents"] = 7
        with pytest.raises(RuntimeError, match="vqgan is read while writing documents"):
            other.require(Recipe("vqgan", {}))
    artifact = workdir.require(RECIPE)
    assert (artifact.folder / "data").read_text() == "x"
    assert artifact.manifest["counts"] == {}
    assert sorted(path.name for path in artifact.folder.parent.iterdir()) == [RECIPE.fingerprint]


def test_a_draft_that_comes_late_is_waited_for(workdir: Workdir, monkeypatch: pytest.MonkeyPatch):
    """As on a network file system, where a new folder shows after a while."""
    monkeypatch.setattr("rac3.artifacts.workdir.VISIBLE", 0.3)
    folder = workdir.path / "documents" / f"{RECIPE.fingerprint}.partial"
    with (
        pytest.raises(
            InputError, match=r"\.partial, which another process has made, can't be seen on .*all hosts share"
        ),
        workdir.join(RECIPE),
    ):
        pass
    timer = threading.Timer(0.1, folder.mkdir, kwargs={"parents": True})
    timer.start()
    with workdir.join(RECIPE) as draft:
        assert draft.folder == folder
    timer.join()


def test_the_command_in_a_message_is_that_of_the_same_config(tmp_path: Path):
    workdir = Workdir(tmp_path / "run", "quickstart", "my.py --seed 1")
    with pytest.raises(InputError, match=r"^documents is missing in \S+/run; run `rac3 prepare my.py --seed 1`$"):
        workdir.require(RECIPE)


def test_a_file_is_whole_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What a reader, or a machine that fails, finds while a file is written over: the old one."""
    path, seen = tmp_path / "a.json", []
    path.write_text("old")

    def fsync(descriptor: int) -> None:
        (other,) = set(tmp_path.iterdir()) - {path}
        assert os.path.samestat(os.fstat(descriptor), other.stat())
        seen.append((path.read_text(), other.read_text(), other.suffix))
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="no space left"):
        write_atomic(path, "new")
    assert seen == [("old", "new", TEMPORARY)]
    assert path.read_text() == "old"


def test_two_writers_have_two_temporary_names(tmp_path: Path):
    names = {temporary_path(tmp_path / "a.json") for _ in range(10)}
    assert len(names) == 10
    assert {path.parent for path in names} == {tmp_path}
    assert all(path.name.startswith("a.json.") and path.suffix == TEMPORARY for path in names)


VQGAN, CLIP = Recipe("vqgan", {}), Recipe("clip", {})
DOCUMENTS = Recipe("documents", {}, {"text": TEXT, "vqgan": VQGAN})
EMBEDDINGS = Recipe("embeddings", {}, {"documents": DOCUMENTS, "clip": CLIP})
INDEX = Recipe("index", {}, {"embeddings": EMBEDDINGS})


@pytest.fixture
def full(workdir: Workdir) -> Workdir:
    """With everything that an index is made from, and a second CLIP."""
    for recipe in (TEXT, VQGAN, CLIP, DOCUMENTS, EMBEDDINGS, Recipe("clip", {"width": 8})):
        with workdir.write(recipe):
            pass
    return workdir


@pytest.mark.parametrize("read", [EMBEDDINGS, DOCUMENTS, CLIP, TEXT, VQGAN], ids=lambda recipe: recipe.stage)
def test_what_is_written_may_read_its_inputs_and_theirs(read: Recipe, full: Workdir):
    """One, two and three inputs away; by its content, not as the same object."""
    with full.write(INDEX):
        assert full.require(Recipe(read.stage, read.config, read.inputs)).fingerprint == read.fingerprint
    assert full.find(INDEX) is not None


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (DOCUMENTS, CLIP),  # unrelated
        (CLIP, TEXT),  # it has no inputs
        (VQGAN, DOCUMENTS),  # the other way round: documents are made with the VQGAN
        (EMBEDDINGS, Recipe("clip", {"width": 8})),  # an input's stage, but not the input
        (CLIP, Recipe("index", {"lost": True})),  # missing besides
    ],
)
def test_what_is_written_reads_nothing_that_its_recipe_does_not_name(written: Recipe, read: Recipe, full: Workdir):
    again = Recipe(written.stage, {"again": True}, written.inputs)
    says = f"^{read.stage} is read while writing {written.stage}, whose recipe does not name it as an input"
    with pytest.raises(RuntimeError, match=says), full.write(again):
        full.require(read)
    assert full.find(again) is None  # it would be taken for current
    if full.find(read):
        assert full.require(read).fingerprint == read.fingerprint  # nothing is being written any more


def test_a_missing_input_is_bad_input_while_something_is_written(workdir: Workdir):
    with pytest.raises(InputError, match=r"clip is missing in .*; run `rac3 prepare`"), workdir.write(EMBEDDINGS):
        workdir.require(CLIP)


def test_drafts_that_are_written_together_may_read_the_inputs_of_each(full: Workdir):
    """As of several splits, whose shards a stage makes in one go."""
    queries = Recipe("queries", {}, {"documents": Recipe("documents", {"split": "test"}), "clip": CLIP})
    with full.write(queries.inputs["documents"]):
        pass
    other = Recipe("clip", {"width": 8})
    with full.write(queries):
        with full.write(INDEX):
            for recipe in (EMBEDDINGS, *queries.inputs.values()):
                full.require(recipe)
            with pytest.raises(RuntimeError, match="clip is read while writing index and queries, whose"):
                full.require(other)
        full.require(CLIP)
        with pytest.raises(RuntimeError, match="embeddings is read while writing queries, whose"):
            full.require(EMBEDDINGS)
    full.require(other)


DAMAGED = {
    "missing": None,
    "empty": b"",
    "cut": b'{"width": 6',
    "flipped": b'{"width": 65}',
    "longer": b'{"width": 64} ',
}


@pytest.fixture
def clip(workdir: Workdir) -> Path:
    """The folder of a CLIP, with a log and a checkpoint."""
    with Workdir(workdir.path, "quickstart", "my.py").write(CLIP) as draft:
        for name in ("config.json", "tokenizer/vocab.json", "tensorboard/events", "checkpoints/3/state"):
            (draft.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (draft.folder / name).write_text('{"width": 64}')
    return workdir.require(CLIP).folder


@pytest.mark.parametrize("name", ["config.json", "tokenizer/vocab.json"])
@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_file_that_is_not_what_was_written_is_named(name: str, content: bytes | None, clip: Path):
    """The first to ask is told, with the command that made it; so is everyone after."""
    (clip / name).unlink()
    if content is not None:
        (clip / name).write_bytes(content)
    again = Workdir(clip.parents[1], "quickstart")
    says = re.escape(f"put back a copy, or run `rm -r {clip} && rac3 prepare my.py`")
    for _ in range(2):
        with pytest.raises(InputError, match=rf"^{re.escape(str(clip / name))} is (missing|damaged: it.*); {says}$"):
            again.require(CLIP)


def test_the_size_of_a_chunk_is_compared(workdir: Workdir):
    """Its bytes are left to whoever reads it: no SHA-256 is computed of arrays, documents and ids."""
    with workdir.write(EMBEDDINGS) as draft:
        for name in ("document/zarr.json", "document/c/0/0", "000000.array_record", "000000.u2", "c/data"):
            (draft.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (draft.folder / name).write_text("12345")
    artifact = workdir.require(EMBEDDINGS)
    with_digest = {name for name, (_, digest) in artifact.manifest["files"].items() if digest}
    assert with_digest == {"document/zarr.json", "c/data"}
    (artifact.folder / "document/c/0/0").write_text("12346")
    Workdir(workdir.path, "quickstart").require(EMBEDDINGS)
    (artifact.folder / "document/c/0/0").write_text("1234")
    with pytest.raises(InputError, match="document/c/0/0 is damaged: it has 4 bytes, not 5"):
        Workdir(workdir.path, "quickstart").require(EMBEDDINGS)


def test_files_that_no_stage_reads_whole_are_left_to_the_audit(clip: Path):
    for name in ("tensorboard/events", "checkpoints/3/state"):
        (clip / name).write_text('{"width": 65}')
    artifact = Workdir(clip.parents[1], "quickstart").require(CLIP)
    found = damage(clip, artifact.manifest["files"], everything=True)
    assert {path.relative_to(clip).as_posix() for path, _ in found} == {"tensorboard/events", "checkpoints/3/state"}


@pytest.mark.parametrize("content", [b"", b"[]", b"7", b'{"stage": "cli', b"\xff\xfe", b"[" * 100_000, "flipped"])
def test_a_damaged_manifest_is_named(content: bytes | str, clip: Path):
    path = clip / MANIFEST
    if isinstance(content, str):
        content = path.read_bytes().replace(b'"config.json": [\n      13', b'"config.json": [\n      12')
        assert content != path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(
        InputError, match=rf"^{re.escape(str(path))} is damaged: [^\n]*; put back a copy, or run `rm -r"
    ):
        Workdir(clip.parents[1], "quickstart").require(CLIP)


def test_a_manifest_that_is_damaged_after_it_was_read_is_named_with_what_makes_it_again(clip: Path):
    workdir = Workdir(clip.parents[1], "quickstart", "my_config.py")
    workdir.require(CLIP)
    (clip / MANIFEST).write_bytes(b"7")
    with pytest.raises(InputError, match=r"is damaged: .* && rac3 prepare my_config\.py`"):
        workdir.require(CLIP).manifest  # noqa: B018


@pytest.mark.parametrize("content", ["", "[]", '{"config": "quick', "7"])
def test_a_damaged_owner_is_named_with_what_it_should_say(content: str, clip: Path):
    record = clip.parents[1] / OWNER
    record.write_text(content)
    with pytest.raises(
        InputError, match=rf"^{re.escape(str(record))} is damaged: .*of the config 'quickstart'"
    ) as error:
        Workdir(record.parent, "quickstart")
    command = str(error.value).split("`")[1]
    subprocess.run(command, shell=True, check=True)
    assert Workdir(record.parent, "quickstart").find(CLIP) is not None


def test_an_artifact_of_an_older_version_is_used_with_a_note(clip: Path, capsys: pytest.CaptureFixture[str]):
    path = clip / MANIFEST
    old = {name: value for name, value in json.loads(path.read_text()).items() if name not in ("files", "checksum")}
    path.write_text(json.dumps(old))
    workdir = Workdir(clip.parents[1], "quickstart")
    assert workdir.require(CLIP).manifest == old
    assert workdir.find(CLIP) is not None
    assert capsys.readouterr().err == (
        f"rac3: {clip} is from a version of rac3 that kept no record of its files; they, and others "
        "like them, are used as they are\n"
    )


def test_what_was_made_from_an_input_that_was_made_again_is_refused(full: Workdir):
    """The same recipe, but other files: fitting need not end with the same numbers on another machine."""
    clip, embeddings = full.require(CLIP).folder, full.require(EMBEDDINGS).folder
    with full.write(INDEX):
        pass
    shutil.rmtree(clip)
    Workdir(full.path, "quickstart").require(INDEX)  # the input is not there, and need not be
    with Workdir(full.path, "quickstart").write(CLIP):
        pass
    Workdir(full.path, "quickstart").require(INDEX)  # made again, with the same files
    shutil.rmtree(clip)
    with Workdir(full.path, "quickstart").write(CLIP) as draft:
        (draft.folder / "params").write_text("others")
    again = Workdir(full.path, "quickstart")
    again.require(DOCUMENTS)
    for recipe in (EMBEDDINGS, INDEX):
        with pytest.raises(
            InputError, match=rf"{embeddings} was made from another {clip}, .* run `rm -r {embeddings} && "
        ):
            again.require(recipe)


def test_a_first_write_that_fails_leaves_a_workdir_that_can_be_used(workdir: Workdir, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            workdir.write(RECIPE).__enter__()
    assert list(workdir.path.iterdir()) == []
    with Workdir(workdir.path, "quickstart").write(RECIPE):
        pass


@pytest.mark.parametrize(("largest", "found"), [(2, []), (3, ["index"])])
def test_very_large_files_are_hashed_by_the_audit_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest: int, found: list[str]
):
    monkeypatch.setattr("rac3.artifacts.files.LARGE", largest)
    (tmp_path / "index").write_bytes(b"abc")
    files = describe(tmp_path)
    (tmp_path / "index").write_bytes(b"abd")
    assert [path.name for path, _ in damage(tmp_path, files)] == found
    assert [path.name for path, _ in damage(tmp_path, files, everything=True)] == ["index"]
    (tmp_path / "index").write_bytes(b"ab")
    assert [path.name for path, _ in damage(tmp_path, files)] == ["index"]


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (Exception("No space left on device (os error 28)"), errno.ENOSPC),  # tokenizers
        (ValueError("Error writing [os_error_code='30']"), errno.EROFS),  # tensorstore
        (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC),  # NumPy
        (RuntimeError("write() failed: Disk quota exceeded; writing x"), errno.EDQUOT),  # array_record
        (ValueError("a number is wrong"), 0),
        (RuntimeError("I/O error"), 0),  # as ScaNN has it, but there is room
    ],
)
def test_a_library_may_name_what_the_system_refuses_as_it_likes(error: Exception, number: int, workdir: Workdir):
    with pytest.raises(OSError if number else type(error)) as raised, workdir.write(RECIPE):
        raise error
    if number:
        assert (raised.value.errno, raised.value.filename) == (number, str(workdir._partial(RECIPE)))


def test_a_disk_without_a_byte_left_is_the_reason(workdir: Workdir, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(OSError, match="No space left"), workdir.write(RECIPE):
        raise RuntimeError("I/O error")
