"""Every form of attention over packed rows against plain NumPy and the masked softmax, forward and backward."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from rac3.config import InputError
from rac3.devices.mesh import MeshConfig
from rac3.model import packed
from rac3.model.blockwise import blockwise_attention, first_visible
from rac3.model.cudnn import _from_slots, _to_slots, gathered_attention, slot_sizes
from rac3.model.packed import PackedAttention, choose_attention
from rac3.model.splash import splash_attention

# Of the largest value. Float32: sums of up to 256 terms in another order, 256 * 6e-8. Bfloat16: roundings to 8 bits.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}
FORMS: dict[str, Callable[..., Any]] = {
    "blockwise": functools.partial(blockwise_attention, block=32),
    "cudnn": functools.partial(gathered_attention, max_group=128, max_groups=9, implementation="xla"),
    "splash": functools.partial(splash_attention, interpret=True),
}
# Groups that end at the edges of blocks of 32 and one before and after, of one token, of a whole row; empty slots.
PACKINGS = {
    "edges": [[32, 31, 1, 33, 31], [64, 64]],
    "single tokens": [[1, 1, 1, 60, 1, 2], [1] * 7],
    "whole rows": [[128], [127]],
    "random": [[17, 40, 5, 23, 9, 30], [90, 3, 20]],
}


def segments_of(rows: list[list[int]], seq: int) -> np.ndarray:
    segments = np.zeros((len(rows), seq), np.int32)
    for row, lengths in enumerate(rows):
        segments[row, : sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return segments


def plain_forward_and_backward(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, cotangent: np.ndarray, segments: np.ndarray
) -> list[np.ndarray]:
    """The output and the gradients in float64, one group and one head at a time; 0 at padding."""
    arrays = [np.float64(x) for x in (query, key, value, cotangent)]
    out, *gradients = (np.zeros_like(x) for x in arrays)
    scale = query.shape[-1] ** -0.5
    for row in range(len(segments)):
        for group in range(1, segments[row].max() + 1):
            at = np.flatnonzero(segments[row] == group)
            for head in range(query.shape[2]):
                q, k, v, d_out = (x[row, at, head] for x in arrays)
                logits = np.where(np.tri(len(at)), q @ k.T * scale, -np.inf)
                weights = np.exp(logits - logits.max(-1, keepdims=True))
                weights /= weights.sum(-1, keepdims=True)
                d_weights = d_out @ v.T
                d_logits = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * scale
                out[row, at, head] = weights @ v
                for gradient, found in zip(gradients, (d_logits @ k, d_logits.T @ q, weights.T @ d_out), strict=False):
                    gradient[row, at, head] = found
    return [out, *gradients]


def forward_and_backward(form: Callable[..., Any], *arrays: Any) -> list[np.ndarray]:
    *inputs, cotangent, segments = arrays
    real = jnp.asarray(segments > 0)[..., None, None]

    @jax.jit
    def both(*arrays):
        out, transpose = jax.vjp(lambda *x: jnp.where(real, form(*x, jnp.asarray(segments)), 0), *arrays[:3])
        return [out, *transpose(arrays[3])]

    return [np.float64(x) for x in both(*inputs, cotangent)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("form", FORMS)
def test_all_forms_are_plain_attention_forward_and_backward(form, head_dim, dtype):
    """All packings as the rows of one batch. For splash, the scaled query is rounded once more."""
    segments = segments_of([row for rows in PACKINGS.values() for row in rows], 128)
    rng = np.random.default_rng(head_dim)
    arrays = [jnp.asarray(rng.normal(size=(len(segments), 128, 2, head_dim)), dtype) for _ in range(4)]
    wanted = plain_forward_and_backward(*map(np.asarray, arrays), segments)[:4]
    got = forward_and_backward(FORMS[form], *arrays, segments)
    for one, other in zip(got, wanted, strict=True):
        assert np.abs(one - other).max() <= TOLERANCE[dtype] * np.abs(other).max()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("form", FORMS)
def test_all_forms_are_plain_attention_over_random_packings(form, seed):
    """Rows of up to 9 groups (`FORMS["cudnn"]` has as many slots) with ends drawn anywhere, and padding in most."""
    rng = np.random.default_rng(seed)
    ends = [np.sort(rng.choice(np.arange(1, 129), rng.integers(1, 10), replace=False)) for _ in range(4)]
    segments = segments_of([np.diff(each, prepend=0).tolist() for each in ends], 128)
    arrays = [np.float32(rng.normal(size=(4, 128, 2, 64))) for _ in range(4)]
    wanted = plain_forward_and_backward(*arrays, segments)[:4]
    for one, other in zip(forward_and_backward(FORMS[form], *arrays, segments), wanted, strict=True):
        assert np.abs(one - other).max() <= TOLERANCE["float32"] * np.abs(other).max()


@pytest.mark.gpu  # JAX_PLATFORMS=cuda pytest -m gpu tests/model/test_packed.py
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("form", ["blockwise", "cudnn", "cudnn_packed"])
def test_forms_of_a_gpu_are_plain_attention_forward_and_backward(form, head_dim):
    """The kernels themselves, which take bfloat16 alone; `cudnn_packed` needs Hopper or later."""
    if form == "cudnn_packed" and float(jax.devices()[0].compute_capability) < 9:
        pytest.skip("takes packed rows on Hopper and later")
    segments = segments_of([row for rows in PACKINGS.values() for row in rows], 128)
    rng = np.random.default_rng(head_dim)
    arrays = [jnp.asarray(rng.normal(size=(len(segments), 128, 2, head_dim)), jnp.bfloat16) for _ in range(4)]
    wanted = plain_forward_and_backward(*map(np.asarray, arrays), segments)[:4]
    attend = functools.partial(packed.FORMS[form], PackedAttention(form, max_group=128, max_groups=9))
    for one, other in zip(forward_and_backward(attend, *arrays, segments), wanted, strict=True):
        assert np.abs(one - other).max() <= TOLERANCE["bfloat16"] * np.abs(other).max()


@pytest.mark.parametrize("seq", [100, 33, 7])
def test_rows_need_not_be_whole_blocks(seq):
    segments = segments_of([[seq // 2, 1, seq - seq // 2 - 2], [seq]], seq)
    rng = np.random.default_rng(seq)
    arrays = [np.float32(rng.normal(size=(2, seq, 2, 64))) for _ in range(4)]
    wanted = plain_forward_and_backward(*arrays, segments)
    for form in FORMS.values():
        for one, other in zip(forward_and_backward(form, *arrays, segments), wanted[:4], strict=True):
            assert np.abs(one - other).max() <= TOLERANCE["float32"] * np.abs(other).max()


@pytest.mark.parametrize("form", FORMS)
def test_no_gradient_crosses_a_group(form):
    """The gradient of one group's output is exactly 0 at keys and values of all others, though logits are large."""
    segments = segments_of([[20, 45, 31]], 100)
    rng = np.random.default_rng(0)
    arrays = [np.float32(5 * rng.normal(size=(1, 100, 1, 64))) for _ in range(3)]
    for group in (1, 2, 3):
        inside = (segments == group)[..., None, None]
        got = forward_and_backward(FORMS[form], *arrays, np.float32(inside * np.ones_like(arrays[0])), segments)
        for gradient in got[1:]:
            assert not gradient[~np.broadcast_to(inside, gradient.shape)].any()
            assert gradient.any()


