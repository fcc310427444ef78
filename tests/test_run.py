"""Prompts to a run: what they retrieve, what the generator is given, and the order of what comes back."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from decoding_spy import Call, watch_decoding
from replaced import with_members
from tiny_prompts import FIRST_CODE, FIRST_TEXT, caption_prompt, image_prompt, of_length, spelled

import rac3.run
from rac3 import recipes
from rac3.answering import Model
from rac3.artifacts.arrays import Vectors
from rac3.artifacts.workdir import Workdir
from rac3.config import InputError
from rac3.documents.document import Document, Text
from rac3.documents.store import TokenizedDocument
from rac3.experiment import Experiment
from rac3.generation.sampling import Sampling
from rac3.retrieval.baselines import NoRetriever, Random
from rac3.retrieval.open_memory import OpenMemory
from rac3.retrieval.selection import Dropped, Selected
from rac3.run import Found

PROMPT = "a fox on water in night"


@pytest.fixture(scope="module")
def run(experiment: Experiment, store: Workdir) -> Model:
    return Model(experiment, store)


@pytest.fixture(scope="module")
def memory(run: Model) -> list[TokenizedDocument]:
    """All documents of the memory, by memory id."""
    parts = [run.documents(split) for split in ("train", "memory")]
    return [item for part in parts for item in part.many(range(len(part)))]


@pytest.fixture(scope="module")
def vectors(experiment: Experiment, store: Workdir) -> np.ndarray:
    """Of the documents of the memory, as they are stored."""
    folders = [store.require(recipes.embeddings(experiment, split)).folder for split in ("train", "memory")]
    return np.concatenate([Vectors(folder / "document")[:] for folder in folders])


@pytest.fixture(scope="module")
def pixels(run: Model) -> np.ndarray:
    """A picture that the memory does not hold."""
    return run.documents("test")[0].document.images[0].pixels()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    return watch_decoding(monkeypatch, real=False)


def nearest(query: np.ndarray, vectors: np.ndarray, k: int) -> list[tuple[int, float]]:
    """Plain search: best first, without one that is nearly the query or nearly another found (over 0.999)."""
    found: list[int] = []
    for i in np.argsort(-(vectors @ query)):
        if max([vectors[i] @ query, *(vectors[found] @ vectors[i])]) <= 0.999:
            found.append(int(i))
    return [(i, float(vectors[i] @ query)) for i in found[:k]]


def keys(found: Sequence[Found | Document]) -> list[str]:
    return [(item.document if isinstance(item, Found) else item).key for item in found]


def drawn(run: Model, call: Call) -> list[np.ndarray]:
    """The pictures of a call of one prompt, in the order of their samples."""
    ((_, samples, _),) = call.samples()
    return list(run.images.decode(np.array(samples) - FIRST_CODE))


def same_pictures(a: Sequence, b: Sequence) -> bool:
    pairs = zip(a, b, strict=False)
    return len(a) == len(b) and all(np.abs(np.asarray(x).astype(int) - np.asarray(y)).max() <= 1 for x, y in pairs)


def test_a_text_retrieves_the_nearest_documents(run: Model, memory, vectors: np.ndarray):
    query = run.encoder.embed_texts([PROMPT])[0]
    for k in (0, 1, 3):
        found = run.retrieve(PROMPT, k=k)
        wanted = nearest(query, vectors, k)
        assert keys(found) == [memory[i].document.key for i, _ in wanted]
        np.testing.assert_allclose([item.score for item in found], [score for _, score in wanted], atol=1e-5)
        assert [spelled(item.tokens) for item in found] == [spelled(memory[i]) for i, _ in wanted]


def test_an_image_retrieves_the_nearest_documents(run: Model, memory, vectors: np.ndarray, pixels: np.ndarray):
    wanted = nearest(run.encoder.embed_images([pixels])[0], vectors, 2)
    found = run.retrieve(image=pixels, k=2)
    assert keys(found) == [memory[i].document.key for i, _ in wanted]
    assert [i for i, _ in wanted] != [i for i, _ in nearest(run.encoder.embed_texts([PROMPT])[0], vectors, 2)]


def test_spaces_around_a_prompt_change_nothing(run: Model, calls: list[Call]):
    """Texts of documents have none."""
    bare, spaced = (
        [(found.document.key, found.score) for found in run.retrieve(text)] for text in ("a fox", " a fox\n")
    )
    assert spaced == bare
    first, second = (run.generate(text, samples=3) for text in ("a fox", " a fox\n"))
    assert same_pictures(first.images, second.images)
    assert keys(first.documents) == keys(second.documents)
    assert calls[0].prompts == calls[1].prompts


def test_a_query_is_a_text_or_an_image(run: Model, pixels: np.ndarray):
    for text, image in (("", None), ("  ", None), ("a fox", pixels)):
        with pytest.raises(InputError, match="no text and no image, or both"):
            run.retrieve(text, image)


class Remembered(OpenMemory):
    """A memory of documents that are given, by number, which every query ranks alike."""

    def __init__(self, items: list[TokenizedDocument], ranking: list[int]) -> None:
        self.items, self.ranking = items, ranking

    def retrieve(self, queries, exclude):
        self.asked = queries, exclude
        scores = [0.9 - 0.1 * place if number >= 0 else -np.inf for place, number in enumerate(self.ranking)]
        return Selected(np.array([self.ranking]), np.array([scores], np.float32), Dropped(0, 0, 0, 0, 0, 0))

    def document(self, number: int) -> TokenizedDocument:
        return self.items[number]


def test_what_has_nothing_to_show_is_passed_over(run: Model, memory):
    """Of four documents, the third and fourth without an image."""
    texts = [Document(item.document.key, (Text(item.document.text),), {}) for item in memory[2:4]]
    bare = [TokenizedDocument(text, item.ids[:1]) for text, item in zip(texts, memory[2:4], strict=True)]
    remembered = Remembered([*memory[:2], *bare], [2, 0, 3, 1, -1])
    whole = with_members(run, memory=lambda _: remembered)
    assert [(found.tokens, round(found.score, 2)) for found in whole.retrieve("a fox", k=3)] == [
        (remembered.items[2], 0.9),
        (remembered.items[0], 0.8),
        (remembered.items[3], 0.7),
    ]
    assert len(whole.retrieve("a fox", k=9)) == 4  # -1 is no document
    queries, exclude = remembered.asked
    assert queries.texts == ["a fox"]
    assert exclude.tolist() == [-1]  # a prompt is no document of the memory, so that none is left out for it
    images = with_members(whole, builder=replace(run.builder, retrieved="image"))
    assert [(found.tokens, round(found.score, 2)) for found in images.retrieve("a fox", k=2)] == [
        (remembered.items[0], 0.8),
        (remembered.items[1], 0.6),
    ]
    found = [item.tokens.tokens for item in images.retrieve("a fox", k=2)]
    assert [sequence.ids.tolist() for sequence in images.builder.retrieved_sequences(found)] == [
        [2, 3, *(FIRST_CODE + remembered.items[number].ids[1]), 4, 1] for number in (0, 1)
    ]


def test_images_come_best_first(run: Model, calls: list[Call]):
    """By the inner product of their CLIP vectors with that of the prompt."""
    images = run.generate(PROMPT, retrieve=2, samples=6, seed=3).images
    made = drawn(run, calls[0])
    scores = run.encoder.embed_images(made) @ run.encoder.embed_texts([PROMPT])[0]
    order = sorted(range(6), key=lambda number: -scores[number])
    assert order not in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0])
    assert same_pictures(images, [made[number] for number in order])


def test_an_image_follows_what_its_caption_retrieved(run: Model, memory, vectors, calls: list[Call]):
    wanted = [memory[i] for i, _ in nearest(run.encoder.embed_texts([PROMPT])[0], vectors, 2)]
    for k in (0, 1, 2):
        calls.clear()
        result = run.generate(PROMPT, retrieve=k, samples=2)
        ((prompt, samples, _),) = calls[0].samples()
        assert prompt == image_prompt(wanted[:k], run.tokenizer.encode(PROMPT))
        assert keys(result.documents) == [item.document.key for item in wanted[:k]]
        assert result.dropped == []
        assert [len(sample) for sample in samples] == [25, 25]
        assert calls[0].sampling == run.experiment.evaluation.image_sampling


def test_a_caption_follows_its_image(run: Model, memory, vectors, pixels, calls: list[Call]):
    """The most probable one, after what the image retrieved."""
    sampling = replace(run.experiment.evaluation.caption_sampling, temperature=0.7)
    settings = replace(run.experiment.evaluation, caption_sampling=sampling, max_caption_tokens=5)
    other = run.variant(replace(run.experiment, evaluation=settings), run.trained)
    wanted = [memory[i] for i, _ in nearest(run.encoder.embed_images([pixels])[0], vectors, 2)]
    (codes,) = run.images.encode([pixels])
    for k in (0, 2):
        calls.clear()
        result = other.caption(pixels, retrieve=k, samples=5, seed=3)
        ((prompt, samples, means),) = calls[0].samples()
        assert prompt == caption_prompt(wanted[:k], codes)
        assert keys(result.documents) == [item.document.key for item in wanted[:k]]
        assert result.dropped == []
        assert result.texts[0] == run.tokenizer.decode([id - FIRST_TEXT for id in samples[int(np.argmax(means))]])
        assert np.argmax(means) > 0
        assert (calls[0].sampling, calls[0].draws[0].count) == (sampling, 5)


def test_sampling_is_what_is_asked_for(run: Model, pixels: np.ndarray, calls: list[Call]):
    run.generate(PROMPT, retrieve=0, samples=2, sampling=Sampling(0.5, 0.25))
    run.caption(pixels, retrieve=0, samples=2, sampling=Sampling(0.0, 0.75))
    assert [call.sampling for call in calls] == [Sampling(0.5, 0.25), Sampling(0.0, 0.75)]


def test_samples_are_a_function_of_the_seed(run: Model, pixels: np.ndarray, calls: list[Call]):
    for seed in (0, 0, 1):
        run.generate(PROMPT, retrieve=0, samples=2, seed=seed)
        run.caption(pixels, retrieve=0, samples=2, seed=seed)
    for first, again, other in (calls[::2], calls[1::2]):
        assert first.keys == again.keys
        assert not set(first.keys) & set(other.keys)


def test_an_empty_caption_is_refused(run: Model, calls: list[Call]):
    with pytest.raises(InputError, match="needs a text"):
        run.generate(" ")
    assert not calls


def test_documents_that_do_not_fit_are_dropped_and_said(run: Model, memory, vectors, pixels, calls: list[Call]):
    """From the end, as many as it takes: six documents of some 42 ids each are more than the 192 positions hold."""
    text, codes = run.tokenizer.encode(PROMPT), run.images.encode([pixels])[0]
    most = run.experiment.evaluation.max_caption_tokens
    for vector, main, result, prompt_of, given in (
        (
            run.encoder.embed_texts([PROMPT])[0],
            3 + len(text) + 25,
            run.generate(PROMPT, retrieve=6, samples=2),
            image_prompt,
            text,
        ),
        (
            run.encoder.embed_images([pixels])[0],
            31 + most + 1,
            run.caption(pixels, retrieve=6, samples=2),
            caption_prompt,
            codes,
        ),
    ):
        wanted = [memory[i] for i, _ in nearest(vector, vectors, 6)]
        ends = np.cumsum([len(spelled(item)) for item in wanted])
        fits = int(np.sum(ends <= 192 - main - 8))  # 8 of markup
        assert 0 < fits < 6
        assert keys(result.documents) == [item.document.key for item in wanted[:fits]]
        assert keys(result.dropped) == [item.document.key for item in wanted[fits:]]
        assert calls.pop(0).prompts[0] == prompt_of(wanted[:fits], given)


def test_prompts_leave_room_for_what_is_generated(run: Model, memory, pixels: np.ndarray, calls: list[Call]):
    """A second document of 40 ids has room by itself, but not with 25 codes, or with the ids of a caption, to come."""
    remembered = Remembered([of_length(item, 40) for item in memory[:2]], [0, 1])
    ids = run.tokenizer.encode(PROMPT)
    longest = run.experiment.evaluation.max_caption_tokens
    of_image, of_caption = 80 + 3 + len(ids) + 25, 80 + 6 + 25 + longest + 1  # all that a context of both takes
    for positions in (of_image, of_image - 1, of_caption, of_caption - 1):
        images, captions = (2 if positions >= needed else 1 for needed in (of_image, of_caption))
        calls.clear()
        small = with_members(run, model=run.model.clone(max_positions=positions), memory=lambda _: remembered)
        results = small.generate(PROMPT, retrieve=2, samples=1), small.caption(pixels, retrieve=2, samples=1)
        assert [len(result.documents) for result in results] == [images, captions]
        assert [len(result.dropped) for result in results] == [2 - images, 2 - captions]
        assert calls[0].prompts[0] == image_prompt(remembered.items[:images], ids)
        assert calls[1].prompts[0] == caption_prompt(remembered.items[:captions], run.images.encode([pixels])[0])
        assert calls[1].draws[0].count == longest


def test_a_caption_that_leaves_no_room_for_an_image_is_refused(run: Model):
    with pytest.raises(
        InputError, match=r"a prompt of \d+ ids without its documents, and 25 to draw, exceed the 40 positions"
    ):
        with_members(run, model=run.model.clone(max_positions=40)).generate("a fox and an owl " * 4)


def test_the_retriever_is_swapped_and_the_model_stays(experiment: Experiment, store: Workdir, run: Model):
    random = replace(experiment, retriever=Random(num_neighbors=16))
    swapped = Model(replace(random, batches=replace(experiment.batches, retrieved="text")), store, experiment)
    assert (run.builder.retrieved, swapped.builder.retrieved) == ("document", "text")
    assert len(swapped.memory().memory) == 48  # unseen entities too, which training never retrieves
    assert keys(swapped.retrieve(PROMPT)) != keys(run.retrieve(PROMPT))
    first, again, other = (keys(swapped.retrieve(text, k=8)) for text in (PROMPT, PROMPT, "an owl"))
    assert first == again
    assert set(first) != set(other)  # each prompt has its own draw
    alone = Model(replace(experiment, retriever=NoRetriever()), store)
    assert alone.retrieve(PROMPT) == []

    def table(run: Model) -> np.ndarray:
        return np.asarray(run.engine.weights["token_embedding"])

    trained = Model(experiment, store).params["params"]["token_embedding"]
    for each, same in ((run, True), (swapped, True), (alone, False)):
        assert np.array_equal(table(each), trained) is same


def test_another_retriever_shares_all_that_is_open_but_the_indexes(
    experiment: Experiment, store: Workdir, monkeypatch: pytest.MonkeyPatch
):
    restored = []

    class Counted(rac3.run.Checkpoints):
        def restore_params(self, like, step=None):
            restored.append(like)
            return super().restore_params(like, step)

    monkeypatch.setattr(rac3.run, "Checkpoints", Counted)
    run = Model(experiment, store)
    random = run.with_retriever(Random(num_neighbors=16))
    assert random.params is run.params
    assert len(restored) == 1
    assert (random.encoder, random.images, random.tokenizer) == (run.encoder, run.images, run.tokenizer)
    for split in ("train", "memory", "test"):
        assert random.documents(split) is run.documents(split)
    assert random.embeddings("train") is run.embeddings("train")
    assert (random.experiment, random.trained) == (replace(experiment, retriever=Random(num_neighbors=16)), experiment)
    assert random.training_recipe.fingerprint == run.training_recipe.fingerprint
    of_random = recipes.evaluation(random.experiment, experiment).fingerprint
    assert random.evaluation_recipe.fingerprint == of_random != run.evaluation_recipe.fingerprint
    for mine, theirs in zip(run.memory().indexes, random.memory().indexes, strict=True):
        assert type(mine) is not type(theirs)
    # Of one index on disk, two openings: this retriever finds fewer.
    few = run.with_retriever(replace(experiment.retriever, num_neighbors=3))
    assert few.recipe(recipes.index, "train").fingerprint == run.recipe(recipes.index, "train").fingerprint
    assert few.memory().parts[0] is run.memory().parts[0]
    for _ in range(2):
        assert len(few.retrieve(PROMPT, k=8)) <= 3 < len(run.retrieve(PROMPT, k=8))
    assert run.with_retriever(experiment.retriever).memory() is run.memory()  # opened once
