"""Demo: a web page that draws, captions, infills and edits with a trained model.

Only this module uses gradio (`pip install 'rac3[demo]'`), and imports it when the page is built.
"""

import base64
import hashlib
import html
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import PIL.Image

from rac3.answering import Model, Prompt, mask_of
from rac3.config import InputError
from rac3.documents.document import Document, Image, ImageError, Text, decode_image
from rac3.execution.progress import Progress
from rac3.generation.answers import Answer
from rac3.generation.engine import Progress as Drawing
from rac3.generation.sampling import Contrast, Guidance, Sampling
from rac3.run import Found

Task = Literal["draw", "caption", "infill_image", "edit"]
TASKS: dict[Task, str] = {"draw": "Draw", "caption": "Caption", "infill_image": "Infill", "edit": "Edit"}
HINTS: dict[Task, str] = {
    "draw": "Pictures of a text, after the documents that it retrieves.",
    "caption": "Texts for a picture, after the documents that it retrieves.",
    "infill_image": "Other pixels where you brush; those outside stay as they are. A text is optional.",
    "edit": "What your own documents show, where you brush. Add at least one document.",
}
TITLES = {"draw": "Drawn", "caption": "Captions", "infill_image": "Infilled", "edit": "Edited"}
MASKED = ("infill_image", "edit")
FILES = [".png", ".jpg", ".jpeg", ".webp"]
MAX_PIXELS = 16_000_000  # of an uploaded picture
EMPTY = "data:,"  # of an `<img>`
CANVAS = 384, 768  # pixels of the longer side of the picture to brush on, at least and at most
SMALL = 128  # pixels; a smaller picture is shown with visible pixels
MOST_DOCUMENTS, MOST_SAMPLES, MOST_CHARACTERS = 4, 8, 2000
MODEL = {"concurrency_id": "model", "concurrency_limit": 1}  # of the events that use it: one at a time
KEPT = 3600  # seconds that the server keeps uploads


@dataclass(frozen=True)
class DemoOptions:
    """Where `rac3 demo` listens, and what it accepts.

    Attributes:
      host: the address to listen at. The default is for this machine alone; all who reach another one, such as
        0.0.0.0, may use the model.
      port: the port of the page.
      max_upload_mb: the largest picture file, in megabytes.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    max_upload_mb: float = 8.0

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise InputError(f"port={self.port} is outside 1 to 65535; use 7860, say")
        if not self.max_upload_mb > 0:
            raise InputError(f"max_upload_mb={self.max_upload_mb} admits no picture; use 8, say")

    @property
    def max_bytes(self) -> int:
        return int(self.max_upload_mb * 2**20)


@dataclass(frozen=True, eq=False)  # gradio compares by hash
class Listed:
    """A document on the page, and its similarity to the query; None if it is the visitor's own."""

    document: Document
    similarity: float | None = None


@dataclass(frozen=True, eq=False)
class Context:
    """The documents on the page.

    Attributes:
      found_for: the query and the number of documents that the retrieved ones are for.
    """

    listed: tuple[Listed, ...] = ()
    found_for: tuple[str, int] = ("", 0)

    def find(self, query: str, k: int, retrieve: Callable[[int], Sequence[Found]]) -> "Context":
        """`k` documents for a query: the visitor's own stay where they are, retrieved ones fill the other places.

        The same query and k leave everything as it is, so that a removed document stays away.
        """
        if (query, k) == self.found_for:
            return self
        own = [each for each in self.listed if each.similarity is None]
        retrieved = retrieve(max(0, k - len(own))) if query else []
        found = iter([Listed(each.document, each.score) for each in retrieved])
        kept = [each if each.similarity is None else next(found, None) for each in self.listed]
        return Context(tuple(each for each in [*kept, *found] if each is not None), (query, k))

    def removed(self, number: int) -> "Context":
        """Without one document."""
        return replace(self, listed=self.listed[:number] + self.listed[number + 1 :])

    def replaced(self, number: int, document: Document) -> "Context":
        """With the visitor's own in the place of another."""
        return replace(self, listed=(*self.listed[:number], Listed(document), *self.listed[number + 1 :]))

    def added(self, document: Document) -> "Context":
        """With one more of the visitor's own, which takes the place of the last retrieved one if there are `k`."""
        retrieved = [number for number, each in enumerate(self.listed) if each.similarity is not None]
        full = self if len(self.listed) < self.found_for[1] or not retrieved else self.removed(retrieved[-1])
        return replace(full, listed=(*full.listed, Listed(document)))

    def captioned(self, number: int, text: str) -> "Context":
        """With another text of one of the visitor's own documents."""
        document = self.listed[number].document
        return self.replaced(number, own_document(document.images[0].data, text))


