"""The models side by side: the rows of the comparison, and what they show in words."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rac3.evaluation.bootstrap import margin
from rac3.evaluation.entities import left_out


@dataclass(frozen=True)
class Row:
    """A row: the path of its value in a model's metrics, and how to show it.

    Attributes:
      path: if it ends with "value", `low` and `high` next to it are the value's 95% interval.
      form: the format of its values; "%" for a share (0 to 1) of the documents of `split` that name an entity.
    """

    label: str
    path: tuple[str, ...]
    form: str
    lower_is_better: bool = False
    split: str = "test"

    @property
    def share(self) -> bool:
        return self.form.endswith("%")

    def show(self, value: float) -> str:
        return format(value, self.form)


LITE0 = "FD (EfficientNet-Lite0)"  # of the network's features
ROWS = (
    Row("image perplexity", ("perplexity", "image"), ",.2f", lower_is_better=True),
    Row("text perplexity", ("perplexity", "text"), ",.2f", lower_is_better=True),
    Row("entity accuracy (seen)", ("entity_accuracy", "seen"), ".1%", split="validation"),
    Row("entity accuracy (unseen)", ("entity_accuracy", "unseen"), ".1%"),
    Row("joint accuracy (unseen)", ("joint_accuracy", "unseen"), ".1%"),
    Row("name accuracy (unseen)", ("name_accuracy", "unseen"), ".1%"),
    Row("joint name accuracy (unseen)", ("joint_name_accuracy", "unseen"), ".1%"),
    Row("CIDEr-D (unseen)", ("captions", "test", "cider_d", "value"), ".3f"),
    Row("BLEU-4 (unseen)", ("captions", "test", "bleu_4", "value"), ".3f"),
    Row("ROUGE-L (unseen)", ("captions", "test", "rouge_l", "value"), ".3f"),
    Row("FID (unseen)", ("pictures", "test", "FID", "frechet", "value"), ",.2f", lower_is_better=True),
    Row("KID (unseen)", ("pictures", "test", "FID", "kid", "value"), ".4f", lower_is_better=True),
    Row(
        "FD, EfficientNet-Lite0 (unseen)", ("pictures", "test", LITE0, "frechet", "value"), ",.2f", lower_is_better=True
    ),
    Row("KID, EfficientNet-Lite0 (unseen)", ("pictures", "test", LITE0, "kid", "value"), ".4f", lower_is_better=True),
    Row("CMMD (unseen)", ("pictures", "test", "cmmd", "value"), ".3f", lower_is_better=True),
    Row("CLIP score", ("clip_score", "unseen"), ".3f"),
)
BASELINES = {"copied": "a copy", "mean": "a mean", "reconstructed": "VQGAN", "original": "original"}
"""What is in the table besides models, and its label."""


def model_names(metrics: Mapping[str, Any]) -> list[str]:
    """The models among the entries of `metrics.json`, the experiment's own first."""
    return [name for name, value in metrics.items() if isinstance(value, Mapping) and "perplexity_by_k" in value]


def model_label(name: str) -> str:
    """`ra_cm3_random` for people to read."""
    if name == "cm3_best":
        return "CM3 at its best"
    model = "RA-CM3" if name.startswith("ra_cm3") else "CM3"
    swapped = name.removeprefix("ra_").removeprefix("cm3").removeprefix("_")
    if not swapped:
        return model
    return f"{model}, random documents" if swapped == "random" else f"{model}, {swapped} retriever"