def test_a_token_sees_from_the_start_of_its_group():
    segments = jnp.array([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 3, 3]])
    np.testing.assert_array_equal(first_visible(segments), [[0, 0, 0, 3, 3, 5], [0, 1, 1, 1, 4, 4]])


def test_blocks_without_a_common_group_are_not_visited():
    """Keys and values of other blocks hold NaN, which spreads from any product with it."""
    segments = segments_of([[32, 64, 32]], 128)
    x = jnp.ones((1, 128, 1, 64))
    poisoned = jnp.where(jnp.asarray(segments == 1)[..., None, None], jnp.nan, x)
    out = np.asarray(blockwise_attention(x, poisoned, poisoned, jnp.asarray(segments), block=32))
    assert np.isnan(out[0, :32]).all()
    np.testing.assert_allclose(out[0, 32:], 1, rtol=1e-6)


@pytest.mark.parametrize("sizes", [(128, 128, 1), (128, 40, 7), (4096, 4096, 8), (16, 16, 16)])
def test_the_slots_hold_any_row(sizes):
    """The m-th longest group has at most seq / m tokens, and at most max_group."""
    seq, max_group, max_groups = sizes
    ranges = slot_sizes(seq, max_group, max_groups)
    assert [first for first, _, _ in ranges] == [0, *[last for _, last, _ in ranges[:-1]]]
    assert ranges[-1][1] == max_groups
    for first, _, size in ranges:
        assert size >= min(max_group, seq // (first + 1))


@pytest.mark.parametrize(("limits", "lost"), [((64, 2), [3]), ((30, 3), [2]), ((64, 3), [])])
def test_a_group_that_has_no_slot_is_not_lost_in_silence(limits, lost):
    """Its tokens get NaN, which stops a run; those of the others are as they are."""
    segments = segments_of([[20, 35, 9]], 64)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 64, 1, 64)), jnp.float32)
    out = np.asarray(gathered_attention(x, x, x, jnp.asarray(segments), *limits, implementation="xla"))
    np.testing.assert_array_equal(np.isnan(out).any((2, 3)), np.isin(segments, lost))


