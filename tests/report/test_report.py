"""The report of a small run: its numbers are the artifacts', its page stands alone and trusts no caption."""

import io
import json
import re
import shutil
import xml.etree.ElementTree
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
import PIL.Image
import pytest
from html_page import Page

import rac3.report.experiment
import rac3.report.page
from rac3 import recipes
from rac3.artifacts.arrays import Vectors, read_array
from rac3.artifacts.workdir import Workdir
from rac3.config import InputError, load_config_module
from rac3.documents.document import Document, prepare_image
from rac3.documents.world import draw_emblem
from rac3.evaluation.captions import caption_metrics
from rac3.experiment import Experiment
from rac3.report.experiment import collect, report, spent, summary
from rac3.report.page import Captioned, Content, Mark, Picture, Strip, page
from rac3.report.plots import Line
from rac3.report.samples import Samples
from rac3.report.table import margin, verdict
from rac3.retrieval.baselines import NoRetriever, Random
from rac3.run import Run, initializer
from rac3.stages.evaluate import comparisons
from rac3.stages.evaluate_retrieval import entity_recall
from rac3.tokens.vocabulary import Vocabulary
from rac3.training.metrics import read_metrics

MODELS = ["ra_cm3", "cm3_best", "cm3", "ra_cm3_random"]
ACCURACIES = ("entity_accuracy", "joint_accuracy", "name_accuracy", "joint_name_accuracy")
HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>&amp;"


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
def run(experiment: Experiment, workdir: Workdir) -> Run:
    return Run(experiment, workdir)


@pytest.fixture(scope="module")
def path(run: Run) -> Path:
    return report(run)


@pytest.fixture(scope="module")
def written(path: Path) -> tuple[str, str]:
    """The page and `metrics.json`, before another test writes a report of its own."""
    return path.read_text(encoding="utf-8"), path.with_name("metrics.json").read_text()


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
    others = ["retrieval", "baselines", "encoders", "documents", "evaluation", "stages", "versions"]
    assert list(metrics) == MODELS + others
    for name in MODELS:
        model = metrics[name]
        most = 0 if name.startswith("cm3") else experiment.evaluation.num_retrieved
        for split in ("validation", "test"):
            for modality in ("image", "text"):
                by_k = model["perplexity_by_k"][split][modality]
                assert list(by_k) == [str(k) for k in range(most + 1)]
                assert all(isinstance(value, float) for value in by_k.values())
        assert model["perplexity"] == {
            modality: model["perplexity_by_k"]["test"][modality][str(most)] for modality in ("image", "text")
        }
        for key in (*ACCURACIES, "clip_score"):
            assert set(model[key]) == {"seen", "unseen"}
            assert all(isinstance(value, float) for value in model[key].values())
        assert isinstance(model["parameters"], int)
        assert model["steps"] in ((3, 6) if name == "cm3_best" else (6,))
    assert set(metrics["retrieval"]) == {"recall_at_2", "validation"}
    assert set(metrics["retrieval"]["recall_at_2"]) == {"text", "image"}
    assert list(metrics["baselines"]) == ["copied", "mean", "reconstructed", "original"]
    for values in metrics["baselines"].values():
        assert set(values) == {*ACCURACIES, "captions", "pictures"}
        assert set(values["captions"]) == set(values["pictures"]) == {"validation", "test"}
    assert metrics["evaluation"]["judged"] == ["entity", "ground", "weather", "frame"]
    assert set(metrics["encoders"]) == {"validation", "test"}
    assert metrics["documents"]["test"]["documents"] == metrics["evaluation"]["documents"]["test"] == 4
    stages = ["text", "vqgan", "clip", "ingest", "embed", "index", "retrieve", "train ra_cm3", "train cm3", "evaluate"]
    assert list(metrics["stages"]) == stages
    assert {"python", "jax"} <= set(metrics["versions"])


