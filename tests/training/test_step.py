"""The objective by hand, and one training step that is the same on every mesh."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import PyTree
from plain_transformer import plain_logits, plain_nats, random_params

from rac3.batches.groups import GroupBuilder
from rac3.batches.masking import Masked, Masking, move_spans
from rac3.batches.packing import IGNORED, KIND_NAMES, PackedBatch, packed_row
from rac3.devices.mesh import MeshConfig, use_mesh
from rac3.documents.document import Document, Image, Text
from rac3.documents.store import TokenizedDocument
from rac3.model.transformer import TransformerConfig
from rac3.tokens.vocabulary import END_OF_INFILL, EOD, IMAGE_ALT, IMAGE_END, IMAGE_SOURCE, Vocabulary
from rac3.training.loop import put
from rac3.training.optimizer import OptimizerConfig
from rac3.training.state import TrainState, create_state
from rac3.training.step import make_train_step, objective

VOCAB = 128
MODEL = TransformerConfig(
    num_layers=2, embed=32, num_heads=4, mlp=64, dtype="float32", remat="dots", init_std=0.1
).build(VOCAB, 24, 9)


def random_batch(seed: int = 0, rows: int = 8, seq: int = 24) -> PackedBatch:
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, VOCAB, (rows, seq + 1)).astype(np.int32)
    segments = np.repeat([[1] * 10 + [2] * 9 + [0] * 5], rows, 0).astype(np.int32)
    positions = np.repeat([[*range(10), *range(9), *range(5)]], rows, 0).astype(np.int32)
    kind = (rng.integers(0, 6, (rows, seq)) * (segments > 0)).astype(np.int32)
    weight = np.select([kind == IGNORED, (kind == 3) | (kind == 4)], [0.0, 0.1], 1.0).astype(np.float32)
    offsets = rng.integers(0, 10, (rows, seq)).astype(np.int32)
    return PackedBatch(ids[:, :-1], ids[:, 1:], segments, positions, offsets, weight, kind)


def init(key: jax.Array):
    ids = jnp.zeros((1, 2), jnp.int32)
    return MODEL.init(key, ids, ids, ids, ids)


VOCABULARY = Vocabulary(text_size=40, image_size=30)
FIRST_TEXT, FIRST_IMAGE, MASK = 8, 48, 78
RETRIEVED, MAIN = "retrieved", "main"


def item(text: list[int], codes: list[int]) -> TokenizedDocument:
    segments = [Text("x")] * bool(text) + [Image(b"x")] * bool(codes)
    ids = tuple(np.array(each, np.int32) for each in (text, codes) if each)
    return TokenizedDocument(Document("k", tuple(segments), {}), ids)


def spelled(text: list[int], codes: list[int]) -> list[tuple[int, int]]:
    """A document as (id, offset) pairs, by hand."""
    pairs = [(FIRST_TEXT + each, place) for place, each in enumerate(text, 1)]
    if codes:
        image = [(FIRST_IMAGE + each, place) for place, each in enumerate(codes, 1)]
        pairs = [(IMAGE_ALT, 0), *pairs, (IMAGE_SOURCE, 0), *image, (IMAGE_END, 0)]
    return [*pairs, (EOD, 0)]


DOCUMENTS = [([1, 2], [3, 4, 5]), ([6], []), ([7, 8], [9, 10])]
#  <img alt=" 7 <mask:0> " src=" 9 10 "> <mask:0> 8 <eoi> <eod>
MASKED = [*spelled([7], [9, 10])[:2], (MASK, 0), *spelled([7], [9, 10])[2:-1]]
MASKED += [(MASK, 0), (FIRST_TEXT + 8, 2), (END_OF_INFILL, 0), (EOD, 0)]


def packed(alpha: float) -> PackedBatch:
    """Two rows: (A, B retrieved; C main) and (B main); (A retrieved; C main, "8" masked)."""
    builder = GroupBuilder(VOCABULARY, Masking("none"), alpha)
    a, b, c = (item(*each) for each in DOCUMENTS)
    no_draws = np.zeros((3, builder.masking.draws_per_document))
    start, masked_c = builder.sequence(a), move_spans(VOCABULARY, builder.sequence(c), [(2, 3)])
    masked = builder.join([Masked(*start, np.ones(len(start.ids), bool)), masked_c])
    rows = [[builder.build([a, b, c], no_draws), builder.build([b], no_draws[:1])], [masked]]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *[packed_row(row, 24) for row in rows])


def plain_objective(params: PyTree, alpha: float) -> tuple[float, dict[str, float]]:
    """Equations 2 and 3 of the paper, one group at a time, per unit of weight; and the mean loss by kind."""
    a, b, c = (spelled(*each) for each in DOCUMENTS)
    nats: dict[str, list[float]] = {}
    for *retrieved, main in [(a, b, c), (b,), (a, MASKED)]:
        ids, offsets = np.array([(EOD, 0), *(pair for part in (*retrieved, main) for pair in part)]).T
        losses = plain_nats(plain_logits(params, 4, ids[:-1], offsets[:-1]), ids[1:])
        for place, (target, loss) in enumerate(zip(ids[1:], losses, strict=True)):
            if target != MASK:
                part = MAIN if len(losses) - place <= len(main) else RETRIEVED
                kind = "text" if 8 <= target < 48 else "image" if 48 <= target < 78 else "markup"
                nats.setdefault(part, []).append(loss)
                nats.setdefault(f"{part}/{kind}", []).append(loss)
    total = sum(nats[MAIN]) + alpha * sum(nats[RETRIEVED])
    weight = len(nats[MAIN]) + alpha * len(nats[RETRIEVED])
    return total / weight, {name: float(np.mean(losses)) for name, losses in nats.items()}


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_the_objective_is_that_of_the_paper(alpha: float):
    """In float64, without packing. Float32 sums of some 50 losses differ by 1e-5 at most."""
    params = random_params(MODEL)
    batch = packed(alpha)
    loss, metrics = jax.jit(lambda params, batch: objective(MODEL, params, batch, chunk=7))(params, batch)
    expected, by_kind = plain_objective(params, alpha)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    values = {name: float(total) / float(count) for name, (total, count) in metrics.items()}
    assert values["loss"] == pytest.approx(expected, rel=1e-5)
    for name in KIND_NAMES.values():
        assert values[f"loss/{name}"] == pytest.approx(by_kind[name], rel=1e-5)
    assert values["tokens"] == 19 + 2 + 20


def test_a_step_of_descent_is_along_the_gradient_of_the_objective():
    """The slope of the plain objective along the step is the step's length, by central differences."""
    params = jax.tree.map(jnp.asarray, random_params(MODEL))
    state = TrainState(jnp.int32(0), params, optax.sgd(1.0).init(params))
    before = jax.device_get(params)
    after, metrics = make_train_step(MODEL, optax.sgd(1.0), chunk=7)(state, jax.tree.map(jnp.asarray, packed(0.1)))
    step = jax.tree.map(lambda old, new: np.float64(old) - np.float64(new), before, jax.device_get(after.params))
    length = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(step)))
    ahead, behind = (
        plain_objective(jax.tree.map(lambda x, d, t=t: x + t * d / length, before, step), 0.1)[0] for t in (1e-4, -1e-4)
    )
    assert (ahead - behind) / 2e-4 == pytest.approx(length, rel=1e-4)
    assert float(metrics["gradient_norm"][0]) == pytest.approx(length, rel=1e-4)


