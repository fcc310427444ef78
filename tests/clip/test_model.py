import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from rac3.clip.contrastive import contrastive_loss, crop_images, crop_texts
from rac3.clip.model import (
    CLIP,
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    drop_patches,
    drop_text_tokens,
    unit_norm,
)
from rac3.config import InputError

EOS = 49
TINY = CLIPConfig(
    CLIPTextConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, eos_token_id=EOS,
    ),
    CLIPVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=12, patch_size=4
    ),
    projection_dim=8,
)  # fmt: skip


def random_params(config: CLIPConfig) -> dict:
    """Parameters drawn with NumPy: compiling `init` takes longer than a whole test."""
    rng, size = np.random.default_rng(0), config.vision_config.image_size
    ids, pixels = jnp.zeros((1, 4), jnp.int32), jnp.zeros((1, size, size, 3))
    shapes = jax.eval_shape(CLIP(config).init, jax.random.key(0), ids, jnp.ones((1, 4), bool), pixels)["params"]

    def draw(path, shape):
        values = rng.standard_normal(shape.shape).astype(np.float32)
        if path[-1].key == "kernel":
            return jnp.asarray(values / np.sqrt(np.prod(shape.shape[:-1])))
        return jnp.asarray(0.3 * values + (path[-1].key == "scale"))

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def params() -> dict:
    return random_params(TINY)


@partial(jax.jit, static_argnums=0)
def encode_text(config: CLIPConfig, params, ids, mask=None):
    return CLIP(config).apply({"params": params}, ids, mask, method="encode_text")


@partial(jax.jit, static_argnums=0)
def encode_image(config: CLIPConfig, params, pixels, patch_keep=None):
    return CLIP(config).apply({"params": params}, pixels, patch_keep, method="encode_image")


def texts(rng: np.random.Generator, lengths: list[int], width: int) -> tuple[jax.Array, jax.Array]:
    """Rows `0 ... EOS` of these lengths, padded with random ids that must not matter."""
    ids = rng.integers(1, EOS, (len(lengths), width))
    for row, length in enumerate(lengths):
        ids[row, 0], ids[row, length - 1] = 0, EOS
    return jnp.asarray(ids, jnp.int32), jnp.asarray(np.arange(width) < np.array(lengths)[:, None])


def test_towers_give_unit_vectors_that_tell_inputs_apart(params):
    rng = np.random.default_rng(0)
    ids, mask = texts(rng, [5, 8, 12], 12)
    pixels = jnp.asarray(rng.standard_normal((3, 12, 12, 3)), jnp.float32)
    for vectors in (encode_text(TINY, params, ids, mask), encode_image(TINY, params, pixels)):
        assert vectors.shape == (3, 8)
        assert vectors.dtype == jnp.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
        assert (np.triu(vectors @ vectors.T, 1) < 0.999).all()


def test_a_vector_of_zeros_stays_one():
    x = jnp.array([[3, 4], [0, 0]], jnp.bfloat16)
    found = jax.jit(unit_norm)(x)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, [[0.6, 0.8], [0, 0]], rtol=1e-6)
    assert np.isfinite(jax.jit(jax.grad(lambda x: unit_norm(x).sum()))(x.astype(jnp.float32))).all()


def test_padding_and_what_follows_the_end_of_text_do_not_matter(params):
    ids, mask = texts(np.random.default_rng(0), [5, 8], 12)
    padded = encode_text(TINY, params, ids, mask)
    np.testing.assert_allclose(padded[0], encode_text(TINY, params, ids[:1, :5])[0], atol=1e-6)
    # without a mask too: attention is causal, and the first end of text counts
    again = ids.at[0, 9].set(EOS)
    np.testing.assert_allclose(padded, encode_text(TINY, params, again), atol=1e-6)
    # but an earlier token does
    assert jnp.abs(encode_text(TINY, params, ids.at[0, 2].add(-1), mask) - padded)[0].max() > 1e-3


def test_old_checkpoints_end_at_the_highest_id(params):
    legacy = replace(TINY, text_config=replace(TINY.text_config, eos_token_id=2))
    ids, mask = texts(np.random.default_rng(0), [5, 8], 12)
    expected = encode_text(TINY, params, ids, mask)
    np.testing.assert_array_equal(encode_text(legacy, params, ids, mask), expected)
    padded = jnp.where(mask, ids, EOS)  # as CLIP's own tokenizer pads
    np.testing.assert_array_equal(encode_text(legacy, params, padded, mask), expected)
    np.testing.assert_allclose(encode_text(legacy, params, padded), expected, atol=1e-6)


