"""The page of the report: one HTML file without scripts or outside resources, readable on a phone too.

All that comes from documents or from a model is escaped: captions are what strangers wrote.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from jaxtyping import UInt8

from rac3.generation.answers import png_uri
from rac3.report.plots import Line, plot
from rac3.report.table import (
    ROWS,
    Row,
    columns,
    interval,
    left_out_lines,
    lookup,
    margin,
    model_label,
    model_names,
    ratio_line,
    recall_rows,
    unjudged_line,
    verdict,
)
from rac3.stages.ingest import noted_lines

OWN_COLOR, CM3_COLOR, BEST_COLOR, OTHER_COLOR = "#1f5fbf", "#c2601c", "#8a4fa3", "#7a7f87"
SHOWN_SIDE = 108  # CSS pixels of a picture's side

ENCODER_ROWS = (
    ("VQGAN: PSNR, dB", ("vqgan", "psnr"), ".1f"),
    ("VQGAN: SSIM", ("vqgan", "ssim"), ".3f"),
    ("VQGAN: codes used", ("vqgan", "codebook_use"), ".1%"),
    ("VQGAN: codebook perplexity", ("vqgan", "codebook_perplexity"), ".1f"),
    *(
        (f"CLIP: {what}, recall at {k}", ("clip", f"{key}_recall_at_{k}"), ".1%")
        for key, what in (("text_to_image", "own image of a text"), ("image_to_text", "own text of an image"))
        for k in (1, 5, 10)
    ),
)

STYLE = """
:root { color-scheme: light; --ink: #1c2127; --soft: #5b6570; --line: #dfe3e8; --paper: #fff; --tint: #f5f7f9; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--tint); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 1.7rem; margin: 0 0 4px; } h2 { font-size: 1.2rem; margin: 0 0 6px; }
h3 { font-size: .95rem; margin: 0 0 10px; font-weight: 600; overflow-wrap: anywhere; }
p { margin: 0 0 12px; max-width: 76ch; } p.note, .soft { color: var(--soft); font-size: .9rem; }
p.verdict { font-size: 1.05rem; }
nav { font-size: .9rem; margin: 10px 0 18px; display: flex; flex-wrap: wrap; gap: 2px 16px; } nav a { color: #1f5fbf; }
section > :last-child { margin-bottom: 0; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px;
  margin: 0 0 18px; }
.scroll { overflow-x: auto; margin: 0 0 14px; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } thead th { color: var(--soft); font-weight: 600; }
table.wide { width: 100%; max-width: 720px; }
table.wide thead th { white-space: normal; vertical-align: bottom; max-width: 9em; }
td.best { font-weight: 700; } td .soft { font-weight: 400; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 16px; margin: 0 0 14px; font-size: .92rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 500px), 1fr)); gap: 14px; }
article { border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; min-width: 0; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(70px, 1fr)); gap: 10px; max-width: 620px; }
.pictures.all { max-width: none; margin-bottom: 14px; } .pictures.all figure + figure { margin-top: 8px; }
figure { margin: 0; font-size: .78rem; line-height: 1.3; min-width: 0; }
.pictures figure { display: grid; grid-row: span 3; grid-template-rows: subgrid; row-gap: 0; }
figure img { display: block; width: 100%; max-width: SIDEpx; aspect-ratio: 1; border-radius: 4px;
  border: 1px solid var(--line); }
img.small { image-rendering: pixelated; }
figcaption { margin-top: 4px; overflow-wrap: anywhere; display: -webkit-box; -webkit-box-orient: vertical;
  -webkit-line-clamp: 7; overflow: hidden; }
