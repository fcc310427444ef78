"""CLIP's loss is that of the whole batch, wherever its rows are."""

import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image
import pytest
import tiny_config

from rac3.clip.checkpoint import ClipCheckpoint
from rac3.clip.contrastive import contrastive_loss
from rac3.clip.frozen import FrozenCLIP
from rac3.config import InputError
from rac3.devices.mesh import DeviceMesh, MeshConfig
from rac3.documents.document import Document, Image, Text
from rac3.stages.fit import clip as clip_module
from rac3.stages.fit import encoder as encoder_module
from rac3.stages.fit.clip import fit_clip
from rac3.stages.fit.encoder import FitTask
from rac3.tokens.text import TextTokenizer
from rac3.training.state import TrainState
from rac3.weights.fitting import FitConfig

ROWS = 16
CONFIG = replace(tiny_config.get_config().clip, fit=FitConfig(steps=7, batch=ROWS))
WORDS = ("red", "blue", "green", "old", "small")


def documents() -> list[Document]:
    """Captions repeat, so that rows on different devices are no negatives of each other. The second image of some is
    not what their caption tells of."""
    rng = np.random.default_rng(0)
    out = []
    for number in range(24):
        images = []
        for _ in range(1 + number % 2):
            buffer = io.BytesIO()
            PIL.Image.fromarray(rng.integers(0, 256, (32, 45, 3), np.uint8)).save(buffer, "PNG")
            images.append(Image(buffer.getvalue()))
        caption = f"a {WORDS[number % 5]} fox number {number % 3}"
        out.append(Document(str(number), (Text(caption), *images), {}))
    return out


@dataclass
class Fitted:
    """What `fit_clip` hands to the training loop, the state that it begins with, and what one step makes of it."""

    step: Callable[[TrainState, Any, Any], tuple[TrainState, Any]]
    batch: Any
    before: Any
    after: Any
    loss: float

    def one_device(self, rows: slice) -> tuple[float, Any]:
        """The loss and the gradient of some rows of the batch on one device: descent at rate 1 subtracts it."""
        device = jax.devices()[0]
        state = TrainState(np.zeros((), np.int32), self.before, optax.sgd(1.0).init(self.before))
        batch = jax.tree.map(lambda x: x[rows], self.batch)
        new, metrics = jax.jit(self.step)(*jax.device_put((state, batch), device), None)
        return float(metrics["loss"][0]), jax.tree.map(np.subtract, self.before, jax.device_get(new.params))


def one_step(folder: Path) -> Fitted:
    """One step of the real `fit_clip` on all devices, without augmentation, by plain descent at rate 1."""
    seen: dict[str, Any] = {}
    config = replace(CONFIG, text_crop=0.0, image_crop=1.0, fit=FitConfig(steps=1, batch=ROWS))

    def watched(config: FitConfig, task: FitTask, seed: int, mesh: DeviceMesh, folder: Path) -> TrainState:
        seen["step"] = task.step
        seen["before"] = jax.device_get(task.new.create().params)
        seen["batch"] = task.batch(np.random.default_rng([seed, 0]).integers(task.items, size=ROWS))
        return encoder_module.fit_encoder(config, task, seed, mesh, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip_module, "adam", lambda config, steps: optax.sgd(1.0))
        patch.setattr(clip_module, "fit_encoder", watched)
        checkpoint = fit_clip(config, 0, MeshConfig().build(), documents(), folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return Fitted(**seen, after=checkpoint.params, loss=json.loads(lines[-1])["loss"])


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    return one_step(tmp_path_factory.mktemp("fit"))


def close(one: Any, other: Any) -> bool:
    """Within float32's rounding of sums over the batch, against the largest gradient of all."""
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(other))
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.abs(a - b).max() < 1e-5 * scale for a, b in pairs)


