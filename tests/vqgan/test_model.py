import re
from dataclasses import replace
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from plain_vqgan import apply, random_params, torch_vqgan

from rac3.config import InputError
from rac3.evaluation.reconstruction import psnr
from rac3.vqgan.model import (
    VQGAN,
    Downsample,
    Upsample,
    UpsampleConv,
    VQGANConfig,
    at_resolution,
    fold_patches,
    nearest_codes,
    preprocess,
    to_pixels,
    unfold_patches,
)
from rac3.vqgan.objective import (
    CodebookState,
    VQGANObjective,
    init_codebook_from_batch,
    locality_loss,
    update_codebook,
    vqgan_step,
    with_codebook,
)

TINY = VQGANConfig(
    ch=8,
    ch_mult=(1, 2),
    num_res_blocks=1,
    attn_resolutions=(4,),
    resolution=8,
    z_channels=16,
    embed_dim=8,
    n_embed=32,
    norm_groups=4,
)


def rectangles(seed: int, number: int, size: int) -> np.ndarray:
    """Pictures of one to three flat rectangles on a flat ground."""
    rng = np.random.default_rng(seed)
    colors = rng.permutation(np.array([[220, 40, 40], [40, 160, 60], [40, 60, 200], [250, 240, 230]], np.uint8))
    pictures = np.empty((number, size, size, 3), np.uint8)
    for picture in pictures:
        picture[:] = colors[rng.integers(4)]
        for _ in range(rng.integers(1, 4)):
            top, left = rng.integers(0, size * 3 // 4, 2)
            height, width = rng.integers(size // 4, size, 2)
            picture[top : top + height, left : left + width] = colors[rng.integers(4)]
    return pictures


@pytest.fixture(scope="module")
def tiny() -> tuple[VQGAN, dict]:
    model = VQGAN(TINY)
    return model, random_params(model)


def test_an_upsampling_convolution_is_the_one_it_replaces():
    x = jax.random.normal(jax.random.key(0), (2, 5, 7, 3))
    plain = nn.Conv(4, (3, 3), padding="SAME")
    params = plain.init(jax.random.key(1), x)
    params["params"]["bias"] = jnp.arange(4.0)
    assert jax.tree.map(jnp.shape, UpsampleConv(4).init(jax.random.key(1), x)) == jax.tree.map(jnp.shape, params)
    expected = plain.apply(params, x.repeat(2, axis=1).repeat(2, axis=2))
    np.testing.assert_allclose(UpsampleConv(4).apply(params, x), expected, atol=2e-6)  # sums of 27 terms of order 1


def test_resampling_without_convolutions_is_torchs():
    torch = pytest.importorskip("torch")
    config = replace(TINY, resamp_with_conv=False)
    x = np.random.default_rng(0).standard_normal((2, 4, 6, 3)).astype(np.float32)
    nchw = torch.from_numpy(x).permute(0, 3, 1, 2)
    for module, expected in (
        (Downsample(config), torch.nn.functional.avg_pool2d(nchw, 2)),
        (Upsample(config), torch.nn.functional.interpolate(nchw, scale_factor=2.0, mode="nearest")),
    ):
        found, variables = module.init_with_output(jax.random.key(0), jnp.asarray(x))
        assert not variables
        np.testing.assert_allclose(found, expected.permute(0, 2, 3, 1), rtol=1e-6)


def test_a_latent_kernel_of_one_pixel_is_that_of_all_convolutions_on_the_grid():
    model = VQGAN(replace(TINY, ch_mult=(1, 2, 2), latent_kernel=1))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    sizes = {path: leaf.shape[0] for path, leaf in flatten_dict(shapes, sep="/").items() if leaf.ndim == 4}
    pointwise = ("nin_shortcut", "quant_conv", "attn")
    assert all(size == 1 for path, size in sizes.items() if any(part in path for part in pointwise))
    rest = {path: size for path, size in sizes.items() if not any(part in path for part in pointwise)}
    on_the_grid = {"encoder/conv_out/kernel", "decoder/conv_in/kernel"}
    on_the_grid |= {path for path in rest if re.search(r"mid_|down_2_block|up_2_block", path)}
    assert len(on_the_grid) == 2 + 2 * (2 + 2 + 1) + 2 * 2  # two in each of the blocks, one up to two of which
    assert {path for path, size in rest.items() if size == 1} == on_the_grid
    assert {rest[path] for path in rest.keys() - on_the_grid} == {3}


def test_with_one_level_all_convolutions_are_on_the_grid():
    model = VQGAN(replace(TINY, ch_mult=(1,), patch_size=2, latent_kernel=1))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    assert {leaf.shape[0] for leaf in jax.tree.leaves(shapes) if leaf.ndim == 4} == {1}


def test_patches_are_positions_and_their_pixels_channels():
    pixels = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
    folded = np.asarray(fold_patches(jnp.asarray(pixels), 2))
    assert folded.shape == (2, 2, 3, 12)
    for image, row, column in np.ndindex(2, 2, 3):
        patch = pixels[image, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        np.testing.assert_array_equal(folded[image, row, column], patch.ravel())
    np.testing.assert_array_equal(unfold_patches(jnp.asarray(folded), 2), pixels)


def test_a_model_of_patches_sees_its_patches_alone_where_no_kernel_sees_more():
    """One level, 1 x 1 kernels and no attention: there are only the norms, over all positions in whatever order."""
    config = replace(TINY, ch_mult=(1,), patch_size=2, latent_kernel=1, mid_attn=False, attn_resolutions=())
    assert (config.grid, config.tokens_per_image) == (4, 16)
    model = VQGAN(config)
    params = random_params(model)
    encoder, decoder = params["encoder"], params["decoder"]
    assert encoder["conv_in"]["kernel"].shape == (1, 1, 2 * 2 * 3, 8)
    assert decoder["conv_out"]["kernel"].shape == (1, 1, 8, 2 * 2 * 3)
    pictures = preprocess(rectangles(0, 2, 8))
    drawn = apply(model, params, apply(model, params, pictures, "encode"), "decode")
    assert drawn.shape == pictures.shape
    turned = pictures[:, ::-1, ::-1]  # patches elsewhere, and the pixels of each in another order
    moved = jnp.concatenate([pictures[:, 4:], pictures[:, :4]], axis=1)  # whole patches elsewhere
    grid = apply(model, params, pictures, "encode").reshape(2, 4, 4)
    np.testing.assert_array_equal(apply(model, params, moved, "encode").reshape(2, 4, 4), jnp.roll(grid, 2, axis=1))
    assert (apply(model, params, turned, "encode").reshape(2, 4, 4) != grid[:, ::-1, ::-1]).any()


def test_dropout_acts_in_training_alone():
    model = VQGAN(replace(TINY, dropout=0.5))
    images = preprocess(rectangles(0, 2, 8))
    params = random_params(model)

    @partial(jax.jit, static_argnums=1)
    def run(key, train):
        keep = {"mutable": "intermediates", "capture_intermediates": lambda module, _: isinstance(module, nn.Dropout)}
        return model.apply({"params": params}, images, train=train, rngs={"dropout": key}, **keep)

    (one, kept), (other, _), (again, _) = (run(jax.random.key(seed), True) for seed in (0, 1, 0))
    np.testing.assert_array_equal(one.latents, again.latents)
    assert np.abs(one.latents - other.latents).max() > 1e-2
    dropped = {path: np.mean(values[0] == 0) for path, values in flatten_dict(kept["intermediates"], sep="/").items()}
    assert len(dropped) == 4 + 6  # blocks of the encoder and of the decoder
    assert all(0.3 < share < 0.7 for share in dropped.values())
    plain, without = apply(VQGAN(TINY), params, images), run(jax.random.key(0), False)[0]
    np.testing.assert_allclose(without.reconstruction, plain.reconstruction, atol=1e-4)


def test_shapes_and_raster_order(tiny):
    model, params = tiny
    assert (TINY.grid, TINY.tokens_per_image) == (4, 16)
    images = preprocess(rectangles(0, 3, 8))
    codes = apply(model, params, images, "encode")
    assert codes.shape == (3, 16)
    decoded = apply(model, params, codes, "decode")
    assert decoded.shape == images.shape

    # plain oracle: walk the grid row by row
    latents = np.asarray(apply(model, params, images, "latents"))
    embedding = np.asarray(params["codebook"]["embedding"])
    grid = [(y, x) for y in range(4) for x in range(4)]
    plain = [np.argmin(np.sum((embedding - latents[0, y, x]) ** 2, axis=1)) for y, x in grid]
    assert len(set(plain)) > 2
    np.testing.assert_array_equal(codes[0], plain)

    out = apply(model, params, images)
    np.testing.assert_array_equal(out.codes, codes)
    # z + (code - z) rounds differently from the code itself
    np.testing.assert_allclose(out.reconstruction, decoded, atol=1e-4)


def test_gradient_passes_straight_through(tiny):
    model, params = tiny
    images = preprocess(rectangles(0, 2, 8))

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.sum(model.apply({"params": params}, images).reconstruction ** 2)

    assert jnp.abs(gradient(params)["encoder"]["conv_in"]["kernel"]).max() > 0
    assert jnp.abs(gradient(params)["codebook"]["embedding"]).max() == 0


def test_chunked_distances_agree_with_the_plain_ones():
    vectors, embedding = jax.random.normal(jax.random.key(0), (53, 5)), jax.random.normal(jax.random.key(1), (19, 5))
    plain = jnp.argmin(jnp.sum((vectors[:, None] - embedding) ** 2, axis=-1), axis=1)
    for max_distances in (1, 19 * 10, 19 * 53, 2**24):
        np.testing.assert_array_equal(nearest_codes(vectors, embedding, max_distances), plain)


def test_large_codebook_never_makes_the_whole_distance_matrix():
    compiled = (
        jax.jit(nearest_codes)
        .lower(jax.ShapeDtypeStruct((65_536, 4), jnp.float32), jax.ShapeDtypeStruct((16_384, 4), jnp.float32))
        .compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < 300e6  # all at once: 4.3 GB


def test_bfloat16_computes_distances_in_float32(tiny):
    _, params = tiny
    images = preprocess(rectangles(0, 2, 8))
    out = apply(VQGAN(TINY, dtype=jnp.bfloat16), params, images)
    assert out.latents.dtype == out.reconstruction.dtype == jnp.float32
    exact = apply(VQGAN(TINY), params, images)
    # 8 bits of mantissa through some 15 layers; values are of order 1
    np.testing.assert_allclose(out.latents, exact.latents, atol=0.1)


def test_bfloat16_keeps_codes_apart_that_it_could_not_tell():
    """Two codes at every place, less than a step of bfloat16 apart: only distances in float32 find the nearer one."""
    rng = np.random.default_rng(0)
    model = VQGAN(TINY, dtype=jnp.bfloat16)
    params = random_params(model)
    images = jnp.asarray(rng.uniform(-1, 1, (32, 8, 8, 3)), jnp.float32)
    latents = np.asarray(apply(model, params, images, "latents")).reshape(-1, TINY.embed_dim)
    codes = latents[rng.permutation(len(latents))[: TINY.n_embed // 2]]
    codes += 0.3 * rng.standard_normal(codes.shape, np.float32)  # else a vector would be midway between its two
    codes = np.concatenate([codes, codes * np.float32(1 + 1e-3)])
    params["codebook"]["embedding"] = jnp.asarray(codes)

    def nearest(vectors: np.ndarray, codes: np.ndarray) -> np.ndarray:
        return np.argmin(np.sum((vectors[:, None].astype(np.float64) - codes) ** 2, axis=-1), axis=1)

    out = apply(model, params, images)  # vectors and codes of one program, which may round as it likes
    latents, found = np.asarray(out.latents).reshape(-1, TINY.embed_dim), np.asarray(out.codes).reshape(-1)
    assert len(np.unique(found)) > TINY.n_embed // 2
    np.testing.assert_array_equal(found, nearest(latents, codes))
    rounded = nearest(latents, codes.astype(jnp.bfloat16).astype(np.float32))
    assert np.mean(found == rounded) < 0.8


def test_bfloat16_finds_most_of_the_codes_of_float32():
    rng = np.random.default_rng(0)
    params = random_params(VQGAN(TINY))
    images = jnp.asarray(rng.uniform(-1, 1, (64, 8, 8, 3)), jnp.float32)
    latents = np.asarray(apply(VQGAN(TINY), params, images, "latents")).reshape(-1, TINY.embed_dim)
    params["codebook"]["embedding"] = jnp.asarray(latents[rng.permutation(len(latents))[: TINY.n_embed]])
    exact, rough = (
        np.asarray(apply(VQGAN(TINY, dtype), params, images, "encode")) for dtype in ("float32", "bfloat16")
    )
    assert len(np.unique(exact)) == TINY.n_embed
    share = np.mean(exact == rough)
    print(f"bfloat16 and float32: {share:.2%} equal codes")
    # the encoder's rounding moves a vector by some 1% of its length, across a border between codes only now and then
    assert 0.95 < share < 1


def test_preprocess_inverts_and_clips():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    np.testing.assert_array_equal(to_pixels(preprocess(pixels)), pixels)
    np.testing.assert_array_equal(to_pixels(jnp.full((1, 1, 1, 2), 3.0).at[..., 0].set(-2.0)), [[[[0, 255]]]])


def test_codebook_update_by_hand():
    objective = VQGANObjective(decay=0.5, smoothing=0.0, revive_below=0.1)
    start = CodebookState(
        embedding=jnp.array([[0.0], [1.0], [9.0]]),
        cluster_size=jnp.array([1.0, 1.0, 0.1]),
        vector_sum=jnp.array([[0.0], [1.0], [0.9]]),
    )
    vectors = jnp.array([[0.2], [0.4], [2.0]])
    after = update_codebook(objective, start, vectors, jnp.array([0, 0, 1]), jax.random.key(0))
    np.testing.assert_allclose(after.cluster_size, [1.5, 1.0, 1.0])  # the third was at 0.05 < 0.1 * (3 / 3): revived
    np.testing.assert_allclose(after.embedding[:2], [[0.3 / 1.5], [1.5 / 1.0]])
    assert after.embedding[2, 0] in vectors[:, 0]
    np.testing.assert_allclose(after.vector_sum[2], after.embedding[2])

    kept = update_codebook(
        VQGANObjective(decay=0.5, smoothing=0.0, revive_below=0.0), start, vectors, jnp.zeros(3, int), jax.random.key(0)
    )
    np.testing.assert_allclose(kept.cluster_size[2], 0.05)


@pytest.mark.slow
def test_fitting_raises_psnr():
    config = VQGANConfig(
        ch=8, ch_mult=(1, 1, 2), num_res_blocks=1, attn_resolutions=(), resolution=16, z_channels=16, embed_dim=8,
        n_embed=64, norm_groups=4, mid_attn=False,
    )  # fmt: skip
    model, objective, optimizer = VQGAN(config), VQGANObjective(), optax.adam(3e-3)
    data, unseen = rectangles(0, 512, 16), rectangles(0, 544, 16)[512:]
    params = random_params(model)
    codebook = jax.jit(partial(init_codebook_from_batch, model))(params, preprocess(data[:64]), jax.random.key(1))
    state = optimizer.init(params)

    def reconstruct(params, pixels):
        codes = apply(model, params, preprocess(pixels), "encode")
        return np.asarray(to_pixels(apply(model, params, codes, "decode")))

    def whole_psnr(params):  # of all pictures as one
        return psnr(unseen.reshape(1, -1, 16, 3), reconstruct(params, unseen).reshape(1, -1, 16, 3))[0]

    @jax.jit
    def step(params, state, codebook, pixels, key):
        found = vqgan_step(model, objective, params, codebook, preprocess(pixels), key)
        updates, state = optimizer.update(found.gradients, state)
        return optax.apply_updates(params, updates), state, found.codebook, found.metrics

    before = whole_psnr(with_codebook(params, codebook))
    for i in range(120):
        batch = data[np.arange(i * 16, i * 16 + 16) % len(data)]
        params, state, codebook, metrics = step(params, state, codebook, batch, jax.random.key(i))
    after = whole_psnr(with_codebook(params, codebook))
    assert after > before + 5
    assert metrics["perplexity"] > 8  # of 64: no collapse onto a few codes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"resolution": 100}, "resolution=100 is not a multiple of 16"),
        ({"resolution": 96, "patch_size": 4}, "resolution=96 is not a multiple of 64, which the patches of 4 pixels"),
        ({"patch_size": 0}, "patch_size=0 is below 1"),
        ({"ch_mult": ()}, "ch_mult is empty"),
        ({"ch_mult": (1, 0)}, r"ch_mult=\(1, 0\) has a multiplier below 1"),
        ({"n_embed": 0}, "n_embed=0 is below 1"),
        ({"dropout": 1.0}, r"dropout=1\.0"),
    ],
)
def test_bad_config(fields, message):
    with pytest.raises(InputError, match=message):
        VQGANConfig(**fields)


def test_at_another_resolution_the_same_levels_attend():
    config = replace(TINY, resolution=32, patch_size=2, ch_mult=(1, 2, 2), attn_resolutions=(8,))  # 16, 8, 4 positions
    assert at_resolution(config, 64) == replace(config, resolution=64, attn_resolutions=(16,))


def taming_name(path: str) -> str:
    name = re.sub(r"(down|up)_(\d)_", r"\1.\2.", path).replace("mid_", "mid.")
    name = re.sub(r"\.(block|attn)_(\d)/", r".\1.\2/", name) if "mid." not in name else name
    name = re.sub(r"(kernel|scale)$", "weight", name).replace("/", ".")
    return name.replace("codebook.embedding", "quantize.embedding.weight")


def test_parity_with_the_taming_architecture_in_torch():
    torch = pytest.importorskip("torch")
    config = VQGANConfig(
        ch=32, ch_mult=(1, 2, 2), attn_resolutions=(16,), resolution=32, z_channels=48, embed_dim=24, n_embed=64
    )
    model, rng = VQGAN(config), np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    params = random_params(model)
    weights = {
        taming_name(path): torch.from_numpy(np.array(x.transpose(3, 2, 0, 1) if x.ndim == 4 else x))
        for path, x in flatten_dict(params, sep="/").items()
    }
    assert "encoder.down.0.block.1.norm1.weight" in weights
    assert "decoder.up.1.upsample.conv.bias" in weights

    latents = apply(model, params, jnp.asarray(images), "latents")
    expected = torch_vqgan(weights, config, torch.from_numpy(images).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    # float32 sums over up to 576 terms, some 30 layers deep; relative to the largest value
    np.testing.assert_allclose(latents, expected, atol=1e-5 * np.abs(expected).max())

    codes = apply(model, params, jnp.asarray(images), "encode")
    vectors = weights["quantize.embedding.weight"][torch.from_numpy(np.array(codes)).long()]
    expected = (
        torch_vqgan(weights, config, vectors.reshape(2, 8, 8, 24).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    )
    decoded = apply(model, params, codes, "decode")
    np.testing.assert_allclose(decoded, expected, atol=1e-5 * np.abs(expected).max())


def test_revived_codes_go_where_no_code_is_near() -> None:
    crowd = jnp.zeros((99, 2)) + jax.random.normal(jax.random.key(0), (99, 2)) * 1e-3
    vectors = jnp.concatenate([crowd, jnp.array([[5.0, 5.0]])])
    embedding = jnp.array([[0.0, 0.0], [100.0, 100.0]])
    start = CodebookState(embedding, jnp.array([99.0, 0.0]), embedding * jnp.array([[99.0], [0.0]]))
    after = update_codebook(VQGANObjective(), start, vectors, jnp.zeros(100, int), jax.random.key(1))
    np.testing.assert_allclose(after.embedding[1], [5.0, 5.0])


def test_codes_that_die_together_go_to_different_vectors() -> None:
    vectors = jnp.arange(40.0).reshape(20, 2)
    embedding = jnp.full((8, 2), -50.0).at[0].set(0.0)
    start = CodebookState(embedding, jnp.zeros(8).at[0].set(20.0), jnp.zeros((8, 2)))
    codes = jnp.zeros(20, int)
    draws = [update_codebook(VQGANObjective(), start, vectors, codes, jax.random.key(seed)) for seed in (0, 1)]
    for draw in draws:
        revived = np.asarray(draw.embedding[1:])
        assert {tuple(row) for row in revived} <= {tuple(row) for row in np.asarray(vectors)}
        assert len(np.unique(revived, axis=0)) == 7
        np.testing.assert_allclose(draw.cluster_size[1:], 20 / 8)  # an even use
        np.testing.assert_allclose(draw.vector_sum[1:], 20 / 8 * revived)
    assert not np.array_equal(draws[0].embedding, draws[1].embedding)


def test_smoothing_pulls_the_sizes_together_and_keeps_their_sum() -> None:
    objective = VQGANObjective(decay=0.0, smoothing=1.0, revive_below=0.0)
    start = CodebookState(jnp.zeros((2, 1)), jnp.zeros(2), jnp.zeros((2, 1)))
    after = update_codebook(objective, start, jnp.array([[1.0], [2.0], [4.0]]), jnp.array([0, 0, 1]), jax.random.key(0))
    # three vectors, two codes: sizes 2 and 1 become (2 + 1) / (3 + 2) * 3 = 1.8 and (1 + 1) / (3 + 2) * 3 = 1.2
    np.testing.assert_allclose(after.embedding, [[3 / 1.8], [4 / 1.2]], rtol=1e-6)
    np.testing.assert_allclose(after.cluster_size, [2, 1])


def test_a_codebook_begins_as_vectors_of_the_images_each_once(tiny) -> None:
    model, params = tiny
    images = preprocess(rectangles(0, 4, 8))  # 64 vectors for 32 codes
    latents = np.asarray(apply(model, params, images, "latents")).reshape(-1, TINY.embed_dim)
    first, other = (jax.jit(init_codebook_from_batch, static_argnums=0)(model, params, images, jax.random.key(seed))
                    for seed in (0, 1))  # fmt: skip
    distance = np.abs(np.asarray(first.embedding)[:, None] - latents).max(axis=-1)
    assert distance.min(axis=1).max() < 1e-5
    assert len(np.unique(distance.argmin(axis=1))) == TINY.n_embed
    np.testing.assert_allclose(first.cluster_size, 2)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(first))  # as it is restored from a checkpoint
    np.testing.assert_allclose(first.vector_sum, 2 * first.embedding)
    assert not np.array_equal(first.embedding, other.embedding)


def test_locality_loss_is_that_of_exchanged_patches(tiny) -> None:
    """Patch by patch: half of them are the next image's, and each vector should be that of its own image."""
    model, params = tiny
    images = np.asarray(preprocess(rectangles(0, 3, 8)))
    latents = np.asarray(apply(model, params, jnp.asarray(images), "latents"))
    own = np.asarray(jax.random.bernoulli(jax.random.key(5), 0.5, (3, 4, 4, 1)))
    mixed, wanted = images.copy(), latents.copy()
    for image, row, column in zip(*np.nonzero(~own[..., 0]), strict=True):
        rows, columns = slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2)
        mixed[image, rows, columns] = images[image - 1, rows, columns]
        wanted[image, row, column] = latents[image - 1, row, column]
    moved = np.asarray(apply(model, params, jnp.asarray(mixed), "latents"))
    expected = np.mean((moved - wanted) ** 2) / np.mean(np.var(wanted.reshape(-1, TINY.embed_dim), axis=0))
    loss = jax.jit(locality_loss, static_argnums=0)
    found = loss(
        model, {"params": params}, jnp.asarray(images), jnp.asarray(latents), jax.random.key(5), jax.random.key(6)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    toward = jax.jit(jax.grad(loss, argnums=3), static_argnums=0)
    gradient = toward(
        model, {"params": params}, jnp.asarray(images), jnp.asarray(latents), jax.random.key(5), jax.random.key(6)
    )
    assert not np.asarray(gradient).any()  # the vectors of the whole images stay where they are


def test_locality_loss_is_small_only_where_vectors_ignore_their_neighbors() -> None:
    images, keys = preprocess(rectangles(0, 16, 8)), [jax.random.key(0), jax.random.key(1)]
    near = VQGAN(replace(TINY, latent_kernel=1, mid_attn=False, attn_resolutions=()))

    @partial(jax.jit, static_argnums=0)
    def loss(model: VQGAN, params: dict) -> jax.Array:
        latents = model.apply({"params": params}, images, method="latents")
        return locality_loss(model, {"params": params}, images, latents, *keys)

    assert loss(near, random_params(near)) < loss(VQGAN(TINY), random_params(VQGAN(TINY)))
    # Were every vector a function of its patch alone, exchanging other patches would change nothing.
    assert loss(near, jax.tree.map(jnp.zeros_like, random_params(near))) == 0
