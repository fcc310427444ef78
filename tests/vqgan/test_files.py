"""Which files of a folder belong together; only config.json is read."""

import json
from pathlib import Path

import pytest

from rac3.config import InputError
from rac3.vqgan.published import checkpoint_files


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).touch()


def found(path: Path) -> tuple[str | None, list[str], list[str]]:
    files = checkpoint_files(path)
    return files.kind, [path.name for path in files.configs], [path.name for path in files.weights]


@pytest.mark.parametrize(
    ("names", "given", "configs", "weights"),
    [
        ("a.ckpt b.yaml", "a.ckpt", "b.yaml", "a.ckpt"),  # the only ones
        ("a.ckpt b.yaml", ".", "b.yaml", "a.ckpt"),
        ("a.ckpt b.yaml", "b.yaml", "b.yaml", "a.ckpt"),
        ("a.ckpt a.yaml model.yaml b.yml", "a.ckpt", "a.yaml", "a.ckpt"),  # 1. the same name
        ("a.ckpt config.yaml model.yaml b.yml", "a.ckpt", "model.yaml", "a.ckpt"),  # 2. model
        ("a.ckpt config.yaml b.yml", "a.ckpt", "config.yaml", "a.ckpt"),  # 3. config
        ("a.ckpt b.yaml c.yml", "a.ckpt", "b.yaml c.yml", "a.ckpt"),  # not clear, which `load_vqgan` refuses
        ("a.pt b.ckpt a.yaml", "a.yaml", "a.yaml", "a.pt"),
        ("a.ckpt b.pth model.pt a.yaml model.yaml", ".", "model.yaml", "model.pt"),
        ("vq_ds16_c2i.pt", ".", "", "vq_ds16_c2i.pt"),
    ],
)
def test_torch_files(tmp_path: Path, names: str, given: str, configs: str, weights: str):
    touch(tmp_path, *names.split())
    assert found(tmp_path / given) == (None, configs.split(), weights.split())


def test_which_weights_are_meant_must_be_clear(tmp_path: Path):
    touch(tmp_path, "a.ckpt", "b.ckpt", "c.yaml")
    with pytest.raises(InputError, match=r"has 2 \.ckpt files \(a\.ckpt, b\.ckpt\), and which one is meant"):
        checkpoint_files(tmp_path)


def write(path: Path, **content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def test_a_folder_of_diffusers(tmp_path: Path):
    write(tmp_path / "config.json", _class_name="VQModel")
    with pytest.raises(InputError, match="none of diffusion_pytorch_model"):
        checkpoint_files(tmp_path)
    touch(tmp_path, "diffusion_pytorch_model.bin", "model.safetensors")
    assert found(tmp_path) == ("VQModel", ["config.json"], ["diffusion_pytorch_model.bin"])
    touch(tmp_path, "diffusion_pytorch_model.safetensors")
    for given in (".", "config.json", "diffusion_pytorch_model.bin"):
        assert found(tmp_path / given) == ("VQModel", ["config.json"], ["diffusion_pytorch_model.safetensors"])
    touch(tmp_path, "own.ckpt")  # a file that is named is that file
    assert found(tmp_path / "own.ckpt") == (None, [], ["own.ckpt"])


def test_of_a_whole_chameleon_the_shards_that_hold_its_vqgan(tmp_path: Path):
    write(tmp_path / "config.json", model_type="chameleon")
    names = {"model.vqmodel.encoder.w": "2", "vqmodel.quantize.w": "4", "model.layers.0.w": "1", "lm_head.w": "3"}
    shards = {name: f"model-{shard}.safetensors" for name, shard in names.items()}
    write(tmp_path / "model.safetensors.index.json", weight_map=shards)
    touch(tmp_path, "model-2.safetensors")
    with pytest.raises(InputError, match=r"lists 'model-4\.safetensors', which is not there"):
        checkpoint_files(tmp_path)
    touch(tmp_path, "model-4.safetensors")
    assert found(tmp_path) == ("chameleon", ["config.json"], ["model-2.safetensors", "model-4.safetensors"])
