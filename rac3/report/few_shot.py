"""The report of few-shot classification: accuracy by the number of demonstrations, for a terminal and as a page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rac3.artifacts.workdir import write_atomic
from rac3.experiment import Split
from rac3.report.page import CM3_COLOR, OTHER_COLOR, OWN_COLOR, Picture, figure, sheet, table
from rac3.report.plots import Line, plot
from rac3.report.table import margin, model_label
from rac3.run import Run
from rac3.stages.evaluate_few_shot import LABELS, SCORED, questions

SHOWN = 8  # questions
HOW = {
    "text": "label given the image",
    "image": "image given the label",
    "apart": "image after one label's demonstrations",
}
GUESSING = "guessing"
NONE = "no questions: fewer than two entities have images both here and in the memory"


def few_shot_report(run: Run, metrics: Mapping[str, Mapping[str, Any]]) -> Path:
    """Writes `report/few_shot.html` of the workdir; the path of the page.

    Args:
      metrics: those of each model, by name.
    """
    sections = []
    for split, own in reversed([*next(iter(metrics.values())).items()]):
        lines = few_shot_lines({name: values[split] for name, values in metrics.items()})
        body = f'<p class="note">{NONE[0].upper()}{NONE[1:]}.</p>'
        if lines:
            note = (
                f"{own['questions']:,} questions, in which either label is right equally often. Intervals are of 95%."
            )
            rows = [[label, *_cells(label, by_k, own["questions"])] for label, by_k in lines.items()]
            shown = table(["k, demonstrations of each label", *map(str, own["shots"])], rows)
            body = f'{_plot(lines)}{shown}<p class="note">{note}</p>{_questions(run, split)}'
        sections.append((split, split, body))
    folder = run.workdir.path / "report"
    folder.mkdir(exist_ok=True)
    write_atomic(folder / "few_shot.html", sheet(f"{run.experiment.name}: few-shot classification", sections))
    return folder / "few_shot.html"


def few_shot_summary(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """The accuracies, for a terminal."""
    said = []
    for split, own in next(iter(metrics.values())).items():
        lines = few_shot_lines({name: values[split] for name, values in metrics.items()})
        said.append(f"{split}: {own['questions']:,} questions" if lines else f"{split}: {NONE}")
        for label, by_k in lines.items():
            shown = zip(_cells(label, by_k, own["questions"]), by_k, strict=True)
            said.append(f"  {label}: {', '.join(f'{cell} at k = {k}' for cell, k in shown)}")
    return "\n".join(said)


def few_shot_lines(models: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, float]]:
    """Accuracy by k on one split: of each model in both ways, of the encoder alone, and of guessing; by label."""
    own = next(iter(models.values()))
    if not own["questions"]:
        return {}
    lines = {f"{model_label(name)}, {HOW[how]}": values[how] for name, values in models.items() for how in SCORED}
    guessed = {str(k): 1 / len(LABELS) for k in own["shots"]}
    return {**lines, "encoder without a model": own["encoder"], GUESSING: guessed}


def _cells(label: str, by_k: Mapping[str, float], count: int) -> list[str]:
    """Accuracies, with intervals where they were measured."""
    return [
        f"{share:.1%}" if label == GUESSING else f"{share:.1%} ± {margin(share, count):.1%}" for share in by_k.values()
    ]


def _plot(lines: Mapping[str, Mapping[str, float]]) -> str:
    """A plot of the ways that have demonstrations of both labels in one context, and one of the other."""
    together: list[Line] = []
    apart: list[Line] = []
    for label, by_k in lines.items():
        color = OWN_COLOR if label.startswith("RA-CM3") else CM3_COLOR if label.startswith("CM3") else OTHER_COLOR
        points = [(float(k), 100 * share) for k, share in by_k.items()]
        line = Line(label, points, color, dashed=HOW["image"] in label or label == GUESSING)
        of_model, is_apart = color != OTHER_COLOR, HOW["apart"] in label
        if is_apart or not of_model:
            apart.append(line)
        if not is_apart:
            together.append(line)
    drawn = {"Both labels in one context": together, "Each label alone": apart}
    plots = [plot(title, "k", "% right", group, markers=True) for title, group in drawn.items()]
    return f'<div class="plots">{"".join(plots)}</div>'


def _questions(run: Run, split: Split) -> str:
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
