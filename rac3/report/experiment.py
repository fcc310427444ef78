"""The report: everything that a workdir holds about an experiment, as `metrics.json` and as a page to read."""

import json
import os
import platform
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import jax

from rac3 import recipes
from rac3.artifacts.workdir import Workdir, write_atomic
from rac3.documents.document import plain_json
from rac3.experiment import Experiment
from rac3.report.page import Content, page
from rac3.report.samples import Samples
from rac3.report.table import ROWS, lookup, model_label, model_names, recall_rows
from rac3.stages.evaluate import SPLITS, comparisons, evaluate, evaluate_encoders
from rac3.stages.evaluate_retrieval import entity_recall
from rac3.stages.train import model_name
from rac3.training.metrics import read_metrics

Comparisons = Mapping[str, tuple[Experiment, Experiment]]  # name -> (retriever at inference, model)


def report(experiment: Experiment, workdir: Workdir, trained: Experiment | None = None) -> Path:
    """Writes `report/metrics.json` and `report/index.html` of the workdir; the path of the page.

    The model is that of `trained` (default: the experiment's own) with the retriever of `experiment`.

    Raises:
      InputError: something is not made yet; the message has the command that makes it.
    """
    metrics = collect(experiment, workdir, trained)
    content = _content(experiment, comparisons(experiment, trained or experiment), workdir, metrics)
    folder = workdir.path / "report"
    folder.mkdir(exist_ok=True)
    write_atomic(folder / "metrics.json", json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
    write_atomic(folder / "index.html", page(content))
    return folder / "index.html"


def collect(experiment: Experiment, workdir: Workdir, trained: Experiment | None = None) -> dict[str, Any]:
    """What `metrics.json` holds: plain JSON, with None where a number has no meaning.

    Raises:
      InputError: something is not made yet; the message has the command that makes it.
    """
    models = comparisons(experiment, trained or experiment)
    for inference, model in models.values():
        workdir.require(recipes.train(model), "rac3 train")
        workdir.require(recipes.evaluation(inference, model), "rac3 evaluate")
    values = {name: evaluate(inference, model, workdir) for name, (inference, model) in models.items()}
    k = experiment.evaluation.num_retrieved
    recall = {split: entity_recall(experiment, workdir, split, k) for split in SPLITS}
    metrics = {
        **{name: _model_metrics(model, values[name], workdir) for name, (_, model) in models.items()},
        "retrieval": {f"recall_at_{k}": recall["test"], "validation": {f"recall_at_{k}": recall["validation"]}},
        "encoders": evaluate_encoders(experiment, workdir),
        "documents": {
            split: workdir.require(recipes.documents(experiment, split), "rac3 ingest").manifest["counts"]
            for split in experiment.data.sources()
        },
        "evaluation": {
            "num_retrieved": k,
            "documents": {split: value["documents"] for split, value in next(iter(values.values())).items()},
        },
        "stages": _seconds(experiment, models, workdir),
        "versions": workdir.require(recipes.train(trained or experiment), "rac3 train").manifest["versions"],
    }
    return {name: plain_json(value) for name, value in metrics.items()}


def summary(metrics: Mapping[str, Any]) -> str:
    """The models of `metrics.json` side by side as plain text for a terminal, then the recall of retrieval."""
    names = model_names(metrics)
    rows = [["", *(model_label(name) for name in names)]]
    for row in ROWS:
        values = [lookup(metrics[name], row.path) for name in names]
        if any(value is not None for value in values):
            rows.append([row.label, *("-" if value is None else row.show(value) for value in values)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([label.ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(cells, widths[1:], strict=True))])
        for label, *cells in rows
    ]
    for split, k, recalls in recall_rows(metrics):
        parts = ", ".join(f"{share:.1%} by {part}" for part, share in recalls.items())
        lines.append(f"retrieval recall at {k}, {split}: {parts}")
    return "\n".join(line.rstrip() for line in lines)


def _model_metrics(trained: Experiment, values: Mapping[str, Any], workdir: Workdir) -> dict[str, Any]:
    def seen_and_unseen(name: str) -> dict[str, float | None]:
        return {"seen": lookup(values, ("validation", name)), "unseen": lookup(values, ("test", name))}

    train = workdir.require(recipes.train(trained), "rac3 train").manifest
    return {
        "perplexity": {modality: lookup(values, ("test", "perplexity", modality)) for modality in ("image", "text")},
        "perplexity_by_k": {split: value["perplexity_by_k"] for split, value in values.items()},
        **{name: seen_and_unseen(name) for name in ("entity_accuracy", "name_accuracy", "clip_score")},
        "parameters": train["counts"]["parameters"],
        "steps": trained.training.steps,
    }


def _seconds(experiment: Experiment, models: Comparisons, workdir: Workdir) -> dict[str, float]:
    """Seconds by stage, of the artifacts that the report rests on."""
    splits = list(experiment.data.sources())
    retrieving = [inference for inference, _ in models.values() if recipes.retrieves(inference)]
    made = {
        "text": [recipes.text(experiment)],
        "vqgan": [recipes.vqgan(experiment)],
        "clip": [recipes.clip(experiment)],
        "ingest": [recipes.documents(experiment, split) for split in splits],
        "embed": [
            recipe(experiment, split)
            for recipe, role in ((recipes.embeddings, "held out"), (recipes.queries, "memory"))
            for split in splits
            if experiment.data.role(split) != role
        ],
        "index": [recipes.index(e, part) for e in retrieving for part in recipes.memory_splits(e, "test")],
        "retrieve": [
            recipes.neighbors(e, split) for e in retrieving for split in splits if e.data.role(split) != "memory"
        ],
        **{f"train {model_name(model)}": [recipes.train(model)] for _, model in models.values()},
        "evaluate": [recipes.evaluation(inference, model) for inference, model in models.values()],
    }
    seconds = {}
    for stage, needed in made.items():
        found = [artifact for recipe in needed if (artifact := workdir.find(recipe))]
        if found:
            seconds[stage] = round(sum(float(artifact.manifest["seconds"]) for artifact in found), 2)
    return seconds


def _content(experiment: Experiment, models: Comparisons, workdir: Workdir, metrics: Mapping[str, Any]) -> Content:
    own = next(iter(models))
    shown = {name: recipes.evaluation(*models[name]) for name in models if name in (own, "cm3")}  # not the control
    split = next((split for split in reversed(SPLITS) if split in experiment.data.sources()), None)
    samples = None if split is None else Samples.open(experiment, workdir, split, shown)
    encoders = (recipes.vqgan(experiment), recipes.clip(experiment))
    return Content(
        name=experiment.name,
        metrics=metrics,
        facts=_facts(experiment, workdir, metrics),
        training={
            model_name(model): read_metrics(workdir.require(recipes.train(model), "rac3 train").folder)
            for _, model in models.values()
        },
        fitting={recipe.stage: read_metrics(workdir.require(recipe, "rac3 encoders").folder) for recipe in encoders},
        split=split or "",
        strips=samples.strips() if samples else [],
        captions=samples.captions() if samples else [],
        reconstructions=samples.reconstructions() if samples else [],
    )


def _facts(experiment: Experiment, workdir: Workdir, metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    devices = jax.devices()
    model, evaluation = experiment.model, experiment.evaluation
    facts = [
        ("config", experiment.name),
        ("workdir", str(workdir.path.resolve())),
        ("seed", str(experiment.seed)),
        ("model", f"{model.num_layers} layers, width {model.embed}, context {experiment.batches.context_length}"),
    ]
    for name in (name for name in model_names(metrics) if not name.endswith("_random")):  # the same model again
        values = metrics[name]
        facts.append((model_label(name), f"{values['parameters']:,} parameters, {values['steps']:,} steps"))
    if recipes.retrieves(experiment):
        retriever = type(experiment.retriever).__name__
        facts.append(("retriever", f"{retriever}, {evaluation.num_retrieved} documents in context"))
    facts += [
        (
            "samples",
            f"{evaluation.image_samples} per picture drawn, {evaluation.caption_samples} per caption written",
        ),
        ("versions", ", ".join(f"{package} {version}" for package, version in metrics["versions"].items())),
        ("report made", f"{datetime.now():%Y-%m-%d %H:%M}"),
        ("on", f"{len(devices)} x {devices[0].device_kind}, {os.cpu_count()} CPU cores, {platform.platform()}"),
    ]
    return facts
