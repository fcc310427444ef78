"""`rac3 generate`: what it passes to the run, what it writes, and what it says."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import PIL.Image
import pytest
import tiny_config
from decoding_spy import Call, watch_decoding
from replaced import with_members
from scoring_spy import Told, watch_scoring
from tiny_prompts import FIRST_CODE, FIRST_TEXT, caption_prompt, image_prompt

import rac3.retrieval.open_memory
from rac3.answering import Model
from rac3.artifacts.workdir import Workdir
from rac3.cli import parse
from rac3.config import InputError
from rac3.documents.document import Document, Text
from rac3.execution.progress import Progress
from rac3.experiment import Experiment
from rac3.generation.copying import Copying
from rac3.generation.engine import Engine
from rac3.generation.request import Draw
from rac3.generation.sampling import Guidance, Sampling
from rac3.generation.tasks.score import Scorer
from rac3.retrieval.exact import Exact
from rac3.retrieval.fixed import Fixed
from rac3.run import Found
from rac3.stages.generate import GenerateOptions, generate

PROMPT = "a fox on water in night"


@pytest.fixture(scope="module")
def run(experiment: Experiment, store: Workdir) -> Model:
    return Model(experiment, store)


@pytest.fixture(scope="module")
def pixels(run: Model) -> np.ndarray:
    """A picture that the memory does not hold."""
    return run.documents("test")[0].document.images[0].pixels()


@pytest.fixture
def picture(pixels: np.ndarray, tmp_path: Path) -> Path:
    PIL.Image.fromarray(pixels).save(tmp_path / "mine.png")
    return tmp_path / "mine.png"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    return watch_decoding(monkeypatch, real=False)


def lines_of(found: Sequence[Found]) -> list[str]:
    return [f"retrieved {item.document.key} ({item.score:.2f}): {item.document.text}" for item in found]


def same_pictures(a: Sequence, b: Sequence) -> bool:
    pairs = zip(a, b, strict=False)
    return len(a) == len(b) and all(np.abs(np.asarray(x).astype(int) - np.asarray(y)).max() <= 1 for x, y in pairs)


def answer_in(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


def test_pictures_are_written_in_their_order(run: Model, calls: list[Call], tmp_path: Path):
    folder = tmp_path / "new" / "folder"
    options = GenerateOptions(prompt=" A fox, 2! ", samples=5, retrieve=1, seed=7, out=str(folder))
    said = generate(run, options).splitlines()
    found = run.retrieve("A fox, 2!", k=1)
    files = [folder / f"a-fox--2--{rank}.png" for rank in range(5)]
    answer = run.generate("A fox, 2!", retrieve=1, samples=5, seed=7)
    drawn = [f"draw {rank} (CLIP score {answer.scores[rank]:.3f}): {path}" for rank, path in enumerate(files)]
    assert said == [*lines_of(found), *drawn]
    assert calls[0].prompts == [image_prompt([found[0].tokens], run.tokenizer.encode("A fox, 2!"))]
    pictures = [np.asarray(PIL.Image.open(path)) for path in files]
    assert same_pictures(pictures, answer.images)
    assert not same_pictures(pictures, run.generate("A fox, 2!", retrieve=1, samples=5, seed=0).images)
    record = answer_in(folder)
    assert record["samples"] == [[{"image": path.name}] for path in files]
    assert record["scores"] == sorted(record["scores"], reverse=True) == [round(score, 6) for score in answer.scores]
    assert [each["key"] for each in record["documents"]] == [found[0].document.key]
    assert (record["task"], record["settings"]["seed"], record["settings"]["retrieve"]) == ("draw", 7, 1)


@pytest.mark.slow
def test_a_checkpoint_draws_over_a_mesh_what_it_draws_on_one_device(
    rac3: Callable[..., int],
    finished_workdir: tuple[Path, Path],
    run: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    calls, engines = watch_decoding(monkeypatch), []
    init = Engine.__init__
    monkeypatch.setattr(Engine, "__init__", lambda self, *how: engines.append(self) or init(self, *how))
    mesh = ["--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2"]
    command = ["generate", tiny_config.__file__, "--workdir", str(finished_workdir[1]), "--out", str(tmp_path)]
    assert rac3(*command, "--prompt", PROMPT, *mesh) == 0
    (engine,) = engines
    assert engine.shards == 4
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(engine.weights)} == {8}
    params = jax.device_get(run.params)
    one = Engine(run.model, params, run.vocabulary, None, run.form.image_width, engine.word_starts)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(one.weights)} == {1}
    (sharded,) = calls
    [*one.run(sharded.requests, sharded.samplings, sharded.seeds)]
    assert [len(samples) for samples in sharded.out] == [4]
    for drawn, alone in zip(sharded.out[0], calls[1].out[0], strict=True):
        np.testing.assert_array_equal(drawn.runs[0], alone.runs[0])


@pytest.mark.parametrize(("named", "asked", "k"), [(None, None, 2), (None, 0, 0), (3, None, 3), (3, 1, 1)])
def test_how_many_documents_are_in_context(
    run: Model, calls: list[Call], picture: Path, tmp_path: Path, named: int | None, asked: int | None, k: int
):
    """Two, or all that are named by hand, unless a number is given."""
    experiment = run.experiment
    if named:
        experiment = replace(experiment, retriever=Fixed(tuple(f"train/{number:06d}" for number in range(named))))
    # The memory stays, which no stage has indexed for `Fixed`.
    other = with_members(run, experiment, memory=lambda _=None: run.memory())
    for options in (
        GenerateOptions(prompt=PROMPT, samples=1, retrieve=asked, out=str(tmp_path)),
        GenerateOptions(image=str(picture), samples=1, retrieve=asked, out=str(tmp_path)),
    ):
        assert generate(other, options).count("retrieved ") == k
        assert calls.pop().prompts[0].count(1) == k + 1  # <eod> before all, and after each


def test_documents_that_do_not_fit_are_named(run: Model, calls: list[Call], picture: Path, pixels, tmp_path: Path):
    """Six of them exceed the context."""
    for options, found, result in (
        (
            GenerateOptions(prompt=PROMPT, retrieve=6, out=str(tmp_path)),
            run.retrieve(PROMPT, k=6),
            run.generate(PROMPT, retrieve=6),
        ),
        (
            GenerateOptions(image=str(picture), retrieve=6, out=str(tmp_path)),
            run.retrieve(image=pixels, k=6),
            run.caption(pixels, retrieve=6),
        ),
    ):
        kept = len(result.documents)
        assert 0 < kept < 6
        said = generate(run, options).splitlines()
        assert said[:kept] == lines_of(found[:kept])
        lost = [f"does not fit into the context: {item.document.key}" for item in found[kept:]]
        assert said[kept:6] == lost
    assert [call.prompts for call in calls[2:]] == [call.prompts for call in calls[:2]]


def test_a_prompt_is_searched_for_once(
    run: Model, calls: list[Call], picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    searched = []
    search = rac3.retrieval.open_memory.search_memory

    def counted(indexes, memory, queries, k):
        searched.append(queries.texts)
        return search(indexes, memory, queries, k)

    monkeypatch.setattr(rac3.retrieval.open_memory, "search_memory", counted)
    generate(run, GenerateOptions(prompt=PROMPT, out=str(tmp_path)))
    assert searched == [[PROMPT]]
    generate(run, GenerateOptions(image=str(picture), out=str(tmp_path)))
    assert searched == [[PROMPT], [""]]
    generate(run, GenerateOptions(prompt=PROMPT, retrieve=0, out=str(tmp_path)))
    assert len(searched) == 2
    assert len(calls) == 3


def test_an_image_of_ones_own_is_captioned(
    rac3: Callable[..., int],
    workdir: Path,
    run: Model,
    pixels: np.ndarray,
    calls: list[Call],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    """`rac3 generate --image FILE`, of a picture larger than the model's."""
    large = pixels.repeat(2, 0).repeat(2, 1)
    path = tmp_path / "mine.png"
    PIL.Image.fromarray(large).save(path)
    command = ["generate", tiny_config.__file__, "--workdir", str(workdir), "--image", str(path), "--samples", "3"]
    assert rac3(*command, "--out", str(tmp_path / "out")) == 0
    lines = capsys.readouterr().out.splitlines()
    found = run.retrieve(image=large, k=2)
    assert lines[:2] == lines_of(found)
    ((prompt, samples, means),) = calls[0].samples()
    assert prompt == caption_prompt([item.tokens for item in found], run.images.encode([large])[0])
    best = sorted(range(3), key=lambda number: -means[number])
    texts = [run.tokenizer.decode([id - FIRST_TEXT for id in samples[number]]) for number in best]
    assert any(not text.isprintable() for text in texts)  # a control character that is drawn reaches no terminal
    shown = ["".join(c if c.isprintable() else "\ufffd" for c in text) for text in texts]
    assert lines[2:] == [
        f"caption {rank} (log p per id {means[number]:.3f}): {text}"
        for rank, (number, text) in enumerate(zip(best, shown, strict=True))
    ]
    assert [sample[0]["text"] for sample in answer_in(tmp_path / "out")["samples"]] == texts


