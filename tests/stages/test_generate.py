"""`rac3 generate`: what it passes to the run, what it writes, and what it says."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tiny_config
from decoding_spy import Call, watch_decoding
from replaced import with_members
from tiny_prompts import FIRST_TEXT, caption_prompt, image_prompt

import rac3.retrieval.open_memory
from rac3.artifacts.workdir import Workdir
from rac3.cli import parse
from rac3.config import InputError
from rac3.experiment import Experiment
from rac3.generation.sampling import Sampling
from rac3.retrieval.fixed import Fixed
from rac3.run import Found, Run
from rac3.stages.generate import GenerateOptions, generate

PROMPT = "a fox on water in night"


@pytest.fixture(scope="module")
def run(experiment: Experiment, store: Workdir) -> Run:
    return Run(experiment, store)


@pytest.fixture(scope="module")
def pixels(run: Run) -> np.ndarray:
    """A picture that the memory does not hold."""
    return run.documents("test")[0].document.images[0].pixels()


@pytest.fixture
def picture(pixels: np.ndarray, tmp_path: Path) -> Path:
    PIL.Image.fromarray(pixels).save(tmp_path / "mine.png")
    return tmp_path / "mine.png"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    return watch_decoding(monkeypatch, real=False)


def lines_of(found: list[Found]) -> list[str]:
    return [f"retrieved {item.document.key} ({item.score:.2f}): {item.document.text}" for item in found]


def same_pictures(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.abs(x.astype(int) - y).max() <= 1 for x, y in zip(a, b, strict=True))


def test_pictures_are_written_in_their_order(run: Run, calls: list[Call], tmp_path: Path):
    folder = tmp_path / "new" / "folder"
    options = GenerateOptions(prompt=" A fox, 2! ", samples=5, num_retrieved=1, seed=7, out=str(folder))
    said = generate(run, options).splitlines()
    found = run.retrieve("A fox, 2!", k=1)
    files = [folder / f"a-fox--2--{rank}.png" for rank in range(5)]
    assert said == [*lines_of(found), *(f"image {rank}: {path}" for rank, path in enumerate(files))]
    assert calls[0].prompts == 5 * [image_prompt([found[0].tokens], run.tokenizer.encode("A fox, 2!"))]
    pictures = [np.asarray(PIL.Image.open(path)) for path in files]
    assert same_pictures(pictures, run.draw(" A fox, 2! ", 1, 5, seed=7).images)
    assert not same_pictures(pictures, run.draw(" A fox, 2! ", 1, 5, seed=0).images)


@pytest.mark.parametrize(("named", "asked", "k"), [(None, None, 2), (None, 0, 0), (3, None, 3), (3, 1, 1)])
def test_how_many_documents_are_in_context(
    run: Run, calls: list[Call], picture: Path, tmp_path: Path, named: int | None, asked: int | None, k: int
):
    """Two, or all that are named by hand, unless a number is given."""
    experiment = run.experiment
    if named:
        experiment = replace(experiment, retriever=Fixed(tuple(f"train/{number:06d}" for number in range(named))))
    # The memory stays, which no stage has indexed for `Fixed`.
    other = with_members(run, experiment, memory=lambda _: run.memory())
    for options in (
        GenerateOptions(prompt=PROMPT, samples=1, num_retrieved=asked, out=str(tmp_path)),
        GenerateOptions(image=str(picture), samples=1, num_retrieved=asked),
    ):
        assert generate(other, options).count("retrieved ") == k
        assert calls.pop().prompts[0].count(1) == k + 1  # <eod> before all, and after each


def test_documents_that_do_not_fit_are_named(run: Run, calls: list[Call], picture: Path, pixels, tmp_path: Path):
    """Six of them exceed the context."""
    for options, result in (
        (GenerateOptions(prompt=PROMPT, num_retrieved=6, out=str(tmp_path)), run.draw(PROMPT, 6)),
        (GenerateOptions(image=str(picture), num_retrieved=6), run.caption(pixels, 6)),
    ):
        assert len(result.retrieved) + len(result.dropped) == 6
        assert result.dropped
        said = generate(run, options).splitlines()
        assert said[: len(result.retrieved)] == lines_of(result.retrieved)
        assert said[len(result.retrieved) : 6] == [
            f"does not fit into the context: {item.document.key} ({item.score:.2f})" for item in result.dropped
        ]
    assert [call.prompts for call in calls[2:]] == [call.prompts for call in calls[:2]]


def test_a_prompt_is_searched_for_once(
    run: Run, calls: list[Call], picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    searched = []
    search = rac3.retrieval.open_memory.search_memory

    def counted(indexes, memory, queries, k):
        searched.append(queries.texts)
        return search(indexes, memory, queries, k)

    monkeypatch.setattr(rac3.retrieval.open_memory, "search_memory", counted)
    generate(run, GenerateOptions(prompt=PROMPT, out=str(tmp_path)))
    assert searched == [[PROMPT]]
    generate(run, GenerateOptions(image=str(picture)))
    assert searched == [[PROMPT], [""]]
    generate(run, GenerateOptions(prompt=PROMPT, num_retrieved=0, out=str(tmp_path)))
    assert len(searched) == 2
    assert len(calls) == 3


def test_an_image_of_ones_own_is_captioned(
    rac3: Callable[..., int],
    workdir: Path,
    run: Run,
    pixels: np.ndarray,
    calls: list[Call],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    """`rac3 generate --image FILE`, of a picture larger than the model's."""
    large = pixels.repeat(2, 0).repeat(2, 1)
    path = tmp_path / "mine.png"
    PIL.Image.fromarray(large).save(path)
    assert (
        rac3("generate", tiny_config.__file__, "--workdir", str(workdir), "--image", str(path), "--samples", "3") == 0
    )
    lines = capsys.readouterr().out.splitlines()
    found = run.retrieve(image=large, k=2)
    assert lines[:2] == lines_of(found)
    ((prompt, samples, means),) = calls[0].samples(3)
    assert prompt == caption_prompt([item.tokens for item in found], run.images.encode([large])[0])
    caption = run.tokenizer.decode([id - FIRST_TEXT for id in samples[int(np.argmax(means))]])
    assert "\n".join(lines[2:]) == f"caption: {caption}"
    assert not (workdir / "generated").exists()


