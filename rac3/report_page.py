"""The page of the report: one HTML file without scripts or outside resources, readable on a phone too.

All that comes from documents or from a model is escaped: captions are what strangers wrote.
"""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from rac3.report_table import MODELS, ROWS, Row, lookup, margin, verdict

COLORS = {"ra_cm3": "#1f5fbf", "cm3": "#c2601c", "ra_cm3_random": "#7a7f87"}
SHOWN_SIDE = 108  # CSS pixels of a picture's side

STYLE = """
:root { color-scheme: light; --ink: #1c2127; --soft: #5b6570; --line: #dfe3e8; --paper: #fff; --tint: #f5f7f9; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--tint); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 1.7rem; margin: 0 0 4px; } h2 { font-size: 1.2rem; margin: 0 0 6px; }
h3 { font-size: .95rem; margin: 0 0 10px; font-weight: 600; overflow-wrap: anywhere; }
p { margin: 0 0 12px; max-width: 76ch; } p.note, .soft { color: var(--soft); font-size: .9rem; }
p.verdict { font-size: 1.05rem; }
nav { font-size: .9rem; margin: 10px 0 18px; } nav a { margin-right: 14px; color: #1f5fbf; white-space: nowrap; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px;
  margin: 0 0 18px; }
.scroll { overflow-x: auto; margin: 0 0 14px; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } thead th { color: var(--soft); font-weight: 600; }
td.best { font-weight: 700; } td .soft { font-weight: 400; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 16px; margin: 0 0 14px; font-size: .92rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 500px), 1fr)); gap: 14px; }
article { border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; min-width: 0; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(84px, 1fr)); gap: 10px; max-width: 620px; }
figure { margin: 0; font-size: .78rem; line-height: 1.3; min-width: 0; }
figure img { display: block; width: 100%; max-width: SIDEpx; aspect-ratio: 1; border-radius: 4px;
  border: 1px solid var(--line); }
img.small { image-rendering: pixelated; }
figcaption { margin-top: 4px; overflow-wrap: anywhere; display: -webkit-box; -webkit-box-orient: vertical;
  -webkit-line-clamp: 7; overflow: hidden; }
figure .label { display: block; font-weight: 600; margin-bottom: 3px; white-space: nowrap; }
.right { color: #17713a; font-weight: 600; } .wrong { color: #b3261e; font-weight: 600; }
.caption { display: grid; grid-template-columns: 84px 1fr; gap: 14px; align-items: start; }
.caption dl { font-size: .86rem; margin: 0; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); gap: 8px 14px; }
.plots img { width: 100%; max-width: 520px; height: auto; display: block; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: 5px 12px; align-items: center;
  font-size: .92rem; max-width: 760px; font-variant-numeric: tabular-nums; }
.bars i { display: block; height: 14px; min-width: 2px; border-radius: 3px; background: #1f5fbf; }
@media (max-width: 560px) { main { padding: 14px 10px 40px; } section { padding: 14px 12px; } th, td { padding-right: 10px; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 5px; } }
""".replace("SIDE", str(SHOWN_SIDE))


@dataclass(frozen=True)
class Mark:
    """Whether something is right, and how that reads."""

    right: bool
    text: str


@dataclass(frozen=True)
class Picture:
    """A picture with what stands above (`label`) and below it; without pixels, only the words."""

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
    """What the page shows beside the metrics.

    Attributes:
      facts: what was run, as name and value.
      training: lines of `metrics.jsonl` by model; `fitting`: by encoder.
      reconstructions: originals, each with its reconstruction.
    """

    name: str
    metrics: Mapping[str, Any]
    facts: Sequence[tuple[str, str]]
    training: Mapping[str, Sequence[Mapping[str, float]]]
    fitting: Mapping[str, Sequence[Mapping[str, float]]]
    strips: Sequence[Strip]
    captions: Sequence[Captioned]
    reconstructions: Sequence[tuple[Picture, Picture]]


def page(content: Content) -> str:
    """The whole page. Sections that have nothing to show are left out."""
    sections = [
        ("models", "The models side by side", _models(content.metrics)),
        ("pictures", "From captions to pictures", _strips(content.strips)),
        ("captions", "From pictures to captions", _captions(content.captions)),
        ("retrieval", "Retrieved documents in context", _retrieval(content.metrics)),
        ("training", "Training", _training(content.training)),
        ("encoders", "Frozen encoders", _encoders(content)),
        ("run", "What was run", _run(content)),
        ("time", "Time", _time(content.metrics["stages"])),
    ]
    kept = [(anchor, title, body) for anchor, title, body in sections if body]
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title, _ in kept)
    bodies = "".join(f'<section id="{anchor}"><h2>{title}</h2>{body}</section>\n' for anchor, title, body in kept)
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(content.name)}: rac3 report</title>\n<style>{STYLE}</style></head>\n<body><main>\n"
        f"<h1>{escape(content.name)}</h1>\n<nav>{links}</nav>\n{bodies}</main></body>\n</html>\n"
    )


