"""The report of infilling and editing: the models side by side, and their pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rac3.artifacts.workdir import write_atomic
from rac3.report.page import Picture, figure, sheet, table
from rac3.report.table import margin, model_label
from rac3.run import Run
from rac3.stages.evaluate_infilling import evaluate_infilling, kept_pictures

HEAD = ("", "perplexity of the codes", "PSNR of the middle, dB", "right entity")
LABELS = {
    "original": "the picture",
    "masked": "given",
    "codes": "its own codes",
    "copied": "copied from the first document",
    "given": "the other's document",
    "edited": "edited by it",
    "controlled": "drawn by it",
}


def infilling_report(run: Run, models: Mapping[str, Run]) -> Path:
    """Writes `report/infilling.html` of the workdir; the path of the page.

    Args:
      models: the evaluated runs, by name.
    """
    metrics = {name: evaluate_infilling(model) for name, model in models.items()}
    splits = next(iter(metrics.values()))
    sections = []
    for split in reversed(splits):
        body = table(HEAD, rows({name: values[split] for name, values in metrics.items()}))
        pictures = "".join(_pictures(name, model, split) for name, model in models.items())
        sections.append((split, f"{split}: {splits[split]['documents']:,} images", body + pictures))
    folder = run.workdir.path / "report"
    folder.mkdir(exist_ok=True)
    write_atomic(folder / "infilling.html", sheet(f"{run.experiment.name}: infilling and editing", sections))
    return folder / "infilling.html"


def infilling_summary(models: Mapping[str, Run]) -> str:
    """The figures, for a terminal."""
    metrics = {name: evaluate_infilling(model) for name, model in models.items()}
    lines = []
    for split, values in next(iter(metrics.values())).items():
        lines.append(f"{split}, the middle of {values['documents']:,} images:")
        for label, *cells in rows({name: of_model[split] for name, of_model in metrics.items()}):
            said = [f"{name} {cell}" for name, cell in zip(HEAD[1:], cells, strict=True) if cell]
            lines.append(f"  {label}: {', '.join(said)}")
    return "\n".join(lines)


def rows(models: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """A line for each way to fill the middle, of the metrics of each model on one split."""
    own = next(iter(models.values()))
    count = own["documents"]
    if not count:
        return []
    lines = []
    for name, values in models.items():
        for k, of_k in values["infilling"].items():
            documents = "no documents" if k == "0" else f"{k} document{'s' if k != '1' else ''}"
            lines.append(_row(f"{model_label(name)}, {documents}", of_k, count))
    lines += [
        _row(label, own[key], count)
        for key, label in (("copied", LABELS["copied"]), ("codes", LABELS["codes"]))
        if key in own
    ]
    lines.append(_row(LABELS["original"], own["original"], count))
    for name, values in models.items():
        if "editing" in values:
            label = model_label(name)
            lines.append(_row(f"{label}, edited by documents of another entity: that entity", values["editing"], count))
            unchanged = {"entity_accuracy": values["editing"]["unchanged"]}
            lines.append(_row(f"{label}, edited: still the entity of before", unchanged, count))
            lines.append(
                _row(f"{label}, drawn by documents of another entity: that entity", values["controlled"], count)
            )
            if values["controlled"]["setting_accuracy"] is not None:
                setting = {"entity_accuracy": values["controlled"]["setting_accuracy"]}
                lines.append(_row(f"{label}, drawn by them: the setting of the text", setting, count))
    return lines


def _row(label: str, values: Mapping[str, float | None], count: int) -> list[str]:
    perplexity, psnr, share = (values.get(name) for name in ("perplexity", "psnr", "entity_accuracy"))
    return [
        label,
        "" if perplexity is None else f"{perplexity:,.2f}",
        "" if psnr is None else f"{psnr:.1f}",
        "" if share is None else f"{share:.1%} ± {margin(share, count):.1%}",
    ]


def _pictures(name: str, model: Run, split: str) -> str:
    """A strip for each of the first documents."""
    kinds = kept_pictures(model, split)
    cards = []
    for number in range(len(kinds.get("original", ()))):
        shown = [Picture(_label(kind), pictures[number]) for kind, pictures in kinds.items()]
        cards.append(f'<article><div class="pictures">{"".join(map(figure, shown))}</div></article>')
    return f'<h3>{model_label(name)}</h3><div class="cards">{"".join(cards)}</div>'


def _label(kind: str) -> str:
    k = kind.removeprefix("infilled ")
    return LABELS.get(kind) or ("infilled alone" if k == "0" else f"infilled with {k}")
