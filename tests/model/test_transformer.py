"""Attention, the Transformer and its loss: who sees whom, and every fast path against a plain one or a peer's."""

import dataclasses
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_transformer import plain_logits, plain_turns, random_params

from rac3.config import InputError
from rac3.devices.mesh import MeshConfig
from rac3.model.blockwise import blockwise_attention
from rac3.model.losses import weighted_cross_entropy
from rac3.model.packed import PackedAttention, attend, packed_mask
from rac3.model.transformer import Transformer, TransformerConfig

# init_std is large, so that attention is far from uniform and every path matters
CONFIG = TransformerConfig(num_layers=2, embed=32, num_heads=4, mlp=48, dtype="float32", remat="none", init_std=0.2)
VOCAB, POSITIONS, IMAGE = 128, 40, 9
SEGMENTS = np.array([[1] * 7 + [2] * 5 + [3] * 4 + [0] * 4, [1] * 12 + [2] * 8], np.int32)
# float32 sums of up to 128 terms in another order differ by 128 * 6e-8 of their scale at worst; ten follow each other
RTOL = 1e-4
EPS = 1e-5  # against float64, of the largest logit


@pytest.fixture(scope="module")
def model() -> Transformer:
    return CONFIG.build(VOCAB, POSITIONS, IMAGE)


@pytest.fixture(scope="module")
def params(model):
    return random_params(model)


@pytest.fixture(scope="module")
def batch():
    """Ids that are all different, so that each row of the embedding table belongs to one position."""
    tokens = np.arange(1, 41, dtype=np.int32).reshape(2, 20)
    positions = np.array([[*range(7), *range(5), *range(4), *range(4)], [*range(12), *range(8)]])
    offsets = (tokens % 3 * (tokens % 4)).astype(np.int32)
    return tokens, positions.astype(np.int32), offsets, SEGMENTS


@pytest.fixture(scope="module")
def hidden_of(model):
    return jax.jit(lambda params, *inputs: model.apply(params, *inputs))


@pytest.fixture(scope="module")
def logits_of(model):
    return jax.jit(lambda params, *inputs: model.apply(params, model.apply(params, *inputs), method="logits"))


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


@pytest.mark.parametrize(("offset_embedding", "rotary"), [(True, False), (False, False), (True, True), (False, True)])
def test_the_forward_pass_is_that_of_plain_numpy(offset_embedding, rotary):
    """Each group of the packed rows alone, in float64. Embeddings are small, so that the norms' epsilon counts."""
    config = dataclasses.replace(CONFIG, offset_embedding=offset_embedding, rotary_offsets=rotary)
    model = config.build(VOCAB, 12, IMAGE)
    params = random_params(model)
    for name in ("token_embedding", "position_embedding", "offset_embedding")[: 3 if offset_embedding else 2]:
        params["params"][name] /= 50
    rng = np.random.default_rng(0)
    tokens, offsets = rng.integers(0, VOCAB, (2, 20)), rng.integers(0, IMAGE + 1, (2, 20))
    offsets[1, 11] = IMAGE  # the last place of a text or image, at the last of the 12 positions
    positions = np.array([[*range(7), *range(5), *range(4), *range(4)], [*range(12), *range(8)]])
    inputs = [jnp.asarray(field, jnp.int32) for field in (tokens, positions, offsets, SEGMENTS)]
    hidden = jax.jit(model.apply)(params, *inputs)
    got = np.asarray(model.apply(params, hidden, method="logits"))
    for row, segment in [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2)]:
        place = SEGMENTS[row] == segment
        own = offsets[row, place]
        turns = plain_turns(own, 8, IMAGE) if rotary else None
        expected = plain_logits(params, 4, tokens[row, place], own if offset_embedding else None, turns)
        np.testing.assert_allclose(got[row, place], expected, rtol=0, atol=EPS * np.abs(expected).max())


def test_packed_groups_have_the_logits_of_transformers_opt(opt, batch):
    model, params, logits = opt
    hidden = jax.jit(model.apply)(params, *batch)
    got = np.asarray(model.apply(params, hidden, method="logits"))
    for row, segment in [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2)]:
        place = SEGMENTS[row] == segment
        expected = logits(batch[0][row, place])
        np.testing.assert_allclose(got[row, place], expected, rtol=0, atol=EPS * np.abs(expected).max())


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
        return model.apply(changed, *map(jnp.asarray, batch))[row, place] @ direction

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
    for remat in ("none", "dots", "attention", "full"):
        model = dataclasses.replace(CONFIG, remat=remat).build(VOCAB, POSITIONS, IMAGE)

        def loss(params, model=model):
            hidden = model.apply(params, *map(jnp.asarray, batch))
            return jnp.sum(jnp.sin(model.apply(params, hidden, method="logits")))

        gradients.append(jax.tree.leaves(jax.jit(jax.grad(loss))(params)))
    for none, *others in zip(*gradients, strict=True):
        for other in others:
            np.testing.assert_allclose(other, none, rtol=0, atol=RTOL * np.abs(none).max())


