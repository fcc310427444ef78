"""The report of infilling and editing: each figure under its words, each picture in its strip."""

from typing import Any

import numpy as np
import pytest
from html_page import Page

from rac3.artifacts.workdir import Workdir
from rac3.experiment import Experiment
from rac3.report import infilling as report
from rac3.report.infilling import infilled_label, infilling_report, infilling_summary
from rac3.run import Run


def of_k(k: int, base: float) -> dict[str, float]:
    return {"perplexity": base + k, "psnr": base + 10 + k, "entity_accuracy": (base + k) / 100}


@pytest.fixture
def metrics() -> dict[str, dict[str, Any]]:
    """Two splits, of 46 and of no images; three models. At 0 and 1 of 46, half an interval is 2 sqrt(.04 .96 / 50)."""
    common = {
        "documents": 46,
        "original": {"entity_accuracy": 1.0},
        "reconstructed": {"psnr": 19.25, "entity_accuracy": 0.5},
    }
    edits = {
        "copied": {"psnr": 15.5, "entity_accuracy": 0.0},
        "editing": {"entity_accuracy": 0.5, "unchanged": 0.0},
        "controlled": {"entity_accuracy": 1.0, "setting_accuracy": None},
    }
    ours = common | edits | {"infilling": {str(k): of_k(k, 10) for k in range(3)}}
    random = common | edits | {"infilling": {str(k): of_k(k, 50) for k in range(2)}, "copied": {"psnr": 1.0}}
    random["controlled"] = {"entity_accuracy": 0.5, "setting_accuracy": 0.5}
    cm3 = common | {"infilling": {"0": of_k(0, 30) | {"entity_accuracy": None}}}
    nothing = {"documents": 0, "pictures": []}
    return {
        name: {"validation": values, "test": nothing}
        for name, values in (("ra_cm3", ours), ("cm3", cm3), ("ra_cm3_random", random))
    }


def test_models_and_documents_are_named_as_people_say():
    assert infilled_label("ra_cm3", 0) == "RA-CM3 without documents"
    assert infilled_label("ra_cm3", 1) == "RA-CM3 with 1 retrieved document"
    assert infilled_label("ra_cm3", 2) == "RA-CM3 with 2 retrieved documents"
    assert infilled_label("ra_cm3_random", 0) == "RA-CM3 without documents"
    assert infilled_label("ra_cm3_random", 2) == "RA-CM3 with 2 random documents"
    assert infilled_label("ra_cm3_exact", 2) == "RA-CM3 with 2 retrieved documents (exact retriever)"
    assert infilled_label("cm3", 0) == "CM3 without documents"


def test_the_summary_has_a_line_for_each_way(metrics: dict[str, Any]):
    """Without documents, the model with random ones is the model: it has one line."""
    assert infilling_summary(metrics).splitlines() == [
        "validation: 46 images",
        *(
            f"  the middle by {line}"
            for line in (
                "RA-CM3 without documents: perplexity of the codes 10.00, PSNR of the middle 20.0 dB, "
                "right entity 10.0% ± 9.6%",
                "RA-CM3 with 1 retrieved document: perplexity of the codes 11.00, PSNR of the middle 21.0 dB, "
                "right entity 11.0% ± 9.8%",
                "RA-CM3 with 2 retrieved documents: perplexity of the codes 12.00, PSNR of the middle 22.0 dB, "
                "right entity 12.0% ± 10.1%",
                "CM3 without documents: perplexity of the codes 30.00, PSNR of the middle 40.0 dB",
                "RA-CM3 with 1 random document: perplexity of the codes 51.00, PSNR of the middle 61.0 dB, "
                "right entity 51.0% ± 14.1%",
                "a copy of the first retrieved document: PSNR of the middle 15.5 dB, right entity 0.0% ± 5.5%",
                "the VQGAN from its own codes: PSNR of the middle 19.2 dB, right entity 50.0% ± 14.1%",
                "nobody: the original: right entity 100.0% ± 5.5%",
            )
        ),
        "  RA-CM3 after documents of another entity: edit shows their entity 50.0% ± 14.1%, "
        "edit still shows its own entity 0.0% ± 5.5%, drawing shows their entity 100.0% ± 5.5%",
        "  RA-CM3, random documents after documents of another entity: edit shows their entity 50.0% ± 14.1%, "
        "edit still shows its own entity 0.0% ± 5.5%, drawing shows their entity 50.0% ± 14.1%, "
        "drawing shows the setting of its text 50.0% ± 14.1%",
        "test: 0 images",
    ]


def test_the_page_has_the_figures_and_the_pictures_of_each_model(
    metrics: dict[str, Any], experiment: Experiment, tmp_path, monkeypatch: pytest.MonkeyPatch
):
    run = Run(experiment, Workdir(tmp_path, "tiny"))
    models = {name: run.variant(experiment, experiment) for name in metrics}
    name_of = {id(model): name for name, model in models.items()}
    kinds = (
        "original",
        "masked",
        "reconstructed",
        "infilled 0",
        "infilled 2",
        "copied",
        "given",
        "edited",
        "controlled",
    )

    def pictures(model: Run, split: str) -> dict[str, np.ndarray]:
        """Two of each kind, all of another gray."""
        first = 60 * [*metrics].index(name_of[id(model)])
        grays = np.arange(first, first + 2 * len(kinds), dtype=np.uint8).reshape(len(kinds), 2, 1, 1, 1)
        return dict(zip(kinds, np.tile(grays, (1, 1, 4, 4, 3)), strict=True)) if split == "validation" else {}

    monkeypatch.setattr(report, "evaluate_infilling", lambda model: metrics[name_of[id(model)]])
    monkeypatch.setattr(report, "kept_pictures", pictures)
    path = infilling_report(run, models)
    assert path == tmp_path / "report" / "infilling.html"
    html = path.read_text()
    page = Page(html)
    assert "<h1>tiny: infilling and editing</h1>" in html
    assert html.index('<section id="test"><h2>test: 0 images') < html.index(
        '<section id="validation"><h2>validation: 46'
    )
    infilled, edited = page.tables[-2:]
    assert infilled[0] == ["the middle, drawn by", "perplexity of the codes", "PSNR of the middle", "right entity"]
    assert infilled[1] == ["RA-CM3 without documents", "10.00", "20.0 dB", "10.0% ± 9.6%"]
    assert infilled[4] == ["CM3 without documents", "30.00", "40.0 dB", ""]
    assert len(infilled) == 9
    assert edited[1:] == [
        ["RA-CM3", "50.0% ± 14.1%", "0.0% ± 5.5%", "100.0% ± 5.5%", ""],
        ["RA-CM3, random documents", "50.0% ± 14.1%", "0.0% ± 5.5%", "50.0% ± 14.1%", "50.0% ± 14.1%"],
    ]
    assert len(page.cards) == 6
    labels = ["original", "masked", "VQGAN", "no documents", "2 documents", "copy", "other", "edited", "drawn"]
    for number, card in enumerate(page.cards):
        assert [figure.label for figure in card.figures] == labels
        grays = [60 * (number // 2) + 2 * kind + number % 2 for kind in range(len(kinds))]
        assert [int(figure.pixels[0, 0, 0]) for figure in card.figures if figure.pixels is not None] == grays
    assert [heading for heading in ("<h3>RA-CM3</h3>", "<h3>CM3</h3>") if heading in html] == [
        "<h3>RA-CM3</h3>",
        "<h3>CM3</h3>",
    ]
