"""Which documents of a held-out split are shown, and in which order."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from replaced import with_members

from rac3.artifacts.workdir import Workdir
from rac3.documents.document import pixels_of
from rac3.experiment import Experiment
from rac3.report.samples import Samples, by_similarity
from rac3.run import PARTS, Run


@pytest.fixture(scope="module")
def run(experiment: Experiment, store: Workdir) -> Run:
    return Run(experiment, store)


def evaluated(run: Run) -> tuple[list[dict[str, Any]], np.ndarray]:
    folder = run.evaluation().folder
    return json.loads((folder / "test.json").read_text(encoding="utf-8")), np.load(folder / "test.npy")


def test_named_documents_come_with_their_own_pictures_and_neighbors(run: Run) -> None:
    made, drawn = evaluated(run)
    strips = Samples.open(run, "test", {"ra_cm3": run}, [2, 0]).strips()
    assert [strip.prompt for strip in strips] == [made[2]["text"], made[0]["text"]]
    for strip, number in zip(strips, (2, 0), strict=True):
        *found, ours, truth = strip.pictures
        np.testing.assert_array_equal(ours.pixels, drawn[number])
        item = run.documents("test").many([number])[0]
        np.testing.assert_array_equal(truth.pixels, pixels_of(item.document.images[0]))
        scores = run.neighbors("test", "scores")[number : number + 1][0, PARTS.index("text")]
        assert [each.label for each in found] == [f"found, {score:.2f}" for score in scores[: len(found)]]
        assert len(found) == len(made[number]["retrieved"]["text"]) == 2


class Told:
    """An encoder that likes the pictures of the first run less and less, but for the second."""

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        return np.tile(np.array([1.0, 0.0], np.float32), (len(texts), 1))

    def embed_images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        likes = np.array([0.8, 0.0, 0.6, -1.0], np.float32)[: len(images)]
        return np.stack([likes, np.sqrt(1 - likes**2)], axis=1)


def test_the_best_are_those_most_similar_to_their_texts(run: Run) -> None:
    assert by_similarity(with_members(run, encoder=Told()), "test") == [0, 2, 1, 3]


def test_documents_without_a_text_have_no_place_in_that_order(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four documents the second has none, so that the second picture is that of the third document."""
    made, drawn = evaluated(run)
    rows = [row | {"text": "" if number == 1 else row["text"]} for number, row in enumerate(made)]
    monkeypatch.setattr("rac3.report.samples._evaluated", lambda *_: (rows, drawn[[0, 2, 3]]))
    assert by_similarity(with_members(run, encoder=Told()), "test") == [0, 3, 2]
    strips = Samples.open(run, "test", {"ra_cm3": run}, [3, 1, 2]).strips()
    assert [strip.prompt for strip in strips] == [made[3]["text"], made[2]["text"]]
    for strip, number in zip(strips, (3, 2), strict=True):
        np.testing.assert_array_equal(strip.pictures[-2].pixels, drawn[number])
