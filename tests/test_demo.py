"""`rac3 demo`: what a form asks of the model; and the page, in a headless Chromium."""

import base64
import dataclasses
import importlib.util
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

import rac3
from rac3.config import InputError
from rac3.demo.form import CANVAS, Context, Form, Listed, brushed, picture_of
from rac3.demo.look import alert, card, figure, results, so_far, thumbnail
from rac3.demo.page import DemoOptions, Page, Session, SoFar
from rac3.documents.document import Document, Image, Text, captioned
from rac3.documents.store import TokenizedDocument
from rac3.generation.answers import Answer
from rac3.generation.copying import Copying
from rac3.generation.engine import Progress
from rac3.generation.sampling import Contrast, Guidance, Sampling
from rac3.run import Found


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def found(name: str, score: float = 0.5) -> Found:
    document = Document(name, (Text(name), Image(png(np.zeros((4, 4, 3), np.uint8)))), {})
    return Found(document, score, TokenizedDocument(document, ()))


MINE = captioned("yours", "", png(np.full((4, 4, 3), 7, np.uint8)))
FORM = Form("draw", " a fox ", None, "", 3, 5, 0.5, 1.0, "text", 0.0)


def names(context: Context) -> list[str]:
    return [each.document.key for each in context.listed]


def retrieve(k: int) -> list[Found]:
    return [found(name) for name in "abcd"][:k]


def never(k: int) -> list[Found]:
    raise AssertionError("searched again")


# The documents on the page.


def test_the_same_query_is_not_asked_again():
    """So that what is removed stays away, until the query or k is another one."""
    context = Context().find("fox", 2, retrieve)
    assert names(context) == ["a", "b"]
    removed = context.removed(0)
    assert names(removed) == ["b"]
    assert removed.find("fox", 2, never) is removed
    assert names(removed.find("fox", 3, retrieve)) == ["a", "b", "c"]
    assert names(removed.find("owl", 2, retrieve)) == ["a", "b"]


def test_the_visitors_own_stay_in_their_place_and_count():
    context = Context().find("fox", 3, retrieve).replaced(1, MINE)
    assert names(context) == ["a", "yours", "c"]
    assert context.listed[1].similarity is None
    assert names(context.find("owl", 3, retrieve)) == ["a", "yours", "b"]
    assert names(context.find("owl", 1, retrieve)) == ["yours"]
    assert names(context.find("", 3, never)) == ["yours"]


def test_one_more_takes_the_place_of_the_last_retrieved_one():
    context = Context().find("fox", 2, retrieve)
    assert names(context.added(MINE)) == ["a", "yours"]
    assert names(context.added(MINE).added(MINE)) == ["yours", "yours"]
    assert names(context.added(MINE).added(MINE).added(MINE)) == ["yours", "yours", "yours"]
    assert names(context.removed(0).added(MINE)) == ["b", "yours"]  # there is room for two
    assert names(Context().added(MINE)) == ["yours"]


def test_a_caption_of_ones_own():
    context = Context().find("fox", 2, retrieve).added(MINE).captioned(1, " a boat ")
    assert context.listed[1].document.text == "a boat"
    assert context.listed[1].document.images == MINE.images
    assert context.captioned(1, " ").listed[1].document.text == ""


# The form.


def test_what_is_listed_is_the_context_and_nothing_is_retrieved_besides():
    prompt = FORM.prompt(Context((Listed(found("b").document, 0.9), Listed(MINE))), Sampling())
    assert [each.key for each in prompt.documents] == ["b", "yours"]
    assert (prompt.task, prompt.text, prompt.retrieve, prompt.ensemble) == ("draw", "a fox", 0, "mean")
    assert (prompt.samples, prompt.seed) == (3, 5)


def test_settings_of_the_form_replace_those_of_the_experiment():
    configured = Sampling(temperature=0.2, top_p=0.9, copying=Copying(0.1, sharpness=2.0))
    form = dataclasses.replace(FORM, guidance=3.0, copying=0.4)
    assert form.prompt(Context(), configured).sampling == Sampling(
        temperature=0.5, top_p=0.9, guidance=Guidance(3.0, "text"), copying=Copying(0.4, sharpness=2.0)
    )