def test_dropped_patches_take_no_part(params):
    rng = np.random.default_rng(0)
    pixels = jnp.asarray(rng.standard_normal((2, 12, 12, 3)), jnp.float32)
    keep = jnp.ones((2, 9), bool).at[:, 4].set(False)  # row 1, column 1 of a 3x3 grid
    dropped = encode_image(TINY, params, pixels, keep)
    other = encode_image(TINY, params, pixels.at[:, 4:8, 4:8].set(7.0), keep)
    np.testing.assert_allclose(dropped, other, atol=1e-6)
    assert jnp.abs(encode_image(TINY, params, pixels.at[:, 4:8, 4:8].set(7.0)) - dropped).max() > 1e-3
    whole = encode_image(TINY, params, pixels)
    np.testing.assert_allclose(encode_image(TINY, params, pixels, jnp.ones((2, 9), bool)), whole, atol=1e-6)


def test_drop_text_tokens():
    ids, mask = texts(np.random.default_rng(0), [12, 40, 3, 2], 40)
    keys = jax.random.split(jax.random.key(0), 4)
    drop = jax.jit(drop_text_tokens, static_argnames="rate")
    dropped, kept = drop(keys, ids, mask, rate=0.4)
    for row, length in enumerate([12, 40, 3, 2]):
        before, after = ids[row, :length].tolist(), dropped[row, kept[row]].tolist()
        assert kept[row].tolist() == sorted(kept[row].tolist(), reverse=True)  # moved up, no holes
        assert after[0] == 0
        assert after[-1] == EOS
        rest = iter(before)
        assert all(token in rest for token in after)  # in the same order
        assert len(after) < length if length > 3 else after == before  # the last content token stays
        assert not dropped[row, len(after) :].any()

    # a row's outcome is its key's: not its place in the batch's, nor the padding's
    alone, _ = drop(keys[:1], ids[:1, :12], mask[:1, :12], rate=0.4)
    np.testing.assert_array_equal(alone[0], dropped[0, :12])
    np.testing.assert_array_equal(drop(keys, ids, mask, rate=0.0)[0], np.where(mask, ids, 0))


def test_drop_rate():
    keys = jax.random.split(jax.random.key(0), 400)
    drop = jax.jit(drop_patches, static_argnums=(1, 2))
    kept = drop(keys, 50, 0.2)
    # 20,000 draws: standard deviation 0.0028
    assert float(kept.mean()) == pytest.approx(0.8, abs=0.01)
    assert drop(keys, 3, 0.99).any(axis=1).all()  # never all of them
    np.testing.assert_array_equal(drop(keys[7:9], 50, 0.2), kept[7:9])


def test_contrastive_loss_agrees_with_cross_entropy():
    rng = np.random.default_rng(0)
    text, image = (jnp.asarray(v / np.linalg.norm(v, axis=1, keepdims=True)) for v in rng.standard_normal((2, 6, 4)))
    text, image, scale = text.astype(jnp.float32), image.astype(jnp.float32), jnp.float32(1.5)
    logits, labels = jnp.exp(1.5) * text @ image.T, jnp.arange(6)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    plain = (cross_entropy(logits, labels).mean() + cross_entropy(logits.T, labels).mean()) / 2
    loss, metrics = contrastive_loss(text, image, scale)
    np.testing.assert_allclose(loss, plain, rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(np.argmax(logits, axis=1) == labels))
    # each text scores its own image highest, but the second image is scored higher by the first text
    _, metrics = contrastive_loss(jnp.array([[0.9, 0.8], [0.1, 0.2]]), jnp.eye(2), scale)
    assert metrics["accuracy"] == 1
    huge, _ = contrastive_loss(text, image, jnp.float32(20))
    np.testing.assert_allclose(huge, contrastive_loss(text, image, jnp.log(100.0))[0], rtol=1e-6)


def test_contrastive_loss_leaves_duplicates_out():
    vectors = jnp.eye(3).at[1].set(jnp.array([1.0, 0, 0]))  # pairs 0 and 1 have the same caption and the same image
    duplicates = jnp.zeros((3, 3), bool).at[0, 1].set(True).at[1, 0].set(True)
    scale = jnp.log(20.0)
    assert jax.jit(contrastive_loss)(vectors, vectors, scale)[0] > 0.4  # log(2) in two rows of three
    both = jax.jit(jax.value_and_grad(lambda v: contrastive_loss(v, v, scale, duplicates), has_aux=True))
    (loss, metrics), gradient = both(vectors)
    assert loss < 1e-6
    assert metrics["accuracy"] == 1
    assert np.isfinite(gradient).all()