@dataclass(frozen=True)
class Form:
    """What a visitor has entered.

    Attributes:
      picture: the file; None is none.
      mask: the brush's strokes, as `data:image/png` of any size; "" is none.
      guidance: 1 is none.
      without: what guidance leaves out; the documents, if there is no text.
      copying: 0 is none.
    """

    task: Task
    text: str
    picture: bytes | None
    mask: str
    samples: int
    seed: int
    temperature: float
    guidance: float
    without: Literal["text", "documents"]
    copying: float

    def prompt(self, context: Context, configured: Sampling) -> Prompt:
        """The prompt for the model: what is listed is its context, and nothing is retrieved besides."""
        text = "" if self.task == "caption" else self.text.strip()
        image = None if self.task == "draw" or self.picture is None else decode_image(self.picture, MAX_PIXELS)
        mask = None if image is None or not self.mask else mask_of(brushed(self.mask, image), image)
        guidance = Guidance(float(self.guidance), self.without if text else "documents")
        return Prompt(
            task=self.task,
            text=text,
            image=image,
            mask=mask if self.task in MASKED else None,
            documents=[each.document for each in context.listed],
            retrieve=0,
            ensemble=True,
            samples=int(self.samples),
            seed=int(self.seed),
            sampling=replace(
                configured,
                temperature=float(self.temperature),
                guidance=guidance,
                contrast=configured.contrast if guidance.scale == 1 else Contrast(),
                copying=replace(configured.copying, weight=float(self.copying)),
            ),
        )


def picture_of(data: bytes, max_bytes: int) -> bytes:
    """An uploaded file, if it is a picture that the demo takes.

    Raises:
      InputError: it is too large, or no PNG, JPEG or WebP file.
    """
    if len(data) > max_bytes:
        raise InputError(f"the file has {len(data) / 2**20:.1f} MB, more than the {max_bytes / 2**20:g} MB allowed")
    try:
        decode_image(data, MAX_PIXELS)
    except ImageError as error:
        raise InputError(f"the file is not usable: {error}; upload a PNG, JPEG or WebP picture") from error
    return data


def own_document(data: bytes, text: str) -> Document:
    """A visitor's picture, with its caption if there is one, as a document."""
    texts = (Text(text.strip()),) if text.strip() else ()
    return Document("yours", (*texts, Image(data)), {})