def test_rows_go_to_slots_and_back_by_transposed_maps():
    """<slots(x), y> = <x, row(y)> for any x and y; a slot holds its group, then zeros; the row's padding gets zeros."""
    starts, lengths = jnp.array([[3, 0], [0, 5]]), jnp.array([[5, 3], [5, 0]])
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 10, 1, 4), (4, 6, 1, 4)))
    slots, row = _to_slots(x, starts, lengths, 6), _from_slots(y, starts, lengths, 6, 10)
    np.testing.assert_array_equal(slots[0], np.concatenate([x[0, 3:8], np.zeros((1, 1, 4))]))
    np.testing.assert_array_equal(slots[1], np.concatenate([x[0, :3], np.zeros((3, 1, 4))]))
    np.testing.assert_array_equal(slots[3], np.zeros((6, 1, 4)))
    np.testing.assert_array_equal(row[0], np.concatenate([y[1, :3], y[0, :5], np.zeros((2, 1, 4))]))
    assert float(jnp.sum(slots * y)) == pytest.approx(float(jnp.sum(x * row)), rel=1e-5)


def quadratic(jaxpr: Any, seq: int) -> list[tuple[int, ...]]:
    """The shapes in a program, also in those it calls, with two axes of `seq` or more."""
    found = []
    for equation in jaxpr.eqns:
        shapes = [getattr(var.aval, "shape", ()) for var in (*equation.invars, *equation.outvars)]
        found += [shape for shape in shapes if sum(size >= seq for size in shape) >= 2]
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found += quadratic(inner, seq)
    return found


def test_only_the_plain_form_makes_an_array_of_seq_by_seq(as_on_hopper):
    """Read off the program that runs on the form's own device, forward and backward."""
    seq, sizes = 1024, PackedAttention(max_group=256, max_groups=8)
    x, ids = jax.ShapeDtypeStruct((1, seq, 2, 64), jnp.bfloat16), jax.ShapeDtypeStruct((1, seq), jnp.int32)

    def makes_one(form: Callable[..., Any]) -> bool:
        both = jax.make_jaxpr(lambda q, k, v, s: jax.vjp(lambda *x: form(sizes, *x, s), q, k, v)[1](q))
        return bool(quadratic(both(x, x, x, ids).jaxpr, seq))

    assert [name for name, form in packed.FORMS.items() if makes_one(form)] == ["plain"]


@pytest.mark.parametrize("form", ["plain", "blockwise"])
def test_each_device_attends_within_its_rows_and_heads(form):
    segments = segments_of([[20, 12], [32], [5, 6, 7], [31]], 32)
    rng = np.random.default_rng(0)
    arrays = [np.float32(rng.normal(size=(4, 32, 4, 16))) for _ in range(4)]
    wanted = plain_forward_and_backward(*arrays, segments)
    attention = PackedAttention(form)
    with MeshConfig(fsdp=2, tensor=2).build().use():
        got = forward_and_backward(attention, *arrays, segments)
        out = jax.jit(attention)(*arrays[:3], segments)
        program = jax.jit(attention).lower(*arrays[:3], segments).compile().as_text()
    for one, other in zip(got, wanted[:4], strict=True):
        assert np.abs(one - other).max() <= TOLERANCE["float32"] * np.abs(other).max()
    assert out.sharding.spec == PartitionSpec(("data", "fsdp"), None, ("tensor",), None) or out.sharding.spec == (
        PartitionSpec(("data", "fsdp"), None, "tensor")
    )
    assert not any(kind in program for kind in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))