def test_wrong_sizes_name_the_limit(params):
    with pytest.raises(InputError, match="13 tokens exceed max_position_embeddings=12"):
        encode_text(TINY, params, jnp.zeros((1, 13), jnp.int32))
    with pytest.raises(InputError, match=r"\(16, 16, 3\).*image_size=12"):
        encode_image(TINY, params, jnp.zeros((1, 16, 16, 3)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CLIPTextConfig(hidden_size=10, num_attention_heads=4), "hidden_size=10 is not a multiple"),
        (lambda: CLIPTextConfig(num_attention_heads=0), "is not a multiple of num_attention_heads=0"),
        (lambda: CLIPVisionConfig(hidden_act="relu6"), "hidden_act='relu6' is unknown"),
        (lambda: CLIPTextConfig(max_position_embeddings=2), "max_position_embeddings=2"),
        (lambda: CLIPVisionConfig(patch_size=300), "patch_size=300"),
        (lambda: CLIPConfig(projection_dim=0), "projection_dim=0"),
    ],
)
def test_bad_config(build, message):
    with pytest.raises(InputError, match=message):
        build()


def flax_params(state_dict) -> dict:
    """Hugging Face names and layouts to ours."""
    flat = {}
    for name, tensor in state_dict.items():
        path = re.sub(r"encoder\.layers\.(\d+)", r"layers_\1", name).replace("embeddings.", "").replace(".", "/")
        array = tensor.numpy()
        if path.endswith("position_embedding/weight"):
            path = path.removesuffix("/weight")
        elif path.endswith("token_embedding/weight"):
            path = path.replace("weight", "embedding")
        elif path.endswith("weight") and array.ndim == 1:
            path = path.replace("weight", "scale")
        elif path.endswith("weight"):
            path = path.replace("weight", "kernel")
            array = array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0)
        if "position_ids" not in path:
            flat[path] = jnp.asarray(array)
    return unflatten_dict(flat, sep="/")


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos", [EOS, 2])
def test_parity_with_transformers(act, eos):
    torch = pytest.importorskip("torch")
    import transformers

    text, vision = (
        dict(
            hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, hidden_act=act,
            layer_norm_eps=1e-5,
        )
        for _ in range(2)
    )  # fmt: skip
    text |= {"vocab_size": 50, "max_position_embeddings": 12, "eos_token_id": eos}
    vision |= {"image_size": 40, "patch_size": 16}  # 8 pixels to the right and below are not seen
    config = CLIPConfig(CLIPTextConfig(**text), CLIPVisionConfig(**vision), projection_dim=32)
    torch.manual_seed(0)
    reference = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    ).eval()
    with torch.no_grad():
        for weight in reference.parameters():
            weight.add_(0.1 * torch.randn_like(weight))  # biases and scales away from their 0 and 1
    params = flax_params(reference.state_dict())
    assert flatten_dict(params).keys() == flatten_dict(random_params(config)).keys()

    rng = np.random.default_rng(0)
    ids, mask = texts(rng, [5, 8, 12], 12)
    pixels = rng.standard_normal((3, 40, 40, 3)).astype(np.float32)
    with torch.no_grad():
        out = reference(
            input_ids=torch.from_numpy(np.array(ids)).long(),
            attention_mask=torch.from_numpy(np.array(mask)).long(),
            pixel_values=torch.from_numpy(pixels).permute(0, 3, 1, 2),
        )
    # unit vectors in float32, three layers deep
    np.testing.assert_allclose(encode_text(config, params, ids, mask), out.text_embeds, atol=1e-5)
    np.testing.assert_allclose(encode_image(config, params, jnp.asarray(pixels)), out.image_embeds, atol=1e-5)
    np.testing.assert_allclose(params["logit_scale"], reference.logit_scale.detach())


