"""Scaling laws: fits of points with known answers, the compute of a training, and what each model is."""

import itertools
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import scipy.stats
from tiny_config import get_config as tiny

from rac3.artifacts.workdir import Workdir
from rac3.batches.loader import StreamState
from rac3.config import InputError
from rac3.experiment import Experiment
from rac3.run import Run

TINY = Path(__file__).parents[1] / "tiny_config.py"


def test_the_frontier_by_hand(scaling: ModuleType):
    """5 at a compute of 20 is above 4 at 10, and another 4 at 30 is no better."""
    points = [(30.0, 4.0), (20.0, 5.0), (10.0, 4.0), (40.0, 3.0), (5.0, 6.0), (10.0, 4.5)]
    assert scaling.frontier(points) == [(5.0, 6.0), (10.0, 4.0), (40.0, 3.0)]


def test_a_law_is_found_again(scaling: ModuleType):
    """L = 3 C^-0.25 at four budgets, next to models that are not on the frontier."""
    exact = [(compute, 3 * compute**-0.25) for compute in (1e9, 1e10, 1e12, 1e11)]
    worse = [(1e10, 0.02), (1e12, 0.5)]
    assert all(loss > 3 * compute**-0.25 for compute, loss in worse[1:])
    law = scaling.fit([*exact, (2e10, 0.5), worse[1]])
    assert (law.exponent, law.coefficient, law.r2) == pytest.approx((0.25, 3.0, 1.0))
    assert law.points == 4
    assert law(1e16) == pytest.approx(3e-4)


def test_a_law_through_noise_is_that_of_a_regression(scaling: ModuleType):
    compute = np.array([1e9, 3e9, 1e10, 4e10, 2e11])
    loss = np.array([2.0, 1.7, 1.1, 0.9, 0.6])
    expected = scipy.stats.linregress(np.log(compute), np.log(loss))
    law = scaling.fit(list(zip(compute.tolist(), loss.tolist(), strict=True)))
    assert law.exponent == pytest.approx(-expected.slope)
    assert law.coefficient == pytest.approx(math.exp(expected.intercept))
    assert law.r2 == pytest.approx(expected.rvalue**2)


def test_two_models_have_no_law(scaling: ModuleType):
    assert scaling.fit([(1.0, 3.0), (2.0, 2.0), (3.0, 2.5)]) is None


def test_models_have_the_sizes_that_are_asked_for(scaling: ModuleType, variants: ModuleType, tmp_path: Path):
    """The shrunken quickstart has 2 heads of 16."""
    chosen = scaling.variants(tiny(), ["3x64"], [4, 8])
    assert [*chosen] == ["ra_cm3 3x64 4", "cm3 3x64 4", "ra_cm3 3x64 8", "cm3 3x64 8"]
    config = variants.seeded(str(TINY), 0, tmp_path)
    for name, settings in chosen.items():
        experiment = variants.open_variant(config, [], settings)[1].experiment
        model = experiment.model
        assert (model.num_layers, model.embed, model.num_heads, model.mlp) == (3, 64, 4, 256)
        assert experiment.model_name == name.split()[0]
        assert experiment.training.steps == int(name.split()[2])


@pytest.mark.parametrize("size", ["3", "x64", "3x40", "threex64", "3x"])
def test_sizes_that_cannot_be_are_refused(scaling: ModuleType, size: str):
    with pytest.raises(InputError, match="LAYERSxWIDTH with heads of 16; use 2x32, say"):
        scaling.variants(tiny(), [size], [4])


