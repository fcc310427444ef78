"""The report of retrieval: recall, what approximation costs, what selection drops, and queries with their answers."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from rac3.artifacts.workdir import write_atomic
from rac3.documents.document import Document, Image, prepare_image
from rac3.evaluation.entities import entity_of, left_out
from rac3.evaluation.recall import KS
from rac3.experiment import Split
from rac3.report.page import CM3_COLOR, OWN_COLOR, Mark, Picture, figure, sheet, table
from rac3.report.plots import Line, plot
from rac3.run import PARTS, Run
from rac3.stages.evaluate_retrieval import BINS, evaluate_retrieval

SHOWN = 12  # queries of each part
FOUND = 5  # documents of each query
SIDE = 128  # pixels, at most
DIRECTIONS = {
    "text_to_image": "own image of a text",
    "image_to_text": "own text of an image",
    "text_to_document": "own document of a text",
    "image_to_document": "own document of an image",
}
RULES = {
    "withdrawn": "withdrawn",
    "main_document": "the main document itself",
    "duplicate": "its text or image again",
    "similar_to_main": "too similar to it",
    "similar_to_query": "too similar to the query",
    "redundant": "too similar to one taken",
}


def retrieval_report(run: Run) -> Path:
    """Writes `report/retrieval.html` of the workdir; the path of the page.

    Raises:
      InputError: the neighbors are not made yet.
    """
    metrics = evaluate_retrieval(run)
    sections = [
        ("recall", "Recall", _recall(metrics["splits"]) + _notes(_left_out(metrics))),
        ("search", "What approximation costs", _searching(metrics["search"])),
        ("selection", "What selection keeps", _selection(metrics["selection"])),
        *((split, f"Queries: {split}", _queries(run, split)) for split in reversed(list(metrics["splits"]))),
    ]
    folder = run.workdir.path / "report"
    folder.mkdir(exist_ok=True)
    write_atomic(folder / "retrieval.html", sheet(f"{run.experiment.name}: retrieval", sections))
    return folder / "retrieval.html"


def retrieval_summary(metrics: Mapping[str, Any]) -> str:
    """The main figures, for a terminal."""
    lines = []
    for split, values in metrics["splits"].items():
        for name, recalls in _recalls(values):
            shown = ", ".join(f"{share:.1%} at {k}" for k, share in recalls.items())
            lines.append(f"{split}: recall of {name}: {shown}")
    lines += _left_out(metrics)
    search = metrics["search"]
    for point in search["points"]:
        lines.append(
            f"{search['retriever']}, {point['effort']}: {point['recall']:.1%} of the exact {search['k']} neighbors, "
            f"{point['queries_per_second']:,.0f} queries/s (exact: {search['exact_queries_per_second']:,.0f})"
        )
    return "\n".join(lines)


def _left_out(metrics: Mapping[str, Any]) -> list[str]:
    """What the recalls of entities do not count, in a line for each split."""
    splits = metrics["splits"].items()
    field = metrics["entity_field"]
    lines = [
        left_out(split, field, each["documents"], each["documents"] - each["with_entity"]) for split, each in splits
    ]
    return [line for line in lines if line and field]


def _recalls(values: Mapping[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """Of a split: what is looked for, and recall by k."""
    rows = [
        (name, {str(k): values["pairs"][f"{key}_recall_at_{k}"] for k in KS})
        for key, name in DIRECTIONS.items()
        if f"{key}_recall_at_1" in values["pairs"]
    ]
    words = {"text": "its text", "image": "its image", "both": "both"}
    rows += [(f"its entity in the memory, by {words[kind]}", recalls) for kind, recalls in values["entities"].items()]
    return rows


def _recall(splits: Mapping[str, Any]) -> str:
    rows = []
    for split, values in splits.items():
        rows += [[split, name, *(f"{share:.1%}" for share in found.values())] for name, found in _recalls(values)]
    counts = ", ".join(f"{values['documents']:,} {split}" for split, values in splits.items())
    note = (
        f"Of {counts} documents. Own: the other half of a document, or the vector of both, among all documents of the "
        "split that have both. Entity: a document of the same entity among what the retriever ranks first in the "
        "memory, before selection."
    )
    return table(["split", "looked for", *(f"recall at {k}" for k in KS)], rows) + f'<p class="note">{note}</p>'


def _notes(lines: Sequence[str]) -> str:
    return "".join(f'<p class="note">{escape(line)}.</p>' for line in lines)


def _searching(search: Mapping[str, Any]) -> str:
    """The curve of recall over speed. The exact search is the reference, at recall 1."""
    points = [(point["queries_per_second"], point["recall"]) for point in search["points"]]
    lines = [Line(f"{search['retriever']}, by effort", sorted(points), OWN_COLOR)]
    lines.append(Line("exact", [(search["exact_queries_per_second"], 1.0)], CM3_COLOR))
    rows = [
        [point["effort"], f"{point['recall']:.2%}", f"{point['queries_per_second']:,.0f}"] for point in search["points"]
    ]
    rows.append(["exact search", "100.00%", f"{search['exact_queries_per_second']:,.0f}"])
    note = (
        f"{search['queries']:,} queries at once, {search['k']} neighbors, a memory of {search['memory']:,} documents, "
        "on the machine that made this report."
    )
    return (
        f'<div class="plots">{plot("Recall over speed", "queries per second", "recall", lines, markers=True)}</div>'
        + table([f"{search['retriever']}", "recall", "queries/s"], rows)
        + f'<p class="note">{note}</p>'
    )


def _selection(splits: Mapping[str, Any]) -> str:
    rows = [
        ["queries", *(f"{values['queries']:,}" for values in splits.values())],
        ["without any neighbor", *(f"{values['queries_without_neighbors']:,}" for values in splits.values())],
        ["neighbors per query", *(_shown(values["neighbors_per_query"], ".2f") for values in splits.values())],
        *(
            [f"dropped: {name}", *(_shown(values["dropped"][rule], ".2%") for values in splits.values())]
            for rule, name in RULES.items()
        ),
    ]
    centers = ((BINS[1:] + BINS[:-1]) / 2).tolist()
    plots = []
    for split, values in splits.items():
        lines = []
        for part, color in zip(PARTS, (OWN_COLOR, CM3_COLOR), strict=True):
            for which, dashed in (("first", False), ("kept", True)):
                shares = values["similarities"][part][which]
                shown = [(x, 100 * share) for x, share in zip(centers, shares, strict=True)]
                lines.append(
                    Line(f"{part} query, {'best' if which == 'first' else 'all'}", _trimmed(shown), color, dashed)
                )
        plots.append(plot(f"Similarity to the query, {split}", "inner product", "% of the neighbors", lines))
    note = "Shares of the candidates that selection looked at, each under the first rule that it broke."
    return table(["", *splits], rows) + f'<p class="note">{note}</p><div class="plots">{"".join(plots)}</div>'


def _shown(value: float | None, form: str) -> str:
    """A number; "-" where there was nothing to measure."""
    return "-" if value is None else format(value, form)


def _trimmed(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """Without the empty bins at both ends."""
    full = np.flatnonzero([y for _, y in points])
    return points[full[0] : full[-1] + 1] if len(full) else points[:1]


def _queries(run: Run, split: Split) -> str:
    """The first queries of a split, as they come, each with the documents selected for it."""
    store, opened = run.documents(split), run.memory(split)
    items = [item.document for item in store.many(range(min(SHOWN, len(store))))]
    ids, scores = (run.neighbors(split, name)[: len(items)] for name in ("ids", "scores"))
    field, cards = run.experiment.data.entity_field, []
    for number, part in enumerate(PARTS):
        for document, found, similar in zip(items, ids[:, number], scores[:, number], strict=True):
            if not (document.text if part == "text" else document.images):
                continue
            asked = document.text if part == "text" else ""
            pictures = [] if part == "text" else [Picture("asked", _pixels(document))]
            for i, score in list(zip(found.tolist(), similar.tolist(), strict=True))[:FOUND]:
                if i >= 0:
                    pictures.append(_found(opened.document(i).document, document, score, field))
            shown = "".join(figure(picture) for picture in pictures) or "nothing"
            cards.append(f'<article><h3>{escape(asked)}</h3><div class="pictures">{shown}</div></article>')
    note = f"The first {len(items)} documents as they come: by text, then by image. Similarity is to the query."
    return f'<p class="note">{note}</p><div class="cards">{"".join(cards)}</div>'


def _found(document: Document, asked: Document, score: float, field: str) -> Picture:
    mark, wanted = None, entity_of(asked, field)
    if wanted is not None:
        same = entity_of(document, field) == wanted
        mark = Mark(same, "same" if same else "other")
    return Picture(f"{score:.2f}", _pixels(document), document.text, mark)


def _pixels(document: Document) -> Any:
    """The first picture, small; None if there is none."""
    image = next((segment for segment in document.segments if isinstance(segment, Image)), None)
    if image is None:
        return None
    pixels = image.pixels()
    return prepare_image(pixels, min(SIDE, *pixels.shape[:2]))
