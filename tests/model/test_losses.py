"""The CM3 loss by hand, and its chunked cross-entropy against the plain one."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_cm3_loss import MODEL, packed, plain_cm3_loss
from plain_transformer import plain_nats, random_params

from rac3.batches.packing import KIND_NAMES
from rac3.devices.mesh import MeshConfig
from rac3.model.losses import cm3_loss, cross_entropy, weighted_cross_entropy

# float32 sums of up to 50 terms in another order differ by 50 * 6e-8 of their scale at worst; a few follow each other
RTOL = 1e-4


def test_no_logits_are_kept_for_the_backward_pass():
    """Kept are the gradients of hidden states and table, in the shape of each."""
    hidden, table = jnp.zeros((2, 21, 16)), jnp.zeros((50, 16))
    targets, weights = jnp.zeros((2, 21), jnp.int32), jnp.zeros((2, 21))

    def backward(hidden, table):
        return jax.vjp(lambda *x: weighted_cross_entropy(*x, targets, weights, 7)[0], hidden, table)[1]

    shapes = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(backward, hidden, table))]
    assert sorted(shapes) == sorted([hidden.shape, table.shape])


def test_each_product_of_the_loss_runs_once():
    """Three of them: logits, and the gradients of hidden states and table. Recomputed logits would make it four."""
    ids, x = jnp.zeros((2, 32), jnp.int32), jnp.zeros((2, 32, 16))
    loss = jax.grad(lambda x, table: weighted_cross_entropy(x, table, ids, jnp.ones((2, 32)), 8)[0], (0, 1))
    assert str(jax.make_jaxpr(loss)(x, jnp.zeros((50, 16)))).count("dot_general[") == 3


@pytest.mark.parametrize("mesh", [None, {"fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 1, "tensor": 8}])
@pytest.mark.parametrize("chunk", [1, 8, 21, 64])
def test_the_chunked_loss_is_the_plain_loss(chunk, mesh):
    """21 positions: chunks that divide them, that do not, and one that is larger. On a mesh, rows and vocabulary are
    sharded; 48 ids and 16 features divide over its axes."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(4, 21, 16)), jnp.float32)
    table = jnp.asarray(rng.normal(size=(48, 16)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 48, (4, 21)), jnp.int32)
    weights = jnp.asarray(rng.random((4, 21)), jnp.float32)
    expected = [
        plain_nats(np.float64(h) @ np.float64(table).T, np.asarray(t)) for h, t in zip(hidden, targets, strict=True)
    ]

    def plain(hidden, table):
        log_probs = jax.nn.log_softmax(hidden @ table.T)
        return -jnp.sum(jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0] * weights)

    def chunked(hidden, table):
        return weighted_cross_entropy(hidden, table, targets, weights, chunk)

    wanted = jax.grad(lambda *x: plain(*x) / 3, (0, 1))(hidden, table)  # what comes after the loss scales it
    with contextlib.nullcontext() if mesh is None else MeshConfig(**mesh).build().use():
        nats = jax.jit(lambda *x: cross_entropy(*x, targets, chunk))(hidden, table)
        total, same = jax.jit(chunked)(hidden, table)
        gradients = jax.jit(jax.grad(lambda *x: chunked(*x)[0] / 3, (0, 1)))(hidden, table)
    np.testing.assert_allclose(nats, expected, rtol=RTOL)
    np.testing.assert_allclose(same, expected, rtol=RTOL)
    assert float(total) == pytest.approx(float(np.sum(expected * np.float64(weights))), rel=RTOL)
    for one, other in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=RTOL * np.abs(other).max())


def test_the_gradient_of_the_table_meets_once_on_a_mesh():
    """It is summed over rows after the last chunk, not chunk by chunk; and no device sees the whole vocabulary."""
    mesh = MeshConfig(data=2, fsdp=2, tensor=2).build()
    hidden, table = jnp.zeros((4, 64, 16)), jnp.zeros((48, 16))
    ids, weights = jnp.zeros((4, 64), jnp.int32), jnp.ones((4, 64))
    gradient = jax.grad(lambda *x: weighted_cross_entropy(*x, ids, weights, 8)[0], (0, 1))
    with mesh.use():
        places = mesh.sharding("batch", None, None), mesh.sharding("vocab", "embed")
        program = jax.jit(gradient, in_shardings=places).lower(hidden, table).compile().as_text()
    lines = [line for line in program.splitlines() if re.search(r" (all-reduce|reduce-scatter|all-gather)\(", line)]
    table_sized = [
        line for line in lines if "f32[24,16]" in line.split(" = ")[1] or "f32[24,8]" in line.split(" = ")[1]
    ]
    assert sum("while/body" in line for line in table_sized) == 0
    assert not any("[48," in line for line in lines)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_the_loss_is_that_of_the_paper(alpha: float):
    """In float64, without packing. Float32 sums of some 50 losses differ by 1e-5 at most."""
    params = random_params(MODEL)
    batch = packed(alpha)
    loss, metrics = jax.jit(lambda params, batch: cm3_loss(MODEL, params, batch, chunk=7))(params, batch)
    expected, by_kind = plain_cm3_loss(params, alpha)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    values = {name: float(total) / float(count) for name, (total, count) in metrics.items()}
    assert values["loss"] == pytest.approx(expected, rel=1e-5)
    for name in KIND_NAMES.values():
        assert values[f"loss/{name}"] == pytest.approx(by_kind[name], rel=1e-5)
    assert values["real_tokens"] == (19 + 2 + 20) / (2 * 24)


def test_a_batch_without_weight_is_no_division_by_zero():
    batch = packed(0.1)
    batch = batch.replace(loss_weight=np.zeros_like(batch.loss_weight))
    loss, _ = jax.jit(lambda params, batch: cm3_loss(MODEL, params, batch))(random_params(MODEL), batch)
    assert float(loss) == 0
