"""The report: everything that a workdir holds about an experiment, as `metrics.json` and as a page to read."""

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jax

from rac3 import recipes
from rac3.artifacts.workdir import write_atomic
from rac3.documents.document import Judge, plain_json
from rac3.report.page import Content, page
from rac3.report.samples import Samples
from rac3.report.table import (
    columns,
    left_out_lines,
    lookup,
    model_label,
    model_names,
    peers,
    ratio_line,
    recall_rows,
    unjudged_line,
    value_rows,
)
from rac3.run import Run
from rac3.stages.evaluate import ACCURACIES, SPLITS, comparisons, evaluate, evaluate_encoders
from rac3.stages.evaluate_retrieval import entity_recall
from rac3.training.metrics import read_metrics

SEEN = {"seen": "validation", "unseen": "test"}  # which entities of the procedural world, and their split


def report(run: Run) -> Path:
    """Writes `report/metrics.json` and `report/index.html` of the workdir; the path of the page.

    Raises:
      InputError: something is not made yet; the message has the command that makes it.
    """
    metrics = collect(run)
    content = _content(run, comparisons(run), metrics)
    folder = run.workdir.path / "report"
    folder.mkdir(exist_ok=True)
    write_atomic(folder / "metrics.json", json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
    write_atomic(folder / "index.html", page(content))
    return folder / "index.html"


def collect(run: Run) -> dict[str, Any]:
    """What `metrics.json` holds: plain JSON, with None where a number has no meaning.

    Raises:
      InputError: something is not made yet; the message has the command that makes it.
    """
    models, experiment = comparisons(run), run.experiment
    for compared in models.values():
        compared.trained_model()
        compared.evaluation()
    values = {name: evaluate(compared) for name, compared in models.items()}
    k = experiment.evaluation.num_retrieved
    recall = {split: entity_recall(run, split, k) for split in SPLITS}
    metrics = {
        **{name: _model_metrics(compared, values[name]) for name, compared in models.items()},
        "retrieval": {f"recall_at_{k}": recall["test"], "validation": {f"recall_at_{k}": recall["validation"]}},
        "baselines": _baselines(next(iter(values.values()))),
        "encoders": evaluate_encoders(run),
        "documents": {
            split: run.artifact(recipes.documents, split).manifest["counts"] for split in experiment.data.sources()
        },
        "evaluation": {
            "num_retrieved": k,
            "documents": {split: value["documents"] for split, value in next(iter(values.values())).items()},
            "entity_field": experiment.data.entity_field,
            "judged": [*experiment.data.train.judged] if isinstance(experiment.data.train, Judge) else [],
            "with_entity": {
                split: value.get("with_entity", value["documents"])
                for split, value in next(iter(values.values())).items()
            },
        },
        "stages": _seconds(run, models),
        "versions": run.trained_model().manifest["versions"],
    }
    return {name: plain_json(value) for name, value in metrics.items()}


def summary(metrics: Mapping[str, Any]) -> str:
    """The models of `metrics.json` side by side as plain text for a terminal, then the recall of retrieval."""
    rows = value_rows(columns(metrics))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([label.ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(cells, widths[1:], strict=True))])
        for label, *cells in rows
    ]
    for split, k, recalls in recall_rows(metrics):
        parts = ", ".join(f"{share:.1%} by {part}" for part, share in recalls.items())
        lines.append(f"retrieval recall at {k}, {split}: {parts}")
    lines += filter(None, [ratio_line(metrics), *left_out_lines(metrics), unjudged_line(metrics)])
    return "\n".join(line.rstrip() for line in lines)


def _model_metrics(run: Run, values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "perplexity": {modality: lookup(values, ("test", "perplexity", modality)) for modality in ("image", "text")},
        "perplexity_by_k": {split: value["perplexity_by_k"] for split, value in values.items()},
        "fewer_than_k": {split: value.get("fewer_than_k", {}) for split, value in values.items()},
        **_seen_and_unseen(values),
        **_scores(values),
        "clip_score": {which: lookup(values, (split, "clip_score")) for which, split in SEEN.items()},
        "parameters": run.trained_model().manifest["counts"]["parameters"],
        "steps": run.step or run.trained.training.steps,
    }


def _seen_and_unseen(values: Mapping[str, Any], *path: str) -> dict[str, dict[str, float | None]]:
    """The accuracies at a path of each split's values."""
    return {name: {which: lookup(values, (split, *path, name)) for which, split in SEEN.items()} for name in ACCURACIES}


