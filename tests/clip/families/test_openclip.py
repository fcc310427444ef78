"""CLIP, with random weights, in the files of OpenCLIP: its vectors; and what is refused."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from published_clips import (
    MEAN,
    STD,
    TEXTS,
    VOCABULARY,
    assert_vectors,
    edit,
    images,
    module,
    open_clip_weights,
    pillow,
    without_tokenizer,
    write_open_clip,
    write_tokenizer,
)

from rac3.clip.checkpoint import ClipCheckpoint
from rac3.clip.families import openclip
from rac3.clip.images import OPENAI_MEAN, ClipImages
from rac3.clip.model import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from rac3.clip.published import load_clip
from rac3.config import InputError
from rac3.weights.settings import Settings


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("weights", ["open_clip_pytorch_model.bin", "open_clip_model.safetensors"])
def test_open_clip_pipeline(quick_gelu, weights, tmp_path):
    torch, open_clip = module("torch"), module("open_clip")
    vision = dict(layers=2, width=66, head_width=11, mlp_ratio=4.3637, patch_size=12, image_size=36)
    text = dict(context_length=16, vocab_size=VOCABULARY, width=48, heads=4, layers=2)
    settings = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text} | ({"quick_gelu": True} if quick_gelu else {})
    torch.manual_seed(0)
    model = open_clip.model.CLIP(**settings).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))  # biases and scales away from their 0 and 1
    write_tokenizer(tmp_path)
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings, "preprocess_cfg": preprocess}))
    if weights.endswith(".bin"):
        torch.save(model.state_dict(), tmp_path / weights)
    else:
        module("safetensors.torch").save_file(model.state_dict(), tmp_path / weights)
    loaded = load_clip(str(tmp_path))
    assert loaded.config.vision_config.intermediate_size == 288
    assert loaded.config.vision_config.num_attention_heads == 6

    ids = torch.zeros((len(TEXTS), 16), dtype=torch.long)
    for row, tokens in enumerate(map(loaded.tokenizer.encode, TEXTS)):
        tokens = [VOCABULARY - 2, *tokens[:14], VOCABULARY - 1]
        ids[row, : len(tokens)] = torch.tensor(tokens)
    transform = open_clip.transform.image_transform(36, is_train=False, mean=MEAN, std=STD)
    pixels = torch.stack([transform(pillow(image)) for image in images()])
    with torch.no_grad():
        assert_vectors(loaded, model.encode_text(ids), model.encode_image(pixels))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_open_clip_files(prefix, published, tmp_path):
    torch = module("torch")
    write_tokenizer(tmp_path)
    vision = dict(layers=2, width=64, head_width=16, mlp_ratio=1.5, patch_size=12, image_size=36)
    text = dict(context_length=16, vocab_size=VOCABULARY, width=48, heads=4, layers=2, mlp_ratio=2.0)
    settings = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text, "quick_gelu": True}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings, "preprocess_cfg": {}}))
    weights = {f"{prefix}{name}": torch.tensor(value) for name, value in open_clip_weights().items()}
    torch.save(weights, tmp_path / "open_clip_pytorch_model.bin")
    found, expected = load_clip(str(tmp_path)), load_clip(str(published))
    odd, plain = "A red fox\u2019s &amp;amp; \uff21", "a red fox's & a"
    assert found.tokenizer.encode(odd) == found.tokenizer.encode(plain) != expected.tokenizer.encode(odd)
    (tmp_path / "saved").mkdir()
    found.save(tmp_path / "saved")
    assert ClipCheckpoint.open(tmp_path / "saved").tokenizer.encode(odd) == found.tokenizer.encode(plain)
    assert found.config == expected.config
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ({}, "lower"),
        ({"hf_tokenizer_name": "a/b"}, "whitespace"),
        ({"hf_tokenizer_name": "a/b", "tokenizer_kwargs": {"clean": "canonicalize"}}, "canonicalize"),
        ({"tokenizer_kwargs": {}}, "lower"),
    ],
)
def test_how_open_clip_cleans_texts(text, clean):
    assert openclip.read_clean(Settings(Path("a.json"), text)) == clean
    for unknown in ("upper", "", "lowercase"):
        with pytest.raises(InputError, match=r"clean=.* is unknown; use one of lower, whitespace, canonicalize"):
            openclip.read_clean(Settings(Path("a.json"), {"tokenizer_kwargs": {"clean": unknown}}))


def test_open_clip_has_the_exact_gelu_unless_it_asks_for_the_quick_one(copy):
    (copy / "config.json").unlink()
    for settings, act in (({}, "gelu"), ({"quick_gelu": False}, "gelu"), ({"quick_gelu": True}, "quick_gelu")):
        write_open_clip(copy, open_clip_weights(), **settings)
        config = load_clip(str(copy)).config
        assert (config.text_config.hidden_act, config.vision_config.hidden_act) == (act, act)


def read_config(model: dict) -> CLIPConfig:
    return openclip.read_config(Settings(Path("here"), model))


def test_an_open_clip_config_that_names_the_sizes_alone():
    """OpenCLIP's ViT-B-32, as its repository lists it: heads of 64, and an MLP of four times the width."""
    vision = {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
    found = read_config({"embed_dim": 512, "vision_cfg": vision, "text_cfg": text})
    assert found == CLIPConfig(CLIPTextConfig(hidden_act="gelu", eos_token_id=2), CLIPVisionConfig(hidden_act="gelu"))
    assert read_config({"vision_cfg": {"patch_size": 32}, "text_cfg": {}}) == found
    odd = read_config({"vision_cfg": {"mlp_ratio": 2.999}, "text_cfg": {"mlp_ratio": 3.999}})
    assert odd.vision_config.intermediate_size == 2303  # int(768 * 2.999), not rounded
    assert odd.text_config.intermediate_size == 2047


def test_open_clip_defaults():
    assert openclip.read_images(Settings(Path("here"), {}), 224) == ClipImages(mean=OPENAI_MEAN, rounding="even")


def as_open_clip(**vision):
    def apply(folder: Path) -> None:
        (folder / "config.json").unlink()
        (folder / "model.safetensors").rename(folder / "open_clip_model.safetensors")
        settings = {"model_cfg": {"embed_dim": 32, "vision_cfg": vision, "text_cfg": {}}, "preprocess_cfg": {}}
        (folder / "open_clip_config.json").write_text(json.dumps(settings))

    return apply


BROKEN = {
    "OpenCLIP without tokenizer": (
        lambda f: (as_open_clip()(f), without_tokenizer(f)),
        "has no tokenizer; copy .*openai/clip-vit-base-patch32",
    ),
    "OpenCLIP heads without width": (as_open_clip(head_width=0), r"vision_cfg: head_width=0 does not divide width=768"),
    "OpenCLIP heads of another width": (as_open_clip(width=600), "head_width=64 does not divide width=600"),
    "another OpenCLIP": (as_open_clip(attentional_pool=True), r"vision_cfg\.attentional_pool=True is another arch"),
    "OpenCLIP without a model": (
        lambda f: (as_open_clip()(f), edit(f / "open_clip_config.json", model_cfg=None)),
        r"open_clip_config\.json: model_cfg=None is not of type dict; give the model's own config",
    ),
    "an OpenCLIP that is no ViT": (as_open_clip(layers=[3, 4, 6, 3]), r"vision_cfg\.layers=\[3, 4, 6, 3\] is not like"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints(case, copy):
    break_it, message = BROKEN[case]
    break_it(copy)
    with pytest.raises(InputError, match=message) as error:
        load_clip(str(copy))
    assert "\n" not in str(error.value)
    assert str(copy) in str(error.value) or "clip text" in str(error.value)
