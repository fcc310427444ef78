"""Fitting a VQGAN with everything switched on: over devices, across a restart, and what is kept in the end."""

import io
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image
import pytest
from jaxtyping import PyTree

from rac3 import recipes
from rac3.config import InputError
from rac3.devices.mesh import DeviceMesh, MeshConfig
from rac3.documents.document import Document, Image
from rac3.documents.world import World
from rac3.experiment import Data, Experiment
from rac3.model.losses import Metrics
from rac3.stages.fit.encoder import FitTask, adam
from rac3.stages.fit.vqgan import fit_vqgan, make_step, vqgan_task
from rac3.training.checkpoint import Checkpoints
from rac3.training.loop import put
from rac3.training.metrics import read_metrics
from rac3.training.state import TrainState
from rac3.vqgan.discriminator import AdversarialConfig, Discriminator
from rac3.vqgan.frozen import FrozenVQGAN
from rac3.vqgan.model import VQGAN, VQGANConfig
from rac3.vqgan.objective import CodebookState, VQGANObjective, with_codebook
from rac3.vqgan.perceptual import LAYERS, PerceptualConfig
from rac3.weights.fitting import FitConfig

MODEL = VQGANConfig(
    ch=4, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(), resolution=8, z_channels=8, embed_dim=4, n_embed=8,
    norm_groups=2, mid_attn=False,
)  # fmt: skip
ADVERSARIAL = AdversarialConfig(weight=0.8, start=1, ndf=32, n_layers=1)
TOKENIZER = FrozenVQGAN(
    model=MODEL,
    objective=VQGANObjective(ema_decay=0.99, adversarial=ADVERSARIAL),
    fit=FitConfig(steps=4, batch=16, peak_lr=1e-3, b1=0.5, b2=0.9),
)
STEPS = 4
CHANNELS = (2, 2, 4, 4, 4)  # in the place of VGG16's


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    rng = np.random.default_rng(0)
    out = []
    for key in range(24):
        pixels = np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((2, 2, 1))).astype(np.uint8)
        file = io.BytesIO()
        PIL.Image.fromarray(pixels).save(file, "png")
        out.append(Document(str(key), (Image(file.getvalue()),), {}))
    return out


class Run:
    """The steps of a fit one by one, on some of the devices; compiled once, as `fit_vqgan` compiles them."""

    def __init__(self, documents: list[Document], devices: int) -> None:
        self.mesh = MeshConfig().build(jax.devices()[:devices])
        self.task = vqgan_task(TOKENIZER, 0, self.mesh, documents)
        self.step = jax.jit(self.task.step, donate_argnums=0)
        self.copy = jax.jit(partial(jax.tree.map, jnp.copy))
        with self.mesh.use():
            self.first: TrainState = self.task.new.create()

    def go(self, state: TrainState, steps: int) -> list[tuple[TrainState, Metrics]]:
        """What comes after each step."""
        out = []
        with self.mesh.use():
            for _ in range(steps):
                rows = np.random.default_rng(int(state.step)).integers(24, size=16)
                batch = put(self.task.batch(rows), self.mesh)
                state, metrics = self.step(self.copy(state), batch, self.task.frozen)
                out.append((state, {name: (float(a), float(b)) for name, (a, b) in metrics.items()}))
        return out


def assert_trees_equal(one: PyTree, other: PyTree) -> None:
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def run(documents) -> Run:
    return Run(documents, 8)


@pytest.fixture(scope="module")
def whole(run: Run) -> list[tuple[TrainState, Metrics]]:
    return run.go(run.first, STEPS)


def test_the_players_meet_at_the_start_step(run: Run, whole):
    players = ("discriminator_loss", "generator_loss", "adaptive_weight")
    for name in players:
        assert [metrics[name][1] for _, metrics in whole] == [0, 1, 1, 1]
        assert whole[0][1][name] == (0, 0)
    assert [int(state.extra.discriminator.step) for state, _ in whole] == [0, 1, 2, 3]
    assert_trees_equal(whole[0][0].extra.discriminator, run.first.extra.discriminator)
    assert whole[1][1]["discriminator_loss"][0] == pytest.approx(1, abs=0.2)  # of logits near 0
    assert all(0 < metrics["adaptive_weight"][0] < 1e4 for _, metrics in whole[1:])

    def with_another_discriminator(state: TrainState) -> TrainState:
        changed = jax.tree.map(lambda x: 2 * x, state.extra.discriminator)
        return state.replace(extra=state.extra.replace(discriminator=changed))

    (before, _), (after, _) = (run.go(with_another_discriminator(state), 1)[0] for state in (run.first, whole[0][0]))
    assert_trees_equal(before.params, whole[0][0].params)  # nothing of it counts yet
    kernels = [state.params["decoder"]["conv_out"]["kernel"] for state in (after, whole[1][0])]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-6