def brushed(mask: str, image: np.ndarray) -> PIL.Image.Image:
    """White at the pixels of the image that are covered by the brush's strokes, at least half of each.

    Raises:
      InputError: the mask is no PNG picture of the canvas.
    """
    try:
        data = base64.b64decode(mask.removeprefix("data:image/png;base64,"), validate=True)
        with PIL.Image.open(io.BytesIO(data), formats=["PNG"]) as strokes:
            if max(strokes.size) > 2 * CANVAS[1]:
                raise InputError(f"the mask has {strokes.width} x {strokes.height} pixels; brush it again")
            alpha = strokes.convert("RGBA").getchannel("A")
    except (ValueError, OSError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError("the mask is no picture; brush it again") from error
    return alpha.resize((image.shape[1], image.shape[0]), PIL.Image.Resampling.BOX)


# What the page shows.


def source(image: PIL.Image.Image) -> str:
    """A picture as the `src` of an `<img>`."""
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


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
            inside.append(f"<img{pixels} alt='{html.escape(note, quote=True)}' src='{source(part)}'>")
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
    kind = "texts" if answer.task == "caption" else "pictures"
    made = [
        figure(sample, f"{answer.score} {score:.2f}")
        for sample, score in zip(answer.samples, answer.scores, strict=True)
    ]
    notes = "".join(f"<p class='note'>{html.escape(note)}</p>" for note in answer.notes)
    return f"<h3>{TITLES[answer.task]}, best first</h3><div class='samples {kind}'>{''.join(made)}</div>{notes}"


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


class Session:
    """The model, as the page uses it: one call at a time."""

    def __init__(self, model: Model, options: DemoOptions) -> None:
        self.model, self.options = model, options
        split = "test" if model.experiment.data.test is not None else "train"
        first = [item.document for item in model.documents(split).many(range(min(24, len(model.documents(split)))))]
        self.examples = [each for each in first if each.text and each.images]
        self.most = MOST_DOCUMENTS if model.experiment.retrieves else 0

    def sampling(self, task: Task) -> Sampling:
        """How the experiment evaluates the task."""
        settings = self.model.experiment.evaluation
        return settings.caption_sampling if task == "caption" else settings.image_sampling

    def find(self, context: Context, task: Task, text: str, picture: bytes | None, k: int) -> Context:
        """The context with the documents for a text, or else for a picture; an edit has the visitor's own alone."""
        text = "" if task == "caption" else text.strip()
        image = None if task == "draw" or text or picture is None else picture
        query = text or (hashlib.blake2b(image).hexdigest() if image else "")
        pixels = None if image is None else decode_image(image, MAX_PIXELS)
        k = 0 if task == "edit" else min(int(k), self.most)
        return context.find(query, k, lambda k: self.model.retrieve(text, pixels, k))

    def answer(self, prompt: Prompt, on_progress: Callable[[Drawing], None] | None = None) -> Answer:
        ((_, answer),) = self.model.answers([prompt], on_progress)
        if isinstance(answer, InputError):
            raise answer
        return answer

    def warm(self) -> None:
        """Draws once, so that the first visitor does not wait for the compiler."""
        text = self.examples[0].text if self.examples else "a"
        sampling = self.sampling("draw")
        form = Form("draw", text, None, "", 4, 0, sampling.temperature, 1.0, "text", 0.0)
        self.answer(form.prompt(self.find(Context(), "draw", text, None, 2), sampling))


def demo(model: Model, options: DemoOptions) -> None:
    """Serves the page until it is interrupted.

    Raises:
      InputError: gradio is not installed, a model that is not trained, or a port that is taken.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise InputError("`rac3 demo` needs gradio; run: pip install 'rac3[demo]'") from error
    with Progress("opening", 3, "steps") as bar:  # the first thing that is seen
        session = Session(model, options)
        bar.update()
        session.warm()
        bar.update()
        blocks = Page(session).blocks
        try:
            blocks.launch(
                server_name=options.host,
                server_port=options.port,
                max_file_size=options.max_bytes,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                ssr_mode=False,
                show_error=True,
                footer_links=[],
                css=CSS,
                theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
                state_session_capacity=100,
            )
        except OSError as error:
            raise InputError(f"cannot listen at {options.host}:{options.port} ({error}); use another --port") from error
        bar.update()
    host = f"[{options.host}]" if ":" in options.host else options.host
    print(f"demo: http://{host}:{options.port} (Ctrl-C ends it)", flush=True)
    blocks.block_thread()


class Page:
    """The page: its components, and what happens when they are used.

    Handlers take the values of components, and give the new values of others.
    """

    def __init__(self, session: Session) -> None:
        import gradio as gr

        self.gr, self.session = gr, session
        name = html.escape(session.model.experiment.name)
        self.blocks = gr.Blocks(title=f"rac3: {name}", analytics_enabled=False, delete_cache=(KEPT, KEPT))
        with self.blocks:
            self.picture = gr.State(None, time_to_live=KEPT)
            self.context = gr.State(Context(), time_to_live=KEPT)
            self.turn = gr.State(0)  # of the examples
            self._html(f"<p class='title'>rac3: {name}</p>")
            with gr.Row():
                with gr.Column(min_width=320):
                    self._build_prompt()
                    self._build_settings()
                with gr.Column(min_width=320):
                    self._build_answer()
            self._connect()

    def _html(self, value: str = "", **options: Any) -> Any:
        return self.gr.HTML(value, apply_default_css=False, **options)

    def _upload(self, label: str, **options: Any) -> Any:
        return self.gr.UploadButton(label, file_types=FILES, type="binary", size="sm", min_width=60, **options)

    def _build_prompt(self) -> None:
        gr, examples = self.gr, self.session.examples
        placeholder = examples[0].text if examples else ""
        self.task = gr.Radio(
            [(name, task) for task, name in TASKS.items()], value="draw", show_label=False, elem_id="task"
        )
        self.hint = self._html(hint("draw"))
        self.text = gr.Textbox(
            label="Text", placeholder=placeholder, lines=2, max_lines=4, max_length=MOST_CHARACTERS, elem_id="text"
        )
        self.drop = gr.File(label="Picture", file_types=FILES, type="binary", height=140, visible=False, elem_id="drop")
        brush: dict[str, Any] = {"html_template": BRUSH, "css_template": BRUSH_CSS, "js_on_load": BRUSH_JS}
        self.canvas = self._html(picture=EMPTY, masks=False, visible=False, **brush)
        self.other = gr.Button("Another picture", size="sm", visible=False)
        with gr.Row():
            self.example = gr.Button("Example", visible=bool(examples), min_width=100)
            self.go = gr.Button(TASKS["draw"], variant="primary", min_width=100, elem_id="go")
        self.message = self._html(elem_id="message")

    def _build_settings(self) -> None:
        gr, most, sampling = self.gr, self.session.most, self.session.sampling("draw")
        self.k = gr.Slider(0, most, min(2, most), step=1, label="Documents in context (K)", visible=most > 0)
        self.guidance = gr.Slider(1, 6, sampling.guidance.scale, step=0.25, label="Guidance (1 is none)")
        self.copying = gr.Slider(
            0, 1, sampling.copying.weight, step=0.05, label="Copying from the documents (0 is none)"
        )
        with gr.Accordion("More settings", open=False):
            self.samples = gr.Slider(1, MOST_SAMPLES, 4, step=1, label="Samples")
            self.temperature = gr.Slider(0, 2, sampling.temperature, step=0.05, label="Temperature")
            self.seed = gr.Number(0, precision=0, minimum=0, maximum=2**31 - 1, label="Seed")
            self.without = gr.Radio(["text", "documents"], value="text", label="Guidance: away from no ...")

    def _build_answer(self) -> None:
        @self.gr.render(inputs=[self.context], show_progress="hidden")
        def cards(context: Context) -> None:
            self._build_cards(context)

        self.add = self._upload("Add your own document", elem_id="add")
        self.result = self._html(min_height=160, elem_id="result")

    def _build_cards(self, context: Context) -> None:
        """The documents in context, each with its buttons."""
        gr, outputs = self.gr, [self.context, self.message]
        empty = "" if context.listed else "<p class='hint'>No documents yet: they are retrieved, or your own.</p>"
        self._html(f"<h3>In context</h3>{empty}")
        with gr.Row(elem_classes="cards"):
            for number, listed in enumerate(context.listed):
                with gr.Column(min_width=144):
                    self._html(card(listed))
                    if listed.similarity is None:
                        own = gr.Textbox(
                            listed.document.text, placeholder="its caption", show_label=False, container=False
                        )
                        self._on(own.blur, partial(self.caption_own, number), [self.context, own], outputs)
                    with gr.Row():
                        remove, replace = gr.Button("Remove", size="sm", min_width=60), self._upload("Replace")
                self._on(remove.click, partial(self.remove, number), [self.context], outputs)
                self._on(replace.upload, partial(self.replace, number), [self.context, replace], outputs)

    def _connect(self) -> None:
        picture = [self.picture, self.drop, self.canvas, self.other]
        task = [self.hint, self.text, self.drop, self.canvas, self.other, self.k, self.temperature, self.go]
        query = [self.context, self.task, self.text, self.picture, self.k]
        settings = [self.samples, self.seed, self.temperature, self.guidance, self.without, self.copying]
        found = [self.context, self.message]

        def find(event: Callable[..., Any]) -> Any:
            return self._on(event, self.find, query, found, **MODEL)

        find(self._on(self.task.change, self.show_task, [self.task, self.picture], task).then)
        find(self._on(self.drop.upload, self.upload, [self.task, self.drop], [*picture, self.message]).success)
        find(
            self._on(
                self.example.click, self.show_example, [self.task, self.turn], [*picture, self.text, self.turn]
            ).success
        )
        self._on(self.other.click, self.forget, [self.task], picture)
        self._on(self.add.upload, self.add_own, [self.context, self.add], found)
        find(self.text.blur)
        find(self.k.release)

        def answer(progress: Any = self.gr.Progress(), *values: Any) -> dict[Any, Any]:  # noqa: B008  # as gradio wants it
            return self._safe(partial(self.answer, progress))(*values)

        self.gr.on(
            [self.go.click, self.text.submit],
            answer,
            [*query, self.canvas, *settings],
            [self.context, self.result, self.message],
            scroll_to_output=True,
            show_progress_on=self.result,
            api_visibility="private",
            **MODEL,
        )

    def _on(
        self,
        event: Callable[..., Any],
        work: Callable[..., dict[Any, Any]],
        inputs: list[Any],
        outputs: list[Any],
        **how: Any,
    ) -> Any:
        outputs = [*dict.fromkeys([*outputs, self.message])]
        return event(self._safe(work), inputs, outputs, show_progress="hidden", api_visibility="private", **how)

    def _safe(self, work: Callable[..., dict[Any, Any]]) -> Callable[..., dict[Any, Any]]:
        """`work`, whose InputErrors become a line of the page."""

        def safe(*values: Any) -> dict[Any, Any]:
            try:
                return {self.message: "", **work(*values)}
            except InputError as error:
                return {self.message: alert(str(error))}

        return safe

    # The handlers.

    def show_task(self, task: Task, data: bytes | None) -> dict[Any, Any]:
        gr, uses_image, retrieves = self.gr, task != "draw", self.session.most > 0
        return {
            self.hint: hint(task),
            self.text: gr.update(visible=task != "caption"),
            self.drop: gr.update(visible=uses_image and data is None),
            self.canvas: gr.update(visible=uses_image and data is not None, masks=task in MASKED),
            self.other: gr.update(visible=uses_image and data is not None),
            self.k: gr.update(visible=task != "edit" and retrieves),
            self.temperature: self.session.sampling(task).temperature,
            self.go: TASKS[task],
        }

    def show_picture(self, task: Task, data: bytes | None) -> dict[Any, Any]:
        gr, url = self.gr, EMPTY if data is None else source(thumbnail(data, *CANVAS))
        return {
            self.picture: data,
            self.drop: gr.update(value=None, visible=data is None),
            self.canvas: gr.update(value="", picture=url, masks=task in MASKED, visible=data is not None),
            self.other: gr.update(visible=data is not None),
        }

    def upload(self, task: Task, data: bytes) -> dict[Any, Any]:
        try:
            return self.show_picture(task, picture_of(data, self.session.options.max_bytes))
        except InputError as error:
            return {**self.show_picture(task, None), self.message: alert(str(error))}

    def forget(self, task: Task) -> dict[Any, Any]:
        return self.show_picture(task, None)

    def show_example(self, task: Task, turn: int) -> dict[Any, Any]:
        examples = self.session.examples
        chosen = examples[turn % len(examples)]
        shown = {self.text: chosen.text} if task == "draw" else self.show_picture(task, chosen.images[0].data)
        return {**shown, self.turn: turn + 1}

    def find(self, context: Context, *query: Any) -> dict[Any, Any]:
        context = self.session.find(context, *query)
        return {self.context: context, self.message: self.gr.update()}  # which may be about what came before

    def remove(self, number: int, context: Context) -> dict[Any, Any]:
        return {self.context: context.removed(number)}

    def replace(self, number: int, context: Context, data: bytes) -> dict[Any, Any]:
        data = picture_of(data, self.session.options.max_bytes)
        return {self.context: context.replaced(number, own_document(data, ""))}

    def caption_own(self, number: int, context: Context, text: str) -> dict[Any, Any]:
        return {self.context: context.captioned(number, text)}

    def add_own(self, context: Context, data: bytes) -> dict[Any, Any]:
        return {self.context: context.added(own_document(picture_of(data, self.session.options.max_bytes), ""))}

    def answer(
        self,
        progress: Callable[..., Any],
        context: Context,
        task: Task,
        text: str,
        picture: bytes | None,
        k: int,
        mask: str,
        *settings: Any,
    ) -> dict[Any, Any]:
        progress(0, desc="Retrieving")
        context = self.session.find(context, task, text, picture, k)
        prompt = Form(task, text, picture, mask, *settings).prompt(context, self.session.sampling(task))

        def drawn(drawing: Drawing) -> None:
            progress((drawing.drawn, drawing.total), desc="Drawing", unit="ids")

        progress(0, desc="Drawing")
        answer = self.session.answer(prompt, drawn)
        return {self.context: context, self.result: results(answer)}
