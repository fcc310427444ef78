"""transformers' ChameleonVQVAE, with random weights, in the files that it writes: the same codes."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from published_vqgans import CHAMELEON, assert_same_codes, chameleon_folder, draw_weights, encode, pictures, to_torch
from safetensors.numpy import load_file

from rac3.config import InputError
from rac3.vqgan.families.chameleon import read_config
from rac3.vqgan.model import VQGANConfig
from rac3.vqgan.published import load_vqgan, require_decoder
from rac3.weights.settings import read_settings

torch = pytest.importorskip("torch")


def test_what_a_config_of_chameleon_leaves_out_is_as_in_transformers(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text("{}")
    found, reference = read_config(read_settings(tmp_path / "config.json")), transformers.ChameleonVQVAEConfig()
    assert found == VQGANConfig(
        ch=reference.base_channels,
        ch_mult=tuple(reference.channel_multiplier),
        num_res_blocks=reference.num_res_blocks,
        attn_resolutions=tuple(reference.attn_resolutions or ()),
        resolution=reference.resolution,
        in_channels=reference.in_channels,
        z_channels=reference.latent_channels,
        embed_dim=reference.embed_dim,
        n_embed=reference.num_embeddings,
        dropout=reference.dropout,
        mid_attn=reference.attn_type == "vanilla",
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parity_with_chameleon(tmp_path: Path, dtype: str):
    transformers = pytest.importorskip("transformers")
    module = transformers.ChameleonVQVAE(transformers.ChameleonVQVAEConfig(**CHAMELEON)).eval()
    draw_weights(module, lambda images: module.quant_conv(module.encoder(images)))
    images = pictures()
    module = module.to(getattr(torch, dtype))
    module.save_pretrained(tmp_path)
    found = load_vqgan(tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(found.params)} == {np.dtype(np.float32)}
    assert not found.decodes
    assert "encoder only" in found.summary()
    with pytest.raises(InputError, match="has no decoder, so that a model trained on its codes could never draw"):
        require_decoder(tmp_path)
    with torch.no_grad():
        expected = module.float().encode(to_torch(images)).image_tokens.numpy()
    assert_same_codes(encode(found, images), expected)


def test_the_vqgan_of_a_whole_chameleon(tmp_path: Path):
    chameleon_folder(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    found = load_vqgan(tmp_path)
    assert found.config.tokens_per_image == 64
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    file = next(file for name, file in index.items() if name.endswith("vqmodel.quantize.embedding.weight"))
    weights = load_file(tmp_path / file)
    embedding = next(weight for name, weight in weights.items() if name.endswith("vqmodel.quantize.embedding.weight"))
    np.testing.assert_array_equal(found.params["codebook"]["embedding"], embedding)
    (tmp_path / file).unlink()
    with pytest.raises(InputError, match="which is not there; download it too"):
        load_vqgan(tmp_path)
