"""Draws the pictures of the README from a finished run, and those of docs/cluster.md and docs/demo.md.

    rac3 quickstart
    python docs/pictures.py runs/quickstart
    python docs/pictures.py --growth configs/ra_cm3_2_7b.py
    RAC3_TEST_DEMO=runs/quickstart RAC3_TEST_SCREENSHOTS=shots pytest tests/test_demo.py
    python docs/pictures.py --demo shots

Writes into `docs/images/`, the first three from the models as the config evaluates them:

strip.png     what RA-CM3 and CM3 draw for captions of the test split, whose entities neither saw in training, and the
              documents that each caption retrieves. The rows are the first documents of the split, not a selection.
tasks.png     what other tasks make of the same documents: a caption; the middle, infilled with and without retrieved
              documents; edited by the documents of the next row's entity; and the row's setting drawn after them.
generate.png  what `rac3 generate` draws for PROMPT: its four samples, the one that CLIP likes best first.
demo.png      the page of `rac3 demo`, from screenshots; demo_tasks.png has its other tasks, and a phone.
growth.png    what training takes on 8 to 1,024 GPUs, as `rac3 plan` computes it; the table of it is printed.
"""

import argparse
import itertools
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import PIL.Image
from jaxtyping import UInt8
from matplotlib.figure import Figure
from PIL import ImageDraw, ImageFont, ImageOps

import rac3
from rac3.answering import Model
from rac3.config import load_config_module
from rac3.experiment import Experiment
from rac3.plan.table import amount, duration
from rac3.plan.training import Estimate, Setting, TrainingPlan, growth
from rac3.prompt import Prompt
from rac3.stages.evaluate import comparisons

IMAGES = Path(__file__).parent / "images"
ROWS = 3  # of the strip
PROMPT = "roreram on water in sun with a gold frame"  # an unseen entity where no document shows it
TILE = 240  # pixels of a picture's side; the README shows the strip at about half its size
GAP, TEXT_WIDTH, HEADER, CAPTION = 28, 290, 70, 80  # pixels
GROWTH = [2**power for power in range(3, 11)]  # GPUs
FAMILIES = {"fsdp of 8": (8, 1), "fsdp of all, up to 512": (512, 1), "fsdp of 8, tensor of 4": (8, 4)}  # fsdp, tensor
DEMO = {
    "demo.png": ["draw-desktop"],
    "demo_tasks.png": ["infill-desktop", "caption-desktop", "edit-desktop", "draw-phone"],
}
INK, PALE, RULE = "#1f2328", "#59636e", "#d1d9e0"
Captioned = tuple[str, UInt8[np.ndarray, "_ _ 3"]]


@dataclass(frozen=True)
class Row:
    """A prompt, the documents it retrieves, what each model draws, and the document itself."""

    prompt: str
    retrieved: Sequence[Captioned]
    ra_cm3: UInt8[np.ndarray, "_ _ 3"]
    cm3: UInt8[np.ndarray, "_ _ 3"]
    truth: UInt8[np.ndarray, "_ _ 3"]


def rows(run: Model) -> list[Row]:
    """The first documents of the test split, drawn as `rac3 evaluate` does: the best of several samples by CLIP. CM3 is
    that at its best, if there are documents to tell."""
    settings, models = run.experiment.evaluation, comparisons(run)
    cm3 = models.get("cm3_best", models["cm3"])
    made = []
    for item in run.documents("test").many(range(ROWS)):
        document = item.document
        samples = settings.image_samples
        drawn = run.generate(document.text, retrieve=settings.num_retrieved, samples=samples)
        plain = cm3.generate(document.text, retrieve=0, samples=samples)
        retrieved = [(found.text, found.images[0].pixels()) for found in drawn.documents]
        best, other = (np.asarray(answer.images[0]) for answer in (drawn, plain))
        made.append(Row(document.text, retrieved, best, other, document.images[0].pixels()))
    return made


