"""taming-transformers and latent-diffusion, with random weights: the same codes and pixels; and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from plain_vqgan import random_params, torch_vqgan
from published_vqgans import (
    CHAMELEON,
    CONFIG,
    GIT_LFS,
    GUMBEL,
    assert_same_codes,
    assert_same_pixels,
    decode,
    diffusers_module,
    draw_weights,
    encode,
    from_torch,
    nearest,
    pictures,
    replaced,
    taming_weights,
    taming_yaml,
    to_torch,
    truncated,
    write_taming,
)

from rac3.config import InputError
from rac3.vqgan.families.taming import model_settings, read_config
from rac3.vqgan.model import VQGAN, VQGANConfig
from rac3.vqgan.published import checkpoint_files, load_vqgan, require_decoder
from rac3.weights.settings import read_settings

torch = pytest.importorskip("torch")


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


def test_what_draws_segmentation_maps_is_ignored_and_said(tmp_path: Path):
    path, _ = write_taming(tmp_path, CONFIG, "taming.models.vqgan.VQNoDiscModel", colorize=torch.ones(3, 8, 1, 1))
    assert load_vqgan(path).summary().startswith("taming VQNoDiscModel, 'colorize' ignored, 64 codes")


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
    config = read_config(model_settings(read_settings(tmp_path / "model.yaml")))
    assert (config.tokens_per_image, config.n_embed, config.embed_dim) == (tokens, n_embed, embed_dim)
    assert config.quantizer == ("gumbel" if target == "GumbelVQ" else "nearest")


def test_settings_of_a_yaml_that_are_rarely_set(tmp_path: Path):
    settings = taming_yaml(CONFIG, "taming.models.vqgan.VQModel")
    rare = {"resamp_with_conv": False, "in_channels": 1, "out_ch": 4, "dropout": 0.1}
    settings["model"]["params"]["ddconfig"] |= rare
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(settings))
    assert read_config(model_settings(read_settings(tmp_path / "model.yaml"))) == replace(CONFIG, **rare)


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


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.yaml").unlink(), "last.ckpt' have no .yaml or .yml file next to them"),
        (lambda folder: (folder / "last.ckpt").unlink(), "has no .ckpt or .pt or .pth file and no config.json"),
        (lambda folder: [(folder / n).touch() for n in ("a.yaml", "b.yaml")] and (folder / "model.yaml").unlink(),
         r"has 2 .yaml files \(a.yaml, b.yaml\), and which one is meant is not clear"),
        (replaced("model.yaml", b"<html>\n  a: [\n</html>"), "model.yaml (is not YAML|holds no settings)"),
        (replaced("model.yaml", b"model: {}"), r"model\.params=None is not of type dict"),
        (replaced("model.yaml", b"\xff\xfe\x00"), "model.yaml is not YAML"),
        (replaced("last.ckpt", b"<!DOCTYPE html>"), "are a web page, not weights"),
        (replaced("last.ckpt", GIT_LFS), "are a Git LFS pointer, not weights"),
        (replaced("last.ckpt", b"PK\x03\x04 cut"), "damaged or truncated"),
        (truncated("last.ckpt"), "damaged or truncated"),
        (break_yaml(target="ldm.models.autoencoder.AutoencoderKL"), "target 'AutoencoderKL' is not supported"),
        (break_yaml(double_z=True), "double_z=True is not supported, only False"),
        (break_yaml(attn_type="linear"), "attn_type='linear' is not supported"),
        (break_yaml(tanh_out=True), "tanh_out=True is not supported"),
        (break_yaml(remap="codes.npy"), "lack 'quantize.used', which remap='codes.npy' asks for"),
        (break_yaml(ch="wide"), "ch='wide' is not of type int"),
        (break_yaml(ch_mult=[1, "2"]), "ch_mult=.* is not a list of whole numbers"),
        (break_yaml(n_embed=32), r"'quantize\.embedding\.weight' has shape \(64, 24\), but the model asks for"),
        (break_yaml(target="x.GumbelVQ"), r"lack 'quantize\.embed\.weight' of shape \(64, 24\) and 2 more; give"),
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
        (
            {"quantize.used": torch.arange(8)},
            r"have 'quantize\.used' of shape \(8,\), which the model has no place for",
        ),
        ({"encoder.conv_blocks.0.res.0.conv1.weight": torch.ones(2)}, "ch_mult=.* has a multiplier below 1"),
        ({"colors": torch.ones(2)}, r"have 'colors' of shape \(2,\), which the model has no place for"),
        (
            {"encoder.conv_in.bias": Path("x")},
            r"lack 'encoder\.conv_in\.bias' of shape \(32,\); give the weights",
        ),
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


def test_a_pickled_module_is_no_weights(taming_folder: Path):
    torch.save(torch.nn.Linear(2, 2), taming_folder / "last.ckpt")
    with pytest.raises(InputError, match=r"hold a torch\.nn\.modules\.linear\.Linear object, not tensors by name"):
        load_vqgan(taming_folder)


def test_the_weights_of_another_family(taming_folder: Path):
    torch.save(diffusers_module().state_dict(), taming_folder / "last.ckpt")
    with pytest.raises(InputError, match=r"lack 'decoder\.\S+' of shape \(.*\) and \d+ more; give the weights and"):
        load_vqgan(taming_folder)
