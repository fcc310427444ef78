"""CLIP, with random weights, in the files of transformers: its vectors; and what is refused."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from published_clips import (
    BROKEN_FILES,
    CONFIG,
    TEXTS,
    VOCABULARY,
    assert_same,
    assert_vectors,
    change_weights,
    edit,
    hugging_face_model,
    images,
    module,
    pillow,
    random_weights,
    without_tokenizer,
)

from rac3.clip.families import huggingface
from rac3.clip.images import ClipImages
from rac3.clip.published import load_clip
from rac3.config import InputError
from rac3.weights.settings import Settings


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos", [2, VOCABULARY - 1])
def test_hugging_face_pipeline(act, eos, published, tmp_path):
    torch, transformers = module("torch"), module("transformers")
    processors = module("transformers.models.clip.image_processing_pil_clip")
    folder = shutil.copytree(published, tmp_path / "clip")
    text = CONFIG["text_config"] | {"hidden_act": act, "eos_token_id": eos}
    edit(folder / "config.json", text_config=text, vision_config=CONFIG["vision_config"] | {"hidden_act": act})
    model = hugging_face_model(folder)
    loaded = load_clip(str(folder))
    assert loaded.config.text_config.eos_token_id == eos

    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    tokens = tokenizer(TEXTS, padding=True, truncation=True, max_length=16, return_tensors="pt")
    processor = processors.CLIPImageProcessorPil.from_pretrained(folder)
    pixels = torch.cat([processor(pillow(image), return_tensors="pt")["pixel_values"] for image in images()])
    with torch.no_grad():
        out = model(**tokens, pixel_values=pixels)
    assert_vectors(loaded, out.text_embeds, out.image_embeds)


@pytest.mark.parametrize("kind", ["sharded safetensors", "bin", "sharded bin"])
def test_the_same_weights_in_other_files(kind, published, copy):
    torch, model = module("torch"), hugging_face_model(published)
    (copy / "model.safetensors").unlink()
    if kind == "sharded safetensors":
        model.save_pretrained(copy, max_shard_size="50KB")
        assert len(list(copy.glob("model-*.safetensors"))) > 2
    elif kind == "bin":
        old = {"text_model.embeddings.position_ids": torch.arange(16)[None]}
        torch.save(model.state_dict() | old, copy / "pytorch_model.bin")
    else:
        names = list(model.state_dict())
        shards = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
        for shard, part in shards.items():
            torch.save({name: model.state_dict()[name].clone() for name in part}, copy / shard)
        index = {"weight_map": {name: shard for shard, part in shards.items() for name in part}}
        (copy / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_same(load_clip(str(copy)), load_clip(str(published)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_becomes_float32(dtype, published, copy):
    torch, model = module("torch"), hugging_face_model(published)
    exact = flatten_dict(load_clip(str(published)).params, sep="/")
    model.to(getattr(torch, dtype)).save_pretrained(copy)
    found = flatten_dict(load_clip(str(copy)).params, sep="/")
    bound = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]  # of one rounding; float16 also has subnormals
    for name, values in found.items():
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, exact[name], rtol=bound, atol=2.0**-25)


def test_new_processors_settings(published, copy):
    (copy / "preprocessor_config.json").unlink()
    inner = {"size": {"shortest_edge": 36}, "crop_size": {"height": 36, "width": 36}, "image_mean": [0.1] * 3}
    (copy / "processor_config.json").write_text(json.dumps({"image_processor": inner}))
    assert load_clip(str(copy)).images == replace(ClipImages(), mean=(0.1,) * 3)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"text_config": None, "vision_config": None},
        {"projection_dim": 768, "text_config": {"hidden_size": 768, "num_attention_heads": 12}},
        {"text_config": {"hidden_act": "gelu"}, "vision_config": {"patch_size": 14, "projection_dim": 1024}},
        {"text_config": {"hidden_size": 8}, "text_config_dict": {"num_hidden_layers": 3, "eos_token_id": 2}},
        {"vision_config": {"image_size": 336, "hidden_size": 8}, "vision_config_dict": {"image_size": 384}},
    ],
)
def test_what_a_config_leaves_out_is_as_in_transformers(settings):
    transformers = module("transformers")
    found = huggingface.read_config(Settings(Path("here"), settings))
    expected = transformers.CLIPConfig(**json.loads(json.dumps(settings)))
    for tower in ("text_config", "vision_config"):
        for name, value in asdict(getattr(found, tower)).items():
            assert value == getattr(getattr(expected, tower), name), (tower, name)
    assert found.projection_dim == expected.projection_dim


BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), r"has no config\.json"),
    "config that is a page": (lambda f: (f / "config.json").write_text("<html>"), r"config\.json' is not JSON"),
    "another model": (lambda f: edit(f / "config.json", model_type="bert"), "model_type='bert'.*give one with 'clip'"),
    "a size that is none": (
        lambda f: edit(f / "config.json", projection_dim="32"),
        r"config\.json: projection_dim='32' is not of type int; give the model's own config",
    ),
    "another activation": (
        lambda f: edit(f / "config.json", text_config={"hidden_act": "relu6"}),
        "hidden_act='relu6' is unknown",
    ),
    **BROKEN_FILES,
    "missing weights": (
        change_weights(visual_projection__weight=None),
        r"model\.safetensors' lack 'visual_projection\.weight' of shape \(32, 64\); give the weights and the config of",
    ),
    "surplus weights": (
        change_weights(a__lora=np.zeros(3, np.float32), b__lora=np.zeros(3, np.float32)),
        r"model\.safetensors' have 'a\.lora' of shape \(3,\) and 1 more, which the model has no place for; give",
    ),
    "another shape": (
        change_weights(text_projection__weight=np.zeros((32, 47), np.float32)),
        r"'text_projection\.weight' has shape \(32, 47\), but the model asks for \(32, 48\); give the weights",
    ),
    "quantized": (
        change_weights(text_projection__weight=np.zeros((32, 48), np.int8)),
        "'text_projection.weight' is of int8, not of floats",
    ),
    "no tokenizer": (without_tokenizer, "has no tokenizer; copy .*openai/clip-vit-base-patch32"),
    "no preprocessing": (lambda f: (f / "preprocessor_config.json").unlink(), r"has no preprocessor_config\.json"),
    "another preprocessing": (
        lambda f: edit(f / "preprocessor_config.json", size={"height": 36, "width": 36}),
        r"size=\{'height': 36, 'width': 36\} is another preprocessing than size=36",
    ),
    "another end of text": (
        lambda f: edit(f / "config.json", text_config={"vocab_size": VOCABULARY, "eos_token_id": 7}),
        f"eos={VOCABULARY - 1} is not 7",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints(case, copy):
    break_it, message = BROKEN[case]
    break_it(copy)
    with pytest.raises(InputError, match=message) as error:
        load_clip(str(copy))
    assert "\n" not in str(error.value)
    assert str(copy) in str(error.value) or "clip text" in str(error.value)


def test_an_index_names_no_file_outside_its_folder(copy):
    (copy / "model.safetensors").rename(copy.parent / "outside.safetensors")
    index = {"weight_map": dict.fromkeys(random_weights(), "../outside.safetensors")}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"lists '\.\./outside\.safetensors', which is no file next to it"):
        load_clip(str(copy))
