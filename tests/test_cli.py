"""The command: bad input costs one line and nothing else; retrievers are swapped; a killed run goes on."""

import hashlib
import importlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import ROOT, started, wait_until

from rac3 import recipes
from rac3.artifacts.arrays import read_array
from rac3.artifacts.workdir import MANIFEST, Workdir
from rac3.cli import STAGES, TrainOptions, _preparing, load_experiment, parse
from rac3.config import InputError, load_config_module
from rac3.documents.webdataset import WebDataset
from rac3.execution.local import Local
from rac3.execution.ray import Ray
from rac3.experiment import Experiment
from rac3.experiment_file import EXPERIMENT
from rac3.retrieval.baselines import NoRetriever, Random
from rac3.retrieval.exact import Exact
from rac3.retrieval.faiss import Faiss
from rac3.retrieval.fixed import Fixed
from rac3.retrieval.retriever import Queries
from rac3.retrieval.scann import Scann
from rac3.retrieval.selection import Selection
from rac3.run import Run

TINY = str(ROOT / "tests" / "tiny_config.py")
COMMAND = [sys.executable, "-c", "from rac3.cli import main; main()"]

Refused = Callable[..., str]
Command = Callable[..., int]


def tree(folder: Path) -> dict[str, str]:
    """Every file below `folder`, by the hash of its bytes."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def tiny() -> Experiment:
    return load_config_module(TINY).get_config()


@pytest.fixture
def refused(rac3: Command, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must fail with one line and exit code 2, and leave `workdir` as it was; gives the line."""

    def run(*arguments: str, workdir: Path | None = None) -> str:
        before = tree(workdir) if workdir else {}
        capsys.readouterr()
        code = rac3(*arguments, *(["--workdir", str(workdir)] if workdir else []))
        progress = re.compile(r"(read|fit|index|ingest|embed|retrieve|train)\b")
        lines = [line for line in capsys.readouterr().err.splitlines() if not progress.match(line)]
        assert code == 2
        assert len(lines) == 1, lines
        assert lines[0].startswith("rac3: ")
        if workdir:
            after = tree(workdir)
            assert before.items() <= after.items()
            assert all(".partial/" in name or name.endswith(".lock") for name in after.keys() - before.keys())
        return lines[0]

    return run


def write_config(path: Path, body: str) -> str:
    """A config of a user's own that starts from the tiny one, `tiny`."""
    head = "from dataclasses import dataclass, replace\nfrom rac3.config import load_config_module\n"
    path.write_text(f"{head}tiny = load_config_module({TINY!r}).get_config()\n{body}", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["pretrain", TINY], "'pretrain' is unknown; use one of encoders, ingest, "),
        (["train"], "needs a config"),
        (["train", "nowhere.py"], "'nowhere.py' does not exist"),
        (["train", "slowstart"], "shipped config; use one of: emoji_captions, quickstart"),
        (["train", TINY, "--modle.num-layers", "2"], "--modle.num-layers"),
        (["train", TINY, "--model.num-layers", "two"], "two"),
        (["train", TINY, "--model.dtype", "float31"], "float31"),
        (["train", TINY, "retriever:bm42"], "bm42"),
        (["train", TINY, "--mesh.fsdp", "3"], "does not fit the 8 devices"),
        (["generate", TINY, "--samples", "0"], "samples=0"),
        (["encoders", TINY, "--clip.checkpoint", "/nowhere"], "clip checkpoint '/nowhere' is not a folder"),
        (["ingest", "emoji_captions", "--data-dir", "/nowhere"], "'/nowhere/train' does not exist"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], says: str, refused: Refused):
    assert says in refused(*arguments)


@pytest.mark.parametrize(
    "numbers",
    [
        "--seed -1",
        f"--seed {2**63}",
        "--optimizer.b1 1",
        "--batches.read-threads 0",
        "--vqgan.model.out-ch 0",
        "--clip.model.text-config.intermediate-size 0",
        "--max-reject-fraction 2",
        "--max-text-tokens 0",
        "--query-dropout 1",
        "--text.vocab-size 10",
        "--vqgan.model.resolution 41",
        "--vqgan.fit.batch 0",
        "--clip.model.vision-config.patch-size 0",
        "--clip.model.text-config.num-attention-heads 3",
        "--clip.image-crop 2",
        "--retriever.num-neighbors 0",
        "--selection.depth 0",
        "--selection.depth 1",
        "--batches.context-length 0",
        "--batches.row-length 100",
        "--batches.rows 0",
        "--batches.num-retrieved -1",
        "--batches.num-retrieved 9",
        "--batches.masking.mean-spans -1",
        "--model.num-heads 3",
        "--model.num-layers 0",
        "--model.embed 0",
        "--optimizer.peak-lr -1",
        "--optimizer.warmup-steps -1",
        "--training.steps 0",
        "--training.checkpoint-every 0",
        "--mesh.data 0",
        "--evaluation.documents 0",
        "--evaluation.num-retrieved -1",
        "--evaluation.image-samples 0",
        "--evaluation.image-sampling.top-p 0",
        "--evaluation.caption-sampling.temperature -1",
        "--evaluation.max-caption-tokens 0",
        "--evaluation.max-caption-tokens 257",
    ],
)
def test_numbers_out_of_range_are_refused(numbers: str, refused: Refused, tmp_path: Path):
    key, value = numbers.split()
    line = refused("ingest", TINY, key, value, "--workdir", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
    assert "is missing" not in line
    assert key.split(".")[-1].lstrip("-") in line.replace("_", "-")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("def get_config():\n    return replace(tiny, lerning_rate=1)", "lerning_rate"),
        ("def get_config():\n    return 3", "returns int, not an Experiment"),
        ("def get_config():\n    return replace(tiny, query_dropout=2.0)", "query_dropout=2"),
        ("import nowhere", "No module named 'nowhere'"),
        ("import sys\nsys.exit()", "fails to import: SystemExit"),
        ("def get_config():\n    raise SystemExit(0)", "get_config() of"),
        ("def get_config():\n    raise ValueError('two\\nlines')", "ValueError: two lines"),
        (
            "def get_config():\n    return replace(tiny, seed=2**70)",
            "seed=1180591620717411303424 needs more than 64 bits",
        ),
    ],
)
def test_a_broken_config_is_refused(body: str, says: str, refused: Refused, tmp_path: Path):
    assert says in refused("train", write_config(tmp_path / "mine.py", body))


