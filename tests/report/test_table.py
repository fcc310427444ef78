"""The words of the comparison: when two models differ, and what is said of them."""

from typing import Any

import pytest

from rac3.report.table import (
    left_out_lines,
    lookup,
    margin,
    model_label,
    model_names,
    peers,
    ratio_line,
    recall_rows,
    side_by_side,
    value_rows,
    verdict,
)


def metrics_of(**models: dict[str, Any]) -> dict[str, Any]:
    """Metrics of these models, of equal size unless they say otherwise, on 100 documents."""
    common = {"perplexity_by_k": {}, "parameters": 10, "steps": 5}
    found = {name: common | values for name, values in models.items()}
    return found | {"retrieval": {}, "evaluation": {"with_entity": {"validation": 100, "test": 100}}}


def perplexities(image: float | None, text: float | None = None) -> dict[str, Any]:
    return {"perplexity": {"image": image, "text": text}}


def unseen(name: str, share: float) -> dict[str, Any]:
    return {name: {"seen": None, "unseen": share}}


def test_models_are_named_as_people_say():
    assert model_label("ra_cm3") == "RA-CM3"
    assert model_label("cm3") == "CM3"
    assert model_label("cm3_best") == "CM3 at its best"
    assert model_label("ra_cm3_random") == "RA-CM3, random documents"
    assert model_label("ra_cm3_exact") == "RA-CM3, exact retriever"
    assert model_label("cm3_exact") == "CM3, exact retriever"
    assert model_names(metrics_of(ra_cm3_exact={}, cm3={})) == ["ra_cm3_exact", "cm3"]
    assert lookup({"a": {"b": 3}}, ("a", "b")) == 3
    assert lookup({"a": 3}, ("a", "b")) is None
    assert lookup({}, ("a", "b")) is None


@pytest.mark.parametrize(
    ("share", "count", "half"),
    [(0.5, 96, 0.1), (0.0, 46, 2 * (0.04 * 0.96 / 50) ** 0.5), (1.0, 46, 2 * (0.04 * 0.96 / 50) ** 0.5)],
)
def test_the_margin_by_hand(share: float, count: int, half: float):
    """Two hits and two misses are added; then it is two standard deviations."""
    assert margin(share, count) == pytest.approx(half)


@pytest.mark.parametrize(
    ("ours", "said"), [(0.49, "not clearly different in"), (0.51, "better in"), (-0.51, "worse in")]
)
def test_scores_with_intervals_differ_by_more_than_both(ours: float, said: str):
    """Half intervals of 0.3 and 0.4 make 0.5 together."""

    def cider(value: float, low: float, high: float) -> dict[str, Any]:
        return {"captions": {"test": {"cider_d": {"value": value, "low": low, "high": high}}}}

    metrics = metrics_of(ra_cm3=cider(ours, 0.1, 0.7), cm3=cider(0.0, -0.3, 0.5))
    assert f"RA-CM3 is {said} CIDEr-D (unseen)." in verdict(metrics)


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        (98.9, 100.0, "better in"),
        (99.1, 100.0, "not clearly different in"),  # within 1% of the larger
        (100.0, 99.1, "not clearly different in"),
        (100.0, 98.9, "worse in"),
    ],
)
def test_perplexities_differ_by_more_than_a_hundredth(ours: float, theirs: float, said: str):
    metrics = metrics_of(ra_cm3=perplexities(ours), cm3=perplexities(theirs))
    assert verdict(metrics) == f"Against CM3 of the same size and as many steps, RA-CM3 is {said} image perplexity."


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [(0.65, 0.50, "better in"), (0.62, 0.50, "not clearly different in"), (0.35, 0.50, "worse in")],
)
def test_shares_differ_by_more_than_their_margins_together(ours: float, theirs: float, said: str):
    """Of 100 documents the margin of a half is 9.8 points: two of them are 13.9."""
    metrics = metrics_of(ra_cm3=unseen("name_accuracy", ours), cm3=unseen("name_accuracy", theirs))
    assert f"RA-CM3 is {said} name accuracy (unseen)." in verdict(metrics)
    metrics["evaluation"]["with_entity"]["validation"] = 10**9  # of another split
    assert f"RA-CM3 is {said} name accuracy (unseen)." in verdict(metrics)


def test_a_higher_clip_score_is_better():
    metrics = metrics_of(ra_cm3=unseen("clip_score", 0.3), cm3=unseen("clip_score", 0.2))
    assert "is better in CLIP score." in verdict(metrics)