def _models(metrics: Mapping[str, Any]) -> str:
    names = [name for name in MODELS if name in metrics]
    held_out = metrics["evaluation"]["documents"]
    body = []
    for row in ROWS:
        values = {name: lookup(metrics[name], row.path) for name in names}
        known = [value for value in values.values() if value is not None]
        if not known:
            continue
        best = (min if row.lower_is_better else max)(known)
        cells = "".join(_cell(row, values[name], best if len(known) > 1 else None, held_out) for name in names)
        arrow = "↓" if row.lower_is_better else "↑"
        body.append(f'<tr><td>{row.label} <span class="soft">{arrow}</span></td>{cells}</tr>')
    if not body:
        return ""
    head = "".join(f"<th>{MODELS[name]}</th>" for name in ("", *names) if name) 
    counts = ", ".join(f"{count} {split}" for split, count in held_out.items())
    return (
        f'<p class="verdict">{escape(verdict(metrics))}</p><div class="scroll"><table><thead><tr><th></th>{head}</tr>'
        f"</thead><tbody>{''.join(body)}</tbody></table></div>"
        f'<p class="note">On held-out documents ({counts}). ↓ lower is better, ↑ higher is better, best in bold. '
        "Perplexities are per token, on the test split. ± is the 95% margin of a share over that many documents. "
        "Entity accuracy: is the generated picture nearest to the emblem of the entity that the caption names? "
        "Name accuracy: does the generated caption name the entity?</p>"
    )


def _cell(row: Row, value: float | None, best: float | None, held_out: Mapping[str, int]) -> str:
    if value is None:
        return '<td class="soft">none</td>'
    spread = f' <span class="soft">± {100 * margin(value, held_out[row.split]):.0f}</span>' if row.share else ""
    return f'<td{" class=best" if value == best else ""}>{row.show(value)}{spread}</td>'


def _strips(strips: Sequence[Strip]) -> str:
    if not strips:
        return ""
    cards = "".join(
        f"<article><h3>{escape(strip.prompt)}</h3><div class=pictures>"
        f"{''.join(_figure(picture) for picture in strip.pictures)}</div></article>"
        for strip in strips
    )
    return (
        f'<p class="note">The first {len(strips)} prompts of the test split, as they come. Above each retrieved '
        "document stands its similarity to the prompt; the retriever sees only the caption. Of several samples, CLIP "
        f'keeps the best.</p><div class="cards">{cards}</div>'
    )


def _captions(captions: Sequence[Captioned]) -> str:
    cards = []
    for item in captions:
        lines = "".join(
            f"<dt>{escape(who)}</dt><dd>{escape(text) or '(empty)'}{_mark(mark)}</dd>"
            for who, (text, mark) in item.captions.items()
        )
        cards.append(f'<article class="caption">{_figure(item.picture)}<dl>{lines}</dl></article>')
    note = '<p class="note">Of several samples, the one of lowest perplexity is kept.</p>'
    return f'{note}<div class="cards">{"".join(cards)}</div>' if cards else ""


def _retrieval(metrics: Mapping[str, Any]) -> str:
    plots = []
    for modality in ("image", "text"):
        lines = []
        for name in MODELS:
            points = lookup(metrics.get(name, {}), ("perplexity_by_k", "test", modality)) or {}
            known = [(int(k), value) for k, value in points.items() if value is not None]
            if known and name == "cm3" and "ra_cm3" in metrics:  # no documents: the same at any K, as a level
                most = max(int(k) for k in lookup(metrics["ra_cm3"], ("perplexity_by_k", "test", modality)) or {"0": 0})
                known = [(0, known[0][1]), (most, known[0][1])]
            if known:
                lines.append(Line(MODELS[name], *zip(*known, strict=True), COLORS[name], dashed=name == "cm3"))
        if lines:
            plots.append(plot(f"Perplexity of {modality}s, test", "documents in context", "perplexity", lines, True))
    tables = []
    recalls = metrics["retrieval"]
    for key, value in recalls.items():
        if key.startswith("recall_at_") and value:
            rows = [("test", value)] + ([("validation", recalls["validation"][key])] if recalls["validation"] else [])
            tables.append(_table(
                ["query", *(split for split, _ in rows)],
                [[f"{part} of the document", *(f"{recall[part]:.1%}" for _, recall in rows)] for part in value],
            ))
            tables.append(f'<p class="note">Recall: how often a document of the query\'s entity is among the first '
                          f'{key.removeprefix("recall_at_")} retrieved.</p>')
    body = (f'<div class="plots">{"".join(plots)}</div>' if plots else "") + "".join(tables)
    return body


