"""The real pictures that drawn ones are compared with, and the figures that come of it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rac3 import recipes
from rac3.artifacts.workdir import Workdir
from rac3.config import InputError
from rac3.documents.document import pixels_of, prepare_image
from rac3.evaluation.distributions import cmmd, frechet_of, kid
from rac3.evaluation.features import Embedded
from rac3.held_out import real_pictures
from rac3.run import Run
from rac3.stages import reference as stage
from rac3.stages.evaluate import _picture_scores
from rac3.stages.reference import reference


class MeanColor:
    """A network of three features, which remembers what it was shown."""

    name = "FD (mean color)"
    shown: list[int] = []  # noqa: RUF012  # of all of them

    def __init__(self, weights: str, resolution: int) -> None:
        assert Path(weights).name == "net.pth"

    def embed(self, pictures) -> Embedded:
        self.shown.append(len(pictures))
        return Embedded(np.array([pixels_of(each).mean((0, 1)) for each in pictures], np.float32).reshape(-1, 3))


@pytest.fixture
def run(experiment, workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A finished run of 12 documents a split, in parts of 5."""
    (tmp_path / "net.pth").write_text("weights")
    monkeypatch.setattr("rac3.run.Network", MeanColor)
    monkeypatch.setattr(stage, "PART_DOCUMENTS", 5)
    monkeypatch.setattr(MeanColor, "shown", [])
    settings = replace(experiment.evaluation, features=str(tmp_path / "net.pth"), documents=12)
    return Run(replace(experiment, evaluation=settings), Workdir(workdir, "tiny"))


def real(run: Run, split: str) -> list[np.ndarray]:
    size = run.images.resolution
    items = run.documents(split).many(range(min(12, len(run.documents(split)))))
    return [prepare_image(item.document.images[0].pixels(), size) for item in items]


def test_features_are_those_of_the_real_pictures_as_the_model_sees_them(run: Run) -> None:
    reference(run)
    for split in ("validation", "test"):
        found, vectors = real_pictures(run, split)
        wanted = real(run, split)
        assert len(wanted) == {"validation": 12, "test": 4}[split]
        np.testing.assert_allclose(found.features, np.stack([each.mean((0, 1)) for each in wanted]), rtol=1e-6)
        np.testing.assert_allclose(vectors, run.encoder.embed_images(wanted), atol=1e-5)
        assert run.artifact(recipes.reference, split).manifest["counts"] == {"images": len(wanted)}
    calls = len(MeanColor.shown)
    reference(run)
    assert len(MeanColor.shown) == calls  # current


def test_a_killed_reference_goes_on_at_its_part(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self, pictures) -> Embedded:
        if MeanColor.shown:
            raise KeyboardInterrupt
        return embed(self, pictures)

    embed = MeanColor.embed
    monkeypatch.setattr(MeanColor, "embed", fails)
    with pytest.raises(KeyboardInterrupt):
        reference(run, ["validation"])
    monkeypatch.setattr(MeanColor, "embed", embed)
    reference(run, ["validation"])
    total = len(real(run, "validation"))
    assert MeanColor.shown == [5] * (total // 5) + [total % 5] * (total % 5 > 0)  # no part twice
    assert len(real_pictures(run, "validation")[0].features) == total


def test_drawn_pictures_are_compared_with_those_of_their_split(run: Run) -> None:
    reference(run)
    drawn = np.stack([255 - each for each in real(run, "validation")])
    found = _picture_scores(run, "validation", drawn, np.full(len(drawn), 0.2))
    ours = MeanColor("net.pth", 0).embed([*drawn]).features
    theirs, vectors = real_pictures(run, "validation")
    own = found["FD (mean color)"]
    assert (own["images"], own["real_images"]) == (len(drawn), len(drawn))
    assert own["frechet"]["value"] == pytest.approx(frechet_of(ours, theirs.features))
    assert own["kid"]["value"] == pytest.approx(kid(ours, theirs.features))
    assert found["cmmd"]["value"] == pytest.approx(cmmd(run.encoder.embed_images([*drawn]), vectors))
    assert found["clipscore"]["value"] == pytest.approx(2.5 * 0.2)
    same = _picture_scores(run, "validation", np.stack(real(run, "validation")), np.array([0.4, -1.0] * 6))
    assert same["FD (mean color)"]["frechet"]["value"] == pytest.approx(0, abs=1e-6)
    assert same["clipscore"]["value"] == pytest.approx(2.5 * 0.2)  # below 0 counts as 0


def test_without_a_network_nothing_is_compared(run: Run) -> None:
    plain = Run(replace(run.experiment, evaluation=replace(run.experiment.evaluation, features="")), run.workdir)
    reference(plain)
    assert not MeanColor.shown
    assert set(_picture_scores(plain, "validation", np.zeros((1, 8, 8, 3), np.uint8), np.zeros(1))) == {"clipscore"}
    with pytest.raises(InputError, match=r"reference is missing.*run `rac3 evaluate`"):
        real_pictures(run, "validation")
