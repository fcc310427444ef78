"""`rac3 export`: the folder holds the trained model, it appears whole or not at all, and training can start there."""

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_config
from exported_model import page_code
from handmade import document, experiment_of, workdir_of

from rac3 import recipes
from rac3.config import InputError
from rac3.model import exchange
from rac3.retrieval.baselines import NoRetriever
from rac3.run import Run
from rac3.stages import train as stage
from rac3.stages.export import ExportOptions, export
from rac3.stages.ingest import ingest
from rac3.stages.train import train

TINY = tiny_config.get_config()
DOCUMENTS = {"train": [[document(f"t{number}", f"number {number}", b"%d" % number) for number in range(12)]]}


def run_of(folder: Path, **fields: Any) -> Run:
    experiment = experiment_of(DOCUMENTS, retriever=NoRetriever(), **fields)
    run = Run(experiment, workdir_of(experiment, folder))
    ingest(run)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A model with offsets, trained for two steps."""
    training = replace(TINY.training, steps=2)
    run = run_of(tmp_path_factory.mktemp("trained") / "workdir", training=training)
    train(run)
    return run


@pytest.fixture(scope="module")
def folder(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "new" / "model"
    export(run, ExportOptions(str(folder)))
    return folder


def test_the_code_of_the_page_reads_a_model_with_offsets(run: Run, folder: Path):
    """Plain NumPy from the page; the logits are those of the model of the run."""
    names = page_code()
    config, weights = names["load"](folder)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, run.vocabulary.size, 30)
    offsets = rng.integers(0, run.model.max_segment_tokens + 1, 30)
    got = names["logits"](config, weights, tokens, offsets)
    inputs = [np.int32(x)[None] for x in (tokens, np.arange(30), offsets, np.ones(30))]
    hidden = jax.jit(run.model.apply)(run.params, *inputs)
    expected = np.asarray(run.model.apply(run.params, hidden, method="logits"))[0]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_what_the_folder_says(run: Run, folder: Path):
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "text_tokenizer"]
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("rac3", ["RaCM3Transformer"])
    own = config["rac3"]
    assert own["vocabulary"] == {"text_size": 256, "image_size": 64, "num_masks": 16}
    assert (own["text_start"], own["image_start"], own["mask_start"]) == (8, 264, 328)
    assert own["specials"]["<eod>"] == config["eos_token_id"] == 1
    assert own["tokens_per_image"] == 4
    assert own["masking"]["preset"] == "ra_cm3"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "text_tokenizer")
    assert tokenizer.encode("number 7", add_special_tokens=False) == run.tokenizer.encode("number 7")


@pytest.mark.slow  # trains
def test_training_starts_from_an_export(run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    started: list[Any] = []
    real = stage.training_loop

    def watched(label: str, config: Any, new: Any, *rest: Any) -> Any:
        started.append(new.create())
        return real(label, config, new, *rest)

    monkeypatch.setattr(stage, "training_loop", watched)
    more = run_of(
        tmp_path / "workdir",
        training=run.experiment.training,
        model=replace(TINY.model, init_from=str(folder)),
        seed=TINY.seed + 1,
    )
    train(more)
    (state,) = started
    jax.tree.map(np.testing.assert_array_equal, state.params, run.params)
    assert int(state.step) == 0
    assert any(
        np.any(np.asarray(a) != b) for a, b in zip(*map(jax.tree.leaves, (more.params, run.params)), strict=True)
    )
    plain = replace(more.experiment, model=TINY.model)
    assert recipes.train(plain).fingerprint != more.recipe(recipes.train).fingerprint


def test_another_tokenizer_than_that_of_the_folder_is_refused(run: Run, folder: Path, tmp_path: Path):
    exchange.check_tokenizer(str(folder), run.tokenizer)
    config = replace(run.experiment.text, vocab_size=300)
    config.fit(["number 7 number 8 numbers"], tmp_path)
    other = config.load(tmp_path)
    exchange.check_tokenizer(str(folder), other)  # it has all of its ids, and more: the vocabulary's size is refused
    other.save(tmp_path / "checkpoint" / "text_tokenizer")
    with pytest.raises(
        InputError, match=r"has id \d+ for '\w+', but that of this config has None; set --text.checkpoint"
    ):
        exchange.check_tokenizer(str(tmp_path / "checkpoint"), run.tokenizer)


def test_nothing_is_left_of_an_export_that_fails(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def failing(*args: Any) -> Any:
        yield next(real(*args))
        raise MemoryError

    real = exchange.tensors
    monkeypatch.setattr(exchange, "tensors", failing)
    with pytest.raises(MemoryError):
        export(run, ExportOptions(str(tmp_path / "model")))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_whatever_the_library_calls_it(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise Exception("No space left on device (os error 28)")  # as tokenizers raises it

    monkeypatch.setattr(type(run.tokenizer), "save", full)
    with pytest.raises(OSError, match="No space left on device") as raised:
        export(run, ExportOptions(str(tmp_path / "out")))
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_command(
    rac3: Callable[..., int], finished_workdir: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """A finished workdir is a config; `retriever:none` is the vanilla CM3; what is there already stays."""
    workdir = str(finished_workdir[1])
    (tmp_path / "empty").mkdir()
    assert rac3("export", workdir, str(tmp_path / "empty")) == 0
    assert "export: ra_cm3, " in capfd.readouterr().out
    assert rac3("export", workdir, str(tmp_path / "cm3"), "retriever:none") == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("empty", "cm3")]
    assert len(weights[0]) == len(weights[1])
    assert weights[0] != weights[1]
    assert rac3("export", workdir, str(tmp_path / "cm3")) == 2
    assert capfd.readouterr().err.splitlines() == [
        f"rac3: {tmp_path / 'cm3'} exists and is not an empty folder; give a new one"
    ]
    assert (tmp_path / "cm3" / "model.safetensors").read_bytes() == weights[1]


def test_a_model_that_is_not_trained_names_the_command(
    rac3: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    workdir = str(tmp_path / "workdir")
    assert rac3("export", "quickstart", str(tmp_path / "out"), "--workdir", workdir) == 2
    assert f"run `rac3 run quickstart --workdir {workdir}`" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
    assert rac3("export", "quickstart", "--workdir", workdir) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith("rac3: `rac3 export` needs a folder to write")
