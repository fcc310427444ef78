"""A prompt of one's own: what it retrieves, what the generator is given, and the order of what comes back."""

import io
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tiny_config
from decoding_spy import Call, watch_decoding

from rac3 import recipes
from rac3.artifacts.arrays import Vectors
from rac3.artifacts.workdir import Workdir
from rac3.config import InputError
from rac3.documents.document import Document, Text
from rac3.documents.store import TokenizedDocument
from rac3.experiment import Experiment
from rac3.retrieval.baselines import NoRetriever, Random
from rac3.retrieval.fixed import Fixed
from rac3.retrieval.open_memory import OpenMemory
from rac3.retrieval.selection import Dropped, Selected
from rac3.run import Run
from rac3.stages.generate import GenerateOptions, generate

FIRST_TEXT, FIRST_CODE, FIRST_MASK = 8, 308, 324  # of the tiny vocabulary: 8 specials, 300 text ids, 16 codes
PROMPT = "a fox on water in night"


@pytest.fixture(scope="module")
def session(experiment: Experiment, store: Workdir) -> Run:
    return Run(experiment, store)


@pytest.fixture(scope="module")
def memory(experiment: Experiment, store: Workdir) -> list[TokenizedDocument]:
    parts = [Run(experiment, store).documents(split) for split in ("train", "memory")]
    return [item for part in parts for item in part.many(range(len(part)))]


@pytest.fixture(scope="module")
def vectors(experiment: Experiment, store: Workdir) -> np.ndarray:
    """Of the documents of the memory, as they are stored."""
    folders = [store.require(recipes.embeddings(experiment, split), "").folder for split in ("train", "memory")]
    return np.concatenate([Vectors(folder / "document")[:] for folder in folders])


@pytest.fixture(scope="module")
def pixels(experiment: Experiment, store: Workdir) -> np.ndarray:
    """A picture that the memory does not hold."""
    return Run(experiment, store).documents("test")[0].document.images[0].pixels()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    return watch_decoding(monkeypatch, real=False)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, session: Run) -> None:
    """`Run.open` gives the session that is open, whatever the experiment."""
    monkeypatch.setattr(Run, "open", lambda *_: session)


def nearest(query: np.ndarray, vectors: np.ndarray, k: int) -> list[tuple[int, float]]:
    """Plain search: best first, without one that is nearly the query or nearly another found (over 0.999)."""
    found: list[int] = []
    for i in np.argsort(-(vectors @ query)):
        if max([vectors[i] @ query, *(vectors[found] @ vectors[i])]) <= 0.999:
            found.append(int(i))
    return [(i, float(vectors[i] @ query)) for i in found[:k]]


def spelled(item: TokenizedDocument) -> list[int]:
    """<img alt=" text " src=" codes "> <eod>"""
    text, codes = item.ids
    return [2, *(FIRST_TEXT + text), 3, *(FIRST_CODE + codes), 4, 1]


def before(memory: list[TokenizedDocument], found: list[tuple[int, float]]) -> list[int]:
    return [1, *(id for i, _ in found for id in spelled(memory[i]))]


def drawn(session: Run, call: Call) -> list[np.ndarray]:
    """The pictures of a call of one prompt, in the order of their samples."""
    return list(session.codec.decode(np.stack(call.out.ids) - FIRST_CODE))


def same_pictures(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.abs(x.astype(int) - y).max() <= 1 for x, y in zip(a, b, strict=True))


def test_a_text_retrieves_the_nearest_documents(session: Run, memory, vectors: np.ndarray):
    query = session.encoder.embed_texts([PROMPT])[0]
    for k in (0, 1, 3):
        found = session.retrieve(PROMPT, k=k)
        wanted = nearest(query, vectors, k)
        assert [item.document.key for item in found] == [memory[i].document.key for i, _ in wanted]
        np.testing.assert_allclose([item.score for item in found], [score for _, score in wanted], atol=1e-5)
        assert [spelled(item.tokens) for item in found] == [spelled(memory[i]) for i, _ in wanted]


