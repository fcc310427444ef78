import json
import re

import numpy as np
import pytest

from rac3.cli import run
from rac3.config import InputError
from rac3.documents.document import prepare_image
from rac3.report_encoders import EncodersReport


def test_report_of_the_image_tokenizer(finished_workdir, capsys):
    from rac3.artifacts import Workdir
    from rac3.config import load_config_module
    from rac3.stages.encoders import open_vqgan

    config, workdir = finished_workdir
    run(["encoders", str(config), "--workdir", str(workdir), "--report", "--report-images", "5"])
    page = workdir / "report" / "encoders.html"
    assert f"report: {page}" in capsys.readouterr().out

    metrics = json.loads((workdir / "report" / "encoders.json").read_text())
    assert list(metrics) == ["train", "memory", "validation", "test"]
    experiment = load_config_module(str(config)).get_config()
    codec = open_vqgan(experiment, Workdir(workdir, "tiny"))
    source = experiment.data.sources()["test"]
    images = [item.images[0].pixels() for item in source.read(workdir, source.shards(workdir)[0])][:5]
    truth = np.stack([prepare_image(image, codec.resolution) for image in images]).astype(float)
    codes = codec.encode(images)
    errors = ((codec.decode(codes) - truth) ** 2).mean((1, 2, 3))
    assert metrics["test"]["images"] == len(images)
    assert metrics["test"]["psnr"] == pytest.approx(np.mean(10 * np.log10(255**2 / errors)), abs=1e-4)
    assert metrics["test"]["codebook_use"] == len(np.unique(codes)) / codec.codes
    assert 0 < metrics["test"]["ssim"] < 1

    html = page.read_text()
    pictures = re.findall(r'<img class="small" src="data:image/png', html)
    assert len(pictures) == sum(3 * m["images"] for m in metrics.values())  # original, from codes, difference
    assert "<script" not in html
    assert not re.search(r'(src|href)="(?!data:|#)', html)


def test_bad_number_of_images():
    with pytest.raises(InputError, match="report_images=0 is below 1"):
        EncodersReport(report_images=0)
