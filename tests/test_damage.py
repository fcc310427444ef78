"""Whatever happens to a file of a finished workdir, the stage that reads it ends with one line that names it."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from workdir_files import FILES, READERS, folder_of, linked, recipe_of

import rac3 as package
from rac3.artifacts.files import LOGS, READ_LATER
from rac3.config import InputError
from rac3.stages.audit_files import audit_files

WAYS = ("cut", "missing", "flipped", "empty")


def damage(path: Path, way: str) -> None:
    """A bit is flipped in the last byte before the middle that is not 0: zeros pad records, and nothing reads them."""
    data = bytearray(path.read_bytes())
    path.unlink()
    if way == "flipped" and data:
        place = next(place for place in range(len(data) // 2, -1, -1) if data[place])
        data[place] ^= 1
    if way != "missing":
        path.write_bytes({"cut": data[: len(data) // 2], "flipped": data, "empty": b""}[way])


@pytest.fixture(scope="module")
def shared(finished_workdir: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return linked(finished_workdir[1], tmp_path_factory.mktemp("damage") / "w")


@pytest.fixture
def harm(shared: Path, finished_workdir: tuple[Path, Path]) -> Iterator[Callable[[Path, str], None]]:
    """Damages a file of the shared workdir until the test ends."""
    harmed: list[Path] = []

    def harm(path: Path, way: str) -> None:
        harmed.append(path)
        damage(path, way)

    yield harm
    for path in harmed:
        path.unlink(missing_ok=True)
        os.link(finished_workdir[1] / path.relative_to(shared), path)


def test_the_table_has_every_file_of_a_workdir(finished_workdir: tuple[Path, Path]):
    run = package.load(finished_workdir[1])
    for stage, names in FILES.items():
        recorded = run.workdir.require(recipe_of(run, stage)).manifest["files"]
        assert set(names) == {name for name in recorded if name.split("/")[0] not in READ_LATER}, stage
    others = {path.name for path in finished_workdir[1].iterdir()} - FILES.keys()
    assert others <= {"workdir.json", "experiment.json", "report", "compiled"}


@pytest.mark.parametrize(
    ("stage", "name", "way"),
    [
        (stage, name, way)
        for stage, names in FILES.items()
        for name in names
        for way in WAYS
        if name != "rejects.jsonl" or way == "missing"  # it is empty
    ],
)
def test_a_reader_names_the_file(stage: str, name: str, way: str, shared: Path, harm: Callable[..., None]):
    run = package.load(shared)
    path = folder_of(run, stage) / name
    harm(path, way)
    with pytest.raises(InputError) as error:
        READERS[stage](run)
    again = rf"put back a copy, or run `rm -r {re.escape(str(folder_of(run, stage)))} && rac3 [^\n]+`"
    assert re.fullmatch(rf"{re.escape(str(path))} is (missing|damaged: [^\n]+); {again}", str(error.value))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stage", FILES)
def test_a_manifest_is_named(stage: str, way: str, shared: Path, harm: Callable[..., None]):
    run = package.load(shared)
    path = folder_of(run, stage) / "manifest.json"
    harm(path, way)
    with pytest.raises(
        InputError, match=rf"^{re.escape(str(path))} is (missing|damaged: [^\n]+); put back a copy, or "
    ):
        READERS[stage](run)


@pytest.mark.usefixtures("collects")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("way", ["cut", "missing", "empty"])  # for a flipped bit see tests/training/test_checkpoint.py
def test_the_files_of_the_newest_checkpoint_are_named(way: str, shared: Path, harm: Callable[..., None]):
    """The message names the checkpoint, a folder whose files hold parts of many arrays each."""
    run = package.load(shared)
    folder = folder_of(run, "train") / "checkpoints" / "6"
    for path in (folder / "state").rglob("d/*"):
        harm(path, way)
    with pytest.raises(InputError, match=rf"^checkpoint {re.escape(str(folder))} is damaged \([^\n]+put back a copy"):
        run.params  # noqa: B018


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["workdir.json", "experiment.json"])
def test_a_record_of_the_workdir_is_named(
    name: str, way: str, shared: Path, harm: Callable[..., None], finished_workdir: tuple[Path, Path]
):
    harm(shared / name, way)
    if (name, way) == ("workdir.json", "flipped"):  # in what it says
        (shared / name).write_text((finished_workdir[1] / name).read_text().replace("tiny", "tinx"))
    if (name, way) == ("workdir.json", "missing"):
        with pytest.raises(InputError, match="holds files that rac3 did not write, such as best; "):
            package.load(shared)
        return
    says = {"workdir.json": "is damaged: .*of the config", "experiment.json": "is damaged|so it is no workdir"}
    with pytest.raises(InputError, match=rf"^{re.escape(str(shared))}.*{says[name]}"):
        package.load(shared)


@pytest.mark.parametrize(
    ("file", "stage", "way"),
    [
        ("embeddings/document/c/0/0", "index", "missing"),
        ("neighbors/ids/c/0/0/0", "train", "missing"),
        ("queries/text/c/0/0", "retrieve", "flipped"),
        ("vqgan/params.safetensors", "ingest", "flipped"),
        ("documents/manifest.json", "ingest", "missing"),
        ("documents/000000.array_record", "embed", "cut"),
    ],
)
def test_a_command_ends_with_that_line(
    file: str,
    stage: str,
    way: str,
    tmp_path: Path,
    finished_workdir: tuple[Path, Path],
    rac3: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
):
    """Where it would make its artifact, and where that is made: nothing passes for current on what is damaged."""
    kind, _, name = file.partition("/")
    damaged = linked(finished_workdir[1], tmp_path / "w")
    path = folder_of(package.load(damaged), kind) / name
    damage(path, way)
    made = {"index": "index", "train": "train", "retrieve": "neighbors", "ingest": "documents", "embed": "queries"}
    if made[stage] != kind:
        for folder in (damaged / made[stage]).iterdir():
            shutil.rmtree(folder)
    assert rac3(stage, str(finished_workdir[0]), "--workdir", str(damaged)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rac3: ")]
    assert len(lines) == 1
    assert lines[0].startswith(f"rac3: {path} is ")
    config = rf"\S*{finished_workdir[0].name}"  # wherever it was when the workdir was made
    assert re.search(rf"&& rac3 \w+ {config} --workdir {re.escape(str(damaged))}`$", lines[0])


def test_the_audit_names_all_that_is_damaged(
    shared: Path, harm: Callable[..., None], capsys: pytest.CaptureFixture[str]
):
    run = package.load(shared)
    assert re.fullmatch(
        r"audit: \d+ files of 31 artifacts, [\d.]+ MB: all as they were written", audit_files(run.workdir)
    )
    capsys.readouterr()
    checkpoint = next((folder_of(run, "train") / "checkpoints" / "3").rglob("ocdbt*/d/*"))
    harmed = {
        folder_of(run, "embeddings") / "document/c/0/0": "flipped",
        folder_of(run, "documents") / "000000.u2": "flipped",
        folder_of(run, "documents") / "000000.array_record": "flipped",
        folder_of(run, "clip") / "params.safetensors": "flipped",
        folder_of(run, "neighbors") / "scores/c/0/0/0": "missing",
        folder_of(run, "queries") / "manifest.json": "cut",
        checkpoint: "flipped",
    }
    for path, way in harmed.items():
        harm(path, way)
    with pytest.raises(
        InputError, match=rf"^\d+ of the files in {re.escape(str(shared))} are missing or damaged; first: "
    ):
        audit_files(package.load(shared).workdir)
    named = {Path(line.split()[1]) for line in capsys.readouterr().err.splitlines() if line.startswith("rac3: ")}
    assert named == harmed.keys()


def test_logs_do_not_tell_artifacts_apart():
    assert LOGS == ("metrics.jsonl", "tensorboard")