def test_the_options_of_sampling_reach_it_and_leave_every_artifact(
    rac3: Callable[..., int],
    workdir: Path,
    run: Model,
    pixels: np.ndarray,
    picture: Path,
    calls: list[Call],
    capsys: pytest.CaptureFixture[str],
):
    """`--seed`, `--temperature` and `--top-p` are of the drawing alone, not of the model or of its evaluation."""
    made = sorted(workdir.glob("*/*/manifest.json"))
    common = ["generate", tiny_config.__file__, "--workdir", str(workdir), "--samples", "3", "--seed", "7"]
    sampling = ["--temperature", "0.5", "--top-p", "0.9"]
    assert rac3(*common, *sampling, "--prompt", PROMPT) == 0
    assert rac3(*common, *sampling, "--image", str(picture)) == 0
    settings = run.experiment.evaluation
    configured = settings.image_sampling, settings.caption_sampling
    assert [call.sampling for call in calls] == [replace(each, temperature=0.5, top_p=0.9) for each in configured]
    assert sorted(workdir.glob("*/*/manifest.json")) == made
    paths = re.findall(r"^draw \d .+: (.+)$", capsys.readouterr().out, re.M)
    assert [Path(path).parent for path in paths] == [workdir / "generated"] * 3
    run.generate(PROMPT, samples=3, seed=7)
    run.caption(pixels, samples=3, seed=7)
    run.generate(PROMPT, samples=3, seed=0)
    drawn, captioned, drawn_again, captioned_again, otherwise = calls
    assert (drawn.keys, drawn.prompts) == (drawn_again.keys, drawn_again.prompts)
    assert (captioned.keys, captioned.prompts) == (captioned_again.keys, captioned_again.prompts)
    assert not set(drawn.keys) & set(otherwise.keys)
    config = tiny_config.get_config()
    given = ["--prompt", PROMPT, "--seed", "7", *sampling]
    assert parse("generate", config, given) == (
        config,
        GenerateOptions(prompt=PROMPT, seed=7, temperature=0.5, top_p=0.9),
    )