figure .label { display: block; font-weight: 600; margin-bottom: 3px; align-self: end; }
.right, .wrong { display: block; font-weight: 600; } .right { color: #17713a; } .wrong { color: #b3261e; }
dd .right, dd .wrong { display: inline; }
.caption { display: grid; grid-template-columns: 84px 1fr; gap: 14px; align-items: start; }
article.caption dl { font-size: .86rem; margin: 0; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 8px 14px; }
.plots img { width: 100%; max-width: 470px; height: auto; display: block; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: 5px 12px; align-items: center;
  font-size: .92rem; max-width: 760px; font-variant-numeric: tabular-nums; }
.bars i { display: block; height: 14px; min-width: 2px; border-radius: 3px; background: #1f5fbf; }
@media (min-width: 900px) { .split { display: grid; grid-template-columns: 5fr 3fr; gap: 28px; align-items: end; } }
@media (max-width: 560px) { main { padding: 14px 10px 40px; } section { padding: 14px 12px; }
  th, td { padding-right: 10px; } td:first-child { white-space: normal; }
  .pictures { grid-template-columns: repeat(3, 1fr); } figure img { max-width: none; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 5px; } }
""".replace("SIDE", str(SHOWN_SIDE))


@dataclass(frozen=True)
class Mark:
    """Whether something is right, and how that reads."""

    right: bool
    text: str


@dataclass(frozen=True)
class Picture:
    """A picture with the words above (`label`) and below it; without pixels, only the words."""

    label: str
    pixels: UInt8[np.ndarray, "height width 3"] | None
    text: str = ""
    mark: Mark | None = None


@dataclass(frozen=True)
class Strip:
    """A prompt, and its pictures: retrieved, generated, true."""

    prompt: str
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Captioned:
    """A picture, and its captions by who gave them."""

    picture: Picture
    captions: Mapping[str, tuple[str, Mark | None]]


@dataclass(frozen=True)
class Content:
    """What the page shows besides the metrics.

    Attributes:
      facts: what was run, as name and value.
      training: lines of `metrics.jsonl` by model; `fitting`: by encoder.
      split: the held-out split that the samples are of.
      reconstructions: originals, each with its reconstruction.
    """

    name: str
    metrics: Mapping[str, Any]
    facts: Sequence[tuple[str, str]]
    training: Mapping[str, Sequence[Mapping[str, Any]]]
    fitting: Mapping[str, Sequence[Mapping[str, Any]]]
    split: str
    strips: Sequence[Strip]
    captions: Sequence[Captioned]
    reconstructions: Sequence[tuple[Picture, Picture]]


def page(content: Content) -> str:
    """The whole page. Sections that have nothing to show are left out."""
    sections = [
        ("models", "Models side by side", _models(content.metrics)),
        ("pictures", "Captions to pictures", _strips(content.strips, content.split)),
        ("captions", "Pictures to captions", _captions(content.captions)),
        ("retrieval", "Retrieval", _retrieval(content.metrics)),
        ("training", "Training", _training(content.training)),
        ("encoders", "Frozen encoders", _encoders(content)),
        ("run", "What was run", _run(content)),
        ("time", "Time", _time(content.metrics["stages"])),
    ]
    return sheet(content.name, [section for section in sections if section[2]])


def sheet(name: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """A page with these sections: (anchor, title, HTML of the body)."""
    links = " ".join(f'<a href="#{anchor}">{title}</a>' for anchor, title, _ in sections)
    bodies = "".join(f'<section id="{anchor}"><h2>{title}</h2>{body}</section>\n' for anchor, title, body in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}: rac3 report</title>\n<style>{STYLE}</style></head>\n<body><main>\n"
        f"<h1>{escape(name)}</h1>\n<nav>{links}</nav>\n{bodies}</main></body>\n</html>\n"
    )


def _color(name: str) -> str:
    return {"ra_cm3": OWN_COLOR, "cm3": CM3_COLOR, "cm3_best": BEST_COLOR}.get(name, OTHER_COLOR)


def _models(metrics: Mapping[str, Any]) -> str:
    names, compared = model_names(metrics), columns(metrics)
    held_out, named = metrics["evaluation"]["documents"], metrics["evaluation"]["with_entity"]
    body, shown = [], set()
    for row in ROWS:
        values = [lookup(column, row.path) for column in compared.values()]
        known = [value for value in values[: len(names)] if value is not None]
        if not known:
            continue
        shown.add(row.path[0])
        best = (min if row.lower_is_better else max)(known)
        bold = best if len(names) > 1 and known.count(best) == 1 else None
        cells = "".join(
            _cell(row, value, bold, named, interval(column, row), place >= len(names))
            for place, (column, value) in enumerate(zip(compared.values(), values, strict=True))
        )
        arrow = "↓" if row.lower_is_better else "↑"
        body.append(f'<tr><td>{row.label} <span class="soft">{arrow}</span></td>{cells}</tr>')
    if not body:
        return ""
    head = "".join(f"<th>{escape(label)}</th>" for label in compared)
    return (
        f'<p class="verdict">{escape(verdict(metrics))}</p><div class="split"><div class="scroll"><table class="wide">'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        f"{_legend(shown, held_out, len(compared) > len(names))}"
        f"{_noted(ratio_line(metrics), unjudged_line(metrics))}</div>"
    )


def _noted(*lines: str) -> str:
    return "".join(f'<p class="note">{escape(line[0].upper() + line[1:])}.</p>' for line in lines if line)


def _legend(shown: set[str], held_out: Mapping[str, int], baselines: bool) -> str:
    """What the rows of the comparison mean."""
    counts = " and ".join(f"{count} {split}" for split, count in held_out.items())
    words = [
        f"On {counts} documents. ↓ lower is better, ↑ higher is better, the best in bold. Perplexity is per token of "
        "the test split; the CLIP score is the similarity of a generated picture to its caption."
    ]
    if "entity_accuracy" in shown:
        words.append(
            "Entity accuracy: of all entities' emblems, that of the caption's entity is nearest to the picture's. "
            "Seen entities (validation) are trained on in other settings, unseen ones (test) are only in the memory."
        )
    if "name_accuracy" in shown:
        words.append("Name accuracy: the generated caption holds the entity's name.")
    if "captions" in shown:
        words.append(
            "CIDEr-D (0 to 10), BLEU-4 and ROUGE-L compare the captions of the test split with the documents' texts, "
            "one reference each; ± is half of the 95% interval over the captions."
        )
    if "pictures" in shown:
        words.append(
            "FID, FD, KID and CMMD are distances between the drawn pictures of the test split and its real ones, as "
            "sets; ± is half of the 95% interval. Only those of one network and as many pictures can be compared."
        )
    if shown & {"joint_accuracy", "joint_name_accuracy"}:
        words.append("Joint: all else that pictures are judged by is right too, in the picture or in the caption.")
    if shown & {"entity_accuracy", "name_accuracy"}:
        words.append("± is the 95% margin of a share of that many documents, in points.")
    if baselines:
        words.append(
            "A copy is of the first retrieved document, a mean is of all in context, in pixels. The VQGAN draws the "
            "documents' own codes: no model can draw better. The originals show how often the judge is right."
        )
    return f'<p class="note">{" ".join(words)}</p>'


def _cell(
    row: Row,
    value: float | None,
    best: float | None,
    named: Mapping[str, int],
    bounds: tuple[float, float] | None,
    baseline: bool,
) -> str:
    if value is None:
        return f'<td class="soft">{"" if baseline else "none"}</td>'
    spread = f' <span class="soft">± {100 * margin(value, named[row.split]):.0f}</span>' if row.share else ""
    if bounds:
        spread = f' <span class="soft">± {row.show((bounds[1] - bounds[0]) / 2)}</span>'
    return f"<td{' class=best' if value == best and not baseline else ''}>{row.show(value)}{spread}</td>"


def _strips(strips: Sequence[Strip], split: str) -> str:
    if not strips:
        return ""
    cards = "".join(
        f'<article><h3>{escape(strip.prompt)}</h3><div class="pictures">'
        f"{''.join(figure(picture) for picture in strip.pictures)}</div></article>"
        for strip in strips
    )
    note = (
        f"The first {len(strips)} captions of the {split} split, as they come. Found: what the caption retrieved, with "
        "its similarity. Then what each model drew, the best of its samples by CLIP."
    )
    if any(picture.mark for strip in strips for picture in strip.pictures):
        note += (
            " Same: a document of the caption's entity. Wrong: what a picture shows, as its source judges it, in place "
            "of what its caption asks for."
        )
    return f'<p class="note">{note}</p><div class="cards">{cards}</div>'


def _captions(captions: Sequence[Captioned]) -> str:
    cards = []
    for item in captions:
        lines = "".join(
            f"<dt>{escape(who)}</dt><dd>{_mark(mark)} {escape(text) or '(empty)'}</dd>"
            for who, (text, mark) in item.captions.items()
        )
        cards.append(f'<article class="caption">{figure(item.picture)}<dl>{lines}</dl></article>')
    note = (
        '<p class="note">The caption of lowest perplexity of each model. ✓ names the entity, and all else that '
        "pictures are judged by; ✗ does not.</p>"
    )
    return f'{note}<div class="cards">{"".join(cards)}</div>' if cards else ""


def _retrieval(metrics: Mapping[str, Any]) -> str:
    names = model_names(metrics)
    plots, short = [], []
    for split in reversed(metrics["evaluation"]["documents"]):
        for modality in ("image", "text"):
            curves = {name: _by_k(metrics, name, split, modality) for name in names}
            most = max((k for curve in curves.values() for k, _ in curve), default=0.0)
            lines = [
                # A model that does not retrieve has one value, which is drawn as a level.
                Line(
                    model_label(name),
                    [curve[0], (most, curve[0][1])] if len(curve) == 1 else curve,
                    _color(name),
                    dashed=len(curve) == 1,
                )
                for name, curve in curves.items()
                if curve
            ]
            if lines and most:
                short += [
                    f"{model_label(name)}, {modality} {split}: {count} at {k}"
                    for name in curves
                    for k, count in (lookup(metrics, (name, "fewer_than_k", split, modality)) or {}).items()
                    if count
                ]
                title = f"{modality} perplexity {split}".capitalize()
                plots.append(plot(title, "documents in context", "perplexity", lines, markers=True))
    recalls = recall_rows(metrics)
    if recalls:
        rows = [
            [f"recall at {k}, {split}", *(f"{share:.1%}" for share in parts.values())] for split, k, parts in recalls
        ]
        shown = table(["", *(f"query: {part}" for part in recalls[0][2])], rows)
        note = '<p class="note">Recall: how often a document of the query\'s entity is among the first retrieved.</p>'
    else:
        shown = note = ""
    for line in left_out_lines(metrics):
        note += f'<p class="note">{escape(line)}.</p>'
    if short:
        note += f'<p class="note">Documents with fewer before them than asked for: {escape("; ".join(short))}.</p>'
    return (f'<div class="plots">{"".join(plots)}</div>' if plots else "") + shown + note


def _by_k(metrics: Mapping[str, Any], name: str, split: str, modality: str) -> list[tuple[float, float]]:
    """Perplexity by the number of documents in context, as far as it is known."""
    points = lookup(metrics, (name, "perplexity_by_k", split, modality)) or {}
    return [(float(k), value) for k, value in points.items() if value is not None]


def _curve(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(float(line["step"]), float(line[key])) for line in lines]


def _training(training: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    plots = []
    for modality in ("image", "text"):
        lines = []
        for part, dashed in (("main", False), ("retrieved", True)):
            for name, steps in training.items():
                key = f"loss/{part}/{modality}"
                known = [
                    (float(line["step"]), float(line[key])) for line in steps if line.get(key)
                ]  # 0: no such tokens
                if known:
                    lines.append(Line(f"{model_label(name)}, {part}", known, _color(name), dashed))
        if lines:
            plots.append(plot(f"Loss on {modality} tokens", "step", "nats per token", lines))
    note = '<p class="note">Main documents are learned; retrieved ones stand in front of them.</p>'
    return f'<div class="plots">{"".join(plots)}</div>{note}' if plots else ""


def _encoders(content: Content) -> str:
    splits = {split: values for split, values in content.metrics["encoders"].items() if values}
    pairs = "".join(f"<div>{figure(original)}{figure(again)}</div>" for original, again in content.reconstructions)
    parts = [f'<div class="pictures all">{pairs}</div>'] if pairs else []
    rows = [[label, *(_number(values, path, form) for values in splits.values())] for label, path, form in ENCODER_ROWS]
    if splits:
        parts.append(table(["", *splits], rows))
        counts = ", ".join(f"{values['clip']['pairs']} {split}" for split, values in splits.items())
        parts.append(
            f'<p class="note">CLIP recall: how often a document\'s other half is among the first, out of all pairs '
            f"({counts}). That of a document with the same text or image is right too; ties count against it.</p>"
        )
    plots = []
    for name, key, title, unit in (
        ("vqgan", "psnr", "Fitting the VQGAN", "PSNR, dB"),
        ("clip", "accuracy", "Fitting CLIP", "pairs matched in the batch"),
    ):
        known = _curve([line for line in content.fitting.get(name, ()) if key in line], key)
        if known:
            plots.append(plot(title, "step", unit, [Line("", known, OWN_COLOR)]))
    return "".join(parts) + (f'<div class="plots">{"".join(plots)}</div>' if plots else "")


def _number(values: Mapping[str, Any], path: tuple[str, str], form: str) -> str:
    value = lookup(values, path)
    return "none" if value is None else format(value, form)


def _run(content: Content) -> str:
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in content.facts)
    rows = []
    for split, counts in content.metrics["documents"].items():
        lost = [
            ", ".join(f"{number:,} {reason}" for reason, number in counts[kind].items()) or "0"
            for kind in ("filtered", "rejects")
        ]
        rows.append([split, f"{counts['documents']:,}", f"{counts['tokens']:,}", *lost, f"{counts['texts_cut']:,}"])
    noted = "".join(
        f'<p class="note">{escape(f"{split}: {line}")}.</p>'
        for split, counts in content.metrics["documents"].items()
        for line in noted_lines(counts)
    )
    head = ["split", "documents", "tokens", "filtered", "rejected", "texts truncated"]
    return f"<dl>{facts}</dl>" + table(head, rows) + noted


def _time(seconds: Mapping[str, float]) -> str:
    most = max(seconds.values(), default=0) or 1
    bars = "".join(
        f'<span>{escape(stage)}</span><i style="width:{100 * spent / most:.1f}%"></i><span>{spent:,.1f} s</span>'
        for stage, spent in seconds.items()
    )
    return f'<p class="note">{sum(seconds.values()):,.0f} seconds in all.</p><div class="bars">{bars}</div>'


def table(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table of plain text."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def figure(picture: Picture) -> str:
    """An HTML figure that holds its picture."""
    label = f'<span class="label">{escape(picture.label)}</span>' if picture.label else ""
    image = ""
    if picture.pixels is not None:
        small = ' class="small"' if min(picture.pixels.shape[:2]) < SHOWN_SIDE else ""
        alt = ": ".join(words for words in (picture.label or "picture", picture.text) if words)
        image = f'<img{small} src="{png_uri(picture.pixels)}" alt="{escape(alt)}">'
    return f"<figure>{label}{image}<figcaption>{escape(picture.text)}{_mark(picture.mark)}</figcaption></figure>"


def _mark(mark: Mark | None) -> str:
    if mark is None:
        return ""
    return (
        f' <span class="{"right" if mark.right else "wrong"}">{"✓" if mark.right else "✗"} {escape(mark.text)}</span>'
    )
