"""Published SigLIPs: random weights, written by `transformers`, give their vectors when loaded here."""

import json
import shutil
import string
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_clip_checkpoints import BROKEN_FILES, edit, images, module, pillow

from rac3.clip.checkpoints import ClipCheckpoint, checkpoint_identity, load_clip, siglip_config
from rac3.clip.encoder import Encoder, SiglipText, query_dropout_keys
from rac3.clip.model import drop_patches, drop_text_tokens
from rac3.clip.siglip import SigLIP, SiglipConfig, SiglipTextConfig, SiglipVisionConfig
from rac3.config import InputError
from rac3.run import Run
from rac3.tokens.text import load_siglip_tokenizer

TEXTS = ["a", "A photo of a  RED cat!", "two\nblue squares, 3.5 km", "", "naïve café 世界", "a red cat " * 20]
CORPUS = ["a red cat", "a photo of a red cat", "two blue squares 35 km", "the quick brown fox jumps over a lazy dog"]
LENGTH = 16  # of the text tower
# A vector of L2 norm 1 after two layers, the pooling head, and some 40 float32 roundings in a row (6e-8 each) of sums
# of up to 100 terms in another order: 6e-8 * sqrt(40 * 100) = 4e-6.
TOLERANCE = 4e-6
# Of the distance to the float32 vector in bfloat16, which rounds by up to 2e-3 some 60 times in a row, the weights
# included: 2e-3 * sqrt(60) = 0.016, and a little more for the worst of several items.
BFLOAT16 = 0.02
TEXT = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": LENGTH, "projection_size": 64,
}  # fmt: skip
VISION = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 12,
}  # fmt: skip


def write_gemma(folder: Path) -> None:
    """A small tokenizer of the kind that SigLIP 2 has: bytes for what it lacks, one end-of-text, padding of its own."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [*string.ascii_letters, "re", "red", "ca", "cat"]
    tokenizer = module("transformers").GemmaTokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=[("r", "e"), ("re", "d"), ("c", "a"), ("ca", "t")],
        add_bos_token=False, add_eos_token=True, padding_side="right", model_input_names=["input_ids"],
    )  # fmt: skip
    tokenizer.save_pretrained(folder)


def siglip_tokenizer_config(folder: Path) -> None:
    settings = {"tokenizer_class": "SiglipTokenizer", "do_lower_case": True, "model_input_names": ["input_ids"]}
    settings |= {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>", "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_unigram(folder: Path) -> None:
    """A small tokenizer as SigLIP's own is in `tokenizer.json`: it pads with the end of text."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    punctuation = Regex(f"[{''.join(chr(92) + sign for sign in string.punctuation)}]")
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(punctuation, ""),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    siglip_tokenizer_config(folder)


def write_sentencepiece(folder: Path) -> None:
    """A small tokenizer as SigLIP's own is."""
    trainer = module("sentencepiece").SentencePieceTrainer
    module("google.protobuf")
    (folder / "corpus.txt").write_text("\n".join(CORPUS * 20))
    trainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "spiece"), vocab_size=40, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    siglip_tokenizer_config(folder)


TOKENIZERS = {"gemma": write_gemma, "unigram": write_unigram, "sentencepiece": write_sentencepiece}


def reference_ids(folder: Path, texts: list[str]) -> np.ndarray:
    """As the models' documentation says, but in lower case for Gemma's tokenizer, as SigLIP 2 was trained."""
    transformers = module("transformers")
    kind = transformers.AutoTokenizer
    if (folder / "tokenizer.json").is_file() and "Siglip" in (folder / "tokenizer_config.json").read_text():
        kind = transformers.PreTrainedTokenizerFast  # what SigLIP's own becomes without the sentencepiece file
    tokenizer = kind.from_pretrained(folder)
    if type(tokenizer).__name__ == "GemmaTokenizer":
        texts = [text.lower() for text in texts]
    return tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="np")["input_ids"]


