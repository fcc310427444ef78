"""Published CLIPs: random weights, written by `transformers` and OpenCLIP, give their vectors when loaded here."""

import fnmatch
import importlib
import json
import shutil
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from rac3.clip.checkpoints import (
    ClipCheckpoint,
    checkpoint_identity,
    hugging_face_config,
    load_clip,
    open_clip_config,
)
from rac3.clip.images import OPENAI_MEAN, ClipImages
from rac3.clip.model import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from rac3.config import InputError
from rac3.run import Run
from rac3.tokens.text import TextTokenizer

TEXTS = ["a", "A photo of a  RED cat!", "two\nblue squares, 3.5 km", "", "naïve café 世界", "a red cat " * 20]
MERGES = ("r e", "re d</w>", "c a", "ca t</w>", "o f</w>")
SIZES = ((37, 61), (61, 37), (36, 36), (200, 13), (1, 50), (333, 500), (71, 72), (36, 37), (37, 36), (450, 91))
VOCABULARY = 2 * 256 + len(MERGES) + 2  # bytes, bytes that end a word, merges, begin and end of text
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
# A vector of L2 norm 1 after two layers and some 30 float32 roundings in a row (6e-8 each) of sums of up to 100 terms
# in another order: 6e-8 * sqrt(30 * 100) = 3e-6.
TOLERANCE = 3e-6


def module(name: str) -> ModuleType:
    """A reference, or a skip: one that was built for another torch fails to import with whatever error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except Exception as error:
        pytest.skip(f"{name} cannot be imported: {error}")


def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in SIZES]


def write_tokenizer(folder: Path) -> None:
    """A small tokenizer in the two files of CLIP's."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in MERGES)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")


def write_processor(folder: Path) -> None:
    settings = {"crop_size": 36, "do_center_crop": True, "do_normalize": True, "do_resize": True, "size": 36}
    settings |= {"feature_extractor_type": "CLIPFeatureExtractor", "resample": 3, "image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


CONFIG = {
    "model_type": "clip",
    "projection_dim": 32,
    "text_config": {
        "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": VOCABULARY, "max_position_embeddings": 16, "eos_token_id": 2,
    },
    "vision_config": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 36, "patch_size": 12,
    },
}  # fmt: skip