def test_sampling_that_is_not_given_is_that_of_the_evaluation(run: Model, calls: list[Call], picture: Path, tmp_path):
    settings = replace(
        run.experiment.evaluation, image_sampling=Sampling(0.3, 0.8), caption_sampling=Sampling(0.4, 0.7, 9)
    )
    other = run.variant(replace(run.experiment, evaluation=settings), run.trained)
    for given, image, caption in (
        ({}, Sampling(0.3, 0.8), Sampling(0.4, 0.7, 9)),
        ({"temperature": 0.0}, Sampling(0.0, 0.8), Sampling(0.0, 0.7, 9)),
        ({"top_p": 0.5}, Sampling(0.3, 0.5), Sampling(0.4, 0.5, 9)),
        ({"top_k": 3}, Sampling(0.3, 0.8, 3), Sampling(0.4, 0.7, 3)),
        ({"copying": 0.5}, *(replace(s, copying=Copying(0.5)) for s in (Sampling(0.3, 0.8), Sampling(0.4, 0.7, 9)))),
    ):
        generate(other, GenerateOptions(prompt=PROMPT, samples=1, out=str(tmp_path), **given))
        generate(other, GenerateOptions(image=str(picture), samples=1, out=str(tmp_path), **given))
        assert [call.sampling for call in calls[-2:]] == [image, caption]
    guided = GenerateOptions(prompt=PROMPT, samples=1, out=str(tmp_path), guidance=2.0, guidance_without="documents")
    generate(other, guided)
    assert calls[-1].sampling == Sampling(0.3, 0.8, guidance=Guidance(2.0, "documents"))
    with_documents, alone = (prompt.ids.tolist() for prompt in calls[-1].requests[0].prompts)
    assert alone == image_prompt([], run.tokenizer.encode(PROMPT))
    assert with_documents[-len(alone) + 1 :] == alone[1:]
    assert len(with_documents) > len(alone)


