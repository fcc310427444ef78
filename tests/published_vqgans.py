"""Published VQGANs, small and with random weights, written as their libraries write them; and what to compare.

torch is imported by the tests that need it: they skip without it.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax.traverse_util import flatten_dict
from plain_vqgan import apply, random_params

from rac3.vqgan.checkpoint import VQGANCheckpoint
from rac3.vqgan.family import taming_name
from rac3.vqgan.model import VQGAN, VQGANConfig

torch = pytest.importorskip("torch")

CONFIG = VQGANConfig(
    ch=32,
    ch_mult=(1, 2, 2),
    num_res_blocks=1,
    attn_resolutions=(8,),
    resolution=32,
    z_channels=48,
    embed_dim=24,
    n_embed=64,
)
GUMBEL = replace(CONFIG, embed_dim=48, quantizer="gumbel")
DIFFUSERS = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
    "layers_per_block": 2,
    "latent_channels": 6,
    "vq_embed_dim": 4,
    "num_vq_embeddings": 64,
    "norm_num_groups": 16,
    "sample_size": 32,
}
CHAMELEON = {
    "embed_dim": 24,
    "num_embeddings": 64,
    "latent_channels": 16,
    "resolution": 32,
    "base_channels": 32,
    "channel_multiplier": [1, 2, 2],
    "num_res_blocks": 2,
    "attn_resolutions": [16],
}


def pictures(number: int = 4, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (number, size, size, 3)).astype(np.float32)


def to_torch(images: np.ndarray):
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)


def from_torch(images) -> np.ndarray:
    return images.detach().permute(0, 2, 3, 1).numpy()


def draw_weights(module, latents: Callable) -> None:
    """Weights that keep the scale of what passes, biases and norms that matter, and codes among the latents."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
        rows = latents(to_torch(pictures())).permute(0, 2, 3, 1).flatten(0, 2)
        codes = rows[torch.randperm(len(rows))[: len(module.quantize.embedding.weight)]]
        module.quantize.embedding.weight.copy_(codes + 0.1 * rows.std() * torch.randn_like(codes))


def encode(found: VQGANCheckpoint, images: np.ndarray) -> np.ndarray:
    return np.array(apply(VQGAN(found.config), found.params, jnp.asarray(images), "encode"))


def decode(found: VQGANCheckpoint, codes: np.ndarray) -> np.ndarray:
    return np.array(apply(VQGAN(found.config), found.params, jnp.asarray(codes), "decode"))


def nearest(vectors: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return np.argmin(np.sum((vectors[..., None, :] - codes) ** 2, axis=-1), axis=-1)


def assert_same_codes(codes: np.ndarray, expected: np.ndarray) -> None:
    assert len(np.unique(expected)) > 20
    share = np.mean(codes.reshape(-1) == expected.reshape(-1))
    print(f"equal codes: {share:.2%} of {expected.size}")
    assert share >= 0.999


def assert_same_pixels(decoded: np.ndarray, expected: np.ndarray) -> None:
    print(
        f"pixels: largest difference {np.abs(decoded - expected).max():.1e}, largest value {np.abs(expected).max():.1f}"
    )
    # float32 sums over up to 576 terms, some 30 layers deep; relative to the largest value
    np.testing.assert_allclose(decoded, expected, atol=1e-5 * np.abs(expected).max())


def taming_yaml(config: VQGANConfig, target: str) -> dict:
    ddconfig = {
        "double_z": False,
        "z_channels": config.z_channels,
        "resolution": config.resolution,
        "in_channels": 3,
        "out_ch": 3,
        "ch": config.ch,
        "ch_mult": list(config.ch_mult),
        "num_res_blocks": config.num_res_blocks,
        "attn_resolutions": list(config.attn_resolutions),
        "dropout": 0.0,
    }
    params = {"embed_dim": config.embed_dim, "n_embed": config.n_embed, "ddconfig": ddconfig, "lossconfig": {"a": 1}}
    return {"model": {"base_learning_rate": 4.5e-06, "target": target, "params": params}}


def taming_weights(config: VQGANConfig, params: dict) -> dict:
    """Parameters under taming's names and in torch's layout, with the others that such a file has."""
    weights = {}
    for path, x in flatten_dict(params, sep="/").items():
        name = taming_name(path)
        value = np.array(x)
        if config.quantizer == "gumbel":
            name = name.replace("quantize.embedding.", "quantize.embed.")
        if name == "quantize.proj.weight":
            value = value[:, :, None, None]
        elif value.ndim == 4:
            value = value.transpose(3, 2, 0, 1)
        weights[name] = torch.from_numpy(np.ascontiguousarray(value))
    training = {"loss.discriminator.main.0.weight": torch.ones(2), "loss.logvar": torch.ones(())}
    return weights | training | {"model_ema.decay": torch.ones(()), "model_ema.encoderconv_inweight": torch.ones(2)}


def write_taming(
    folder: Path, config: VQGANConfig, target: str = "taming.models.vqgan.VQModel", prefix: str = "", **extra: object
) -> tuple[Path, dict]:
    """A checkpoint as PyTorch Lightning writes it, with its yaml; and the weights in it."""
    weights = taming_weights(config, random_params(VQGAN(config)))
    saved = {
        "epoch": 3,
        "callbacks": {Path: {"best": folder}},
        "state_dict": {prefix + k: w for k, w in weights.items()},
    }
    saved["state_dict"] |= extra
    torch.save(saved, folder / "last.ckpt")
    (folder / "model.yaml").write_text(yaml.safe_dump(taming_yaml(config, target)))
    return folder / "last.ckpt", weights


GIT_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def truncated(name: str) -> Callable[[Path], None]:
    """Half of a file."""

    def truncate(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return truncate


def replaced(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def diffusers_module(**changes: object):
    diffusers = pytest.importorskip("diffusers")
    module = diffusers.VQModel(**DIFFUSERS | changes).eval()
    draw_weights(module, lambda images: module.encode(images).latents)
    return module


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


def chameleon_folder(folder: Path) -> None:
    """A whole small Chameleon, in shards."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    heads = {"num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 32}
    mapping = {"<image>": 100} | {f"IMGIMG{'ABCD'[i // 16]}{'ABCDEFGHIJKLMNOP'[i % 16]}Z": i for i in range(64)}
    config = transformers.ChameleonConfig(**sizes, **heads, vq_config=CHAMELEON, vocabulary_map=mapping)
    transformers.ChameleonForConditionalGeneration(config).save_pretrained(folder, max_shard_size="100KB")
