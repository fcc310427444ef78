"""The paper's claim on real pictures, checked with several seeds: RA-CM3 against CM3 on subjects that neither saw.

    python benchmarks/emoji_data.py --out DIR
    python benchmarks/emoji_seeds.py --data-dir DIR --workdir WORKDIR [--seeds 0 1 2] [--out FILE.json]
    python benchmarks/emoji_seeds.py --data-dir DIR --workdir WORKDIR --tuning  # to choose settings with

Runs `rac3 run` with `configs/emoji_captions.py` once per seed in a new process, prints a table, and writes all figures
with the date, the hardware and the versions. Exit code 1 if a claim fails for any seed. A run that was killed goes on.

CM3 is taken at its best by the documents of `unseen-tuning`, or by those of `validation` in a folder that has none, and
at its last step. One step can't be best for texts and images alike, so each ratio is to the better of the two. With
`--tuning`, those documents are measured, and `unseen-test` is not read. Further options go to `rac3 run`.
"""

import shlex
import sys
from pathlib import Path
from typing import Any

from seeds import COSTS, conclude, failed, lookup, parser, run

CONFIG = """from dataclasses import replace

from rac3.configs.emoji_captions import get_config as emoji_captions
from rac3.documents.webdataset import WebDataset


def get_config():
    config = emoji_captions()
    data = replace(config.data, validation=None, test=WebDataset({test!r}), tuning={tuning})
    return replace(config, seed={seed}, data=data)
"""
FD = "FD (EfficientNet-Lite0)"
MEASURES = {
    "perplexity.image": "perplexity.image",
    "perplexity.text": "perplexity.text",
    "cider_d": "captions.test.cider_d.value",
    "name_accuracy": "name_accuracy.unseen",
    "fd": f"pictures.test.{FD}.frechet.value",
    "kid": f"pictures.test.{FD}.kid.value",
    "clip_score": "clip_score.unseen",
}
COLUMNS = {
    "ra_cm3": "ra_cm3",
    "cm3_best": "cm3_best",
    "cm3": "cm3",
    "ra_cm3_random": "ra_cm3_random",
    "copy": "baselines.copied",
    "mean": "baselines.mean",
    "vqgan": "baselines.reconstructed",
    "original": "baselines.original",
}
BETTER = {  # of two CM3s, by what RA-CM3 is compared in
    **dict.fromkeys(("perplexity.text", "perplexity.image", "kid", "fd"), min),
    **dict.fromkeys(("cider_d", "name_accuracy"), max),
}

CLAIMS = {
    "recall at 2 by text is at least 0.75": lambda f: f["recall.text"] >= 0.75,
    "recall at 2 by image is at least 0.45": lambda f: f["recall.image"] >= 0.45,
    "the text perplexity is at most 0.5 of that of CM3": lambda f: f["ratio.perplexity.text"] <= 0.5,
    "the image perplexity is at most 0.95 of that of CM3": lambda f: f["ratio.perplexity.image"] <= 0.95,
    "CIDEr-D is at least 1.3 of that of CM3": lambda f: f["ratio.cider_d"] >= 1.3,
    "KID is at most 0.8 of that of CM3": lambda f: f["ratio.kid"] <= 0.8,
    "FD is at most 0.8 of that of CM3": lambda f: f["ratio.fd"] <= 0.8,
    "captions name the subject five times as often as those of CM3": lambda f: (
        f["ra_cm3.name_accuracy"] > 0 and f["ra_cm3.name_accuracy"] >= 5 * f["better.name_accuracy"]
    ),
    "with random documents, no perplexity is below that of CM3": lambda f: all(
        f[f"ra_cm3_random.perplexity.{modality}"] >= f[f"better.perplexity.{modality}"]
        for modality in ("image", "text")
    ),
}


def config_of(seed: int, data_dir: Path, tuning: bool) -> str:
    """The text of the config of a seed."""
    held_out = "unseen-tuning" if (data_dir / "unseen-tuning").is_dir() else "validation"
    chosen = f"WebDataset({held_out!r})"
    if tuning:
        return CONFIG.format(seed=seed, test=held_out, tuning=None)
    return CONFIG.format(seed=seed, test="unseen-test", tuning=chosen)


def figures_of(metrics: dict[str, Any], cost: dict[str, Any]) -> dict[str, Any]:
    """By name, those of each column; those of the better CM3, and the ratios of RA-CM3 to them; and the recalls."""
    figures: dict[str, Any] = {
        f"{column}.{name}": lookup(metrics, f"{place}.{path}")
        for column, place in COLUMNS.items()
        for name, path in MEASURES.items()
    }
    for name, better in BETTER.items():
        found = [value for model in ("cm3_best", "cm3") if (value := figures[f"{model}.{name}"]) is not None]
        ours, theirs = figures[f"ra_cm3.{name}"], better(found) if found else None
        figures[f"better.{name}"] = theirs
        figures[f"ratio.{name}"] = ours / theirs if ours is not None and theirs else None
    figures |= {f"recall.{part}": share for part, share in metrics["retrieval"]["recall_at_2"].items()}
    figures |= {name: metrics[name] for name in metrics if "perplexity_by_k" in metrics[name] or name == "encoders"}
    figures |= {"baselines": metrics["baselines"], "stages": metrics["stages"], **cost}
    return figures | {"failed_claims": failed(CLAIMS, figures)}


def main() -> None:
    arguments = parser(__doc__, seeds=range(3))
    arguments.add_argument("--data-dir", type=Path, required=True)
    arguments.add_argument("--tuning", action="store_true")
    chosen, options = arguments.parse_known_args()
    results = {
        str(seed): figures_of(
            *run(
                config_of(seed, chosen.data_dir, chosen.tuning),
                seed,
                chosen.workdir,
                ["--data-dir", str(chosen.data_dir), *options],
            )
        )
        for seed in chosen.seeds
    }
    words = [
        "--data-dir",
        "DIR",
        "--workdir",
        "WORKDIR",
        "--seeds",
        *results,
        *(["--tuning"] * chosen.tuning),
        *options,
    ]
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])
    names = [
        *(f"ratio.{name}" for name in BETTER),
        "recall.text",
        "recall.image",
        *(f"{column}.{name}" for column in COLUMNS for name in MEASURES),
        *COSTS,
    ]
    conclude(command, results, names, chosen.out)


if __name__ == "__main__":
    main()