@pytest.mark.parametrize("kind", ["gemma", "unigram"])
def test_an_end_of_text_that_is_spelled_out_is_none(tmp_path, kind):
    from rac3.tokens.text import load_siglip_tokenizer

    TOKENIZERS[kind](tmp_path)
    tokenizer = load_siglip_tokenizer(tmp_path)
    for end in ("</s>", "<eos>"):
        ids = tokenizer.encode_with_specials(f"cat {end} red", LENGTH)
        assert ids.count(tokenizer.eos) == 1
        assert ids[-1] == tokenizer.eos
    assert len(tokenizer.encode_with_specials("cat red " * 50, 8)) == 8


def random_model(kind: str, text: dict, vision: dict):
    """A `SiglipModel` or `Siglip2Model` with weights far from their initial values."""
    torch, transformers = module("torch"), module("transformers")
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model


def write_siglip(folder: Path, tokenizer: str = "gemma", **text):
    """A folder as `google/siglip2-base-patch16-224` or `google/siglip-base-patch16-224` is, but small."""
    folder.mkdir()
    TOKENIZERS[tokenizer](folder)
    vision = VISION | {"image_size": 40, "hidden_act": text.get("hidden_act", "gelu_pytorch_tanh")}
    model = random_model("Siglip", TEXT | {"vocab_size": 330} | text, vision)
    model.save_pretrained(folder)
    settings = {"do_normalize": True, "do_rescale": True, "do_resize": True, "size": {"height": 40, "width": 40}}
    settings |= {"image_processor_type": "SiglipImageProcessor", "resample": 2, "rescale_factor": 1 / 255}
    settings |= {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "processor_class": "SiglipProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return model


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("siglip") / "published"
    write_siglip(folder)
    return folder


@pytest.fixture
def copy(published, tmp_path) -> Path:
    return shutil.copytree(published, tmp_path / "copy")


def apply(loaded: ClipCheckpoint, dtype=jnp.float32, method: str = "__call__"):
    return jax.jit(partial(SigLIP(loaded.config, dtype).apply, {"params": loaded.params}, method=method))


def normalized(vectors) -> np.ndarray:
    vectors = np.asarray(vectors.detach())
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def assert_vectors(found: np.ndarray, reference, tolerance: float = TOLERANCE) -> None:
    expected = normalized(reference)
    np.testing.assert_allclose(found, expected, atol=tolerance)
    assert np.triu(expected @ expected.T, 1).max() < 0.999  # the items are told apart


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


def middle(image: np.ndarray) -> np.ndarray:
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return image[top : top + side, left : left + side]


@pytest.mark.parametrize("max_num_patches", [16, 30, 9])  # the positions' own grid of 4 x 4, 5 x 5, 3 x 3
def test_naflex_pipeline(max_num_patches, tmp_path):
    torch = module("torch")
    processors = module("transformers.models.siglip2.image_processing_pil_siglip2")
    write_gemma(tmp_path)
    model = random_model("Siglip2", TEXT | {"vocab_size": 330}, VISION | {"num_patches": 16})
    model.save_pretrained(tmp_path)
    settings = {"image_processor_type": "Siglip2ImageProcessor", "patch_size": 12, "max_num_patches": max_num_patches}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    loaded = load_clip(str(tmp_path))
    encoder = loaded.encoder()

    ids = torch.tensor(reference_ids(tmp_path, TEXTS))  # in lower case by AutoTokenizer
    squares = [middle(image) for image in images() if min(image.shape[:2]) > 1]
    processor = processors.Siglip2ImageProcessorPil.from_pretrained(tmp_path)
    with torch.no_grad():
        texts = model.get_text_features(input_ids=ids).pooler_output
        pictures = model.get_image_features(**processor([pillow(image) for image in squares], return_tensors="pt"))
    assert_vectors(encoder.embed_texts(TEXTS), texts)
    assert_vectors(encoder.embed_images(squares), pictures.pooler_output)

    loaded.save(tmp_path / "saved")
    again = ClipCheckpoint.open(tmp_path / "saved")
    assert (again.config, again.images) == (loaded.config, loaded.images)
    np.testing.assert_array_equal(again.encoder().embed_images(images()), encoder.embed_images(images()))


def test_other_files_give_the_same(published, copy):
    torch, model = module("torch"), module("transformers").SiglipModel.from_pretrained(published)
    expected = load_clip(str(published))
    (copy / "model.safetensors").unlink()
    torch.save(model.state_dict(), copy / "pytorch_model.bin")
    jax.tree.map(np.testing.assert_array_equal, load_clip(str(copy)).params, expected.params)
    torch.save({f"module.{name}": weight for name, weight in model.state_dict().items()}, copy / "pytorch_model.bin")
    jax.tree.map(np.testing.assert_array_equal, load_clip(str(copy)).params, expected.params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files(dtype, published, copy):
    torch, model = module("torch"), module("transformers").SiglipModel.from_pretrained(published)
    half = model.to(getattr(torch, dtype))
    half.save_pretrained(copy)
    found = load_clip(str(copy)).encoder().embed_texts(TEXTS)
    whole = half.to(torch.float32)  # the same rounded weights, computed in float32
    with torch.no_grad():
        assert_vectors(found, whole.get_text_features(torch.tensor(reference_ids(copy, TEXTS))).pooler_output)


def test_bfloat16(published):
    torch, model = module("torch"), module("transformers").SiglipModel.from_pretrained(published)
    loaded = load_clip(str(published))
    ids, mask = SiglipText(loaded.tokenizer, loaded.config.text_config)(TEXTS)
    pixels = np.random.default_rng(0).standard_normal((5, 40, 40, 3)).astype(np.float32)
    texts = apply(loaded, jnp.bfloat16, "encode_text")(jnp.array(ids), jnp.array(mask))
    pictures = apply(loaded, jnp.bfloat16, "encode_image")(jnp.array(pixels))
    with torch.no_grad():
        expected_texts = model.get_text_features(torch.tensor(ids)).pooler_output
        expected_pictures = model.get_image_features(torch.tensor(pixels.transpose(0, 3, 1, 2))).pooler_output
    for found, expected in ((texts, expected_texts), (pictures, expected_pictures)):
        assert found.dtype == jnp.float32
        distance = np.linalg.norm(np.asarray(found) - normalized(expected), axis=1)
        assert 1e-4 < distance.max() < BFLOAT16


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_saved_and_opened(tokenizer, tmp_path):
    write_siglip(tmp_path / "siglip", tokenizer)
    loaded = load_clip(str(tmp_path / "siglip"))
    loaded.save(tmp_path / "saved")
    opened = ClipCheckpoint.open(tmp_path / "saved")
    assert (opened.config, opened.images) == (loaded.config, loaded.images)
    jax.tree.map(np.testing.assert_array_equal, opened.params, loaded.params)
    np.testing.assert_array_equal(opened.encoder().text(TEXTS), loaded.encoder().text(TEXTS))


def test_texts_are_alone_in_their_rows_and_the_padding_is_read(published):
    loaded = load_clip(str(published))
    encoder = loaded.encoder()
    together = encoder.embed_texts(TEXTS)
    for text, vector in zip(TEXTS, together, strict=True):
        np.testing.assert_allclose(encoder.embed_texts([text])[0], vector, atol=TOLERANCE)
    text = replace(loaded.config.text_config, pad_token_id=7)
    other = replace(loaded, config=replace(loaded.config, text_config=text))
    ids, mask = map(jnp.array, encoder.text(TEXTS))
    moved = apply(other, method="encode_text")(ids, mask)
    changed = np.abs(np.asarray(moved) - together).max(axis=1) > 1e-3
    np.testing.assert_array_equal(changed, ~np.asarray(mask).all(axis=1))  # a text that fills the row has no padding


def test_dropped_tokens_move_out_and_the_row_is_padded_again(published):
    loaded = load_clip(str(published))
    encoder = loaded.encoder()
    texts = [f"a red cat {letter}" for letter in string.ascii_lowercase]
    keys = query_dropout_keys(0, texts)
    ids, mask = map(jnp.array, encoder.text(texts))
    short, kept = map(np.asarray, drop_text_tokens(keys, ids, mask, 0.5, has_bos=False))
    pad, eos = loaded.tokenizer.pad, loaded.tokenizer.eos
    rows = np.full(ids.shape, pad)
    for row, (before, after) in enumerate(zip(ids, short, strict=True)):
        left = after[kept[row]].tolist()
        rows[row, : len(left)] = left
        rest = iter(before[np.asarray(mask)[row]].tolist())
        assert all(token in rest for token in left)  # in order
        assert left[-1] == eos
        assert len(left) > 1
    first = np.asarray(ids)[:, 0] != short[:, 0]
    assert first.any()  # unlike CLIP's <bos>, the first token may be dropped
    expected = apply(loaded, method="encode_text")(jnp.array(rows))
    found = encoder.embed_texts(texts, drop_keys=keys, drop_rate=0.5)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    np.testing.assert_allclose(
        encoder.embed_texts(texts, drop_keys=keys, drop_rate=0.0), encoder.embed_texts(texts), atol=TOLERANCE
    )


def test_dropped_patches_are_not_seen(published):
    loaded = load_clip(str(published))
    encode = apply(loaded, method="encode_image")
    rng = np.random.default_rng(0)
    pixels = jnp.array(rng.standard_normal((4, 40, 40, 3)), jnp.float32)
    keep = drop_patches(query_dropout_keys(0, list("abcd")), 9, 0.5)
    assert not keep.all(axis=1).any()

    gradient = jax.grad(lambda pixels: encode(pixels, keep)[:, :3].sum())(pixels)
    seen = np.abs(gradient)[:, :36, :36].reshape(4, 3, 12, 3, 12, 3).max(axis=(2, 4, 5)).reshape(4, 9) > 0
    np.testing.assert_array_equal(seen, keep)
    everything = jnp.ones(keep.shape, bool)
    np.testing.assert_allclose(encode(pixels, everything), encode(pixels, None), atol=TOLERANCE)
    mixed = everything.at[2].set(keep[2])  # the rows without dropout stay as they were
    same = np.abs(encode(pixels, mixed) - encode(pixels, None)).max(axis=1) < TOLERANCE
    np.testing.assert_array_equal(same, [True, True, False, True])


def test_rows_of_another_length_are_refused():
    config = SiglipConfig(SiglipTextConfig(**TEXT | {"vocab_size": 9}), SiglipVisionConfig(**VISION))
    with pytest.raises(InputError, match=r"rows of 5 ids.*max_position_embeddings=16"):
        jax.eval_shape(SigLIP(config).init, jax.random.key(0), jnp.zeros((1, 5), int), jnp.ones((1, 5), bool),
                       jnp.zeros((1, 224, 224, 3)))  # fmt: skip


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
    found = siglip_config(settings, "here")
    for tower in ("text_config", "vision_config"):
        for name, value in asdict(getattr(found, tower)).items():
            if name != "projection_size":
                assert value == getattr(getattr(expected, tower), name), (tower, name)
    assert found.width == expected.text_config.projection_size


def no_padding(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"padding_side": "left"}))