def random_weights() -> dict[str, np.ndarray]:
    """The weights of a `CLIPModel` of `CONFIG` by their published names."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"logit_scale": ()}
    for tower, width, norms in (
        ("text", 48, ("final_layer_norm",)),
        ("vision", 64, ("pre_layrnorm", "post_layernorm")),
    ):
        layers = [f"{tower}_model.encoder.layers.{layer}" for layer in range(2)]
        linear = {
            f"{layer}.self_attn.{name}_proj": (width, width) for layer in layers for name in ("q", "k", "v", "out")
        }
        linear |= {f"{layer}.mlp.fc1": (96, width) for layer in layers}
        linear |= {f"{layer}.mlp.fc2": (width, 96) for layer in layers}
        scales = [f"{layer}.layer_norm{number}" for layer in layers for number in (1, 2)]
        scales += [f"{tower}_model.{norm}" for norm in norms]
        for name, shape in linear.items() | {(name, (width,)) for name in scales}:
            shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        places = 16 if tower == "text" else 10
        shapes[f"{tower}_model.embeddings.position_embedding.weight"] = (places, width)
        shapes[f"{'text' if tower == 'text' else 'visual'}_projection.weight"] = (32, width)
    shapes["text_model.embeddings.token_embedding.weight"] = (VOCABULARY, 48)
    shapes["vision_model.embeddings.class_embedding"] = (64,)
    shapes["vision_model.embeddings.patch_embedding.weight"] = (64, 3, 12, 12)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        values = rng.standard_normal(shape).astype(np.float32)
        if len(shape) < 2:  # biases and scales away from their 0 and 1
            return np.asarray(values / 10 + ("norm" in name and name.endswith("weight")), np.float32)
        return values / np.sqrt(np.prod(shape[1:], dtype=np.float32))

    return {name: draw(name, shapes[name]) for name in sorted(shapes)}


def hugging_face_model(folder: Path):
    """The reference, from the files themselves."""
    clip = module("transformers.models.clip.modeling_clip").CLIPModel
    model, report = clip.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A folder as `openai/clip-vit-base-patch32` is, but small; its end of text is the highest id (eos_token_id 2)."""
    from safetensors.numpy import save_file

    folder = tmp_path_factory.mktemp("clip") / "published"
    write_tokenizer(folder)
    write_processor(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(random_weights(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def copy(published, tmp_path) -> Path:
    return shutil.copytree(published, tmp_path / "copy")


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def assert_same(first: ClipCheckpoint, second: ClipCheckpoint) -> None:
    assert (first.config, first.images) == (second.config, second.images)
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    for text in TEXTS:
        assert first.tokenizer.encode(text) == second.tokenizer.encode(text)


def assert_vectors(loaded: ClipCheckpoint, texts, pictures) -> None:
    """The encoder's vectors are those of the reference, which are scaled to norm 1 first."""
    encoder = loaded.encoder()
    for found, reference in ((encoder.embed_texts(TEXTS), texts), (encoder.embed_images(images()), pictures)):
        expected = np.asarray(reference) / np.linalg.norm(reference, axis=1, keepdims=True)
        np.testing.assert_allclose(found, expected, atol=TOLERANCE)
        assert np.triu(expected @ expected.T, 1).max() < 0.999  # the items are told apart


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


def pillow(image: np.ndarray):
    import PIL.Image

    return PIL.Image.fromarray(image)


@pytest.mark.parametrize("size", [36, 37, 224])
@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
def test_squares_are_those_of_the_references(size, resample):
    """Bit for bit: the same Pillow calls on the same sizes."""
    import PIL.Image

    processors = module("transformers.models.clip.image_processing_pil_clip")
    number = PIL.Image.Resampling[resample.upper()]
    processor = processors.CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size=size, do_rescale=False, do_normalize=False, resample=number
    )
    transforms = module("torchvision.transforms")
    scale = transforms.Resize(size, interpolation=transforms.InterpolationMode(resample))
    for image in images():
        expected = processor(pillow(image), return_tensors="np")["pixel_values"][0]
        found = ClipImages(resample=resample).square(image, size)
        np.testing.assert_array_equal(found, expected.transpose(1, 2, 0))
        other = np.asarray(transforms.CenterCrop(size)(scale(pillow(image))))
        np.testing.assert_array_equal(ClipImages(resample=resample, rounding="even").square(image, size), other)


def test_a_long_strip_stays_small():
    strip = np.random.default_rng(0).integers(0, 256, (2, 100_000, 3), np.uint8)
    middle = strip[:, 50_000 - 64 : 50_000 + 64]
    np.testing.assert_array_equal(ClipImages().square(strip, 224), ClipImages().square(middle, 224))


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


def open_clip_weights() -> dict[str, np.ndarray]:
    """`random_weights` as OpenCLIP's `CLIP` names and lays them out."""
    renamed = {
        "text_model.encoder.layers": "transformer.resblocks",
        "vision_model.encoder.layers": "visual.transformer.resblocks",
        "text_model.embeddings.token_embedding": "token_embedding", "text_model.final_layer_norm": "ln_final",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.patch_embedding": "visual.conv1", "vision_model.pre_layrnorm": "visual.ln_pre",
        "vision_model.post_layernorm": "visual.ln_post", "self_attn.out_proj": "attn.out_proj", "layer_norm": "ln_",
        "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "text_projection.weight": "text_projection",
        "visual_projection.weight": "visual.proj",
    }  # fmt: skip
    weights, out = random_weights(), {}
    for name, value in weights.items():
        for kind in ("weight", "bias"):
            if name.endswith(f"q_proj.{kind}"):
                value = np.concatenate([weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
                name = name.replace(f"self_attn.q_proj.{kind}", f"attn.in_proj_{kind}")
        if "k_proj" in name or "v_proj" in name:
            continue
        value = value.T if "projection" in name else value
        for old, new in renamed.items():
            name = name.replace(old, new)
        out[name] = np.array(value, order="C")
    return out


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
    assert found.config == expected.config
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


def write_open_clip(folder: Path, weights: dict, **model) -> None:
    from safetensors.numpy import save_file

    vision = dict(layers=2, width=64, head_width=16, mlp_ratio=1.5, patch_size=12, image_size=36)
    text = dict(context_length=16, vocab_size=VOCABULARY, width=48, heads=4, layers=2, mlp_ratio=2.0)
    settings = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text} | model
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings, "preprocess_cfg": {}}))
    save_file(weights, folder / "open_clip_model.safetensors")


def test_of_a_folder_with_both_formats_the_first_is_read(copy):
    write_open_clip(copy, {name: np.asarray(2 * value) for name, value in open_clip_weights().items()}, quick_gelu=True)
    hugging_face = load_clip(str(copy))
    assert hugging_face.images.mean == MEAN
    (copy / "model.safetensors").unlink()  # as repositories of OpenCLIP have config.json, for its tokenizer
    open_clip = load_clip(str(copy))
    assert open_clip.images.mean == OPENAI_MEAN
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(2 * a, b), hugging_face.params, open_clip.params)


