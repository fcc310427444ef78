"""LlamaGen's VQ, against a module of torch with its layout: the same codes and pixels; and what is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from published_vqgans import (
    assert_same_codes,
    assert_same_pixels,
    decode,
    encode,
    from_torch,
    llamagen_module,
    pictures,
    to_torch,
    write_llamagen,
)

from rac3.config import InputError
from rac3.vqgan.families.llamagen import read_config
from rac3.vqgan.model import VQGANConfig
from rac3.vqgan.published import load_vqgan, require_decoder

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("entry", ["model", "ema"])
def test_parity_with_llamagen(tmp_path: Path, entry: str):
    module = write_llamagen(tmp_path / "vq_ds4.pt", entry)
    assert "decoder.conv_blocks.0.upsample.conv.weight" in module.state_dict()
    (tmp_path / "a.yaml").touch()  # of others
    (tmp_path / "b.yaml").touch()
    require_decoder(tmp_path / "vq_ds4.pt")
    found = load_vqgan(tmp_path / "vq_ds4.pt", resolution=32)
    averaged = ", averaged weights (ema)" if entry == "ema" else ""
    assert found.summary().startswith(f"LlamaGen VQ-4{averaged}, 64 codes, 64 tokens per image of 32 x 32; 1 foreign")

    images = pictures()
    with torch.no_grad():
        expected, unit = module.quantize(module.quant_conv(module.encoder(to_torch(images))))
        codes = encode(found, images)
        assert_same_codes(codes, expected.numpy())
        vectors = unit[torch.from_numpy(codes).long()].reshape(4, 8, 8, 8).permute(0, 3, 1, 2)
        pixels = from_torch(module.decoder(module.post_quant_conv(vectors)))
    assert_same_pixels(decode(found, codes), pixels)


def test_of_a_training_file_the_averaged_weights_are_taken(tmp_path: Path):
    weights = llamagen_module().state_dict()
    name = "encoder.conv_in.bias"
    other = weights | {name: weights[name] + 1}
    torch.save({"model": other, "ema": weights, "optimizer": {}, "steps": 3}, tmp_path / "vq.pt")
    found = load_vqgan(tmp_path / "vq.pt")
    np.testing.assert_array_equal(found.params["encoder"]["conv_in"]["bias"], weights[name].numpy())


@pytest.mark.parametrize(("multipliers", "tokens"), [((1, 2, 2, 4), 1024), ((1, 1, 2, 2, 4), 256)], ids=["ds8", "ds16"])
def test_the_sizes_of_llamagen_are_read_off_its_weights(multipliers: tuple[int, ...], tokens: int):
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.conv_out.weight": (256, 512, 3, 3),
        "decoder.conv_out.weight": (3, 128, 3, 3),
        "quantize.embedding.weight": (16384, 8),
        f"encoder.conv_blocks.{len(multipliers) - 1}.attn.0.norm.weight": (512,),
    }
    for level, multiplier in enumerate(multipliers):
        for block in range(2):
            shapes[f"encoder.conv_blocks.{level}.res.{block}.conv1.weight"] = (128 * multiplier, 128, 3, 3)
    config = read_config(Path("vq.pt"), {name: np.broadcast_to(0.0, shape) for name, shape in shapes.items()})
    assert config == VQGANConfig(
        ch_mult=multipliers, attn_resolutions=(config.grid,), z_channels=256, n_embed=16384, embed_dim=8
    )
    assert config.tokens_per_image == tokens


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
        (
            lambda weights: weights.update({"encoder.conv_in.weight": torch.ones(16, 3, 3, 3)}),
            r"lack 'encoder\.conv_blocks\.0\.res\.0\.nin_shortcut\.bias' of shape \(32,\) and 1 more",
        ),
        (
            lambda weights: weights.update({"quant_conv.weight": torch.ones(8, 47, 1, 1)}),
            r"'quant_conv\.weight' has shape \(8, 47, 1, 1\), but the model asks for \(8, 48, 1, 1\); give the weights",
        ),
    ],
)
def test_damaged_llamagen(tmp_path: Path, damage: Callable[[dict], object], message: str):
    weights = llamagen_module().state_dict()
    damage(weights)
    torch.save({"model": weights}, tmp_path / "vq.pt")
    with pytest.raises(InputError, match=message) as error:
        load_vqgan(tmp_path / "vq.pt")
    assert "\n" not in str(error.value)
