"""The masking of the paper's text against that of the authors' public code, each by a model trained with it.

    python benchmarks/masking.py --workdir DIR [CONFIG] [--seeds 0 1] [--samples 4] [--out FILE.json] [--help]

Options of `rac3` that follow hold for all variants, such as `--data-dir DIR`. Only the masking changes:

    config    its masking as it is
    ra_cm3    at least 0 spans in each document (the paper, section 3.3), no share of whole segments
    metaseq   spans of a whole group, as the public code draws them, which has no such share either

Each model is taken at the checkpoint that is best on `Data.tuning` (at its last where there is none) and measured by
its perplexity on the test split, with the documents that it retrieves; and, with `--samples`, by images and captions
that it makes, for which it has to fill in what was masked whole.
"""

from collections.abc import Mapping

from measure import record
from variants import (
    PACKAGES,
    Figures,
    Settings,
    add_samples,
    command,
    common,
    measure,
    measured,
    parser,
    run_main,
    table,
)

PRESETS = ("ra_cm3", "metaseq")
VARIANTS: dict[str, Settings] = {
    "config": {},
    **{preset: {"batches.masking.preset": preset, "batches.masking.whole-segments": "0"} for preset in PRESETS},
}


def accuracy_table(seeds: Mapping[str, Mapping[str, Figures]]) -> str:
    """A line for each variant and measure: the accuracies on the test split by seed."""
    lines = []
    for name in VARIANTS:
        found = [figures[name]["accuracy"]["test"] for figures in seeds.values()]
        for what in found[0]:
            values = [each[what] for each in found]
            if None not in values:
                lines.append(f"{name:10} {what:20} {' / '.join(f'{value:.1%}' for value in values)}")
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__, "masking_cpu.json")
    add_samples(options)
    arguments, overrides = options.parse_known_args()
    common_to_all = common(arguments, overrides)
    config, workdir = arguments.config, arguments.workdir
    seeds = measured(
        config, arguments.seeds, workdir, common_to_all, VARIANTS, lambda run: measure(run, arguments.samples)
    )
    print(table(seeds))
    if arguments.samples:
        print(f"\n{accuracy_table(seeds)}")
    if arguments.out:
        results = {"settings": VARIANTS, "seeds": seeds}
        arguments.out.write_text(record(command(), PACKAGES, results), encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
