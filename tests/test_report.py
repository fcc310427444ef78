"""The report of a small run: its numbers are the artifacts', its page stands alone and trusts no caption."""

import base64
import io
import json
import shutil
import xml.etree.ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from rac3.artifacts import Workdir
from rac3.config import InputError, load_config_module
from rac3.documents.document import prepare_image
from rac3.experiment import Experiment
from rac3.report import collect, report, summary
from rac3.report_page import Captioned, Content, Mark, Picture, Strip, page
from rac3.report_table import margin, verdict
from rac3.retrieval.controls import NoRetriever
from rac3.stages import recipes
from rac3.stages.embed import open_documents
from rac3.training.metrics import read_metrics

MODELS = ["ra_cm3", "cm3", "ra_cm3_random"]
HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>&amp;"


class Page(HTMLParser):
    """The elements of a page, as (tag, attributes), and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def images(self, kind: str) -> list[tuple[str, bytes]]:
        """(alternative text, data) of the images of a media type."""
        prefix = f"data:{kind};base64,"
        found = [(str(a["alt"]), str(a["src"])) for tag, a in self.elements if tag == "img"]
        return [(alt, base64.b64decode(src.removeprefix(prefix))) for alt, src in found if src.startswith(prefix)]


@pytest.fixture(scope="module")
def experiment(finished_workdir: tuple[Path, Path]) -> Experiment:
    return load_config_module(str(finished_workdir[0])).get_config()


@pytest.fixture(scope="module")
def workdir(
    finished_workdir: tuple[Path, Path], experiment: Experiment, tmp_path_factory: pytest.TempPathFactory
) -> Workdir:
    """A copy, to write into."""
    folder = tmp_path_factory.mktemp("report") / "run"
    shutil.copytree(finished_workdir[1], folder, ignore=shutil.ignore_patterns("checkpoints", "report"))
    return Workdir(folder, experiment.name)


@pytest.fixture(scope="module")
def path(experiment: Experiment, workdir: Workdir) -> Path:
    return report(experiment, workdir)


@pytest.fixture(scope="module")
def written(path: Path) -> tuple[str, str]:
    """The page and `metrics.json`, before another test writes a report of its own."""
    return path.read_text(), path.with_name("metrics.json").read_text()


@pytest.fixture
def shown(written: tuple[str, str]) -> Page:
    return Page(written[0])


@pytest.fixture
def metrics(written: tuple[str, str]) -> dict[str, Any]:
    return json.loads(written[1])


def test_it_writes_two_files(path: Path, workdir: Workdir):
    assert path == workdir.path / "report" / "index.html"
    assert {file.name for file in path.parent.iterdir()} == {"index.html", "metrics.json"}


def test_metrics_have_the_keys_that_people_script_against(metrics: dict[str, Any], experiment: Experiment):
    others = ["retrieval", "encoders", "documents", "evaluation", "stages", "versions"]
    assert list(metrics) == MODELS + others
    for name in MODELS:
        model = metrics[name]
        most = 0 if name == "cm3" else experiment.evaluation.num_retrieved
        for split in ("validation", "test"):
            for modality in ("image", "text"):
                by_k = model["perplexity_by_k"][split][modality]
                assert list(by_k) == [str(k) for k in range(most + 1)]
                assert all(isinstance(value, float) for value in by_k.values())
        assert model["perplexity"] == {
            modality: model["perplexity_by_k"]["test"][modality][str(most)] for modality in ("image", "text")
        }
        for key in ("entity_accuracy", "name_accuracy", "clip_score"):
            assert set(model[key]) == {"seen", "unseen"}
            assert all(isinstance(value, float) for value in model[key].values())
        assert isinstance(model["parameters"], int)
        assert model["steps"] == experiment.training.steps
    assert set(metrics["retrieval"]) == {"recall_at_2", "validation"}
    assert set(metrics["retrieval"]["recall_at_2"]) == {"text", "image"}
    assert set(metrics["encoders"]) == {"validation", "test"}
    assert metrics["documents"]["test"]["documents"] == metrics["evaluation"]["documents"]["test"] == 4
    stages = ["text", "vqgan", "clip", "ingest", "embed", "index", "retrieve", "train ra_cm3", "train cm3", "evaluate"]
    assert list(metrics["stages"]) == stages
    assert {"python", "jax"} <= set(metrics["versions"])


def test_metrics_are_those_of_the_artifacts(metrics: dict[str, Any], experiment: Experiment, workdir: Workdir):
    folder = workdir.require(recipes.evaluation(experiment, experiment), "").folder
    evaluated = json.loads((folder / "metrics.json").read_text())
    assert metrics["ra_cm3"]["perplexity"] == evaluated["test"]["perplexity"]
    assert metrics["ra_cm3"]["entity_accuracy"]["seen"] == evaluated["validation"]["entity_accuracy"]
    assert metrics["ra_cm3"]["clip_score"]["unseen"] == evaluated["test"]["clip_score"]
    manifests = [json.loads(file.read_text()) for file in workdir.path.glob("*/*/manifest.json")]
    made = {"ingest": ["documents"], "embed": ["embeddings", "queries"], "evaluate": ["evaluation"]}
    for name, stages in made.items():
        spent = sum(manifest["seconds"] for manifest in manifests if manifest["stage"] in stages)
        assert metrics["stages"][name] == pytest.approx(spent, abs=0.01)


def test_recall_is_that_of_the_neighbors(metrics: dict[str, Any], experiment: Experiment, workdir: Workdir):
    memory = [
        item.document.metadata["entity"]
        for split in ("train", "memory")
        for item in map(open_documents(experiment, workdir, split).__getitem__, range(36 if split == "train" else 12))
    ]
    folder = workdir.require(recipes.evaluation(experiment, experiment), "").folder
    rows = json.loads((folder / "test.json").read_text())  # all 4 test documents
    for number, part in enumerate(("text", "image")):
        hits = [row["text"].split()[0] in [memory[i] for i in row["neighbors"][number][:2]] for row in rows]
        assert metrics["retrieval"]["recall_at_2"][part] == np.mean(hits)


def test_the_page_needs_nothing_but_itself(shown: Page, written: tuple[str, str]):
    for tag, attributes in shown.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        assert not [name for name in attributes if name.startswith("on")]
        assert str(attributes.get("src", "data:")).startswith("data:")
        assert str(attributes.get("href", "#")).startswith("#")
        if tag == "img":
            assert attributes["alt"]
    assert "url(" not in written[0]
    assert "@import" not in written[0]
    anchors = {attributes["href"] for tag, attributes in shown.elements if tag == "a"}
    assert anchors == {f"#{attributes['id']}" for tag, attributes in shown.elements if tag == "section"}


def test_the_page_has_the_plots(shown: Page, experiment: Experiment, workdir: Workdir):
    plots = {alt.split(", ")[0]: (alt, data) for alt, data in shown.images("image/svg+xml")}
    perplexities = [
        f"{modality} perplexity {split}" for modality in ("Image", "Text") for split in ("test", "validation")
    ]
    losses = ["Loss on image tokens", "Loss on text tokens"]
    assert sorted(plots) == sorted([*perplexities, *losses, "Fitting the VQGAN", "Fitting CLIP"])
    steps = read_metrics(workdir.require(recipes.train(experiment), "").folder)
    ends = [steps[number]["loss/main/text"] for number in (0, -1)]
    assert "RA-CM3, main {:.3g} to {:.3g}".format(*ends) in plots["Loss on text tokens"][0]
    for _, data in plots.values():
        root = xml.etree.ElementTree.fromstring(data)
        links = [value for node in root.iter() for name, value in node.attrib.items() if name.endswith("href")]
        assert all(link.startswith("#") for link in links)


def test_the_pictures_are_those_of_the_artifacts(shown: Page, experiment: Experiment, workdir: Workdir):
    pictures = shown.images("image/png")
    drawn = [np.asarray(PIL.Image.open(io.BytesIO(data))) for alt, data in pictures if alt == "RA-CM3"]
    folder = workdir.require(recipes.evaluation(experiment, experiment), "").folder
    np.testing.assert_array_equal(drawn, np.load(folder / "test.npy"))
    truths = [np.asarray(PIL.Image.open(io.BytesIO(data))) for alt, data in pictures if alt == "truth"]
    documents = open_documents(experiment, workdir, "test")
    np.testing.assert_array_equal(
        truths, [prepare_image(documents[i].document.images[0].pixels(), 40) for i in range(4)]
    )
    for row in json.loads((folder / "test.json").read_text()):
        assert row["text"] in shown.text
        for key in row["retrieved"]["text"]:
            split, number = key.split("/")
            texts = [item.document.text for item in open_documents(experiment, workdir, split).many(range(12))]
            if int(number) < len(texts):
                assert any(alt.startswith("found") and alt.endswith(texts[int(number)]) for alt, _ in pictures)


def test_captions_are_escaped(metrics: dict[str, Any]):
    pixels = np.zeros((8, 8, 3), np.uint8)
    picture = Picture(HOSTILE, pixels, HOSTILE, Mark(False, HOSTILE))
    content = Content(
        name=HOSTILE,
        metrics=metrics | {"stages": {HOSTILE: 1.0}},
        facts=[(HOSTILE, HOSTILE)],
        training={},
        fitting={},
        split="test",
        strips=[Strip(HOSTILE, [picture])],
        captions=[Captioned(picture, {HOSTILE: (HOSTILE, None)})],
        reconstructions=[(picture, picture)],
    )
    shown = Page(page(content))
    assert "script" not in {tag for tag, _ in shown.elements}
    assert all(str(attributes["src"]).startswith("data:") for tag, attributes in shown.elements if tag == "img")
    assert not [name for _, attributes in shown.elements for name in attributes if name.startswith("on")]
    assert shown.text.count(HOSTILE) >= 10


def test_a_vanilla_cm3_alone(experiment: Experiment, workdir: Workdir):
    alone = replace(experiment, retriever=NoRetriever())
    shown = Page(report(alone, workdir).read_text())
    metrics = json.loads((workdir.path / "report" / "metrics.json").read_text())
    assert "ra_cm3" not in metrics
    assert metrics["retrieval"] == {"recall_at_2": None, "validation": {"recall_at_2": None}}
    assert "none to compare it with" in shown.text
    assert not [alt for alt, _ in shown.images("image/png") if alt.startswith("found")]


def test_what_is_missing_is_named_with_its_command(experiment: Experiment, workdir: Workdir):
    other = replace(experiment, evaluation=replace(experiment.evaluation, image_samples=3))
    with pytest.raises(InputError, match="run `rac3 evaluate`"):
        collect(other, workdir)


def test_summary_shows_models_as_columns_and_skips_what_has_no_meaning(metrics: dict[str, Any]):
    lines = summary(metrics).splitlines()
    assert lines[0].split("  ")[-1].strip() == "RA-CM3, random documents"
    assert f"{metrics['cm3']['perplexity']['image']:,.2f}" in lines[1]
    assert lines[-1].startswith("retrieval recall at 2, validation: ")
    for name in MODELS:
        metrics[name]["entity_accuracy"] = {"seen": None, "unseen": None}
    assert "entity accuracy" not in summary(metrics)


def test_the_verdict_follows_the_numbers(metrics: dict[str, Any]):
    values = {"ra_cm3": (5.0, 9.0, 0.5), "cm3": (9.0, 8.0, 0.25), "ra_cm3_random": (10.0, 9.0, 0.0)}
    for name, (image, text, unseen) in values.items():
        metrics[name]["perplexity"] = {"image": image, "text": text}
        metrics[name]["entity_accuracy"] = {"seen": 0.5, "unseen": unseen}
        metrics[name]["name_accuracy"] = {"seen": None, "unseen": None}
        metrics[name]["clip_score"]["unseen"] = 0.3
    metrics["evaluation"]["documents"] = {"validation": 80, "test": 80}
    assert verdict(metrics) == (
        "Against CM3 of the same size and as many steps, RA-CM3 is better in image perplexity and entity accuracy "
        "(unseen); worse in text perplexity; not clearly different in entity accuracy (seen) and CLIP score. "
        "With random documents in place of retrieved ones, its image perplexity is 10.00, not 5.00."
    )
    metrics["evaluation"]["documents"]["test"] = 4  # too few to tell 50% from 25%
    assert "better in image perplexity;" in verdict(metrics)


def test_the_margin_holds_the_true_share_19_times_in_20():
    rng = np.random.default_rng(0)
    for share in (0.02, 0.3, 0.9):
        drawn = rng.binomial(80, share, 2000) / 80
        held = np.mean([abs(value - share) <= margin(value, 80) for value in drawn])
        assert held > 0.93
