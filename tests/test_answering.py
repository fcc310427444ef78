"""A model that answers prompts: many at once, k-shot classification, scores, and what an answer shows."""

import io
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import PIL.Image
import pytest
from compilations import compilations
from decoding_spy import Call, watch_decoding
from scoring_spy import Told, watch_scoring
from tiny_prompts import FIRST_CODE, FIRST_MASK, FIRST_TEXT, spelled

from rac3.answering import Model, _unframed
from rac3.artifacts.workdir import Workdir
from rac3.config import InputError
from rac3.documents.document import Document, Image, Text, captioned, encode_png
from rac3.experiment import Experiment
from rac3.generation.answers import Answer
from rac3.generation.prompts import Context
from rac3.generation.request import Sample
from rac3.generation.sampling import Guidance, Sampling, Without
from rac3.prompt import Ensemble, Passage, Prompt, Task, mask_of, pixels_of, scaled_mask
from rac3.tokens.html import Segment

PROMPT = "a fox on water in night"


@pytest.fixture(scope="module")
def model(experiment: Experiment, store: Workdir) -> Model:
    return Model(experiment, store)


@pytest.fixture(scope="module")
def pictures(model: Model) -> list[np.ndarray]:
    return [item.document.images[0].pixels() for item in model.documents("train").many(range(0, 18, 3))]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    return watch_decoding(monkeypatch, real=False)


def test_many_prompts_are_answered_in_their_order_in_one_batch(model: Model, calls: list[Call], pictures):
    """Of one that is too long, the others hear nothing."""
    prompts = [
        Prompt("draw", PROMPT, samples=2, seed=4),
        Prompt("draw", "a fox " * 100),
        Prompt("caption", image=pictures[0], retrieve=1, samples=3),
        Prompt("draw", "an owl", retrieve=0, samples=1),
    ]
    answers = [*model.answers(prompts)]
    assert [number for number, _ in answers] == [0, 1, 2, 3]
    (call,) = calls
    assert call.seeds == [4, 0, 0]
    first, refused, caption, last = (answer for _, answer in answers)
    assert isinstance(refused, InputError)
    assert [type(answer) for answer in (first, caption, last)] == [Answer] * 3
    assert (len(first.images), len(caption.texts), len(last.images)) == (2, 3, 1)
    alone = model.generate(PROMPT, samples=2, seed=4)
    assert first.to_json() == alone.to_json()
    assert [len(answer.documents) for answer in (first, caption, last)] == [2, 1, 0]
    assert caption.documents == [found.document for found in model.retrieve(image=pictures[0], k=1)]


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the checks of types that tests have and users have not."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def test_a_damaged_document_stops_its_own_prompt_alone(model: Model, calls: list[Call], pictures, unchecked):
    document, damaged = _document("an owl", pictures[0]), captioned("mine", "a fox", encode_png(pictures[1])[:60])
    prompts = [
        Prompt("draw", "a fox", documents=given, retrieve=0, samples=1)
        for given in ([document], [document, damaged], damaged, [])
    ]
    started = Document("start", (Image(damaged.images[0].data),), {})
    prompts.append(Prompt("continue", document=started, follow=["text"]))
    (_, first), (_, refused), (_, alone), (_, last), (_, continued) = model.answers(prompts)
    assert re.match("document 'start' has an image that cannot be read", str(continued))
    assert re.match("document 'mine' has an image that cannot be read: .+; give a png", str(refused))
    assert re.match("documents=.+ is no list of Documents", str(alone))
    assert isinstance(refused, InputError)
    assert ([each.key for each in first.documents], last.documents) == (["an owl"], [])
    with pytest.raises(InputError, match="document 'mine' has an image that cannot be read"):
        model.score(damaged)