@pytest.mark.parametrize(
    "fields",
    [{"retrieve": -1}, {"samples": 0}, {"temperature": -0.5}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}],
)
def test_numbers_are_checked(fields: dict[str, float]):
    ((name, value),) = fields.items()
    with pytest.raises(InputError, match=f"{name}={value}"):
        GenerateOptions(prompt="a fox", **fields)
    assert GenerateOptions(retrieve=0, samples=1).retrieve == 0


def test_a_caption_without_room_for_an_image_is_refused_and_nothing_is_written(run: Model, tmp_path: Path):
    options = GenerateOptions(prompt="a fox and an owl " * 40, out=str(tmp_path))
    with pytest.raises(InputError, match=r"exceed the 192 positions|exceeds the \d+ that the model was trained for"):
        generate(run, options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "the prompt has no text and no image"),
        ({"prompt": "a fox", "image": "mine.png"}, "say what to do"),
        ({"task": "caption", "prompt": "a fox"}, "the task caption needs an image"),
        ({"task": "infill_image", "image": "mine.png"}, "the task infill_image needs a mask"),
        ({"task": "infill_image", "image": "mine.png", "mask": "5,5,5,9"}, "the rectangle 5,5,5,9 is empty or not"),
        ({"task": "infill_image", "image": "mine.png", "mask": "0,0,41,9"}, "not inside the image of 40 x 40 pixels"),
        ({"task": "infill_image", "image": "mine.png", "mask": "black.png"}, "the mask covers no pixel"),
        ({"task": "infill_image", "image": "mine.png", "mask": "small.png"}, "the mask has 20 x 20 pixels, but"),
        ({"task": "edit", "image": "mine.png", "mask": "0,0,9,9"}, "an edit follows documents, and none is given"),
        ({"task": "controlled", "prompt": "a fox"}, "follows demonstrations, and none is given"),
        ({"task": "infill_text", "prompt": "a fox"}, "0 masks"),
        ({"task": "continue", "prompt": "a fox"}, "nothing is to follow"),
        ({"image": "none.png"}, "does not exist; give a png, jpeg or webp file"),
        ({"image": "text.png"}, "cannot be read"),
        ({"prompt": "a fox", "documents": ("none.png=a fox",)}, "does not exist; give a png, jpeg or webp file"),
        ({"prompt": "a fox", "labels": ("mine.png=fox",)}, "the task draw has no use for labels"),
        ({"task": "classify", "labels": ("mine.png=fox",)}, "the task classify needs an image"),
        ({"task": "classify", "image": "mine.png", "labels": ("mine.png=fox",)}, "1 labels leave no choice"),
        ({"task": "classify", "image": "mine.png", "labels": ("mine.png",)}, "--labels 'mine.png' is not FILE=LABEL"),
        ({"task": "classify", "image": "mine.png", "prompt": "a fox"}, "the task classify has no use for prompt"),
        ({"task": "classify", "image": "mine.png", "retrieve": 1}, "retrieve=1: the task classify retrieves nothing"),
        ({"task": "classify", "image": "none.png", "labels": ("mine.png=a", "mine.png=b")}, "does not exist"),
        ({"task": "score", "image": "mine.png"}, "there is no text to score"),
        ({"task": "score", "prompt": "a fox", "scored": "image"}, "there is no image to score"),
        ({"task": "score", "prompt": "a fox", "scored": "apart"}, "scored='apart' is for the task classify"),
        ({"task": "score", "prompt": "a fox", "mask": "0,0,9,9"}, "the task score has no use for mask"),
        ({"task": "score", "prompt": "a fox", "temperature": 0.5, "seed": 1}, "no use for seed, temperature"),
        ({"task": "classify", "image": "mine.png", "samples": 2}, "the task classify has no use for samples"),
        ({"task": "score", "prompt": "a fox", "retrieve": 1}, "nothing besides the segment to retrieve by"),
    ],
)
def test_what_cannot_be_answered_is_refused(
    run: Model, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], said: str
):
    monkeypatch.chdir(tmp_path)
    for name, size in (("black.png", 40), ("small.png", 20)):
        PIL.Image.new("L", (size, size), 0).save(tmp_path / name)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(InputError, match=re.escape(said)):
        generate(run, GenerateOptions(out=str(tmp_path / "out"), **fields))
    assert not (tmp_path / "out").exists()


