"""MS-COCO, of a folder drawn here: what each part asks for, what it is compared with, and what a kill costs."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_folder import ANNOTATIONS, IMAGES, write_coco
from html_page import Page

from rac3 import recipes
from rac3.artifacts.workdir import Workdir
from rac3.config import InputError
from rac3.documents.coco import Coco
from rac3.documents.document import pixels_of, prepare_image
from rac3.evaluation.captions import caption_metrics
from rac3.evaluation.distributions import frechet_of
from rac3.evaluation.features import Embedded
from rac3.report.coco import coco_report, coco_summary
from rac3.run import Run
from rac3.stages import evaluate_coco as stage
from rac3.stages.embed import embed
from rac3.stages.evaluate import comparisons
from rac3.stages.evaluate_coco import coco_splits, evaluate_coco, shown
from rac3.stages.ingest import ingest
from rac3.stages.reference import reference
from rac3.stages.retrieve import index, retrieve

IDS = range(1, 12)
PART = 4
CAPTIONS = {id: [f"a {color} flag number {id}" for color in ("red", "blue", "dark green")] for id in IDS}


def picture(id: int) -> np.ndarray:
    return np.random.default_rng(id).integers(0, 256, (40, 40, 3), np.uint8) // 2 + np.uint8(10 * id)


class MeanColor:
    """A network of three features and two classes."""

    name = "FID"

    def __init__(self, weights: str, resolution: int) -> None:
        assert (Path(weights).name, resolution) == ("net.pth", 40)

    def embed(self, pictures: Sequence[Any]) -> Embedded:
        means = np.array([pixels_of(each).mean((0, 1)) for each in pictures], np.float32).reshape(-1, 3)
        return Embedded(means, means[:, :2] / 50)


@dataclass
class Asked:
    """What a part has asked for."""

    what: str
    keys: list[str]
    neighbors: list[list[int]]
    k: int


@pytest.fixture(scope="module")
def prepared(finished_workdir: tuple[Path, Path], experiment, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The tiny model, whose test split is a folder of COCO; ingested, embedded and retrieved."""
    folder = tmp_path_factory.mktemp("coco")
    workdir = shutil.copytree(finished_workdir[1], folder / "tiny")
    write_coco(folder / "coco", {id: picture(id) for id in IDS}, CAPTIONS)
    (folder / "net.pth").write_text("weights")
    source = Coco(str(folder / "coco" / ANNOTATIONS), str(folder / "coco" / IMAGES))
    settings = replace(experiment.evaluation, features=str(folder / "net.pth"), documents=10, num_retrieved=2)
    of_coco = replace(experiment, data=replace(experiment.data, test=source), evaluation=settings)
    opened = Run(of_coco, Workdir(workdir, "tiny"))
    for work in (ingest, embed, index, retrieve):
        work(opened)
    return opened