def test_an_image_retrieves_the_nearest_documents(session: Run, memory, vectors: np.ndarray, pixels: np.ndarray):
    wanted = nearest(session.encoder.embed_images([pixels])[0], vectors, 2)
    found = session.retrieve(image=pixels, k=2)
    assert [item.document.key for item in found] == [memory[i].document.key for i, _ in wanted]
    assert [i for i, _ in wanted] != [i for i, _ in nearest(session.encoder.embed_texts([PROMPT])[0], vectors, 2)]


def test_spaces_around_a_prompt_change_nothing(session: Run, calls: list[Call]):
    """Texts of documents have none."""
    bare, spaced = (
        [(found.document.key, found.score) for found in session.retrieve(text)] for text in ("a fox", " a fox\n")
    )
    assert spaced == bare
    assert same_pictures(session.draw("a fox", samples=3), session.draw(" a fox\n", samples=3))
    assert calls[0].prompts == calls[1].prompts


def test_a_query_is_a_text_or_an_image(session: Run, pixels: np.ndarray):
    for text, image in (("", None), ("  ", None), ("a fox", pixels)):
        with pytest.raises(InputError, match="no text and no image, or both"):
            session.retrieve(text, image)


class Remembered(OpenMemory):
    """A memory of four documents, the third and fourth without an image, that every query ranks alike."""

    def __init__(self, items: list[TokenizedDocument]) -> None:
        texts = [Document(item.document.key, (Text(item.document.text),), {}) for item in items]
        bare = [TokenizedDocument(text, item.ids[:1]) for text, item in zip(texts, items, strict=True)]
        self.items = [*items[:2], *bare[2:4]]

    def retrieve(self, queries, exclude):
        self.asked = queries, exclude
        scores = np.array([[0.9, 0.8, 0.7, 0.6, -np.inf]], np.float32)
        return Selected(np.array([[2, 0, 3, 1, -1]]), scores, Dropped(0, 0, 0, 0, 0, 0))

    def document(self, number: int) -> TokenizedDocument:
        return self.items[number]


def test_what_has_nothing_to_show_is_passed_over(session: Run, memory):
    remembered = Remembered(memory[:4])
    whole = replace(session, memory=remembered)
    assert [(found.tokens, round(found.score, 2)) for found in whole.retrieve("a fox", k=3)] == [
        (remembered.items[2], 0.9),
        (remembered.items[0], 0.8),
        (remembered.items[3], 0.7),
    ]
    assert len(whole.retrieve("a fox", k=9)) == 4  # -1 is no document
    queries, exclude = remembered.asked
    assert queries.texts == ["a fox"]
    assert exclude.tolist() == [-1]  # a prompt is no document of the memory, so that none is left out for it
    images = replace(whole, builder=replace(session.builder, retrieved="image"))
    assert [(found.tokens, round(found.score, 2)) for found in images.retrieve("a fox", k=2)] == [
        (remembered.items[0], 0.8),
        (remembered.items[1], 0.6),
    ]
    assert [ids.ids.tolist() for ids in images._sequences(images.retrieve("a fox", k=2))] == [
        [2, 3, *(FIRST_CODE + remembered.items[number].ids[1]), 4, 1] for number in (0, 1)
    ]


def test_images_come_best_first(session: Run, calls: list[Call]):
    """By the inner product of their CLIP vectors with that of the prompt."""
    images = session.draw(PROMPT, k=2, samples=6, seed=3)
    made = drawn(session, calls[0])
    scores = session.encoder.embed_images(made) @ session.encoder.embed_texts([PROMPT])[0]
    order = sorted(range(6), key=lambda number: -scores[number])
    assert order not in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0])
    assert same_pictures(images, [made[number] for number in order])