WRONG: list[tuple[Callable[[Model, np.ndarray], object], str]] = [
    (lambda model, image: model.caption(image / 255.0), "the image is float64 of shape (40, 40, 3); give uint8"),
    (lambda model, image: model.caption(image[:0]), "the image is uint8 of shape (0, 40, 3); give uint8 of shape"),
    (lambda model, image: model.caption(image[..., 0]), "the image is uint8 of shape (40, 40); give"),
    (lambda model, image: model.infill(image[..., 0], (0, 0, 9, 9)), "the image is uint8 of shape (40, 40); give"),
    (lambda model, image: model.caption(PIL.Image.new("L", (0, 0))), "the image is uint8 of shape (0, 0, 3)"),
    (lambda model, image: model.caption(image.tolist()), "the image is [[["),
    (lambda model, image: model.caption(None), "the image is None; give uint8"),
    (lambda model, image: Prompt("caption", image="fox.png"), "the image is 'fox.png'; give uint8"),
    (lambda model, image: model.infill(image, image), "the mask has the shape (40, 40, 3); give one of shape (height"),
    (lambda model, image: model.infill(image, image[:20, :, 0]), "the mask has 40 x 20 pixels, but the image 40 x 40"),
    (lambda model, image: model.infill(image, (0, 0, 9)), "the mask is (0, 0, 9); give an array"),
    (lambda model, image: model.infill(image, (0, 0, 9, 9.5)), "the mask is (0, 0, 9, 9.5); give an array"),
    (
        lambda model, image: Prompt("infill_image", image=image, mask=image[..., 0]),
        "give a bool array of shape (height",
    ),
    (lambda model, image: Prompt("paint", "a fox"), "task='paint' is unknown; use draw, caption,"),
    (lambda model, image: model.resume(["sound"], "a fox"), "follow='sound' is unknown; use text, image"),
    (lambda model, image: model.resume(["text"], document="a fox"), "document='a fox' is no Document; give"),
    (
        lambda model, image: model.resume(["text"], "a", document=_document("a", image)),
        "a document is for the task con",
    ),
    (lambda model, image: model.generate(None), "text=None is no text; give a str"),
    (lambda model, image: model.generate("a fox", samples=1.5), "samples=1.5 is no int from 1"),
    (lambda model, image: model.generate("a fox", samples=0), "samples=0 is no int from 1"),
    (lambda model, image: model.generate("a fox", retrieve=True), "retrieve=True is no int from 0"),
    (lambda model, image: model.generate("a fox", seed=2**70), "is no int from 0 to 2**63 - 1"),
    (lambda model, image: model.generate("a fox", ensemble=True), "ensemble=True is unknown; use mean, best"),
    (
        lambda model, image: model.score(_document("a", image), ensemble="best"),
        "ensemble='best': a score has no samples",
    ),
    (lambda model, image: model.score("a fox"), "document='a fox' is no Document; give"),
    (lambda model, image: model.score(_document("a", image), 0.5), "segment=0.5 is no int from 0"),
    (lambda model, image: model.score(_document("a", image), end=1.5), "end=1.5 is no int from 0"),
    (lambda model, image: model.score(_document("a", image), retrieve=-1), "retrieve=-1 is no int from 0"),
    (lambda model, image: model.generate("a fox", sampling="hot"), "sampling='hot' is no Sampling"),
    (lambda model, image: [*model.answers([])], "prompts=[] is no list of Prompts; give at least one"),
    (lambda model, image: [*model.answers(["a fox"])], "prompts=['a fox'] is no list of Prompts"),
    (lambda model, image: model.classify(image, {"a": [image], "b": [image]}, scored="sound"), "scored='sound' is unk"),
    (lambda model, image: model.classify(image, {"a": [image], "b": [image]}, 0.5), "shots=0.5 is no int"),
]


@pytest.mark.parametrize(("asked", "said"), WRONG, ids=[said for _, said in WRONG])
def test_what_no_prompt_may_be_is_one_line(model: Model, pictures, unchecked, asked, said: str):
    with pytest.raises(InputError, match=re.escape(said)) as refused:
        asked(model, pictures[0])
    assert "\n" not in str(refused.value)


def test_the_ints_of_numpy_are_ints(unchecked):
    """A notebook loops over `np.arange`; JSON has no `np.int64`."""
    prompt = Prompt("draw", "a fox", retrieve=np.int32(0), samples=np.uint8(2), seed=np.int64(3))
    passage = Passage(Document("", (Text("a fox"),), {}), segment=np.int64(0), start=np.int64(1), end=np.int64(2))
    found = prompt.retrieve, prompt.samples, prompt.seed, passage.segment, passage.start, passage.end
    assert found == (0, 2, 3, 0, 1, 2)
    assert {type(each) for each in found} == {int}


