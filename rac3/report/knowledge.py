"""The report of knowledge: how often the pictures of each model show the right entity, and the first of them."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from rac3.artifacts.workdir import write_atomic
from rac3.documents.document import Document, prepare_image
from rac3.experiment import Split
from rac3.held_out import held_out, retrieved
from rac3.report.page import Mark, Picture, figure, sheet, table
from rac3.report.table import LITE0, model_label, peers
from rac3.run import Run
from rac3.stages.evaluate_knowledge import ENCODER, FIRST, KEPT, NETWORK, SOURCE, drawings, told

SHOWN = 12  # questions
BASELINES = {
    "copied": "a copy of the first retrieved document",
    "mean": "a mean of the documents in context",
    "reconstructed": "the VQGAN, from its own codes",
    "original": "nobody: the original picture",
}
NETWORKS = {"FID": "the Inception", LITE0: "EfficientNet-Lite0"}
GUESSING = "guessing"


def knowledge_report(models: Mapping[str, Run], metrics: Mapping[Split, Mapping[str, Any]]) -> Path:
    """Writes `report/knowledge.html` of the workdir; the path of the page.

    Args:
      models: the evaluated runs, by name, the experiment's own first.
    """
    run, sections = next(iter(models.values())), []
    for split, values in reversed([*metrics.items()]):
        notes = "".join(f'<p class="note">{escape(line)}.</p>' for line in knowledge_notes(values))
        body = notes
        if rows := knowledge_rows(values):
            body = f"{table(rows[0], rows[1:])}{notes}{_cards(models, split)}"
        sections.append((split, f"{split}: {values['questions']:,} questions", body))
    folder = run.workdir.path / "report"
    folder.mkdir(exist_ok=True)
    write_atomic(folder / "knowledge.html", sheet(f"{run.experiment.name}: knowledge", sections))
    return folder / "knowledge.html"


def knowledge_summary(metrics: Mapping[Split, Mapping[str, Any]]) -> str:
    """The figures, for a terminal."""
    lines = []
    for split, values in metrics.items():
        lines.append(f"{split}: {values['questions']:,} questions about {values['entities']:,} entities")
        rows = knowledge_rows(values)
        for label, *cells in rows[1:]:
            said = (f"{cell} {head}" for head, cell in zip(rows[0][1:], cells, strict=True))
            lines.append(f"  {label}: {', '.join(said)}")
        lines += [f"  {line}" for line in knowledge_notes(values)]
    return "\n".join(lines)


def knowledge_rows(values: Mapping[str, Any]) -> list[list[str]]:
    """The table of a split with its head: who drew the pictures, and a column for each judge.

    Empty if no two entities could be told apart.
    """
    if "shares" not in values:
        return []
    samples = {KEPT: f", best of {values['samples']}" if values["samples"] > 1 else "", FIRST: ", first sample"}
    rows = [["pictures of the right entity", *(f"by {_judge(judge, values)}" for judge in values["judges"])]]
    for name, shares in values["shares"].items():
        for which in next(iter(shares.values())):
            label = BASELINES.get(name) or model_label(name) + samples[which]
            rows.append([label, *(_cell(each[which]) for each in shares.values())])
    return [*rows, [GUESSING, *(f"{values['guessing']:.1%}" for _ in values["judges"])]]


def knowledge_notes(values: Mapping[str, Any]) -> list[str]:
    """Who judges, and what is left out of the figures; a sentence each, without its full stop."""
    notes = []
    if "shares" not in values:
        notes.append("Fewer than two entities can be told apart here")
    elif SOURCE in values["judges"]:
        notes.append("The source of the training documents judges, by the looks of its own entities")
    else:
        notes.append(
            f"A picture shows the entity of the true picture nearest to it, among the held-out and the remembered ones "
            f"of {values['entities']:,} entities; neither the question's own nor any that a model had in context for it"
        )
        notes.append("The encoder also picks the best sample, so that its own verdict on that favors the models")
    if "shares" in values:
        notes.append("± is half of the 95% interval over entities; a guess is among those that are asked about")
    left = values["left_out"]
    if left["documents"]:
        notes.append(f"Left out: {left['documents']:,} of the documents, for lack of a text, an image or a name")
    if left["entities"]:
        notes.append(
            f"Left out: {left['entities']:,} of the entities ({left['questions']:,} of the questions), as there is no "
            "other picture to judge them by"
        )
    return notes


def _judge(judge: str, values: Mapping[str, Any]) -> str:
    network = NETWORKS.get(values["network"], values["network"])
    return {SOURCE: "the source", NETWORK: network, ENCODER: "the encoder"}[judge]


def _cell(share: Mapping[str, float]) -> str:
    return f"{share['value']:.1%} ± {(share['high'] - share['low']) / 2:.1%}"


def _cards(models: Mapping[str, Run], split: Split) -> str:
    """Of the first questions: the real picture, the documents that the first model had, what it and its peers drew."""
    run, answers = next(iter(models.values())), told(models, split)[:SHOWN]
    items, neighbors = held_out(run, split)
    places = {item.document.key: place for place, item in enumerate(items)}
    rows = [answer["row"] for answer in answers]
    shown = [next(iter(models)), *peers([*models])]
    drawn = {name: drawings(models[name], split, rows)[KEPT] for name in shown}
    cards = []
    for number, answer in enumerate(answers):
        place = places[answer["key"]]
        document = items[place].document
        given = retrieved(run, neighbors[place, 0], run.experiment.evaluation.num_retrieved)
        pictures = [_true(run, "real", document, answer["entity"])]
        pictures += [_true(run, "document", item.document, item.document.text) for item in given]
        for name, kept in drawn.items():
            shows = answer["shows"][name]
            right = shows == answer["entity"]
            pictures.append(Picture(model_label(name), kept[number], "", Mark(right, shows or "undecided")))
        figures = "".join(map(figure, pictures))
        cards.append(f'<article><h3>{escape(document.text)}</h3><div class="pictures">{figures}</div></article>')
    return f'<div class="cards">{"".join(cards)}</div>'


def _true(run: Run, label: str, document: Document, text: str) -> Picture:
    """A document's picture as the models see it."""
    if not document.images:
        return Picture(label, None, text)
    return Picture(label, prepare_image(document.images[0].pixels(), run.images.resolution), text)