def test_an_image_follows_what_its_caption_retrieved(session: Run, memory, vectors, calls: list[Call]):
    wanted = nearest(session.encoder.embed_texts([PROMPT])[0], vectors, 2)
    text = [FIRST_TEXT + id for id in session.tokenizer.encode(PROMPT)]
    for k in (0, 1, 2):
        calls.clear()
        session.draw(PROMPT, k, samples=2)
        ((prompt, samples, _),) = calls[0].samples(2)
        assert prompt == [*before(memory, wanted[:k]), 2, *text, 3]
        assert [len(sample) for sample in samples] == [25, 25]
        assert calls[0].sampling == session.experiment.evaluation.image_sampling


def test_a_caption_follows_its_image(session: Run, memory, vectors, pixels, calls: list[Call]):
    """The most probable one, behind what the image retrieved."""
    sampling = replace(session.experiment.evaluation.caption_sampling, temperature=0.7)
    settings = replace(session.experiment.evaluation, caption_sampling=sampling, max_caption_tokens=5)
    other = replace(session, experiment=replace(session.experiment, evaluation=settings))
    wanted = nearest(session.encoder.embed_images([pixels])[0], vectors, 2)
    (codes,) = session.codec.encode([pixels])
    for k in (0, 2):
        calls.clear()
        caption = other.caption(pixels, k, samples=5, seed=1)
        ((prompt, samples, means),) = calls[0].samples(5)
        assert prompt == [*before(memory, wanted[:k]), 2, FIRST_MASK, 3, *(FIRST_CODE + codes), 4, FIRST_MASK]
        assert caption == session.tokenizer.decode([id - FIRST_TEXT for id in samples[int(np.argmax(means))]])
        assert np.argmax(means) > 0
        assert (calls[0].sampling, calls[0].grammar.count) == (sampling, 5)


def test_samples_are_a_function_of_the_seed(session: Run, pixels: np.ndarray, calls: list[Call]):
    for seed in (0, 0, 1):
        session.draw(PROMPT, 0, 2, seed)
        session.caption(pixels, 0, 2, seed)
    for first, again, other in (calls[::2], calls[1::2]):
        assert first.keys == again.keys
        assert not set(first.keys) & set(other.keys)


def test_the_retriever_is_swapped_and_the_model_stays(experiment: Experiment, store: Workdir, session: Run):
    random = replace(experiment, retriever=Random(num_neighbors=16))
    swapped = Run(replace(random, batches=replace(experiment.batches, retrieved="text")), store, experiment)
    assert swapped.memory is not None
    assert (session.builder.retrieved, swapped.builder.retrieved) == ("document", "text")
    assert len(swapped.memory.memory) == 48
    assert [found.document.key for found in swapped.retrieve(PROMPT)] != [
        found.document.key for found in session.retrieve(PROMPT)
    ]
    first, again, other = (
        [found.document.key for found in swapped.retrieve(text, k=8)] for text in (PROMPT, PROMPT, "an owl")
    )
    assert first == again
    assert set(first) != set(other)  # each prompt has a draw of its own
    alone = Run(replace(experiment, retriever=NoRetriever()), store)
    assert alone.memory is None
    assert alone.retrieve(PROMPT) == []

    def table(session: Run) -> np.ndarray:
        return np.asarray(session.generator.params["params"]["token_embedding"])

    trained = Run(experiment, store).params["params"]["token_embedding"]
    for each, same in ((session, True), (swapped, True), (alone, False)):
        assert np.array_equal(table(each), trained) is same


