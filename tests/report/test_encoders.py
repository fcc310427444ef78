"""The report of the image tokenizer: recomputed over a run, and by hand over gray pictures."""

import json
import re

import numpy as np
import pytest
import tiny_config
from html_page import Page

from rac3.artifacts.workdir import Workdir
from rac3.cli import run
from rac3.config import InputError
from rac3.documents.document import prepare_image
from rac3.evaluation.reconstruction import psnr, ssim
from rac3.report import encoders as report_encoders
from rac3.report.encoders import EncodersReport, Reconstructed
from rac3.run import Run


def test_report_of_the_image_tokenizer(finished_workdir, capsys):
    config, workdir = finished_workdir
    run(["encoders", str(config), "--workdir", str(workdir), "--report", "--report-images", "5"])
    page = workdir / "report" / "encoders.html"
    assert f"report: {page}" in capsys.readouterr().out

    metrics = json.loads((workdir / "report" / "encoders.json").read_text())
    assert list(metrics) == ["train", "memory", "validation", "tuning", "test"]
    experiment = tiny_config.get_config()
    codec = Run(experiment, Workdir(workdir, "tiny")).images
    source = experiment.data.sources()["test"]
    images = [item.images[0].pixels() for item in source.read(workdir, source.shards(workdir)[0])][:5]
    truth = np.stack([prepare_image(image, codec.resolution) for image in images]).astype(float)
    codes = codec.encode(images)
    errors = ((codec.decode(codes) - truth) ** 2).mean((1, 2, 3))
    assert metrics["test"]["images"] == len(images)
    assert metrics["test"]["psnr"] == pytest.approx(np.mean(10 * np.log10(255**2 / errors)), abs=1e-4)
    assert metrics["test"]["codebook_use"] == len(np.unique(codes)) / codec.codebook_size
    assert 0 < metrics["test"]["ssim"] < 1

    html = page.read_text()
    pictures = re.findall(r'<img class="small" src="data:image/png', html)
    assert len(pictures) == sum(3 * m["images"] for m in metrics.values())  # original, from codes, difference
    assert "<script" not in html
    assert not re.search(r'(src|href)="(?!data:|#)', html)


def test_bad_number_of_images():
    with pytest.raises(InputError, match="report_images=0 is below 1"):
        EncodersReport(report_images=0)


@pytest.fixture
def found() -> Reconstructed:
    """Forty gray pictures that come back lighter, by more and more; of the codes 0, 0, 0, 1 out of four."""
    truth = np.full((40, 16, 16, 3), 100, np.uint8)
    drawn = truth + np.arange(40, dtype=np.uint8)[:, None, None, None]
    order = np.random.default_rng(0).permutation(40)
    truth, drawn = truth[order], drawn[order]
    codes = np.array([[0, 0], [0, 1]] * 20)
    return Reconstructed(truth, codes, drawn, psnr(truth, drawn), ssim(truth, drawn))


def test_numbers_of_pictures_made_by_hand(found: Reconstructed):
    metrics = report_encoders._metrics(found, 4)
    decibels = np.array([60, *(20 * np.log10(255 / np.arange(1, 40)))])  # an equal picture counts as 60 dB
    assert metrics["images"] == 40
    assert metrics["psnr"] == pytest.approx(decibels.mean())
    assert metrics["psnr_5th_percentile"] == pytest.approx(np.percentile(decibels, 5))
    assert metrics["ssim"] == pytest.approx(found.ssim.mean())
    assert metrics["codebook_use"] == 0.5
    assert metrics["codebook_perplexity"] == pytest.approx(0.75**-0.75 * 0.25**-0.25)


def test_pictures_go_from_the_worst_to_the_best(found: Reconstructed):
    """Each with the picture from its codes, and half the difference on gray."""
    page = Page(f"<article>{report_encoders._pictures(found)}</article>")
    trios = np.array([figure.pixels[0, 0, 0] for figure in page.cards[0].figures]).reshape(-1, 3)
    added = [39, 35, 31, 27, 23, 19, 16, 12, 8, 4, 0]  # at even distances, 11 of them
    assert trios.tolist() == [[100, 100 + more, 128 + more // 2] for more in added]
    captions = [figure.caption for figure in page.cards[0].figures][1::3]
    assert captions[0].startswith(f"{20 * np.log10(255 / 39):.1f} dB, SSIM ")


def test_the_difference_keeps_its_sign():
    truth, drawn = (np.full((1, 16, 16, 3), value, np.uint8) for value in (255, 0))
    found = Reconstructed(truth, np.zeros((1, 2), int), drawn, psnr(truth, drawn), ssim(truth, drawn))
    page = Page(f"<article>{report_encoders._pictures(found)}</article>")
    assert [figure.pixels[0, 0, 0] for figure in page.cards[0].figures] == [255, 0, 0]


def test_the_table_and_the_plots_have_each_split(found: Reconstructed, finished_workdir, monkeypatch):
    plots = {}
    monkeypatch.setattr(report_encoders, "plot", lambda title, x, y, lines: plots.setdefault(title, lines) and "")
    experiment, workdir = tiny_config.get_config(), Workdir(finished_workdir[1], "tiny")
    metrics = {
        split: {"images": n, "psnr": n + 0.5, "psnr_5th_percentile": n + 0.25, "ssim": n / 10}
        | {"codebook_use": n / 20, "codebook_perplexity": 5.0 + n}
        for n, split in enumerate(("train", "test"), 1)
    }
    some = Reconstructed(
        found.truth[:2], np.array([[3, 3], [3, 3]]), found.drawn[:2], np.array([7.0, 9.0]), found.ssim[:2]
    )
    codec = Run(experiment, workdir).images
    html = report_encoders._numbers(experiment, codec, {"train": found, "test": some}, metrics)
    (table,) = Page(html).tables
    assert table == [
        ["", "train", "test"],
        ["images", "1", "2"],
        ["PSNR, dB (higher is better)", "1.50", "2.50"],
        ["PSNR of the worst twentieth, dB", "1.25", "2.25"],
        ["SSIM (at most 1)", "0.1000", "0.2000"],
        ["codes used", "5.0%", "10.0%"],
        ["codebook perplexity (at most 16)", "6.0", "7.0"],
    ]
    rising = plots["Pictures, worst to best"]
    assert [line.label for line in rising] == ["train", "test"]
    assert (rising[1].points[0], rising[1].points[50], rising[1].points[-1]) == ((0, 7), (50, 8), (100, 9))
    assert rising[0].points[-1] == (100, 60)
    falling = plots["Codes, most used to least"]
    assert (falling[1].points[0], falling[1].points[50]) == ((0, 16), (50, 0))  # one of 16 codes, 16 times its part
    assert (falling[0].points[0], falling[0].points[-1]) == ((0, 12), (100, 0))
