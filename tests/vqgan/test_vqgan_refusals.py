"""What is no VQGAN that can be loaded, and what is damaged, costs one line that says what to do."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from test_vqgan_checkpoints import CONFIG, diffusers_module, write_taming
from test_vqgan_llamagen import llamagen_module

from rac3.config import InputError
from rac3.vqgan.checkpoints import load_vqgan

torch = pytest.importorskip("torch")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_type": "spatial"}, "norm_type='spatial' is not supported, only 'group'"),
        ({"act_fn": "relu"}, "act_fn='relu' is not supported"),
        ({"block_out_channels": [32, 48, 64]}, "not multiples of the first"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 3}, "must mirror the encoder"),
        ({"layers_per_block": "2"}, "layers_per_block='2' is not of type int"),
        ({"sample_size": 33}, "33 is not a multiple of 4"),
        ({"layers_per_block": 3}, "lack 'decoder.up_blocks.2.resnets.3"),
        ({"layers_per_block": 1}, r"have '\S+' .*which the config has no place for"),
        ({"num_vq_embeddings": 65}, r"'quantize.embedding.weight' has shape \(64, 4\), the config asks for \(65, 4\)"),
        ({"latent_channels": 5}, r"has shape \(\d+(, \d+)*\), the config asks for"),
        ({"_class_name": "AutoencoderKL"}, "'AutoencoderKL' is no VQGAN that can be loaded"),
    ],
)
def test_another_architecture_is_refused(tmp_path: Path, changes: dict, message: str):
    diffusers_module().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(InputError, match=message) as error:
        load_vqgan(tmp_path)
    assert "\n" not in str(error.value)


def break_yaml(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        settings = yaml.safe_load((folder / "model.yaml").read_text())
        for name, value in changes.items():
            model = settings["model"]
            place = model if name == "target" else model["params"]
            place = place["ddconfig"] if name in ("double_z", "attn_type", "ch", "tanh_out", "ch_mult") else place
            place[name] = value
        (folder / "model.yaml").write_text(yaml.safe_dump(settings))

    return change


GIT_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def cut_in_half(name: str) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return cut


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.yaml").unlink(), "last.ckpt' have no .yaml or .yml file beside them"),
        (lambda folder: (folder / "last.ckpt").unlink(), "has no .ckpt or .pt or .pth file and no config.json"),
        (lambda folder: [(folder / n).touch() for n in ("a.yaml", "b.yaml")] and (folder / "model.yaml").unlink(),
         r"has 2 .yaml files \(a.yaml, b.yaml\), and which one is meant is not clear"),
        (write("model.yaml", b"<html>\n  a: [\n</html>"), "model.yaml (is not YAML|holds no settings)"),
        (write("model.yaml", b"model: {}"), "params=None is not of type dict"),
        (write("model.yaml", b"\xff\xfe\x00"), "model.yaml is not YAML"),
        (write("last.ckpt", b"<!DOCTYPE html>"), "are a web page, not weights"),
        (write("last.ckpt", GIT_LFS), "are a Git LFS pointer, not weights"),
        (write("last.ckpt", b"PK\x03\x04 cut"), "damaged or cut short"),
        (cut_in_half("last.ckpt"), "damaged or cut short"),
        (break_yaml(target="ldm.models.autoencoder.AutoencoderKL"), "target 'AutoencoderKL' is not supported"),
        (break_yaml(double_z=True), "double_z=True is not supported, only False"),
        (break_yaml(attn_type="linear"), "attn_type='linear' is not supported"),
        (break_yaml(tanh_out=True), "tanh_out=True is not supported"),
        (break_yaml(remap="codes.npy"), "lack 'quantize.used', which remap='codes.npy' asks for"),
        (break_yaml(ch="wide"), "ch='wide' is not of type int"),
        (break_yaml(ch_mult=[1, "2"]), "ch_mult=.* is not a list of whole numbers"),
        (break_yaml(n_embed=32), r"'quantize.embedding.weight' has shape \(64, 24\), the config asks for \(32, 24\)"),
        (break_yaml(target="x.GumbelVQ"), "lack 'quantize.embed.weight'"),
    ],
)  # fmt: skip
def test_damage_costs_one_line(taming_folder: Path, damage: Callable[[Path], object], message: str):
    damage(taming_folder)
    with pytest.raises(InputError, match=message) as error:
        load_vqgan(taming_folder)
    assert "\n" not in str(error.value)


@pytest.fixture
def taming_folder(tmp_path: Path) -> Path:
    write_taming(tmp_path, CONFIG)
    return tmp_path


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"quantize.used": torch.arange(8)}, r"have 'quantize.used' \(1 such\), which the config has no place for"),
        ({"encoder.conv_blocks.0.res.0.conv1.weight": torch.ones(2)}, "ch_mult=.* has a multiplier below 1"),
        ({"colorize": torch.ones(2)}, r"have 'colorize' \(1 such\), which the config has no place for"),
        ({"encoder.conv_in.bias": Path("x")}, "lack 'encoder.conv_in.bias'"),
    ],
    ids=["used", "half LlamaGen", "surplus", "foreign"],
)
def test_other_weights_are_refused(tmp_path: Path, extra: dict, message: str):
    write_taming(tmp_path, CONFIG, **extra)
    with pytest.raises(InputError, match=message):
        load_vqgan(tmp_path)


@pytest.mark.parametrize(
    "used", [torch.tensor([0, 64]), torch.tensor([-1]), torch.ones(2), torch.arange(4).reshape(2, 2), torch.arange(0)]
)
def test_a_list_of_kept_codes_that_is_none(tmp_path: Path, used):
    write_taming(tmp_path, CONFIG, **{"quantize.used": used})
    break_yaml(remap="codes.npy")(tmp_path)
    with pytest.raises(InputError, match=r"'quantize\.used' is no list of codes from 0 to 63, as n_embed=64 in the"):
        load_vqgan(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda weights: weights.pop("encoder.conv_in.weight"),
            "lack 'encoder.conv_in.weight', which LlamaGen's VQ has",
        ),
        (lambda weights: weights.pop("decoder.mid.1.q.bias"), "lack 'decoder.mid.1.q.bias'"),
        (lambda weights: weights.update({"quantize.embedding.weight": torch.ones(8)}), r"has shape \(8,\); download"),
        (lambda weights: weights.update({"encoder.mid.3.q.bias": torch.ones(8)}), "have 'encoder.mid.3.q.bias'"),
        (lambda weights: weights.update({"encoder.conv_in.weight": torch.ones(16, 3, 3, 3)}), "has shape .*asks for"),
    ],
)
def test_damaged_llamagen(tmp_path: Path, damage: Callable[[dict], object], message: str):
    weights = llamagen_module().state_dict()
    damage(weights)
    torch.save({"model": weights}, tmp_path / "vq.pt")
    with pytest.raises(InputError, match=message) as error:
        load_vqgan(tmp_path / "vq.pt")
    assert "\n" not in str(error.value)


def test_a_pickled_module_is_no_weights(taming_folder: Path):
    torch.save(torch.nn.Linear(2, 2), taming_folder / "last.ckpt")
    with pytest.raises(InputError, match=r"hold a torch\.nn\.modules\.linear\.Linear object, not tensors by name"):
        load_vqgan(taming_folder)


def test_the_weights_of_another_family(taming_folder: Path):
    torch.save(diffusers_module().state_dict(), taming_folder / "last.ckpt")
    with pytest.raises(InputError, match=r"has shape \(64, 4\), the config asks for \(64, 24\); give the weights and"):
        load_vqgan(taming_folder)


WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (write(WEIGHTS, b"<html>"), "are a web page, not weights"),
        (write(WEIGHTS, GIT_LFS), "are a Git LFS pointer, not weights"),
        (write(WEIGHTS, bytes(100)), "are cut short or not safetensors"),
        (cut_in_half(WEIGHTS), "are cut short or not safetensors"),
        (write("config.json", b"<html>"), r"config\.json' is not JSON"),
        (write("config.json", b"[]"), r"config\.json' is not a JSON object"),
        (write("config.json", b"{}"), "None is no VQGAN that can be loaded; give a VQModel or a Chameleon"),
        (
            lambda folder: (folder / WEIGHTS).unlink(),
            "has a config.json but none of diffusion_pytorch_model.safetensors",
        ),
    ],
)
def test_damaged_folders(tmp_path: Path, damage: Callable[[Path], object], message: str):
    diffusers_module().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        load_vqgan(tmp_path)
    assert "\n" not in str(error.value)


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
    with pytest.raises(InputError, match="'clip' is no VQGAN that can be loaded; give a VQModel or a Chameleon"):
        load_vqgan(tmp_path)


def test_a_folder_without_anything(tmp_path: Path):
    with pytest.raises(
        InputError, match=r"has no .ckpt or .pt or .pth file and no config\.json; give a VQGAN's weights"
    ):
        load_vqgan(tmp_path)


def test_a_path_that_is_not_there(tmp_path: Path):
    with pytest.raises(InputError, match="does not exist; give a checkpoint file or its folder"):
        load_vqgan(tmp_path / "absent.ckpt")