def test_metrics_stand_under_their_model_and_split(experiment: Experiment, run: Run, monkeypatch: pytest.MonkeyPatch):
    """Evaluations of which every number is another one: 1xx of validation, 2xx of test, x1x of RA-CM3, ..."""
    models = [(each.experiment, each.trained, each.step) for each in comparisons(run).values()]

    def evaluated(compared: Run) -> dict[str, Any]:
        number = 10 * (1 + models.index((compared.experiment, compared.trained, compared.step)))
        return {
            split: {
                "documents": hundreds,
                "with_entity": hundreds - 1,
                "perplexity": {"image": hundreds + number + 1.0, "text": hundreds + number + 2.0},
                "perplexity_by_k": {"image": {"0": hundreds + number + 3.0}, "text": {"0": hundreds + number + 4.0}},
                "clip_score": hundreds + number + 5.0,
                "fewer_than_k": {"text": {"0": hundreds + number}},
                "captions": {"captions": hundreds + number},
                "pictures": {"cmmd": hundreds + number},
                "entity_accuracy": hundreds + number + 6.0,
                "name_accuracy": hundreds + number + 7.0,
                "joint_accuracy": hundreds + number + 7.5,
                "joint_name_accuracy": None,
                "baselines": {
                    "copied": {
                        "entity_accuracy": hundreds + number + 8.0,
                        "name_accuracy": hundreds + number + 9.0,
                        "captions": {"cider_d": hundreds + number + 9.2},
                        "pictures": {"cmmd": hundreds + number + 9.5},
                    }
                },
            }
            for split, hundreds in (("validation", 100), ("test", 200))
        }

    monkeypatch.setattr(rac3.report.experiment, "evaluate", evaluated)
    monkeypatch.setattr(rac3.report.experiment, "evaluate_encoders", lambda *_: {})
    found = collect(run)
    for name, number in zip(MODELS, (10, 20, 30, 40), strict=True):
        assert found[name] == {
            "perplexity": {"image": 201 + number, "text": 202 + number},
            "perplexity_by_k": {
                "validation": {"image": {"0": 103 + number}, "text": {"0": 104 + number}},
                "test": {"image": {"0": 203 + number}, "text": {"0": 204 + number}},
            },
            "fewer_than_k": {
                "validation": {"text": {"0": 100 + number}},
                "test": {"text": {"0": 200 + number}},
            },
            "captions": {"validation": {"captions": 100 + number}, "test": {"captions": 200 + number}},
            "pictures": {"validation": {"cmmd": 100 + number}, "test": {"cmmd": 200 + number}},
            "clip_score": {"seen": 105 + number, "unseen": 205 + number},
            "entity_accuracy": {"seen": 106 + number, "unseen": 206 + number},
            "name_accuracy": {"seen": 107 + number, "unseen": 207 + number},
            "joint_accuracy": {"seen": 107.5 + number, "unseen": 207.5 + number},
            "joint_name_accuracy": {"seen": None, "unseen": None},
            "parameters": found["ra_cm3"]["parameters"],
            "steps": models[1][2] if name == "cm3_best" else 6,
        }
    nothing = {"seen": None, "unseen": None}
    assert found["baselines"]["copied"] == {  # of what the experiment's own model retrieves
        "entity_accuracy": {"seen": 118, "unseen": 218},
        "name_accuracy": {"seen": 119, "unseen": 219},
        "joint_accuracy": nothing,
        "joint_name_accuracy": nothing,
        "captions": {"validation": {"cider_d": 119.2}, "test": {"cider_d": 219.2}},
        "pictures": {"validation": {"cmmd": 119.5}, "test": {"cmmd": 219.5}},
    }
    assert found["evaluation"] == {
        "num_retrieved": 2,
        "documents": {"validation": 100, "test": 200},
        "entity_field": "entity",
        "judged": ["entity", "ground", "weather", "frame"],
        "with_entity": {"validation": 99, "test": 199},
    }
    model = experiment.model.build(Vocabulary(300, 16).padded_size, 192, 256)
    params = jax.eval_shape(initializer(model), jax.random.key(0))
    assert found["ra_cm3"]["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_another_retriever_is_reported_with_the_model_that_was_trained(
    experiment: Experiment, workdir: Workdir, monkeypatch: pytest.MonkeyPatch
):
    random = replace(experiment, retriever=Random(num_neighbors=16))
    seen = []

    def evaluated(compared: Run) -> dict[str, Any]:
        seen.append((compared.experiment, compared.trained))
        return {"test": {"documents": 4, "perplexity_by_k": {}}}

    monkeypatch.setattr(rac3.report.experiment, "evaluate", evaluated)
    monkeypatch.setattr(rac3.report.experiment, "evaluate_encoders", lambda *_: {})
    found = collect(Run(random, workdir, experiment))
    assert list(found)[:3] == ["ra_cm3_random", "cm3_best", "cm3"]
    assert seen == [(random, experiment), *[(experiment.vanilla(), experiment.vanilla())] * 2]
    assert found["retrieval"]["recall_at_2"] == entity_recall(Run(random, workdir), "test", 2)


def test_facts_are_of_each_model(run: Run, made_up: dict[str, Any]):
    made_up["cm3"] |= {"parameters": 12_345, "steps": 7}
    made_up["ra_cm3_random"] |= {"parameters": 3}
    facts = rac3.report.experiment._facts(run, made_up | {"versions": {"jax": "9"}})
    named = dict(facts)
    assert len(named) == len(facts)
    assert named["RA-CM3"] == "10 parameters, 5 steps"
    assert named["CM3"] == "12,345 parameters, 7 steps"
    assert "RA-CM3, random documents" not in named  # the same model again
    assert (named["seed"], named["retriever"], named["versions"]) == ("0", "Scann, 2 documents in context", "jax 9")
    assert named["samples"] == "2 per picture drawn, 2 per caption written"