def _training(training: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    plots = []
    for modality in ("image", "text"):
        lines = []
        for part, dashed in (("main", False), ("retrieved", True)):
            for name, steps in training.items():
                key = f"loss/{part}/{modality}"
                known = [(line["step"], line[key]) for line in steps if line.get(key)]  # 0: no such tokens
                if known:
                    label = f"{MODELS[name]}, {part}"
                    lines.append(Line(label, *zip(*known, strict=True), COLORS[name], dashed))
        if lines:
            plots.append(plot(f"Loss on {modality} tokens", "step", "nats per token", lines))
    note = (
        '<p class="note">Main documents, and the retrieved documents before them, apart. The retrieved ones are '
        "training documents too; their share in the loss is small, so that the model learns to use them.</p>"
    )
    return f'<div class="plots">{"".join(plots)}</div>{note}' if plots else ""


def _encoders(content: Content) -> str:
    splits = {split: values for split, values in content.metrics["encoders"].items() if values}
    pairs = "".join(f"<div>{_figure(original)}{_figure(again)}</div>" for original, again in content.reconstructions)
    parts = [f'<div class="pictures">{pairs}</div><p></p>'] if pairs else []
    names = {"psnr": "VQGAN: PSNR, dB", "codebook_use": "VQGAN: codes used", "codebook_perplexity": "VQGAN: codebook perplexity"}
    rows = [[label, *(_number(values["vqgan"], name, ".1%" if name == "codebook_use" else ".1f") for values in splits.values())]
            for name, label in names.items()]
    for way, label in (("text_to_image", "text to image"), ("image_to_text", "image to text")):
        for k in (1, 5):
            rows.append([f"CLIP: {label}, recall at {k}",
                         *(_number(values["clip"], f"{way}_recall_at_{k}", ".1%") for values in splits.values())])
    if splits:
        parts.append(_table(["", *splits], rows))
        counts = ", ".join(f"{values['clip']['pairs']} {split}" for split, values in splits.items())
        parts.append(f'<p class="note">CLIP recall: is a document\'s own other half among the first, of all the pairs '
                     f"({counts})?</p>")
    plots = []
    for name, key, title, unit in (("vqgan", "psnr", "Fitting the VQGAN", "PSNR, dB"),
                                   ("clip", "accuracy", "Fitting CLIP", "pairs matched in the batch")):
        known = [(line["step"], line[key]) for line in content.fitting.get(name, ()) if key in line]
        if known:
            plots.append(plot(title, "step", unit, [Line("", *zip(*known, strict=True), COLORS["ra_cm3"])]))
    return "".join(parts) + (f'<div class="plots">{"".join(plots)}</div>' if plots else "")


def _number(values: Mapping[str, float] | None, name: str, form: str) -> str:
    return "none" if values is None else format(values[name], form)


def _run(content: Content) -> str:
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in content.facts)
    rows = []
    for split, counts in content.metrics["documents"].items():
        lost = [", ".join(f"{number:,} {reason}" for reason, number in counts[kind].items()) or "0"
                for kind in ("filtered", "rejects")]
        rows.append([split, f"{counts['documents']:,}", f"{counts['tokens']:,}", *lost, f"{counts['texts_cut']:,}"])
    return f"<dl>{facts}</dl>" + _table(["split", "documents", "tokens", "filtered", "rejected", "texts cut"], rows)


def _time(seconds: Mapping[str, float]) -> str:
    most = max(seconds.values(), default=0) or 1
    bars = "".join(
        f'<span>{escape(stage)}</span><i style="width:{100 * spent / most:.1f}%"></i><span>{spent:,.1f} s</span>'
        for stage, spent in seconds.items()
    )
    return f'<p class="note">{sum(seconds.values()):,.0f} seconds in all.</p><div class="bars">{bars}</div>'


def _table(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _figure(picture: Picture) -> str:
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
    return f' <span class="{"right" if mark.right else "wrong"}">{"✓" if mark.right else "✗"} {escape(mark.text)}</span>'


def png_uri(pixels: UInt8[np.ndarray, "height width 3"]) -> str:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True)
class Line:
    """A line of a plot."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: str
    dashed: bool = False


def plot(title: str, x_label: str, y_label: str, lines: Sequence[Line], points: bool = False) -> str:
    """A plot as an image element; `points` marks the values, at whole numbers."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.6, 3.0), layout="constrained")
    axes = figure.subplots()
    for line in lines:
        style = {"linestyle": "--" if line.dashed else "-", "marker": "o" if points and not line.dashed else ""}
        axes.plot(line.x, line.y, color=line.color, label=line.label, linewidth=1.8, markersize=5, **style)
    axes.set_title(title, fontsize=10.5, loc="left", fontweight="bold")
    axes.set_xlabel(x_label, fontsize=9)
    axes.set_ylabel(y_label, fontsize=9)
    axes.tick_params(labelsize=8.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e9ed", linewidth=0.8)
    if any(line.label for line in lines):
        axes.legend(fontsize=8.5, frameon=False)
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": title}):  # equal data, equal file
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    ends = "; ".join(f"{line.label} {line.y[0]:.3g} to {line.y[-1]:.3g}".strip() for line in lines)
    source = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/svg+xml;base64,{source}" alt="{escape(f"{title}, {y_label}: {ends}")}">'
