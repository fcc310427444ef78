"""SigLIP, with random weights, in the files of transformers: its vectors; and what is refused."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published_clips import BROKEN_FILES, edit, images, in_section, module, pillow
from published_siglips import (
    LENGTH,
    TEXTS,
    TOKENIZERS,
    TOLERANCE,
    apply,
    assert_vectors,
    reference_ids,
    siglip_tokenizer_config,
    write_siglip,
)

from rac3 import recipes
from rac3.artifacts.workdir import Workdir
from rac3.cli import run
from rac3.clip.checkpoint import ClipCheckpoint
from rac3.clip.encoder import Encoder
from rac3.clip.families import siglip
from rac3.clip.published import checkpoint_identity, load_clip
from rac3.config import InputError, load_config_module
from rac3.run import Run
from rac3.tokens.text import load_siglip_tokenizer
from rac3.weights.settings import Settings


@pytest.mark.parametrize("kind", ["gemma", "unigram"])
def test_an_end_of_text_that_is_spelled_out_is_none(tmp_path, kind):
    TOKENIZERS[kind](tmp_path)
    tokenizer = load_siglip_tokenizer(tmp_path)
    for end in ("</s>", "<eos>"):
        ids = tokenizer.encode_with_specials(f"cat {end} red", LENGTH)
        assert ids.count(tokenizer.eos) == 1
        assert ids[-1] == tokenizer.eos
    assert len(tokenizer.encode_with_specials("cat red " * 50, 8)) == 8


@pytest.mark.parametrize("act", ["gelu_pytorch_tanh", "gelu"])
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_siglip_pipeline(tokenizer, act, tmp_path):
    torch = module("torch")
    processors = module("transformers.models.siglip.image_processing_pil_siglip")
    model = write_siglip(tmp_path / "siglip", tokenizer, hidden_act=act)
    loaded = load_clip(str(tmp_path / "siglip"))
    assert loaded.config.text_config.pad_token_id == (0 if tokenizer == "gemma" else 1)
    encoder = loaded.encoder()
    assert isinstance(encoder, Encoder)
    assert encoder.width == 64

    ids = torch.tensor(reference_ids(tmp_path / "siglip", TEXTS))
    np.testing.assert_array_equal(encoder.text(TEXTS)[0], ids)
    processor = processors.SiglipImageProcessorPil.from_pretrained(tmp_path / "siglip")
    pixels = torch.cat([processor(pillow(image), return_tensors="pt")["pixel_values"] for image in images()])
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=pixels)
    assert_vectors(encoder.embed_texts(TEXTS), out.text_embeds)
    assert_vectors(encoder.embed_images(images()), out.image_embeds)

    mask = np.ones(ids.shape, bool)
    raster = jnp.array(pixels.numpy().transpose(0, 2, 3, 1))
    logits = apply(loaded)(jnp.array(ids), jnp.array(mask), raster)
    bound = 2 * 8 * TOLERANCE * np.exp(loaded.params["logit_scale"][0])  # of a product of two vectors of 64 entries
    np.testing.assert_allclose(logits, out.logits_per_text, atol=bound)


def test_other_files_give_the_same(published_siglip, siglip_copy):
    torch, model = module("torch"), module("transformers").SiglipModel.from_pretrained(published_siglip)
    expected = load_clip(str(published_siglip))
    (siglip_copy / "model.safetensors").unlink()
    torch.save(model.state_dict(), siglip_copy / "pytorch_model.bin")
    jax.tree.map(np.testing.assert_array_equal, load_clip(str(siglip_copy)).params, expected.params)
    torch.save(
        {f"module.{name}": weight for name, weight in model.state_dict().items()}, siglip_copy / "pytorch_model.bin"
    )
    jax.tree.map(np.testing.assert_array_equal, load_clip(str(siglip_copy)).params, expected.params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files(dtype, published_siglip, siglip_copy):
    torch, model = module("torch"), module("transformers").SiglipModel.from_pretrained(published_siglip)
    half = model.to(getattr(torch, dtype))
    half.save_pretrained(siglip_copy)
    found = load_clip(str(siglip_copy)).encoder().embed_texts(TEXTS)
    whole = half.to(torch.float32)  # the same rounded weights, computed in float32
    with torch.no_grad():
        assert_vectors(found, whole.get_text_features(torch.tensor(reference_ids(siglip_copy, TEXTS))).pooler_output)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_saved_and_opened(tokenizer, tmp_path):
    write_siglip(tmp_path / "siglip", tokenizer)
    loaded = load_clip(str(tmp_path / "siglip"))
    loaded.save(tmp_path / "saved")
    opened = ClipCheckpoint.open(tmp_path / "saved")
    assert (opened.config, opened.images) == (loaded.config, loaded.images)
    jax.tree.map(np.testing.assert_array_equal, opened.params, loaded.params)
    np.testing.assert_array_equal(opened.encoder().text(TEXTS), loaded.encoder().text(TEXTS))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"text_config": {"vocab_size": 256000}, "vision_config": {"image_size": 384, "patch_size": 14}},
        {"text_config": {"projection_size": 1536}, "vision_config": {"hidden_size": 1536, "num_attention_heads": 16}},
        {
            "text_config": {"hidden_size": 8, "num_attention_heads": 2},
            "vision_config": {"hidden_size": 8, "num_attention_heads": 2},
        },
    ],
)
def test_what_a_config_leaves_out_is_as_in_transformers(settings):
    expected = module("transformers").SiglipConfig(**json.loads(json.dumps(settings)))
    found = siglip.read_config(Settings(Path("here"), settings))
    for tower in ("text_config", "vision_config"):
        for name, value in asdict(getattr(found, tower)).items():
            if name != "projection_size":
                assert value == getattr(getattr(expected, tower), name), (tower, name)
    assert found.width == expected.text_config.projection_size


def no_padding(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"padding_side": "left"}))


BROKEN = {
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"has no tokenizer; copy tokenizer\.json or spiece"),
    "padding on the left": (no_padding, "its tokenizer pads on the left.*padding_side='right'"),
    "a small vocabulary": (in_section("text_config", vocab_size=9), "vocab_size=9 has no room for id"),
    "no pooling head": (
        in_section("vision_config", vision_use_head=False),
        "vision_use_head=False has no image vectors",
    ),
    "oblong images": (
        in_section("vision_config", image_size=[40, 48]),
        r"vision_config\.image_size=\[40, 48\] is not of type int; give the model's own config",
    ),
    "another activation": (in_section("text_config", hidden_act="relu6"), "siglip text: hidden_act='relu6' is unknown"),
    "no heads": (
        in_section("vision_config", num_attention_heads=0),
        "siglip vision: hidden_size=64 is not a multiple of",
    ),
    "two widths": (in_section("text_config", projection_size=32), "text vectors are 32 wide.*image vectors 64"),
    "another preprocessing": (
        lambda f: edit(f / "preprocessor_config.json", size={"height": 48, "width": 40}),
        "size=.*48.* is another preprocessing than size=.*40",
    ),
    "a mean that is none": (
        lambda f: edit(f / "preprocessor_config.json", image_mean=[0.5, 0.5]),
        r"image_mean=\[0\.5, 0\.5\] is not three numbers",
    ),
    **BROKEN_FILES,
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints(case, siglip_copy):
    break_it, message = BROKEN[case]
    break_it(siglip_copy)
    with pytest.raises(InputError, match=message) as error:
        load_clip(str(siglip_copy))
    assert "\n" not in str(error.value)
    assert str(siglip_copy) in str(error.value) or "siglip" in str(error.value)


def test_a_sentencepiece_file_that_is_none(siglip_copy):
    """One line, whether the package that reads it is here or not."""
    (siglip_copy / "tokenizer.json").unlink()
    (siglip_copy / "spiece.model").write_bytes(b"")
    siglip_tokenizer_config(siglip_copy)
    with pytest.raises(InputError, match=r"tokenizer '.*copy' cannot be loaded") as error:
        load_siglip_tokenizer(siglip_copy)
    assert "\n" not in str(error.value)


def test_identity_follows_the_sentencepiece_file(siglip_copy):
    before = checkpoint_identity(str(siglip_copy))
    (siglip_copy / "spiece.model").write_bytes(b"0123")
    assert checkpoint_identity(str(siglip_copy)) != before


def test_the_command_takes_a_checkpoint(siglip_copy, tmp_path, finished_workdir, monkeypatch):
    """Nothing is fitted, and with the artifact no stage loads the published files again."""
    config, finished = finished_workdir
    folder = shutil.copytree(finished, tmp_path / "tiny")
    expected = load_clip(str(siglip_copy)).encoder().embed_texts(TEXTS)
    arguments = [str(config), "--workdir", str(folder), "--clip.checkpoint", str(siglip_copy)]
    run(["encoders", *arguments])
    monkeypatch.setattr("rac3.stages.encoders.load_clip", lambda source: pytest.fail(f"{source} is loaded again"))
    run(["embed", *arguments])

    experiment = load_config_module(str(config)).get_config()
    experiment = replace(experiment, clip=replace(experiment.clip, checkpoint=str(siglip_copy)))
    workdir = Workdir(folder, "tiny")
    np.testing.assert_array_equal(Run(experiment, workdir).encoder.embed_texts(TEXTS), expected)
    queries = workdir.require(recipes.queries(experiment, "test"))
    assert queries.manifest["inputs"]["clip"] == recipes.clip(experiment).fingerprint