def folder_of(run: Run) -> Path:
    """Of its evaluation."""
    return run.workdir.require(recipes.evaluation(run.experiment, run.trained, run.step)).folder


def test_metrics_are_those_of_the_pictures_and_captions(metrics: dict[str, Any], experiment: Experiment, run: Run):
    """Accuracies and CLIP scores computed again from what was generated."""
    encoder, entities = run.encoder, experiment.data.train.entities()
    emblems = np.stack([draw_emblem(entity) for entity in entities]).astype(float)
    for name, compared in comparisons(run).items():
        folder = folder_of(compared)
        for split, which in (("validation", "seen"), ("test", "unseen")):
            documents = [item.document for item in run.documents(split).many(range(4))]
            wanted = [document.text.split()[0] for document in documents]
            pictures = np.load(folder / f"{split}.npy")
            captions = [row["caption"] for row in json.loads((folder / f"{split}.json").read_text())]
            middle = pictures[:, None, 8:32, 8:32]
            nearest = [entities[i].name for i in np.abs(middle - emblems).mean((2, 3, 4)).argmin(1)]
            assert metrics[name]["entity_accuracy"][which] == np.mean(
                [a == b for a, b in zip(nearest, wanted, strict=True)]
            )
            named = [
                word in re.findall(r"\w+", caption.lower()) for word, caption in zip(wanted, captions, strict=True)
            ]
            assert metrics[name]["name_accuracy"][which] == np.mean(named)
            scores = metrics[name]["captions"][split]
            assert scores == caption_metrics(captions, [[document.text] for document in documents])
            texts = encoder.embed_texts([document.text for document in documents])
            score = (texts * encoder.embed_images(list(pictures))).sum(1).mean()
            assert metrics[name]["clip_score"][which] == pytest.approx(score, abs=1e-5)


def test_time_that_artifacts_share_counts_once():
    def made(*spans: tuple[float, float]) -> list[dict[str, float]]:
        return [{"started": start, "seconds": end - start} for start, end in spans]

    assert spent(made((5.0, 7.0), (0.0, 2.0), (1.0, 4.0), (1.5, 3.0))) == 6.0  # 0 to 4 and 5 to 7
    assert spent(made((0.0, 2.0), (2.0, 3.0))) == 3.0
    assert spent(made((0.0, 10.0), (2.0, 3.0), (4.0, 5.0))) == 10.0
    assert spent([{"seconds": 4.0}, *made((0.0, 2.0), (1.0, 3.0)), {"seconds": 1.5}]) == 8.5  # of earlier versions


def test_seconds_are_those_of_the_artifacts(metrics: dict[str, Any], workdir: Workdir):
    manifests = [json.loads(file.read_text()) for file in workdir.path.glob("*/*/manifest.json")]
    made = {"ingest": ["documents"], "embed": ["embeddings", "queries"], "evaluate": ["evaluation"]}
    made |= {stage: [stage] for stage in ("text", "vqgan", "clip", "index")} | {"retrieve": ["neighbors"]}
    made["evaluate"] += ["best"]
    for name, stages in made.items():
        spans = [(m["started"], m["started"] + m["seconds"]) for m in manifests if m["stage"] in stages]
        marks = sorted({mark for span in spans for mark in span})
        busy = [a for a in pairwise(marks) if any(s <= a[0] and a[1] <= e for s, e in spans)]
        assert metrics["stages"][name] == pytest.approx(sum(end - start for start, end in busy), abs=0.02)
    trained = {("ra_cm3" if "neighbors" in m["inputs"] else "cm3"): m for m in manifests if m["stage"] == "train"}
    for name, manifest in trained.items():
        assert metrics["stages"][f"train {name}"] == pytest.approx(manifest["seconds"], abs=0.01)


def test_recall_is_that_of_the_neighbors(metrics: dict[str, Any], run: Run):
    memory = [
        item.document.metadata["entity"]
        for split in ("train", "memory")
        for item in map(run.documents(split).__getitem__, range(36 if split == "train" else 12))
    ]
    folder = folder_of(run)
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
    steps = read_metrics(workdir.require(recipes.train(experiment)).folder)
    ends = [steps[number]["loss/main/text"] for number in (0, -1)]
    assert "RA-CM3, main {:.3g} to {:.3g}".format(*ends) in plots["Loss on text tokens"][0]
    for _, data in plots.values():
        root = xml.etree.ElementTree.fromstring(data)
        links = [value for node in root.iter() for name, value in node.attrib.items() if name.endswith("href")]
        assert all(link.startswith("#") for link in links)


