"""The report of few-shot classification: accuracy over the number of demonstrations, for a terminal and as a page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rac3.artifacts.workdir import write_atomic
from rac3.report.page import CM3_COLOR, OTHER_COLOR, OWN_COLOR, Picture, figure, sheet, table
from rac3.report.plots import Line, plot
from rac3.report.table import margin, model_label
from rac3.run import Run
from rac3.stages.evaluate_few_shot import LABELS, SCORED, questions

SHOWN = 8  # questions
HOW = {"text": "label given the image", "image": "image given the label"}


def few_shot_report(run: Run, metrics: Mapping[str, Mapping[str, Any]]) -> Path:
    """Writes `report/few_shot.html` of the workdir; the path of the page.

    Args:
      metrics: those of each model, by name.
    """
    sections = []
    splits = [*next(iter(metrics.values()))]
    for split in reversed(splits):
        lines = few_shot_rows({name: values[split] for name, values in metrics.items()})
        shots = next(iter(metrics.values()))[split]["shots"]
        count = next(iter(metrics.values()))[split]["questions"]
        body = f'<p class="note">{count:,} questions, each with the two labels right equally often.</p>'
        if count:
            body += _plot(shots, lines) + table(["k", *map(str, shots)], _shown(lines, count)) + _questions(run, split)
        sections.append((split, split, body))
    folder = run.workdir.path / "report"
    folder.mkdir(exist_ok=True)
    write_atomic(folder / "few_shot.html", sheet(f"{run.experiment.name}: few-shot classification", sections))
    return folder / "few_shot.html"


def few_shot_summary(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """The accuracies, for a terminal."""
    said = []
    for split, values in next(iter(metrics.values())).items():
        said.append(f"{split}: {values['questions']:,} questions")
        lines = few_shot_rows({name: of_model[split] for name, of_model in metrics.items()})
        for label, *cells in _shown(lines, values["questions"]):
            shown = zip(values["shots"], cells, strict=True)
            said.append(f"  {label}: {', '.join(f'{cell} at k = {k}' for k, cell in shown)}")
    return "\n".join(said)


def few_shot_rows(models: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """By label, accuracy by k: of each model in both ways, of the encoder alone, and of guessing."""
    own = next(iter(models.values()))
    if not own["questions"]:
        return {}
    lines = {f"{model_label(name)}, {HOW[how]}": values[how] for name, values in models.items() for how in SCORED}
    return {**lines, "the encoder alone": own["encoder"], "guessing": {str(k): 1 / len(LABELS) for k in own["shots"]}}


def _shown(lines: Mapping[str, Mapping[str, float]], count: int) -> list[list[str]]:
    return [
        [
            label,
            *(
                f"{share:.1%}" + ("" if label == "guessing" else f" ± {margin(share, count):.1%}")
                for share in by_k.values()
            ),
        ]
        for label, by_k in lines.items()
    ]


def _plot(shots: list[int], lines: Mapping[str, Mapping[str, float]]) -> str:
    drawn = []
    for label, by_k in lines.items():
        color = OWN_COLOR if label.startswith("RA-CM3") else CM3_COLOR if label.startswith("CM3") else OTHER_COLOR
        points = [(float(k), 100 * by_k[str(k)]) for k in shots]
        drawn.append(Line(label, points, color, dashed=HOW["image"] in label or label == "guessing"))
    return f'<div class="plots">{plot("Accuracy over demonstrations", "k", "% right", drawn, markers=True)}</div>'


def _questions(run: Run, split: str) -> str:
    """The first questions: the first demonstration of each label, then the image."""
    cards = []
    for question in questions(run, split)[:SHOWN]:
        pictures = [
            Picture(label, shown[0].document.images[0].pixels())
            for label, shown in zip(LABELS, question.demonstrations, strict=True)
        ]
        pictures.append(Picture("asked", question.item.document.images[0].pixels(), f"is {LABELS[question.truth]}"))
        cards.append(f'<article><div class="pictures">{"".join(map(figure, pictures))}</div></article>')
    return f'<div class="cards">{"".join(cards)}</div>'
