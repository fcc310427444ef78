"""LlamaGen's VQ, against a module of torch that is laid out as its own is: the same codes and pixels."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from test_vqgan_checkpoints import (
    assert_same_codes,
    assert_same_pixels,
    decode,
    draw_weights,
    encode,
    from_torch,
    pictures,
    to_torch,
)

from rac3.vqgan.checkpoints import load_vqgan
from rac3.vqgan.configs import llamagen_config
from rac3.vqgan.files import require_decoder
from rac3.vqgan.model import VQGANConfig

torch = pytest.importorskip("torch")

LLAMAGEN = {"ch": 32, "ch_mult": (1, 2, 4), "z_channels": 48, "codes": 64, "embed_dim": 8}


def llamagen_module():
    """LlamaGen's VQ as a module of torch: the names of its weights are those of its parts here."""
    torch.manual_seed(0)
    nn, functional = torch.nn, torch.nn.functional
    ch, multipliers = LLAMAGEN["ch"], LLAMAGEN["ch_mult"]
    widths = [ch * multiplier for multiplier in multipliers]

    def norm(width: int):
        return nn.GroupNorm(32, width, eps=1e-6)

    class Res(nn.Module):
        def __init__(self, width: int, out: int):
            super().__init__()
            self.norm1, self.conv1 = norm(width), nn.Conv2d(width, out, 3, padding=1)
            self.norm2, self.conv2 = norm(out), nn.Conv2d(out, out, 3, padding=1)
            if width != out:
                self.nin_shortcut = nn.Conv2d(width, out, 1)

        def forward(self, x):
            h = self.conv1(functional.silu(self.norm1(x)))
            h = self.conv2(functional.silu(self.norm2(h)))
            return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)

    class Attention(nn.Module):
        def __init__(self, width: int):
            super().__init__()
            self.norm = norm(width)
            self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

        def forward(self, x):
            h = self.norm(x)
            q, k, v = (part(h).flatten(2).mT for part in (self.q, self.k, self.v))
            return x + self.proj_out(functional.scaled_dot_product_attention(q, k, v).mT.reshape(x.shape))

    class Resample(nn.Module):
        def __init__(self, width: int, down: bool):
            super().__init__()
            self.down = down
            self.conv = nn.Conv2d(width, width, 3, stride=2) if down else nn.Conv2d(width, width, 3, padding=1)

        def forward(self, x):
            return self.conv(
                functional.pad(x, (0, 1, 0, 1)) if self.down else x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            )

    class Level(nn.Module):
        def __init__(self, width: int, out: int, blocks: int, attends: bool, resample: str | None):
            super().__init__()
            self.res = nn.ModuleList(Res(out if block else width, out) for block in range(blocks))
            self.attn = nn.ModuleList(Attention(out) for _ in range(blocks * attends))
            self.resample = resample
            if resample:
                self.add_module(resample, Resample(out, resample == "downsample"))

        def forward(self, x):
            for block, res in enumerate(self.res):
                x = res(x)
                x = self.attn[block](x) if self.attn else x
            return getattr(self, self.resample)(x) if self.resample else x

    class Half(nn.Module):
        """The encoder, or the decoder: there the middle comes first."""

        def __init__(self, encoder: bool):
            super().__init__()
            low, z, levels = widths[-1], LLAMAGEN["z_channels"], len(widths)
            self.encoder = encoder
            self.conv_in = nn.Conv2d(3 if encoder else z, ch if encoder else low, 3, padding=1)
            path = [ch, *widths] if encoder else [low, *reversed(widths)]
            self.conv_blocks = nn.ModuleList(
                Level(
                    *path[place : place + 2],
                    blocks=2 if encoder else 3,
                    attends=place == (levels - 1 if encoder else 0),
                    resample=("downsample" if encoder else "upsample") if place < levels - 1 else None,
                )
                for place in range(levels)
            )
            self.mid = nn.ModuleList([Res(low, low), Attention(low), Res(low, low)])
            self.norm_out = norm(path[-1])
            self.conv_out = nn.Conv2d(path[-1], z if encoder else 3, 3, padding=1)

        def forward(self, x):
            x = self.conv_in(x)
            for part in (*self.conv_blocks, *self.mid) if self.encoder else (*self.mid, *self.conv_blocks):
                x = part(x)
            return self.conv_out(functional.silu(self.norm_out(x)))

    class Quantize(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(LLAMAGEN["codes"], LLAMAGEN["embed_dim"])
            self.register_buffer("codebook_used", torch.zeros(65536))

        def forward(self, z):
            """The codes of [batch, channel, height, width], and the vectors that they stand for."""
            unit = functional.normalize(self.embedding.weight, dim=-1)
            rows = functional.normalize(z.permute(0, 2, 3, 1), dim=-1)
            codes = torch.cdist(rows.flatten(0, 2), unit, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
            return codes.reshape(rows.shape[:3]), unit

    class VQ(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder, self.quantize = Half(True), Half(False), Quantize()
            self.quant_conv = nn.Conv2d(LLAMAGEN["z_channels"], LLAMAGEN["embed_dim"], 1)
            self.post_quant_conv = nn.Conv2d(LLAMAGEN["embed_dim"], LLAMAGEN["z_channels"], 1)

    module = VQ().eval()
    draw_weights(module, lambda images: module.quant_conv(module.encoder(images)))
    with torch.no_grad():  # codes of different lengths, which must not matter
        module.quantize.embedding.weight.mul_(torch.rand(LLAMAGEN["codes"], 1) + 0.5)
    return module


def write_llamagen(path: Path, entry: str = "model"):
    """A checkpoint as LlamaGen writes it: no config; and the module in it."""
    module = llamagen_module()
    torch.save({entry: module.state_dict(), "steps": 3, "args": Namespace(vq_model="VQ-16")}, path)
    return module


@pytest.mark.parametrize("entry", ["model", "ema"])
def test_parity_with_llamagen(tmp_path: Path, entry: str):
    module = write_llamagen(tmp_path / "vq_ds4.pt", entry)
    assert "decoder.conv_blocks.0.upsample.conv.weight" in module.state_dict()
    (tmp_path / "a.yaml").touch()  # of others
    (tmp_path / "b.yaml").touch()
    require_decoder(tmp_path / "vq_ds4.pt")
    found = load_vqgan(tmp_path / "vq_ds4.pt", resolution=32)
    assert found.summary().startswith("LlamaGen VQ-4, 64 codes, 64 tokens per image of 32 x 32; 1 foreign")

    images = pictures()
    with torch.no_grad():
        expected, unit = module.quantize(module.quant_conv(module.encoder(to_torch(images))))
        codes = encode(found, images)
        assert_same_codes(codes, expected.numpy())
        vectors = unit[torch.from_numpy(codes).long()].reshape(4, 8, 8, 8).permute(0, 3, 1, 2)
        pixels = from_torch(module.decoder(module.post_quant_conv(vectors)))
    assert_same_pixels(decode(found, codes), pixels)


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
    config = llamagen_config(Path("vq.pt"), {name: np.broadcast_to(0.0, shape) for name, shape in shapes.items()})
    assert config == VQGANConfig(
        ch_mult=multipliers, attn_resolutions=(config.grid,), z_channels=256, n_embed=16384, embed_dim=8
    )
    assert config.tokens_per_image == tokens