@pytest.mark.usefixtures("opened")
def test_pictures_are_written_in_their_order(
    experiment: Experiment, store: Workdir, session: Run, memory, vectors, calls: list[Call], tmp_path: Path
):
    seeded = replace(experiment, seed=7)
    config = GenerateOptions(prompt=" A fox, 2! ", samples=5, num_retrieved=1, out=str(tmp_path / "new" / "folder"))
    said = generate(Run(seeded, store), config).splitlines()
    ((found, score),) = nearest(session.encoder.embed_texts(["A fox, 2!"])[0], vectors, 1)
    document = memory[found].document
    files = [tmp_path / "new" / "folder" / f"a-fox--2--{rank}.png" for rank in range(5)]
    assert said == [
        f"retrieved {document.key} ({score:.2f}): {document.text}",
        *(f"image {rank}: {path}" for rank, path in enumerate(files)),
    ]
    assert len(calls[0].prompts) == 5
    assert calls[0].prompts[0][: len(spelled(memory[found])) + 1] == [1, *spelled(memory[found])]
    pictures = [np.asarray(PIL.Image.open(path)) for path in files]
    assert same_pictures(pictures, session.draw(" A fox, 2! ", 1, 5, seed=7))
    assert not same_pictures(pictures, session.draw(" A fox, 2! ", 1, 5, seed=0))


@pytest.mark.usefixtures("opened")
@pytest.mark.parametrize(("retriever", "asked", "k"), [(None, None, 2), (None, 0, 0), (3, None, 3), (3, 1, 1)])
def test_how_many_documents_are_in_context(
    experiment: Experiment, store: Workdir, calls: list[Call], tmp_path: Path, retriever, asked: int | None, k: int
):
    """Two, or all that are named by hand, unless a number is given."""
    if retriever:
        experiment = replace(experiment, retriever=Fixed(tuple(f"train/{number:06d}" for number in range(retriever))))
    config = GenerateOptions(prompt=PROMPT, samples=1, num_retrieved=asked, out=str(tmp_path))
    said = generate(Run(experiment, store), config)
    assert said.count("retrieved ") == k
    assert calls[0].prompts[0].count(1) == k + 1  # <eod> before all, and after each


def test_an_image_of_ones_own_is_captioned(
    rac3: Callable[..., int],
    workdir: Path,
    session: Run,
    memory,
    vectors: np.ndarray,
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
    wanted = nearest(session.encoder.embed_images([large])[0], vectors, 2)
    assert re.findall(r"^retrieved (\S+) \((\S+)\)", "\n".join(lines), re.M) == [
        (memory[i].document.key, f"{score:.2f}") for i, score in wanted
    ]
    ((prompt, samples, means),) = calls[0].samples(3)
    (codes,) = session.codec.encode([large])
    assert prompt == [*before(memory, wanted), 2, FIRST_MASK, 3, *(FIRST_CODE + codes), 4, FIRST_MASK]
    caption = session.tokenizer.decode([id - FIRST_TEXT for id in samples[int(np.argmax(means))]])
    assert "\n".join(lines[2:]) == f"caption: {caption}"
    assert not (workdir / "generated").exists()


@pytest.mark.usefixtures("opened")
def test_the_seed_of_a_caption_is_that_of_the_experiment(
    experiment: Experiment, store: Workdir, session: Run, pixels: np.ndarray, calls: list[Call], tmp_path: Path
):
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    config = GenerateOptions(image=str(tmp_path / "a.png"), samples=4, num_retrieved=1)
    generate(Run(replace(experiment, seed=7), store, experiment), config)
    session.caption(pixels, 1, 4, seed=7)
    assert calls[0].keys == calls[1].keys
    assert calls[0].prompts == calls[1].prompts


@pytest.mark.usefixtures("opened")
def test_more_documents_than_the_context_holds_are_refused(experiment: Experiment, store: Workdir, tmp_path: Path):
    config = GenerateOptions(prompt=PROMPT, num_retrieved=6, out=str(tmp_path))
    with pytest.raises(InputError, match=r"a prompt of \d+ tokens and 25 to generate exceed the 192 positions"):
        generate(Run(experiment, store), config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fields", [{"num_retrieved": -1}, {"samples": 0}])
def test_numbers_are_checked(fields: dict[str, int]):
    ((name, value),) = fields.items()
    with pytest.raises(InputError, match=f"{name}={value}"):
        GenerateOptions(prompt="a fox", **fields)
    assert GenerateOptions(num_retrieved=0, samples=1).num_retrieved == 0