@pytest.mark.parametrize("counted", [256, 2])
def test_the_compute_of_a_training_by_hand(
    scaling: ModuleType, experiment: Experiment, store: Workdir, monkeypatch: pytest.MonkeyPatch, counted: int
):
    """Six FLOPs for each parameter of a product and token, and 12 for each layer, channel and pair of tokens (two
    products of 2 FLOPs, forward and twice backward); over all 6 steps, or three times over the first 2."""
    monkeypatch.setattr(scaling, "COUNTED", counted)
    run = Run(experiment, store)
    steps, model, stream = 6, experiment.model, run.training_stream().batches(StreamState())
    kernels = model.num_layers * (4 * model.embed**2 + 2 * model.embed * model.mlp)
    kernels += model.embed * run.model.vocab_size
    total = 0.0
    for _ in range(min(counted, steps)):
        batch = next(stream)[0]
        for row in np.asarray(batch.segments):
            lengths = np.bincount(row)[1:]
            total += (
                6 * kernels * lengths.sum() + 12 * model.num_layers * model.embed * (lengths * (lengths + 1) / 2).sum()
            )
    assert scaling.training_flops(run) == pytest.approx(total * max(1, steps / counted), rel=1e-5)


def figures(flops: float, loss: float) -> dict[str, object]:
    return {"flops": flops, "loss": {"test": {"image": loss, "text": None}}}


def test_curves_are_means_over_seeds(scaling: ModuleType):
    seeds = {
        "0": {"ra_cm3 2x64 100": figures(1.0, 3.0), "cm3 2x64 100": figures(2.0, 5.0)},
        "1": {"ra_cm3 2x64 100": figures(3.0, 4.0), "cm3 2x64 100": figures(4.0, 5.0)},
    }
    assert scaling.curves(seeds) == {"test": {"image": {"ra_cm3": [(2.0, 3.5)], "cm3": [(3.0, 5.0)]}}}


def test_the_plot_shows_every_model_and_the_laws(scaling: ModuleType, tmp_path: Path):
    exact = [(compute, 3 * compute**-0.25) for compute in (1e9, 1e10, 1e11, 1e12)]
    found = {"test": {"image": {"ra_cm3": exact, "cm3": [(compute, 2 * loss) for compute, loss in exact]}}}
    path = tmp_path / "plot.svg"
    scaling.plot(found, ["2x64", "3x64"], [100, 200], path)
    text = path.read_text(encoding="utf-8")
    assert text.count('id="line2d_') > 0
    for label in ("with retrieval, 2x64", "without, 3x64", "image, test"):
        assert f"<!-- {label} -->" in text


@pytest.mark.slow
def test_models_to_the_end(
    scaling: ModuleType, workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Two sizes, trained for 2 and 3 steps with and without retrieval, in the workdir of a finished run."""
    workdir.rename(tmp_path / "seed_0")
    before = set((tmp_path / "seed_0" / "train").glob("*/manifest.json"))
    arguments = [str(TINY), "--workdir", str(tmp_path), "--sizes", "1x32", "2x32", "--steps", "2", "3"]
    files = ["--out", str(tmp_path / "out.json"), "--plot", str(tmp_path / "plot.png")]
    monkeypatch.setattr(sys, "argv", ["scaling.py", *arguments, *files, "--documents", "3"])
    scaling.main()
    made = set((tmp_path / "seed_0" / "train").glob("*/manifest.json")) - before
    new = [json.loads(path.read_text()) for path in made]
    said = [
        (each["config"]["model"]["num_layers"], each["config"]["steps"], "neighbors" in each["inputs"]) for each in new
    ]
    assert sorted(said) == [*itertools.product((1, 2), (2, 3), (False, True))]
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    found = results["seeds"]["0"]
    wanted = itertools.product(("1x32", "2x32"), (2, 3), ("ra_cm3", "cm3"))
    assert [*found] == [f"{name} {size} {steps}" for size, steps, name in wanted]
    for name, figures in found.items():
        loss, by_k = figures["loss"]["test"]["image"], figures["perplexity_by_k"]["test"]["image"]
        assert loss == pytest.approx(math.log(by_k[-1]))
        assert len(by_k) == (3 if name.startswith("ra_cm3") else 1)
    assert found["ra_cm3 1x32 2"]["flops"] < found["ra_cm3 1x32 3"]["flops"] < found["ra_cm3 2x32 3"]["flops"]
    assert [*results["laws"]["test"]["image"]] == ["ra_cm3", "cm3"]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "ra_cm3 2x32 3" in capsys.readouterr().out