def test_what_the_verdict_compares():
    """The first model with CM3, not with its control; and it says so where they are not of one size."""
    image = {name: perplexities(value) for name, value in (("ra_cm3", 5.0), ("ra_cm3_random", 7.25), ("cm3", 6.0))}
    told = " With random documents in place of retrieved ones, its image perplexity is 7.25, not 5.00."
    start = "Against CM3 of the same size and as many steps, RA-CM3 is better in image perplexity."
    assert verdict(metrics_of(**image)) == start + told
    for field in ("parameters", "steps"):
        other = {**image, "cm3": image["cm3"] | {field: 3}}
        assert verdict(metrics_of(**other)) == "Against CM3, RA-CM3 is better in image perplexity." + told
    alone = "One model was evaluated; there is none to compare it with."
    assert verdict(metrics_of(cm3=image["cm3"])) == alone
    assert verdict(metrics_of(ra_cm3=image["ra_cm3"], ra_cm3_random=image["ra_cm3_random"])) == alone
    nothing = metrics_of(ra_cm3=perplexities(None), cm3=perplexities(3.0))
    assert verdict(nothing) == "Nothing was measured of both models."
    both = metrics_of(ra_cm3=perplexities(5.0, 4.0), cm3=perplexities(6.0, 6.0))
    assert "better in image perplexity and text perplexity." in verdict(both)


def test_the_headline_is_against_the_better_cm3():
    """For each figure, the step that is better in it: images here at the last step, texts at the best."""
    models = {
        "ra_cm3": perplexities(5.0, 10.0) | {"entity_accuracy": {"seen": None, "unseen": 0.4}},
        "cm3_best": perplexities(6.0, 12.0) | {"steps": 3, "entity_accuracy": {"seen": None, "unseen": 0.1}},
        "cm3": perplexities(4.0, 18.0) | {"entity_accuracy": {"seen": None, "unseen": 0.9}},
    }
    assert verdict(metrics_of(**models)) == (
        "Against CM3 of the same size, at its best or at its last step, whichever is better, RA-CM3 is better in text "
        "perplexity; worse in image perplexity and entity accuracy (unseen)."
    )
    line = "perplexity of RA-CM3 over that of"
    assert ratio_line(metrics_of(**models)) == f"{line} the better CM3: image 1.25, text 0.83"
    models["cm3_best"]["perplexity"]["text"] = None
    assert ratio_line(metrics_of(**models)) == f"{line} the better CM3: image 1.25, text 0.56"
    models["cm3"]["perplexity"]["text"] = None
    assert ratio_line(metrics_of(**models)) == f"{line} the better CM3: image 1.25"
    del models["cm3_best"]
    assert ratio_line(metrics_of(**models)) == f"{line} CM3: image 1.25"
    assert ratio_line(metrics_of(cm3=models["cm3"])) == ""
    other = models | {"cm3_best": models["cm3"] | {"parameters": 7}}
    assert verdict(metrics_of(**other)).startswith("Against CM3, RA-CM3 is worse in")
    assert [peers([*models]), peers(["cm3"])] == [["cm3"], []]
    assert peers(["ra_cm3", "cm3_best", "cm3"]) == ["cm3_best", "cm3"]


def test_recalls_are_those_that_there_are():
    test, validation = {"text": 0.5}, {"text": 0.25}
    metrics = {"retrieval": {"recall_at_2": test, "validation": {"recall_at_2": validation}}}
    assert recall_rows(metrics) == [("test", "2", test), ("validation", "2", validation)]
    metrics["retrieval"]["recall_at_2"] = None
    assert recall_rows(metrics) == [("validation", "2", validation)]


def test_shares_have_the_margin_of_the_documents_that_name_an_entity():
    """60% and 40% differ clearly on 400 documents, not on 8."""
    metrics = metrics_of(ra_cm3={"name_accuracy": {"unseen": 0.6}}, cm3={"name_accuracy": {"unseen": 0.4}})
    for named, said in ((400, "better in"), (8, "not clearly different in")):
        metrics["evaluation"] = {"documents": {"test": 400}, "with_entity": {"test": named}}
        assert f"is {said} name accuracy (unseen)" in verdict(metrics)


def test_documents_without_an_entity_are_named_in_a_line_of_their_split():
    evaluation = {"documents": {"validation": 5, "test": 5}, "with_entity": {"validation": 5, "test": 0}}
    (line,) = left_out_lines({"evaluation": evaluation | {"entity_field": "concept"}})
    assert line == "test: no document has 'concept' in its metadata, so there is no accuracy or recall of entities"
    assert left_out_lines({"evaluation": evaluation | {"entity_field": ""}}) == []  # nobody asks for it


def test_runs_stand_side_by_side_by_model():
    """The first has no CM3, the second no copy; rows that neither has are left out."""
    first = metrics_of(ra_cm3=perplexities(1.5)) | {"baselines": {"copied": unseen("entity_accuracy", 0.96)}}
    second = metrics_of(ra_cm3=perplexities(1.4, 2.0), cm3=perplexities(2.5)) | {"baselines": {}}
    assert value_rows(side_by_side({"a": first, "b": second})) == [
        ["", "RA-CM3 (a)", "RA-CM3 (b)", "a copy (a)", "CM3 (b)"],
        ["image perplexity", "1.50", "1.40", "-", "2.50"],
        ["text perplexity", "-", "2.00", "-", "-"],
        ["entity accuracy (unseen)", "-", "-", "96.0%", "-"],
    ]
