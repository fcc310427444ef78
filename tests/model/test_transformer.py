"""Attention, the Transformer and its loss: who sees whom, and every fast path against a plain one."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rac3.config import InputError
from rac3.model.attention import attend, packed_mask
from rac3.model.loss import token_losses
from rac3.model.transformer import Transformer, TransformerConfig
from rac3.sharding import MeshConfig, use_mesh

# init_std is large, so that attention is far from uniform and every path matters
CONFIG = TransformerConfig(num_layers=2, embed=32, num_heads=4, mlp=48, dtype="float32", remat="none", init_std=0.2)
VOCAB, POSITIONS, IMAGE = 128, 40, 9
SEGMENTS = np.array([[1] * 7 + [2] * 5 + [3] * 4 + [0] * 4, [1] * 12 + [2] * 8], np.int32)
# float32 sums of up to 128 terms in another order differ by 128 * 6e-8 of their scale at worst; ten follow each other
RTOL = 1e-4


@pytest.fixture(scope="module")
def model() -> Transformer:
    return CONFIG.build(VOCAB, POSITIONS, IMAGE)


@pytest.fixture(scope="module")
def params(model):
    ids = jnp.zeros((1, 2), jnp.int32)
    return nn.unbox(jax.jit(model.init)(jax.random.key(0), ids, ids, ids, ids))


@pytest.fixture(scope="module")
def batch():
    """Ids that are all different, so that a row of the embedding table stands for one position."""
    tokens = np.arange(1, 41, dtype=np.int32).reshape(2, 20)
    positions = np.array([[*range(7), *range(5), *range(4), *range(4)], [*range(12), *range(8)]])
    offsets = (tokens % 3 * (tokens % 4)).astype(np.int32)
    return tokens, positions.astype(np.int32), offsets, SEGMENTS


@pytest.fixture(scope="module")
def hidden_of(model):
    return jax.jit(lambda params, *inputs: model.apply(params, *inputs)[0])


@pytest.fixture(scope="module")
def logits_of(model):
    return jax.jit(lambda params, *inputs: model.apply(params, model.apply(params, *inputs)[0], method="logits"))


def visible(segments: np.ndarray) -> np.ndarray:
    """[row, query, key]: the definition, in words of Python."""
    rows, seq = segments.shape
    seen = np.zeros((rows, seq, seq), bool)
    for row in range(rows):
        for query in range(seq):
            for key in range(query + 1):
                seen[row, query, key] = segments[row, query] == segments[row, key]
    return seen


def test_the_packed_mask_is_the_one_that_is_drawn():
    drawing = """
        x . . . . .
        x x . . . .
        x x x . . .
        . . . x . .
        . . . x x .
        . . . . . x"""
    expected = np.array([[mark == "x" for mark in line.split()] for line in drawing.strip().splitlines()])
    np.testing.assert_array_equal(packed_mask(jnp.array([[1, 1, 1, 2, 2, 0]]))[0, 0], expected)
    np.testing.assert_array_equal(packed_mask(jnp.asarray(SEGMENTS))[:, 0], visible(SEGMENTS))


def test_attend_is_a_softmax_over_what_is_visible():
    rng = np.random.default_rng(0)
    query, key, value = rng.normal(size=(3, 2, 20, 4, 8)).astype(np.float32)
    seen = visible(SEGMENTS)
    expected = np.zeros_like(query)
    for row, place, head in np.ndindex(2, 20, 4):
        keys = seen[row, place]
        scores = key[row, keys, head] @ query[row, place, head] / np.sqrt(8)
        weights = np.exp(scores - scores.max())
        expected[row, place, head] = weights / weights.sum() @ value[row, keys, head]
    got = attend(jnp.asarray(query), jnp.asarray(key), jnp.asarray(value), packed_mask(jnp.asarray(SEGMENTS)))
    np.testing.assert_allclose(got, expected, rtol=RTOL, atol=1e-6)


def test_gradients_flow_from_what_is_visible_and_from_nothing_else(model, params, batch):
    """Causality, and no leak across groups, padding or rows: the Jacobian's support is the mask, exactly."""
    tokens = batch[0]
    direction = jax.random.normal(jax.random.key(1), (CONFIG.embed,))

    def score(table, row, place):
        changed = {"params": {**params["params"], "token_embedding": table}}
        return model.apply(changed, *map(jnp.asarray, batch))[0][row, place] @ direction

    rows, places = np.divmod(np.arange(40), 20)
    table = params["params"]["token_embedding"]
    gradients = jax.jit(jax.vmap(jax.grad(score), (None, 0, 0)))(table, rows, places)
    flows = np.abs(gradients).max(-1)[:, tokens.ravel()].reshape(2, 20, 2, 20) > 0
    seen = visible(SEGMENTS)
    for row in range(2):
        np.testing.assert_array_equal(flows[row, :, row], seen[row])
        assert not flows[row, :, 1 - row].any()


