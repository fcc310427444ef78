"""Which family a folder is of, what is fetched from the hub, and the stages with a checkpoint in place of a fit."""

import fnmatch
import shutil
import socket
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from published_clips import MEAN, TEXTS, assert_same, module, open_clip_weights, write_open_clip

from rac3 import recipes
from rac3.artifacts.workdir import Workdir
from rac3.cli import run
from rac3.clip.images import OPENAI_MEAN
from rac3.clip.published import checkpoint_identity, load_clip
from rac3.config import InputError, load_config_module
from rac3.run import Run


def test_of_a_folder_with_both_formats_the_first_is_read(copy):
    write_open_clip(copy, {name: np.asarray(2 * value) for name, value in open_clip_weights().items()}, quick_gelu=True)
    hugging_face = load_clip(str(copy))
    assert hugging_face.images.mean == MEAN
    (copy / "model.safetensors").unlink()  # as repositories of OpenCLIP have config.json, for its tokenizer
    from_open_clip = load_clip(str(copy))
    assert from_open_clip.images.mean == OPENAI_MEAN
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(2 * a, b), hugging_face.params, from_open_clip.params)


def test_a_path_that_is_no_folder():
    with pytest.raises(InputError, match="'/nowhere' is not a folder"):
        load_clip("/nowhere")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the hub, and no network."""
    constants = module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_name_on_the_hub_is_found_in_the_cache(published, hub_cache):
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(published, hub_cache / "models--openai--small-clip" / "snapshots" / commit)
    reference = hub_cache / "models--openai--small-clip" / "refs" / "main"
    reference.parent.mkdir()
    reference.write_text(commit)
    assert_same(load_clip("openai/small-clip"), load_clip(str(published)))
    assert checkpoint_identity("openai/small-clip") == {"name": "openai/small-clip"}


@pytest.mark.parametrize(
    ("names", "fetched"),
    [
        (["config.json", "model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors"], "model.safetensors"),
        (["config.json", "pytorch_model.bin", "flax_model.msgpack"], "pytorch_model.bin"),
        (["open_clip_config.json", "open_clip_pytorch_model.bin", "open_clip_model.safetensors"],
         "open_clip_model.safetensors"),
    ],
)  # fmt: skip
def test_of_the_weights_on_the_hub_one_format_is_fetched(names, fetched, published, tmp_path, monkeypatch):
    """A folder replaces the network: the client's call copies what it asks for from there."""
    snapshot = tmp_path / "0123"
    snapshot.mkdir()
    revisions = []

    def snapshot_download(name, revision=None, allow_patterns=(), local_files_only=False):
        revisions.append(revision)
        for file in (*names, "vocab.json", "merges.txt", "README.md"):
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                (snapshot / file).write_text((published / file).read_text() if file.endswith((".json", ".txt")) else "")
        return str(snapshot)

    if "open_clip_config.json" in names:
        published = shutil.copytree(published, tmp_path / "published")
        (published / "config.json").rename(published / "open_clip_config.json")
    monkeypatch.setattr(module("huggingface_hub"), "snapshot_download", snapshot_download)
    with pytest.raises(InputError):  # the weights are empty, and preprocessor_config.json is not there
        load_clip("owner/small-clip")
    assert {path.name for path in snapshot.iterdir()} == {names[0], "vocab.json", "merges.txt", fetched}
    assert revisions[0] is None
    assert set(revisions[1:]) == {"0123"}  # the one whose settings were read


def test_a_hub_that_cannot_be_reached(hub_cache):
    with pytest.raises(InputError, match="'openai/small-clip' cannot be fetched from the Hugging Face hub") as error:
        load_clip("openai/small-clip")
    assert "HF_HUB_OFFLINE is set" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_hub_that_does_not_answer_is_asked_once_and_briefly(hub_cache, monkeypatch):
    """A server that accepts and says nothing, where the client of the hub would try for minutes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        constants = module("huggingface_hub.constants")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr("rac3.weights.hub.SECONDS", 0.5)
        for variable in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.delenv(variable, raising=False)
        started = time.monotonic()
        for _ in range(2):
            with pytest.raises(
                InputError, match=r"'openai/small-clip' cannot be fetched .*(does not answer|timed out)"
            ):
                load_clip("openai/small-clip")
        assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "source", ["models/opt", "models/opt/", "./opt", "opt.tar.gz/", "a b/c", "a/b/c", "models\\opt"]
)
def test_a_path_is_not_asked_of_the_hub(source, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rac3.weights.hub.why_not", lambda: pytest.fail("asked"))
    with pytest.raises(InputError, match="is not a folder"):
        load_clip(source)


def test_identity_follows_the_files(copy):
    before = checkpoint_identity(str(copy))
    (copy / "notes.txt").write_text("not read")
    assert checkpoint_identity(str(copy)) == before
    (copy / "merges.txt").write_text("another size")
    assert checkpoint_identity(str(copy)) != before
    assert before["files"]["model.safetensors"][0] == (copy / "model.safetensors").stat().st_size


def test_the_command_takes_a_checkpoint(copy, tmp_path, finished_workdir, monkeypatch):
    """Nothing is fitted, and with the artifact no stage loads the published files again."""
    config, finished = finished_workdir
    folder = shutil.copytree(finished, tmp_path / "tiny")
    vqgans = sorted((folder / "vqgan").iterdir())
    expected = load_clip(str(copy)).encoder().embed_texts(TEXTS)
    arguments = [str(config), "--workdir", str(folder), "--clip.checkpoint", str(copy)]
    run(["encoders", *arguments])
    monkeypatch.setattr("rac3.stages.encoders.load_clip", lambda source: pytest.fail(f"{source} is loaded again"))
    run(["embed", *arguments])
    assert sorted((folder / "vqgan").iterdir()) == vqgans

    experiment = load_config_module(str(config)).get_config()
    experiment = replace(experiment, clip=replace(experiment.clip, checkpoint=str(copy)))
    workdir = Workdir(folder, "tiny")
    np.testing.assert_array_equal(Run(experiment, workdir).encoder.embed_texts(TEXTS), expected)
    queries = workdir.require(recipes.queries(experiment, "test"))
    assert queries.manifest["inputs"]["clip"] == recipes.clip(experiment).fingerprint

    # bfloat16 makes other vectors from the same artifact
    faster = replace(experiment, clip=replace(experiment.clip, dtype="bfloat16"))
    assert recipes.clip(faster).fingerprint == recipes.clip(experiment).fingerprint
    assert recipes.queries(faster, "test").fingerprint != recipes.queries(experiment, "test").fingerprint
    rounded = Run(faster, workdir).encoder.embed_texts(TEXTS)
    assert 1e-4 < np.abs(rounded - expected).max() < 0.03

    refitted = replace(experiment, seed=1, clip=replace(experiment.clip, max_logit_scale=7.0))
    assert recipes.clip(refitted).fingerprint == recipes.clip(experiment).fingerprint
    merges = copy / "merges.txt"
    merges.write_bytes(merges.read_bytes()[::-1])  # as long as before
    with pytest.raises(InputError, match="clip is stale"):
        assert Run(experiment, workdir).encoder