def strip(rows: Sequence[Row]) -> PIL.Image.Image:
    """One line of pictures per row, under a line of headings.

    prompt       | retrieved | retrieved | RA-CM3 | CM3 | truth
    a caption of | (picture) | (picture) |  ...
    the test set | caption   | caption   |
    """
    retrieved = max(len(row.retrieved) for row in rows)
    headings = ["prompt", *["retrieved"] * retrieved, "RA-CM3 draws", "CM3 draws", "truth"]
    lines = [(row.prompt, [*row.retrieved, ("", row.ra_cm3), ("", row.cm3), ("", row.truth)]) for row in rows]
    return grid(headings, lines)


def grid(headings: Sequence[str], lines: Sequence[tuple[str, Sequence[Captioned]]]) -> PIL.Image.Image:
    """A text and captioned pictures on each line, under a line of headings."""
    columns = [TEXT_WIDTH + GAP + column * (TILE + GAP) for column in range(len(headings) - 1)]
    height = HEADER + len(lines) * (TILE + CAPTION)
    canvas = PIL.Image.new("RGB", (columns[-1] + TILE + GAP, height), "white")
    draw = ImageDraw.Draw(canvas)
    for x, heading in zip([GAP, *columns], headings, strict=True):
        draw.text((x, HEADER - 46), heading, INK, _font(26, bold=True))
    for number, (text, pictures) in enumerate(lines):
        top = HEADER + number * (TILE + CAPTION)
        draw.text((GAP, top), textwrap.fill(text, 16), INK, _font(26), spacing=10)
        for x, (caption, pixels) in zip(columns, pictures, strict=True):
            canvas.paste(_tile(pixels), (x, top))
            draw.rectangle((x, top, x + TILE - 1, top + TILE - 1), outline=RULE)
            draw.text((x, top + TILE + 6), textwrap.fill(caption, 22), PALE, _font(19), spacing=5)
    return canvas


def tasks(run: Model) -> PIL.Image.Image:
    """A line of pictures for each of the first documents of the test split; their middle is 60% of the side."""
    headings = ["image of", "captioned", "infilled", "... alone", "document of", "edited by it", "drawn after it"]
    documents = [item.document for item in run.documents("test").many(range(ROWS + 1))]
    lines = []
    for document, other in itertools.pairwise(documents):
        image = document.images[0].pixels()
        edge = round(0.2 * len(image))
        middle = (edge, edge, image.shape[1] - edge, len(image) - edge)
        shown = [found.document for found in run.retrieve(other.text, k=run.experiment.evaluation.num_retrieved)]
        setting = document.text.replace(document.metadata[run.experiment.data.entity_field], "something")
        answers = (
            run.infill(image, middle, document.text),
            run.infill(image, middle, document.text, retrieve=0),
            run.edit(image, middle, shown),
            run.answer(Prompt("controlled", setting, documents=shown, retrieve=0)),
        )
        infilled, alone, edited, drawn = (np.asarray(answer.images[0]) for answer in answers)
        line = [(run.caption(image).texts[0], image), ("", infilled), ("", alone)]
        lines.append(
            (document.text, [*line, (shown[0].text, shown[0].images[0].pixels()), ("", edited), (setting, drawn)])
        )
    return grid(headings, lines)


def _tile(pixels: UInt8[np.ndarray, "height width 3"]) -> PIL.Image.Image:
    """A picture at the size of the strip; each pixel of a small one becomes a square."""
    image = PIL.Image.fromarray(pixels)
    small = max(image.size) < TILE
    return image.resize((TILE, TILE), PIL.Image.Resampling.NEAREST if small else PIL.Image.Resampling.LANCZOS)


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


