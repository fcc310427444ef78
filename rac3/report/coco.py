"""The report of MS-COCO: the models side by side, with and without retrieval, and what they made of first images."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np

from rac3.artifacts.workdir import write_atomic
from rac3.documents.document import prepare_image
from rac3.experiment import Split
from rac3.report.infilling import by_split, infilled_label
from rac3.report.page import Picture, figure, sheet, table
from rac3.report.table import LITE0, lookup
from rac3.run import Run
from rac3.stages.evaluate_coco import shown

# The columns: of pictures, then of captions. Each has a format, and the path of its figure.
COLUMNS = (
    ("FID", ",.2f", ("pictures", "FID", "frechet")),
    ("KID", ".4f", ("pictures", "FID", "kid")),
    ("IS", ".2f", ("pictures", "FID", "inception_score")),
    ("precision", ".1%", ("pictures", "FID", "precision")),
    ("recall", ".1%", ("pictures", "FID", "recall")),
    (LITE0, ",.2f", ("pictures", LITE0, "frechet")),
    ("KID (EfficientNet-Lite0)", ".4f", ("pictures", LITE0, "kid")),
    ("IS (EfficientNet-Lite0)", ".2f", ("pictures", LITE0, "inception_score")),
    ("precision (EfficientNet-Lite0)", ".1%", ("pictures", LITE0, "precision")),
    ("recall (EfficientNet-Lite0)", ".1%", ("pictures", LITE0, "recall")),
    ("CMMD", ".3f", ("pictures", "cmmd")),
    ("CLIPScore", ".3f", ("pictures", "clipscore")),
    ("CIDEr-D", ".3f", ("captions", "cider_d")),
    *((f"BLEU-{n}", ".3f", ("captions", f"bleu_{n}")) for n in (1, 2, 3, 4)),
    ("ROUGE-L", ".3f", ("captions", "rouge_l")),
    ("METEOR", ".3f", ("captions", "meteor")),
    ("SPICE", ".3f", ("captions", "spice")),
)
NOTE = (
    "± is half of the 95% interval. FID, FD, KID and CMMD: lower is better; of the others, higher. Distances "
    "depend on how many images they are over, and CIDEr-D (0 to 10; COCO's figures are often 100 times this) on how "
    "many captions."
)
NO_NETWORK = "evaluation.features names no network, so that drawn images are not compared with real ones."


def coco_report(run: Run, models: Mapping[str, Run], metrics: Mapping[str, Mapping[str, Any]]) -> Path:
    """Writes `report/coco.html` of the workdir; the path of the page.

    Args:
      models: the evaluated runs, by name; `metrics` those of each.
    """
    sections = []
    for split, of_models in by_split(metrics).items():
        rows = {label: values for label, _, _, values in variants(of_models)}
        columns = [column for column in COLUMNS if any(_known(values, column[2]) for values in rows.values())]
        body = table(
            ["", *rows],
            [[label, *(_cell(values, form, path) for values in rows.values())] for label, form, path in columns],
        )
        note = NOTE if run.experiment.evaluation.features else f"{NO_NETWORK} {NOTE}"
        title = f"{split}: {next(iter(of_models.values()))['documents']:,} documents of MS-COCO"
        sections.append((split, title, f'{body}<p class="note">{note}</p>{_cards(run, split, models, of_models)}'))
    folder = run.workdir.path / "report"
    folder.mkdir(exist_ok=True)
    write_atomic(folder / "coco.html", sheet(f"{run.experiment.name}: MS-COCO", sections))
    return folder / "coco.html"


def coco_summary(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures, for a terminal.

    Args:
      metrics: those of each model, by name.
    """
    lines = []
    for split, of_models in by_split(metrics).items():
        lines.append(f"{split}: {next(iter(of_models.values()))['documents']:,} documents")
        for label, _, _, values in variants(of_models):
            cells = [f"{name} {_cell(values, form, path)}" for name, form, path in COLUMNS if _known(values, path)]
            lines.append(f"  {label}: {', '.join(cells)}")
    return "\n".join(lines)


def variants(models: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, int, Mapping[str, Any]]]:
    """Label, model, number of documents and figures on one split; a model without documents is the same by any name."""
    found: dict[str, tuple[str, str, int, Mapping[str, Any]]] = {}
    for name, values in models.items():
        for k, of_k in reversed(values["by_k"].items()):
            label = infilled_label(name, int(k))
            found.setdefault(label, (label, name, int(k), of_k))
    return [*found.values()]


def _known(values: Mapping[str, Any], path: Sequence[str]) -> bool:
    return lookup(values, path) is not None


def _cell(values: Mapping[str, Any], form: str, path: Sequence[str]) -> str:
    """`1.23 ± 0.10`, half of the interval; some figures have none."""
    found = lookup(values, path)
    if found is None:
        return "none"
    if not isinstance(found, Mapping):
        return format(found, form)
    return f"{found['value']:{form}} ± {(found['high'] - found['low']) / 2:{form}}"


def _cards(run: Run, split: Split, models: Mapping[str, Run], metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """For each of the first documents: the real image, what each model drew after its caption, and their captions."""
    made = [
        (letter, label, *shown(models[name], split, k))
        for letter, (label, name, k, _) in zip(ascii_uppercase, variants(metrics), strict=False)
    ]
    items = run.documents(split).many(range(len(made[0][3])))
    cards = []
    for number, item in enumerate(items):
        real = prepare_image(item.document.images[0].pixels(), run.images.resolution)
        pictures = [Picture("real", real)]
        pictures += [Picture(letter, np.asarray(drawn[number])) for letter, _, drawn, _ in made]
        said = "".join(
            f"<dt>{letter}: {escape(label)}</dt><dd>{escape(rows[number]['caption']) or '(empty)'}</dd>"
            for letter, label, _, rows in made
        )
        cards.append(
            f"<article><h3>{escape(item.document.text)}</h3>"
            f'<div class="pictures">{"".join(map(figure, pictures))}</div><dl>{said}</dl></article>'
        )
    return f'<div class="cards">{"".join(cards)}</div>'