def test_a_step_never_holds_the_logits_of_a_whole_row():
    """Rows are 24 long, chunks 7: what the vocabulary of 128 is an axis of, is 7 positions at most."""
    params = jax.tree.map(jnp.asarray, random_params(MODEL))
    state = TrainState(jnp.int32(0), params, optax.sgd(1.0).init(params))
    batch = jax.tree.map(jnp.asarray, packed(0.1))
    program = str(jax.make_jaxpr(make_train_step(MODEL, optax.sgd(1.0), chunk=7))(state, batch))
    assert "f32[2,7,128]" in program
    assert "f32[2,24,128]" not in program


def test_a_batch_without_weight_is_no_division_by_zero():
    params = nn.unbox(jax.eval_shape(init, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params)
    batch = random_batch()
    loss, _ = jax.jit(lambda params, batch: objective(MODEL, params, batch))(
        params, batch.replace(loss_weight=np.zeros_like(batch.loss_weight))
    )
    assert float(loss) == 0


def train_one(config: MeshConfig, devices: list | None = None) -> tuple[PyTree, dict[str, tuple]]:
    """One step of plain gradient descent, whose update is the gradient: Adam would blow small errors up."""
    mesh = config.build(devices)
    optimizer = optax.sgd(1.0)
    with use_mesh(config, mesh):
        state = create_state(init, optimizer, 0, config, mesh)
        before = jax.device_get(state.params)
        state, metrics = make_train_step(MODEL, optimizer, chunk=8)(state, put(random_batch(), config, mesh))
    gradients = jax.tree.map(lambda old, new: old - new, before, jax.device_get(state.params))
    assert int(state.step) == 1
    return gradients, jax.device_get(metrics)


@pytest.fixture(scope="module")
def on_one_device():
    return train_one(MeshConfig(), jax.devices()[:1])


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_eight_devices_do_what_one_does(on_one_device, shape):
    """Float32 sums in another order: 192 tokens of 64 terms differ by 1e-5 of the scale; subtracting parameters of 0.3
    from each other adds 0.3 * 6e-8."""
    gradients, metrics = train_one(MeshConfig(*shape))
    expected, expected_metrics = on_one_device
    for name, (total, count) in metrics.items():
        assert float(total) == pytest.approx(float(expected_metrics[name][0]), rel=1e-5), name
        assert float(count) == pytest.approx(float(expected_metrics[name][1]), rel=1e-6), name
    for (path, got), want in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(expected), strict=True
    ):
        scale = np.abs(want).max()
        assert scale > 0
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * scale + 1e-7, err_msg=jax.tree_util.keystr(path))


def test_the_norm_of_the_gradients_is_reported(on_one_device):
    gradients, metrics = on_one_device
    norm = np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in jax.tree.leaves(gradients)))
    assert float(metrics["gradient_norm"][0]) == pytest.approx(norm, rel=1e-4)


def test_training_learns():
    """Thirty steps on one batch: the loss falls by half from log(vocabulary)."""
    config = MeshConfig()
    mesh = config.build(jax.devices()[:1])
    optimizer = OptimizerConfig(peak_lr=1e-2).build(30)
    batch = random_batch()
    with use_mesh(config, mesh):
        state = create_state(init, optimizer, 0, config, mesh)
        step = make_train_step(MODEL, optimizer)
        placed = put(batch, config, mesh)
        losses = []
        for _ in range(30):
            state, metrics = step(state, placed)
            losses.append(float(metrics["loss"][0]) / float(metrics["loss"][1]))
    assert losses[0] > 0.9 * np.log(VOCAB)
    assert losses[-1] < 0.5 * losses[0]
