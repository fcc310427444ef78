"""Links, anchors, paths, tests, commands and options that README.md, docs/ and the like name exist."""

import contextlib
import importlib
import io
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

import rac3
from rac3.cli import RETRIEVERS, STAGES, parse, run
from rac3.config import load_config_module, shipped_configs
from rac3.experiment import Experiment

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=[path.relative_to(ROOT).as_posix() for path in PAGES])

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
INDENTED = re.compile(r"^(?: {4}.*\n?)+", re.M)
SPAN = re.compile(r"`([^`]+)`")
OPTION = re.compile(r"--[a-z][\w.-]*")


def prose(text: str) -> str:
    """A page without its code blocks."""
    return INDENTED.sub("", FENCED.sub("", text))


def spans(text: str) -> list[str]:
    """The `code` of its prose, on one line each."""
    return [" ".join(span.split()) for span in SPAN.findall(prose(text))]


def python(text: str) -> list[str]:
    return [code for language, code in FENCED.findall(text) if language == "python"]


def anchors(text: str) -> set[str]:
    """Those that GitHub gives the headings: "## Train, then draw" is #train-then-draw."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.M)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


def commands(text: str) -> Iterator[list[str]]:
    """The words of each `rac3 ...` of a page, in code blocks and in its prose."""
    blocks = INDENTED.findall(FENCED.sub("", text)) + [code for language, code in FENCED.findall(text) if not language]
    lines = [line for block in blocks for line in block.splitlines()]
    for line in [*lines, *spans(text)]:
        for part in line.split(" && "):
            if part.strip().startswith("rac3 ") and "STAGE" not in part:
                yield shlex.split(part.strip(), comments=True)[1:]


@EVERY_PAGE
def test_links_and_anchors_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(text)) + re.findall(r'src="([^"]+)"', prose(text))
    for target in targets:
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(file.read_text()), f"{page.name} links to {target}"


@EVERY_PAGE
def test_paths_and_tests_exist(page: Path):
    """`rac3/cli.py`, `tests/model`, `benchmarks/results/retrieval_*_cpu.json`, `test_that_it_works`."""
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for span in spans(page.read_text(encoding="utf-8")):
        for word in span.split():
            if re.match(r"(rac3|tests|docs|configs|launch|benchmarks|notebooks)/", word):
                assert list(ROOT.glob(word.rstrip("/").partition("::")[0])), f"{page.name} names {word}"
            elif re.fullmatch(r"test_\w+\*?", word):
                assert re.search(rf"def {word.replace('*', '[a-z0-9_]*')}\(", tests), f"{page.name} names {word}"


@EVERY_PAGE
def test_commands_are_ones_that_rac3_takes(page: Path, tmp_path: Path):
    """Each is parsed, over the quickstart where it says CONFIG, or over the config that the page defines."""
    text = page.read_text(encoding="utf-8")
    for words in commands(text):
        stage, rest = words[0], words[1:]
        assert stage in STAGES, f"{page.name}: rac3 {shlex.join(words)}"
        if not rest or stage == "quickstart":
            continue
        try:
            parse(stage, configured(rest[0], text, tmp_path), rest[1:])
        except Exception as error:
            raise AssertionError(f"{page.name}: rac3 {shlex.join(words)}: {error}") from error


def configured(name: str, text: str, folder: Path) -> Experiment:
    if name in ("CONFIG", "runs/quickstart"):  # a workdir is a config too
        name = "quickstart"
    elif name not in shipped_configs() and not (ROOT / name).exists():
        file = folder / name
        file.write_text("\n".join(code for code in python(text) if "import rac3\n" not in code))
        name = str(file)
    path = ROOT / name
    return load_config_module(str(path) if path.exists() else name).get_config()


@EVERY_PAGE
def test_options_exist(page: Path):
    """`--training.steps 1000`, `--vqgan.model.*`; of other programs' options the program's name comes first."""
    for span in spans(page.read_text(encoding="utf-8")):
        if span.startswith("--"):
            for option in OPTION.findall(span):
                assert any(name.startswith(option) if "*" in span else name == option for name in options()), (
                    f"{page.name} names {span}"
                )


@cache
def options() -> frozenset[str]:
    """All that the stages and the retrievers take, as their help lists them."""
    experiment = load_config_module("quickstart").get_config()
    found = {"--debug", "--help"}
    wanted = [(stage, []) for stage in ("encoders", "train", "evaluate", "generate", "audit", "demo")]
    for stage, choice in wanted + [("evaluate", [f"retriever:{name}"]) for name in RETRIEVERS]:
        with contextlib.redirect_stdout(io.StringIO()) as output, pytest.raises(SystemExit):
            parse(stage, experiment, [*choice, "--help"])
        found |= set(OPTION.findall(output.getvalue()))
    return frozenset(found)


@pytest.mark.parametrize("page", ["README.md", "docs/README.md"])
def test_the_examples_of_rac3_load_run(page: str, finished_workdir: tuple[Path, Path]):
    (code,) = [code for code in python((ROOT / page).read_text()) if "rac3.load" in code]
    names: dict[str, Any] = {}
    exec(code.replace("runs/quickstart", str(finished_workdir[1])), names)
    assert names["model"].documents("test")[0].document.text
    assert len(names["answer"].images) == 4
    assert len(names["answer"].documents) == 2


@pytest.mark.slow
def test_the_encoder_and_the_image_tokenizer_of_the_page_run(tmp_path: Path):
    """Over the tiny config rather than the quickstart; what they give is checked by hand."""
    (code,) = [code for code in python((ROOT / "docs" / "checkpoints.md").read_text()) if "get_config" in code]
    base = f"base = load_config_module({str(ROOT / 'tests' / 'tiny_config.py')!r}).get_config"
    config, workdir = tmp_path / "mine.py", tmp_path / "runs" / "mine"
    config.write_text(
        "from rac3.config import load_config_module\n"
        + code.replace("from rac3.configs.quickstart import get_config as base", base)
    )
    assert base in config.read_text()
    for stage in ("prepare", "train"):
        run([stage, str(config), "--workdir", str(workdir), "--training.steps", "2", "--no-compare-with-cm3"])
    mine = rac3.load(workdir, config=config)
    left_right = np.zeros((40, 40, 3), np.uint8)
    left_right[:, :24] = (255, 0, 127)  # three of five patches: levels 3, 0 and 1
    codes = mine.images.encode([left_right])
    assert codes.tolist() == [5 * [49, 49, 49, 0, 0]]
    assert mine.images.decode(codes)[0, 0, [0, 23, 24]].tolist() == [[224, 32, 96], [224, 32, 96], [32, 32, 32]]
    np.testing.assert_allclose(
        mine.encoder.embed_texts(["a fox", "fox a", "an owl"]) @ mine.encoder.embed_texts(["fox"]).T,
        [[0.5**0.5], [0.5**0.5], [0]],
    )
    text = mine.documents("train")[0].document.text
    (found,) = mine.retrieve(text, k=1)
    assert found.score == pytest.approx(mine.encoder.embed_texts([text, found.document.text]).prod(axis=0).sum())
    assert mine.generate(text, samples=1).images[0].size == (40, 40)


def test_the_readme_is_short_and_shows_how_to_start():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert INDENTED.search(text).group().splitlines() == [
        "    pip install -e . && rac3 quickstart",
        "    pip install -e '.[dev]' && pytest",
    ]


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_each_page_starts_with_a_command(page: Path):
    title, empty, command = page.read_text(encoding="utf-8").splitlines()[:3]
    assert (title[:2], empty, command[:4]) == ("# ", "", "    ")
    assert command.split()[0] in ("rac3", "python", "pytest")


def test_every_stage_is_described():
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "README.md").read_text(), re.M)
    assert sorted(rows) == sorted(STAGES)


def test_the_map_has_every_package_and_module():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    block = INDENTED.search(text, text.index("## The map")).group()
    named = [name.rstrip("/") for line in block.splitlines() for name in re.findall(r"(\w+/|\w+\.py)(?= )", line)]
    paths = [path for path in (ROOT / "rac3").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    assert sorted(named) == sorted(path.name for path in paths if path.name not in ("__init__.py", "configs"))


def test_the_figures_of_real_pictures_are_those_of_the_benchmark():
    """Each row of the page's table, and the sentence of the README, from the JSON."""
    results = json.loads((ROOT / "benchmarks" / "results" / "emoji_seeds_cpu.json").read_text(encoding="utf-8"))
    found, page = results["results"]["0"], (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    table = page[page.index("| subjects that were not trained on |") :].partition("\n\n")[0].splitlines()[2:]
    models = ("ra_cm3", "cm3_best", "cm3", "ra_cm3_random", "copy")
    rows = {
        "text perplexity": ("perplexity.text", 1, ".1f"),
        "CIDEr-D of captions": ("cider_d", 1, ".2f"),
        "captions with the whole name": ("name_accuracy", 100, ".1f"),
        "image perplexity": ("perplexity.image", 1, ".1f"),
        "FD (EfficientNet-Lite0)": ("fd", 1, ".0f"),
        "KID (EfficientNet-Lite0)": ("kid", 1, ".3f"),
    }
    assert [line.split("|")[1].strip() for line in table] == [*rows]
    for line, (name, scale, form) in zip(table, rows.values(), strict=True):
        for cell, model in zip(line.split("|")[2:-1], models, strict=True):
            value, shown = found[f"{model}.{name}"], re.match(r"\W*([\d.]+)", cell)
            assert (value is None) == (shown is None), (line, model)
            assert shown is None or float(shown[1]) == float(format(scale * value, form)), (line, model)
    sentence = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for name, form in (("perplexity.text", ".1f"), ("cider_d", ".2f"), ("perplexity.image", ".1f")):
        ours, theirs = (format(found[f"{model}.{name}"], form) for model in ("ra_cm3", "better"))
        assert re.search(rf"{re.escape(ours)} against (CM3's )?{re.escape(theirs)}", sentence), name


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    assert {f"{page.stem}.md" for page in (ROOT / "docs").glob("*.md")} - {"README.md"} == set(
        re.findall(r"^\| \[([\w-]+\.md)\]", index, re.M)
    )


def test_pictures_are_small():
    for picture in (ROOT / "docs" / "images").iterdir():
        assert picture.stat().st_size < 200_000


def test_the_pictures_are_of_the_first_test_documents(
    finished_workdir: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """`docs/pictures.py` over the tiny run: the last column is the truth, and the prompt is that of the README."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    pictures = importlib.import_module("pictures")
    assert f'--prompt "{pictures.PROMPT}"' in (ROOT / "README.md").read_text()
    monkeypatch.setattr("sys.argv", ["pictures.py", str(finished_workdir[1]), "--out", str(tmp_path)])
    pictures.main()
    strip = np.asarray(PIL.Image.open(tmp_path / "strip.png"))
    assert np.asarray(PIL.Image.open(tmp_path / "generate.png")).shape == (240, 4 * 268 - 28, 3)
    for number, item in enumerate(rac3.load(finished_workdir[1]).documents("test").many(range(3))):
        truth = item.document.images[0].pixels().repeat(6, axis=0).repeat(6, axis=1)
        top = pictures.HEADER + number * (pictures.TILE + pictures.CAPTION)
        shown = strip[top : top + 240, -268:-28]
        np.testing.assert_array_equal(shown[1:-1, 1:-1], truth[1:-1, 1:-1])  # in a frame of one pixel


def test_screenshots_lose_their_margins_and_stand_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A red one of 30 x 40 pixels and a blue one of 20 x 100, which is scaled to half, in white margins."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    pictures = importlib.import_module("pictures")
    for name, color, size in (("a", "red", (30, 40)), ("b", "blue", (20, 100))):
        shot = PIL.Image.new("RGB", (200, 200), "white")
        shot.paste(color, (50, 60, 50 + size[0], 60 + size[1]))
        shot.save(tmp_path / f"{name}.png")
    found = np.asarray(pictures.screenshots(tmp_path, ["a", "b"], 50).convert("RGB"))
    gap = pictures.GAP
    assert found.shape == (50 + 2 * gap, 30 + 10 + 3 * gap, 3)
    assert (found[gap : gap + 40, gap : gap + 30] == (255, 0, 0)).all()
    assert (found[gap : gap + 50, 2 * gap + 30 : 2 * gap + 40] == (0, 0, 255)).all()
    assert (found == 255).all(axis=2).sum() == found[..., 0].size - 30 * 40 - 10 * 50


def test_the_table_of_planted_mistakes_is_that_of_the_last_run():
    results = json.loads((ROOT / "benchmarks" / "results" / "mutants_cpu.json").read_text())["results"]
    planted, killed = Counter(), Counter()
    for each in results:
        for area in (each["area"], "all"):
            planted[area] += 1
            killed[area] += each["killed"]
    table = re.findall(r"\| ([a-z]+)(?: \([^|]*\))? \| (\d+) \| (\d+) ", (ROOT / "docs" / "tests.md").read_text())
    assert {area: (int(a), int(b)) for area, a, b in table} == {area: (planted[area], killed[area]) for area in planted}
