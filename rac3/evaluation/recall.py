"""Recall of retrieval: whether the right documents are among the first neighbors."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from rac3.clip.encoder import mix
from rac3.documents.document import Document

KS = (1, 5, 10)
BLOCK_SCORES = 2**24  # scores in memory at once: 64 MiB for any number of documents
TIE = 1e-6  # between scores of vectors of norm 1: float32 sums differ this much from row to row


def recall_at(
    k: int,
    neighbors: Int[np.ndarray, "queries depth"],
    query_entities: Sequence[str | None],
    memory_entities: Sequence[str | None] | Mapping[int, str | None],
) -> float | None:
    """Share of the queries that have a document of their entity among the first `k` neighbors.

    Queries without an entity (None) do not count; None if there are no others.

    Args:
      neighbors: memory ids, best first; -1 is none.
      memory_entities: by memory id, of all documents or only of those in `neighbors`.
    """
    hits = [
        any(number >= 0 and memory_entities[number] == entity for number in row[:k].tolist())
        for row, entity in zip(neighbors, query_entities, strict=True)
        if entity is not None
    ]
    return float(np.mean(hits)) if hits else None


def pair_recall(
    ks: Sequence[int],
    queries: Float[np.ndarray, "documents embed"],
    answers: Float[np.ndarray, "documents embed"],
    texts: Int[np.ndarray, " documents"],
    images: Int[np.ndarray, " documents"],
) -> dict[int, float]:
    """For each k, the share of the queries with a right answer among the `k` of highest inner product.

    Row i of `queries` and row i of `answers` are the two parts of document i, with L2 norm 1. Captions and pictures
    repeat, so an answer is right if its document has the text or the image of the query's. A wrong answer that ties
    with the best right one ranks above it: a model that gives all documents the same vector finds nothing.

    Args:
      texts, images: numbers that are equal where the texts, or the images, of documents are equal.
    """
    documents = len(queries)
    block = max(1, BLOCK_SCORES // max(1, documents))
    ranks = np.zeros(documents, np.int64)
    for start in range(0, documents, block):
        rows = slice(start, start + block)
        scores = queries[rows] @ answers.T
        right = (texts[rows, None] == texts) | (images[rows, None] == images)
        best = np.max(scores, axis=1, where=right, initial=-np.inf)
        ranks[rows] = np.sum(~right & (scores > best[:, None] - TIE), axis=1)
    return {k: float(np.mean(ranks < k)) for k in ks}


def clip_metrics(
    documents: Sequence[Document],
    text: Float[np.ndarray, "documents embed"],
    image: Float[np.ndarray, "documents embed"],
) -> dict[str, int | float]:
    """Recall at 1, 5 and 10, among the documents that have a text and an image, of the other half of each, and of the
    mixture that the memory holds of it (what the paper's appendix C.1 measures, for any source of pairs).

    `pairs` alone if no document has both.
    """
    rows = np.flatnonzero(text.any(1) & image.any(1)).tolist()
    metrics: dict[str, int | float] = {"pairs": len(rows)}
    if not rows:
        return metrics
    contents = [documents[row].text for row in rows], [documents[row].images[0].data for row in rows]
    captions, pictures = (np.unique(np.array(each, object), return_inverse=True)[1] for each in contents)
    text, image = text[rows], image[rows]
    has = np.ones(len(rows), bool)
    both = mix(text, image, has, has)
    for name, queries, answers in (
        ("text_to_image", text, image),
        ("image_to_text", image, text),
        ("text_to_document", text, both),
        ("image_to_document", image, both),
    ):
        recalls = pair_recall(KS, queries, answers, captions, pictures)
        metrics |= {f"{name}_recall_at_{k}": share for k, share in recalls.items()}
    return metrics