def test_guidance_replaces_the_experiments_contrast():
    configured = Sampling(contrast=Contrast(k=4))
    assert FORM.prompt(Context(), configured).sampling.contrast.k == 4
    assert dataclasses.replace(FORM, guidance=2.0).prompt(Context(), configured).sampling.contrast.k == 0


@pytest.mark.parametrize(("task", "text", "without"), [("caption", "x", "documents"), ("infill_image", "x", "text")])
def test_guidance_leaves_out_the_text_only_if_there_is_one(task: Any, text: str, without: str):
    form = dataclasses.replace(FORM, task=task, text=text, picture=png(np.zeros((8, 8, 3), np.uint8)), guidance=2.0)
    assert form.prompt(Context(), Sampling()).sampling.guidance.without == without


def strokes(alpha: np.ndarray) -> str:
    """A canvas with strokes of this opacity, as a browser gives it."""
    return f"data:image/png;base64,{base64.b64encode(png(np.stack([alpha] * 4, -1))).decode()}"


def test_a_mask_is_scaled_to_the_picture():
    """A pixel belongs to it if the strokes cover at least half of it."""
    alpha = np.zeros((8, 16), np.uint8)
    alpha[:4, :8] = 255  # two pixels
    alpha[4:, 8:10] = 255  # half of a pixel
    alpha[4:, 12:13] = 255  # a quarter
    form = dataclasses.replace(FORM, task="edit", picture=png(np.zeros((2, 4, 3), np.uint8)), mask=strokes(alpha))
    mask = form.prompt(Context(), Sampling()).mask
    assert mask.tolist() == [[True, True, False, False], [False, False, True, False]]
    assert dataclasses.replace(form, task="caption").prompt(Context(), Sampling()).mask is None


@pytest.mark.parametrize("mask", ["data:image/png;base64,AAAA", "no base64!", strokes(np.zeros((2, 2000), np.uint8))])
def test_a_mask_that_is_none_is_refused(mask: str):
    with pytest.raises(InputError, match="brush it again"):
        brushed(mask, np.zeros((4, 4, 3), np.uint8))


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"a fox", "not usable: not an image"),
        (b"", "not usable: empty image"),
        (png(np.zeros((40, 40, 3), np.uint8))[:-30], "not usable: truncated image"),
        (bytes(3 * 2**20), "the file has 3.0 MB, more than the 2 MB allowed"),
        (png(np.zeros((4001, 4000), bool)), "decompression bomb: 4000x4001 exceeds 16000000 pixels"),
    ],
    ids=["text", "empty", "truncated", "large", "many pixels"],
)
def test_uploads_are_pictures_of_a_bounded_size(data: bytes, line: str):
    with pytest.raises(InputError) as error:
        picture_of(data, DemoOptions(max_upload_mb=2.0).max_bytes)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "wrong", [{"port": 0}, {"port": 65536}, {"max_upload_mb": 0.0}, {"max_upload_mb": float("nan")}]
)
def test_wrong_options(wrong: dict[str, Any]):
    with pytest.raises(InputError, match=next(iter(wrong))):
        DemoOptions(**wrong)


# What is shown.


def test_texts_are_escaped():
    assert "<b>" not in figure(["<b>"], "<b>")
    assert "<b>" not in card(Listed(Document("a", (Text("<b>"),), {}), 0.5))


def test_a_small_picture_gets_larger_pixels_and_a_large_one_is_scaled():
    pixels = np.arange(40 * 20 * 3, dtype=np.uint8).reshape(20, 40, 3)
    small = np.asarray(thumbnail(png(pixels), *CANVAS))
    np.testing.assert_array_equal(small, pixels.repeat(10, axis=0).repeat(10, axis=1))  # 40 x 10 is at least 384
    assert thumbnail(png(np.zeros((1000, 2000, 3), np.uint8)), *CANVAS).size == (768, 384)


def test_results_have_every_sample_and_note():
    answer = Answer("caption", {}, [("a fox",), ("",)], [-0.5, -1.0], "log p per id", [], [], [], ["a note"], {})
    assert re.findall(r"<p>([^<]*)</p>", results(answer)) == ["a fox", "(an empty text)"]
    assert re.findall(r"<figcaption>([^<]*)<", results(answer)) == ["log p per id -0.50", "log p per id -1.00"]
    assert "a note" in results(answer)