def test_the_discriminator_tells_pictures_from_their_reconstructions(run: Run, whole):
    """The third step, whose update of the discriminator is the first with a learning rate: hinge losses by hand."""
    (before, _), (after, metrics) = jax.device_get(whole[1:3])
    real = jnp.asarray(run.task.batch(np.random.default_rng(2).integers(24, size=16)) / np.float32(127.5) - 1)
    variables = {"params": with_codebook(before.params, before.extra.codebook)}
    fake = jax.jit(lambda variables: VQGAN(MODEL).apply(variables, real, train=True).reconstruction)(variables)

    @jax.jit
    def logits(params):
        return [Discriminator(ADVERSARIAL).apply({"params": params}, pictures) for pictures in (real, fake)]

    def hinge(of_real, of_fake):
        return (jnp.maximum(0, 1 - of_real).mean() + jnp.maximum(0, 1 + of_fake).mean()) / 2

    params = before.extra.discriminator.params
    of_real, of_fake = logits(params)
    assert abs(hinge(of_real, of_fake) - hinge(of_fake, of_real)) > 1e-3
    assert metrics["discriminator_loss"][0] == pytest.approx(float(hinge(of_real, of_fake)), abs=1e-4)
    assert metrics["generator_loss"][0] == pytest.approx(-float(of_fake.mean()), abs=1e-4)
    gradient = jax.jit(jax.grad(lambda params: hinge(*logits(params))))(params)
    moved = jax.tree.map(np.subtract, after.extra.discriminator.params, params)
    assert sum(np.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (moved, gradient)), strict=True)) < 0


def test_the_average_follows_the_parameters_after_each_step(run: Run, whole):
    average, states = jax.device_get((run.first.params, whole))
    for updates, (state, _) in enumerate(states):
        decay = (1 + updates) / (10 + updates)  # of the warm-up, below ema_decay
        average = jax.tree.map(lambda kept, new: decay * kept + (1 - decay) * new, average, state.params)  # noqa: B023
    difference = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), average, states[-1][0].extra.average)
    assert max(jax.tree.leaves(difference)) < 1e-6


def test_the_codebook_follows_the_encoder(run: Run, whole):
    (before, _), (after, _) = jax.device_get(whole[:2])
    real = jnp.asarray(run.task.batch(np.random.default_rng(1).integers(24, size=16)) / np.float32(127.5) - 1)
    latents = jax.jit(partial(VQGAN(MODEL).apply, method="latents"))({"params": before.params}, real)
    vectors, codebook = np.asarray(latents).reshape(-1, 4), before.extra.codebook
    codes = np.argmin(np.sum((vectors[:, None] - codebook.embedding) ** 2, axis=-1), axis=1)
    size = 0.95 * codebook.cluster_size + 0.05 * np.bincount(codes, minlength=8)
    even = len(vectors) / 8
    np.testing.assert_allclose(after.extra.codebook.cluster_size, np.where(size < 0.03 * even, even, size), rtol=1e-4)
    assert np.abs(after.extra.codebook.embedding - codebook.embedding).max() > 1e-3


def test_a_codebook_begins_with_images_that_the_seed_draws(documents, run: Run, monkeypatch: pytest.MonkeyPatch):
    def seen(model, params, images, key) -> CodebookState:
        return CodebookState(images[:, 0, 0], jax.random.key_data(key).astype(jnp.float32), images[:1])

    monkeypatch.setattr("rac3.stages.fit.vqgan.init_codebook_from_batch", seen)
    plain = replace(TOKENIZER, objective=VQGANObjective())
    begun = [vqgan_task(plain, seed, run.mesh, documents).new.create().extra.codebook for seed in (0, 1, 0)]
    assert all(each.embedding.shape == (64, 3) for each in begun)  # four batches
    for name in ("embedding", "cluster_size"):
        one, other, again = (np.asarray(getattr(each, name)) for each in begun)
        np.testing.assert_array_equal(one, again)
        assert not np.array_equal(one, other)


