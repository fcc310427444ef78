"""A workdir describes itself: `rac3.load` opens it without its config, and runs no code out of it."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_config

import rac3
from rac3 import recipes
from rac3.artifacts.workdir import Workdir
from rac3.config import InputError, from_plain, load_config_module, shipped_configs, to_plain
from rac3.documents.filter import LaionFilter
from rac3.documents.tfds import Tfds
from rac3.documents.webdataset import WebDataset
from rac3.execution.ray import Ray
from rac3.experiment import Data, Experiment
from rac3.experiment_file import EXPERIMENT, describe
from rac3.retrieval.exact import Exact
from rac3.retrieval.faiss import Faiss
from rac3.retrieval.fixed import Fixed
from rac3.retrieval.scann import Scann
from rac3.run import Run

Command = Callable[..., int]
TINY = tiny_config.get_config()

OWN_RETRIEVER = '''
from dataclasses import dataclass, replace
import numpy as np
import tiny_config


@dataclass(frozen=True)
class First:
    """The first documents of each part."""

    num_neighbors: int = 3
    words: tuple[str, ...] = ("a", "b")

    def build(self, part, folder):
        pass

    def open(self, part, folder):
        return self

    def search(self, queries, k):
        rows = np.tile(np.arange(k), (len(queries), 1))
        return -rows.astype(np.float32), rows


def get_config():
    return replace(tiny_config.get_config(), name="own", retriever=First(words=("c",)))
'''


def described(experiment: Experiment, folder: Path, arguments: str = "mine.py") -> Path:
    """A workdir that holds the experiment, and nothing else."""
    workdir = Workdir(folder, experiment.name, arguments)
    with workdir.write(recipes.Recipe("text", {})):
        pass
    describe(Run(experiment, workdir))
    return folder


def test_a_finished_run_is_loaded_with_all_it_holds(finished_workdir: tuple[Path, Path]):
    run = rac3.load(finished_workdir[1])
    assert run.experiment == replace(TINY, workdir=run.experiment.workdir)
    assert len(run.documents("train")) == 36
    assert [len(run.documents(split)) for split in ("memory", "validation", "test")] == [12, 12, 4]
    assert run.training_metrics()[-1]["step"] == 6
    found = run.retrieve(run.documents("test")[0].document.text, k=2)
    assert [item.score for item in found] == sorted((item.score for item in found), reverse=True)


@pytest.mark.slow
def test_overrides_are_stored(rac3: Command, tmp_path: Path):
    """With them the artifacts are current, of which the config alone knows nothing."""
    from rac3.experiment_file import load

    config = str(Path(tiny_config.__file__))
    overrides = ["--vqgan.fit.steps", "2", "--clip.fit.steps", "3", "--seed", "7", "--text.vocab-size", "290"]
    assert rac3("encoders", config, "--workdir", str(tmp_path / "w"), *overrides) == 0
    run = load(tmp_path / "w")
    assert (run.experiment.vqgan.fit.steps, run.experiment.clip.fit.steps, run.experiment.seed) == (2, 3, 7)
    assert run.tokenizer.size == 290
    assert run.encoder.embed_texts(["a fox"]).shape == (1, run.encoder.width)
    with pytest.raises(InputError, match=re.escape(f"rac3 prepare {config} --workdir")):
        run.documents("train")


@pytest.mark.slow
def test_a_model_is_not_forgotten_for_a_stage_with_other_settings(rac3: Command, workdir: Path):
    """The experiment is that of the model, until another one is trained."""
    from rac3.experiment_file import load

    config = tiny_config.__file__
    before = (workdir / EXPERIMENT).read_text()
    assert rac3("encoders", config, "--workdir", str(workdir), "--clip.fit.steps", "2") == 0
    assert (workdir / EXPERIMENT).read_text() == before
    assert rac3("train", config, "--workdir", str(workdir), "--training.steps", "2", "--no-compare-with-cm3") == 0
    assert load(workdir).experiment.training.steps == 2
    assert load(workdir).training_metrics()[-1]["step"] == 2


def test_what_is_stored_is_plain_json_and_loads_without_the_config_file(tmp_path: Path):
    folder = described(replace(TINY, retriever=Exact(num_neighbors=5)), tmp_path / "w")
    stored = json.loads((folder / EXPERIMENT).read_text())["experiment"]
    assert stored["retriever"]["class"] == "rac3.retrieval.exact.Exact"
    assert stored["retriever"]["num_neighbors"] == 5
    code = (
        "import sys, rac3; run = rac3.load(sys.argv[1]); print(run.experiment.retriever.num_neighbors); "
        "print([name for name in sys.modules if name.startswith('rac3_config_') or name == 'tiny_config'])"
    )
    out = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert out.stdout.split("\n")[:2] == ["5", "[]"]


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_every_shipped_config_comes_back_equal(name: str):
    experiment = load_config_module(name).get_config()
    stored = json.loads(json.dumps(to_plain(experiment)))
    assert from_plain(stored) == experiment


def test_every_kind_of_part_comes_back_equal():
    """Of the right type too: 1 is not 1.0, and () is not []."""
    experiment = replace(
        TINY,
        data=Data(
            WebDataset("a"), {"news": WebDataset("b"), "class": Tfds("coco_captions")}, ("news",), None, WebDataset("c")
        ),
        filter=LaionFilter(),
        retriever=Fixed(("1", "2")),
        executor=Ray(workers=2),
        max_reject_fraction=1.0,
        embedding_dtype="int8",
    )
    for retriever in (Scann(), Exact(), Faiss(), experiment.retriever):
        one = replace(experiment, retriever=retriever)
        back = from_plain(json.loads(json.dumps(to_plain(one))))
        assert back == one
        assert repr(back) == repr(one)


def test_the_paths_of_a_loaded_run_do_not_depend_on_where_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "there" / "data").mkdir(parents=True)
    (tmp_path / "there" / "down.txt").write_text("key\n")
    monkeypatch.chdir(tmp_path / "there")
    text = replace(TINY.text, checkpoint="owner/name")  # on a hub, not a path
    described(replace(TINY, data_dir="data", takedowns="down.txt", text=text), tmp_path / "w")
    monkeypatch.chdir(tmp_path)
    loaded = rac3.load(tmp_path / "w").experiment
    assert Path(loaded.data_dir) == tmp_path / "there" / "data"
    assert recipes.takedown_keys(loaded) == ["key"]
    assert loaded.text.checkpoint == "owner/name"


LOAD = """
import sys, jax, rac3
jax.jit(lambda x: x + 1)(1.0)  # before it is known that programs are kept
rac3.load(sys.argv[1])
jax.jit(lambda x: [x := jax.numpy.sin(x @ x) for _ in range(400)][-1])(jax.numpy.eye(3))  # takes long to compile
print(jax.config.jax_compilation_cache_dir)
"""


def test_compiled_programs_are_kept_in_the_workdir_or_where_the_user_says(tmp_path: Path):
    described(TINY, tmp_path / "run")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    command = [sys.executable, "-c", LOAD, str(tmp_path / "run")]
    environment |= {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    folder = tmp_path / "run" / "compiled"
    assert done.stdout.strip() == str(folder)
    assert list(folder.glob("*"))
    rac3.load(tmp_path / "run")
    assert jax.config.values["jax_compilation_cache_dir"] == os.environ["JAX_COMPILATION_CACHE_DIR"]


def test_classes_of_a_config_need_that_config(tmp_path: Path):
    config = tmp_path / "mine.py"
    config.write_text(OWN_RETRIEVER)
    experiment = load_config_module(str(config)).get_config()
    folder = described(experiment, tmp_path / "w", f"{config} --workdir w")
    with pytest.raises(InputError) as refused:
        rac3.load(folder)
    assert str(refused.value) == (
        f"{folder} was made with First, a class defined in its config; give the file: "
        f"rac3.load({str(folder)!r}, config={str(config)!r})"
    )
    loaded = rac3.load(folder, config=config).experiment
    assert type(loaded.retriever).__name__ == "First"
    assert loaded.retriever.words == ("c",)
    assert recipes.index(loaded, "train").fingerprint == recipes.index(experiment, "train").fingerprint


@pytest.mark.parametrize(
    ("name", "class_name"),
    [
        ("a module that only lies there", "planted.Evil"),
        ("a function", "os.system"),
        ("a class of the standard library", "subprocess.Popen"),
        ("a function of rac3", "rac3.cli.main"),
        ("a class of rac3 that is no config", "rac3.artifacts.workdir.Workdir"),
        ("no such module", "rac3.nothing.Here"),
        ("no module at all", "Experiment"),
    ],
)
def test_no_code_is_run_out_of_a_workdir(name: str, class_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "planted.py").write_text("raise SystemExit('this was run')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = described(TINY, tmp_path / "w")
    plain = json.loads((folder / EXPERIMENT).read_text())
    plain["experiment"]["retriever"] = {"class": class_name}
    del plain["checksum"]
    (folder / EXPERIMENT).write_text(json.dumps(plain))
    with pytest.raises(InputError, match="a class defined in its config"):
        rac3.load(folder)
    config = tmp_path / "mine.py"
    config.write_text(OWN_RETRIEVER)
    with pytest.raises(InputError, match="a class defined in its config"):
        rac3.load(folder, config=config)


@pytest.mark.parametrize("content", ["", "[]", '{"experiment": {}}', "{", '{"arguments": "", "experiment": 3}'])
def test_a_damaged_record_is_refused(content: str, tmp_path: Path):
    folder = described(TINY, tmp_path / "w")
    (folder / EXPERIMENT).write_text(content)
    with pytest.raises(InputError, match=r"experiment\.json"):
        rac3.load(folder)


def test_settings_of_another_version_are_refused(tmp_path: Path):
    folder = described(TINY, tmp_path / "w")
    plain = json.loads((folder / EXPERIMENT).read_text())
    plain["experiment"]["model"]["num_experts"] = 8
    del plain["checksum"]
    (folder / EXPERIMENT).write_text(json.dumps(plain))
    with pytest.raises(InputError, match=r"another version of rac3 \(.*num_experts"):
        rac3.load(folder)


def test_what_is_no_workdir_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"holds no experiment\.json"):
        rac3.load(tmp_path)
    with pytest.raises(InputError, match=r"holds no experiment\.json"):
        rac3.load(tmp_path / "nowhere")


def test_importing_the_package_loads_nothing():
    code = (
        "import sys, rac3; print([name for name in ('jax', 'numpy', 'rac3.run') if name in sys.modules]); "
        "rac3.Document; rac3.nope"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert out.stdout.strip() == "[]"
    assert "has no attribute 'nope'" in out.stderr


def test_each_artifact_is_opened_once_and_again_in_another_process(finished_workdir: tuple[Path, Path]):
    import pickle

    run = rac3.load(finished_workdir[1])
    assert run.tokenizer is run.tokenizer
    assert run.images is run.images
    assert run.encoder is run.encoder
    assert run.documents("train") is run.documents("train")
    assert run.memory("test") is run.memory("validation")
    assert run.memory("train") is not run.memory("test")
    assert run.memory("train").parts[0] is run.memory("test").parts[0]  # the part is in both, and in memory once
    sent = pickle.loads(pickle.dumps(run))
    assert sent.experiment == run.experiment
    assert sent.workdir.path == run.workdir.path
    np.testing.assert_array_equal(sent.neighbors("test")[:], run.neighbors("test")[:])
