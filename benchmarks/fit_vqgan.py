"""The reconstruction of held-out images by a VQGAN that is fitted in a given time.

    python benchmarks/fit_vqgan.py --data-dir DIR [--config emoji_captions] [--budget-minutes 10] [--name NAME]
        [--json FILE] [overrides of the config, as for `rac3 encoders`]

Fits the config's VQGAN on its training and memory documents as `rac3 encoders` does, then encodes and decodes all
validation images with the parameters that the fit would keep.

The budget covers the fit, but not reading documents and measuring. A trial of 60 steps measures the time of a step and
of compiling; the fit then has as many steps as the rest of the budget allows, so that its learning rate falls to 0 as
usual. `--json` adds the result to the file, replacing one with the same name.
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from measure import hardware

from rac3.cli import parse
from rac3.config import InputError, canonical, load_config_module
from rac3.documents.document import Document
from rac3.documents.reader import read_documents
from rac3.evaluation.reconstruction import reconstruction_metrics
from rac3.experiment import Experiment
from rac3.stages.fit.vqgan import fit_vqgan
from rac3.training.metrics import read_metrics
from rac3.vqgan.codec import VQGANCodec
from rac3.vqgan.model import VQGAN

TRIAL = 60  # steps, of which the last 40 are timed


def with_steps(experiment: Experiment, steps: int) -> Experiment:
    return replace(experiment, vqgan=replace(experiment.vqgan, fit=replace(experiment.vqgan.fit, steps=steps)))


def fit_within(experiment: Experiment, seconds: float) -> dict[str, Any]:
    """Fit and measure; times are in seconds."""
    limit = experiment.vqgan.fit.max_documents
    sources = {**experiment.data.memory, **experiment.data.sources()}

    def read(*splits: str) -> list[Document]:
        named = {split: sources[split] for split in splits}
        return read_documents(named, Path(experiment.data_dir), experiment.filter, limit)

    def fit(steps: int, folder: str) -> Any:
        config = with_steps(experiment, steps).vqgan
        return fit_vqgan(config, experiment.seed, experiment.mesh.build(), documents, Path(folder))

    documents, held_out = read(*experiment.data.fit_on), read("validation")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        fit(TRIAL, folder)
        step_seconds = sum(line["step_seconds"] for line in read_metrics(Path(folder))[1:]) / 2
    trial = time.monotonic() - started
    steps = int((seconds - trial - (trial - TRIAL * step_seconds)) / step_seconds)
    if steps < 1:
        raise InputError(f"--budget-minutes {seconds / 60:g} ends while the fit compiles; use more")
    cpu = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        params = fit(steps, folder)
        last = read_metrics(Path(folder))[-1]
    took, cpu = time.monotonic() - started, time.process_time() - cpu
    codec = VQGANCodec(VQGAN(experiment.vqgan.model), params)
    figures = reconstruction_metrics(codec, [image.pixels() for document in held_out for image in document.images])
    return {
        "validation": {"pictures": sum(len(document.images) for document in held_out), **figures},
        "tokens_per_image": codec.tokens_per_image,
        "codes": codec.codebook_size,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "training_pictures": sum(len(document.images) for document in documents),
        "steps": steps,
        "trial_step_seconds": step_seconds,
        "seconds": took,
        "cpu_seconds": cpu,
        "last_metrics": last,
        "vqgan": canonical(with_steps(experiment, steps).vqgan),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--config", default="emoji_captions", help="a shipped config, or the path of a config")
    parser.add_argument("--budget-minutes", type=float, default=10)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--name", help="of the result in the file; default: 64 tokens, for example")
    parser.add_argument("--note", default="", help="stored with the result")
    arguments, overrides = parser.parse_known_args()
    try:
        configured = load_config_module(arguments.config).get_config()
        experiment, _ = parse("encoders", replace(configured, data_dir=arguments.data_dir), overrides)
        result = fit_within(experiment, 60 * arguments.budget_minutes)
    except InputError as error:
        sys.exit(f"fit_vqgan: {error}")
    words = ["--budget-minutes", f"{arguments.budget_minutes:g}", *overrides]
    record = {
        "command": f"python benchmarks/fit_vqgan.py --data-dir DIR {shlex.join(words)}",
        "date": datetime.date.today().isoformat(),
        "hardware": f"{hardware()}, load average {os.getloadavg()[0]:.1f} at the end",
        "note": arguments.note,
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")},
        },
        **result,
    }
    print(json.dumps(record["validation"], indent=2), f"{record['steps']} steps in {record['seconds']:.0f} s", sep="\n")
    if arguments.json:
        results = json.loads(arguments.json.read_text(encoding="utf-8")) if arguments.json.exists() else {}
        results[arguments.name or f"{record['tokens_per_image']} tokens"] = record
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