def test_each_seed_begins_with_its_own_players(documents, run: Run):
    first, other = (vqgan_task(TOKENIZER, seed, run.mesh, documents).new.create() for seed in (0, 1))
    assert_trees_equal(first, run.first)
    for one, another in ((first, other), (first.extra.discriminator, other.extra.discriminator)):
        pairs = zip(jax.tree.leaves(one.params), jax.tree.leaves(another.params), strict=True)
        assert any(not np.array_equal(a, b) for a, b in pairs)


def test_each_step_has_its_own_key(run: Run, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[int, ...]] = []

    class SeenEnoughError(Exception):
        pass

    def step(model, objective, params, codebook, images, key, perceptual, adversary):
        np.testing.assert_allclose(images, 50 / 127.5 - 1)
        seen.append(tuple(jax.random.key_data(key).tolist()))
        raise SeenEnoughError

    monkeypatch.setattr("rac3.stages.fit.vqgan.vqgan_step", step)
    for seed, number in ((0, 0), (0, 1), (1, 0), (0, 1)):
        made = make_step(TOKENIZER, seed, optax.sgd(1.0), None)
        with pytest.raises(SeenEnoughError):
            made(run.first.replace(step=jnp.int32(number)), jnp.full((2, 8, 8, 3), 50, jnp.uint8), None)
    assert len(set(seen)) == 3
    assert seen[1] == seen[3]  # a function of seed and step


def test_it_is_fitted_as_its_own_settings_say(documents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = []

    def skipped(config: FitConfig, task: FitTask, seed: int, mesh: DeviceMesh, folder: Path) -> TrainState:
        seen.append((config, seed, mesh, folder))
        raise InputError("enough")

    def recorded(config: FitConfig, steps: int):
        seen.append((config, steps))
        return adam(config, steps)

    mesh = MeshConfig().build()
    monkeypatch.setattr("rac3.stages.fit.vqgan.fit_encoder", skipped)
    monkeypatch.setattr("rac3.stages.fit.vqgan.adam", recorded)
    with pytest.raises(InputError, match="enough"):
        fit_vqgan(TOKENIZER, 5, mesh, documents[:1], tmp_path)
    # generator, discriminator from step 1, loop
    assert seen == [(TOKENIZER.fit, 4), (TOKENIZER.fit, 3), (TOKENIZER.fit, 5, mesh, tmp_path)]


def test_every_image_of_a_document_is_a_row(documents):
    two = replace(documents[0], segments=documents[0].segments + documents[1].segments)
    task = vqgan_task(TOKENIZER, 0, MeshConfig().build(), [two, documents[2]])
    assert task.items == 3
    for row, document in enumerate(documents[:3]):
        np.testing.assert_array_equal(task.batch(np.array([row]))[0], document.images[0].pixels())


@pytest.mark.slow
def test_many_devices_as_one(documents, whole):
    state, _ = whole[-1]
    assert len(state.extra.discriminator.params["conv_0"]["kernel"].sharding.device_set) == 8
    one = Run(documents, 1)
    alone = one.go(one.first, STEPS)
    for (_, metrics), (_, other) in zip(alone, whole, strict=True):
        for name in metrics:
            assert metrics[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(alone[-1][0]), jax.tree.leaves(state), strict=True):
        # float32 sums in another order, where Adam divides by gradients of any size
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5, err_msg=jax.tree_util.keystr(path))


def test_a_new_state_is_as_its_abstract_form_says(run: Run):
    new, abstract = run.first, run.task.new.abstract
    assert jax.tree.structure(new) == jax.tree.structure(abstract)
    for (path, leaf), like in zip(jax.tree_util.tree_leaves_with_path(new), jax.tree.leaves(abstract), strict=True):
        assert (leaf.shape, leaf.dtype) == (like.shape, like.dtype), jax.tree_util.keystr(path)
        assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)


