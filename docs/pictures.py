"""Draws the pictures of the README from a finished run.

    rac3 quickstart
    python docs/pictures.py runs/quickstart

Writes into `docs/images/`, from the models as the config evaluates them:

strip.png     what RA-CM3 and CM3 draw for captions of the test split, whose entities neither saw in training, and the
              documents that each caption retrieves. The rows are the first documents of the split, not a selection.
generate.png  what `rac3 generate` draws for PROMPT: its four samples, the one that CLIP likes best first.
"""

import argparse
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import PIL.Image
from jaxtyping import UInt8
from PIL import ImageDraw, ImageFont

import rac3
from rac3.run import Run

IMAGES = Path(__file__).parent / "images"
ROWS = 3  # of the strip
PROMPT = "lofosot on grass in rain with a gold frame"  # an unseen entity where no document shows it
TILE = 240  # pixels of a picture's side; the README shows the strip at about half its size
GAP, TEXT_WIDTH, HEADER, CAPTION = 28, 290, 70, 80  # pixels
INK, PALE, RULE = "#1f2328", "#59636e", "#d1d9e0"


@dataclass(frozen=True)
class Row:
    """A prompt, the documents it retrieves as (caption, picture), what each model draws, and the document itself."""

    prompt: str
    retrieved: Sequence[tuple[str, UInt8[np.ndarray, "_ _ 3"]]]
    ra_cm3: UInt8[np.ndarray, "_ _ 3"]
    cm3: UInt8[np.ndarray, "_ _ 3"]
    truth: UInt8[np.ndarray, "_ _ 3"]


def rows(run: Run) -> list[Row]:
    """The first documents of the test split, drawn as `rac3 evaluate` does: the best of several samples by CLIP."""
    settings, vanilla = run.experiment.evaluation, run.experiment.vanilla()
    cm3 = run.variant(vanilla, vanilla)
    made = []
    for item in run.documents("test").many(range(ROWS)):
        document = item.document
        drawn = run.draw(document.text, settings.num_retrieved, settings.image_samples)
        plain = cm3.draw(document.text, 0, settings.image_samples)
        retrieved = [(found.document.text, found.document.images[0].pixels()) for found in drawn.retrieved]
        made.append(Row(document.text, retrieved, drawn.images[0], plain.images[0], document.images[0].pixels()))
    return made


def strip(rows: Sequence[Row]) -> PIL.Image.Image:
    """One line of pictures per row, under a line of headings.

    prompt       | retrieved | retrieved | RA-CM3 | CM3 | truth
    a caption of | (picture) | (picture) |  ...
    the test set | caption   | caption   |
    """
    retrieved = max(len(row.retrieved) for row in rows)
    left = TEXT_WIDTH + GAP
    columns = [left + column * (TILE + GAP) for column in range(retrieved + 3)]
    height = HEADER + len(rows) * (TILE + CAPTION)
    canvas = PIL.Image.new("RGB", (columns[-1] + TILE + GAP, height), "white")
    draw = ImageDraw.Draw(canvas)
    headings = ["retrieved"] * retrieved + ["RA-CM3 draws", "CM3 draws", "truth"]
    for x, heading in zip([GAP, *columns], ["prompt", *headings], strict=True):
        draw.text((x, HEADER - 46), heading, INK, _font(26, bold=True))
    for number, row in enumerate(rows):
        top = HEADER + number * (TILE + CAPTION)
        draw.text((GAP, top), textwrap.fill(row.prompt, 16), INK, _font(26), spacing=10)
        drawn = [("", row.ra_cm3), ("", row.cm3), ("", row.truth)]
        for x, (caption, pixels) in zip(columns, [*row.retrieved, *drawn], strict=True):
            canvas.paste(_tile(pixels), (x, top))
            draw.rectangle((x, top, x + TILE - 1, top + TILE - 1), outline=RULE)
            draw.text((x, top + TILE + 6), textwrap.fill(caption, 22), PALE, _font(19), spacing=5)
    return canvas


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path, help="of a finished quickstart")
    parser.add_argument("--out", type=Path, default=IMAGES)
    arguments = parser.parse_args()
    run = rac3.load(arguments.workdir)
    arguments.out.mkdir(parents=True, exist_ok=True)
    strip(rows(run)).save(arguments.out / "strip.png", optimize=True)
    side_by_side(run.draw(PROMPT).images).save(arguments.out / "generate.png", optimize=True)


if __name__ == "__main__":
    main()
