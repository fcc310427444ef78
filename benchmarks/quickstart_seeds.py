"""The quickstart's claims, checked with several seeds, each with its own world.

    python benchmarks/quickstart_seeds.py --workdir DIR [--seeds 0 1 2 3] [--out FILE.json]

Runs `rac3 run` once per seed in a new process, prints a table, and writes all figures with the date, the hardware and
the versions. Exit code 1 if a claim fails for any seed. Takes 10 minutes per seed on one core. Further options go to
`rac3 run`.
"""

import shlex
from typing import Any

from seeds import COSTS, conclude, failed, lookup, parser, run

CONFIG = """from rac3.configs.quickstart import get_config as quickstart


def get_config():
    return quickstart(seed={seed})
"""

CLAIMS = {
    "RA-CM3 draws at least 75% of the unseen entities in their settings": lambda f: (
        f["ra_cm3.joint_accuracy.unseen"] >= 0.75
    ),
    "RA-CM3 names at least 60% of them with their settings": lambda f: f["ra_cm3.joint_name_accuracy.unseen"] >= 0.6,
    "a copy shows at most 10%": lambda f: f["baselines.copied.joint_accuracy.unseen"] <= 0.1,
    "a copy names at most 10%": lambda f: f["baselines.copied.joint_name_accuracy.unseen"] <= 0.1,
    "a mean shows at most 10%": lambda f: f["baselines.mean.joint_accuracy.unseen"] <= 0.1,
    "CM3 at its best draws at most 10% of the entities": lambda f: f["cm3_best.entity_accuracy.unseen"] <= 0.1,
    "CM3 at its best names at most 10% of them": lambda f: f["cm3_best.name_accuracy.unseen"] <= 0.1,
    "the image perplexity is at most 0.65 of that of CM3 at its best": lambda f: (
        f["ra_cm3.perplexity.image"] <= 0.65 * f["cm3_best.perplexity.image"]
    ),
    "the text perplexity is at most 0.6 of that of CM3 at its best": lambda f: (
        f["ra_cm3.perplexity.text"] <= 0.6 * f["cm3_best.perplexity.text"]
    ),
    "recall at 2 is at least 0.8 by text": lambda f: f["retrieval.recall_at_2.text"] >= 0.8,
    "recall at 2 is at least 0.8 by image": lambda f: f["retrieval.recall_at_2.image"] >= 0.8,
    "with random documents RA-CM3 draws at most 10%": lambda f: f["ra_cm3_random.entity_accuracy.unseen"] <= 0.1,
    "under 6 GB of memory": lambda f: f["peak_gb"] is None or f["peak_gb"] < 6,
}
FIGURES = [
    *(
        f"{model}.{figure}"
        for model in ("ra_cm3", "cm3_best", "cm3", "ra_cm3_random")
        for figure in (
            "perplexity.image",
            "perplexity.text",
            "entity_accuracy.seen",
            "entity_accuracy.unseen",
            "joint_accuracy.seen",
            "joint_accuracy.unseen",
            "name_accuracy.unseen",
            "joint_name_accuracy.unseen",
        )
    ),
    "cm3_best.steps",
    *(
        f"baselines.{baseline}.{figure}.unseen"
        for baseline in ("copied", "mean", "reconstructed", "original")
        for figure in ("entity_accuracy", "joint_accuracy", "name_accuracy", "joint_name_accuracy")
    ),
    "retrieval.recall_at_2.text",
    "retrieval.recall_at_2.image",
]


def figures_of(metrics: dict[str, Any], cost: dict[str, Any]) -> dict[str, Any]:
    figures = {name: lookup(metrics, name) for name in FIGURES}
    figures |= {"encoders": metrics["encoders"], "stages": metrics["stages"], **cost}
    return figures | {"failed_claims": failed(CLAIMS, figures)}


def main() -> None:
    arguments, options = parser(__doc__, seeds=range(4)).parse_known_args()
    results = {
        str(seed): figures_of(*run(CONFIG.format(seed=seed), seed, arguments.workdir, options))
        for seed in arguments.seeds
    }
    command = shlex.join(
        ["python", "benchmarks/quickstart_seeds.py", "--workdir", "DIR", "--seeds", *results, *options]
    )
    conclude(command, results, [*FIGURES, *COSTS], arguments.out)


if __name__ == "__main__":
    main()