def test_a_packed_group_is_as_if_it_were_alone(hidden_of, params, batch):
    packed = hidden_of(params, *batch)
    for row, segment in [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2)]:
        place = SEGMENTS[row] == segment
        alone = [np.zeros_like(field) for field in batch]
        for field, whole in zip(alone, batch, strict=True):
            field[0, : place.sum()] = whole[row, place]
        alone[3][0, : place.sum()] = 1
        got = hidden_of(params, *alone)[0, : place.sum()]
        np.testing.assert_allclose(got, packed[row, place], rtol=RTOL, atol=RTOL)  # hidden states have unit scale


@pytest.mark.parametrize("width", [1, 12])
def test_cached_decoding_agrees_with_the_whole_sequence(model, params, logits_of, width):
    """Token by token (width 1), and behind right-padded prompts of different lengths (width 12)."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, VOCAB, (3, 20)).astype(np.int32)
    offsets = rng.integers(0, IMAGE + 1, (3, 20)).astype(np.int32)
    places = np.broadcast_to(np.arange(20, dtype=np.int32), (3, 20))
    whole = np.asarray(logits_of(params, tokens, places, offsets, np.ones_like(tokens)))
    lengths = np.minimum([5, 9, 12], width)

    @jax.jit
    def step(params, tokens, positions, offsets, cache):
        hidden, cache = model.apply(params, tokens, positions, offsets, None, cache)
        return model.apply(params, hidden, method="logits"), cache

    garbage = np.where(np.arange(width) < lengths[:, None], tokens[:, :width], 77)
    logits, cache = step(params, garbage, places[:, :width], offsets[:, :width], model.empty_cache(3, 24))
    atol = RTOL * np.abs(whole).max()
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(logits[row, :length], whole[row, :length], rtol=0, atol=atol)
    rows = np.arange(3)
    for extra in range(20 - lengths.max()):
        place = lengths + extra
        inputs = [field[rows, place][:, None] for field in (tokens, places, offsets)]
        logits, cache = step(params, *inputs, cache)
        np.testing.assert_allclose(logits[:, 0], whole[rows, place], rtol=0, atol=atol)


def test_offsets_tell_the_places_in_a_segment_apart(hidden_of, params, batch):
    tokens, positions, offsets, segments = batch
    other = offsets.copy()
    other[0, 3] = 5 if offsets[0, 3] != 5 else 6
    changed = np.abs(hidden_of(params, tokens, positions, other, segments) - hidden_of(params, *batch)).max(-1) > 0
    np.testing.assert_array_equal(changed, [[False] * 3 + [True] * 4 + [False] * 13, [False] * 20])
    without = dataclasses.replace(CONFIG, offset_embedding=False).build(VOCAB, POSITIONS, IMAGE)
    ids = jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(without.init, jax.random.key(0), ids, ids, ids, ids)["params"]
    assert shapes.keys() == params["params"].keys() - {"offset_embedding"}


def test_what_the_backward_pass_keeps_does_not_change_the_gradients(params, batch):
    gradients = []
    for remat in ("none", "dots", "full"):
        model = dataclasses.replace(CONFIG, remat=remat).build(VOCAB, POSITIONS, IMAGE)

        def loss(params, model=model):
            hidden, _ = model.apply(params, *map(jnp.asarray, batch))
            return jnp.sum(jnp.sin(model.apply(params, hidden, method="logits")))

        gradients.append(jax.tree.leaves(jax.jit(jax.grad(loss))(params)))
    for none, *others in zip(*gradients, strict=True):
        for other in others:
            np.testing.assert_allclose(other, none, rtol=0, atol=RTOL * np.abs(none).max())


@pytest.mark.parametrize("chunk", [1, 8, 21, 64])
def test_the_chunked_loss_is_the_plain_loss(chunk):
    """21 positions: chunks that divide them, that do not, and one that is larger."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, 21, 16)), jnp.float32)
    table = jnp.asarray(rng.normal(size=(50, 16)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 50, (2, 21)), jnp.int32)
    weight = jnp.asarray(rng.random((2, 21)), jnp.float32)

    def plain(hidden, table):
        log_probs = jax.nn.log_softmax(hidden @ table.T)
        return -jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]

    def chunked(hidden, table):
        return token_losses(lambda part: part @ table.T, hidden, targets, chunk)

    np.testing.assert_allclose(chunked(hidden, table), plain(hidden, table), rtol=RTOL)
    expected, got = (
        jax.grad(lambda hidden, table, of=of: jnp.sum(of(hidden, table) * weight), (0, 1))(hidden, table)
        for of in (plain, chunked)
    )
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=RTOL * np.abs(other).max())


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_where_it_counts(batch):
    model = dataclasses.replace(CONFIG, dtype="bfloat16").build(VOCAB, POSITIONS, IMAGE)
    boxed = jax.eval_shape(model.init, jax.random.key(0), *batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(boxed)} == {jnp.dtype("float32")}
    hidden, _ = jax.eval_shape(model.apply, nn.unbox(boxed), *batch)
    assert hidden.dtype == jnp.bfloat16
    logits = jax.eval_shape(partial(model.apply, method="logits"), nn.unbox(boxed), hidden)
    assert (logits.dtype, logits.shape) == (jnp.float32, (2, 20, VOCAB))
    assert model.empty_cache(3, 10).keys.shape == (2, 3, 10, 4, 8)
    assert model.empty_cache(3, 10).keys.dtype == jnp.bfloat16