# The choice.


def wrong(_: Any, query: Any, key: Any, value: Any, segments: Any) -> Any:
    """Causal, but blind to groups: what a kernel that drops its segments computes."""
    return packed.attend(query, key, value, packed.packed_mask(jnp.ones_like(segments)))


def wrong_gradient(_: Any, *arrays: Any) -> Any:
    right = packed.FORMS["plain"](None, *arrays)
    return jax.lax.stop_gradient(right) + wrong(None, *arrays) - jax.lax.stop_gradient(wrong(None, *arrays))


def raises(_: Any, *arrays: Any) -> Any:
    raise NotImplementedError("needs another card")


@pytest.fixture
def gpu_forms(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Stands forms in for those of a GPU, and lets this process pass for one on a GPU."""
    choose_attention.cache_clear()

    def stand_in(**forms: Any) -> None:
        monkeypatch.setattr(packed.jax, "default_backend", lambda: "gpu")
        for name, form in forms.items():
            monkeypatch.setitem(packed.FORMS, name, form)

    yield stand_in
    choose_attention.cache_clear()


def test_on_cpus_attention_is_blockwise():
    assert str(choose_attention("auto", 64, "float32", 4096, 8)) == "attention: blockwise"


def test_the_first_form_that_agrees_is_used(gpu_forms):
    right = packed.FORMS["plain"]
    gpu_forms(cudnn_packed=right, cudnn=wrong)
    assert str(choose_attention("auto", 64, "bfloat16", 4096, 8)) == "attention: cudnn, packed"
    choose_attention.cache_clear()
    gpu_forms(cudnn_packed=raises, cudnn=right)
    assert str(choose_attention("auto", 64, "bfloat16", 4096, 8)) == (
        "attention: cudnn; cudnn_packed is not used: NotImplementedError: needs another card"
    )


@pytest.mark.parametrize(("form", "what"), [(wrong, "output is off"), (wrong_gradient, "gradient is off")])
def test_a_form_that_is_wrong_is_never_used(gpu_forms, form, what):
    gpu_forms(cudnn_packed=raises, cudnn=form)
    chosen = choose_attention("auto", 64, "float32", 4096, 8)
    assert chosen.form == "blockwise"
    assert what in str(chosen)
    choose_attention.cache_clear()
    with pytest.raises(InputError, match=f"model.attention=cudnn cannot be used: its .*{what}"):
        choose_attention("cudnn", 64, "float32", 4096, 8)


@pytest.mark.parametrize(("max_group", "max_groups"), [(64, 1), (4096, 32)])
def test_the_trial_has_its_own_limits(gpu_forms, max_group, max_groups):
    """Its groups are longer, and more, than a small model's; the form keeps the limits of the model."""

    def gathers(sizes: PackedAttention, *arrays: Any) -> Any:
        return gathered_attention(*arrays, sizes.max_group, sizes.max_groups, implementation="xla")

    gpu_forms(cudnn_packed=raises, cudnn=gathers)
    chosen = choose_attention("auto", 64, "float32", max_group, max_groups)
    assert (chosen.form, chosen.max_group, chosen.max_groups) == ("cudnn", max_group, max_groups)


def test_a_form_that_gives_nan_is_never_used(gpu_forms):
    gpu_forms(cudnn_packed=raises, cudnn=lambda *arrays: jnp.nan * packed.FORMS["plain"](*arrays))
    assert choose_attention("auto", 64, "float32", 4096, 8).form == "blockwise"


def test_cudnn_needs_a_limit_of_groups():
    with pytest.raises(InputError, match="no limit"):
        choose_attention("cudnn", 64, "float32", 4096, 0)


def test_a_form_of_another_device_is_refused():
    for form in ("cudnn", "cudnn_packed", "splash"):
        with pytest.raises(InputError, match=f"model.attention={form} cannot be used"):
            choose_attention(form, 64, "bfloat16", 4096, 8)
