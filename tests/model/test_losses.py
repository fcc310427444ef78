"""The CM3 loss by hand, and its chunked cross-entropy against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_cm3_loss import MODEL, packed, plain_cm3_loss
from plain_transformer import plain_nats, random_params

from rac3.batches.packing import KIND_NAMES
from rac3.model.losses import cm3_loss, cross_entropy

# float32 sums of up to 50 terms in another order differ by 50 * 6e-8 of their scale at worst; a few follow each other
RTOL = 1e-4


def test_no_logits_are_kept_for_the_backward_pass():
    hidden, targets, table = jnp.zeros((2, 21, 16)), jnp.zeros((2, 21), jnp.int32), jnp.zeros((50, 16))

    def backward(hidden, table):
        return jax.vjp(lambda *x: cross_entropy(lambda part: part @ x[1].T, x[0], targets, 7), hidden, table)[1]

    shapes = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(backward, hidden, table))]
    assert (3, 2, 7, 16) in shapes
    assert all(shape == table.shape for shape in shapes if 50 in shape)


@pytest.mark.parametrize("chunk", [1, 8, 21, 64])
def test_the_chunked_loss_is_the_plain_loss(chunk):
    """21 positions: chunks that divide them, that do not, and one that is larger."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(2, 21, 16)), jnp.float32)
    table = jnp.asarray(rng.normal(size=(50, 16)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 50, (2, 21)), jnp.int32)
    weight = jnp.asarray(rng.random((2, 21)), jnp.float32)

    np.testing.assert_allclose(
        cross_entropy(lambda part: part @ table.T, hidden, targets, chunk)[0],
        plain_nats(np.float64(hidden[0]) @ np.float64(table).T, np.asarray(targets[0])),
        rtol=RTOL,
    )

    def plain(hidden, table):
        log_probs = jax.nn.log_softmax(hidden @ table.T)
        return -jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]

    def chunked(hidden, table):
        return cross_entropy(lambda part: part @ table.T, hidden, targets, chunk)

    np.testing.assert_allclose(chunked(hidden, table), plain(hidden, table), rtol=RTOL)
    expected, got = (
        jax.grad(lambda hidden, table, of=of: jnp.sum(of(hidden, table) * weight), (0, 1))(hidden, table)
        for of in (plain, chunked)
    )
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=RTOL * np.abs(other).max())


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