def test_the_pictures_are_those_of_the_artifacts(shown: Page, run: Run):
    pictures = shown.images("image/png")
    drawn = [np.asarray(PIL.Image.open(io.BytesIO(data))) for alt, data in pictures if alt == "RA-CM3"]
    folder = folder_of(run)
    np.testing.assert_array_equal(drawn, np.load(folder / "test.npy"))
    truths = [np.asarray(PIL.Image.open(io.BytesIO(data))) for alt, data in pictures if alt == "truth"]
    documents = run.documents("test")
    np.testing.assert_array_equal(
        truths, [prepare_image(documents[i].document.images[0].pixels(), 40) for i in range(4)]
    )
    for row in json.loads((folder / "test.json").read_text()):
        assert row["text"] in shown.text
        for key in row["retrieved"]["text"]:
            split, number = key.split("/")
            texts = [item.document.text for item in run.documents(split).many(range(12))]
            if int(number) < len(texts):
                assert any(alt.startswith("found") and alt.endswith(texts[int(number)]) for alt, _ in pictures)


MADE_UP = {
    # perplexity of images and texts; accuracy of entities seen and unseen, of names; CLIP score
    "ra_cm3": (5.004, 9.0, 0.5, 0.25, 0.75, 0.3123),
    "cm3_best": (8.0, 8.5, 0.25, 0.0, 0.05, 0.1),
    "cm3": (9.0, 8.0, 0.5, 0.125, None, 0.2),
    "ra_cm3_random": (1234.5, 9.5, 0.0, 0.25, 0.5, 0.25),
}


@pytest.fixture
def made_up() -> dict[str, Any]:
    """Metrics in which hardly a number stands twice."""
    metrics: dict[str, Any] = {}
    for place, (name, (image, text, seen, unseen, named, clip)) in enumerate(MADE_UP.items()):
        by_k = {
            split: {
                modality: {str(k): hundreds + tens + 0.1 * place + k for k in range(1 if "ra" not in name else 3)}
                for modality, tens in (("image", 10), ("text", 20))
            }
            for split, hundreds in (("validation", 100), ("test", 200))
        }
        metrics[name] = {
            "perplexity": {"image": image, "text": text},
            "perplexity_by_k": by_k,
            "captions": {"test": {"cider_d": {"value": 1 - place / 4, "low": 0.1 * place, "high": 0.5 + 0.1 * place}}},
            "pictures": {
                "test": {
                    "FID": {"frechet": {"value": 20.0 + place, "low": 15.0 + place, "high": 25.0 + place}, "kid": None},
                    "FD (EfficientNet-Lite0)": {"kid": {"value": 0.5 - place / 10, "low": -0.1, "high": 0.7}},
                }
            },
            "entity_accuracy": {"seen": seen, "unseen": unseen},
            "name_accuracy": {"seen": 0.9, "unseen": named},
            "clip_score": {"seen": 0.9, "unseen": clip},
            "parameters": 10,
            "steps": 5,
        }
    recalls = {"recall_at_2": {"text": 0.5, "image": 0.25}, "validation": {"recall_at_2": {"text": 1.0, "image": 0.75}}}
    encoders = {
        split: {
            "vqgan": {
                "psnr": 20 + place,
                "ssim": 0.5 + place / 10,
                "codebook_use": 0.75 + place / 10,
                "codebook_perplexity": 9 + place,
            },
            "clip": {"pairs": 7 + place}
            | {f"text_to_image_recall_at_{k}": k / 100 + place / 2 for k in (1, 5, 10)}
            | {f"image_to_text_recall_at_{k}": k / 50 + place / 2 for k in (1, 5, 10)},
        }
        for place, split in enumerate(("validation", "test"))
    }
    counts = {
        split: {
            "documents": 1000 + place,
            "tokens": 50_000 + place,
            "filtered": {"small": 3 + place},
            "rejects": {} if place else {"no image": 2},
            "texts_cut": 8 + place,
        }
        for place, split in enumerate(("train", "test"))
    }
    return metrics | {
        "retrieval": recalls,
        "encoders": encoders,
        "documents": counts,
        "evaluation": {
            "num_retrieved": 2,
            "documents": {"validation": 80, "test": 20},
            "entity_field": "entity",
            "judged": ["entity", "place"],
            "with_entity": {"validation": 80, "test": 20},
        },
        "baselines": {},
        "stages": {"ingest": 2.0, "train ra_cm3": 8.0},
    }


def content_of(metrics: dict[str, Any], **shown: Any) -> Content:
    """A page of these metrics, and of nothing that is not `shown`."""
    nothing: dict[str, Any] = dict(facts=[], training={}, fitting={}, split="test", strips=[], captions=[])
    return Content(**{"name": "made up", "metrics": metrics, "reconstructions": [], **nothing, **shown})


