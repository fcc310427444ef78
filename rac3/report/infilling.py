"""The report of infilling and editing: the models side by side, and their pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from rac3.artifacts.workdir import write_atomic
from rac3.report.page import Picture, figure, sheet, table
from rac3.report.table import margin, model_label
from rac3.run import Run
from rac3.stages.evaluate_infilling import evaluate_infilling, kept_pictures

INFILLED = ("perplexity of the codes", "PSNR of the middle", "right entity")
EDITED = (
    "edit shows their entity",
    "edit still shows its own entity",
    "drawing shows their entity",
    "drawing shows the setting of its text",
)
LABELS = {  # above and below a picture
    "original": ("original", ""),
    "masked": ("masked", "what is given"),
    "reconstructed": ("VQGAN", "its own codes"),
    "infilled 0": ("no documents", "infilled"),
    "infilled 1": ("1 document", "infilled"),
    "copied": ("copy", "the first document"),
    "given": ("other", "first document of another entity"),
    "edited": ("edited", "after documents of the other"),
    "controlled": ("drawn", "after them, without the name"),
}
NOTE = (
    "The middle is 60% of the side, high and wide. An edit draws it again without the text, given the documents that "
    "the text of another entity retrieves; a drawing is of the whole text with “something” for the name, given "
    "the same documents. Intervals are of 95%."
)


def infilling_report(run: Run, models: Mapping[str, Run]) -> Path:
    """Writes `report/infilling.html` of the workdir; the path of the page.

    Args:
      models: the evaluated runs, by name.
    """
    metrics = {name: evaluate_infilling(model) for name, model in models.items()}
    sections = []
    for split, of_models in reversed(by_split(metrics).items()):
        body = table(["the middle, drawn by", *INFILLED], infilled_rows(of_models))
        if edits := edited_rows(of_models):
            body += table(["after documents of another entity", *EDITED], edits)
        pictures = "".join(_pictures(name, model, split) for name, model in models.items())
        title = f"{split}: {next(iter(of_models.values()))['documents']:,} images"
        sections.append((split, title, f'{body}<p class="note">{NOTE}</p>{pictures}'))
    folder = run.workdir.path / "report"
    folder.mkdir(exist_ok=True)
    write_atomic(folder / "infilling.html", sheet(f"{run.experiment.name}: infilling and editing", sections))
    return folder / "infilling.html"


def infilling_summary(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures, for a terminal.

    Args:
      metrics: those of each model, by name.
    """
    lines = []
    for split, of_models in by_split(metrics).items():
        lines.append(f"{split}: {next(iter(of_models.values()))['documents']:,} images")
        for label, *cells in infilled_rows(of_models):
            lines.append(f"  the middle by {label}: {_said(INFILLED, cells)}")
        for label, *cells in edited_rows(of_models):
            lines.append(f"  {label} after documents of another entity: {_said(EDITED, cells)}")
    return "\n".join(lines)


def by_split(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The metrics of each split, by model."""
    return {split: {name: values[split] for name, values in metrics.items()} for split in next(iter(metrics.values()))}


def infilled_rows(models: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """The ways to fill the middle on one split, each with its figures; the baselines are those of the first model."""
    own = next(iter(models.values()))
    ways: dict[str, Mapping[str, float | None]] = {}
    for name, values in models.items():
        for k, of_k in values.get("infilling", {}).items():
            ways.setdefault(infilled_label(name, int(k)), of_k)  # without documents, one model is the same by any name
    for label, key in (
        ("a copy of the first retrieved document", "copied"),
        ("the VQGAN from its own codes", "reconstructed"),
        ("nobody: the original", "original"),
    ):
        if key in own:
            ways[label] = own[key]
    return [
        [
            label,
            "" if values.get("perplexity") is None else f"{values['perplexity']:,.2f}",
            "" if values.get("psnr") is None else f"{values['psnr']:.1f} dB",
            _share(values["entity_accuracy"], own["documents"]),
        ]
        for label, values in ways.items()
    ]


def edited_rows(models: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Of each model that has edited on one split, what its edits and drawings show."""
    return [
        [
            model_label(name),
            *(_share(values["editing"][key], values["documents"]) for key in ("entity_accuracy", "unchanged")),
            *(
                _share(values["controlled"][key], values["documents"])
                for key in ("entity_accuracy", "setting_accuracy")
            ),
        ]
        for name, values in models.items()
        if "editing" in values
    ]


def infilled_label(name: str, k: int) -> str:
    """`ra_cm3_random` with k documents, for people to read: "RA-CM3 with 2 random documents"."""
    model, _, retriever = model_label(name).partition(", ")
    if not k:
        return f"{model} without documents"
    kind = retriever.removesuffix(" documents") if retriever.endswith(" documents") else "retrieved"
    by = f" ({retriever})" if retriever.endswith(" retriever") else ""
    return f"{model} with {k} {kind} document{'s' if k > 1 else ''}{by}"


def _share(share: float | None, count: int) -> str:
    return "" if share is None else f"{share:.1%} ± {margin(share, count):.1%}"


def _said(head: Sequence[str], cells: Sequence[str]) -> str:
    return ", ".join(f"{name} {cell}" for name, cell in zip(head, cells, strict=True) if cell) or "nothing to measure"


def _pictures(name: str, model: Run, split: str) -> str:
    """The pictures of a model: a strip for each of the first documents."""
    kinds = kept_pictures(model, split)
    cards = []
    for number in range(len(kinds.get("original", ()))):
        shown = [_picture(kind, pictures[number]) for kind, pictures in kinds.items()]
        cards.append(f'<article><div class="pictures">{"".join(map(figure, shown))}</div></article>')
    return f'<h3>{model_label(name)}</h3><div class="cards">{"".join(cards)}</div>' if cards else ""


def _picture(kind: str, pixels: UInt8[np.ndarray, "height width 3"]) -> Picture:
    label, text = LABELS.get(kind) or (f"{kind.removeprefix('infilled ')} documents", "infilled")
    return Picture(label, pixels, text)
