from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rac3.clip.encoder import ClipText, MixedEncoder, mix, query_dropout_keys
from rac3.clip.model import CLIP, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from rac3.config import InputError
from rac3.devices.mesh import MeshConfig
from rac3.documents.document import prepare_image
from rac3.tokens.text import TextTokenizer, Tokenizer

TEXTS = ["a", "a photo of a red circle", "two blue squares", "", "a photo of a red circle " * 20]
CONFIG = CLIPConfig(
    CLIPTextConfig(
        vocab_size=262, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=24, eos_token_id=261,
    ),
    CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4
    ),
    projection_dim=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("text")
    TextTokenizer(vocab_size=260).fit(["a photo of a red circle"] * 3, folder)
    return TextTokenizer().load(folder)


@pytest.fixture(scope="module")
def params() -> dict:
    rng = np.random.default_rng(0)
    ids, pixels = jnp.zeros((1, 4), jnp.int32), jnp.zeros((1, 16, 16, 3))
    shapes = jax.eval_shape(CLIP(CONFIG).init, jax.random.key(0), ids, jnp.ones((1, 4), bool), pixels)["params"]
    return jax.tree.map(lambda shape: jnp.asarray(0.3 * rng.standard_normal(shape.shape), jnp.float32), shapes)


@pytest.fixture(scope="module")
def encoder(tokenizer, params) -> MixedEncoder:
    return MixedEncoder(CLIP(CONFIG), params, ClipText.fitted(tokenizer, CONFIG.text_config), batch_size=8)


def pictures(number: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (16 + 3 * i, 16 + i, 3), np.uint8) for i in range(number)]


def test_clip_text_pads_and_cuts(tokenizer):
    text = ClipText.fitted(tokenizer, CONFIG.text_config)
    assert (text.bos, text.eos) == (260, 261)
    ids, mask = text(TEXTS)
    assert ids.shape == mask.shape == (5, 24)
    for row, whole in enumerate(TEXTS):
        content = tokenizer.encode(whole)[:22]
        assert ids[row, mask[row]].tolist() == [260, *content, 261]
        assert not ids[row, ~mask[row]].any()
    assert text(["a"])[0].shape == (1, 3)


def test_clip_text_checks_ids(tokenizer):
    with pytest.raises(InputError, match="vocab_size=261 has no room for id 261"):
        ClipText.fitted(tokenizer, CLIPTextConfig(vocab_size=261, eos_token_id=260))
    with pytest.raises(InputError, match="eos=261 is not 260"):
        ClipText.fitted(tokenizer, CLIPTextConfig(vocab_size=262, eos_token_id=260))
    with pytest.raises(InputError, match="eos=260 is not 261"):  # an old checkpoint, whose end is the highest id
        ClipText(tokenizer, CLIPTextConfig(vocab_size=262, eos_token_id=2), bos=261, eos=260)


def test_texts_agree_with_one_at_a_time(encoder, params):
    vectors = encoder.embed_texts(TEXTS)
    assert vectors.shape == (5, 8)
    assert vectors.dtype == np.float32
    plain = jax.jit(partial(CLIP(CONFIG).apply, method="encode_text"))
    for text, vector in zip(TEXTS, vectors, strict=True):
        ids, mask = (np.pad(x, ((0, 0), (0, 24 - x.shape[1]))) for x in encoder.text([text]))
        np.testing.assert_allclose(vector, plain({"params": params}, jnp.array(ids), jnp.array(mask))[0], atol=1e-6)


def test_images_agree_with_one_at_a_time(encoder, params):
    images = pictures(11)  # a full batch and a remainder
    vectors = encoder.embed_images(images)
    assert vectors.shape == (11, 8)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    plain = jax.jit(partial(CLIP(CONFIG).apply, method="encode_image"))
    for image, vector in zip(images, vectors, strict=True):
        pixels = (prepare_image(image, 16)[None].astype(np.float32) / 255 - mean) / std
        np.testing.assert_allclose(vector, plain({"params": params}, jnp.asarray(pixels, jnp.float32))[0], atol=1e-6)


def test_no_items(encoder):
    assert encoder.embed_texts([]).shape == encoder.embed_images([]).shape == (0, 8)