@pytest.fixture
def run(prepared: Run) -> Run:
    """It, with nothing evaluated."""
    for made in ("coco", "reference"):
        shutil.rmtree(prepared.workdir.path / made, ignore_errors=True)
    return prepared


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Asked]:
    """Drawing and captioning only note what they are asked; what they give depends on the key and K."""
    found: list[Asked] = []

    def images(run: Run, split: str, items: Sequence[Any], neighbors: np.ndarray, k: int) -> tuple[Any, Any]:
        found.append(Asked("images", [item.document.key for item in items], neighbors.tolist(), k))
        drawn = [255 - pixels_of(item.document.images[0]) // (k + 1) for item in items]
        return np.stack(drawn), np.arange(len(items)) / 10

    def captions(run: Run, split: str, items: Sequence[Any], neighbors: np.ndarray, k: int) -> list[str]:
        found.append(Asked("captions", [item.document.key for item in items], neighbors.tolist(), k))
        return [f"a {'red' if k else 'pale'} flag number {item.document.metadata['image_id']}" for item in items]

    monkeypatch.setattr(stage, "best_images", images)
    monkeypatch.setattr(stage, "best_captions", captions)
    monkeypatch.setattr(stage, "PART_DOCUMENTS", PART)
    monkeypatch.setattr("rac3.run.Network", MeanColor)
    return found


def test_each_direction_with_and_without_its_own_neighbors(run: Run, asked: list[Asked]) -> None:
    reference(run)
    metrics = evaluate_coco(run)
    assert {split: [*values["by_k"]] for split, values in metrics.items()} == {"test": ["0", "2"]}
    keys = [item.document.key for item in run.documents("test").many(range(10))]  # of 11: evaluation.documents
    neighbors = run.neighbors("test")[:10]
    assert (neighbors[:, 0] != neighbors[:, 1]).any()
    parts = [slice(0, 4), slice(4, 8), slice(8, 10)]
    for number, (k, part) in enumerate((k, part) for k in (0, 2) for part in parts):
        images, captions = asked[2 * number : 2 * number + 2]
        assert (images.what, captions.what) == ("images", "captions")
        assert (images.k, captions.k) == (k, k)
        assert images.keys == captions.keys == keys[part]
        assert images.neighbors == neighbors[part, 0].tolist()
        assert captions.neighbors == neighbors[part, 1].tolist()
    assert len(asked) == 12


def test_figures_are_over_all_parts_and_all_references(run: Run, asked: list[Asked]) -> None:
    reference(run)
    metrics = evaluate_coco(run)["test"]
    assert metrics["documents"] == 10
    truth = [prepare_image(picture(id), 40) for id in [*IDS][:10]]
    real = np.stack([each.mean((0, 1)) for each in truth]).astype(np.float32)
    for k, word in (("0", "pale"), ("2", "red")):
        found = metrics["by_k"][k]
        drawn = np.stack([(255 - each // (int(k) + 1)).mean((0, 1)) for each in truth]).astype(np.float32)
        assert found["pictures"]["FID"]["images"] == found["pictures"]["FID"]["real_images"] == 10
        assert found["pictures"]["FID"]["frechet"]["value"] == pytest.approx(frechet_of(drawn, real), rel=1e-4)
        assert found["pictures"]["FID"]["inception_score"]["value"] > 1
        assert found["pictures"]["cmmd"]["value"] > 0
        similarity = np.mean([0, 0.1, 0.2, 0.3, 0, 0.1, 0.2, 0.3, 0, 0.1])
        assert found["pictures"]["clipscore"]["value"] == pytest.approx(2.5 * similarity)
        captions = [f"a {word} flag number {id}" for id in [*IDS][:10]]
        wanted = caption_metrics(captions, [CAPTIONS[id] for id in [*IDS][:10]])
        assert {name: found["captions"][name] for name in wanted} == wanted
        assert found["captions"]["captions"] == 10


def test_what_was_drawn_before_a_kill_is_not_drawn_again(
    run: Run, asked: list[Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference(run)
    captions = stage.best_captions

    def killed(*arguments: Any) -> list[str]:
        if len(asked) > 6:
            raise KeyboardInterrupt
        return captions(*arguments)

    monkeypatch.setattr(stage, "best_captions", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate_coco(run)
    assert len(asked) == 7  # three parts, and the images of the fourth
    monkeypatch.setattr(stage, "best_captions", captions)
    metrics = evaluate_coco(run)
    assert [each.k for each in asked[7:]] == [2] * 6
    assert len(asked) == 7 + 6
    assert evaluate_coco(run) == metrics
    assert len(asked) == 13  # made, and read


def test_cm3_is_asked_without_documents_alone(run: Run, asked: list[Asked]) -> None:
    vanilla = run.experiment.vanilla()
    cm3 = run.variant(vanilla, vanilla)
    reference(cm3)
    assert list(evaluate_coco(cm3)["test"]["by_k"]) == ["0"]
    assert {each.k for each in asked} == {0}
    assert {number for each in asked for row in each.neighbors for number in row} == {-1}


def test_without_a_network_captions_are_scored_still(run: Run, asked: list[Asked]) -> None:
    plain = run.variant(
        replace(run.experiment, evaluation=replace(run.experiment.evaluation, features="")), run.trained
    )
    reference(plain)
    found = evaluate_coco(plain)["test"]["by_k"]["2"]
    assert set(found["pictures"]) == {"clipscore"}
    assert found["captions"]["cider_d"]["value"] > 1


def test_the_report_has_a_column_for_each_model_and_k(run: Run, asked: list[Asked]) -> None:
    models = {name: each for name, each in comparisons(run).items() if name != "ra_cm3_random"}
    for each in models.values():
        reference(each)
    metrics = {name: evaluate_coco(each) for name, each in models.items()}
    text = coco_summary(metrics)
    assert "RA-CM3 with 2 retrieved documents: FID " in text
    assert "RA-CM3 without documents: FID " in text
    page = Page(coco_report(run, models, metrics).read_text(encoding="utf-8"))
    table = page.tables[0]
    without = [f"{name} without documents" for name in ("RA-CM3", "CM3 at its best", "CM3")]
    assert table[0] == ["", "RA-CM3 with 2 retrieved documents", *without]
    rows = {row[0]: row[1:] for row in table[1:]}
    values = metrics["ra_cm3"]["test"]["by_k"]
    for column, k in enumerate(("2", "0")):
        fid = values[k]["pictures"]["FID"]["frechet"]
        assert rows["FID"][column] == f"{fid['value']:,.2f} ± {(fid['high'] - fid['low']) / 2:,.2f}"
        assert rows["CIDEr-D"][column].startswith(f"{values[k]['captions']['cider_d']['value']:.3f} ±")
    assert "SPICE" not in rows
    assert rows["CIDEr-D"][0] != rows["CIDEr-D"][1]
    assert "a red flag number 1" in page.text
    pictures, made = shown(models["ra_cm3"], "test", 2)
    assert (len(pictures), len(made)) == (PART, PART)
    assert (pictures[0] == 255 - picture(1) // 3).all()


def test_another_source_is_refused(experiment, store: Workdir) -> None:
    said = r"no held-out source is MS-COCO \(data\.validation=World, data\.test=World\); use test=Coco\("
    with pytest.raises(InputError, match=said):
        coco_splits(Run(experiment, store))


def test_the_recipe_depends_on_coco_alone(run: Run) -> None:
    recipe = recipes.coco(run.experiment, run.trained)
    assert set(recipe.inputs) == {"train", "clip", "documents test", "neighbors test", "reference test"}
    assert "entity_field" not in recipe.config
    other = replace(run.experiment, evaluation=replace(run.experiment.evaluation, caption_samples=7))
    assert recipes.coco(other, run.trained).fingerprint != recipe.fingerprint