def side_by_side(pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> PIL.Image.Image:
    canvas = PIL.Image.new("RGB", (len(pictures) * (TILE + GAP) - GAP, TILE), "white")
    for number, pixels in enumerate(pictures):
        canvas.paste(_tile(pixels), (number * (TILE + GAP), 0))
    return canvas


def screenshots(folder: Path, names: Sequence[str], height: int) -> PIL.Image.Image:
    """Screenshots side by side, without their white margins; taller ones are scaled to the height in pixels."""
    shots = [PIL.Image.open(folder / f"{name}.png").convert("RGB") for name in names]
    shots = [shot.crop(ImageOps.invert(shot).getbbox()) for shot in shots]
    for shot in shots:
        shot.thumbnail((shot.width, height), PIL.Image.Resampling.LANCZOS)
    width = sum(shot.width + GAP for shot in shots) + GAP
    canvas = PIL.Image.new("RGB", (width, max(shot.height for shot in shots) + 2 * GAP), "white")
    left = GAP
    for shot in shots:
        canvas.paste(shot, (left, GAP))
        left += shot.width + GAP
    return canvas.quantize(256, dither=PIL.Image.Dither.NONE)  # for a small file


def grown(experiment: Experiment) -> list[Estimate]:
    """The fastest setting that fits on each number of GPUs."""
    return growth(experiment, GROWTH)


def growth_table(experiment: Experiment, estimates: Sequence[Estimate]) -> str:
    """In Markdown."""
    head = (
        "GPUs",
        "mesh data/fsdp/tensor",
        "microbatches",
        "remat",
        "per GPU",
        "a step",
        "messages",
        "days",
        "GPU hours",
    )
    lines = [head, ("--:",) * len(head)]
    for each in estimates:
        setting, days = each.setting, each.seconds * experiment.training.steps / 86_400
        gpus = setting.data * setting.fsdp * setting.tensor
        mesh = f"{setting.data}/{setting.fsdp}/{setting.tensor}"
        share = (each.tensor_seconds + each.other_seconds) / each.seconds
        line = f"{gpus:,}", mesh, str(setting.microbatches), setting.remat, amount(each.bytes), duration(each.seconds)
        lines.append((*line, f"{share:.0%}", f"{days:,.3g}", f"{24 * days * gpus:,.0f}"))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def growth_plot(experiment: Experiment) -> Figure:
    """Days of training, and messages per step over products, by the number of GPUs, for three ways to shard."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    days, messages = figure.subplots(1, 2)
    for (label, (fsdp, tensor)), color in zip(FAMILIES.items(), (INK, "#0969da", "#bc4c00"), strict=True):
        estimates = []
        for gpus in GROWTH:
            shards = gpus // tensor
            setting = Setting(
                shards // min(fsdp, shards), min(fsdp, shards), tensor, experiment.batches.rows // gpus, "dots"
            )  # each GPU has the tokens of one row at once
            estimates.append(TrainingPlan(experiment, gpus).estimate(setting))
        taken = [each.seconds * experiment.training.steps / 86_400 for each in estimates]
        share = [100 * (each.tensor_seconds + each.other_seconds) / each.compute_seconds for each in estimates]
        days.loglog(GROWTH, taken, "o-", color=color, label=label)
        messages.semilogx(GROWTH, share, "o-", color=color, label=label)
    days.set_ylabel(f"days for {experiment.training.steps:,} steps")
    messages.set_ylabel("messages, % of the time of products")
    messages.set_ylim(0)
    days.legend(frameon=False)
    for axes in (days, messages):
        axes.set_xlabel("GPUs")
        axes.set_xticks(GROWTH, [f"{count:,}" for count in GROWTH], fontsize=8)
        axes.minorticks_off()
        axes.grid(color=RULE)
    days.set_yticks([3, 10, 30, 100, 300], ["3", "10", "30", "100", "300"])
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path, nargs="?", help="of a finished quickstart")
    parser.add_argument("--growth", help="a config, whose growth is drawn instead")
    parser.add_argument("--demo", type=Path, help="a folder of screenshots, which are composed instead")
    parser.add_argument("--out", type=Path, default=IMAGES)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.growth:
        experiment = load_config_module(arguments.growth).get_config()
        print(growth_table(experiment, grown(experiment)))
        growth_plot(experiment).savefig(arguments.out / "growth.png", dpi=120)
        return
    if arguments.demo:
        for name, shots in DEMO.items():
            screenshots(arguments.demo, shots, 900).save(arguments.out / name, optimize=True)
        return
    if arguments.workdir is None:
        parser.error("name the workdir of a finished quickstart, --growth CONFIG, or --demo FOLDER")
    run = rac3.load(arguments.workdir)
    strip(rows(run)).save(arguments.out / "strip.png", optimize=True)
    tasks(run).save(arguments.out / "tasks.png", optimize=True)
    side_by_side([np.asarray(image) for image in run.generate(PROMPT).images]).save(
        arguments.out / "generate.png", optimize=True
    )


if __name__ == "__main__":
    main()