def test_query_dropout_is_a_function_of_seed_and_document(encoder):
    texts, names = [f"a photo of {i} red circles" for i in range(11)], [f"document-{i}" for i in range(11)]
    images = pictures(11)
    keys = query_dropout_keys(0, names)
    for embed, items in ((encoder.embed_texts, texts), (encoder.embed_images, images)):
        dropped = embed(items, drop_keys=keys, drop_rate=0.5)
        assert (np.abs(dropped - embed(items)).max(axis=1) > 1e-3).sum() >= 9
        np.testing.assert_allclose(np.linalg.norm(dropped, axis=1), 1, atol=1e-6)
        order = [7, 2, 9]
        again = embed(
            [items[i] for i in order], drop_keys=query_dropout_keys(0, [names[i] for i in order]), drop_rate=0.5
        )
        np.testing.assert_allclose(again, dropped[order], atol=1e-6)
        other = embed(items, drop_keys=query_dropout_keys(1, names), drop_rate=0.5)
        assert np.abs(other - dropped).max() > 1e-3
        np.testing.assert_allclose(embed(items, drop_keys=keys, drop_rate=0.0), embed(items), atol=1e-6)

    with pytest.raises(InputError, match=r"rate=1\.0"):
        encoder.embed_texts(texts, drop_keys=keys, drop_rate=1.0)
    with pytest.raises(ValueError, match="11 dropout keys for 2 items"):
        encoder.embed_texts(texts[:2], drop_keys=keys)


def test_the_dropout_of_each_document_and_view_is_its_own():
    """A document's key does not depend on the batch that it came in."""
    names = [f"shard/{number}" for number in range(50)]
    keys = {
        (seed, view): np.asarray(jax.random.key_data(query_dropout_keys(seed, names, view)))
        for seed in (0, 1)
        for view in (0, 1, 2)
    }
    everything = np.concatenate(list(keys.values()))
    assert len(np.unique(everything, axis=0)) == 6 * 50
    some = jax.random.key_data(query_dropout_keys(1, names[7:9], 2))
    np.testing.assert_array_equal(some, keys[1, 2][7:9])


def test_dropout_never_takes_the_begin_of_a_text(tokenizer):
    """A tower that gives back the first id and the last of each text, as they come out of dropout."""

    class Ends:
        width, image_size, num_patches = 2, 16, 16

        def apply(self, params, ids, mask, method):
            last = jnp.take_along_axis(ids, mask.sum(1, keepdims=True) - 1, axis=1)
            return jnp.concatenate([ids[:, :1], last], axis=1).astype(jnp.float32)

        encode_text = encode_image = apply

    encoder = MixedEncoder(Ends(), {}, ClipText.fitted(tokenizer, CONFIG.text_config), batch_size=64)
    texts = ["a photo of a red circle"] * 64
    ends = encoder.embed_texts(texts, drop_keys=query_dropout_keys(0, [str(i) for i in range(64)]), drop_rate=0.9)
    assert (ends == [260, 261]).all()


def test_equal_items_of_two_documents_are_dropped_apart(encoder):
    for embed, item in ((encoder.embed_texts, TEXTS[4]), (encoder.embed_images, pictures(1)[0])):
        vectors = embed([item] * 8, drop_keys=query_dropout_keys(0, list("abcdefgh")), drop_rate=0.5)
        assert len(np.unique(np.round(vectors, 4), axis=0)) >= 7


def test_shapes_compile_once(tokenizer, params):
    encoder = MixedEncoder(CLIP(CONFIG), params, ClipText.fitted(tokenizer, CONFIG.text_config), batch_size=16)
    for number in (1, 3, 8, 9, 20):  # one for each of 8 devices at a time
        encoder.embed_images(pictures(number))
    assert encoder._embed_pixels._cache_size() == 1
    encoder.embed_images(pictures(70))  # 16 + 16 + 16 + 16 + 8
    assert encoder._embed_pixels._cache_size() == 2


def test_inside_the_mesh_of_another_model(encoder):
    expected = encoder.embed_texts(TEXTS)
    with MeshConfig(fsdp=2).build().use():
        np.testing.assert_allclose(encoder.embed_texts(TEXTS), expected, atol=1e-6)
        np.testing.assert_allclose(encoder.embed_images(pictures(3)), encoder.embed_images(pictures(3)), atol=1e-6)


def test_mix():
    text = np.array([[1, 0], [1, 0], [1, 0], [1, 0]], np.float32)
    image = np.array([[0, 1], [0, 1], [0, 1], [-1, 0]], np.float32)
    has_text, has_image = np.array([True, True, False, False]), np.array([True, False, True, False])
    mixed = mix(text, image, has_text, has_image)
    assert mixed.dtype == np.float32
    np.testing.assert_allclose(mixed, [[0.5**0.5, 0.5**0.5], [1, 0], [0, 1], [0, 0]], atol=1e-7)
    # a missing part may hold anything
    image[1] = np.nan
    np.testing.assert_array_equal(mix(text, image, has_text, has_image)[1], [1, 0])


def test_bad_batch_size(tokenizer, params):
    with pytest.raises(InputError, match="batch_size=0"):
        MixedEncoder(CLIP(CONFIG), params, ClipText.fitted(tokenizer, CONFIG.text_config), batch_size=0)