def config(tower: str, **values):
    def apply(folder: Path) -> None:
        settings = json.loads((folder / "config.json").read_text())
        edit(folder / "config.json", **{tower: settings[tower] | values})

    return apply


BROKEN = {
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"has no tokenizer; copy tokenizer\.json or spiece"),
    "padding on the left": (no_padding, "its tokenizer pads on the left.*padding_side='right'"),
    "a small vocabulary": (config("text_config", vocab_size=9), "vocab_size=9 has no room for id"),
    "no pooling head": (config("vision_config", vision_use_head=False), "vision_use_head=False has no image vectors"),
    "oblong images": (config("vision_config", image_size=[40, 48]), r"image_size=\[40, 48\] is not like 224"),
    "another activation": (config("text_config", hidden_act="relu6"), "siglip text: hidden_act='relu6' is unknown"),
    "no heads": (config("vision_config", num_attention_heads=0), "siglip vision: hidden_size=64 is not a multiple of"),
    "two widths": (config("text_config", projection_size=32), "text vectors are 32 wide.*image vectors 64"),
    "another preprocessing": (
        lambda f: edit(f / "preprocessor_config.json", size={"height": 48, "width": 40}),
        "size=.*48.* is another preprocessing than size=.*40",
    ),
    "a mean that is none": (
        lambda f: edit(f / "preprocessor_config.json", image_mean=[0.5, 0.5]),
        r"image_mean=\[0\.5, 0\.5\] is not three numbers",
    ),
    "NaFlex of another patch size": (
        lambda f: (edit(f / "config.json", model_type="siglip2"), edit(f / "preprocessor_config.json", patch_size=9)),
        "patch_size=12 in config.json is not 9, the processor's",
    ),
    "NaFlex without a square of positions": (
        lambda f: (
            edit(f / "config.json", model_type="siglip2"),
            config("vision_config", num_patches=8)(f),
            edit(f / "preprocessor_config.json", patch_size=12),
        ),
        "num_patches=8 is not a square number",
    ),
    **BROKEN_FILES,
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints(case, copy):
    break_it, message = BROKEN[case]
    break_it(copy)
    with pytest.raises(InputError, match=message) as error:
        load_clip(str(copy))
    assert "\n" not in str(error.value)
    assert str(copy) in str(error.value) or "siglip" in str(error.value)


