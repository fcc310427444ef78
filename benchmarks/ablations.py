"""The ablations of the paper (appendix C.3), each a separate model, and which of its five orderings hold.

    python benchmarks/ablations.py --workdir DIR [CONFIG] [--seeds 0 1 2] [--steps 600] [--out FILE.json] [--help]

Options of `rac3` that follow hold for all variants, such as `--data-dir DIR`. `full` retrieves relevant whole documents
with redundancy avoidance and query dropout, and weighs them by alpha = 0.1. Every other variant changes one thing:

    random, none             what is retrieved, in training and at inference
    image only, text only    the part of a retrieved document that is in context, likewise
    no redundancy avoidance  selection.max_similarity = 1, likewise
    no query dropout         queries of the training; at inference there never is any
    alpha 0, alpha 1         the loss weight of retrieved documents, in training
    K of 0 1, K of 2         how many documents are in context in training; at inference as many as that at most

Strengths are the config's: of redundancy avoidance and query dropout, or the paper's where the config has none. Each
model is taken at the checkpoint that is best on `Data.tuning` (at its last where there is none) and measured by its
perplexity on the test split, with the documents that its own retriever finds.
"""

import math
import statistics
from collections.abc import Mapping
from typing import Any

from measure import record
from variants import (
    PACKAGES,
    Figures,
    Settings,
    add_samples,
    command,
    common,
    interval,
    measure,
    measured,
    parser,
    run_main,
    table,
)

from rac3.cli import load_experiment
from rac3.config import InputError
from rac3.experiment import Experiment

DROPOUT, SIMILARITY, ALPHA = 0.2, 0.9, 0.1  # the paper's (sections 3.2 and 3.3)
FULL = "full"
ORDERINGS = {
    "relevant documents beat random ones": ("random",),
    "whole documents beat images alone and texts alone": ("image only", "text only"),
    "redundancy avoidance helps": ("no redundancy avoidance",),
    "query dropout helps": ("no query dropout",),
    "alpha = 0.1 beats 0 and 1": ("alpha 0", "alpha 1"),
}
"""What the paper found: `full` beats each of these."""


def variants(experiment: Experiment, steps: int | None) -> dict[str, Settings]:
    """The settings of each variant.

    Raises:
      InputError: the config retrieves nothing, or has no test split.
    """
    if not experiment.retrieves:
        raise InputError(f"config {experiment.name!r} retrieves nothing; give one with a retriever")
    if experiment.data.test is None:
        raise InputError(f"config {experiment.name!r} has no data.test, on which all variants are measured; give one")
    similarity = experiment.selection.max_similarity
    full = {
        "query-dropout": str(experiment.query_dropout or DROPOUT),
        "selection.max-similarity": str(similarity if similarity < 1 else SIMILARITY),
        "batches.retrieved": "document",
        "batches.retrieved-weight": str(ALPHA),
        **({} if steps is None else {"training.steps": str(steps)}),
    }
    changes: dict[str, Settings] = {
        FULL: {},
        "random": {"retriever": f"random --retriever.num-neighbors {experiment.retriever.num_neighbors}"},
        "image only": {"batches.retrieved": "image"},
        "text only": {"batches.retrieved": "text"},
        "no redundancy avoidance": {"selection.max-similarity": "1"},
        "no query dropout": {"query-dropout": "0"},
        "alpha 0": {"batches.retrieved-weight": "0"},
        "alpha 1": {"batches.retrieved-weight": "1"},
        "none": {"retriever": "none"},
        "K of 0 1": {"batches.num-retrieved": "0 1", "evaluation.num-retrieved": "1"},
        "K of 2": {"batches.num-retrieved": "2"},
    }
    return {name: {**full, **change} for name, change in changes.items()}


def loss(figures: Figures) -> float:
    """The mean over image and text of the log of the perplexity on the test split (nats).

    Raises:
      ValueError: there is no perplexity.
    """
    values = [value for value in figures["perplexity"]["test"].values() if value is not None]
    return statistics.mean(map(math.log, values))


def orderings(seeds: Mapping[str, Mapping[str, Figures]]) -> dict[str, Any]:
    """Which orderings of the paper hold, for each seed and for the mean over seeds.

    The gain of `full` over another variant is the difference of their `loss`: 0.1 is a perplexity that is lower by 10%,
    in the geometric mean of image and text. An ordering holds if all its gains are above 0. It is `clear` if the 95%
    intervals of their means over seeds are, too; with one seed there is none, and `clear` is None. An ordering whose
    variants are not all there is left out.
    """
    found, there = {}, next(iter(seeds.values()))
    for ordering, others in ORDERINGS.items():
        if not {FULL, *others} <= set(there):
            continue
        gains = {
            name: {seed: loss(figures[name]) - loss(figures[FULL]) for seed, figures in seeds.items()}
            for name in others
        }
        intervals = {name: interval([*by_seed.values()]) for name, by_seed in gains.items()}
        known = [each for each in intervals.values() if each is not None]
        found[ordering] = {
            "holds": all(statistics.mean(by_seed.values()) > 0 for by_seed in gains.values()),
            "clear": all(low > 0 for low, _ in known) if known else None,
            "holds_by_seed": {seed: all(by_seed[seed] > 0 for by_seed in gains.values()) for seed in seeds},
            "gain_over": {
                name: {"mean": statistics.mean(by_seed.values()), "interval": intervals[name], "by_seed": by_seed}
                for name, by_seed in gains.items()
            },
        }
    return found


def verdicts(found: Mapping[str, Any]) -> str:
    """A line for each ordering."""
    lines = []
    for ordering, result in found.items():
        said = "holds" if result["holds"] else "FAILS"
        said += {True: ", clearly", False: ", within the noise of the seeds", None: ", of one seed"}[result["clear"]]
        gains = []
        for name, gain in result["gain_over"].items():
            ends = " ({:+.3f} to {:+.3f})".format(*gain["interval"]) if gain["interval"] else ""
            gains.append(f"{name} {gain['mean']:+.3f}{ends}")
        seeds = [*result["holds_by_seed"].values()]
        lines.append(f"{ordering}: {said}; in {sum(seeds)} of {len(seeds)} seeds; gain over {', '.join(gains)}")
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__, "ablations_cpu.json")
    options.add_argument("--steps", type=int, help="of each training; the config's unless given")
    add_samples(options)
    options.add_argument("--only", nargs="+", metavar="VARIANT", help="such as full 'alpha 0'; all unless given")
    arguments, overrides = options.parse_known_args()
    chosen = variants(load_experiment(arguments.config), arguments.steps)
    for name in arguments.only or ():
        if name not in chosen:
            raise InputError(f"--only {name!r} is no variant; there are: {', '.join(chosen)}")
    chosen = {name: settings for name, settings in chosen.items() if name in (arguments.only or chosen)}
    overrides = common(arguments, overrides)
    seeds = measured(
        arguments.config,
        arguments.seeds,
        arguments.workdir,
        overrides,
        chosen,
        lambda run: measure(run, arguments.samples),
    )
    found = orderings(seeds)
    print(f"{table(seeds)}\n\n{verdicts(found)}")
    if arguments.out:
        results = {"settings": chosen, "orderings": found, "seeds": seeds}
        arguments.out.write_text(record(command(), PACKAGES, results), encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
