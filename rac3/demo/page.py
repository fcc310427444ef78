"""The page and its server.

Only this module uses gradio (`pip install 'rac3[demo]'`), and imports it when the page is built.
"""

import hashlib
import html
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from rac3.answering import Model
from rac3.config import InputError
from rac3.demo.form import CANVAS, MASKED, MAX_PIXELS, Context, Form, Task, picture_of
from rac3.demo.look import BRUSH, BRUSH_CSS, BRUSH_JS, CSS, alert, card, hint, results, so_far, thumbnail
from rac3.documents.document import captioned, decode_image
from rac3.execution.progress import Progress
from rac3.generation.answers import Answer, Part, png_uri
from rac3.generation.engine import Progress as Drawing
from rac3.generation.sampling import Sampling
from rac3.prompt import Prompt

TASKS: dict[Task, str] = {"draw": "Draw", "caption": "Caption", "infill_image": "Infill", "edit": "Edit"}
FILES = [".png", ".jpg", ".jpeg", ".webp"]
EMPTY = "data:,"  # of an `<img>`
MOST_DOCUMENTS, MOST_SAMPLES, MOST_CHARACTERS = 4, 8, 2000
MODEL = {"concurrency_id": "model", "concurrency_limit": 1}  # of the events that use it: one at a time
KEPT = 3600  # seconds that the server keeps uploads
REFRESH = 0.2  # seconds between two looks at what is drawn


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


class SoFar(NamedTuple):
    """What there is of an answer: ids drawn, of all samples, and each sample so far; none of infills and edits."""

    drawn: int
    total: int
    samples: list[tuple[Part, ...]]


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

    def answers(self, prompt: Prompt) -> Iterator[SoFar | Answer]:
        """What there is of the answer whenever there is more, and in the end the answer.

        The model draws in another thread, which ends early if the iterator is closed, as gradio does when the visitor
        leaves: the thread never outlives the iterator, so the model has one prompt at a time.
        """
        latest = shown = SoFar(0, 0, [])
        closed = threading.Event()

        def drawn(drawing: Drawing) -> None:
            nonlocal latest
            if closed.is_set():
                raise InterruptedError("nobody waits for the answer")
            latest = latest._replace(drawn=drawing.drawn, total=drawing.total)

        def seen(samples: list[tuple[Part, ...]]) -> None:
            nonlocal latest
            latest = latest._replace(samples=samples)

        with ThreadPoolExecutor(1) as pool:
            try:
                answer = pool.submit(self.model.answer, prompt, drawn, seen)
                while wait([answer], REFRESH).not_done:
                    if latest is not shown:
                        shown = latest
                        yield shown
            finally:
                closed.set()
        yield answer.result()

    def warm(self) -> None:
        """Draws once, so that the first visitor does not wait for the compiler."""
        text = self.examples[0].text if self.examples else "a"
        sampling = self.sampling("draw")
        form = Form("draw", text, None, "", 4, 0, sampling.temperature, 1.0, "text", 0.0)
        self.model.answer(form.prompt(self.find(Context(), "draw", text, None, 2), sampling))


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

        self.gr.on(
            [self.go.click, self.text.submit],
            self.answer,
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
        gr, url = self.gr, EMPTY if data is None else png_uri(np.asarray(thumbnail(data, *CANVAS)))
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
        return {self.context: context.replaced(number, captioned("yours", "", data))}

    def caption_own(self, number: int, context: Context, text: str) -> dict[Any, Any]:
        return {self.context: context.captioned(number, text)}

    def add_own(self, context: Context, data: bytes) -> dict[Any, Any]:
        return {self.context: context.added(captioned("yours", "", picture_of(data, self.session.options.max_bytes)))}

    def answer(self, *values: Any) -> Iterator[dict[Any, Any]]:
        """The documents, then what there is of the answer, and the answer. An error takes away what there is."""
        shown: dict[Any, Any] = {}
        try:
            for shown in self._answer(*values):
                yield {self.message: "", **shown}
        except Exception as error:
            lost = {self.result: ""} if self.result in shown else {}
            if not isinstance(error, InputError):
                yield lost
                raise
            yield {self.message: alert(str(error)), **lost}

    def _answer(
        self, context: Context, task: Task, text: str, picture: bytes | None, k: int, mask: str, *settings: Any
    ) -> Iterator[dict[Any, Any]]:
        context = self.session.find(context, task, text, picture, k)
        prompt = Form(task, text, picture, mask, *settings).prompt(context, self.session.sampling(task))
        yield {self.context: context}
        for each in self.session.answers(prompt):
            yield {self.result: results(each) if isinstance(each, Answer) else so_far(task, *each)}
