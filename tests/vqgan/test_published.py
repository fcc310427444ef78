"""Which family a checkpoint is of, and the stages with one in place of a fitted VQGAN."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from published_vqgans import CONFIG, chameleon_folder, write_taming

from rac3.artifacts.workdir import Workdir
from rac3.cli import run
from rac3.config import InputError, load_config_module
from rac3.documents.document import Image
from rac3.run import Run
from rac3.vqgan.published import load_vqgan

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_a_clip_is_no_vqgan(tmp_path: Path, safe: bool):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(text_config=sizes | {"vocab_size": 32}, vision_config=sizes, projection_dim=16)
    module = transformers.CLIPModel(config)
    module.save_pretrained(tmp_path)
    if not safe:  # as before safetensors
        (tmp_path / "model.safetensors").unlink()
        torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="'clip' is no VQGAN that can be loaded; give one of 'VQModel', 'chameleon'"):
        load_vqgan(tmp_path)


def test_a_folder_without_anything(tmp_path: Path):
    with pytest.raises(
        InputError, match=r"has no .ckpt or .pt or .pth file and no config\.json; give a VQGAN's weights"
    ):
        load_vqgan(tmp_path)


def test_a_path_that_is_not_there(tmp_path: Path):
    with pytest.raises(InputError, match="does not exist; give a checkpoint file or its folder"):
        load_vqgan(tmp_path / "absent.ckpt")


def test_a_checkpoint_takes_the_place_of_fitting(
    finished_workdir: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config, finished = finished_workdir
    workdir = str(shutil.copytree(finished, tmp_path / "runs"))
    path, _ = write_taming(tmp_path, replace(CONFIG, resolution=16, attn_resolutions=(8,)))
    asked = [str(config), "--workdir", workdir, "--vqgan.checkpoint", str(path)]

    def made(stage: str) -> set[Path]:
        return set(Path(workdir, stage).glob("[!.]*/manifest.json"))

    before = {stage: made(stage) for stage in ("text", "clip", "vqgan", "documents")}
    run(["encoders", *asked])
    assert "taming VQModel, 64 codes, 16 tokens per image of 16 x 16" in capsys.readouterr().out
    assert (made("text"), made("clip")) == (before["text"], before["clip"])
    assert len(made("vqgan") - before["vqgan"]) == 1

    run(["ingest", *asked])
    experiment = load_config_module(str(config)).get_config()
    experiment = replace(experiment, vqgan=replace(experiment.vqgan, checkpoint=str(path)))
    opened = Workdir(Path(workdir), "tiny")
    codec = Run(experiment, opened).images
    documents = Run(experiment, opened).documents("train")
    image = documents.many([0])[0]
    codes = next(ids for part, ids in zip(image.document.segments, image.ids, strict=True) if isinstance(part, Image))
    np.testing.assert_array_equal(codes, codec.encode([image.document.images[0].pixels()])[0])

    run(["encoders", *asked, "--vqgan.resolution", "32"])
    assert "64 tokens per image of 32 x 32" in capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:-100])  # another file: what was made of it is stale
    with pytest.raises(InputError, match="damaged or truncated"):
        run(["encoders", *asked])
    path.unlink()
    with pytest.raises(InputError, match=r"last.ckpt' does not exist"):
        run(["ingest", *asked])


def test_what_cannot_draw_is_refused_before_any_work(
    finished_workdir: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config, finished = finished_workdir
    folder = tmp_path / "chameleon"
    chameleon_folder(folder)
    for stage in ("train", "run"):
        workdir = tmp_path / stage
        with pytest.raises(InputError, match=r"chameleon' has no decoder.*; set vqgan.checkpoint to one that has"):
            run([stage, str(config), "--workdir", str(workdir), "--vqgan.checkpoint", str(folder)])
        assert not list(workdir.glob("*/*/manifest.json"))
    workdir = shutil.copytree(finished, tmp_path / "runs")
    run(["encoders", str(config), "--workdir", str(workdir), "--vqgan.checkpoint", str(folder)])
    assert "encoder only" in capsys.readouterr().out