@pytest.mark.slow
def test_a_resumed_fit_makes_no_new_state(run: Run, documents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_new_state() -> TrainState:
        raise AssertionError("a resumed fit makes a new state")

    def task(*given) -> FitTask:
        made = vqgan_task(*given)
        return replace(made, new=replace(made.new, create=no_new_state))

    fitted = fit_vqgan(TOKENIZER, 0, run.mesh, documents, tmp_path)
    monkeypatch.setattr("rac3.stages.fit.vqgan.vqgan_task", task)
    assert_trees_equal(fit_vqgan(TOKENIZER, 0, run.mesh, documents, tmp_path), fitted)


def test_a_restored_run_goes_on_bit_for_bit(run: Run, whole, tmp_path: Path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, whole[1][0], [2])
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    restored = checkpoints.restore(run.task.new.abstract)
    checkpoints.close()
    assert restored is not None
    resumed = run.go(restored[0], STEPS - 2)
    assert [metrics for _, metrics in resumed] == [metrics for _, metrics in whole[2:]]
    assert_trees_equal(resumed[-1][0], whole[-1][0])


@pytest.mark.slow
def test_the_average_and_the_codebook_are_kept(run: Run, documents, tmp_path: Path):
    fitted = fit_vqgan(TOKENIZER, 0, MeshConfig().build(), documents, tmp_path)
    (line,) = read_metrics(tmp_path)
    assert {"discriminator_loss", "generator_loss", "adaptive_weight", "psnr", "loss"} <= line.keys()
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    restored = checkpoints.restore(run.task.new.abstract)
    checkpoints.close()
    assert restored is not None
    state = restored[0]
    np.testing.assert_array_equal(fitted["codebook"]["embedding"], state.extra.codebook.embedding)
    for part in ("encoder", "decoder", "quant_conv", "post_quant_conv"):
        assert_trees_equal(fitted[part], state.extra.average[part])
    kernel = state.params["decoder"]["conv_out"]["kernel"]
    assert 0 < np.abs(fitted["decoder"]["conv_out"]["kernel"] - kernel).max() < 1e-2


@pytest.mark.slow
def test_the_perceptual_loss_reads_the_users_weights(documents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    monkeypatch.setattr("rac3.vqgan.perceptual.CHANNELS", CHANNELS)
    widths = dict(zip((index for layer in LAYERS for index in layer), (
        width for layer, width in zip(LAYERS, CHANNELS, strict=True) for _ in layer), strict=True))  # fmt: skip
    inputs = [3, *list(widths.values())[:-1]]
    weights = {f"lin{i}.model.1.weight": torch.full((1, width, 1, 1), 0.1) for i, width in enumerate(CHANNELS)}
    for (index, width), channels in zip(widths.items(), inputs, strict=True):
        weights[f"features.{index}.weight"] = torch.randn(width, channels, 3, 3) * (2 / (9 * channels)) ** 0.5
        weights[f"features.{index}.bias"] = torch.zeros(width)
    file = tmp_path / "weights.pth"
    objective = VQGANObjective(perceptual=PerceptualConfig((str(file),)))
    fit = FitConfig(steps=1, batch=8)
    tokenizer = FrozenVQGAN(model=replace(MODEL, resolution=16), objective=objective, fit=fit)
    experiment = Experiment(name="fit", data=Data(World("train")), vqgan=tokenizer)
    with pytest.raises(InputError, match=r"perceptual\.weights.*weights\.pth' do not exist"):
        recipes.vqgan(experiment)

    file.write_bytes(b"PK something else")
    before = recipes.vqgan(experiment).fingerprint
    torch.save(weights, file)
    assert recipes.vqgan(experiment).fingerprint != before
    fit_vqgan(tokenizer, 0, MeshConfig().build(), documents, tmp_path / "run")
    (line,) = read_metrics(tmp_path / "run")
    assert line["perceptual"] > 0
    assert line["loss"] > 2 * line["l1"] + 4 * line["mse"] + line["perceptual"]  # and what is of the latents


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (VQGANObjective(adversarial=AdversarialConfig(weight=1.0, n_layers=2)), "needs pictures of 12 pixels"),
        (VQGANObjective(adversarial=replace(ADVERSARIAL, start=4)), "start=4 is not below vqgan.fit.steps=4"),
    ],
)
def test_settings_that_cannot_work_are_refused(objective: VQGANObjective, message: str):
    with pytest.raises(InputError, match=message):
        replace(TOKENIZER, objective=objective)
    assert replace(TOKENIZER, objective=objective, checkpoint="elsewhere")  # whose objective is not used


def test_the_perceptual_loss_needs_sixteen_pixels():
    objective = VQGANObjective(perceptual=PerceptualConfig(("vgg.pth",)))
    with pytest.raises(InputError, match=r"needs pictures of 16 pixels, and vqgan\.model\.resolution=8"):
        FrozenVQGAN(model=replace(MODEL, resolution=8), objective=objective)
