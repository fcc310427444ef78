"""diffusers' VQModel, with random weights, in the files it writes: the same codes and pixels; and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from published_vqgans import (
    GIT_LFS,
    assert_same_codes,
    assert_same_pixels,
    decode,
    diffusers_module,
    encode,
    from_torch,
    pictures,
    replaced,
    to_torch,
    truncated,
)
from safetensors.numpy import load_file, save_file

from rac3.config import InputError
from rac3.vqgan.families.diffusers import read_config
from rac3.vqgan.model import at_resolution
from rac3.vqgan.published import load_vqgan
from rac3.weights.settings import read_settings

torch = pytest.importorskip("torch")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mid_block_add_attention": False, "down_block_types": ("DownEncoderBlock2D",) * 3,
         "up_block_types": ("UpDecoderBlock2D",) * 3, "block_out_channels": (32, 32, 96), "vq_embed_dim": None},
    ],
    ids=["attention", "none"],
)  # fmt: skip
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_parity_with_diffusers(tmp_path: Path, changes: dict, safe: bool):
    module = diffusers_module(**changes)
    module.save_pretrained(tmp_path, safe_serialization=safe)
    found = load_vqgan(tmp_path)
    assert found.summary() == "diffusers VQModel, 64 codes, 64 tokens per image of 32 x 32"

    images = pictures()
    with torch.no_grad():
        latents = module.encode(to_torch(images)).latents
        expected = module.quantize(latents)[2][2].numpy()
        codes = encode(found, images)
        assert_same_codes(codes, expected)
        vectors = module.quantize.get_codebook_entry(torch.from_numpy(codes.reshape(-1)).long(), (4, 8, 8, -1))
        pixels = from_torch(module.decode(vectors, force_not_quantize=True).sample)
    assert_same_pixels(decode(found, codes), pixels)


def test_older_diffusers_names(tmp_path: Path):
    diffusers_module().save_pretrained(tmp_path)
    new = load_vqgan(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    older = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    weights = load_file(path)
    for name, old in older.items():
        weights = {key.replace(name, old): weight for key, weight in weights.items()}
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in weights
    save_file(weights, path)
    jax.tree.map(np.testing.assert_array_equal, load_vqgan(tmp_path).params, new.params)


def test_another_resolution_keeps_the_layers(tmp_path: Path):
    module = diffusers_module()
    module.save_pretrained(tmp_path)
    found = load_vqgan(tmp_path, resolution=64)
    assert (found.config.tokens_per_image, found.config.attn_resolutions) == (256, (16,))
    assert at_resolution(found.config, 32) == load_vqgan(tmp_path).config
    images = pictures(2, 64)
    with torch.no_grad():
        expected = module.quantize(module.encode(to_torch(images)).latents)[2][2].numpy()
    assert_same_codes(encode(found, images), expected)


def test_what_a_config_of_diffusers_leaves_out_is_as_there(tmp_path: Path):
    diffusers = pytest.importorskip("diffusers")
    (tmp_path / "some.json").write_text('{"_class_name": "VQModel"}')
    whole = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dict(diffusers.VQModel().config).items()
    }
    (tmp_path / "all.json").write_text(json.dumps(whole))
    some, everything = (read_config(read_settings(tmp_path / name)) for name in ("some.json", "all.json"))
    assert some == everything
    assert (some.n_embed, some.z_channels, some.norm_groups) == (256, 3, 32)


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
        ({"layers_per_block": 1}, r"have '\S+' of shape .*, which the model has no place for"),
        (
            {"num_vq_embeddings": 65},
            r"'quantize.embedding.weight' has shape \(64, 4\), but the model asks for \(65, 4\)",
        ),
        ({"latent_channels": 5}, r"has shape \(\d+(, \d+)*\), but the model asks for"),
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


WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (replaced(WEIGHTS, b"<html>"), "are a web page, not weights"),
        (replaced(WEIGHTS, GIT_LFS), "are a Git LFS pointer, not weights"),
        (replaced(WEIGHTS, bytes(100)), "are truncated or not safetensors"),
        (truncated(WEIGHTS), "are truncated or not safetensors"),
        (replaced("config.json", b"<html>"), r"config\.json' is not JSON"),
        (replaced("config.json", b"[]"), r"config\.json' is not a JSON object"),
        (
            replaced("config.json", b"{}"),
            "None is no VQGAN that can be loaded; give one of 'VQModel', 'chameleon', 'chameleon_vqgan'",
        ),
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