def prepared(
    config: FrozenCLIP, given: list[Document], params: Any, folder: Path, seed: int = 0
) -> tuple[FitTask, ClipCheckpoint]:
    """What `fit_clip` hands to the training loop, and the checkpoint that it makes of `params`; nothing is fitted."""
    handed, mesh = [], MeshConfig().build()

    def skipped(fit: FitConfig, task: FitTask, *rest: Any) -> TrainState:
        assert fit == config.fit != FitConfig()
        assert rest == (seed, mesh, folder)
        handed.append(task)
        return TrainState(np.zeros((), np.int32), params, ())

    def adam(fit: FitConfig, steps: int) -> optax.GradientTransformation:
        assert (fit, steps) == (config.fit, config.fit.steps)
        return encoder_module.adam(fit, steps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip_module, "fit_encoder", skipped)
        patch.setattr(clip_module, "adam", adam)
        checkpoint = fit_clip(config, seed, mesh, given, folder)
    return handed[0], checkpoint


def test_the_loss_sees_the_vectors_that_the_encoder_gives_later(
    fitted: Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Row by row: the caption of a document with its own image, as `MixedEncoder` reads both from the artifact."""
    config = replace(CONFIG, text_crop=0.0, image_crop=1.0, max_logit_scale=7.0)
    handed, checkpoint = prepared(config, documents(), fitted.before, tmp_path)
    text = checkpoint.config.text_config
    assert (text.vocab_size, text.eos_token_id) == (checkpoint.tokenizer.size + 2, checkpoint.tokenizer.size + 1)

    def loss(text, image, scale, same, max_scale):
        value, metrics = contrastive_loss(text, image, scale, same, max_scale)
        given = {"text": text, "image": image, "scale": scale, "same": same, "max_scale": jnp.float32(max_scale)}
        return value, metrics | given

    monkeypatch.setattr(clip_module, "contrastive_loss", loss)
    state = handed.new.create().replace(params=fitted.before)
    _, metrics = jax.jit(handed.step)(state, handed.batch(np.arange(ROWS)), None)
    seen = {name: np.asarray(value) for name, (value, _) in metrics.items()}

    some, encoder = documents()[:ROWS], checkpoint.encoder()
    images = encoder.embed_images([document.images[0] for document in some])
    assert np.abs(np.diff(images, axis=0)).max(axis=1).min() > 1e-3  # the rows differ
    np.testing.assert_allclose(seen["image"], images, atol=1e-5)
    np.testing.assert_allclose(seen["text"], encoder.embed_texts([document.text for document in some]), atol=1e-5)
    np.testing.assert_allclose(seen["scale"], fitted.before["logit_scale"])
    assert seen["max_scale"] == 7
    captions = np.array([document.text for document in some])
    np.testing.assert_array_equal(seen["same"], captions[:, None] == captions)
    assert seen["same"].sum() > ROWS


def test_each_step_draws_its_own_crops_as_the_config_says(
    fitted: Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls: list[tuple[str, tuple[int, ...], float]] = []

    class SeenEnoughError(Exception):
        pass

    def texts(key, ids, mask, share):
        calls.append(("text", tuple(jax.random.key_data(key).tolist()), share))
        return ids, mask

    def images(key, pixels, smallest):
        calls.append(("image", tuple(jax.random.key_data(key).tolist()), smallest))
        raise SeenEnoughError

    monkeypatch.setattr(clip_module, "crop_texts", texts)
    monkeypatch.setattr(clip_module, "crop_images", images)
    config = replace(CONFIG, text_crop=0.25, image_crop=0.5)
    batch = jax.tree.map(jnp.asarray, fitted.batch)
    for seed, number in ((0, 0), (0, 1), (1, 0), (0, 1)):
        handed, _ = prepared(config, documents(), fitted.before, tmp_path, seed)
        with pytest.raises(SeenEnoughError):
            handed.step(TrainState(jnp.int32(number), fitted.before, ()), batch, None)
    assert [(name, share) for name, _, share in calls] == [("text", 0.25), ("image", 0.5)] * 4
    keys = [key for _, key, _ in calls]
    assert len(set(keys)) == 6
    assert keys[2:4] == keys[6:8]  # a function of seed and step


def test_each_seed_begins_with_its_own_parameters(fitted: Fitted, tmp_path: Path):
    for seed, same in ((0, True), (1, False)):
        handed, _ = prepared(CONFIG, documents(), fitted.before, tmp_path, seed)
        params = jax.tree.leaves(handed.new.create().params)
        pairs = zip(params, jax.tree.leaves(fitted.before), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs) is same


def test_it_is_fitted_on_documents_with_text_and_image(fitted: Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole, fit, captions = documents(), TextTokenizer.fit, []
    text, image = (replace(whole[0], segments=whole[0].segments[part : part + 1]) for part in (0, 1))
    with pytest.raises(InputError, match="no training document has both text and an image"):
        fit_clip(CONFIG, 0, MeshConfig().build(), [text, image], tmp_path)

    def recorded(tokenizer: TextTokenizer, texts, folder: Path) -> None:
        captions.extend(texts)
        fit(tokenizer, captions, folder)

    monkeypatch.setattr(TextTokenizer, "fit", recorded)
    handed, _ = prepared(CONFIG, [text, *whole[1:5], image], fitted.before, tmp_path)
    assert handed.items == 4
    assert captions == [document.text for document in whole[1:5]]


def test_eight_devices_step_as_one_does(fitted: Fitted):
    assert jax.device_count() == 8
    gradient = jax.tree.map(np.subtract, fitted.before, fitted.after)
    loss, expected = fitted.one_device(slice(None))
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected)) > 1e-2
    np.testing.assert_allclose(fitted.loss, loss, rtol=1e-5)
    assert close(gradient, expected)


def test_which_is_not_the_mean_of_eight_losses(fitted: Fitted):
    """Each device's rows alone have one negative in place of fifteen."""
    parts = [fitted.one_device(slice(start, start + ROWS // 8)) for start in range(0, ROWS, ROWS // 8)]
    gradient = jax.tree.map(np.subtract, fitted.before, fitted.after)
    mean = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *(part for _, part in parts))
    assert np.mean([loss for loss, _ in parts]) < 0.7 * fitted.loss
    assert not close(gradient, mean)


def test_equal_captions_are_on_different_devices(fitted: Fitted):
    ids = fitted.batch[0]
    assert len(ids) == ROWS
    assert len(np.unique(ids, axis=0)) < ROWS  # equal captions, some of them on different devices
    first = {tuple(row): place // (ROWS // 8) for place, row in reversed(list(enumerate(ids)))}
    assert any(first[tuple(row)] != place // (ROWS // 8) for place, row in enumerate(ids))


@pytest.mark.slow
def test_two_processes_step_as_one_does(fitted: Fitted, tmp_path: Path):
    """Four devices each. Both write into one folder, as the hosts of a cluster do."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    root = Path(__file__).parents[3]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (root, root / "tests"))),
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4"),
    }
    commands = [[sys.executable, __file__, address, str(number), str(tmp_path)] for number in range(2)]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    gradient = jax.tree.map(np.subtract, fitted.before, fitted.after)
    for number in range(2):
        leaves = np.load(tmp_path / f"{number}.npz")
        assert float(leaves["loss"]) == pytest.approx(fitted.loss, rel=1e-5)
        after = jax.tree.unflatten(jax.tree.structure(gradient), [leaves[f"arr_{i}"] for i in range(len(leaves) - 1)])
        assert close(jax.tree.map(np.subtract, fitted.before, after), gradient)


if __name__ == "__main__":
    jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
    assert jax.device_count() == 8
    result = one_step(Path(sys.argv[3]))
    np.savez(Path(sys.argv[3]) / f"{sys.argv[2]}.npz", *jax.tree.leaves(result.after), loss=result.loss)