def test_another_number_of_samples_compiles_nothing(model: Model):
    """Neither the engine's programs nor those of the VQGAN and CLIP, which get a row for each of 8 devices."""
    model.generate(PROMPT, samples=8)
    for samples in (16, 3):
        assert compilations(lambda samples=samples: model.generate(PROMPT, samples=samples, seed=samples)) == 0


def test_texts_and_pictures_are_seen_while_they_are_drawn(model: Model, pictures, monkeypatch: pytest.MonkeyPatch):
    """Each text is the beginning of the next one, and of the sample; a picture grows by rows of codes."""
    monkeypatch.setattr("rac3.answering.PARTIAL_EVERY", 1)
    seen: list[list[tuple]] = []
    prompt = Prompt("caption", image=pictures[0], samples=2, retrieve=0)
    answer = model.answer(prompt, on_partial=seen.append)
    assert len(seen) > 1
    assert answer.to_json() == model.answer(prompt).to_json()
    last = []
    for number in range(2):
        texts = [samples[number][0] for samples in seen if samples[number]]
        assert all(after.startswith(before) for before, after in pairwise(texts))
        last.append(texts[-1])
    assert all(any(text.startswith(part) for text in answer.texts) for part in last)
    assert len(set(last)) == 2
    ids = np.array(model.tokenizer.encode("a fox é"), np.int32)
    assert model._so_far(Segment(False, ids[:-1])) == "a fox "  # not half a letter

    seen.clear()
    answer = model.answer(Prompt("draw", PROMPT, samples=1, retrieve=0), on_partial=seen.append)
    black = [(np.asarray(samples[0][0]) == 0).all((1, 2)) for samples in seen]
    shown = [8 * (ids // 5) for ids in range(1, 25)]  # of 40 rows of pixels, 8 for each row of 5 codes
    assert [rows.tolist() for rows in black] == [[row >= first for row in range(40)] for first in shown]
    top, whole = (np.asarray(picture)[:24].astype(int) for picture in (seen[-1][0][0], answer.images[0]))
    assert np.abs(top - whole).mean() < np.abs(top - whole[::-1]).mean()


def test_what_is_masked_does_not_retrieve(model: Model, pictures):
    """Nor does what stands there change the query, as the thing to be drawn would. A text retrieves by itself."""
    mask = np.zeros((40, 40), bool)
    mask[8:32, 8:32] = True
    other = np.where(mask[..., None], pictures[3], pictures[0])
    queries = [Prompt("infill_image", image=picture, mask=mask).query for picture in (pictures[0], other)]
    np.testing.assert_array_equal(*queries)
    np.testing.assert_array_equal(queries[0][~mask], pictures[0][~mask])
    wanted = [channel[~mask].sum() / (1600 - 576) for channel in np.moveaxis(pictures[0].astype(int), -1, 0)]
    np.testing.assert_allclose(queries[0][20, 20], wanted, atol=0.51)
    assert Prompt("infill_image", "an owl", pictures[0], mask).query == "an owl"
    whole = Prompt("infill_image", image=pictures[0], mask=np.ones((40, 40), bool)).query
    np.testing.assert_array_equal(whole, pictures[0])


@pytest.mark.parametrize(("with_image", "ensemble"), [(False, ""), (True, ""), (False, "mean")])
def test_a_masked_text_is_filled_in(model: Model, calls: list[Call], pictures, with_image: bool, ensemble: Ensemble):
    """Of an unknown number of ids, several are tried; the answer is the texts that are most probable as a whole, as
    `score` has them with the same documents: alone, given the image, or averaged over two prompts of an ensemble."""
    image, k = pictures[0] if with_image else None, 4 if ensemble else 1
    answer = model.infill_text("a <mask> on water", image=image, samples=2, retrieve=k, ensemble=ensemble)
    lengths = [run.count for run in calls[0].draws]
    assert lengths == [1, 2, 3, 4, 5, 6, 7, 8, 12, 16]
    every = [sample for samples in calls[0].out for sample in samples]
    filled = [model.tokenizer.decode((sample.runs[0] - FIRST_TEXT).tolist()).strip() for sample in every]
    texts = [f"a {text} on water" for text in filled]
    assert answer.documents == [found.document for found in model.retrieve("a on water", k=k)]
    rest = _document("x", image).segments[-1:] if with_image else ()
    given: dict[str, Any] = {"documents": answer.documents, "infill": with_image, "retrieve": 0, "ensemble": ensemble}
    passages = [Passage(Document("", (Text(text), *rest), {}), **given) for text in texts]
    wanted = [found.log_probs.sum() for found in model.scores(passages) if not isinstance(found, InputError)]
    order = np.argsort(-np.array(wanted), kind="stable")[:2]
    assert answer.texts == [texts[number] for number in order]
    assert answer.scores == pytest.approx([wanted[number] for number in order], rel=5e-6)
    assert answer.score == "log p of the text"


def test_lengths_that_do_not_fit_are_not_tried(model: Model, calls: list[Call], monkeypatch: pytest.MonkeyPatch):
    """Of a text that has five ids fewer than the longest in training, and of one that is longer by itself."""
    known = " on water"
    most = len(model.tokenizer.encode(known)) + 5
    form = replace(model.form, max_segment_tokens=most)
    monkeypatch.setattr(Model, "form", property(lambda self: form))
    answer = model.infill_text("<mask>" + known, samples=1, retrieve=0)
    assert [run.count for run in calls[0].draws] == [1, 2, 3, 4, 5]
    assert answer.texts[0].endswith(known)
    with pytest.raises(InputError, match=f"exceeds the {most} that the model was trained for"):
        model.infill_text("<mask>" + 9 * known, retrieve=0)


@pytest.mark.parametrize("text", ["<mask>", "<mask> <mask>", "a <mask>"])
def test_what_fills_the_end_of_a_text_is_ranked_by_its_own_perplexity(model: Model, calls: list[Call], text: str):
    answer = model.infill_text(text, samples=2, retrieve=0)
    means = sorted((sample.mean_log_prob for samples in calls[0].out for sample in samples), reverse=True)
    assert answer.score == "log p per id"
    assert answer.scores == pytest.approx(means[:2])


@pytest.mark.parametrize(
    ("task", "without"),
    [("draw", None), ("draw", "text"), ("draw", "documents"), ("caption", "documents"), ("infill_text", None)],
)
def test_the_best_of_an_ensemble_are_those_of_its_prompts_alone(
    model: Model, calls: list[Call], pictures, task: Task, without: Without | None
):
    """Two documents to a prompt, as in training: of four, two prompts, and the samples that each has alone."""
    documents = [
        _document(text, picture) for text, picture in zip(("fox", "owl", "cat", "elk"), pictures, strict=False)
    ]
    given: dict[str, Any] = {
        "draw": {"text": PROMPT},
        "caption": {"image": pictures[4]},
        "infill_text": {"text": "a <mask> on water"},
    }[task]
    sampling = Sampling(guidance=Guidance(2.0, without) if without else Guidance())
    prompt = Prompt(
        task, **given, documents=documents, retrieve=0, ensemble="best", samples=3, seed=5, sampling=sampling
    )
    together = model.answer(prompt)
    apart = [model.answer(replace(prompt, documents=two, ensemble="")) for two in (documents[:2], documents[2:])]
    best, *others = [
        Counter((*(prompt.ids.tobytes() for prompt in request.prompts), str(request.grammar)) for request in asked)
        for asked in ([each for call in some for each in call.requests] for some in (calls[:1], calls[1:]))
    ]
    assert [best] == others
    pairs = [pair for each in apart for pair in zip(each.scores, each.samples, strict=True)]
    wanted = sorted(pairs, key=lambda pair: -pair[0])[:3]
    assert together.scores == pytest.approx([score for score, _ in wanted], abs=1e-5)
    for (part,), (_, (other,)) in zip(together.samples, wanted, strict=True):
        if isinstance(part, str):
            assert part == other
        else:
            assert np.abs(np.asarray(part).astype(int) - np.asarray(other)).max() <= 1
    assert [each.key for each in together.documents] == ["fox", "owl", "cat", "elk"]
    assert together.notes == []


def test_a_document_is_continued_in_the_order_that_is_asked_for(model: Model, calls: list[Call], pictures):
    answer = model.resume(["text", "image"], image=pictures[0], samples=1, retrieve=0)
    (sample,) = answer.samples
    text, image = sample
    assert isinstance(text, str)
    codes = (calls[0].out[0][0].runs[1] - FIRST_CODE)[None]
    assert np.abs(np.asarray(image).astype(int) - model.images.decode(codes)[0]).max() <= 1
    assert text == model.tokenizer.decode((calls[0].out[0][0].runs[0] - FIRST_TEXT).tolist())


def test_samples_that_end_before_their_text_are_counted(model: Model, pictures):
    """As of a model whose documents end with their image; the first sample here has one word."""
    _, finish = model._continue(Prompt("continue", image=pictures[0], follow=("text",)), Context())
    word, none = np.array([FIRST_TEXT + 1]), np.array([], np.int64)
    samples = [Sample([word], [np.array([-1.0, -1.0])]), *[Sample([none], [np.array([-2.0])])] * 2]
    ranked = finish(samples)
    assert [len(sample) for sample in ranked.samples] == [1, 0, 0]
    assert ranked.notes == ("2 of 3 samples lack a text that was to follow: the model wrote none there",)
    assert finish(samples[:1]).notes == ()


def test_an_interleaved_document_is_continued(model: Model, calls: list[Call], pictures):
    """Texts and images in any order, each image with the text before it as its alt text (see `continuation`)."""
    first, second = map(pixels_as_image, pictures[:2])
    codes = [(FIRST_CODE + each).tolist() for each in model.images.encode(pictures[:2])]
    fox, owl = ((FIRST_TEXT + np.array(model.tokenizer.encode(text))).tolist() for text in ("a fox", "an owl"))
    for segments, follow, wanted in (
        ((Text("a fox"), first, Text("an owl")), ["image"], [2, *fox, 3, *codes[0], 4, 2, *owl, 3]),
        ((first, Text("an owl"), second), ["text"], [2, 3, *codes[0], 4, 2, *owl, 3, *codes[1], 4]),
        ((first, second, Text("a fox")), ["text"], [2, 3, *codes[0], 4, 2, 3, *codes[1], 4, *fox]),
    ):
        document = Document("mine", segments, {})
        answer = model.resume(follow, document=document, samples=1, retrieve=1)
        (found,) = model.retrieve(document.text, k=1)
        assert calls[-1].prompts == [[1, *spelled(found.tokens), *wanted]]
        assert answer.prompt == {"text": document.text, "follow": follow}
    (found,) = model.resume(["text"], document=Document("mine", (second,), {}), samples=1, retrieve=1).documents
    assert found == model.retrieve(image=pictures[1], k=1)[0].document
    with pytest.raises(InputError, match=r"exceeds the \d+ that the model was trained for"):
        model.resume(["text"], document=Document("mine", (Text("a fox " * 100),), {}))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    return watch_scoring(monkeypatch)


def test_labels_are_scored_after_one_demonstration_of_each_a_run(model: Model, told: Told, pictures):
    labels = {"dax": [pictures[1], pictures[2]], "blick": [pictures[3], pictures[4]]}
    probs = model.classify(pictures[0], labels).probabilities
    # Parts 0 and 1 are the labels of the first run, 2 and 3 those of the second: each time the first is e times better.
    assert probs == pytest.approx({"dax": 1 / (1 + np.exp(-1)), "blick": 1 / (1 + np.exp(1))})
    assert [*probs] == ["dax", "blick"]
    target = FIRST_CODE + model.images.encode([pictures[0]])[0]
    for run in (0, 1):
        shown = [model.tokenize([_document(label, pictures_of[run])])[0] for label, pictures_of in labels.items()]
        before = [1, *(id for item in (shown[::-1] if run else shown) for id in spelled(item))]
        for number, label in enumerate(labels):
            part = told.parts[2 * run + number]
            ids = (FIRST_TEXT + np.array(model.tokenizer.encode(label))).tolist()
            whole = [*before, 2, FIRST_MASK, 3, *target, 4, FIRST_MASK, *ids, 5]
            assert part.group.tokens.tolist() == whole
            assert part.group.targets[part.start : part.end].tolist() == [*ids, 5]
    assert len(model.classify(pictures[0], labels, shots=1).probabilities) == 2
    assert len(told.parts) == 2
    model.classify(pictures[0], labels, shots=1, scored="image")
    assert told.parts[1].group.targets[told.parts[1].start : told.parts[1].end].tolist() == target.tolist()
    model.classify(pictures[0], labels, shots=0)
    assert told.parts[0].group.tokens.tolist()[:4] == [1, 2, FIRST_MASK, 3]


def _document(label: str, pixels: np.ndarray) -> Document:
    return Document(label, (Text(label), pixels_as_image(pixels)), {})


def pixels_as_image(pixels: np.ndarray) -> Image:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "png")
    return Image(file.getvalue())


@pytest.mark.parametrize(
    ("counts", "shots", "said"),
    [
        ((1, 2), None, "labels have 1 to 2 demonstrations"),
        ((1, 1), 2, "shots=2 is not among the 0 to 1 demonstrations"),
        ((1,), None, "1 labels leave no choice"),
        ((), None, "0 labels leave no choice"),
    ],
)
def test_demonstrations_that_do_not_match_are_refused(model: Model, pictures, counts, shots, said: str):
    labels = {f"label {number}": pictures[:count] for number, count in enumerate(counts)}
    with pytest.raises(InputError, match=said):
        model.classify(pictures[0], labels, shots)


def test_a_segment_is_scored_after_what_the_rest_retrieves(model: Model, told: Told):
    (item,) = model.documents("test").many([0])
    text, image = item.document.text, item.document.images[0].pixels()
    for segment, found in ((1, model.retrieve(text, k=2)), (0, model.retrieve(image=image, k=2))):
        scored = model.score(item.document, segment, retrieve=2)
        assert len(scored.log_probs) == len(item.ids[segment])
        assert [each.key for each in scored.documents] == [each.document.key for each in found]
        assert scored.similarities == [each.score for each in found]
        assert scored.dropped == []
        before = [1, *(id for each in found for id in spelled(each.tokens))]
        (part,) = told.parts
        assert part.group.tokens.tolist() == [*before, *spelled(item)][:-1]
        first = FIRST_CODE if segment else FIRST_TEXT
        assert part.group.targets[part.start : part.end].tolist() == (first + item.ids[segment]).tolist()
    with pytest.raises(InputError, match="segment 2 is not among the document's 2"):
        model.score(item.document, 2)
    with pytest.raises(InputError, match="retrieve=1, but the document has nothing besides the segment"):
        model.score(Document("k", (Text("a fox"),), {}), retrieve=1)
    given = [each.document for each in model.retrieve(text, k=6)]
    scored = model.score(item.document, documents=given)
    assert [each.key for each in scored.documents + scored.dropped] == [each.key for each in given]
    assert scored.notes[0].startswith(f"{len(scored.dropped)} of 6 documents do not fit")


def test_passages_are_scored_in_one_batch(model: Model, told: Told, pictures):
    """Part i has the log probability -i, spread over its ids; an ensemble of two has two parts, and their mean."""
    fox, damaged = _document("a fox on water", pictures[0]), Document("mine", (Image(b"no picture"),), {})
    four = [_document(text, picture) for text, picture in zip(("fox", "owl", "cat", "elk"), pictures, strict=False)]
    passages = [
        Passage(fox),
        Passage(damaged),
        Passage(fox, 0, 1, 3, infill=True),
        Passage(fox, 1, documents=four, ensemble="mean"),
        Passage(fox, 0, 2, 9),
    ]
    whole, refused, part, image, outside = model.scores(passages)
    ids = (FIRST_TEXT + np.array(model.tokenizer.encode("a fox on water"))).tolist()
    codes = (FIRST_CODE + model.images.encode(pictures[:1])[0]).tolist()
    assert told.targets == [ids, [*ids[1:3], 5], codes, codes]
    np.testing.assert_allclose(whole.log_probs, np.zeros(len(ids)))
    np.testing.assert_allclose(part.log_probs, np.full(3, -1 / 3))
    each = np.log((np.exp(-2 / len(codes)) + np.exp(-3 / len(codes))) / 2)
    np.testing.assert_allclose(image.log_probs, np.full(len(codes), each))
    assert "document 'mine' has an image that cannot be read" in str(refused)
    assert f"ids 2 to 9 are not among the {len(ids)} of the segment" in str(outside)
    alone = model.score(fox, start=1, end=3)
    assert (len(alone.log_probs), told.targets) == (2, [ids[1:3]])


def test_an_answer_shows_itself_and_is_plain_data(model: Model, calls: list[Call], pictures, tmp_path: Path):
    answer = model.generate(PROMPT, retrieve=1, samples=2)
    hostile = replace(answer, documents=[Document("k", (Text("<script>"),), {})], notes=["a <b> note"])
    page = hostile._repr_html_()
    assert "<script>" not in page
    assert "<b> note" not in page
    assert page.count("data:image/png") == 2
    names = answer.save(tmp_path, "fox")
    record = json.loads(answer.to_json(names))
    assert [sample[0]["image"] for sample in record["samples"]] == names == ["fox-0.png", "fox-1.png"]
    for name, image in zip(names, answer.images, strict=True):
        np.testing.assert_array_equal(np.asarray(PIL.Image.open(tmp_path / name)), np.asarray(image))
    assert record["settings"]["sampling"]["temperature"] == model.experiment.evaluation.image_sampling.temperature


def test_pictures_and_masks_come_in_any_form(tmp_path: Path, pictures):
    PIL.Image.fromarray(pictures[0]).save(tmp_path / "a.png")
    for picture in (pictures[0], PIL.Image.fromarray(pictures[0]), tmp_path / "a.png", str(tmp_path / "a.png")):
        np.testing.assert_array_equal(pixels_of(picture), pictures[0])
    wanted = np.zeros((40, 40), bool)
    wanted[2:5, 3:7] = True
    grey = PIL.Image.fromarray(np.where(wanted, 255, 0).astype(np.uint8))
    for mask in (wanted, wanted.astype(np.uint8) * 255, grey, (3, 2, 7, 5)):
        np.testing.assert_array_equal(mask_of(mask, pictures[0]), wanted)
    half = np.zeros((20, 20), bool)
    half[1:3, 1:4] = True  # rows 2 to 4 and columns 3 to 6, of which any pixel counts
    np.testing.assert_array_equal(scaled_mask(wanted, 20), half)
    np.testing.assert_array_equal(scaled_mask(half, 40), half.repeat(2, 0).repeat(2, 1))


def test_documents_are_framed_as_those_of_the_memory(
    model: Model, calls: list[Call], told: Told, pictures, monkeypatch: pytest.MonkeyPatch
):
    """Two pictures side by side, 40 x 80, have 20 white rows above and below."""
    wide = np.concatenate(pictures[:2], axis=1)
    padded = np.full((80, 80, 3), 255, np.uint8)
    padded[20:60] = wide
    codes, unframed = ((FIRST_CODE + each).tolist() for each in model.images.encode([padded, wide]))
    assert codes != unframed
    for name in ("tokenizer", "images", "engine", "scorer", "form"):  # of this run, which has the other framing
        monkeypatch.setattr(Model, name, getattr(model, name))
    monkeypatch.setattr(model, "experiment", replace(model.experiment, framing="pad-white"))
    document = Document("mine", (pixels_as_image(wide),), {})
    model.resume(["text"], document=document, documents=[document], retrieve=0, samples=1)
    assert calls[-1].prompts == [[1, 2, 3, *codes, 4, 1, 2, 3, *codes, 4]]
    model.score(document, 0)
    assert told.targets == [codes]


@pytest.mark.parametrize("shape", [(4, 10), (10, 4), (5, 8), (6, 6)])
@pytest.mark.parametrize("framing", ["pad-white", "pad-border", "crop"])
def test_a_picture_is_infilled_in_its_own_frame(
    framing: str, shape: tuple[int, int], experiment: Experiment, store: Workdir
):
    """What is given is padded for the models, and what comes back has its size and its pixels."""
    random = np.random.default_rng(0)
    image, mask = random.integers(0, 255, (*shape, 3), dtype=np.uint8), random.random(shape) < 0.5
    framed_model = Model(replace(experiment, framing=framing), store)
    asked = Prompt("infill_image", image=image, mask=mask)
    prompt = framed_model._framed(asked)
    side = max(shape)
    assert prompt.image.shape == ((*shape, 3) if framing == "crop" else (side, side, 3))
    assert prompt.mask.sum() == mask.sum()  # nothing is drawn outside
    np.testing.assert_array_equal(prompt.image[prompt.mask], image[mask])
    answer = Answer("infill_image", {}, [(PIL.Image.fromarray(prompt.image),)], [0.0], "", [], [], [], [], {})
    np.testing.assert_array_equal(np.asarray(_unframed(answer, asked, prompt).images[0]), image)