def test_only_what_is_masked_changes(run: Model, calls: list[Call], pixels: np.ndarray, picture: Path, tmp_path: Path):
    """Of 5 x 5 codes of 8 x 8 pixels, the mask touches the four around (16, 24)."""
    options = GenerateOptions(
        task="infill_image", image=str(picture), mask="12,20,20,28", samples=3, retrieve=0, out=str(tmp_path / "out")
    )
    generate(run, options)
    (codes,) = run.images.encode([pixels])
    request = calls[0].requests[0]
    drawn = [run for run in request.grammar if isinstance(run, Draw)]
    assert [(run.offset, run.count) for run in drawn] == [(12, 2), (17, 2)]
    kept = [int(each) - FIRST_CODE for each in request.prompts[0].ids if FIRST_CODE <= each < FIRST_CODE + 16]
    assert kept == np.delete(codes, range(11, 18)).tolist()  # one span is masked, of which three codes are given
    inside = np.zeros((40, 40), bool)
    inside[20:28, 12:20] = True
    paths = [tmp_path / "out" / sample[0]["image"] for sample in answer_in(tmp_path / "out")["samples"]]
    for path, sample in zip(paths, run.infill(pixels, inside, samples=3, retrieve=0).images, strict=True):
        filled = np.asarray(PIL.Image.open(path))
        np.testing.assert_array_equal(filled[~inside], pixels[~inside])
        assert (filled[inside] != pixels[inside]).any()
        np.testing.assert_array_equal(filled, np.asarray(sample))
    order = np.argsort([-sample.mean_log_prob for sample in calls[0].out[0]])
    whole = codes.copy()
    whole[[11, 12, 16, 17]] = np.concatenate(calls[0].out[0][order[0]].runs) - FIRST_CODE
    best = np.asarray(PIL.Image.open(paths[0])).astype(int)
    assert np.abs(best - run.images.decode(whole[None])[0])[inside].max() <= 1


def test_a_picture_that_is_not_square_keeps_its_sides(run: Model, calls: list[Call], pixels: np.ndarray):
    """The model sees the middle square, at its own size; the answer has the picture's."""
    wide = np.concatenate([pixels[:, :10], pixels, pixels[:, :6]], 1).repeat(2, 0).repeat(2, 1)  # 80 x 112
    mask = np.zeros(wide.shape[:2], bool)
    mask[30:50, 40:60] = True
    answer = run.infill(wide, mask, samples=1, retrieve=0)
    filled = np.asarray(answer.images[0])
    np.testing.assert_array_equal(filled[~mask], wide[~mask])
    assert (filled[mask] != wide[mask]).any()
    outside = np.zeros(wide.shape[:2], bool)
    outside[:, :16] = True
    with pytest.raises(InputError, match="the mask covers no pixel of the image's middle square"):
        run.infill(wide, outside)