KINDS = {
    "replace(tiny, data=None)": "data=None is no Data; give one",
    "replace(tiny, data=replace(tiny.data, train='folder'))": "data.train='folder' is no Source; give one",
    "replace(tiny, data=replace(tiny.data, train=type(tiny.data.train)))": "data.train is the class World; give",
    "replace(tiny, executor='ray')": "executor='ray' is no ",
    "replace(tiny, clip=type(tiny.clip))": "clip is the class FrozenCLIP; give an object of it: FrozenCLIP(...)",
    "replace(tiny, retriever=lambda: 0)": "is no Retriever; give one",
    "replace(tiny, training=replace(tiny.training, steps='7'))": "fails: TypeError: ",
}


def test_a_setting_of_another_kind_is_one_line(tmp_path: Path):
    """In its own process: in this one every call checks its types."""
    files = [write_config(tmp_path / f"c{n}.py", f"def get_config():\n    return {x}") for n, x in enumerate(KINDS)]
    script = (
        "import sys\nfrom rac3.cli import main\n"
        "for file in sys.argv[1:]:\n"
        "    sys.argv = ['rac3', 'train', file]\n"
        "    try:\n        main()\n"
        "    except SystemExit as stop:\n        print(stop.code, file=sys.stderr)\n"
    )
    command = [sys.executable, "-c", script.replace("sys.argv[1:]", "list(sys.argv[1:])"), *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    assert len(lines) == 2 * len(KINDS), done.stderr
    for says, line, code in zip(KINDS.values(), lines[::2], lines[1::2], strict=True):
        assert line.startswith("rac3: ")
        assert says in line
        assert code == "2"


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("file", "File exists|Not a directory"),
        ("x" * 300, "File name too long"),
    ],
)
def test_what_the_system_refuses_is_one_line(
    place: str, says: str, rac3: Command, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    """A folder that can't be made, under the name of a file, say."""
    (tmp_path / "file").touch()
    workdir = tmp_path / place / "w"
    assert rac3("encoders", TINY, "--workdir", str(workdir)) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rac3: ")]
    assert len(lines) == 1
    assert re.fullmatch(rf"rac3: ({says}): {tmp_path / place}\S*; .*, and run the same command to go on", lines[0])


def test_a_workdir_of_another_config_is_refused(refused: Refused, workdir: Path):
    assert "was made by config 'tiny', not 'quickstart'" in refused("train", "quickstart", workdir=workdir)


def test_a_source_without_shards_is_refused(refused: Refused, tmp_path: Path):
    (tmp_path / "data" / "train").mkdir(parents=True)
    line = refused("encoders", "emoji_captions", "--data-dir", str(tmp_path / "data"), workdir=tmp_path / "new")
    assert "holds no .tar file" in line


def test_a_source_whose_every_document_is_filtered_is_refused(refused: Refused, tmp_path: Path, workdir: Path):
    body = """
class Small:
    def shards(self, data_dir): return tiny.data.train.shards(data_dir)
    def read(self, data_dir, shard):
        for document in tiny.data.train.read(data_dir, shard):
            yield replace(document, metadata={"width": 16, "height": 16})
Small = dataclass(frozen=True)(Small)
def get_config(): return replace(tiny, data=replace(tiny.data, SPLIT=Small()))
"""
    config = write_config(tmp_path / "train.py", body.replace("SPLIT", "memory={}, fit_on=('train',), train"))
    assert "no documents that pass the filter" in refused("encoders", config, workdir=tmp_path / "new")
    config = write_config(tmp_path / "validation.py", body.replace("SPLIT", "validation"))
    assert "gives no documents (0 damaged, 36 filtered)" in refused("ingest", config, workdir=workdir)


def test_more_leaves_than_documents_are_refused(refused: Refused, workdir: Path):
    arguments = ["--workdir", str(workdir), "retriever:scann", "--retriever.num-leaves", "4000"]
    before = tree(workdir)
    assert "num_leaves=4000 exceeds the 36 documents" in refused("index", TINY, *arguments)
    assert before.items() <= tree(workdir).items()


def test_a_context_that_no_document_fits_in_is_refused(refused: Refused, workdir: Path):
    line = refused("train", TINY, "--batches.context-length", "20", workdir=workdir)
    assert "20" in line
    assert "context_length" in line


@pytest.mark.parametrize("prompt", [[], ["--prompt", ""], ["--prompt", "  "]])
def test_a_prompt_without_text_is_refused(prompt: list[str], refused: Refused, workdir: Path):
    assert "give --prompt TEXT or --image FILE" in refused("generate", TINY, *prompt, workdir=workdir)


def test_a_text_and_an_image_need_a_task(refused: Refused, workdir: Path):
    line = refused("generate", TINY, "--prompt", "a", "--image", "b.png", workdir=workdir)
    assert "say what to do: --task" in line


def test_an_image_that_is_none_is_refused(refused: Refused, workdir: Path, tmp_path: Path):
    assert "does not exist" in refused("generate", TINY, "--image", str(tmp_path / "a.png"), workdir=workdir)
    (tmp_path / "a.png").write_bytes(b"no image")
    assert "cannot be read" in refused("generate", TINY, "--image", str(tmp_path / "a.png"), workdir=workdir)


def test_a_checkpoint_of_another_model_is_refused(refused: Refused, workdir: Path):
    experiment = tiny()
    other = replace(experiment, model=replace(experiment.model, mlp=32))
    folder = workdir / "train"
    trained = folder / recipes.train(experiment).fingerprint
    shutil.copytree(trained, folder / recipes.train(other).fingerprint)
    assert "is that of another artifact" in refused(
        "evaluate", TINY, "--model.mlp", "32", "--no-compare-with-cm3", workdir=workdir
    )
    wide = replace(experiment, model=replace(experiment.model, mlp=48))
    shutil.copytree(trained / "checkpoints", folder / f"{recipes.train(wide).fingerprint}.partial" / "checkpoints")
    assert "is of another model" in refused("train", TINY, "--model.mlp", "48", workdir=workdir)


def test_a_missing_input_names_the_command_that_makes_it(refused: Refused, tmp_path: Path):
    """All of it: one command, not the next of five."""
    new = tmp_path / "new"
    places = f"{TINY} --seed 1 --workdir {new}"
    helps = dict.fromkeys(("ingest", "embed", "index", "retrieve", "train", "audit"), "prepare")
    for stage, command in (helps | {"evaluate": "run", "report": "run"}).items():
        line = refused(stage, TINY, "--seed", "1", "--workdir", str(new))
        assert line.endswith(f" is missing in {new}; run `rac3 {command} {places}`")
    line = refused("evaluate", TINY, "--task", "retrieval", "--workdir", str(new))
    assert line.endswith(f"run `rac3 prepare {TINY} --workdir {new}`")
    own = ["--prompt", "a fox", "--seed", "7", "retriever:exact", "--retriever.num-neighbors", "4"]
    line = refused("generate", TINY, "--text.vocab-size", "290", "--workdir", str(new), *own)
    assert line.endswith(f"; run `rac3 run {TINY} --text.vocab-size 290 --workdir {new}`")
    assert not new.exists()


def test_the_real_command_says_one_line_too(tmp_path: Path):
    done = subprocess.run(
        [*COMMAND, "train", TINY, "--workdir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "rac3 prepare" in done.stderr


def test_help_lists_what_can_be_set(rac3: Command, capsys: pytest.CaptureFixture[str]):
    assert rac3("--help") == 0
    assert "quickstart" in capsys.readouterr().out
    assert rac3("train", TINY, "--help") == 0
    out = capsys.readouterr().out
    assert "--optimizer.peak-lr" in out
    assert "retriever:exact" in out
    assert "--data.train" not in out
    assert rac3("train", "--help") == 0  # of any config: that of the quickstart
    assert "--optimizer.peak-lr" in capsys.readouterr().out


OWN_FLAGS = {
    "encoders": {"--report", "--report-images"},
    "evaluate": {"--task"},
    "generate": {
        *(
            "--task",
            "--prompt",
            "--image",
            "--mask",
            "--documents",
            "--follow",
            "--labels",
            "--scored",
            "--prompts",
            "--retrieve",
            "--ensemble",
        ),
        *("--samples", "--seed", "--temperature", "--top-p", "--top-k", "--guidance", "--guidance-without"),
        *("--copying", "--out"),
    },
}


@pytest.mark.parametrize("stage", sorted(set(STAGES) - {"quickstart"}))
def test_the_help_of_a_stage_begins_with_its_own_options(
    stage: str, rac3: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Each once and with what it is, and none of another stage."""
    monkeypatch.setenv("COLUMNS", "100")
    assert rac3(stage, TINY, "--help") == 0
    flags = re.findall(r"^\W*(?:-h, )?(--[a-z][\w.-]*)[^\n]*\n\W+(\w[^\n]+)", capsys.readouterr().out, re.M)
    names = [name for name, _ in flags]
    assert names[0] == "--help"
    own = OWN_FLAGS.get(stage, set())
    assert set(names[1 : 1 + len(own)]) == own
    others = {name for flags in OWN_FLAGS.values() for name in flags} - own - {"--seed"}
    assert not others & set(names)
    assert len(names) == len(set(names))
    described = {name: text for name, text in flags if name in own or name in ("--takedowns", "--add-memory")}
    assert len(described) == len(own) + 2
    assert not [name for name, text in described.items() if text.startswith("(default") or "Attributes" in text]


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["evalute", TINY], "evaluate"),
        (["trian", TINY], "train"),
        (["bake", TINY], None),
        (["train", TINY, "--trainig.steps", "3"], "--training.steps"),
        (["train", TINY, "--trainig.steps=3"], "--training.steps"),
        (["train", TINY, "--clip.model.vision-config.hidden-siz", "8"], "--clip.model.vision-config.hidden-size"),
        (["train", TINY, "--steps", "3"], "--clip.fit.steps or --training.steps or --vqgan.fit.steps"),
        (["generate", TINY, "--promt", "a fox"], "--prompt"),
        (["train", TINY, "--zzzz", "3"], None),
        (["evaluate", TINY, "retriever:exakt"], "retriever:exact"),
        (["evaluate", TINY, "exact"], "retriever:exact"),
        (["evaluate", TINY, "retriever:exact", "--retriever.dtipe", "float32"], "--retriever.dtype"),
        (["evaluate", TINY, "retriever:zzzz"], None),
        (["evaluate", TINY, "nonsense"], None),
    ],
)
def test_a_word_that_is_near_a_known_one_is_asked_after(arguments: list[str], meant: str | None, refused: Refused):
    line = refused(*arguments)
    assert re.findall(r"; did you mean (.*)\?", line) == ([] if meant is None else [meant])


@pytest.mark.parametrize("option", ["--" + "a" * 5000, "--seed", "--training.steps", "--add-memory"])
def test_a_long_argument_is_quoted_in_part(option: str):
    with pytest.raises(InputError) as error:
        parse("train", tiny(), [option, "b" * 5000])
    assert len(str(error.value)) < 600


def test_a_retriever_of_the_command_line_takes_its_options():
    options = ["--retriever.factory", "IVF16,PQ8", "--retriever.search", "nprobe=4"]
    experiment, _ = parse("evaluate", tiny(), ["retriever:faiss", *options])
    assert experiment.retriever == Faiss(factory="IVF16,PQ8", search="nprobe=4")


def test_a_retriever_of_the_command_line_starts_from_its_own_defaults():
    """But the config's own from what the config says; without a name, options are those of the config's retriever."""
    configured = replace(tiny(), retriever=Scann(num_neighbors=24, spherical=False))
    for arguments, expected in (
        ([], configured.retriever),
        (["retriever:scann"], configured.retriever),
        (["retriever:scann", "--retriever.num-neighbors", "9"], Scann(num_neighbors=9, spherical=False)),
        (["--retriever.num-neighbors", "9"], Scann(num_neighbors=9, spherical=False)),
        (["retriever:exact"], Exact()),
        (["retriever:random", "--retriever.seed", "3"], Random(seed=3)),
        (["retriever:none"], NoRetriever()),
    ):
        assert parse("evaluate", configured, arguments)[0].retriever == expected, arguments


OVERRIDES = {
    "--seed 3": {"seed": 3},
    "--workdir elsewhere": {"workdir": "elsewhere"},
    "--data-dir data": {"data_dir": "data"},
    "--takedowns keys.txt": {"takedowns": "keys.txt"},
    "--takedowns-missing-ok": {"takedowns_missing_ok": True},
    "--framing pad-border": {"framing": "pad-border"},
    "--num-views 2": {"num_views": 2},
    "--embedding-dtype int8": {"embedding_dtype": "int8"},
    "--no-compare-with-cm3": {"compare_with_cm3": False},
    "--query-dropout 0.25": {"query_dropout": 0.25},
    "--filter.min-side 99": {"filter": {"min_side": 99}},
    "--text.vocab-size 999": {"text": {"vocab_size": 999}},
    "--vqgan.model.ch-mult 1 2": {"vqgan": {"model": {"ch_mult": (1, 2)}}},
    "--vqgan.fit.steps 99": {"vqgan": {"fit": {"steps": 99}}},
    "--vqgan.objective.adversarial.ndf 8": {"vqgan": {"objective": {"adversarial": {"ndf": 8}}}},
    "--clip.dtype bfloat16": {"clip": {"dtype": "bfloat16"}},
    "--clip.fit.peak-lr 0.5": {"clip": {"fit": {"peak_lr": 0.5}}},
    "--clip.model.vision-config.layer-norm-eps 0.5": {"clip": {"model": {"vision_config": {"layer_norm_eps": 0.5}}}},
    "--clip.tokenizer.vocab-size 998": {"clip": {"tokenizer": {"vocab_size": 998}}},
    "--retriever.num-leaves 5": {"retriever": {"num_leaves": 5}},
    "--selection.max-similarity 0.5": {"selection": {"max_similarity": 0.5}},
    "--batches.num-retrieved 0 2": {"batches": {"num_retrieved": (0, 2)}},
    "--batches.retrieved image": {"batches": {"retrieved": "image"}},
    "--batches.masking.max-spans 3": {"batches": {"masking": {"max_spans": 3}}},
    "--model.remat full": {"model": {"remat": "full"}},
    "--optimizer.b1 0.5": {"optimizer": {"b1": 0.5}},
    "--optimizer.b2 0.625": {"optimizer": {"b2": 0.625}},
    "--training.log-every 9": {"training": {"log_every": 9}},
    "--mesh.tensor 2": {"mesh": {"tensor": 2}},
    "--evaluation.image-sampling.top-p 0.5": {"evaluation": {"image_sampling": {"top_p": 0.5}}},
    "--evaluation.caption-sampling.top-p 0.75": {"evaluation": {"caption_sampling": {"top_p": 0.75}}},
    "--evaluation.no-control": {"evaluation": {"control": False}},
    "--cluster.gpus 8": {"cluster": {"gpus": 8}},
    "--local.threads 7": {"executor": {"threads": 7}},
}


def updated(value: Any, changes: dict[str, Any]) -> Any:
    """A dataclass with some fields of it, and of those in it, replaced."""
    return replace(
        value,
        **{name: updated(getattr(value, name), to) if isinstance(to, dict) else to for name, to in changes.items()},
    )


def test_every_override_reaches_its_field_and_no_other():
    expected = tiny()
    for changes in OVERRIDES.values():
        expected = updated(expected, changes)
    experiment, options = parse("train", tiny(), " ".join(OVERRIDES).split())
    assert experiment == expected
    assert options == TrainOptions()
    assert parse("train", tiny(), [])[0] == tiny()


def test_the_last_of_two_overrides_counts():
    assert parse("train", tiny(), ["--seed", "1", "--model.mlp", "8", "--seed", "2"])[0].seed == 2


def test_the_executor_of_the_config_stays_unless_another_is_named():
    ray = replace(tiny(), executor=Ray(workers=3, threads=2))
    for configured, arguments, expected in (
        (tiny(), [], Local()),
        (tiny(), ["--executor", "ray", "--ray.workers", "5"], Ray(workers=5)),
        (ray, [], ray.executor),
        (ray, ["--ray.threads", "1"], Ray(workers=3, threads=1)),
        (ray, ["--executor", "local"], Local()),
    ):
        assert parse("embed", configured, arguments)[0].executor == expected


def test_the_memory_of_the_command_line_joins_that_of_the_config():
    both = replace(tiny().data.memory["memory"], seed=5)
    configured = replace(tiny(), data=replace(tiny().data, memory={**tiny().data.memory, "old": both}))
    configured = replace(configured, data=replace(configured.data, withdrawn=("old",)))
    arguments = ["--add-memory", "news=/data/a=b", "more=x", "--withdraw-memory", "memory"]
    data = parse("evaluate", configured, arguments)[0].data
    assert dict(data.memory) == {
        **configured.data.memory,
        "news": WebDataset("/data/a=b"),
        "more": WebDataset("x"),
    }
    assert data.withdrawn == ("old", "memory")
    assert list(data.sources()) == ["train", "news", "more", "validation", "tuning", "test"]
    assert parse("evaluate", configured, [])[0] == configured


@pytest.mark.parametrize(
    ("stage", "arguments", "kept"),
    [
        ("train", "c.py --seed 1 --takedowns k retriever:exact", "c.py --seed 1 --takedowns k retriever:exact"),
        (
            "evaluate",
            "c.py --task retrieval --seed 1 --takedowns k retriever:exact --retriever.dtype x",
            "c.py --seed 1",
        ),
        ("evaluate", "c.py --task few-shot --seed 1 retriever:exact", "c.py --seed 1"),
        ("evaluate", "c.py --takedowns=k --retriever.num-neighbors 4 --workdir w", "c.py --workdir w"),
        (
            "generate",
            "c.py --prompt 'a fox' --seed 1 --model.mlp 8 --samples 2 retriever:fixed --retriever.keys a b",
            "c.py --model.mlp 8",
        ),
        ("report", "c.py retriever:exact --takedowns k --training.steps 3", "c.py --training.steps 3"),
        ("encoders", "c.py --report --report-images 4 --seed 1", "c.py --seed 1"),
        ("index", "'my config.py' --seed 1", "'my config.py' --seed 1"),
    ],
)
def test_the_command_for_an_earlier_stage_leaves_out_what_is_of_this_one(stage: str, arguments: str, kept: str):
    """What is named at inference is not what the model was trained with."""
    assert _preparing(stage, shlex.split(arguments)) == kept


CALLS = {
    "rac3.stages.encoders": ("fit_encoders",),
    "rac3.stages.ingest": ("ingest", "counts_line"),
    "rac3.stages.embed": ("embed",),
    "rac3.stages.retrieve": ("index", "retrieve", "shortage_line"),
    "rac3.stages.train": ("train",),
    "rac3.stages.audit": ("audit",),
    "rac3.stages.evaluate": ("evaluate",),
    "rac3.stages.evaluate_coco": ("coco_splits", "evaluate_coco"),
    "rac3.stages.evaluate_few_shot": ("evaluate_few_shot",),
    "rac3.stages.evaluate_infilling": ("evaluate_infilling",),
    "rac3.stages.evaluate_knowledge": ("evaluate_knowledge",),
    "rac3.stages.evaluate_retrieval": ("evaluate_retrieval",),
    "rac3.stages.reference": ("reference",),
    "rac3.stages.generate": ("generate",),
    "rac3.plan.offline": ("plan",),
    "rac3.plan.training": ("training_plan",),
    "rac3.report.experiment": ("collect", "report", "summary"),
    "rac3.report.coco": ("coco_report", "coco_summary"),
    "rac3.report.encoders": ("encoders_report",),
    "rac3.report.few_shot": ("few_shot_report", "few_shot_summary"),
    "rac3.report.infilling": ("infilling_report", "infilling_summary"),
    "rac3.report.knowledge": ("knowledge_report", "knowledge_summary"),
    "rac3.report.retrieval": ("retrieval_report", "retrieval_summary"),
    "rac3.vqgan.published": ("require_decoder",),
    "rac3.cli": ("describe",),
}
Called = list[tuple[str, tuple[Any, ...]]]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Called:
    """The functions that do the work only note that they are called, and with what."""
    calls: Called = []

    def note(name: str) -> Callable[..., str]:
        return lambda *arguments: calls.append((name, arguments)) or f"<{name}>"

    for module, names in CALLS.items():
        for name in names:
            monkeypatch.setattr(importlib.import_module(module), name, note(name))
    monkeypatch.setattr("rac3.stages.evaluate.best_step", lambda run: 3)
    return calls


CM3S = ["cm3_best", "cm3"]
ENCODERS, INGEST = ["fit_encoders", "describe"], ["ingest", "describe", *["counts_line"] * 5]
RETRIEVE = ["retrieve", *["shortage_line"] * 4]
PREPARE = [*ENCODERS, *INGEST, "embed", "describe", "index", *RETRIEVE]
TRAIN = ["train", "describe", "train"]
# The model, both CM3s, and the control.
EVALUATE = [*["index", "retrieve", "reference", "evaluate"] * 4, "collect", "summary"]


@pytest.mark.parametrize(
    ("stage", "arguments", "expected"),
    [
        ("encoders", [], ENCODERS),
        ("encoders", ["--report"], [*ENCODERS, "encoders_report"]),
        ("ingest", [], INGEST),
        ("embed", [], ["embed", "describe"]),
        ("index", [], ["index"]),
        ("retrieve", [], RETRIEVE),
        ("prepare", [], PREPARE),
        ("audit", [], ["audit"]),
        ("train", [], TRAIN),
        ("train", ["--no-compare-with-cm3"], TRAIN[:2]),
        ("evaluate", [], EVALUATE),
        ("evaluate", ["--no-compare-with-cm3"], EVALUATE[8:]),
        ("evaluate", ["--no-compare-with-cm3", "--evaluation.no-control"], EVALUATE[12:]),
        (
            "evaluate",
            ["--task", "retrieval", "--mesh.fsdp", "3"],  # a mesh that no model could use, and none is needed
            ["index", "retrieve", "evaluate_retrieval", "retrieval_summary", "retrieval_report"],
        ),
        (
            "evaluate",
            ["--task", "infilling"],
            [*["index", "retrieve", "evaluate_infilling"] * 4, "infilling_summary", "infilling_report"],
        ),
        (
            "evaluate",
            ["--task", "coco"],
            ["coco_splits", *[*EVALUATE[:3], "evaluate_coco"] * 4, "coco_summary", "coco_report"],
        ),
        (
            "evaluate",
            ["--task", "knowledge"],
            [*["index", "retrieve"] * 4, "evaluate_knowledge", "knowledge_summary", "knowledge_report"],
        ),
        ("evaluate", ["--task", "few-shot"], [*["evaluate_few_shot"] * 3, "few_shot_summary", "few_shot_report"]),
        ("generate", ["--prompt", "a fox"], ["index", "generate"]),
        ("report", [], ["report"]),
        ("plan", ["--mesh.fsdp", "3"], ["plan", "training_plan"]),
        ("run", [], [*PREPARE, *TRAIN, *EVALUATE, "report"]),
    ],
)
def test_a_stage_does_its_own_work_and_no_other(
    stage: str, arguments: list[str], expected: list[str], called: Called, rac3: Command, tmp_path: Path
):
    assert rac3(stage, TINY, "--workdir", str(tmp_path / "new"), "--batches.rows", "4", *arguments) == 0
    assert [name for name, _ in called] == expected
    for name, given in called:
        values = [value for each in given for value in (each.values() if isinstance(each, dict) else [each])]
        runs = [each for each in values if isinstance(each, Run)]
        assert all((run.experiment.batches.rows, run.trained.batches.rows) == (4, 4) for run in runs), name
        assert all(run.workdir.path == tmp_path / "new" for run in runs), name
        assert runs or name.endswith("summary")


@pytest.mark.parametrize(("task", "models"), [("infilling", 4), ("few-shot", 3), ("coco", 4)])
def test_each_model_does_a_task_once(
    task: str, models: int, called: Called, rac3: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Few-shot retrieves nothing, so that the model with random documents is the model."""
    new = ["--workdir", str(tmp_path / "new")]
    assert rac3("evaluate", TINY, "--task", task, *new, "retriever:exact") == 0
    own, name = replace(tiny(), workdir=str(tmp_path / "new")), task.replace("-", "_")
    ran = [given[0] for done, given in called if done == f"evaluate_{name}"]
    trained = [own, own.vanilla(), own.vanilla(), own][:models]
    assert [run.trained for run in ran] == trained
    metrics = [given[0] for done, given in called if done == f"{name}_summary"]
    labels = ["ra_cm3", "cm3_best", "cm3"] if task == "few-shot" else ["ra_cm3_exact", *CM3S, "ra_cm3_random"]
    assert [run.step for run in ran] == [None, 3, None, None][:models]
    assert metrics == [dict.fromkeys(labels, f"<evaluate_{name}>")]
    assert capsys.readouterr().out.splitlines()[-3:-1] == [f"<{name}_summary>", f"report: <{name}_report>"]


def test_all_models_are_judged_together(called: Called, rac3: Command, tmp_path: Path):
    """After each has its neighbors on the held-out splits."""
    assert rac3("evaluate", TINY, "--task", "knowledge", "--workdir", str(tmp_path / "new"), "retriever:exact") == 0
    models = next(given[0] for name, given in called if name == "evaluate_knowledge")
    assert list(models) == ["ra_cm3_exact", *CM3S, "ra_cm3_random"]
    searched = [given for name, given in called if name == "retrieve"]
    assert [(id(run), splits) for run, splits in searched] == [
        (id(run), ("validation", "test")) for run in models.values()
    ]
    (shown,) = [given for name, given in called if name == "knowledge_report"]
    assert shown == (models, "<evaluate_knowledge>")


def test_the_model_is_evaluated_beside_cm3_and_with_random_documents(called: Called, rac3: Command, tmp_path: Path):
    """Each is indexed and searched for before it is evaluated; the last two take nothing from the command line."""
    assert rac3("evaluate", TINY, "--workdir", str(tmp_path / "new"), "retriever:exact") == 0
    work = [(name, given) for name, given in called if name in ("index", "retrieve", "evaluate")]
    for first in (0, 3, 6, 9):
        assert len({id(given[0]) for _, given in work[first : first + 3]}) == 1
        assert work[first + 1][1][1] == ("validation", "test")  # of train, neighbors are there since it was trained on
    own = replace(tiny(), workdir=str(tmp_path / "new"))
    exact, random = (replace(own, retriever=kind(num_neighbors=Exact().num_neighbors)) for kind in (Exact, Random))
    runs = [given[0] for name, given in work if name == "evaluate"]
    assert [(run.experiment, run.trained) for run in runs] == [
        (exact, own),
        (own.vanilla(), own.vanilla()),
        (own.vanilla(), own.vanilla()),
        (random, own),
    ]


def test_the_options_of_a_stage_reach_it(called: Called, rac3: Command, tmp_path: Path):
    place = ["--workdir", str(tmp_path / "new")]
    assert rac3("generate", TINY, *place, "--prompt", "a fox", "--samples", "3") == 0
    assert rac3("encoders", TINY, *place, "--report", "--report-images", "7") == 0
    (options,) = [given[1] for name, given in called if name == "generate"]
    assert (options.prompt, options.samples) == ("a fox", 3)
    assert [given[1] for name, given in called if name == "encoders_report"] == [7]


def test_the_seed_of_a_drawing_is_not_that_of_the_experiment(called: Called, rac3: Command, tmp_path: Path):
    """Another drawing by the same model, which is looked for by the experiment's."""
    configured = replace(tiny(), seed=5)
    experiment, options = parse("generate", configured, ["--prompt", "a fox", "--seed", "3"])
    assert (experiment, options.seed) == (configured, 3)
    experiment, options = parse("generate", configured, ["--prompt", "a fox"])
    assert (experiment.seed, options.seed) == (5, 0)
    assert parse("train", configured, ["--seed", "3"])[0].seed == 3
    assert rac3("generate", TINY, "--workdir", str(tmp_path / "new"), "--prompt", "a fox", "--seed", "3") == 0
    for _, (run, *_) in called:
        assert run.experiment.seed == run.trained.seed == tiny().seed != 3


def test_the_quickstart_is_a_run_of_its_config(called: Called, rac3: Command, tmp_path: Path):
    assert rac3("quickstart", "--seed", "3", "--workdir", str(tmp_path / "new")) == 0
    names = [name for name, _ in called]
    assert names == [*PREPARE, *TRAIN, *EVALUATE, "report"]
    assert called[0][1][0].experiment == replace(
        load_config_module("quickstart").get_config(), seed=3, workdir=str(tmp_path / "new")
    )


def test_training_makes_the_model_and_then_the_vanilla_one(called: Called, rac3: Command, tmp_path: Path):
    assert rac3("train", TINY, "--workdir", str(tmp_path / "new"), "--seed", "3") == 0
    runs = [given[0] for name, given in called if name == "train"]
    own = replace(tiny(), seed=3, workdir=str(tmp_path / "new"))
    assert [run.experiment for run in runs] == [own, replace(own, retriever=NoRetriever())]
    assert [run.trained for run in runs] == [run.experiment for run in runs]
    assert all(run.workdir.path == tmp_path / "new" for run in runs)


@pytest.mark.parametrize("stage", ["evaluate", "generate", "report", "run"])
def test_what_is_named_at_inference_is_not_what_the_model_was_trained_with(
    stage: str, called: Called, rac3: Command, tmp_path: Path
):
    """But `run` trains with it. Everything else on the command line is of both."""
    (tmp_path / "keys.txt").write_text("a\n")
    swap = ["--takedowns", str(tmp_path / "keys.txt"), "--batches.rows", "4", "retriever:exact"]
    own = ["--prompt", "a fox"] if stage == "generate" else []
    assert rac3(stage, TINY, "--workdir", str(tmp_path / "new"), *own, *swap) == 0
    work = {"evaluate": "evaluate", "generate": "generate", "report": "report", "run": "evaluate"}[stage]
    run = next(given[0] for name, given in called if name == work)
    base = replace(tiny(), workdir=str(tmp_path / "new"), batches=replace(tiny().batches, rows=4))
    assert run.experiment == replace(base, takedowns=str(tmp_path / "keys.txt"), retriever=Exact())
    assert run.trained == (run.experiment if stage == "run" else base)


@pytest.mark.parametrize("stage", ["run", "train", "prepare", "encoders"])
def test_a_model_is_not_trained_on_codes_that_cannot_be_drawn(
    stage: str, called: Called, rac3: Command, tmp_path: Path
):
    """The decoder is looked for before any work; encoding alone does without."""
    (tmp_path / "vqgan.ckpt").touch()
    arguments = ["--vqgan.checkpoint", str(tmp_path / "vqgan.ckpt"), "--workdir", str(tmp_path / "new")]
    assert rac3(stage, TINY, *arguments) == 0
    first, given = called[0]
    if stage in ("run", "train"):
        assert (first, given) == ("require_decoder", (tmp_path / "vqgan.ckpt",))
    assert ("require_decoder" in [name for name, _ in called]) == (stage in ("run", "train"))


@pytest.mark.parametrize("stage", ["run", "train", "evaluate", "generate"])
def test_a_mesh_of_other_devices_is_refused_before_any_work(
    stage: str, called: Called, refused: Refused, tmp_path: Path
):
    own = ["--prompt", "a fox"] if stage == "generate" else []
    line = refused(stage, TINY, *own, "--mesh.fsdp", "3", "--workdir", str(tmp_path / "new"))
    assert "does not fit the 8 devices" in line
    assert called == []


def test_debug_shows_the_traceback(rac3: Command):
    with pytest.raises(InputError, match="'pretrain' is unknown"):
        rac3("pretrain", TINY, "--debug")
    with pytest.raises(InputError, match="'pretrain' is unknown"):
        rac3("--debug", "pretrain", TINY)


def test_an_error_of_ours_is_no_bad_input(
    rac3: Command, called: Called, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """It keeps its traceback."""

    def broken(*arguments: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("rac3.stages.audit.audit", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        rac3("audit", TINY, "--workdir", str(tmp_path / "new"))


def test_an_interrupt_has_its_own_exit_code(
    rac3: Command, called: Called, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rac3.stages.audit.audit", interrupted)
    assert rac3("audit", TINY, "--workdir", str(tmp_path / "new")) == 130
    assert capsys.readouterr().err == "rac3: interrupted; run the same command to go on\n"


def test_a_second_run_makes_nothing(rac3: Command, workdir: Path):

    def made() -> dict[str, str]:
        """All but what is written each time: the report, and the experiment with the place of the workdir."""
        return {name: digest for name, digest in tree(workdir).items() if not name.startswith(("report/", EXPERIMENT))}

    before, stored = made(), json.loads((workdir / EXPERIMENT).read_text())["experiment"]
    assert rac3("run", TINY, "--workdir", str(workdir)) == 0
    assert made() == before
    assert json.loads((workdir / EXPERIMENT).read_text())["experiment"] == stored | {"workdir": str(workdir)}


def test_a_finished_workdir_is_a_config(
    rac3: Command, refused: Refused, workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """That of its own experiment, also after it was moved; the same images as by the config's file."""
    own = ["--prompt", "a red fox", "--samples", "2", "--seed", "4"]
    assert rac3("generate", TINY, "--workdir", str(workdir), *own, "--out", str(tmp_path / "by config")) == 0
    moved = workdir.rename(tmp_path / "moved")
    before = tree(moved)
    assert rac3("generate", str(moved), *own) == 0
    made = {name: digest for name, digest in tree(moved).items() if name not in before}
    assert set(made) == {f"generated/a-red-fox{end}" for end in ("-0.png", "-1.png", ".json")}
    by_config = tree(tmp_path / "by config")
    assert {name.removeprefix("generated/"): digest for name, digest in made.items()} == by_config
    assert not workdir.exists()
    assert rac3("evaluate", str(moved), "--task", "retrieval", "retriever:exact") == 0
    assert "Exact, as configured" in capsys.readouterr().out
    line = refused("generate", str(moved), "--prompt", "a fox", "--text.vocab-size", "290")
    assert f"run `rac3 prepare {moved} --text.vocab-size 290`" in line
    assert "holds no experiment.json" in refused("generate", str(tmp_path / "by config"), "--prompt", "a fox")


def test_the_retriever_is_swapped_on_the_command_line(rac3: Command, workdir: Path):
    trained = tree(workdir / "train")
    for choice in ("exact", "random"):
        swap = ["--workdir", str(workdir), f"retriever:{choice}", "--retriever.num-neighbors", "16"]
        assert rac3("evaluate", TINY, "--no-compare-with-cm3", *swap) == 0
    assert tree(workdir / "train") == trained
    ids = {}
    for manifest in (workdir / "neighbors").glob(f"*/{MANIFEST}"):
        inputs = json.loads(manifest.read_text())["inputs"]
        if inputs["queries"] == recipes.queries(tiny(), "test").fingerprint:
            index = json.loads((workdir / "index" / inputs["index train"] / MANIFEST).read_text())
            ids[index["config"]["retriever"]["class"]] = read_array(manifest.parent / "ids")
    assert ids.keys() == {"Scann", "Exact", "Random"}
    np.testing.assert_array_equal(ids["Scann"], ids["Exact"])
    assert (ids["Random"] != ids["Exact"]).any()


def test_documents_named_by_hand_are_all_in_context(
    rac3: Command, refused: Refused, workdir: Path, capsys: pytest.CaptureFixture[str]
):
    keys = ["memory/000003", "train/000001", "train/000000"]
    prompt = ["--prompt", "a fox", "--samples", "1", "--workdir", str(workdir), "retriever:fixed", "--retriever.keys"]
    assert rac3("generate", TINY, *prompt, *keys) == 0
    assert re.findall(r"^retrieved (\S+) ", capsys.readouterr().out, re.M) == keys
    assert "no document of train and memory has the key 'nowhere'" in refused("generate", TINY, *prompt, "nowhere")
    assert "retriever.keys names no document" in refused("generate", TINY, *prompt)
    assert "selection.depth=" in refused("generate", TINY, *prompt, *map(str, range(9)))
    # Near-duplicates that redundancy avoidance would skip are kept too; but a training document is never its own.
    experiment = replace(tiny(), retriever=Fixed(tuple(keys)), selection=Selection(max_similarity=1e-6))
    memory = Run(experiment, Workdir(workdir, "tiny")).memory()
    queries = Queries(["a", "b"], memory.memory.parts[0].read(slice(0, 2)), ["", ""])
    ids = memory.retrieve(queries, np.array([-1, 1])).ids
    third = int(memory.memory.offsets[1]) + 3
    np.testing.assert_array_equal(ids[:, :4], [[third, 1, 0, -1], [third, 0, -1, -1]])


@pytest.mark.parametrize(("shown", "hidden"), [("text", "is_image"), ("image", "is_text")])
def test_a_prompt_has_one_modality_of_what_is_retrieved(shown: str, hidden: str, workdir: Path):
    experiment = replace(tiny(), batches=replace(tiny().batches, retrieved=shown))
    run = Run(experiment, Workdir(workdir, "tiny"), tiny())
    found = run.retrieve("a fox", k=2)
    assert len(found) == 2
    sequences = run.builder.retrieved_sequences([each.tokens.tokens for each in found])
    vocabulary = run.builder.vocabulary
    assert len(sequences) == 2
    for sequence in sequences:
        assert not getattr(vocabulary, hidden)(sequence.ids).any()
        assert (vocabulary.is_text(sequence.ids) | vocabulary.is_image(sequence.ids)).any()


def test_a_retriever_of_ones_own(rac3: Command, tmp_path: Path, workdir: Path):
    """The example of the README, over the tiny config rather than the quickstart."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (example,) = [block for block in blocks if "def get_config" in block]
    example = example.replace(
        "from rac3.configs.quickstart import get_config as quickstart", "quickstart = lambda: tiny"
    )
    config = write_config(tmp_path / "mine.py", example.replace('name="word_overlap"', 'name="tiny"'))
    quick = ["--workdir", str(workdir), "--no-compare-with-cm3", "--evaluation.no-control"]
    for stage in ("index", "retrieve", "train", "evaluate"):
        assert rac3(stage, config, *quick, "--training.steps", "2") == 0
    experiment = load_config_module(config).get_config()
    store = Workdir(workdir, "tiny")
    ids = read_array(store.require(recipes.neighbors(experiment, "train")).folder / "ids")
    assert (ids[:, 0, 0] >= 0).all()
    assert (ids[:, 0, 0] != np.arange(len(ids))).all()


@pytest.mark.shared_data
def test_damaged_documents_are_counted(
    rac3: Command, refused: Refused, tmp_path: Path, workdir: Path, shared_data: Path
):
    damaged = str(shared_data / "emoji-captions-corrupt")  # whole: with another data_dir encoders are fitted again
    body = (
        "from rac3.documents.webdataset import WebDataset\n"
        f"data = replace(tiny.data, validation=WebDataset({damaged!r}))\n"
        "def get_config(): return replace(tiny, data=data)\n"
    )
    config = write_config(tmp_path / "mine.py", body)
    line = refused("ingest", config, workdir=workdir)
    assert re.search(r"16 of 47 documents of validation are damaged \(.*\), more than max_reject_fraction=0.05", line)
    assert rac3("ingest", config, "--workdir", str(workdir), "--max-reject-fraction", "0.5") == 0
    manifest = next(
        path for path in (workdir / "documents").glob(f"*/{MANIFEST}") if "emoji-captions-corrupt" in path.read_text()
    )
    counts = json.loads(manifest.read_text())["counts"]
    lines = [json.loads(line) for line in (manifest.parent / "rejects.jsonl").read_text().splitlines()]
    assert {"00000/000000002", "00005/000050003", "00007/000070010"} <= {line["key"] for line in lines}
    assert len(lines) == sum(counts["rejects"].values()) == 16
    assert counts["documents"] + sum(counts["filtered"].values()) == 6 * 4 + 3 + 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sharding info not provided")  # it restores onto the mesh that it was saved from
def test_a_killed_run_ends_like_one_that_was_not(tmp_path: Path, rac3: Command, finished_workdir: tuple[Path, Path]):
    """Bit for bit: the VQGAN, with all that its fitting carries along, and the model."""
    steps = {"--vqgan.fit.steps": "60", "--training.steps": "20", "--training.checkpoint-every": "5"}
    settings = [word for pair in steps.items() for word in pair] + ["--no-compare-with-cm3"]
    players = {"ema-decay": "0.99", "adversarial.weight": "0.5", "adversarial.start": "40", "adversarial.ndf": "4"}
    settings += [word for name, value in players.items() for word in (f"--vqgan.objective.{name}", value)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for workdir in (whole, killed):
        workdir.mkdir()
        shutil.copy(finished_workdir[1] / "workdir.json", workdir)
        for stage in ("text", "clip"):  # as they are
            shutil.copytree(finished_workdir[1] / stage, workdir / stage)

    def arguments(stage: str, workdir: Path) -> list[str]:
        return [stage, TINY, *settings, "--workdir", str(workdir), *(["retriever:none"] if stage == "train" else [])]

    def kill_when(pattern: str, stage: str) -> None:
        with started(tmp_path, *arguments(stage, killed)) as command:
            wait_until(lambda: bool(list(killed.glob(pattern))), command)
            command.kill()

    for stage in ("encoders", "ingest", "train"):
        assert rac3(*arguments(stage, whole)) == 0
    kill_when("vqgan/*.partial/checkpoints/50", "encoders")
    assert rac3(*arguments("encoders", killed)) == 0
    fitted = [path.read_bytes() for folder in (whole, killed) for path in folder.glob("vqgan/*/params.safetensors")]
    assert len(fitted) == 2
    assert fitted[0] == fitted[1]
    shutil.copytree(whole / "documents", killed / "documents")
    kill_when("train/*.partial/checkpoints/5", "train")
    assert rac3(*arguments("train", killed)) == 0

    def parameters(workdir: Path) -> dict[str, np.ndarray]:
        import jax
        import orbax.checkpoint as ocp

        (folder,) = workdir.glob("train/*/checkpoints/20/state")
        with ocp.PyTreeCheckpointer() as checkpointer:
            params = checkpointer.restore(folder.absolute())["params"]
        return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}

    expected, found = parameters(whole), parameters(killed)
    assert expected.keys() == found.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_a_folder_named_like_a_shipped_config_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "quickstart").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_experiment("quickstart").name == "quickstart"


def test_a_terminal_hears_of_the_command_before_anything_is_imported(monkeypatch: pytest.MonkeyPatch):
    import rac3.__main__ as command

    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "argv", ["rac3", "generate", "quickstart"])
    monkeypatch.setattr("rac3.cli.main", lambda: terminal.write("the command\n"))
    command.main()
    assert terminal.getvalue() == "rac3 generate: starting\nthe command\n"
    imported = "import rac3.__main__, sys; assert not {'jax', 'numpy', 'rac3.cli'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", imported], check=True)
