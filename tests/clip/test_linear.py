"""CLIP with linear towers, against NumPy; EfficientNet has random weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rac3.clip.checkpoint import ClipCheckpoint
from rac3.clip.efficientnet import EfficientNetLite0
from rac3.clip.linear import IMAGES, LinearConfig, LinearTowers, fill_patches
from rac3.config import InputError
from rac3.tokens.text import TextTokenizer

CONFIG = LinearConfig(vocab_size=262, projection_dim=8, image_size=32)
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def params() -> Any:
    """Of both towers: what starts as ones or zeros too is random."""
    ids, pixels = jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 32, 32, 3))
    shapes = jax.eval_shape(LinearTowers(CONFIG).init, jax.random.key(0), ids, jnp.ones((1, 2), bool), pixels)["params"]
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        spread = (2 / max(1, np.prod(leaf.shape[:-1]))) ** 0.5 if len(leaf.shape) > 1 else 0.1
        return (rng.standard_normal(leaf.shape) * spread + (0 if len(leaf.shape) > 1 else 0.5)).astype(np.float32)

    return jax.tree.map(draw, shapes)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_a_text_is_the_sum_of_its_tokens(params: Any) -> None:
    ids = jnp.array([[260, 5, 7, 7, 261, 3], [260, 7, 5, 7, 261, 0]])
    mask = jnp.array([[True] * 5 + [False]] * 2)
    found = LinearTowers(CONFIG).apply({"params": params}, ids, mask, method="encode_text")
    vectors = params["token_embedding"]["embedding"]
    wanted = unit(vectors[260] + vectors[5] + 2 * vectors[7] + vectors[261])
    np.testing.assert_allclose(found, [wanted, wanted], atol=1e-6)
    whole = LinearTowers(CONFIG).apply({"params": params}, ids[:1, :5], method="encode_text")
    np.testing.assert_allclose(whole, [wanted], atol=1e-6)


def test_a_picture_is_a_projection_of_what_efficientnet_sees(params: Any, tmp_path: Path) -> None:
    """Of the means of its last stages' maps, less `mean`, over `deviation`; saved, opened, and through the encoder."""
    TextTokenizer(vocab_size=260).fit(["a red cat"], tmp_path / "fitted")
    checkpoint = ClipCheckpoint(CONFIG, params, TextTokenizer().load(tmp_path / "fitted"), IMAGES)
    checkpoint.save(tmp_path)
    opened = ClipCheckpoint.open(tmp_path)
    assert (opened.config, opened.images) == (CONFIG, IMAGES)
    jax.tree.map(np.testing.assert_array_equal, opened.params, params)

    network = EfficientNetLite0()
    dense = {"_fc": {"kernel": np.zeros((1280, 1000), np.float32), "bias": np.zeros(1000, np.float32)}}
    both, state = jax.jit(lambda p, x: network.apply({"params": p}, x, capture_intermediates=True))(
        params["trunk"] | dense, PIXELS
    )
    maps = [state["intermediates"][f"_blocks.{last}"]["__call__"][0].mean((1, 2)) for last in (7, 10, 14, 15)]
    features = np.concatenate([*maps, both[:, :1280]], axis=1)
    assert [each.shape[1] for each in maps] == [80, 112, 192, 320]
    raw = (features - params["standard"]["mean"]) / params["standard"]["deviation"]
    wanted = unit(raw @ params["visual_projection"]["kernel"])
    found = opened.encoder().embed_images([*PIXELS])
    np.testing.assert_allclose(found, wanted, atol=2e-4)  # sums of 32-bit products, through 50 layers
    assert np.abs(wanted[0] - wanted[1]).max() > 0.01
    fitted = LinearTowers(CONFIG).apply({"params": params}, jnp.asarray(raw), method="encode_features")
    np.testing.assert_allclose(fitted, wanted, atol=1e-5)
    assert opened.encoder().width == 8


def test_a_dropped_patch_has_the_color_of_the_others() -> None:
    pixels = np.zeros((1, 32, 32, 3), np.float32)
    pixels[0, :16, :16], pixels[0, :16, 16:], pixels[0, 16:, :16], pixels[0, 16:, 16:] = 1, 2, 4, 9
    found = np.asarray(fill_patches(jnp.asarray(pixels), jnp.array([[True, False, True, True]])))
    wanted = pixels.copy()
    wanted[0, :16, 16:] = (1 + 4 + 9) / 3
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert LinearTowers(CONFIG).num_patches == 4


def test_efficientnet_sees_no_dropped_patch(params: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, keep = jnp.asarray(PIXELS, jnp.float32), jnp.array([[True, False, True, True]] * 3)
    seen = []

    class SeenError(Exception):
        pass

    def trunk(self: Any, pixels: Any) -> Any:
        seen.append(pixels)
        raise SeenError

    monkeypatch.setattr("rac3.clip.linear.Features.__call__", trunk)
    with pytest.raises(SeenError):
        LinearTowers(CONFIG).apply({"params": params}, pixels, keep, method="encode_image")
    np.testing.assert_array_equal(seen[0], fill_patches(pixels, keep))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 40}, "image_size=40 must be a multiple of 16"),
        ({"image_size": 16}, "image_size=16 must be .* at least 32"),
        ({"projection_dim": 0}, "projection_dim=0 is below 1"),
    ],
)
def test_bad_sizes_are_refused_where_they_are_written(change: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(CONFIG, **change)
