"""Shared by the benchmarks that compare designs: trains variants of a config and measures them on held-out documents.

A variant is a few settings, given as `rac3` takes them on its command line. All variants of a seed have one workdir, so
that only what a variant changes is made again; and a run that was killed goes on where it was.
"""

import argparse
import inspect
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import jax

from rac3 import cli, recipes
from rac3.artifacts.workdir import Workdir
from rac3.config import InputError, load_config_module
from rac3.devices.cpu import keep_freed_memory
from rac3.generation.tasks.score import make_token_cross_entropy
from rac3.held_out import SPLITS, held_out
from rac3.run import Run, keep_programs
from rac3.stages.evaluate import MODALITIES, best_step, evaluate, perplexities
from rac3.stages.evaluate_retrieval import entity_recall
from rac3.training.preemption import RUN_AGAIN, PreemptedError

PACKAGES = ("rac3", "jax", "jaxlib", "flax", "numpy", "scann")
LOCAL = ("--workdir", "--out", "--plot")  # options that say where files go
SEEDED = """from dataclasses import replace

from rac3.config import load_config_module


def get_config():
    return {config}
"""
# Two-sided 95% quantiles of Student's t by degrees of freedom, from 1; the last one, a little wide, for more.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

Settings = Mapping[str, str]  # {"query-dropout": "0", "retriever": "random"}
Figures = dict[str, Any]