def _scores(values: Mapping[str, Any], *path: str) -> dict[str, Any]:
    """The scores of captions and pictures at a path of each split's values."""
    return {
        kind: {split: lookup(value, (*path, kind)) or {} for split, value in values.items()}
        for kind in ("captions", "pictures")
    }


def _baselines(values: Mapping[str, Any]) -> dict[str, Any]:
    """The accuracies and scores of each baseline of any split."""
    names = dict.fromkeys(name for value in values.values() for name in value.get("baselines", {}))
    return {
        name: {**_seen_and_unseen(values, "baselines", name), **_scores(values, "baselines", name)} for name in names
    }


def _seconds(run: Run, models: Mapping[str, Run]) -> dict[str, float]:
    """Seconds by stage, of the artifacts that the report rests on. Some stages make several at a time."""
    experiment, splits = run.experiment, list(run.experiment.data.sources())
    memory = experiment.data.memory_splits("test")
    retrieving = [compared for compared in models.values() if compared.experiment.retrieves]
    made = {
        "text": [run.recipe(recipes.text)],
        "vqgan": [run.recipe(recipes.vqgan)],
        "clip": [run.recipe(recipes.clip)],
        "ingest": [run.recipe(recipes.documents, split) for split in splits],
        "embed": [
            run.recipe(recipe, split)
            for recipe, role in ((recipes.embeddings, "held out"), (recipes.queries, "memory"))
            for split in splits
            if experiment.data.role(split) != role
        ],
        "index": [each.recipe(recipes.index, part) for each in retrieving for part in memory],
        "retrieve": [
            each.recipe(recipes.neighbors, split)
            for each in retrieving
            for split in splits
            if experiment.data.role(split) != "memory"
        ],
        **{f"train {each.trained.model_name}": [each.training_recipe] for each in models.values()},
        "evaluate": [
            *(each.recipe(recipes.best) for each in models.values() if each.step),
            *(each.evaluation_recipe for each in models.values()),
        ],
    }
    seconds = {}
    for stage, needed in made.items():
        found = [artifact for recipe in needed if (artifact := run.workdir.find(recipe))]
        if found:
            seconds[stage] = round(spent([artifact.manifest for artifact in found]), 2)
    return seconds


def spent(manifests: Sequence[Mapping[str, Any]]) -> float:
    """The seconds in which at least one of some artifacts was made.

    Those of earlier versions, which do not say when, count in full.
    """
    total, reached = sum(m["seconds"] for m in manifests if "started" not in m), -math.inf
    for start, seconds in sorted((m["started"], m["seconds"]) for m in manifests if "started" in m):
        end = start + seconds
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _content(run: Run, models: Mapping[str, Run], metrics: Mapping[str, Any]) -> Content:
    own = next(iter(models))
    shown = {name: models[name] for name in (own, *peers([*models]))}  # not the control
    split = next((split for split in reversed(SPLITS) if split in run.experiment.data.sources()), None)
    samples = None if split is None else Samples.open(run, split, shown)
    encoders = [of for of in (recipes.vqgan, recipes.clip) if recipes.OWN not in run.recipe(of).config]
    return Content(
        name=run.experiment.name,
        metrics=metrics,
        facts=_facts(run, metrics),
        training={compared.trained.model_name: compared.training_metrics() for compared in models.values()},
        fitting={run.recipe(of).stage: read_metrics(run.artifact(of).folder) for of in encoders},
        split=split or "",
        strips=samples.strips() if samples else [],
        captions=samples.captions() if samples else [],
        reconstructions=samples.reconstructions() if samples else [],
    )


def _facts(run: Run, metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    devices, experiment = jax.devices(), run.experiment
    model, evaluation = experiment.model, experiment.evaluation
    facts = [
        ("config", experiment.name),
        ("workdir", str(run.workdir.path.resolve())),
        ("seed", str(experiment.seed)),
        ("model", f"{model.num_layers} layers, width {model.embed}, context {experiment.batches.context_length}"),
    ]
    for name in (name for name in model_names(metrics) if not name.endswith("_random")):  # the same model again
        values = metrics[name]
        facts.append((model_label(name), f"{values['parameters']:,} parameters, {values['steps']:,} steps"))
    if experiment.retrieves:
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
