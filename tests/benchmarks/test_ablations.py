"""The ablations: what each variant changes, and the orderings of figures made by hand."""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny_config import get_config as tiny

from rac3.config import InputError, canonical, load_config_module
from rac3.experiment import Experiment
from rac3.retrieval.baselines import NoRetriever

TINY = Path(__file__).parents[1] / "tiny_config.py"
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CHANGES = {
    "full": {},
    "random": {"retriever": {"class": "Random", "num_neighbors": 16, "seed": 0}},
    "image only": {"batches.retrieved": "image"},
    "text only": {"batches.retrieved": "text"},
    "no redundancy avoidance": {"selection.max_similarity": 1},
    "no query dropout": {"query_dropout": 0},
    "alpha 0": {"batches.retrieved_weight": 0},
    "alpha 1": {"batches.retrieved_weight": 1},
    "none": {"retriever": {"class": "NoRetriever", "num_neighbors": 0}},
    "K of 0 1": {"batches.num_retrieved": [0, 1], "evaluation.num_retrieved": 1},
    "K of 2": {"batches.num_retrieved": [2]},
}
"""What each variant of the shrunken quickstart must have in place of that config's."""


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of an experiment by name; a retriever is one."""
    if isinstance(value, dict) and name != "retriever":
        for key, each in value.items():
            yield from leaves(each, f"{name}.{key}" if name else key)
    else:
        yield name, value


@pytest.fixture(scope="module")
def opened(ablations: ModuleType, variants: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The experiment of each variant."""
    config = variants.seeded(str(TINY), 0, tmp_path_factory.mktemp("variants"))
    chosen = ablations.variants(tiny(), None)
    return {name: variants.open_variant(config, [], settings)[1].experiment for name, settings in chosen.items()}


def test_each_variant_changes_what_it_is_named_for_and_nothing_else(opened: dict[str, Experiment]):
    config, full = (dict(leaves(canonical(each))) for each in (tiny(), opened["full"]))
    assert full == {**config, "batches.retrieved_weight": 0.1, "workdir": full["workdir"]}
    assert [*opened] == [*CHANGES]
    for name, experiment in opened.items():
        found = dict(leaves(canonical(experiment)))
        assert {key: found[key] for key in found if found[key] != full[key]} == CHANGES[name], name


@pytest.mark.parametrize("seed", [0, 3])
def test_the_repeated_world_is_the_quickstart_with_three_of_each_document(seed: int):
    quickstart, repeated = (
        dict(leaves(canonical(load_config_module(name).get_config(seed))))
        for name in ("quickstart", str(BENCHMARKS / "repeated_world.py"))
    )
    changed = {key: repeated[key] for key in repeated if repeated[key] != quickstart[key]}
    assert changed == {"name": "repeated_world", "data.train.copies": 3, "data.memory.memory.copies": 3}


def test_what_the_config_has_off_is_as_strong_as_in_the_paper(ablations: ModuleType):
    config = replace(tiny(), query_dropout=0.0, selection=replace(tiny().selection, max_similarity=1.0))
    full = ablations.variants(config, 7)["full"]
    assert (full["query-dropout"], full["selection.max-similarity"], full["training.steps"]) == ("0.2", "0.9", "7")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (replace(tiny(), retriever=NoRetriever()), "retrieves nothing"),
        (replace(tiny(), data=replace(tiny().data, test=None)), "has no data.test"),
    ],
)
def test_configs_that_have_nothing_to_compare_are_refused(ablations: ModuleType, config: Experiment, said: str):
    with pytest.raises(InputError, match=said):
        ablations.variants(config, None)


def figures(image: float | None, text: float | None) -> dict[str, Any]:
    return {"step": 100, "perplexity": {"test": {"image": image, "text": text}, "validation": {"image": 9, "text": 9}}}


BETTER = {name: figures(4.0, 16.0) for name in CHANGES}  # than no variant: twice that of `full`
ONE = {**BETTER, "full": figures(2.0, 8.0)}


def test_the_loss_is_the_mean_of_both_modalities_on_the_test_split(ablations: ModuleType):
    assert ablations.loss(figures(2.0, 8.0)) == pytest.approx(math.log(4.0))
    assert ablations.loss(figures(None, 8.0)) == pytest.approx(math.log(8.0))


def test_all_orderings_hold_where_full_is_best(ablations: ModuleType):
    found = ablations.orderings({"0": ONE})
    assert len(found) == 5
    for ordering in found.values():
        assert (ordering["holds"], ordering["holds_by_seed"], ordering["clear"]) == (True, {"0": True}, None)
        for gain in ordering["gain_over"].values():
            assert gain["mean"] == pytest.approx(math.log(2.0))
            assert gain["interval"] is None


@pytest.mark.parametrize(
    ("variant", "broken"),
    [
        ("random", "relevant documents beat random ones"),
        ("image only", "whole documents beat images alone and texts alone"),
        ("text only", "whole documents beat images alone and texts alone"),
        ("no redundancy avoidance", "redundancy avoidance helps"),
        ("no query dropout", "query dropout helps"),
        ("alpha 0", "alpha = 0.1 beats 0 and 1"),
        ("alpha 1", "alpha = 0.1 beats 0 and 1"),
    ],
)
def test_a_variant_that_is_better_breaks_its_own_ordering(ablations: ModuleType, variant: str, broken: str):
    """Better in the product of both perplexities, by its text alone."""
    found = ablations.orderings({"0": {**ONE, variant: figures(2.5, 6.0)}})
    assert [name for name, ordering in found.items() if not ordering["holds"]] == [broken]
    assert found[broken]["holds_by_seed"] == {"0": False}


