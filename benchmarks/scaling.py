"""Scaling laws (paper, appendix C.2): the loss on held-out documents against the compute of the training.

    python benchmarks/scaling.py --workdir DIR [CONFIG] [--sizes 2x64 3x128 4x192] [--steps 150 300 600 1200]
                                 [--seeds 0] [--plot FILE.png] [--out FILE.json] [--help]

Options of `rac3` that follow hold for all models, such as `--data-dir DIR`. Each size (layers x width; the MLP is four
times as wide, and a head has the config's width) is trained with each number of steps, with and without retrieval. A
training gives a separate model, since its learning rate falls to zero at its end.

Loss: nats per image code, or per text token, in the main documents of a held-out split after their retrieved ones.
Compute: FLOPs of the Transformer's training, forward and backward, without padding (`rac3/training/flops.py`). What the
encoders and the retriever take is not in it.
Law: L = b C^-c, a straight line in logarithms, by least squares over the frontier: the models that no other one of at
most their compute beats. Too small models trained for long are not on it, and neither are those that are over-fitted.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from measure import record
from variants import PACKAGES, Figures, Settings, command, common, held_out_perplexities, measured, parser, run_main

from rac3.batches.loader import StreamState
from rac3.cli import load_experiment
from rac3.config import InputError
from rac3.experiment import Experiment
from rac3.run import Run
from rac3.training.flops import step_flops

SIZES, STEPS = ("2x64", "3x128", "4x192"), (150, 300, 600, 1200)
COUNTED = 256  # batches whose FLOPs are counted; more are as many each, on average
MODELS = {"ra_cm3": "with retrieval", "cm3": "without"}
COLORS = {"ra_cm3": "#c2410c", "cm3": "#475569"}
MARKERS = "os^Dv"


class Law(NamedTuple):
    """L = coefficient x C^-exponent; `r2` is the share of the variance of log L that it explains, over `points`."""

    exponent: float
    coefficient: float
    r2: float
    points: int

    def __call__(self, compute: float) -> float:
        return self.coefficient * compute**-self.exponent


def variants(experiment: Experiment, sizes: Sequence[str], steps: Sequence[int]) -> dict[str, Settings]:
    """The settings of each model, by a name such as "ra_cm3 3x128 600"; small ones first.

    Raises:
      InputError: a size is not LAYERSxWIDTH, or can't be divided into heads of the config's width.
    """
    width = experiment.model.embed // experiment.model.num_heads
    chosen: dict[str, Settings] = {}
    for size in sizes:
        layers, _, embed = size.partition("x")
        if not (layers.isdigit() and embed.isdigit()) or int(embed) % width:
            raise InputError(f"--sizes {size!r} is not LAYERSxWIDTH with heads of {width}; use 2x{2 * width}, say")
        model = {
            "model.num-layers": layers,
            "model.embed": embed,
            "model.num-heads": str(int(embed) // width),
            "model.mlp": str(4 * int(embed)),
        }
        for count in steps:
            length = {"training.steps": str(count), "training.checkpoint-every": str(count), "training.keep": "1"}
            chosen[f"ra_cm3 {size} {count}"] = {**model, **length}
            chosen[f"cm3 {size} {count}"] = {**model, **length, "retriever": "none"}
    return chosen


def training_flops(run: Run) -> float:
    """FLOPs of the whole training, each token attending to those up to itself in its group."""
    steps, model = run.experiment.training.steps, run.model
    counted = min(steps, COUNTED)
    batches = run.training_stream().batches(StreamState())
    count = jax.jit(lambda batch: step_flops(model, batch)[1])
    total = sum(float(count(next(batches)[0])) for _ in range(counted))
    return total * steps / counted


def measure(run: Run) -> Figures:
    """The figures of a trained model."""
    by_k = held_out_perplexities(run)
    losses = {
        split: {modality: None if each[-1] is None else math.log(each[-1]) for modality, each in found.items()}
        for split, found in by_k.items()
    }
    model = run.experiment.model
    return {
        "flops": training_flops(run),
        "parameters": run.trained_model().manifest["counts"]["parameters"],
        "size": f"{model.num_layers}x{model.embed}",
        "steps": run.experiment.training.steps,
        "loss": losses,
        "perplexity_by_k": by_k,
        "step_seconds": round(statistics.median(line["step_seconds"] for line in run.training_metrics()), 4),
    }


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (compute, loss) that no other point of at most that compute is below; by compute."""
    kept: list[tuple[float, float]] = []
    for compute, loss in sorted(points):
        if not kept or loss < kept[-1][1]:
            kept.append((compute, loss))
    return kept


def fit(points: Sequence[tuple[float, float]]) -> Law | None:
    """The law through the frontier of some points; None if it has fewer than three, which any law fits."""
    kept = frontier(points)
    if len(kept) < 3:
        return None
    x, y = np.log(np.array(kept)).T
    slope, offset = np.polyfit(x, y, 1)
    residual = y - slope * x - offset
    r2 = 1 - float(residual @ residual) / float(np.sum((y - y.mean()) ** 2))
    return Law(-float(slope), math.exp(offset), r2, len(kept))


