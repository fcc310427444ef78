"""The claims that are checked with several seeds: figures made by hand, and a run that was finished before."""

import importlib
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rac3.config import load_config_module
from rac3.documents.webdataset import WebDataset

TINY = Path(__file__).parents[1] / "tiny_config.py"
FD = "FD (EfficientNet-Lite0)"


def test_a_name_is_the_path_of_a_figure(seeds: ModuleType):
    metrics = {"ra_cm3": {"perplexity": {"image": 1.5}}, "encoders": None}
    assert seeds.lookup(metrics, "ra_cm3.perplexity.image") == 1.5
    assert seeds.lookup(metrics, "ra_cm3.perplexity.text") is None
    assert seeds.lookup(metrics, "encoders.test.vqgan") is None


def test_a_claim_without_its_figure_fails(seeds: ModuleType):
    claims = {"high": lambda f: f["a"] >= 1, "low": lambda f: f["a"] <= 0.5 * f["b"]}
    assert seeds.failed(claims, {"a": 1, "b": 2}) == []
    assert seeds.failed(claims, {"a": 0.9, "b": 1.7}) == ["high", "low"]
    assert seeds.failed(claims, {"a": 1, "b": None}) == ["low"]


@pytest.mark.parametrize(("claims", "code"), [([[], []], 0), ([[], ["all is well"]], 1)])
def test_a_claim_that_fails_for_a_seed_is_named_and_ends_with_1(
    seeds: ModuleType, claims: list[list[str]], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    results = {str(seed): {"a": seed / 2, "b": None, "failed_claims": of} for seed, of in enumerate(claims)}
    with pytest.raises(SystemExit) as ended:
        seeds.conclude("python x.py", results, ["a", "b"], tmp_path / "out.json")
    assert bool(ended.value.code) == bool(code)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["seed", "0", "seed", "1"],
        ["a", "0.000", "0.500"],
        ["b", "-", "-"],
    ]
    assert lines[3:] == ["seed 1 FAILS: all is well"] * code
    written = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert (written["command"], written["results"]) == ("python x.py", results)