def test_given_documents_come_before_retrieved_ones(run: Model, calls: list[Call], picture: Path, tmp_path: Path):
    options = GenerateOptions(
        prompt=PROMPT, documents=(f"{picture}=an owl",), retrieve=1, samples=1, out=str(tmp_path / "out")
    )
    said = generate(run, options).splitlines()
    (found,) = run.retrieve(PROMPT, k=1)
    assert said[:2] == ["given: an owl", *lines_of([found])]
    (codes,) = run.images.encode([np.asarray(PIL.Image.open(picture))])
    own = np.array(run.tokenizer.encode("an owl"), np.int32)
    text = run.tokenizer.encode(PROMPT)
    given = [2, *(FIRST_TEXT + own), 3, *(FIRST_CODE + codes), 4, 1]
    after = image_prompt([found.tokens], text)[1:]
    assert calls[0].prompts == [[1, *given, *after]]
    assert [each["similarity"] is None for each in answer_in(tmp_path / "out")["documents"]] == [True, False]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    return watch_scoring(monkeypatch)


def own_ids(run: Model, text: str) -> list[int]:
    return [FIRST_TEXT + number for number in run.tokenizer.encode(text)]


def test_labels_get_probabilities(run: Model, told: Told, picture: Path, tmp_path: Path):
    """Parts 0 and 1 are the labels of the first run, 2 and 3 of the second: each time the first is e times better."""
    labels = tuple(f"{picture}={label}" for label in ("a dax", "a blick", "a dax", "a blick"))
    options = GenerateOptions(task="classify", image=str(picture), labels=labels, out=str(tmp_path / "out"))
    said = generate(run, options).splitlines()
    assert said[-2:] == ["a dax: 0.731", "a blick: 0.269"]  # 1 / (1 + exp(-1)), and the rest
    assert [ids[:-1] for ids in told.targets] == [own_ids(run, "a dax"), own_ids(run, "a blick")] * 2
    assert all(told.parts[0].group.tokens.tolist().count(own_ids(run, label)[-1]) for label in ("a dax", "a blick"))
    record = json.loads((tmp_path / "out" / "mine-classify.json").read_text())
    assert record["probabilities"] == {"a dax": 0.731059, "a blick": 0.268941}
    assert record["settings"] == {"scored": "text"}
    generate(run, replace(options, scored="image"))
    (codes,) = run.images.encode([np.asarray(PIL.Image.open(picture))])
    assert told.targets == [(FIRST_CODE + codes).tolist()] * 4


def test_a_text_or_an_image_is_scored_given_the_other(run: Model, told: Told, picture: Path, pixels, tmp_path: Path):
    (codes,) = run.images.encode([pixels])
    own, image = own_ids(run, PROMPT), (FIRST_CODE + codes).tolist()
    both = GenerateOptions(task="score", prompt=PROMPT, image=str(picture), out=str(tmp_path / "out"))
    said = generate(run, both).splitlines()
    found = run.retrieve(image=pixels, k=2)
    assert said[:2] == lines_of(found)
    assert said[-1] == f"text: log p 0.000 nats, {len(own) + 1} ids, perplexity 1.000"
    assert told.targets == [[*own, 5]]  # and <eoi>: it is infilled, after its picture
    generate(run, replace(both, scored="image", retrieve=0))
    assert told.targets == [image]
    assert told.parts[0].group.tokens.tolist()[: 3 + len(own)] == [1, 2, *own, 3]  # after its text
    generate(run, replace(both, image="", documents=(f"{picture}=an owl",)))
    assert told.targets == [own]
    assert told.parts[0].group.tokens.tolist()[1 : 2 + len(own_ids(run, "an owl"))] == [2, *own_ids(run, "an owl")]