def kept_of_layers(remat: str) -> list[tuple[int, ...]]:
    """The shapes of the activations that the backward pass keeps of each of 3 layers; all axes differ in size."""
    layers, rows, seq = 3, 5, 7
    model = dataclasses.replace(CONFIG, num_layers=layers, remat=remat).build(VOCAB, POSITIONS, IMAGE)
    ids = jnp.zeros((rows, seq), jnp.int32)

    def backward(params):
        return jax.vjp(lambda params: model.apply(params, ids, ids, ids, ids), params)[1]

    params = random_params(model)
    shapes = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(backward, params))]
    return sorted(shape for shape in shapes if shape[:1] == (layers,) and {rows, seq} <= set(shape[1:]))


def test_the_backward_pass_keeps_what_it_says():
    """Of a layer: its input; or also the attention's output and the log-sum-exp of each query; or also the products of
    qkv, out and mlp_in; or all."""
    of_input, of_attention, of_lse = (3, 5, 7, 32), (3, 5, 4, 7, 8), (3, 5, 4, 7)
    of_qkv, of_mlp = (3, 5, 7, 3, 4, 8), (3, 5, 7, 48)
    assert kept_of_layers("full") == [of_input]
    assert kept_of_layers("attention") == sorted([of_input, of_attention, of_lse])
    assert kept_of_layers("dots") == sorted([of_input, of_attention, of_lse, of_qkv, of_input, of_mlp])
    assert len(kept_of_layers("none")) > 6


@pytest.mark.parametrize(("remat", "times"), [("none", 1), ("dots", 1), ("attention", 1), ("full", 2)])
def test_attention_runs_again_only_where_its_output_is_not_kept(remat, times):
    """Counted by its exponentials: two in a forward pass, one in the backward pass."""
    model = dataclasses.replace(CONFIG, remat=remat).build(VOCAB, POSITIONS, IMAGE)
    ids = jnp.ones((2, 7), jnp.int32)
    gradient = jax.grad(lambda params: jnp.sum(model.apply(params, ids, ids, ids, ids)))
    names = [each.primitive.name for each in equations(jax.make_jaxpr(gradient)(random_params(model)).jaxpr)]
    assert names.count("exp") == 2 * times + 1


@pytest.mark.parametrize(("remat", "times"), [("dots", 1), ("attention", 1), ("full", 2)])
@pytest.mark.parametrize("form", ["cudnn", "cudnn_packed"])
def test_kernels_of_cudnn_run_again_only_where_their_output_is_not_kept(as_on_hopper, form, remat, times):
    """Counted in the program for a GPU; with one group a row, `cudnn` calls one kernel."""
    config = dataclasses.replace(CONFIG, dtype="bfloat16", remat=remat)
    model = Transformer(config, VOCAB, POSITIONS, IMAGE, PackedAttention(form, max_group=POSITIONS, max_groups=1))
    ids = jnp.ones((2, 8), jnp.int32)
    gradient = jax.grad(lambda params: jnp.sum(model.apply(params, ids, ids, ids, ids).astype(jnp.float32)))
    found = [each.primitive.name for each in equations(jax.make_jaxpr(gradient)(random_params(model)).jaxpr)]
    assert found.count("dot_product_attention_fwd_wrapper") == times
    assert found.count("dot_product_attention_bwd_wrapper") == 1


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_where_it_counts(batch):
    model = dataclasses.replace(CONFIG, dtype="bfloat16").build(VOCAB, POSITIONS, IMAGE)
    boxed = jax.eval_shape(model.init, jax.random.key(0), *batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(boxed)} == {jnp.dtype("float32")}
    hidden = jax.eval_shape(model.apply, nn.unbox(boxed), *batch)
    assert hidden.dtype == jnp.bfloat16
    logits = jax.eval_shape(partial(model.apply, method="logits"), nn.unbox(boxed), hidden)
    assert (logits.dtype, logits.shape) == (jnp.float32, (2, 20, VOCAB))
    program = jax.make_jaxpr(partial(model.apply, method="logits"))(nn.unbox(boxed), hidden).jaxpr
    (product,) = [each for each in equations(program) if each.primitive.name == "dot_general"]
    assert product.outvars[0].aval.dtype == jnp.float32  # its sums are not rounded


