"""Published VQGAN formats, with random weights, through the files that the peers write: the same codes and pixels."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax.traverse_util import flatten_dict
from plain_vqgan import apply, random_params, torch_vqgan
from safetensors.numpy import load_file, save_file

from rac3.artifacts.workdir import Workdir
from rac3.cli import run
from rac3.config import InputError, load_config_module
from rac3.documents.document import Image
from rac3.run import Run
from rac3.vqgan.checkpoints import VQGANCheckpoint, load_vqgan
from rac3.vqgan.codec import VQGANCodec
from rac3.vqgan.configs import chameleon_config, diffusers_config, read_settings, taming_config, taming_model
from rac3.vqgan.files import checkpoint_files, require_decoder
from rac3.vqgan.frozen import FrozenVQGAN
from rac3.vqgan.model import VQGAN, VQGANConfig, at_resolution
from rac3.vqgan.weights import taming_name

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


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The biases that torch draws for new modules are the same in every run."""
    torch.manual_seed(0)


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


# taming-transformers and latent-diffusion


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
    """Parameters under taming's names and in torch's layout, with what else such a file has."""
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
    """A checkpoint as PyTorch Lightning writes it, its yaml beside it; and the weights in it."""
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


@pytest.mark.parametrize("target", ["taming.models.vqgan.VQModel", "ldm.models.autoencoder.VQModelInterface"])
def test_taming_and_latent_diffusion(tmp_path: Path, target: str):
    path, weights = write_taming(tmp_path, CONFIG, target)
    found = load_vqgan(path)
    assert found.config == CONFIG
    assert "64 codes, 64 tokens per image of 32 x 32" in found.summary()
    assert "pathlib.PosixPath" in " ".join(found.skipped)
    assert found.summary().startswith("latent-diffusion" if target.startswith("ldm") else "taming VQModel")

    images = pictures()
    codes = encode(found, images)
    latents = from_torch(torch_vqgan(weights, CONFIG, to_torch(images)))
    embedding = weights["quantize.embedding.weight"].numpy()
    assert_same_codes(codes, nearest(latents, embedding))
    vectors = embedding[codes].reshape(4, 8, 8, 24)
    assert_same_pixels(decode(found, codes), from_torch(torch_vqgan(weights, CONFIG, to_torch(vectors))))


def test_gumbel_codes_have_the_largest_logit(tmp_path: Path):
    path, weights = write_taming(tmp_path, GUMBEL, "taming.models.vqgan.GumbelVQ")
    found = load_vqgan(tmp_path)
    assert found.config == GUMBEL
    assert checkpoint_files(path) == checkpoint_files(tmp_path) == checkpoint_files(tmp_path / "model.yaml")

    images = pictures()
    logits = torch.nn.functional.conv2d(
        torch_vqgan(weights, GUMBEL, to_torch(images)), weights["quantize.proj.weight"], weights["quantize.proj.bias"]
    )
    codes = encode(found, images)
    assert_same_codes(codes, logits.argmax(dim=1).numpy())
    vectors = weights["quantize.embed.weight"].numpy()[codes].reshape(4, 8, 8, 48)
    assert_same_pixels(decode(found, codes), from_torch(torch_vqgan(weights, GUMBEL, to_torch(vectors))))


def test_the_first_stage_of_a_whole_latent_diffusion_model(tmp_path: Path):
    unet = {"model.diffusion_model.weight": torch.ones(2)}
    write_taming(tmp_path, CONFIG, prefix="first_stage_model.", **unet)
    inner = taming_yaml(CONFIG, "ldm.models.autoencoder.VQModelInterface")["model"]
    outer = {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {"first_stage_config": inner}}}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(outer))
    assert load_vqgan(tmp_path).config == CONFIG


def test_no_attention_at_all(tmp_path: Path):
    config = replace(CONFIG, mid_attn=False, attn_resolutions=())
    write_taming(tmp_path, config)
    settings = taming_yaml(CONFIG, "ldm.models.autoencoder.VQModel")
    settings["model"]["params"]["ddconfig"]["attn_type"] = "none"
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(settings))
    assert load_vqgan(tmp_path).config == config


REMAPPED = np.random.default_rng(1).permutation(64)[:40]
"""The codes that are kept, in an order of their own."""


def set_params(folder: Path, **changes: object) -> None:
    settings = yaml.safe_load((folder / "model.yaml").read_text())
    settings["model"]["params"] |= changes
    (folder / "model.yaml").write_text(yaml.safe_dump(settings))