def test_log_likelihoods_are_sums_over_ids(run: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("rac3.generation.tasks.score.Scorer.log_probs", lambda self, parts: [np.log([0.5, 0.125])])
    options = GenerateOptions(task="score", prompt=PROMPT, out=str(tmp_path))
    assert generate(run, options) == "text: log p -2.773 nats, 2 ids, perplexity 4.000"
    record = answer_in(tmp_path)
    assert record["log_prob"] == -2.772589
    assert record["log_probs"] == [-0.693147, -2.079442]


LINES = [
    {"prompt": f"{PROMPT}\u2028", "seed": 3},  # a line separator, which JSON may hold as it is
    {"image": "mine.png", "samples": 1},
    {"prompt": "a fox " * 100},
    {"prompt": "an owl", "task": "continue", "follow": ["image"]},
    {"image": "mine.png", "task": "classify", "labels": ["mine.png=a fox", "mine.png=an owl"], "retrieve": 0},
    {"prompt": "an owl", "task": "score", "retrieve": 0},
]


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_file_of_prompts_moves_before_its_first_answer(run: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Prompts that are drawn together count by the share of their ids. What is written after that counts once."""
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"{PROMPT} {number}"}) for number in range(5)))
    seen = []
    update = Progress.update

    def watched(self: Progress, count: int = 1, note: str = "") -> None:
        update(self, count, note)
        if self.label == "answers":
            seen.append((self.done, answers.read_bytes().count(b"\n")))

    monkeypatch.setattr(Progress, "update", watched)
    monkeypatch.setattr(run.engine, "steps", 8)  # of the 25 ids of a picture
    generate(run, GenerateOptions(prompts=str(prompts), samples=1, retrieve=0, out=str(tmp_path)))
    before = [done for done, written in seen if not written]
    assert before[-4:] == [5 * ids // 25 for ids in (8, 16, 24, 25)]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (5, 5)


def test_a_file_of_prompts_goes_on_where_it_was_killed(
    run: Model, calls: list[Call], picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of six prompts one is too long, which is said. The line that a kill has left half written is written again."""
    prompts = picture.parent / "prompts.jsonl"
    lines = [json.dumps(line, ensure_ascii=False) for line in LINES]
    prompts.write_text("\n\n".join(lines) + "\n\n", encoding="utf-8")
    options = GenerateOptions(prompts=str(prompts), samples=2, retrieve=1, out=str(tmp_path / "whole"))
    with pytest.raises(InputError, match="1 of 6 prompts of"):
        generate(run, options)
    whole = written(tmp_path / "whole")
    records = [json.loads(line) for line in whole["answers.jsonl"].splitlines()]
    assert [record["number"] for record in records] == [*range(6)]
    assert [len(record.get("samples", [])) for record in records] == [2, 1, 0, 2, 0, 0]
    assert sorted(records[4]["probabilities"]) == ["a fox", "an owl"]
    assert records[5]["log_prob"] < 0
    assert "exceed" in records[2]["error"]
    assert records[0]["settings"]["seed"] == 3
    pictures = [f"{number:06d}-{rank}.png" for number in (0, 3) for rank in (0, 1)]
    assert sorted(whole) == [*pictures, "answers.jsonl"]

    part = tmp_path / "part"
    part.mkdir()
    lines = whole["answers.jsonl"].splitlines(keepends=True)
    (part / "answers.jsonl").write_bytes(lines[0] + lines[1][:40])
    (part / "000001-0.png.0123456789ab.tmp").write_bytes(b"half")
    for name in pictures[:2]:
        (part / name).write_bytes(whole[name])
    calls.clear()
    with pytest.raises(InputError, match="1 of 6 prompts of"):
        generate(run, replace(options, out=str(part)))
    assert written(part) == whole
    assert [len(call.requests) for call in calls] == [2]  # the first is not drawn again
    calls.clear()
    with pytest.raises(InputError, match="1 of 6"):
        generate(run, replace(options, out=str(part)))  # all is done
    assert not calls
    exact = run.with_retriever(Exact(num_neighbors=16))
    for model, other in ((run, replace(options, seed=9)), (run, replace(options, samples=3)), (exact, options)):
        with pytest.raises(InputError, match="has answers to other prompts, or with other options"):
            generate(model, replace(other, out=str(part)))
    assert written(part) == whole


def test_texts_of_a_file_are_scored_together(run: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In blocks that do not depend on where a kill was. One that is too long fails alone; each has its own score."""
    monkeypatch.setattr("rac3.stages.generate.AT_ONCE", 4)
    texts = ["an owl", "a fox", "a fox " * 100, "a red fox on the grass", "a cat"]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"task": "score", "prompt": text}) for text in texts))
    options = GenerateOptions(prompts=str(prompts), out=str(tmp_path / "whole"))
    together = []
    log_probs = Scorer.log_probs
    monkeypatch.setattr(Scorer, "log_probs", lambda self, parts: together.append(len(parts)) or log_probs(self, parts))
    with pytest.raises(InputError, match="1 of 5 prompts"):
        generate(run, options)
    assert together == [3, 1]
    whole = (tmp_path / "whole" / "answers.jsonl").read_bytes()
    records = [json.loads(line) for line in whole.splitlines()]
    assert "exceeds" in records[2]["error"]
    for text, record in zip(texts, records, strict=True):
        if "error" not in record:
            alone = run.score(Document("", (Text(text),), {}))
            assert record["prompt"]["text"] == text
            assert record["log_probs"] == pytest.approx(alone.log_probs, rel=1e-4)

    for lines, blocks in ((1, [3, 1]), (3, [3, 1]), (4, [1])):
        part = tmp_path / f"part{lines}"
        part.mkdir()
        (part / "answers.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:lines]))
        together.clear()
        with pytest.raises(InputError, match="1 of 5 prompts"):
            generate(run, replace(options, out=str(part)))
        assert (part / "answers.jsonl").read_bytes() == whole
        assert together == blocks


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "is empty"),
        ("a fox", "line 1 is no JSON"),
        ("[1]", "line 1 is no JSON object"),
    ],
)
def test_a_file_that_is_no_list_of_prompts_is_refused(run: Model, tmp_path: Path, line: str, said: str):
    path = tmp_path / "prompts.jsonl"
    path.write_text(line)
    with pytest.raises(InputError, match=said):
        generate(run, GenerateOptions(prompts=str(path), out=str(tmp_path / "out")))
    with pytest.raises(InputError, match="does not exist"):
        generate(run, GenerateOptions(prompts=str(tmp_path / "none"), out=str(tmp_path / "out")))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"promt": "a fox"}, "prompt 0 has 'promt'; use task, prompt"),
        ({"prompt": "a fox", "samples": "2"}, "samples cannot be '2'"),
        ({"prompt": "a fox", "temperature": True}, "temperature cannot be True"),
        ({"prompt": 3}, "prompt cannot be 3"),
        ({"prompt": "a fox", "task": "paint"}, "task 'paint' is unknown"),
        ({"prompt": "a fox", "follow": "image"}, "follow cannot be 'image'"),
        ({"prompt": "a fox", "samples": 0}, "samples=0"),
        ({"prompt": "a fox", "task": "score", "scored": "sound"}, "scored 'sound' is unknown; use text, image, apart"),
        ({"prompt": "a fox", "guidance_without": "image"}, "guidance_without 'image' is unknown"),
        ({"prompt": "a fox", "task": "score", "top_k": 3}, "the task score has no use for top_k"),
    ],
)
def test_a_line_that_asks_nothing_is_named(run: Model, tmp_path: Path, line: dict[str, Any], said: str):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(line))
    with pytest.raises(InputError, match="1 of 1 prompts"):
        generate(run, GenerateOptions(prompts=str(path), out=str(tmp_path / "out")))
    (record,) = map(json.loads, (tmp_path / "out" / "answers.jsonl").read_text().splitlines())
    assert said in record["error"]