def parser(doc: str, out: str) -> argparse.ArgumentParser:
    """The options that both benchmarks have; those of `rac3` may follow, for all variants."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("config", nargs="?", default="quickstart", help="a .py file, or the name of a shipped config")
    made.add_argument("--workdir", type=Path, required=True, help="takes a workdir for each seed")
    made.add_argument("--seeds", type=int, nargs="+", default=[0])
    made.add_argument("--documents", type=int, help="evaluated of each held-out split; the config's unless given")
    made.add_argument("--out", type=Path, help=f"as benchmarks/results/{out}")
    return made


def add_samples(options: argparse.ArgumentParser) -> None:
    """The option that `common` and `measure` take."""
    options.add_argument("--samples", type=int, default=0, help="drawn and written for accuracies; 0: perplexity alone")


def command() -> str:
    """This command, without where its files go."""
    kept, words = [], iter(sys.argv[1:])
    for word in words:
        if word in LOCAL:
            next(words, None)
        elif word.partition("=")[0] not in LOCAL:
            kept.append(word)
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *kept])


def common(arguments: argparse.Namespace, overrides: Sequence[str]) -> list[str]:
    """What all variants are run with."""
    documents = [] if arguments.documents is None else ["--evaluation.documents", str(arguments.documents)]
    count = str(getattr(arguments, "samples", 0))
    samples = ["--evaluation.image-samples", count, "--evaluation.caption-samples", count] if count != "0" else []
    return [*overrides, *documents, "--no-compare-with-cm3", *samples]


def flags(settings: Settings) -> list[str]:
    """{"retriever": "none", "batches.num-retrieved": "0 1"} -> --batches.num-retrieved 0 1 retriever:none"""
    plain = [part for name, value in settings.items() if name != "retriever" for part in (f"--{name}", *value.split())]
    return plain + (f"retriever:{settings['retriever']}".split() if "retriever" in settings else [])


def seeded(config: str, seed: int, folder: Path) -> Path:
    """Writes a config file `folder/seed_N.py`: `config` with this seed, and with its world if that has a seed too."""
    name = str(Path(config).resolve()) if config.endswith(".py") else config
    get_config = load_config_module(name).get_config
    takes_seed = "seed" in inspect.signature(get_config).parameters
    call = f"load_config_module({name!r}).get_config({f'seed={seed}' if takes_seed else ''})"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"seed_{seed}.py"
    path.write_text(SEEDED.format(config=call if takes_seed else f"replace({call}, seed={seed})"), encoding="utf-8")
    return path


def open_variant(config: Path, overrides: Sequence[str], settings: Settings) -> tuple[list[str], Run]:
    """The arguments of `rac3` for a variant, and its run, of which nothing need be made yet."""
    arguments = ["--workdir", str(config.with_suffix("")), *overrides, *flags(settings)]
    experiment, _ = cli.parse("train", cli.load_experiment(str(config)), arguments)
    return [str(config), *arguments], Run(experiment, Workdir(experiment.folder, experiment.name))


def measured(
    config: str,
    seeds: Sequence[int],
    workdir: Path,
    overrides: Sequence[str],
    variants: Mapping[str, Settings],
    measure: Callable[[Run], Figures],
) -> dict[str, dict[str, Figures]]:
    """By seed and variant, what `measure` says of each trained run. Prints which variant is next, and the time left.

    Raises:
      InputError, PreemptedError: as `rac3 prepare` and `rac3 train`.
    """
    found: dict[str, dict[str, Figures]] = {str(seed): {} for seed in seeds}
    jobs = [(seed, name) for seed in seeds for name in variants]
    took: list[float] = []  # seconds of each variant that was not trained yet
    keep_freed_memory()
    for number, (seed, name) in enumerate(jobs):
        arguments, run = open_variant(seeded(config, seed, workdir), overrides, variants[name])
        left = statistics.mean(took) * (len(jobs) - number) if took else None
        eta = f"; at most {timedelta(seconds=round(left))} left" if left else ""
        print(f"== {number + 1} of {len(jobs)}: seed {seed}, {name} [{' '.join(arguments[3:])}]{eta}", flush=True)
        started, fresh = time.monotonic(), run.workdir.find(run.training_recipe) is None
        cli.run(["prepare", *arguments])
        keep_programs(run.workdir.path)
        cli.run(["train", *arguments])
        found[str(seed)][name] = measure(run)
        jax.clear_caches()  # programs of other variants, which stay on disk
        if fresh:
            took.append(time.monotonic() - started)
    return found


def held_out_perplexities(run: Run) -> dict[str, dict[str, list[float | None]]]:
    """Perplexity by split and modality with 0, 1, ... documents in context, as `rac3 evaluate` has it."""
    experiment, cross_entropy, most = run.experiment, make_token_cross_entropy(run.model), 0
    if experiment.retrieves:
        most = min(experiment.evaluation.num_retrieved, max(experiment.batches.num_retrieved))
    found: dict[str, dict[str, list[float | None]]] = {}
    for split in SPLITS:
        if split in experiment.data.sources():
            by_k = [perplexities(run, cross_entropy, *held_out(run, split), k) for k in range(most + 1)]
            found[split] = {modality: [each[modality] for each in by_k] for modality, _, _ in MODALITIES}
    return found


def accuracies(run: Run) -> dict[str, dict[str, float | None]]:
    """Entity and joint accuracies by split of what the run draws and writes, as `rac3 evaluate` has them."""
    names = ("entity_accuracy", "joint_accuracy", "name_accuracy", "joint_name_accuracy")
    return {split: {name: figures[name] for name in names} for split, figures in evaluate(run).items()}


def neighbor_counts(run: Run) -> dict[str, dict[str, int]]:
    """By split, how many queries and neighbors there are, and how many candidates each rule of selection dropped."""
    found = {}
    for split in ("train", *SPLITS):
        if split in run.experiment.data.sources():
            counts = run.artifact(recipes.neighbors, split).manifest["counts"]
            wanted = ("queries", "neighbors", *(name for name in counts if name.startswith("dropped_")))
            found[split] = {name: counts[name] for name in wanted}
    return found


def measure(run: Run, samples: int) -> Figures:
    """The figures of a trained variant; accuracies only of `samples` images and captions for each document."""
    tuned = run.experiment.data.tuning is not None
    at = run.variant(run.experiment, run.trained, best_step(run)) if tuned else run
    by_k = held_out_perplexities(at)
    steps = [line["step_seconds"] for line in run.training_metrics()]
    return {
        "step": at.step or run.experiment.training.steps,
        "perplexity": {split: {name: each[-1] for name, each in found.items()} for split, found in by_k.items()},
        "perplexity_by_k": by_k,
        **({"accuracy": accuracies(at)} if samples else {}),
        **({"neighbors": neighbor_counts(run)} if run.experiment.retrieves else {}),
        "recall": entity_recall(run, "test", run.experiment.evaluation.num_retrieved),
        "step_seconds": round(statistics.median(steps), 4),
    }


def table(seeds: Mapping[str, Mapping[str, Figures]]) -> str:
    """A line for each variant: its mean perplexities on the test split over the seeds, with their 95% intervals."""
    lines = [f"{'test split':24} {'image perplexity':>24} {'text perplexity':>24}   best steps"]
    for name in next(iter(seeds.values())):
        cells = []
        for modality in ("image", "text"):
            values = [figures[name]["perplexity"]["test"][modality] for figures in seeds.values()]
            cells.append(_cell(values) if None not in values else "-")
        steps = " ".join(str(figures[name]["step"]) for figures in seeds.values())
        lines.append(f"{name:24} {cells[0]:>24} {cells[1]:>24}   {steps}")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    ends = interval(values)
    return f"{statistics.mean(values):.3f}" + (f" ({ends[0]:.3f} to {ends[1]:.3f})" if ends else "")


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95% interval of the mean of normal values (Student's t); None of fewer than two."""
    if len(values) < 2:
        return None
    mean, error = statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))
    half = STUDENT[min(len(values) - 1, len(STUDENT)) - 1] * error
    return mean - half, mean + half


def run_main(main: Callable[[], None]) -> None:
    """Runs `main`; one line on bad input and on a stop, after which the same command goes on."""
    try:
        main()
    except InputError as error:
        print(f"{error}", file=sys.stderr)
        sys.exit(2)
    except PreemptedError as error:
        print(f"{error}", file=sys.stderr)
        sys.exit(RUN_AGAIN)