def test_the_defaults_are_the_paper_model():
    model = TransformerConfig().build(60_032, 4096, 1024)
    ids = jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids, ids, ids, ids)["params"]
    blocks = sum(leaf.size for leaf in jax.tree.leaves(shapes["blocks"]))
    assert blocks == 32 * (4 * 2560**2 + 2 * 2560 * 10240 + 4 * 2560 + 10240 + 2560 + 4 * 2560)


def test_residual_writers_start_smaller(params):
    """By 1/sqrt(2 layers) = 1/2 here; the sample deviation of 2,048 draws is within 8% at 5 sigma."""
    blocks = params["params"]["blocks"]
    for kernel, std in [
        (blocks["attention"]["qkv_kernel"], 0.2),
        (blocks["attention"]["out_kernel"], 0.1),
        (blocks["mlp_in"]["kernel"], 0.2),
        (blocks["mlp_out"]["kernel"], 0.1),
    ]:
        assert np.std(kernel) == pytest.approx(std, rel=0.08)
        assert not np.array_equal(kernel[0], kernel[1])  # each layer has its own draw


def test_a_layout_without_a_rule_raises(model, params, batch):
    rules = tuple(rule for rule in MeshConfig().rules if rule[0] != "mlp")
    config = MeshConfig(rules=rules)
    with use_mesh(config, config.build()), pytest.raises(InputError, match="'mlp' has no rule"):
        jax.eval_shape(model.apply, params, *batch)


def test_packed_rows_need_segments(model, params, batch):
    with pytest.raises(ValueError, match="segments"):
        jax.eval_shape(model.apply, params, *batch[:3])


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"num_heads": 48}, "num_heads=48 does not divide model.embed=2560"), ({"num_layers": 0}, "num_layers=0")],
)
def test_fields_are_checked(fields, message):
    with pytest.raises(InputError, match=message):
        TransformerConfig(**fields)