def test_the_options_of_sampling_reach_it_and_leave_every_artifact(
    rac3: Callable[..., int],
    workdir: Path,
    run: Run,
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
    assert [call.sampling for call in calls] == [Sampling(0.5, 0.9)] * 2
    assert sorted(workdir.glob("*/*/manifest.json")) == made
    paths = re.findall(r"^image \d: (.+)$", capsys.readouterr().out, re.M)
    assert [Path(path).parent for path in paths] == [workdir / "generated"] * 3
    run.draw(PROMPT, 2, 3, seed=7)
    run.caption(pixels, 2, 3, seed=7)
    run.draw(PROMPT, 2, 3, seed=0)
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


def test_sampling_that_is_not_given_is_that_of_the_evaluation(run: Run, calls: list[Call], picture: Path, tmp_path):
    settings = replace(
        run.experiment.evaluation, image_sampling=Sampling(0.3, 0.8), caption_sampling=Sampling(0.4, 0.7)
    )
    other = run.variant(replace(run.experiment, evaluation=settings), run.trained)
    for given, image, caption in (
        ({}, Sampling(0.3, 0.8), Sampling(0.4, 0.7)),
        ({"temperature": 0.0}, Sampling(0.0, 0.8), Sampling(0.0, 0.7)),
        ({"top_p": 0.5}, Sampling(0.3, 0.5), Sampling(0.4, 0.5)),
    ):
        generate(other, GenerateOptions(prompt=PROMPT, samples=1, out=str(tmp_path), **given))
        generate(other, GenerateOptions(image=str(picture), samples=1, **given))
        assert [call.sampling for call in calls[-2:]] == [image, caption]


@pytest.mark.parametrize(
    "fields", [{"num_retrieved": -1}, {"samples": 0}, {"temperature": -0.5}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_numbers_are_checked(fields: dict[str, float]):
    ((name, value),) = fields.items()
    with pytest.raises(InputError, match=f"{name}={value}"):
        GenerateOptions(prompt="a fox", **fields)
    assert GenerateOptions(num_retrieved=0, samples=1).num_retrieved == 0


def test_a_caption_without_room_for_an_image_is_refused_and_nothing_is_written(run: Run, tmp_path: Path):
    options = GenerateOptions(prompt="a fox and an owl " * 40, out=str(tmp_path))
    with pytest.raises(InputError, match=r"a prompt of \d+ tokens and 25 to generate exceed the 192 positions"):
        generate(run, options)
    assert not list(tmp_path.iterdir())