def columns(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """By label, the values of each column of the comparison: the models, then the baselines that have any."""
    models = {model_label(name): metrics[name] for name in model_names(metrics)}
    baselines = {label: metrics["baselines"].get(name, {}) for name, label in BASELINES.items()}
    return models | {
        label: values
        for label, values in baselines.items()
        if any(lookup(values, row.path) is not None for row in ROWS)
    }


def value_rows(values: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """A table of plain text with its head: a column for each of these, and the rows that any of them has a value of."""
    rows = [["", *values]]
    for row in ROWS:
        found = [lookup(column, row.path) for column in values.values()]
        if any(value is not None for value in found):
            rows.append([row.label, *("-" if value is None else row.show(value) for value in found)])
    return rows


def side_by_side(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The `columns` of several runs: each label for one run after the other, then the next label.

    Args:
      metrics: the `metrics.json` of each run, by the name that its columns get.
    """
    of_runs = {name: columns(each) for name, each in metrics.items()}
    labels = dict.fromkeys(label for of_run in of_runs.values() for label in of_run)
    return {
        f"{label} ({name})": of_run[label] for label in labels for name, of_run in of_runs.items() if label in of_run
    }


def peers(names: Sequence[str]) -> list[str]:
    """The CM3s that the first model is compared with: at its best, if that is known, and at its last step."""
    return [name for name in ("cm3_best", "cm3") if name in names[1:]]


def _better(row: Row, models: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The model with the best value of a row: no step of a CM3 is its best for texts and images alike. None without."""
    known = [values for values in models if lookup(values, row.path) is not None]
    choose = min if row.lower_is_better else max
    return choose(known, key=lambda values: lookup(values, row.path)) if known else None


def lookup(values: Mapping[str, Any], path: Sequence[str]) -> Any:
    """The value at a path; None if there is none."""
    found: Any = values
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def interval(values: Mapping[str, Any], row: Row) -> tuple[float, float] | None:
    """The 95% interval of a row's value, where it was measured with one."""
    low, high = (lookup(values, (*row.path[:-1], end)) for end in ("low", "high"))
    return None if low is None or high is None else (low, high)


def verdict(metrics: Mapping[str, Any]) -> str:
    """What the table shows, in one or two sentences that follow from its numbers."""
    names = model_names(metrics)
    others = peers(names)
    if not others:
        return "One model was evaluated; there is none to compare it with."
    ours = metrics[names[0]]
    said: dict[str, list[str]] = {"better in": [], "worse in": [], "not clearly different in": []}
    for row in ROWS:
        theirs = _better(row, [metrics[name] for name in others])
        left = lookup(ours, row.path)
        if left is not None and theirs is not None:
            right = lookup(theirs, row.path)
            noise = _noise(row, ours, theirs, metrics)
            ahead = right - left if row.lower_is_better else left - right
            kind = "better in" if ahead > noise else "worse in" if ahead < -noise else "not clearly different in"
            said[kind].append(row.label)
    whom = "CM3"
    if all(metrics[name]["parameters"] == ours["parameters"] for name in others):
        if len(others) > 1:
            whom = "CM3 of the same size, at its best or at its last step, whichever is better"
        elif metrics[others[0]]["steps"] == ours["steps"]:
            whom = "CM3 of the same size and as many steps"
    clauses = [f"{kind} {_listed(labels)}" for kind, labels in said.items() if labels]
    if not clauses:
        return "Nothing was measured of both models."
    return f"Against {whom}, {model_label(names[0])} is {'; '.join(clauses)}." + _control(metrics, names[0])


def _noise(row: Row, ours: Mapping[str, Any], theirs: Mapping[str, Any], metrics: Mapping[str, Any]) -> float:
    """How far two values may differ and yet count as equal: by their intervals or margins, else 1%."""
    left, right = lookup(ours, row.path), lookup(theirs, row.path)
    intervals = [each for values in (ours, theirs) if (each := interval(values, row))]
    if len(intervals) == 2:
        return math.hypot(*((high - low) / 2 for low, high in intervals))
    if not row.share:
        return 0.01 * max(abs(left), abs(right))
    count = metrics["evaluation"]["with_entity"][row.split]  # all shares are of entities
    return math.hypot(margin(left, count), margin(right, count))


def _control(metrics: Mapping[str, Any], name: str) -> str:
    """What random documents in place of retrieved ones do to image perplexity."""
    ours, control = (lookup(metrics, (key, "perplexity", "image")) for key in (name, f"{name}_random"))
    if ours is None or control is None:
        return ""
    return (
        f" With random documents in place of retrieved ones, its image perplexity is {control:,.2f}, not {ours:,.2f}."
    )


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def ratio_line(metrics: Mapping[str, Any]) -> str:
    """The first model's perplexities over those of the better CM3; "" without both."""
    names = model_names(metrics)
    others, ratios = peers(names), []
    for row in ROWS[:2]:
        theirs = _better(row, [metrics[name] for name in others])
        if theirs is not None and (ours := lookup(metrics[names[0]], row.path)) is not None:
            ratios.append(f"{row.path[1]} {ours / lookup(theirs, row.path):.2f}")
    if not ratios:
        return ""
    whom = "the better CM3" if len(others) > 1 else model_label(others[0])
    return f"perplexity of {model_label(names[0])} over that of {whom}: {', '.join(ratios)}"


def unjudged_line(metrics: Mapping[str, Any]) -> str:
    """Why there is no accuracy of images, nor any joint one; "" if there is."""
    evaluation = metrics["evaluation"]
    if not evaluation["entity_field"] or evaluation["entity_field"] in evaluation["judged"]:
        return ""
    return (
        "no accuracy of images: the source of the training documents is no Judge of them (rac3.documents.document); "
        "rac3 evaluate CONFIG --task knowledge judges by true pictures"
    )


def recall_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, float]]]:
    """All recalls of retrieval: split, k, and recall by query part."""
    retrieval = metrics["retrieval"]
    return [
        (split, key.removeprefix("recall_at_"), recalls)
        for split, values in (("test", retrieval), ("validation", retrieval["validation"]))
        for key, recalls in values.items()
        if key.startswith("recall_at_") and recalls
    ]


def left_out_lines(metrics: Mapping[str, Any]) -> list[str]:
    """What the accuracies and recalls of entities do not count, in a line for each split; none without such figures."""
    evaluation = metrics["evaluation"]
    field, named = evaluation["entity_field"], evaluation["with_entity"]
    lines = [left_out(split, field, count, count - named[split]) for split, count in evaluation["documents"].items()]
    return [line for line in lines if line and field]
