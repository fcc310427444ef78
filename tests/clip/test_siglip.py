"""SigLIP's towers: precision, padding, and query dropout."""

import string
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published_clips import module
from published_siglips import BFLOAT16, TEXT, TEXTS, TOLERANCE, VISION, apply, normalized

from rac3.clip.encoder import SiglipText, query_dropout_keys
from rac3.clip.model import drop_patches, drop_text_tokens
from rac3.clip.published import load_clip
from rac3.clip.siglip import SigLIP, SiglipConfig, SiglipTextConfig, SiglipVisionConfig
from rac3.config import InputError


def test_bfloat16(published_siglip):
    torch, model = module("torch"), module("transformers").SiglipModel.from_pretrained(published_siglip)
    loaded = load_clip(str(published_siglip))
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


def test_texts_are_alone_in_their_rows_and_the_padding_is_read(published_siglip):
    loaded = load_clip(str(published_siglip))
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


def test_dropped_tokens_move_out_and_the_row_is_padded_again(published_siglip):
    loaded = load_clip(str(published_siglip))
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


def test_dropped_patches_are_not_seen(published_siglip):
    loaded = load_clip(str(published_siglip))
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