def test_a_sentencepiece_file_that_is_none(copy):
    """One line, whether the package that reads it is here or not."""
    (copy / "tokenizer.json").unlink()
    (copy / "spiece.model").write_bytes(b"")
    siglip_tokenizer_config(copy)
    with pytest.raises(InputError, match=r"tokenizer '.*copy' cannot be loaded") as error:
        load_siglip_tokenizer(copy)
    assert "\n" not in str(error.value)


def test_identity_follows_the_sentencepiece_file(copy):
    before = checkpoint_identity(str(copy))
    (copy / "spiece.model").write_bytes(b"0123")
    assert checkpoint_identity(str(copy)) != before


def test_the_command_takes_a_checkpoint(copy, tmp_path, finished_workdir):
    """Nothing is fitted, and with the artifact no stage reads the published files again."""
    from rac3 import recipes
    from rac3.artifacts.workdir import Workdir
    from rac3.cli import run
    from rac3.config import load_config_module

    config, finished = finished_workdir
    folder = shutil.copytree(finished, tmp_path / "tiny")
    expected = load_clip(str(copy)).encoder().embed_texts(TEXTS)
    arguments = [str(config), "--workdir", str(folder), "--clip.checkpoint", str(copy)]
    run(["encoders", *arguments])
    for path in copy.iterdir():
        path.write_bytes(b"0" * path.stat().st_size)
    run(["embed", *arguments])

    experiment = load_config_module(str(config)).get_config()
    experiment = replace(experiment, clip=replace(experiment.clip, checkpoint=str(copy)))
    workdir = Workdir(folder, "tiny")
    np.testing.assert_array_equal(Run(experiment, workdir).encoder.embed_texts(TEXTS), expected)
    queries = workdir.require(recipes.queries(experiment, "test"), "")
    assert queries.manifest["inputs"]["clip"] == recipes.clip(experiment).fingerprint