def test_the_table_has_each_model_in_its_column(made_up: dict[str, Any]):
    """The margins are 2 sqrt(p (1 - p) / (n + 4)), with p = (hits + 2) / (n + 4), of 80 or 20 documents."""
    shown = Page(page(content_of(made_up)))
    assert shown.tables[0] == [
        ["", "RA-CM3", "CM3 at its best", "CM3", "RA-CM3, random documents"],
        ["image perplexity ↓", "5.00", "8.00", "9.00", "1,234.50"],
        ["text perplexity ↓", "9.00", "8.50", "8.00", "9.50"],
        ["entity accuracy (seen) ↑", "50.0% ± 11", "25.0% ± 10", "50.0% ± 11", "0.0% ± 3"],
        ["entity accuracy (unseen) ↑", "25.0% ± 19", "0.0% ± 11", "12.5% ± 16", "25.0% ± 19"],
        ["name accuracy (unseen) ↑", "75.0% ± 19", "5.0% ± 14", "none", "50.0% ± 20"],
        ["CIDEr-D (unseen) ↑", "1.000 ± 0.250", "0.750 ± 0.250", "0.500 ± 0.250", "0.250 ± 0.250"],
        ["FID (unseen) ↓", "20.00 ± 5.00", "21.00 ± 5.00", "22.00 ± 5.00", "23.00 ± 5.00"],
        [
            "KID, EfficientNet-Lite0 (unseen) ↓",
            "0.5000 ± 0.4000",
            "0.4000 ± 0.4000",
            "0.3000 ± 0.4000",
            "0.2000 ± 0.4000",
        ],
        ["CLIP score ↑", "0.312", "0.100", "0.200", "0.250"],
    ]
    assert shown.bold == [
        "5.00",
        "8.00",
        "75.0% ± 19",
        "1.000 ± 0.250",
        "20.00 ± 5.00",
        "0.2000 ± 0.4000",
        "0.312",
    ]  # none where two are equal
    for name in MADE_UP:
        made_up[name]["clip_score"]["unseen"] = None
    del made_up["cm3"], made_up["cm3_best"], made_up["ra_cm3_random"]
    alone = Page(page(content_of(made_up)))
    assert alone.bold == []
    assert [row[0] for row in alone.tables[0][1:]] == [row[0] for row in shown.tables[0][1:-1]]


def test_other_tables_have_each_split_in_its_place(made_up: dict[str, Any]):
    shown = Page(page(content_of(made_up)))
    assert shown.tables[1] == [
        ["", "query: text", "query: image"],
        ["recall at 2, test", "50.0%", "25.0%"],
        ["recall at 2, validation", "100.0%", "75.0%"],
    ]
    assert shown.tables[2] == [
        ["", "validation", "test"],
        ["VQGAN: PSNR, dB", "20.0", "21.0"],
        ["VQGAN: SSIM", "0.500", "0.600"],
        ["VQGAN: codes used", "75.0%", "85.0%"],
        ["VQGAN: codebook perplexity", "9.0", "10.0"],
        ["CLIP: own image of a text, recall at 1", "1.0%", "51.0%"],
        ["CLIP: own image of a text, recall at 5", "5.0%", "55.0%"],
        ["CLIP: own image of a text, recall at 10", "10.0%", "60.0%"],
        ["CLIP: own text of an image, recall at 1", "2.0%", "52.0%"],
        ["CLIP: own text of an image, recall at 5", "10.0%", "60.0%"],
        ["CLIP: own text of an image, recall at 10", "20.0%", "70.0%"],
    ]
    assert shown.tables[3] == [
        ["split", "documents", "tokens", "filtered", "rejected", "texts truncated"],
        ["train", "1,000", "50,000", "3 small", "2 no image", "8"],
        ["test", "1,001", "50,001", "4 small", "0", "9"],
    ]
    assert "10 seconds in all" in shown.text
    made_up["encoders"]["test"]["vqgan"] = None
    assert Page(page(content_of(made_up))).tables[2][1] == ["VQGAN: PSNR, dB", "20.0", "none"]