@pytest.mark.parametrize("unknown", ["random", "extra", 3])
def test_remapped_codes_are_positions_among_those_that_are_kept(tmp_path: Path, unknown: str | int):
    path, weights = write_taming(tmp_path, CONFIG, **{"quantize.used": torch.from_numpy(REMAPPED)})
    set_params(tmp_path, remap="data/used.npy", unknown_index=unknown, sane_index_shape=True)  # no such file
    found = load_vqgan(path)
    assert found.config == replace(CONFIG, n_embed=40)
    assert "40 codes" in found.summary()

    images, embedding = pictures(), weights["quantize.embedding.weight"].numpy()
    latents = from_torch(torch_vqgan(weights, CONFIG, to_torch(images)))
    of_all = nearest(latents, embedding).reshape(4, 64)
    position = {code: token for token, code in enumerate(REMAPPED.tolist())}
    kept = np.isin(of_all, REMAPPED)
    assert 0.2 < kept.mean() < 0.9
    codes = encode(found, images)
    assert_same_codes(codes[kept], np.array([position[code] for code in of_all[kept].tolist()]))
    # taming puts `unknown_index` here
    assert_same_codes(codes[~kept], nearest(latents, embedding[REMAPPED]).reshape(4, 64)[~kept])
    vectors = embedding[REMAPPED[codes]].reshape(4, 8, 8, 24)
    assert_same_pixels(decode(found, codes), from_torch(torch_vqgan(weights, CONFIG, to_torch(vectors))))


def test_remapped_codes_of_a_gumbel(tmp_path: Path):
    used = {"quantize.used": torch.from_numpy(REMAPPED)}
    path, weights = write_taming(tmp_path, GUMBEL, "taming.models.vqgan.GumbelVQ", **used)
    set_params(tmp_path, remap="data/used.npy")
    found = load_vqgan(path)
    images = pictures()
    logits = torch.nn.functional.conv2d(
        torch_vqgan(weights, GUMBEL, to_torch(images)), weights["quantize.proj.weight"], weights["quantize.proj.bias"]
    )
    codes = encode(found, images)
    assert_same_codes(codes, logits[:, REMAPPED].argmax(dim=1).numpy())
    vectors = weights["quantize.embed.weight"].numpy()[REMAPPED[codes]].reshape(4, 8, 8, 48)
    assert_same_pixels(decode(found, codes), from_torch(torch_vqgan(weights, GUMBEL, to_torch(vectors))))


def test_settings_that_do_not_change_codes(tmp_path: Path):
    path, _ = write_taming(tmp_path, CONFIG)
    plain = load_vqgan(path)
    set_params(tmp_path, legacy=False, sane_index_shape=True, remap=None, monitor="val/rec_loss", image_key="image")
    found = load_vqgan(path)
    assert found.config == plain.config
    jax.tree.map(np.testing.assert_array_equal, found.params, plain.params)


@pytest.mark.parametrize("named", ["vqgan.ckpt", "vqgan.yaml", "."])
def test_the_checkpoint_that_chameleon_publishes(tmp_path: Path, named: str):
    """Its own two files: a state dict of taming's names, and a yaml that need not name a class."""
    transformers = pytest.importorskip("transformers")
    module = transformers.ChameleonVQVAE(transformers.ChameleonVQVAEConfig(**CHAMELEON | {"attn_resolutions": None}))
    draw_weights(module.eval(), lambda images: module.quant_conv(module.encoder(images)))
    config = VQGANConfig(
        ch=32, ch_mult=(1, 2, 2), attn_resolutions=(), resolution=32, z_channels=16, embed_dim=24, n_embed=64
    )
    weights = taming_weights(config, random_params(VQGAN(config))) | module.state_dict()
    torch.save({"state_dict": weights}, tmp_path / "vqgan.ckpt")
    settings = taming_yaml(config, "")["model"]["params"]
    settings["lossconfig"] = {"target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", "params": {}}
    (tmp_path / "vqgan.yaml").write_text(yaml.safe_dump({"model": {"params": settings}}))
    (tmp_path / "text_tokenizer.json").write_text("{}")
    require_decoder(tmp_path / named)
    found = load_vqgan(tmp_path / named)
    assert found.config == config

    images = pictures()
    with torch.no_grad():
        expected = module.encode(to_torch(images)).image_tokens.numpy()
    codes = encode(found, images)
    assert_same_codes(codes, expected)
    vectors = weights["quantize.embedding.weight"].numpy()[codes].reshape(4, 8, 8, 24)
    assert_same_pixels(decode(found, codes), from_torch(torch_vqgan(weights, config, to_torch(vectors))))


