"""Published CLIPs and SigLIPs, small and with random weights, written as their libraries write them."""

import importlib
import json
import warnings
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest

from rac3.clip.checkpoint import ClipCheckpoint

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


def pillow(image: np.ndarray):
    import PIL.Image

    return PIL.Image.fromarray(image)


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


def write_open_clip(folder: Path, weights: dict, **model) -> None:
    from safetensors.numpy import save_file

    vision = dict(layers=2, width=64, head_width=16, mlp_ratio=1.5, patch_size=12, image_size=36)
    text = dict(context_length=16, vocab_size=VOCABULARY, width=48, heads=4, layers=2, mlp_ratio=2.0)
    settings = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text} | model
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings, "preprocess_cfg": {}}))
    save_file(weights, folder / "open_clip_model.safetensors")


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


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


def in_section(tower: str, **values):
    """Changes settings in a section of config.json."""

    def apply(folder: Path) -> None:
        settings = json.loads((folder / "config.json").read_text())
        edit(folder / "config.json", **{tower: settings[tower] | values})

    return apply


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


BROKEN_FILES = {
    "truncated": (truncate, r"model\.safetensors' are truncated.*download the file again"),
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
    "a shard that is not there": (only_index, r"lists 'model-00001-of-00002\.safetensors', which is not there"),
}