def test_plots_show_each_model(made_up: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    plots: dict[str, list[Line]] = {}

    def plot(title: str, x: str, y: str, lines: list[Line], markers: bool = False) -> str:
        plots[title] = lines
        return ""

    monkeypatch.setattr(rac3.report.page, "plot", plot)
    keys = ["loss/main/image", "loss/main/text", "loss/retrieved/image", "loss/retrieved/text"]
    training = {
        name: [{"step": step, **{key: first + place + step for place, key in enumerate(keys)}} for step in (0, 10)]
        for name, first in (("ra_cm3", 100), ("cm3", 200))
    }
    training["cm3"][0]["loss/retrieved/text"] = training["cm3"][1]["loss/retrieved/text"] = 0.0  # no such tokens
    fitting = {"vqgan": [{"step": 1, "psnr": 7.0}, {"step": 2}], "clip": [{"step": 3, "accuracy": 0.5}]}
    page(content_of(made_up, training=training, fitting=fitting))
    assert list(plots)[:4] == [f"{m} perplexity {s}" for s in ("test", "validation") for m in ("Image", "Text")]
    for modality, tens in (("Image", 10), ("Text", 20)):
        for split, hundreds in (("validation", 100), ("test", 200)):
            start = hundreds + tens
            lines = plots[f"{modality} perplexity {split}"]
            assert [(line.label, line.points, line.dashed) for line in lines] == [
                ("RA-CM3", [(0, start), (1, start + 1), (2, start + 2)], False),
                ("CM3 at its best", [(0, start + 0.1), (2, start + 0.1)], True),  # one value, drawn as a level
                ("CM3", [(0, start + 0.2), (2, start + 0.2)], True),
                ("RA-CM3, random documents", [(k, start + 0.1 * 3 + k) for k in range(3)], False),
            ]
    assert [(line.label, line.points, line.dashed) for line in plots["Loss on text tokens"]] == [
        ("RA-CM3, main", [(0, 101), (10, 111)], False),
        ("CM3, main", [(0, 201), (10, 211)], False),
        ("RA-CM3, retrieved", [(0, 103), (10, 113)], True),
    ]
    assert [line.points for line in plots["Loss on image tokens"]] == [
        [(0, start), (10, start + 10)] for start in (100, 200, 102, 202)
    ]
    assert [line.points for line in plots["Fitting the VQGAN"]] == [[(1, 7)]]
    assert [line.points for line in plots["Fitting CLIP"]] == [[(3, 0.5)]]


@pytest.fixture(scope="module")
def memory(run: Run) -> list[Document]:
    """All documents of the memory, by memory id."""
    parts = [run.documents(split) for split in ("train", "memory")]
    return [item.document for part in parts for item in part.many(range(len(part)))]


def test_cards_show_what_was_found_and_made(shown: Page, run: Run, experiment: Experiment, workdir: Workdir, memory):
    """For each caption: what it retrieved and how similar that is, what each model drew, the truth."""
    documents = [item.document for item in run.documents("test").many(range(4))]
    ids = read_array(workdir.require(recipes.neighbors(experiment, "test")).folder / "ids")
    asked = Vectors(workdir.require(recipes.queries(experiment, "test")).folder / "text")[:]
    folders = [workdir.require(recipes.embeddings(experiment, split)).folder for split in ("train", "memory")]
    vectors = np.concatenate([Vectors(folder / "document")[:] for folder in folders])
    compared = comparisons(run)
    labels = {"ra_cm3": "RA-CM3", "cm3_best": "CM3 at its best", "cm3": "CM3"}  # not the control
    drawn = {label: np.load(folder_of(compared[name]) / "test.npy") for name, label in labels.items()}
    assert len(shown.cards) == 8
    for number, (card, document) in enumerate(zip(shown.cards[:4], documents, strict=True)):
        assert card.heading == document.text
        found = ids[number, 0, :2].tolist()
        assert [figure.label for figure in card.figures] == [
            *(f"found, {vectors[i] @ asked[number]:.2f}" for i in found),
            *labels.values(),
            "truth",
        ]
        for figure, i in zip(card.figures, found, strict=False):
            assert figure.caption.startswith(memory[i].text)
            np.testing.assert_array_equal(figure.pixels, memory[i].images[0].pixels())
        for figure in card.figures[2:5]:
            np.testing.assert_array_equal(figure.pixels, drawn[figure.label][number])
        np.testing.assert_array_equal(card.figures[5].pixels, document.images[0].pixels())
    for number, (card, document) in enumerate(zip(shown.cards[4:], documents, strict=True)):
        np.testing.assert_array_equal(card.figures[0].pixels, document.images[0].pixels())
        assert card.terms[0] == ["truth", f" {document.text}"]
        for (label, words), name in zip(card.terms[1:], labels, strict=True):
            caption = json.loads((folder_of(compared[name]) / "test.json").read_text())[number]["caption"]
            assert label == labels[name]
            assert words.split(maxsplit=1)[1] == (caption.lstrip() or "(empty)")


def test_marks_say_what_is_right(run: Run, memory: list[Document]):
    """Of samples made by hand; the first document has no text, so that the pictures are those of the other three."""
    items = run.documents("test").many(range(4))
    names = [str(item.document.metadata["entity"]) for item in items]
    truths = [item.document.images[0].pixels() for item in items]
    same = [[document.metadata["entity"] for document in memory].index(name) for name in names]
    rows = [
        {"text": "" if number == 0 else item.document.text, "neighbors": [[same[number], 0, 1], [2, 3, 4]]}
        for number, item in enumerate(items)
    ]
    texts = [item.document.text for item in items]  # a name alone is not enough
    captions = {
        "ra_cm3": [f"a flag: {text}!" for text in texts],
        "cm3": [names[0], f"{texts[0]}s", texts[2].upper(), None],
    }
    samples = Samples(
        run,
        "test",
        items,
        {
            name: [row | {"caption": words} for row, words in zip(rows, said, strict=True)]
            for name, said in captions.items()
        },
        {"ra_cm3": np.stack(truths[1:]), "cm3": np.stack([truths[number] for number in (2, 2, 0)])},
    )
    strips = samples.strips()
    assert [strip.prompt for strip in strips] == [item.document.text for item in items[1:]]
    for number, strip in enumerate(strips, 1):
        first, second, ours, theirs, truth = strip.pictures
        assert (first.text, first.mark) == (memory[same[number]].text, Mark(True, "same"))
        assert (second.text, second.mark) == (memory[0].text, Mark(False, "other"))
        assert (ours.label, ours.mark) == ("RA-CM3", Mark(True, "right"))
        shown, wanted = (items[i].document.metadata for i in ({1: 2, 2: 2, 3: 0}[number], number))
        wrong = [shown[field] for field in ("entity", "ground", "weather", "frame") if shown[field] != wanted[field]]
        mark = Mark(True, "right") if number == 2 else Mark(False, f"wrong: {', '.join(map(str, wrong))}")
        assert (theirs.label, theirs.mark) == ("CM3", mark)
        np.testing.assert_array_equal(ours.pixels, truths[number])
        np.testing.assert_array_equal(truth.pixels, truths[number])
    made = samples.captions()
    assert [item.captions for item in made] == [  # none of the last: a model has no caption of it
        {
            "truth": (items[number].document.text, None),
            "RA-CM3": (captions["ra_cm3"][number], Mark(True, "")),
            "CM3": (captions["cm3"][number], Mark(named, "")),
        }
        for number, named in ((0, False), (1, False), (2, True))
    ]
    for number, item in enumerate(made):
        np.testing.assert_array_equal(item.picture.pixels, truths[number])


def test_reconstructions_are_of_the_stored_codes(run: Run):
    items = run.documents("test").many(range(4))
    pairs = Samples.open(run, "test", {"ra_cm3": run}).reconstructions()
    codec = run.images
    for item, (original, again) in zip(items, pairs, strict=True):
        np.testing.assert_array_equal(original.pixels, item.document.images[0].pixels())
        drawn = codec.decode(item.ids[1][None])[0]
        assert np.abs(again.pixels.astype(int) - drawn).max() <= 1  # a batch of another size may round otherwise


def test_captions_are_escaped(metrics: dict[str, Any]):
    pixels = np.zeros((8, 8, 3), np.uint8)
    picture = Picture(HOSTILE, pixels, HOSTILE, Mark(False, HOSTILE))
    content = content_of(
        metrics | {"stages": {HOSTILE: 1.0}},
        name=HOSTILE,
        facts=[(HOSTILE, HOSTILE)],
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
    shown = Page(report(Run(alone, workdir)).read_text())
    metrics = json.loads((workdir.path / "report" / "metrics.json").read_text())
    assert "ra_cm3" not in metrics
    assert metrics["retrieval"] == {"recall_at_2": None, "validation": {"recall_at_2": None}}
    assert "none to compare it with" in shown.text
    assert not [alt for alt, _ in shown.images("image/png") if alt.startswith("found")]


def test_what_is_missing_is_named_with_its_command(experiment: Experiment, workdir: Workdir):
    other = replace(experiment, evaluation=replace(experiment.evaluation, image_samples=3))
    with pytest.raises(InputError, match="run `rac3 evaluate`"):
        collect(Run(other, workdir))


def test_summary_shows_models_as_columns_and_skips_what_has_no_meaning(made_up: dict[str, Any]):
    assert [re.split(r"\s{2,}", line) for line in summary(made_up).splitlines()] == [
        ["", "RA-CM3", "CM3 at its best", "CM3", "RA-CM3, random documents"],
        ["image perplexity", "5.00", "8.00", "9.00", "1,234.50"],
        ["text perplexity", "9.00", "8.50", "8.00", "9.50"],
        ["entity accuracy (seen)", "50.0%", "25.0%", "50.0%", "0.0%"],
        ["entity accuracy (unseen)", "25.0%", "0.0%", "12.5%", "25.0%"],
        ["name accuracy (unseen)", "75.0%", "5.0%", "-", "50.0%"],
        ["CIDEr-D (unseen)", "1.000", "0.750", "0.500", "0.250"],
        ["FID (unseen)", "20.00", "21.00", "22.00", "23.00"],
        ["KID, EfficientNet-Lite0 (unseen)", "0.5000", "0.4000", "0.3000", "0.2000"],
        ["CLIP score", "0.312", "0.100", "0.200", "0.250"],
        ["retrieval recall at 2, test: 50.0% by text, 25.0% by image"],
        ["retrieval recall at 2, validation: 100.0% by text, 75.0% by image"],
        ["perplexity of RA-CM3 over that of the better CM3: image 0.63, text 1.12"],
    ]
    for name in MODELS:
        made_up[name]["entity_accuracy"] = {"seen": None, "unseen": None}
    assert "entity accuracy" not in summary(made_up)


def test_baselines_stand_after_the_models_and_are_never_the_best(made_up: dict[str, Any]):
    """Those that have figures; what a baseline has none of stays empty on the page."""
    nothing = {"seen": None, "unseen": None}
    made_up["baselines"] = {
        "copied": {"entity_accuracy": {"seen": 0.9, "unseen": 0.95}, "joint_accuracy": {"seen": None, "unseen": 0.05}},
        "mean": {"joint_accuracy": {"seen": None, "unseen": 0.75}},
        "reconstructed": {"entity_accuracy": nothing},
        "original": {"joint_accuracy": {"seen": None, "unseen": 1.0}},
    }
    for name, share in zip(MODELS, (0.75, 0.5, 0.25, 0.0), strict=True):
        made_up[name]["joint_accuracy"] = {"seen": 1.0, "unseen": share}
    lines = [re.split(r"\s{2,}", line) for line in summary(made_up).splitlines()]
    assert lines[0][-3:] == ["a copy", "a mean", "original"]
    rows = {label: cells for label, *cells in lines}
    assert rows["joint accuracy (unseen)"] == ["75.0%", "50.0%", "25.0%", "0.0%", "5.0%", "75.0%", "100.0%"]
    assert rows["entity accuracy (unseen)"] == ["25.0%", "0.0%", "12.5%", "25.0%", "95.0%", "-", "-"]
    assert rows["image perplexity"][-2:] == ["-", "-"]
    shown = Page(page(content_of(made_up)))
    assert shown.tables[0][0][-3:] == ["a copy", "a mean", "original"]
    table = {label: cells for label, *cells in shown.tables[0]}
    assert table["joint accuracy (unseen) ↑"][-3:] == ["5.0% ± 14", "75.0% ± 19", "100.0% ± 11"]
    assert table["image perplexity ↓"][-2:] == ["", ""]
    assert shown.bold.count("75.0% ± 19") == 2  # RA-CM3's, jointly and of names; not that of the mean
    assert not {"95.0% ± 14", "100.0% ± 11"} & {*shown.bold}
    assert "The originals show how often the judge is right." in shown.text


def test_where_no_source_judges_a_line_says_so(made_up: dict[str, Any]):
    assert "no accuracy of images" not in summary(made_up)
    made_up["evaluation"]["judged"] = []
    assert summary(made_up).splitlines()[-1].startswith("no accuracy of images: the source of the training documents")
    assert "No accuracy of images: the source" in Page(page(content_of(made_up))).text
    made_up["evaluation"]["entity_field"] = ""  # there is no accuracy of anything
    assert "no accuracy of images" not in summary(made_up)


def test_the_verdict_follows_the_numbers(metrics: dict[str, Any]):
    values = {"ra_cm3": (5.0, 9.0, 0.5), "cm3": (9.0, 8.0, 0.25), "ra_cm3_random": (10.0, 9.0, 0.0)}
    del metrics["cm3_best"]
    for name, (image, text, unseen) in values.items():
        metrics[name]["perplexity"] = {"image": image, "text": text}
        metrics[name]["entity_accuracy"] = {"seen": 0.5, "unseen": unseen}
        for key in ("joint_accuracy", "name_accuracy", "joint_name_accuracy"):
            metrics[name][key] = {"seen": None, "unseen": None}
        metrics[name]["name_accuracy"] = {"seen": None, "unseen": None}
        metrics[name]["captions"] = metrics[name]["pictures"] = {}
        metrics[name]["clip_score"]["unseen"] = 0.3
    metrics["evaluation"]["with_entity"] = {"validation": 80, "test": 80}
    assert verdict(metrics) == (
        "Against CM3 of the same size and as many steps, RA-CM3 is better in image perplexity and entity accuracy "
        "(unseen); worse in text perplexity; not clearly different in entity accuracy (seen) and CLIP score. "
        "With random documents in place of retrieved ones, its image perplexity is 10.00, not 5.00."
    )
    metrics["evaluation"]["with_entity"]["test"] = 4  # too few to tell 50% from 25%
    assert "better in image perplexity;" in verdict(metrics)


def test_the_margin_holds_the_true_share_19_times_in_20():
    rng = np.random.default_rng(0)
    for share in (0.02, 0.3, 0.9):
        drawn = rng.binomial(80, share, 2000) / 80
        held = np.mean([abs(value - share) <= margin(value, 80) for value in drawn])
        assert held > 0.93