def test_open_clip_has_the_exact_gelu_unless_it_asks_for_the_quick_one(copy):
    (copy / "config.json").unlink()
    for settings, act in (({}, "gelu"), ({"quick_gelu": False}, "gelu"), ({"quick_gelu": True}, "quick_gelu")):
        write_open_clip(copy, open_clip_weights(), **settings)
        config = load_clip(str(copy)).config
        assert (config.text_config.hidden_act, config.vision_config.hidden_act) == (act, act)


def test_an_open_clip_config_that_names_the_sizes_alone():
    """OpenCLIP's ViT-B-32, as its repository lists it: heads of 64, and an MLP of four times the width."""
    vision = {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
    found = open_clip_config({"embed_dim": 512, "vision_cfg": vision, "text_cfg": text}, "here")
    assert found == CLIPConfig(CLIPTextConfig(hidden_act="gelu", eos_token_id=2), CLIPVisionConfig(hidden_act="gelu"))
    assert open_clip_config({"vision_cfg": {"patch_size": 32}, "text_cfg": {}}, "here") == found
    cut = open_clip_config({"vision_cfg": {"mlp_ratio": 2.999}, "text_cfg": {"mlp_ratio": 3.999}}, "here")
    assert cut.vision_config.intermediate_size == 2303  # int(768 * 2.999), not rounded
    assert cut.text_config.intermediate_size == 2047


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


def test_saved_and_opened(published, tmp_path):
    loaded = load_clip(str(published))
    loaded.save(tmp_path)
    assert_same(ClipCheckpoint.open(tmp_path), loaded)
    assert (loaded.tokenizer.bos, loaded.tokenizer.eos) == (VOCABULARY - 2, VOCABULARY - 1)


def test_a_fitted_clip_is_saved_in_the_same_form(published, tmp_path):
    """Its begin and end of text are the two ids after its tokenizer's."""
    TextTokenizer(vocab_size=260).fit(["a photo of a red cat"] * 3, tmp_path / "fitted")
    tokenizer = TextTokenizer().load(tmp_path / "fitted")
    whole = load_clip(str(published))
    text = replace(whole.config.text_config, vocab_size=262, eos_token_id=261)
    params = unflatten_dict(
        {
            path: leaf[:262] if path[-2:] == ("token_embedding", "embedding") else leaf
            for path, leaf in flatten_dict(whole.params).items()
        }
    )
    images = ClipImages(steps="cut, scale")
    fitted = ClipCheckpoint(replace(whole.config, text_config=text), params, tokenizer, images)
    fitted.save(tmp_path / "artifact")
    shutil.rmtree(tmp_path / "fitted")
    opened = ClipCheckpoint.open(tmp_path / "artifact")
    assert_same(opened, fitted)
    ids, mask = opened.encoder().text(["a red cat"])
    assert ids[mask].tolist() == [260, *tokenizer.encode("a red cat"), 261]
    np.testing.assert_array_equal(opened.encoder().embed_texts(TEXTS), fitted.encoder().embed_texts(TEXTS))
    edit(tmp_path / "artifact" / "config.json", model_type=None)
    with pytest.raises(InputError, match="was written by another version of rac3; delete it"):
        ClipCheckpoint.open(tmp_path / "artifact")


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
    found = hugging_face_config(settings, "here")
    expected = transformers.CLIPConfig(**json.loads(json.dumps(settings)))
    for tower in ("text_config", "vision_config"):
        for name, value in asdict(getattr(found, tower)).items():
            assert value == getattr(getattr(expected, tower), name), (tower, name)
    assert found.projection_dim == expected.projection_dim


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def change_weights(**changes):
    """Drops (None) or replaces weights; __ stands for a dot."""

    def apply(folder: Path) -> None:
        from safetensors.numpy import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        for name, value in changes.items():
            weights.pop(name.replace("__", "."), None)
            if value is not None:
                weights[name.replace("__", ".")] = value
        save_file(weights, folder / "model.safetensors")

    return apply


def only_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"logit_scale": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def without_tokenizer(folder: Path) -> None:
    (folder / "merges.txt").unlink()


def as_open_clip(**vision):
    def apply(folder: Path) -> None:
        (folder / "config.json").unlink()
        (folder / "model.safetensors").rename(folder / "open_clip_model.safetensors")
        settings = {"model_cfg": {"embed_dim": 32, "vision_cfg": vision, "text_cfg": {}}, "preprocess_cfg": {}}
        (folder / "open_clip_config.json").write_text(json.dumps(settings))

    return apply


BROKEN_FILES = {
    "cut short": (truncate, r"model\.safetensors' are cut short.*download the file again"),
    "a page": (lambda f: (f / "model.safetensors").write_text("<!DOCTYPE html>"), "are a web page"),
    "a page as torch file": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin").write_text("<!DOCTYPE html>"),
        "are a web page",
    ),
    "a pointer": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid"),
        "git lfs pull",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"has no weights; it needs one of model\.safe"),
    "a shard that is not there": (only_index, r"model-00001-of-00002\.safetensors' do not exist"),
}
BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), r"has no config\.json"),
    "config that is a page": (lambda f: (f / "config.json").write_text("<html>"), r"config\.json' is not JSON"),
    "another model": (lambda f: edit(f / "config.json", model_type="bert"), "model_type='bert'.*give one with 'clip'"),
    "a size that is none": (
        lambda f: edit(f / "config.json", projection_dim="32"),
        "projection_dim='32' is not like 512",
    ),
    "another activation": (
        lambda f: edit(f / "config.json", text_config={"hidden_act": "relu6"}),
        "hidden_act='relu6' is unknown",
    ),
    **BROKEN_FILES,
    "missing weights": (
        change_weights(visual_projection__weight=None),
        r"lacks weights of this config: 'visual_projection\.weight'; give",
    ),
    "surplus weights": (
        change_weights(a__lora=np.zeros(3, np.float32), b__lora=np.zeros(3, np.float32)),
        r"has no place for: 'a\.lora' and 1 more",
    ),
    "another shape": (
        change_weights(text_projection__weight=np.zeros((32, 47), np.float32)),
        r"'text_projection\.weight' has shape \(32, 47\), but its config asks for \(32, 48\)",
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
    "OpenCLIP without tokenizer": (
        lambda f: (as_open_clip()(f), without_tokenizer(f)),
        "has no tokenizer; copy .*openai/clip-vit-base-patch32",
    ),
    "OpenCLIP heads without width": (as_open_clip(head_width=0), r"vision_cfg: head_width=0 does not divide width=768"),
    "OpenCLIP heads of another width": (as_open_clip(width=600), "head_width=64 does not divide width=600"),
    "another OpenCLIP": (as_open_clip(attentional_pool=True), r"vision_cfg\.attentional_pool=True is another arch"),
    "OpenCLIP without a model": (
        lambda f: (as_open_clip()(f), edit(f / "open_clip_config.json", model_cfg=None)),
        r"has no model_cfg in open_clip_config\.json",
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


def test_an_index_names_no_file_outside_its_folder(copy):
    (copy / "model.safetensors").rename(copy.parent / "outside.safetensors")
    index = {"weight_map": dict.fromkeys(random_weights(), "../outside.safetensors")}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"copy/outside\.safetensors' do not exist"):
        load_clip(str(copy))


def test_a_path_that_is_no_folder():
    with pytest.raises(InputError, match="'/nowhere' is not a folder"):
        load_clip("/nowhere")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the hub, and no network."""
    constants = module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_name_on_the_hub_is_found_in_the_cache(published, hub_cache):
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(published, hub_cache / "models--openai--small-clip" / "snapshots" / commit)
    reference = hub_cache / "models--openai--small-clip" / "refs" / "main"
    reference.parent.mkdir()
    reference.write_text(commit)
    assert_same(load_clip("openai/small-clip"), load_clip(str(published)))
    assert checkpoint_identity("openai/small-clip") == {"name": "openai/small-clip"}


@pytest.mark.parametrize(
    ("names", "fetched"),
    [
        (["config.json", "model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors"], "model.safetensors"),
        (["config.json", "pytorch_model.bin", "flax_model.msgpack"], "pytorch_model.bin"),
        (["open_clip_config.json", "open_clip_pytorch_model.bin", "open_clip_model.safetensors"],
         "open_clip_model.safetensors"),
    ],
)  # fmt: skip
def test_of_the_weights_on_the_hub_one_format_is_fetched(names, fetched, published, tmp_path, monkeypatch):
    """In the stead of the network stands a folder; what is asked for is copied from it, as the client does."""
    snapshot = tmp_path / "0123"
    snapshot.mkdir()
    revisions = []

    def snapshot_download(name, revision=None, allow_patterns=()):
        revisions.append(revision)
        for file in (*names, "vocab.json", "merges.txt", "README.md"):
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                (snapshot / file).write_text((published / file).read_text() if file.endswith((".json", ".txt")) else "")
        return str(snapshot)

    if "open_clip_config.json" in names:
        published = shutil.copytree(published, tmp_path / "published")
        (published / "config.json").rename(published / "open_clip_config.json")
    monkeypatch.setattr(module("huggingface_hub"), "snapshot_download", snapshot_download)
    with pytest.raises(InputError):  # the weights are empty, and preprocessor_config.json is not there
        load_clip("owner/small-clip")
    assert {path.name for path in snapshot.iterdir()} == {names[0], "vocab.json", "merges.txt", fetched}
    assert revisions[0] is None
    assert set(revisions[1:]) == {"0123"}  # the one whose settings were read


def test_a_hub_that_cannot_be_reached(hub_cache):
    with pytest.raises(InputError, match="'openai/small-clip' cannot be fetched from the Hugging Face hub") as error:
        load_clip("openai/small-clip")
    assert "\n" not in str(error.value)


def test_identity_follows_the_files(copy):
    before = checkpoint_identity(str(copy))
    (copy / "notes.txt").write_text("not read")
    assert checkpoint_identity(str(copy)) == before
    (copy / "merges.txt").write_text("another size")
    assert checkpoint_identity(str(copy)) != before
    assert before["files"]["model.safetensors"] == (copy / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ClipImages(mean=(0.5,)), r"mean=\(0\.5,\)"),
        (lambda: ClipImages(resample="cubic"), "resample='cubic' is unknown; use one of nearest"),
        (lambda: ClipImages.of_hugging_face({"resample": 9}, 224, "here"), "resample=9 is no filter"),
        (lambda: ClipImages.of_hugging_face({"do_center_crop": False}, 224, "here"), "do_center_crop=False is another"),
        (lambda: ClipImages.of_hugging_face({"crop_size": 200}, 224, "here"), r"crop_size=\[200, 200\] is another"),
        (
            lambda: ClipImages.of_siglip({"size": {"height": 224, "width": 200}}, 224, "here"),
            "'width': 200} is another",
        ),
        (lambda: ClipImages.of_open_clip({"resize_mode": "squash"}, 224, "here"), "resize_mode='squash'"),
    ],
)
def test_bad_preprocessing(build, message):
    with pytest.raises(InputError, match=message):
        build()


def test_open_clip_defaults():
    assert ClipImages.of_open_clip({}, 224, "here") == ClipImages(mean=OPENAI_MEAN, rounding="even")


def test_the_command_takes_a_checkpoint(copy, tmp_path, finished_workdir):
    """Nothing is fitted, and with the artifact no stage reads the published files again."""
    from rac3 import recipes
    from rac3.artifacts.workdir import Workdir
    from rac3.cli import run
    from rac3.config import load_config_module

    config, finished = finished_workdir
    folder = shutil.copytree(finished, tmp_path / "tiny")
    vqgans = sorted((folder / "vqgan").iterdir())
    expected = load_clip(str(copy)).encoder().embed_texts(TEXTS)
    arguments = [str(config), "--workdir", str(folder), "--clip.checkpoint", str(copy)]
    run(["encoders", *arguments])
    for path in copy.iterdir():
        path.write_bytes(b"0" * path.stat().st_size)
    run(["embed", *arguments])
    assert sorted((folder / "vqgan").iterdir()) == vqgans

    experiment = load_config_module(str(config)).get_config()
    experiment = replace(experiment, clip=replace(experiment.clip, checkpoint=str(copy)))
    workdir = Workdir(folder, "tiny")
    np.testing.assert_array_equal(Run(experiment, workdir).encoder.embed_texts(TEXTS), expected)
    queries = workdir.require(recipes.queries(experiment, "test"), "")
    assert queries.manifest["inputs"]["clip"] == recipes.clip(experiment).fingerprint

    # bfloat16 makes other vectors from the same artifact
    faster = replace(experiment, clip=replace(experiment.clip, dtype="bfloat16"))
    assert recipes.clip(faster) == recipes.clip(experiment)
    assert recipes.queries(faster, "test") != recipes.queries(experiment, "test")
    rounded = Run(faster, workdir).encoder.embed_texts(TEXTS)
    assert 1e-4 < np.abs(rounded - expected).max() < 0.03

    refitted = replace(experiment, seed=1, clip=replace(experiment.clip, max_logit_scale=7.0))
    assert recipes.clip(refitted) == recipes.clip(experiment)
    (copy / "merges.txt").write_text("another size")
    with pytest.raises(InputError, match="clip is stale"):
        assert Run(experiment, workdir).encoder