def equations(jaxpr: Any) -> Iterator[Any]:
    """All primitives of a program, also those of the functions that it calls."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("attention", ["plain", "blockwise"])
def test_bfloat16_multiplies_matrices_in_bfloat16_and_takes_softmaxes_in_float32(batch, attention):
    """Read off the program of loss and gradients: each product has two bfloat16 operands, forward and backward; the
    exponentials and logarithms of attention and loss, and the norms, are in float32. The plain attention's backward
    pass is JAX's own, which multiplies the float32 gradient of its logits."""
    model = dataclasses.replace(CONFIG, dtype="bfloat16", attention=attention).build(VOCAB, POSITIONS, IMAGE)
    batch = [jnp.asarray(field) for field in batch]

    def loss(params):
        hidden = model.apply(params, *batch)
        table = model.apply(params, method="output_table")
        return weighted_cross_entropy(hidden, table, batch[0], jnp.ones(batch[0].shape))[0]

    program = loss if attention == "plain" else jax.grad(loss)
    found: dict[str, list[Any]] = {}
    for equation in equations(jax.make_jaxpr(program)(random_params(model)).jaxpr):
        found.setdefault(equation.primitive.name, []).append([var.aval.dtype for var in equation.invars])
    # Forward: qkv, scores, values, out, two of the MLP, logits. Backward: two of each; and attention's scores again.
    assert found["dot_general"] == [[jnp.bfloat16] * 2] * (7 if attention == "plain" else 7 + 14 + 1)
    for name in ("exp", "log", "rsqrt"):
        assert {dtype for dtypes in found[name] for dtype in dtypes} == {jnp.dtype("float32")}


def test_sums_of_many_products_are_kept_in_float32():
    """Scores, values and logits of bfloat16 come out in float32: 300 products of 1 + 2^-7 are not 300 in bfloat16."""
    ones = jnp.ones((1, 300, 1, 8), jnp.bfloat16)
    values = jnp.full((1, 300, 1, 8), 1 + 2**-7, jnp.bfloat16)
    out = blockwise_attention(ones, ones, values, jnp.ones((1, 300), jnp.int32))
    np.testing.assert_array_equal(np.float32(out), 1 + 2**-7)


def test_the_residual_stream_is_sharded_along_positions():
    """What a scan over the layers keeps of a layer's input, [layers, rows, seq, embed], on a mesh of two by four."""
    model = dataclasses.replace(CONFIG, remat="full").build(VOCAB, POSITIONS, IMAGE)
    ids, params = jnp.ones((4, 16), jnp.int32), random_params(model)
    with MeshConfig(data=2, tensor=4).build().use():
        gradient = jax.jit(jax.grad(lambda params: jnp.sum(model.apply(params, ids, ids, ids, ids))))
        program = gradient.lower(params).compile().as_text()
    kept = set(re.findall(r"f32\[2,\d+,\d+,32\]", program))
    assert "f32[2,2,4,32]" in kept
    assert not kept & {"f32[2,2,16,32]", "f32[2,4,16,32]"}


def test_the_defaults_are_the_paper_model():
    model = TransformerConfig().build(60_032, 4096, 1024)
    ids = jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids, ids, ids, ids)["params"]
    blocks = sum(leaf.size for leaf in jax.tree.leaves(shapes["blocks"]))
    assert blocks == 32 * (4 * 2560**2 + 2 * 2560 * 10240 + 4 * 2560 + 10240 + 2560 + 4 * 2560)


def test_residual_writers_start_smaller(model):
    """By 1/sqrt(2 layers) = 1/2 here; the sample deviation of 2,048 draws is within 8% at 5 sigma."""
    ids = jnp.zeros((1, 2), jnp.int32)
    new = nn.unbox(jax.jit(model.init)(jax.random.key(0), ids, ids, ids, ids))["params"]
    assert np.std(new["token_embedding"]) == pytest.approx(0.2, rel=0.08)
    blocks = new["blocks"]
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
    with MeshConfig(rules=rules).build(jax.devices()[:1]).use(), pytest.raises(InputError, match="'mlp' has no rule"):
        jax.eval_shape(model.apply, params, *batch)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"num_heads": 48}, "num_heads=48 does not divide model.embed=2560"), ({"num_layers": 0}, "num_layers=0")],
)
def test_fields_are_checked(fields, message):
    with pytest.raises(InputError, match=message):
        TransformerConfig(**fields)
