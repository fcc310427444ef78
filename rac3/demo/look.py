"""What the page shows: HTML of documents and answers, its style, and the brush."""

import html
from collections.abc import Sequence

import numpy as np
import PIL.Image

from rac3.demo.form import MAX_PIXELS, Listed, Task
from rac3.documents.document import decode_image
from rac3.generation.answers import Answer, png_uri

HINTS: dict[Task, str] = {
    "draw": "Pictures of a text, after the documents that it retrieves.",
    "caption": "Texts for a picture, after the documents that it retrieves.",
    "infill_image": "Other pixels where you brush; those outside stay as they are. A text is optional.",
    "edit": "What your own documents show, where you brush. Add at least one document.",
}
TITLES = {"draw": "Drawn", "caption": "Captions", "infill_image": "Infilled", "edit": "Edited"}
SMALL = 128  # pixels; a smaller picture is shown with visible pixels


def thumbnail(data: bytes, least: int, most: int) -> PIL.Image.Image:
    """A picture file with a longer side in these limits: a larger one is scaled, a smaller one has larger pixels."""
    image = PIL.Image.fromarray(decode_image(data, MAX_PIXELS))
    image.thumbnail((most, most))
    times = max(1, -(-least // max(image.size)))
    return image.resize((image.width * times, image.height * times), PIL.Image.Resampling.NEAREST)


def figure(parts: Sequence[PIL.Image.Image | str], note: str) -> str:
    """Pictures and texts, with a note below."""
    inside = []
    for part in parts:
        if isinstance(part, str):
            inside.append(f"<p>{html.escape(part) or '(an empty text)'}</p>")
        else:
            pixels = " class='pixels'" if max(part.size) <= SMALL else ""
            inside.append(f"<img{pixels} alt='{html.escape(note, quote=True)}' src='{png_uri(np.asarray(part))}'>")
    return f"<figure>{''.join(inside)}<figcaption>{html.escape(note)}</figcaption></figure>"


def card(listed: Listed) -> str:
    """A document in context."""
    document = listed.document
    pictures = [thumbnail(each.data, 1, 256) for each in document.images]
    texts = [document.text] if document.text and listed.similarity is not None else []
    note = "yours" if listed.similarity is None else f"similarity {listed.similarity:.2f}"
    return figure([*pictures, *texts], note)


def results(answer: Answer) -> str:
    """The samples of an answer, best first, and what there is to know about them."""
    made = [
        figure(sample, f"{answer.score} {score:.2f}")
        for sample, score in zip(answer.samples, answer.scores, strict=True)
    ]
    notes = "".join(f"<p class='note'>{html.escape(note)}</p>" for note in answer.notes)
    return f"<h3>{TITLES[answer.task]}, best first</h3>{_samples(answer.task, made)}{notes}"


def so_far(task: Task, drawn: int, total: int, samples: Sequence[Sequence[PIL.Image.Image | str]]) -> str:
    """What there is of the samples, in the order of their numbers, below a line of the ids that are drawn."""
    made = [figure([part or "..." for part in sample], f"sample {n}") for n, sample in enumerate(samples, 1)]
    return f"<h3 role='status'>{TITLES[task]}: {drawn:,} of {total:,} ids</h3>{_samples(task, made, 'aria-busy=true')}"


def _samples(task: str, made: Sequence[str], state: str = "") -> str:
    kind = "texts" if task == "caption" else "pictures"
    return f"<div class='samples {kind}' {state}>{''.join(made)}</div>"


def hint(task: Task) -> str:
    return f"<p class='hint'>{HINTS[task]}</p>"


def alert(text: str) -> str:
    return f"<p class='alert' role='alert'>{html.escape(' '.join(text.split()))}</p>"


CSS = """
.gradio-container { max-width: 1080px !important; width: 100% !important; margin: auto; }
.html-container { padding: 0 !important; }
#message:has(.html-container > div:empty) { display: none; }
#task label { padding: 6px 8px; gap: 6px; }
h3 { font-size: 14px; font-weight: 600; margin: 0 0 8px; color: var(--body-text-color); }
figure { margin: 0; }
figure img { width: 100%; border-radius: 6px; display: block; }
img.pixels, .brush img { image-rendering: pixelated; }
figure p { margin: 4px 0 0; font-size: 14px; line-height: 1.3; color: var(--body-text-color); overflow-wrap: anywhere; }
figcaption, .note, .hint { font-size: 13px; color: var(--body-text-color); opacity: 0.75; margin: 4px 0 0; }
.title { font-size: 20px; font-weight: 600; margin: 0; color: var(--body-text-color); }
.alert { margin: 0; padding: 8px 12px; border-left: 4px solid #dc2626; background: var(--background-fill-secondary);
  color: var(--body-text-color); }
.samples { display: grid; gap: 12px; }
.samples.pictures { grid-template-columns: repeat(auto-fill, minmax(100px, 1fr)); }
.samples.texts p { font-size: 16px; margin: 0; }
.cards { flex-wrap: wrap; gap: 12px; align-items: stretch !important; }
.cards > .column { flex: 0 0 144px !important; min-width: 144px !important; max-width: 144px; gap: 6px;
  justify-content: space-between; }
.cards .row { gap: 6px; flex-wrap: nowrap; }
.cards button { min-width: 0; padding-left: 4px; padding-right: 4px; }
"""

BRUSH = """
<div class="brush"><img alt="the picture" src="${picture}"><canvas></canvas></div>
<div class="tools" style="display: ${masks ? 'flex' : 'none'}">
  <label>Brush <input type="range" min="4" max="30" value="12" aria-label="width of the brush"></label>
  <button type="button">Clear the mask</button>
</div>
"""
BRUSH_CSS = """
.brush { position: relative; max-width: 480px; margin: auto; }
.brush img { width: 100%; display: block; border-radius: 6px; }
.brush canvas { position: absolute; inset: 0; width: 100%; height: 100%; opacity: 0.65; touch-action: none;
  cursor: crosshair; border-radius: 6px; }
.tools { align-items: center; justify-content: space-between; gap: 12px; max-width: 480px; margin: 8px auto 0;
  color: var(--body-text-color); font-size: 14px; }
.tools label { display: flex; align-items: center; gap: 8px; }
.tools button { padding: 4px 10px; border-radius: 6px; background: var(--button-secondary-background-fill);
  color: var(--button-secondary-text-color); border: 1px solid var(--border-color-primary); }
"""
BRUSH_JS = """
const image = element.querySelector('img'), canvas = element.querySelector('canvas');
const width = element.querySelector('input'), pen = canvas.getContext('2d');
let last = null;
function reset() {
  canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
  canvas.style.pointerEvents = props.masks ? 'auto' : 'none';
  props.value = '';
}
function stroke(event) {
  const box = canvas.getBoundingClientRect(), scale = canvas.width / box.width;
  const at = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  pen.lineCap = 'round'; pen.strokeStyle = '#ff2d87'; pen.lineWidth = width.value / 100 * canvas.width;
  pen.beginPath(); pen.moveTo(...(last || at)); pen.lineTo(...at); pen.stroke();
  last = at;
}
canvas.addEventListener('pointerdown', event => {
  canvas.setPointerCapture(event.pointerId); last = null; stroke(event);
});
canvas.addEventListener('pointermove', event => { if (event.buttons && last) stroke(event); });
canvas.addEventListener('pointerup', () => { last = null; props.value = canvas.toDataURL('image/png'); });
element.querySelector('button').addEventListener('click', reset);
image.addEventListener('load', reset);
watch('masks', reset);
if (image.complete) reset();
"""