@pytest.mark.slow
def test_a_run_says_what_it_took_only_if_one_process_did_all_of_it(
    seeds: ModuleType, finished_workdir: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Here an earlier process did it all; then what was kept of that one is given again."""
    monkeypatch.setenv("PYTHONPATH", str(TINY.parent))
    shutil.copytree(finished_workdir[1], tmp_path / "seed_7")
    text = TINY.read_text(encoding="utf-8")
    metrics, cost = seeds.run(text, 7, tmp_path)
    assert cost == dict.fromkeys(seeds.COSTS)
    written = json.loads((tmp_path / "seed_7" / "report" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics == written
    assert (tmp_path / "seed_7.py").read_text(encoding="utf-8") == text
    kept = dict(zip(seeds.COSTS, (100.5, 150.25, 2.0), strict=True))
    (tmp_path / "seed_7_cost.json").write_text(json.dumps({"whose": [text], "cost": kept}), encoding="utf-8")
    assert seeds.run(text, 7, tmp_path)[1] == kept
    assert seeds.run(f"{text}\n", 7, tmp_path)[1] == dict.fromkeys(seeds.COSTS)  # of another config


def test_options_of_rac3_reach_every_seed_of_the_quickstart(
    seeds: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    quickstart_seeds = importlib.import_module("quickstart_seeds")
    asked = []

    def run(config: str, seed: int, workdir: Path, options: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        asked.append((f"seed={seed}" in config, seed, options))
        return {"encoders": {}, "stages": {}}, dict.fromkeys(seeds.COSTS)

    monkeypatch.setattr(quickstart_seeds, "run", run)
    words = ["--workdir", str(tmp_path), "--seeds", "2", "5", "--training.steps", "9"]
    monkeypatch.setattr(sys, "argv", ["quickstart_seeds.py", *words, "--out", str(tmp_path / "out.json")])
    with pytest.raises(SystemExit):  # no figure, no claim
        quickstart_seeds.main()
    assert asked == [(True, 2, ["--training.steps", "9"]), (True, 5, ["--training.steps", "9"])]
    command = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["command"]
    assert command == "python benchmarks/quickstart_seeds.py --workdir DIR --seeds 2 5 --training.steps 9"


def test_a_run_that_fails_ends_the_benchmark(seeds: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        seeds.run("def get_config():\n    return None\n", 3, tmp_path)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "seed 3: the run failed with status 2\n"


@pytest.mark.parametrize(
    ("folders", "tuning", "test", "chooses"),
    [
        (["unseen-tuning"], False, "unseen-test", "unseen-tuning"),
        ([], False, "unseen-test", "validation"),
        (["unseen-tuning"], True, "unseen-tuning", None),
        ([], True, "validation", None),
    ],
)
def test_settings_are_chosen_without_the_test(
    emoji_seeds: ModuleType, folders: list[str], tuning: bool, test: str, chooses: str | None, tmp_path: Path
):
    for name in folders:
        (tmp_path / name).mkdir()
    path = tmp_path / "config.py"
    path.write_text(emoji_seeds.config_of(3, tmp_path, tuning), encoding="utf-8")
    experiment = load_config_module(str(path)).get_config()
    assert experiment.seed == 3
    assert experiment.data.validation is None
    assert experiment.data.test == WebDataset(test)
    assert experiment.data.tuning == (chooses and WebDataset(chooses))
    assert experiment.evaluation.features == "efficientnet-lite0"


def of_model(image: float, text: float, cider: float, named: float, fd: float, kid: float) -> dict[str, Any]:
    """A model of `metrics.json`, as far as the benchmark reads it."""
    return {
        "perplexity": {"image": image, "text": text},
        "perplexity_by_k": {},
        "captions": {"test": {"cider_d": {"value": cider}}},
        "pictures": {"test": {FD: {"frechet": {"value": fd}, "kid": {"value": kid}}}},
        "name_accuracy": {"seen": None, "unseen": named},
        "clip_score": {"unseen": 0.5},
    }


def emoji_metrics(**changed: dict[str, Any]) -> dict[str, Any]:
    models = {
        "ra_cm3": of_model(18, 4, 1.5, 0.5, 0.8, 0.04),
        "cm3_best": of_model(30, 10, 0.5, 0.1, 1.0, 0.5),  # best for texts, and for distances
        "cm3": of_model(20, 30, 1.0, 0.05, 2.0, 0.05),
        "ra_cm3_random": of_model(21, 11, 0.1, 0.0, 1.0, 0.05),
        "baselines": {"copied": of_model(0, 0, 1.25, 0.7, 0.1, 0.01)},
        "retrieval": {"recall_at_2": {"text": 0.75, "image": 0.45}},
        "encoders": {},
        "stages": {},
    }
    return models | changed


def test_real_pictures_are_compared_with_the_better_cm3(emoji_seeds: ModuleType):
    found = emoji_seeds.figures_of(emoji_metrics(), {})
    ratios = {name: found[f"ratio.{name}"] for name in emoji_seeds.BETTER}
    assert ratios == pytest.approx(
        {"perplexity.text": 0.4, "perplexity.image": 0.9, "cider_d": 1.5, "kid": 0.8, "fd": 0.8, "name_accuracy": 5}
    )
    assert (found["copy.cider_d"], found["copy.kid"], found["copy.name_accuracy"]) == (1.25, 0.01, 0.7)
    assert (found["cm3.perplexity.text"], found["vqgan.fd"]) == (30, None)
    assert found["failed_claims"] == []


WORSE = {
    "recall at 2 by text": {"retrieval": {"recall_at_2": {"text": 0.74, "image": 0.45}}},
    "recall at 2 by image": {"retrieval": {"recall_at_2": {"text": 0.75, "image": 0.44}}},
    "the text perplexity": {"ra_cm3": of_model(18, 5.1, 1.5, 0.5, 0.8, 0.04)},
    "the image perplexity": {"ra_cm3": of_model(19.1, 4, 1.5, 0.5, 0.8, 0.04)},
    "CIDEr-D": {"ra_cm3": of_model(18, 4, 1.29, 0.5, 0.8, 0.04)},
    "KID": {"ra_cm3": of_model(18, 4, 1.5, 0.5, 0.8, 0.041)},
    "FD": {"ra_cm3": of_model(18, 4, 1.5, 0.5, 0.81, 0.04)},
    "captions name": {"ra_cm3": of_model(18, 4, 1.5, 0.49, 0.8, 0.04)},
    "with random documents": {"ra_cm3_random": of_model(21, 9.9, 0.1, 0.0, 1.0, 0.05)},
}


@pytest.mark.parametrize("claim", WORSE)
def test_each_claim_fails_alone(emoji_seeds: ModuleType, claim: str):
    (failed,) = emoji_seeds.figures_of(emoji_metrics(**WORSE[claim]), {})["failed_claims"]
    assert failed.startswith(claim)
    assert len(WORSE) == len(emoji_seeds.CLAIMS)


def test_naming_nothing_is_not_five_times_nothing(emoji_seeds: ModuleType):
    none = {"ra_cm3": of_model(18, 4, 1.5, 0.0, 0.8, 0.04), "cm3_best": of_model(20, 10, 1.0, 0.0, 1.0, 0.05)}
    none["cm3"] = none["cm3_best"]
    found = emoji_seeds.figures_of(emoji_metrics(**none), {})
    assert found["ratio.name_accuracy"] is None
    assert [claim.split()[0] for claim in found["failed_claims"]] == ["captions"]


JUST = {
    "ra_cm3.joint_accuracy.unseen": 0.75,
    "ra_cm3.joint_name_accuracy.unseen": 0.6,
    "baselines.copied.joint_accuracy.unseen": 0.1,
    "baselines.copied.joint_name_accuracy.unseen": 0.1,
    "baselines.mean.joint_accuracy.unseen": 0.1,
    "cm3_best.entity_accuracy.unseen": 0.1,
    "cm3_best.name_accuracy.unseen": 0.1,
    "ra_cm3.perplexity.image": 1.3,
    "ra_cm3.perplexity.text": 2.4,
    "retrieval.recall_at_2.text": 0.8,
    "retrieval.recall_at_2.image": 0.8,
    "ra_cm3_random.entity_accuracy.unseen": 0.1,
    "peak_gb": 5.99,
}
"""Where each claim of the quickstart just holds, next to a CM3 whose perplexities are 2 and 4."""


@pytest.mark.parametrize("name", JUST)
def test_each_claim_of_the_quickstart_fails_alone(seeds: ModuleType, quickstart_seeds: ModuleType, name: str):
    claims, figures = quickstart_seeds.CLAIMS, {**JUST, "cm3_best.perplexity.image": 2, "cm3_best.perplexity.text": 4}
    assert (len(JUST), seeds.failed(claims, figures)) == (len(claims), [])
    at_least = name.startswith(("ra_cm3.joint", "retrieval"))
    (failed,) = seeds.failed(claims, {**figures, name: JUST[name] + (-0.02 if at_least else 0.02)})
    assert failed == [*claims][[*JUST].index(name)]


@pytest.mark.parametrize(
    ("number", "model", "by_k"),
    [
        (0, "ra_cm3", [0.79, 0.92, 0.92]),
        (1, "ra_cm3", [0.8, 0.9, 0.91]),
        (2, "ra_cm3", [0.95, 0.9, 0.92]),
        (3, "cm3", [0.5, 0.9, 0.5]),
        (3, "cm3_best", [0.8, 0.5, 0.5]),
    ],
)
def test_each_claim_of_few_shot_fails_alone(
    seeds: ModuleType, few_shot: ModuleType, number: int, model: str, by_k: list[float]
):
    def of(by_k: list[float]) -> dict[str, Any]:
        return {"test": {"apart": dict(zip("124", by_k, strict=True))}}

    just = {"ra_cm3": of([0.8, 0.9, 0.92]), "cm3_best": of([0.5, 0.6, 0.7]), "cm3": of([0.7, 0.8, 0.85])}
    assert seeds.failed(few_shot.CLAIMS, just) == []
    assert seeds.failed(few_shot.CLAIMS, {**just, model: of(by_k)}) == [[*few_shot.CLAIMS][number]]
    assert len(few_shot.CLAIMS) == 4


def test_the_quickstart_claims_what_its_table_shows(quickstart_seeds: ModuleType):
    """From the committed figures, as `metrics.json` would have them."""
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "quickstart_seeds.json"
    for figures in json.loads(path.read_text(encoding="utf-8"))["results"].values():
        metrics: dict[str, Any] = {"encoders": figures["encoders"], "stages": figures["stages"]}
        for name in quickstart_seeds.FIGURES:
            *places, last = name.split(".")
            inner = metrics
            for place in places:
                inner = inner.setdefault(place, {})
            inner[last] = figures[name]
        cost = {name: figures[name] for name in quickstart_seeds.COSTS}
        assert quickstart_seeds.figures_of(metrics, cost) == figures