def test_what_is_not_yet_written_is_no_empty_text():
    shown = so_far("caption", 3, 1200, [("a <fox>",), ("",), ()])
    assert re.findall(r"<p>([^<]*)</p>", shown) == ["a &lt;fox&gt;", "..."]
    assert "Captions: 3 of 1,200 ids" in shown


# An answer while it is drawn.


@pytest.fixture
def session(finished_workdir: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Session:
    monkeypatch.setattr("rac3.demo.page.REFRESH", 1e-3)
    return Session(rac3.load(finished_workdir[1]), DemoOptions())


def test_an_answer_is_seen_while_it_is_drawn_and_is_the_same(session: Session):
    prompt = FORM.prompt(Context(), session.sampling("draw"))
    *before, answer = session.answers(prompt)
    assert all(isinstance(each, SoFar) and each.total == 3 * 25 for each in before)
    drawn = [each.drawn for each in before]
    assert len(set(drawn)) > 1
    assert drawn == sorted(drawn)
    assert {len(each.samples) for each in before[1:]} == {3}
    plain = session.model.answer(prompt)
    assert answer.to_json() == plain.to_json()
    for picture, expected in zip(answer.images, plain.images, strict=True):
        np.testing.assert_array_equal(picture, expected)


def test_nothing_is_drawn_for_a_visitor_who_has_left(session: Session, monkeypatch: pytest.MonkeyPatch):
    """What is left of the drawing has ended once the iterator is closed, so that the next visitor's is the only one."""
    drawn: list[int] = []

    def draw(prompt: Any, on_progress: Callable[[Progress], None], on_partial: Any) -> None:
        for step in range(1000):
            drawn.append(step)
            on_progress(Progress(step, 1000, dict))
            time.sleep(0.005)

    monkeypatch.setattr(session.model, "answer", draw)
    answers = session.answers(FORM.prompt(Context(), Sampling()))
    next(answers)
    answers.close()
    count = len(drawn)
    assert count < 1000
    time.sleep(0.05)
    assert len(drawn) == count


def test_an_error_while_it_is_drawn_is_one_line_and_takes_away_what_was_drawn(
    session: Session, monkeypatch: pytest.MonkeyPatch
):
    def fail(prompt: Any, on_progress: Callable[[Progress], None], on_partial: Any) -> None:
        on_progress(Progress(3, 9, dict))
        time.sleep(0.1)
        raise InputError("the disk\nis full")

    page = Page.__new__(Page)  # without gradio; the handler only names its components
    page.session, page.context, page.result, page.message = session, "context", "result", "message"
    monkeypatch.setattr(session.model, "answer", fail)
    asked = (Context(), "draw", "a fox", None, 0, "", 4, 0, 1.0, 1.0, "text", 0.0)
    context, drawing, failed = page.answer(*asked)
    assert (context["message"], context["context"].found_for) == ("", ("a fox", 0))
    assert "3 of 9 ids" in drawing["result"]
    assert failed == {"message": alert("the disk is full"), "result": ""}
    monkeypatch.undo()
    (refused,) = page.answer(asked[0], "draw", " ", *asked[3:])  # nothing was drawn: an earlier answer stays
    assert "needs a text" in refused["message"]
    assert "result" not in refused


def test_without_gradio_the_command_says_what_to_install(
    finished_workdir: tuple[Path, Path],
    rac3: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert rac3("demo", str(finished_workdir[1])) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "rac3: `rac3 demo` needs gradio; run: pip install 'rac3[demo]'"


def test_the_command_keeps_compiled_programs_before_it_opens_the_model(
    finished_workdir: tuple[Path, Path], rac3: Callable[..., int], monkeypatch: pytest.MonkeyPatch
):
    done: list[Path | str] = []
    monkeypatch.setattr("rac3.cli.keep_programs", done.append)
    monkeypatch.setattr("rac3.demo.page.demo", lambda model, options: done.append(model.experiment.name))
    assert rac3("demo", str(finished_workdir[1])) == 0
    assert done == [finished_workdir[1], "tiny"]


# The page in a browser.

CHROMIUM = shutil.which("chromium") or ""
BROWSER = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM or not shutil.which("chromedriver"), reason="needs chromium and its driver"),
    *(
        pytest.mark.skipif(importlib.util.find_spec(name) is None, reason="needs pip install -e '.[demo,demo-test]'")
        for name in ("gradio", "selenium")
    ),
]
LIMIT_MB = 0.5


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a demo of the run that RAC3_TEST_DEMO names, or else of the shrunken quickstart."""
    workdir = os.environ.get("RAC3_TEST_DEMO") or str(request.getfixturevalue("finished_workdir")[1])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    often = "import rac3.answering; from rac3.demo import page; rac3.answering.PARTIAL_EVERY, page.REFRESH = 1, 0.01"
    code = f"from rac3.cli import main; {often}; main()"
    command = [sys.executable, "-c", code, "demo", workdir, "--port", str(port)]
    with subprocess.Popen(
        [*command, "--max-upload-mb", str(LIMIT_MB)], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            while line and not line.startswith("demo: "):
                line = process.stdout.readline()
            assert f"http://127.0.0.1:{port}" in line
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


class Visitor:
    """A browser on the page."""

    def __init__(self, address: str, width: int, height: int, dark: bool = False) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in (
            "--headless=new",
            "--no-sandbox",
            "--disable-dev-shm-usage",
            f"--window-size={width},{height}",
        ):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})  # type: ignore[arg-type]
        self.driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]},
        )
        self.driver.get(address)
        self.wait(lambda: self.all("#go"))

    def all(self, selector: str) -> list[Any]:
        """The visible elements, and the file inputs, which are not."""
        found = self.driver.find_elements("css selector", selector)
        return [each for each in found if each.is_displayed() or each.get_attribute("type") == "file"]

    def wait(self, condition: Callable[[], Any], seconds: float = 60) -> Any:
        from selenium.common.exceptions import StaleElementReferenceException

        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if value := condition():
                    return value
            except StaleElementReferenceException:  # the page has just changed
                pass
            time.sleep(0.1)
        raise AssertionError(f"nothing came in {seconds} s; the page says: {self.all('body')[0].text}")

    def choose(self, task: str) -> None:
        next(each for each in self.all("label") if each.text == task).click()
        self.wait(lambda: self.all("#go")[0].text == task)

    def button(self, name: str) -> Any:
        return self.wait(lambda: [each for each in self.all("button") if each.text == name])[0]

    def write(self, text: str) -> None:
        """A text, after which another element is clicked, as people do."""
        box = self.all("#text textarea")[0]
        box.clear()
        box.send_keys(text)
        self.all(".title")[0].click()

    def upload(self, label: str, path: Path) -> None:
        """Into the drop zone or the button of this label."""
        inputs = {
            "Picture": "#drop input[type=file]",
            "Add": "input[type=file]:has(+ #add)",
            "Replace": ".cards input[type=file]",
        }
        self.wait(lambda: self.all(inputs[label]))[0].send_keys(str(path))

    def run(self) -> list[Any]:
        """Presses the button; the figures of the new result."""
        old = "document.querySelectorAll('#result figure').forEach(each => each.setAttribute('data-old', ''))"
        self.driver.execute_script(old)
        self.all("#go")[0].click()
        return self.wait(lambda: self.all("#result .samples:not([aria-busy]) figure:not([data-old])"))

    def cards(self) -> list[str]:
        return [each.text for each in self.all(".cards figure")]

    def pixels(self, figure: Any) -> np.ndarray:
        url = figure.find_element("css selector", "img").get_attribute("src")
        return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))

    def alert(self) -> str:
        return self.wait(lambda: self.all(".alert, .toast-body"))[0].text

    def brush(self, left: float, top: float, right: float, bottom: float) -> None:
        """A stroke from one point of the picture to another, as fractions of its sides."""
        from selenium.webdriver import ActionChains

        canvas = self.wait(lambda: self.all(".brush canvas"))[0]
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
        width, height = canvas.size["width"], canvas.size["height"]
        chain = ActionChains(self.driver).move_to_element_with_offset(
            canvas, (left - 0.5) * width, (top - 0.5) * height
        )
        chain.click_and_hold().move_by_offset((right - left) * width, (bottom - top) * height).release().perform()

    def requests(self) -> set[str]:
        """The hosts of everything that the page has asked for."""
        events = [json.loads(each["message"])["message"] for each in self.driver.get_log("performance")]
        urls = [each["params"]["request"]["url"] for each in events if each["method"] == "Network.requestWillBeSent"]
        return {url.split("/")[2] for url in urls if not url.startswith(("data:", "blob:"))}

    def overflow(self) -> int:
        """By how many pixels the page is wider than the window."""
        return self.driver.execute_script("return document.documentElement.scrollWidth - window.innerWidth")

    def picture(self, name: str) -> None:
        """A screenshot in the folder that RAC3_TEST_SCREENSHOTS names, if it names one."""
        if folder := os.environ.get("RAC3_TEST_SCREENSHOTS"):
            shot = self.driver.execute_cdp_cmd(
                "Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True}
            )
            Path(folder, f"{name}.png").write_bytes(base64.b64decode(shot["data"]))


@pytest.fixture(params=[(1200, 900), (390, 844)], ids=["desktop", "phone"])
def visitor(request: pytest.FixtureRequest, server: str) -> Iterator[Visitor]:
    visitor = Visitor(server, *request.param)
    visitor.name = request.node.callspec.id
    yield visitor
    assert visitor.overflow() <= 0
    assert visitor.requests() == {server.removeprefix("http://")}  # nothing from elsewhere
    visitor.driver.quit()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """An upload: 60 x 40 pixels, all different."""
    pixels = np.arange(40 * 60 * 3, dtype=np.uint32).reshape(40, 60, 3) * 7 % 251
    path = tmp_path / "own.png"
    path.write_bytes(png(pixels.astype(np.uint8)))
    return path


def slow(test: Callable[..., None]) -> Callable[..., None]:
    for mark in BROWSER:
        test = mark(test)
    return test


@slow
def test_draws(visitor: Visitor):
    visitor.button("Example").click()
    visitor.wait(lambda: len(visitor.cards()) == 2)  # retrieved before anything is drawn
    assert all("similarity" in each for each in visitor.cards())
    figures = visitor.run()
    assert [visitor.pixels(each).shape for each in figures] == 4 * [(40, 40, 3)]
    scores = [float(re.search(r"CLIP score (-?[\d.]+)", each.text)[1]) for each in figures]
    assert scores == sorted(scores, reverse=True)
    visitor.picture(f"draw-{visitor.name}")


@slow
def test_pictures_are_seen_while_they_are_drawn(visitor: Visitor):
    """The page keeps a record of what it shows: the line of progress, and how many pictures."""
    visitor.write("a red fox")
    visitor.wait(lambda: len(visitor.cards()) == 2)
    visitor.driver.execute_script("""
        window.shown = [];
        const count = selector => document.querySelectorAll(selector).length;
        new MutationObserver(() => {
          const line = document.querySelector('#result [role=status]');
          if (line) window.shown.push([line.textContent, count('#result [aria-busy] img'), count('.cards figure')]);
        }).observe(document.body, {childList: true, subtree: true, characterData: true});
    """)
    visitor.run()
    lines, pictures, documents = zip(*visitor.driver.execute_script("return window.shown"), strict=True)
    drawn = [int(re.fullmatch(r"Drawn: (\d+) of 100 ids", line)[1]) for line in lines]
    assert drawn == sorted(drawn)
    assert len({*drawn}) > 1
    assert pictures[-1] == 4
    assert {*documents} == {2}  # which are shown all the time
    assert not visitor.all("#result [role=status]")


@slow
def test_a_removed_document_stays_away(visitor: Visitor, picture: Path):
    visitor.write("a red fox")
    _, second = visitor.wait(lambda: visitor.cards() if len(visitor.cards()) == 2 else None)
    visitor.button("Remove").click()
    visitor.wait(lambda: visitor.cards() == [second])
    visitor.run()
    assert visitor.cards() == [second]
    visitor.upload("Replace", picture)
    visitor.wait(lambda: visitor.cards() == ["yours"])
    visitor.upload("Add", picture)
    visitor.wait(lambda: visitor.cards() == ["yours", "yours"])
    visitor.run()
    visitor.picture(f"own-{visitor.name}")
    visitor.write("a blue owl")
    time.sleep(2)
    assert visitor.cards() == ["yours", "yours"]


@slow
def test_captions(visitor: Visitor):
    visitor.choose("Caption")
    visitor.button("Example").click()
    visitor.wait(lambda: len(visitor.cards()) == 2)
    figures = visitor.run()
    assert len(figures) == 4
    assert all("log p per id -" in each.text for each in figures)
    visitor.picture(f"caption-{visitor.name}")


@slow
def test_infills_under_the_brush(visitor: Visitor, picture: Path):
    """The upper third is brushed from side to side: all pixels of the lower half stay as they are."""
    visitor.choose("Infill")
    visitor.upload("Picture", picture)
    visitor.brush(0.2, 0.2, 0.8, 0.2)
    original = np.asarray(PIL.Image.open(picture))
    for each in map(visitor.pixels, visitor.run()):
        assert each.shape == (40, 60, 3)
        np.testing.assert_array_equal(each[20:], original[20:])
        assert (each[8, 15:45] != original[8, 15:45]).any(-1).mean() > 0.9
    visitor.button("Clear the mask").click()
    visitor.all("#go")[0].click()
    assert "needs a mask" in visitor.alert()
    visitor.button("Example").click()
    visitor.wait(lambda: not visitor.all(".alert"))
    visitor.brush(0.3, 0.5, 0.7, 0.5)
    assert [visitor.pixels(each).shape for each in visitor.run()] == 4 * [(40, 40, 3)]
    visitor.picture(f"infill-{visitor.name}")


@slow
def test_edits_by_a_document_of_ones_own(visitor: Visitor, picture: Path):
    visitor.write("a red fox")
    document = visitor.wait(lambda: visitor.all(".cards figure"))[0]
    picture.write_bytes(png(visitor.pixels(document)))
    caption = document.find_element("css selector", "p").text
    visitor.choose("Edit")
    visitor.button("Example").click()
    visitor.brush(0.3, 0.5, 0.7, 0.5)
    visitor.all("#go")[0].click()
    assert "an edit follows documents" in visitor.alert()
    visitor.upload("Add", picture)
    box = visitor.wait(lambda: visitor.all(".cards textarea, .cards input:not([type=file])"))[0]
    box.send_keys(caption)
    visitor.all(".title")[0].click()
    time.sleep(1)
    assert len(visitor.run()) == 4
    visitor.picture(f"edit-{visitor.name}")


@slow
def test_refuses_what_is_no_picture_or_too_large(visitor: Visitor, tmp_path: Path):
    text, large, disguised = tmp_path / "a.txt", tmp_path / "large.png", tmp_path / "text.png"
    text.write_text("a fox")
    disguised.write_text("a fox")
    large.write_bytes(png(np.random.default_rng(0).integers(0, 256, (600, 600, 3)).astype(np.uint8)))
    assert large.stat().st_size > LIMIT_MB * 2**20
    visitor.choose("Caption")
    for path, words in ((disguised, "not an image"), (text, "nvalid file type"), (large, "size")):
        visitor.upload("Picture", path)
        line = visitor.alert()
        print(path.name, repr(line))
        assert words in line
        assert "Traceback" not in line
        assert not visitor.all(".brush")
        visitor.picture(f"refused-{path.stem}-{visitor.name}")
        visitor.driver.refresh()
        visitor.wait(lambda: visitor.all("#go"))
        visitor.choose("Caption")


@slow
def test_an_empty_text_is_one_line(visitor: Visitor):
    visitor.all("#go")[0].click()
    assert "needs a text" in visitor.alert()
    visitor.write("a fox")
    visitor.run()
    assert not visitor.all(".alert")


@slow
def test_dark(server: str):
    visitor = Visitor(server, 1200, 900, dark=True)
    visitor.write("a red fox")
    visitor.run()
    visitor.picture("dark")
    visitor.driver.quit()