@pytest.mark.parametrize(
    ("target", "ddconfig", "embed_dim", "n_embed", "tokens"),
    [
        ("VQModel", {"z_channels": 256, "ch_mult": [1, 1, 2, 2, 4], "attn_resolutions": [16]}, 256, 16384, 256),
        ("GumbelVQ", {"z_channels": 256, "ch_mult": [1, 1, 2, 4], "attn_resolutions": [32]}, 256, 8192, 1024),
        ("VQModelInterface", {"z_channels": 4, "ch_mult": [1, 2, 2, 4], "attn_resolutions": [32]}, 4, 16384, 1024),
        ("VQModelInterface", {"z_channels": 3, "ch_mult": [1, 2, 4], "attn_resolutions": []}, 3, 8192, 4096),
        (
            "VQModel",
            {"resolution": 512, "z_channels": 256, "ch_mult": [1, 1, 2, 2, 4], "attn_resolutions": []},
            256,
            8192,
            1024,
        ),
    ],
    ids=["imagenet_f16_16384", "gumbel_f8", "vq-f8", "vq-f4", "chameleon"],
)
def test_configs_of_the_published_sizes(
    tmp_path: Path, target: str, ddconfig: dict, embed_dim: int, n_embed: int, tokens: int
):
    """The sizes are too large to draw here: only the config is read."""
    common = {"double_z": False, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128, "num_res_blocks": 2}
    params = {"embed_dim": embed_dim, "n_embed": n_embed, "ddconfig": common | ddconfig | {"dropout": 0.0}}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({"model": {"target": f"x.{target}", "params": params}}))
    config = taming_config(taming_model(read_settings(tmp_path / "model.yaml")))
    assert (config.tokens_per_image, config.n_embed, config.embed_dim) == (tokens, n_embed, embed_dim)
    assert config.quantizer == ("gumbel" if target == "GumbelVQ" else "nearest")


def test_settings_of_a_yaml_that_are_rarely_set(tmp_path: Path):
    settings = taming_yaml(CONFIG, "taming.models.vqgan.VQModel")
    rare = {"resamp_with_conv": False, "in_channels": 1, "out_ch": 4, "dropout": 0.1}
    settings["model"]["params"]["ddconfig"] |= rare
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(settings))
    assert taming_config(taming_model(read_settings(tmp_path / "model.yaml"))) == replace(CONFIG, **rare)


# diffusers


def diffusers_module(**changes: object):
    diffusers = pytest.importorskip("diffusers")
    module = diffusers.VQModel(**DIFFUSERS | changes).eval()
    draw_weights(module, lambda images: module.encode(images).latents)
    return module


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
    some, everything = (diffusers_config(read_settings(tmp_path / name)) for name in ("some.json", "all.json"))
    assert some == everything
    assert (some.n_embed, some.z_channels, some.norm_groups) == (256, 3, 32)


# transformers


def test_what_a_config_of_chameleon_leaves_out_is_as_in_transformers(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text("{}")
    found, reference = chameleon_config(read_settings(tmp_path / "config.json")), transformers.ChameleonVQVAEConfig()
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


def chameleon_folder(folder: Path) -> None:
    """A whole small Chameleon, in shards."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    heads = {"num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 32}
    mapping = {"<image>": 100} | {f"IMGIMG{'ABCD'[i // 16]}{'ABCDEFGHIJKLMNOP'[i % 16]}Z": i for i in range(64)}
    config = transformers.ChameleonConfig(**sizes, **heads, vq_config=CHAMELEON, vocabulary_map=mapping)
    transformers.ChameleonForConditionalGeneration(config).save_pretrained(folder, max_shard_size="100KB")


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


# The stages


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
    with pytest.raises(InputError, match="damaged or cut short"):
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


def test_drawing_without_a_decoder_is_refused():
    model = VQGAN(CONFIG)
    params = random_params(model)
    del params["decoder"]
    codec = VQGANCodec(model, params)
    pixels = [np.zeros((40, 50, 3), np.uint8)]
    with pytest.raises(InputError, match="no decoder"):
        codec.decode(codec.encode(pixels))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resolution": 256}, "vqgan.resolution=256 is for a checkpoint"),
        ({"model": GUMBEL}, "vqgan.model.quantizer='gumbel' can't be fitted here"),
    ],
)
def test_settings_of_checkpoints_are_refused_without_one(settings: dict, message: str):
    with pytest.raises(InputError, match=message):
        FrozenVQGAN(**settings)
    FrozenVQGAN(checkpoint="vqgan.ckpt", **settings)
