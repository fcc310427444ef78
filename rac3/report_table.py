"""The models side by side: the rows of the comparison, and what they show in words."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MODELS = {"ra_cm3": "RA-CM3", "cm3": "CM3", "ra_cm3_random": "RA-CM3, random documents"}


@dataclass(frozen=True)
class Row:
    """A row: where its value stands in the metrics of a model, and how it reads.

    Attributes:
      split: the split that it is measured on.
      share: a share of the documents of that split, 0 to 1.
    """

    label: str
    path: tuple[str, str]
    lower_is_better: bool = False
    split: str = "test"
    share: bool = False

    def show(self, value: float) -> str:
        return f"{value:.1%}" if self.share else f"{value:.4g}"


ROWS = (
    Row("image perplexity", ("perplexity", "image"), lower_is_better=True),
    Row("text perplexity", ("perplexity", "text"), lower_is_better=True),
    Row("entity accuracy, seen", ("entity_accuracy", "seen"), split="validation", share=True),
    Row("entity accuracy, unseen", ("entity_accuracy", "unseen"), share=True),
    Row("name accuracy, unseen", ("name_accuracy", "unseen"), share=True),
    Row("CLIP score", ("clip_score", "unseen")),
)


def lookup(values: Mapping[str, Any], path: Sequence[str]) -> Any:
    """What stands at a path; None if there is nothing."""
    found: Any = values
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def margin(share: float, count: int) -> float:
    """Half of the 95% interval of a share of `count` documents (Agresti and Coull: sound near 0 and 1 too)."""
    adjusted = (share * count + 2) / (count + 4)
    return 2 * math.sqrt(adjusted * (1 - adjusted) / (count + 4))


def verdict(metrics: Mapping[str, Any]) -> str:
    """What the table shows, in one or two sentences that follow from its numbers."""
    if "ra_cm3" not in metrics or "cm3" not in metrics:
        return "One model was trained; there is nothing to compare it with."
    ours, theirs = metrics["ra_cm3"], metrics["cm3"]
    said: dict[str, list[str]] = {"better in": [], "worse in": [], "not clearly different in": []}
    for row in ROWS:
        left, right = lookup(ours, row.path), lookup(theirs, row.path)
        if left is None or right is None:
            continue
        noise = 0.0
        if row.share:
            count = metrics["evaluation"]["documents"][row.split]
            noise = math.hypot(margin(left, count), margin(right, count))
        ahead = right - left if row.lower_is_better else left - right
        kind = "better in" if ahead > noise else "worse in" if ahead < -noise else "not clearly different in"
        said[kind].append(f"{row.label} ({row.show(left)} against {row.show(right)})")
    same = all(ours[name] == theirs[name] for name in ("parameters", "steps"))
    peer = "CM3 of the same size and as many steps" if same else "CM3"
    clauses = [f"{kind} {_listed(rows)}" for kind, rows in said.items() if rows]
    return f"Against {peer}, RA-CM3 is {'; '.join(clauses)}." + _control(metrics) if clauses else "Nothing to compare."


def _control(metrics: Mapping[str, Any]) -> str:
    """What random documents do in place of retrieved ones, by the last row that says most: accuracy, else perplexity."""
    for number in (3, 0):
        row = ROWS[number]
        ours, control = (lookup(metrics.get(name, {}), row.path) for name in ("ra_cm3", "ra_cm3_random"))
        if ours is not None and control is not None:
            return (f" With random documents in place of retrieved ones, its {row.label} is {row.show(control)} "
                    f"rather than {row.show(ours)}.")
    return ""


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def summary(metrics: Mapping[str, Any]) -> str:
    """The comparison as plain text for a terminal, then retrieval recall."""
    names = [name for name in MODELS if name in metrics]
    rows = [["", *(MODELS[name] for name in names)]]
    for row in ROWS:
        values = [lookup(metrics[name], row.path) for name in names]
        if any(value is not None for value in values):
            rows.append([row.label, *("-" if value is None else row.show(value) for value in values)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(names) + 1)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    retrieval = metrics["retrieval"]
    for split, recalls in (("test", retrieval), ("validation", retrieval.get("validation") or {})):
        for key, value in recalls.items():
            if key.startswith("recall_at_") and value:
                parts = ", ".join(f"{share:.1%} by {part}" for part, share in value.items())
                lines.append(f"recall at {key.removeprefix('recall_at_')}, {split}: {parts}")
    return "\n".join(line.rstrip() for line in lines)
