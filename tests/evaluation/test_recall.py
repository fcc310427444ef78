import numpy as np
import pytest

from rac3.documents.document import Document, Image, Text
from rac3.evaluation import recall
from rac3.evaluation.recall import clip_metrics, pair_recall, recall_at


def test_recall_counts_queries_with_their_entity_among_the_first_k() -> None:
    neighbors = np.array([[0, 1, 2], [2, 0, -1], [-1, -1, -1], [1, 2, 0]])
    memory = ["fox", "owl", "elk"]
    queries = ["fox", "fox", "elk", "fox"]
    assert recall_at(1, neighbors, queries, memory) == 1 / 4
    assert recall_at(2, neighbors, queries, memory) == 2 / 4
    assert recall_at(3, neighbors, queries, memory) == 3 / 4  # -1 is no document, not the last one


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def halves(count: int, width: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Text and image vectors of documents, somewhat alike."""
    rng = np.random.default_rng(seed)
    text = unit(rng.normal(size=(count, width)))
    return text.astype(np.float32), unit(text + rng.normal(size=(count, width))).astype(np.float32)


@pytest.mark.parametrize(("scores_at_once", "rows"), [(2**24, 40), (90, 2), (1, 1)])
def test_pair_recall_agrees_with_a_sort_in_blocks_too(
    monkeypatch: pytest.MonkeyPatch, scores_at_once: int, rows: int
) -> None:
    monkeypatch.setattr(recall, "BLOCK_SCORES", scores_at_once)
    queries, answers = halves(40)
    scored = []

    class Watched(np.ndarray):
        def __matmul__(self, other: np.ndarray) -> np.ndarray:
            scored.append(len(self))
            return np.asarray(self) @ other

    own = np.arange(40)
    order = np.argsort(-(queries @ answers.T), axis=1)
    expected = {k: np.mean([row in order[row, :k] for row in range(40)]) for k in (1, 5, 40)}
    assert 0.1 < expected[1] < expected[5] < expected[40] == 1
    assert pair_recall((1, 5, 40), queries.view(Watched), answers, own, own) == expected
    assert scored == [rows] * (40 // rows)


def test_a_model_of_one_vector_finds_nothing() -> None:
    """Ties count against the right answer: also those that differ in the last digit alone."""
    own = np.arange(300)
    same = np.broadcast_to(unit(np.ones((1, 48))).astype(np.float32), (300, 48))
    assert pair_recall((1, 5, 300), same, same, own, own) == {1: 0, 5: 0, 300: 1}
    rounded = (same * (1 + np.random.default_rng(0).integers(-1, 2, (300, 1)) * 1e-7)).astype(np.float32)
    assert pair_recall((1, 5), rounded, rounded, own, own) == {1: 0, 5: 0}
    queries, answers = halves(300)
    pairs = np.repeat(answers[::2], 2, axis=0)  # every answer is there twice: one wrong tie
    found = pair_recall((1, 2), queries, pairs, own, own)
    assert found[1] == 0 < found[2]


def test_equal_texts_and_equal_images_are_right_too() -> None:
    """Documents 0 and 1 have one caption, 2 and 3 one picture; each answer but one's own is that of the other."""
    queries = np.eye(5, dtype=np.float32)
    answers = queries[[1, 0, 3, 2, 4]]
    own = np.arange(5)
    assert pair_recall((1,), queries, answers, own, own) == {1: 1 / 5}
    assert pair_recall((1,), queries, answers, np.array([0, 0, 2, 3, 4]), own) == {1: 3 / 5}
    assert pair_recall((1,), queries, answers, np.array([0, 0, 2, 3, 4]), np.array([0, 1, 2, 2, 4])) == {1: 1}


def test_clip_metrics_of_documents() -> None:
    """Documents that lack a half are left out; a caption on two documents is one caption."""
    segments = [
        (Text("fox"), Image(b"1")), (Text("fox"), Image(b"2")), (Text("owl"),), (Text("elk"), Image(b"1"), Image(b"3")),
        (Image(b"4"),), (Text("hen"), Image(b"5")),
    ]  # fmt: skip
    documents = [Document(str(number), parts, {}) for number, parts in enumerate(segments)]
    vectors = np.eye(6, dtype=np.float32)
    text, image = vectors.copy(), vectors[[1, 0, 2, 3, 4, 5]]
    text[4] = image[2] = 0
    metrics = clip_metrics(documents, text, image)
    assert metrics == {"pairs": 4} | {
        f"{way}_recall_at_{k}": 1
        for way in ("text_to_image", "image_to_text", "text_to_document", "image_to_document")
        for k in (1, 5, 10)
    }
    swapped = clip_metrics(documents, text, image[[5, 1, 2, 3, 4, 0]])  # the second fox is nearest to the hen's picture
    assert swapped["text_to_image_recall_at_1"] == swapped["image_to_text_recall_at_1"] == 2 / 4
    assert swapped["text_to_image_recall_at_5"] == 1
    assert clip_metrics(documents[2:3], text[2:3], image[2:3]) == {"pairs": 0}


def test_queries_without_an_entity_do_not_count() -> None:
    neighbors = np.array([[0, 1], [1, 0], [1, 0], [-1, -1]])
    assert recall_at(1, neighbors, ["fox", None, "fox", None], ["fox", None]) == 0.5
    assert recall_at(2, neighbors, [None] * 4, [None, None]) is None  # two that are missing are not equal