def test_initial_weights_have_the_spread_of_transformers():
    torch = pytest.importorskip("torch")
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = sizes | {"vocab_size": 50, "max_position_embeddings": 12}
    vision = sizes | {"image_size": 40, "patch_size": 8}
    config = CLIPConfig(CLIPTextConfig(**text), CLIPVisionConfig(**vision), projection_dim=32)
    torch.manual_seed(0)
    reference = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    )
    ids, pixels = jnp.zeros((1, 12), jnp.int32), jnp.zeros((1, 40, 40, 3))
    ours = jax.jit(CLIP(config).init)(jax.random.key(0), ids, jnp.ones((1, 12), bool), pixels)["params"]
    theirs = flatten_dict(flax_params({name: value.detach() for name, value in reference.state_dict().items()}))
    for path, values in flatten_dict(ours).items():
        if path[-1] in ("scale", "bias", "logit_scale"):
            np.testing.assert_allclose(values, theirs[path])
        else:  # four deviations of the ratio of two samples
            ratio = float(values.std() / theirs[path].std())
            assert ratio == pytest.approx(1, abs=4 / np.sqrt(values.size)), path


def test_cropped_texts_keep_their_first_tokens_and_end_with_eos() -> None:
    ids = jnp.asarray(np.tile([[90, 1, 2, 3, 4, 91, 0]], (400, 1)))
    mask = ids != 0
    cut, kept = crop_texts(jax.random.key(0), ids, mask, 0.5)
    lengths = np.asarray(kept.sum(1))
    assert set(lengths) == {3, 4, 5, 6}  # one to four tokens between <bos> and <eos>
    assert 0.5 < (lengths == 6).mean() < 0.75  # uncut, or cut at the full length: 1/2 + 1/8
    for row, length in zip(np.asarray(cut), lengths, strict=True):
        assert row[: length - 1].tolist() == [90, 1, 2, 3, 4][: length - 1]
        assert row[length - 1] == 91
        assert not row[length:].any()
    same, _ = crop_texts(jax.random.key(0), ids, mask, 0.0)
    np.testing.assert_array_equal(same, ids)


def test_cropped_images_show_a_square_of_the_image() -> None:
    ramp = np.broadcast_to(np.arange(32, dtype=np.float32)[None, None, :, None], (64, 32, 32, 3))
    out = np.asarray(jax.jit(crop_images, static_argnums=2)(jax.random.key(0), jnp.asarray(ramp), 0.5))
    slopes = np.diff(out[:, 16, 4:28, 0], axis=1).mean(1)  # a crop of share s stretches the ramp to slope s
    assert slopes.min() >= 0.5 - 1e-3
    assert slopes.max() <= 1 + 1e-3
    assert slopes.std() > 0.05
    assert out.min() >= 0
    assert out.max() <= 31
    np.testing.assert_array_equal(crop_images(jax.random.key(0), jnp.asarray(ramp), 1.0), ramp)


def test_crops_lie_anywhere_in_the_image() -> None:
    rows, columns = np.mgrid[:32, :32].astype(np.float32)
    grid = jnp.asarray(np.broadcast_to(np.stack([rows, columns, rows], axis=-1), (400, 32, 32, 3)))
    out = np.asarray(jax.jit(crop_images, static_argnums=2)(jax.random.key(1), grid, 0.5))
    # pixel i of a crop of share s shows corner + s (i + 1/2) - 1/2
    share = (out[:, 24, 16, 0] - out[:, 8, 16, 0]) / 16
    np.testing.assert_allclose((out[:, 16, 24, 1] - out[:, 16, 8, 1]) / 16, share, atol=1e-4)  # a square
    corners = np.stack([out[:, 16, 16, 0], out[:, 16, 16, 1]]) + 0.5 - 16.5 * share
    where = corners / (32 * (1 - share))  # 0: at the top or the left, 1: at the bottom or the right
    assert -1e-2 < where[:, share < 0.9].min() < 0.05
    assert 0.95 < where[:, share < 0.9].max() < 1 + 1e-2
    assert abs(np.corrcoef(where)[0, 1]) < 0.2
    assert abs(np.corrcoef(where[0], share)[0, 1]) < 0.2


def test_contrastive_loss_bounds_its_scale() -> None:
    text = unit_norm(jax.random.normal(jax.random.key(0), (6, 4)))
    image = unit_norm(jax.random.normal(jax.random.key(1), (6, 4)))
    bounded, _ = contrastive_loss(text, image, jnp.log(50.0), max_scale=5.0)
    plain, _ = contrastive_loss(text, image, jnp.log(5.0))
    np.testing.assert_allclose(bounded, plain, rtol=1e-6)