def test_equal_is_not_better(ablations: ModuleType):
    found = ablations.orderings({"0": {**ONE, "no query dropout": ONE["full"]}})
    assert not found["query dropout helps"]["holds"]


def test_orderings_over_seeds(ablations: ModuleType):
    """Gains of log 2 in three seeds, but over random documents of log 4, log 2 and -log 2: a mean of 2/3 log 2, with a
    standard deviation of 1.5275 log 2, and an interval of 4.303 x 1.5275 / sqrt(3) = 3.795 log 2 to each side."""
    seeds = {
        "0": {**ONE, "random": figures(8.0, 32.0)},
        "1": ONE,
        "2": {**ONE, "random": figures(1.0, 4.0)},
    }
    found = ablations.orderings(seeds)
    random = found["relevant documents beat random ones"]
    assert (random["holds"], random["clear"]) == (True, False)
    assert random["holds_by_seed"] == {"0": True, "1": True, "2": False}
    gain = random["gain_over"]["random"]
    assert gain["mean"] == pytest.approx(2 / 3 * math.log(2))
    ends = [(2 / 3 - 3.795) * math.log(2), (2 / 3 + 3.795) * math.log(2)]
    assert gain["interval"] == pytest.approx(ends, abs=1e-3)
    assert found["query dropout helps"]["clear"] is True


def test_orderings_of_variants_that_are_not_there_are_left_out(ablations: ModuleType):
    seeds = {"0": {name: ONE[name] for name in ("full", "random", "alpha 0")}}
    assert [*ablations.orderings(seeds)] == ["relevant documents beat random ones"]


def test_the_table_has_means_intervals_and_steps(ablations: ModuleType, variants: ModuleType):
    """Two seeds: 2 and 3 have a mean of 2.5, and 12.706 x 0.7071 / sqrt(2) = 6.353 to each side."""
    seeds = {"0": {"full": figures(2.0, None)}, "1": {"full": {**figures(3.0, None), "step": 200}}}
    line = variants.table(seeds).splitlines()[1]
    assert line.split() == ["full", "2.500", "(-3.853", "to", "8.853)", "-", "100", "200"]
    said = ablations.verdicts(ablations.orderings({"0": {**ONE, "random": figures(2.0, 8.0)}})).splitlines()
    assert said[0] == (
        "relevant documents beat random ones: FAILS, of one seed; in 0 of 1 seeds; gain over random +0.000"
    )


@pytest.mark.slow
def test_two_variants_to_the_end(
    ablations: ModuleType, workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """What was asked is what was trained and measured; a second run makes nothing again."""
    workdir.rename(tmp_path / "seed_0")  # whose encoders and documents are those of the variants
    out = tmp_path / "out.json"
    arguments = [str(TINY), "--workdir", str(tmp_path), "--steps", "3", "--only", "text only", "random"]
    monkeypatch.setattr(sys, "argv", ["ablations.py", *arguments, "--out", str(out), "--samples", "1", "--seed", "0"])
    before = made(tmp_path)
    ablations.main()
    new = {path: manifest for path, manifest in made(tmp_path).items() if path not in before}
    assert not {path.parts[0] for path in new} & {"text", "vqgan", "clip", "documents", "embeddings", "queries"}
    trained = [manifest["config"] for path, manifest in new.items() if path.parts[0] == "train"]
    assert sorted((config["steps"], config["batches"]["retrieved"]) for config in trained) == [
        (3, "document"),
        (3, "text"),
    ]
    searched = [manifest["config"] for path, manifest in new.items() if path.parts[0] == "neighbors"]
    assert {config["retriever"]["class"] for config in searched} == {"Random"}
    assert {config["training"] for config in searched} == {True, False}  # in training and at inference
    measured = json.loads(out.read_text())["results"]["seeds"]["0"]
    assert [*measured] == ["random", "text only"]
    for found in measured.values():
        by_k = found["perplexity_by_k"]["test"]
        assert all(len(by_k[modality]) == 3 and min(by_k[modality]) > 1 for modality in ("image", "text"))
        assert found["perplexity"]["test"] == {modality: by_k[modality][2] for modality in ("image", "text")}
        assert 0 <= found["accuracy"]["test"]["joint_accuracy"] <= 1
        assert found["recall"].keys() == {"text", "image"}
    assert measured["random"]["perplexity"] != measured["text only"]["perplexity"]
    printed = capsys.readouterr().out
    assert "== 2 of 2: seed 0, text only" in printed
    after = made(tmp_path)
    ablations.main()
    assert made(tmp_path) == after
    assert json.loads(out.read_text())["results"]["seeds"]["0"] == measured


def made(folder: Path) -> dict[Path, Any]:
    """The manifests of all artifacts by folder, with the time at which each was made."""
    root = folder / "seed_0"
    return {
        path.parent.relative_to(root): {**json.loads(path.read_text()), "time": path.stat().st_mtime_ns}
        for path in root.glob("*/*/manifest.json")
    }