def curves(seeds: Mapping[str, Mapping[str, Figures]]) -> dict[str, dict[str, dict[str, list[tuple[float, float]]]]]:
    """The points (FLOPs, loss) by split, modality and model; the loss is the mean over the seeds."""
    found: dict[str, dict[str, dict[str, list[tuple[float, float]]]]] = {}
    for name, first in next(iter(seeds.values())).items():
        flops = statistics.mean(figures[name]["flops"] for figures in seeds.values())
        for split, losses in first["loss"].items():
            for modality in losses:
                values = [figures[name]["loss"][split][modality] for figures in seeds.values()]
                if None not in values:
                    lines = found.setdefault(split, {}).setdefault(modality, {})
                    lines.setdefault(name.split()[0], []).append((flops, statistics.mean(values)))
    return found


def plot(found: Mapping[str, Any], sizes: Sequence[str], steps: Sequence[int], path: Path) -> None:
    """Draws loss against compute, logarithmic, a panel for each split and modality, with the laws as dashed lines."""
    from matplotlib.figure import Figure

    panels = [(split, modality) for split, by_modality in found.items() for modality in by_modality]
    figure = Figure(figsize=(4.4 * len(panels), 3.8), layout="constrained")
    for axes, (split, modality) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for model, points in found[split][modality].items():
            for number, size in enumerate(sizes):
                of_size = points[number * len(steps) : (number + 1) * len(steps)]
                marker = MARKERS[number % len(MARKERS)]
                label = f"{MODELS[model]}, {size}"
                axes.plot(*zip(*of_size, strict=True), marker=marker, color=COLORS[model], alpha=0.75, label=label)
            if law := fit(points):
                ends = [compute for compute, _ in frontier(points)]
                axes.plot(ends, [law(x) for x in ends], "--", color=COLORS[model], linewidth=2.2)
        axes.set(xscale="log", yscale="log", xlabel="FLOPs of the training", ylabel="nats per token")
        axes.set_title(f"{modality}, {split}", fontsize=10.5, loc="left", fontweight="bold")
        axes.grid(which="both", color="#e6e9ed", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 * len(panels), fontsize=8.5, frameon=False)
    figure.savefig(path, dpi=110)


def table(seeds: Mapping[str, Mapping[str, Figures]], laws: Mapping[str, Any]) -> str:
    """A line for each model, with the means over the seeds, and one for each law."""
    splits = [*next(iter(next(iter(seeds.values())).values()))["loss"]]
    columns = [(split, modality) for split in splits for modality in ("image", "text")]
    lines = [f"{'nats per token':24} {'FLOPs':>9}" + "".join(f"{f'{part}, {name}':>19}" for name, part in columns)]
    for name in next(iter(seeds.values())):
        all_figures = [figures[name] for figures in seeds.values()]
        cells = []
        for split, modality in columns:
            values = [figures["loss"][split][modality] for figures in all_figures]
            cells.append("-" if None in values else f"{statistics.mean(values):.3f}")
        flops = statistics.mean(figures["flops"] for figures in all_figures)
        lines.append(f"{name:24} {flops:9.2e}" + "".join(f"{cell:>19}" for cell in cells))
    for split, by_modality in laws.items():
        for modality, by_model in by_modality.items():
            for model, law in by_model.items():
                said = "fewer than three models on the frontier, no law"
                if law:
                    said = f"L = {law.coefficient:.3g} C^-{law.exponent:.3f}, R2 {law.r2:.2f} over {law.points} models"
                lines.append(f"{split} {modality}, {MODELS[model]}: {said}")
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__, "scaling_cpu.json")
    options.add_argument("--sizes", nargs="+", default=SIZES, help="layers x width of each")
    options.add_argument("--steps", type=int, nargs="+", default=STEPS, help="of each training")
    options.add_argument("--plot", type=Path, help="an image file")
    arguments, overrides = options.parse_known_args()
    chosen = variants(load_experiment(arguments.config), arguments.sizes, arguments.steps)
    seeds = measured(
        arguments.config, arguments.seeds, arguments.workdir, common(arguments, overrides), chosen, measure
    )
    found = curves(seeds)
    laws = {
        split: {modality: {model: fit(points) for model, points in lines.items()} for modality, lines in each.items()}
        for split, each in found.items()
    }
    print(table(seeds, laws))
    if arguments.plot:
        plot(found, arguments.sizes, arguments.steps, arguments.plot)
    if arguments.out:
        plain = {
            split: {part: {name: law and law._asdict() for name, law in each.items()} for part, each in parts.items()}
            for split, parts in laws.items()
        }
        arguments.out.write_text(record(command(), PACKAGES, {"laws": plain, "seeds": seeds}), encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
