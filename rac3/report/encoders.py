"""The report of the image tokenizer: what is lost between pictures and their codes, for any VQGAN on any source."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from rac3.artifacts.workdir import write_atomic
from rac3.config import InputError
from rac3.documents.document import pixels_of, plain_json, prepare_image
from rac3.documents.reader import read_documents
from rac3.evaluation.reconstruction import codebook_use, psnr, ssim
from rac3.experiment import Experiment, Split
from rac3.report.page import CM3_COLOR, OTHER_COLOR, OWN_COLOR, Picture, figure, sheet, table
from rac3.report.plots import Line, plot
from rac3.run import Run
from rac3.vqgan.codec import ImageTokenizer
from rac3.vqgan.frozen import FrozenVQGAN

SHOWN = 11  # pictures of a split: a row of the page
COLORS = (OWN_COLOR, CM3_COLOR, OTHER_COLOR, "#3b8f5a")


@dataclass(frozen=True)
class EncodersReport:
    """What `rac3 encoders` shows.

    Attributes:
      report: write report/encoders.html: originals next to reconstructions, PSNR, SSIM and codebook use.
      report_images: at most this many images of each split, evenly from all shards.
    """

    report: bool = False
    report_images: int = 512

    def __post_init__(self) -> None:
        if self.report_images < 1:
            raise InputError(f"report_images={self.report_images} is below 1; use at least 1, hundreds to be exact")


@dataclass(frozen=True)
class Reconstructed:
    """Some images of a split, as the VQGAN sees them and as it draws them again from their codes."""

    truth: UInt8[np.ndarray, "images height width 3"]
    codes: Int[np.ndarray, "images tokens"]
    drawn: UInt8[np.ndarray, "images height width 3"]
    psnr: Float[np.ndarray, " images"]  # dB
    ssim: Float[np.ndarray, " images"]


def encoders_report(run: Run, images: int) -> Path:
    """Writes `report/encoders.html` and `report/encoders.json` of the workdir; the path of the page.

    Raises:
      InputError: the VQGAN is not made yet or has no decoder, or a split has no images.
    """
    experiment, codec = run.experiment, run.images
    splits = {split: _reconstruct(experiment, codec, split, images) for split in experiment.data.sources()}
    metrics = {split: _metrics(found, codec.codebook_size) for split, found in splits.items()}
    for split, found in splits.items():
        if len(found.codes) > 1 and (found.codes == found.codes.flat[0]).all():
            print(f"WARNING: {split}: all {len(found.codes)} pictures are one code alone; check the VQGAN's weights")
    folder = run.workdir.path / "report"
    folder.mkdir(exist_ok=True)
    write_atomic(folder / "encoders.json", json.dumps(plain_json(metrics), indent=2) + "\n")
    sections = [("numbers", "What the VQGAN keeps", _numbers(experiment, codec, splits, metrics))]
    sections += [(split, f"Pictures: {split}", _pictures(found)) for split, found in splits.items()]
    write_atomic(folder / "encoders.html", sheet(f"{experiment.name}: image tokenizer", sections))
    return folder / "encoders.html"


def _reconstruct(experiment: Experiment, codec: ImageTokenizer, split: Split, limit: int) -> Reconstructed:
    source = {split: experiment.data.sources()[split]}
    documents = read_documents(source, Path(experiment.data_dir), experiment.filter, limit, experiment.framing)
    images = [image for document in documents for image in document.images][:limit]
    if not images:
        raise InputError(f"the first {len(documents)} documents of {split} have no images; raise --report-images")
    truth = np.stack([prepare_image(pixels_of(image), codec.resolution) for image in images])
    codes = codec.encode(list(truth))
    drawn = codec.decode(codes)
    return Reconstructed(truth, codes, drawn, psnr(truth, drawn), ssim(truth, drawn))


def _metrics(found: Reconstructed, codes: int) -> dict[str, int | float]:
    use = codebook_use(found.codes, codes)
    finite = np.minimum(found.psnr, 60)  # what is equal would make the mean infinite
    return {
        "images": len(found.truth),
        "psnr": float(finite.mean()),
        "psnr_5th_percentile": float(np.percentile(finite, 5)),
        "ssim": float(found.ssim.mean()),
        "codebook_use": use.used,
        "codebook_perplexity": use.perplexity,
    }


def _numbers(
    experiment: Experiment, codec: ImageTokenizer, splits: dict[Split, Reconstructed], metrics: dict[Split, Any]
) -> str:
    source = _source(experiment)
    what = (
        f"{source}: {codec.codebook_size:,} codes, {codec.tokens_per_image:,} tokens for a picture of "
        f"{codec.resolution} x {codec.resolution}. What it loses, no language model brings back."
    )
    rows = [
        ("images", "images", ",d"),
        ("PSNR, dB (higher is better)", "psnr", ".2f"),
        ("PSNR of the worst twentieth, dB", "psnr_5th_percentile", ".2f"),
        ("SSIM (at most 1)", "ssim", ".4f"),
        ("codes used", "codebook_use", ".1%"),
        (f"codebook perplexity (at most {codec.codebook_size:,})", "codebook_perplexity", ",.1f"),
    ]
    cells = [[label, *(format(metrics[split][name], form) for split in splits)] for label, name, form in rows]
    lines, uses = [], []
    for (split, found), color in zip(splits.items(), COLORS, strict=False):
        lines.append(Line(split, _curve(np.minimum(found.psnr, 60)), color))
        rising = _curve(_shares(found.codes, codec.codebook_size))
        uses.append(Line(split, [(100 - percent, share) for percent, share in reversed(rising)], color))
    plots = plot("Pictures, worst to best", "percent of the pictures", "PSNR, dB", lines)
    plots += plot("Codes, most used to least", "percent of the codes", "times an even use", uses)
    return f'<p class="note">{escape(what)}</p>{table(["", *splits], cells)}<div class="plots">{plots}</div>'


def _source(experiment: Experiment) -> str:
    """Where the image tokenizer is from."""
    vqgan = experiment.vqgan
    if not isinstance(vqgan, FrozenVQGAN):
        return f"{type(vqgan).__name__} of the config"
    return vqgan.checkpoint or f"Fitted on {' and '.join(experiment.data.fit_on)}"


def _shares(codes: Int[np.ndarray, "images tokens"], size: int) -> Float[np.ndarray, " codes"]:
    """How often each code occurs, 1 being its part of an even use."""
    return np.bincount(codes.ravel(), minlength=size) * (size / codes.size)


def _curve(values: Float[np.ndarray, " values"]) -> list[tuple[float, float]]:
    """Percentiles."""
    at = np.linspace(0, 100, 101)
    return list(zip(at.tolist(), np.percentile(values, at).tolist(), strict=True))


def _pictures(found: Reconstructed) -> str:
    order = np.argsort(found.psnr)
    shown = order[np.unique(np.linspace(0, len(order) - 1, SHOWN).round().astype(int))]
    note = (
        "From the worst by PSNR to the best, at even distances. Below each original: the picture from its codes, and "
        "where the two differ (gray is equal)."
    )
    return (
        f'<p class="note">{note}</p><div class="pictures all">{"".join(_trio(found, int(row)) for row in shown)}</div>'
    )


def _trio(found: Reconstructed, row: int) -> str:
    difference = 128 + (found.drawn[row].astype(int) - found.truth[row]) // 2
    words = f"{found.psnr[row]:.1f} dB, SSIM {found.ssim[row]:.3f}"
    pictures: Sequence[Picture] = (
        Picture("original", found.truth[row]),
        Picture("from codes", found.drawn[row], words),
        Picture("difference", np.clip(difference, 0, 255).astype(np.uint8)),
    )
    return f"<div>{''.join(map(figure, pictures))}</div>"
