"""Embed: each document's text and image through frozen CLIP, and the training queries with dropout."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from rac3.arrays import create_array, open_array
from rac3.artifacts import Workdir
from rac3.documents.store import DocumentStore, TokenizedDocument
from rac3.experiment import Experiment, Split
from rac3.progress import Progress
from rac3.retrieval.encoder import MixedEncoder, mix, query_dropout_keys
from rac3.retrieval.memory import EmbeddingRows
from rac3.stages import recipes
from rac3.stages.encoders import open_clip

BLOCK = 1024  # documents that are embedded, and written, at once
PARTS = ("text", "image")


def embed(experiment: Experiment, workdir: Workdir) -> None:
    """Makes the embeddings of every split that has none yet."""
    missing = [split for split in experiment.data.sources() if not workdir.find(recipes.embeddings(experiment, split))]
    if not missing:
        return
    encoder = open_clip(experiment, workdir)
    for split in missing:
        documents = open_documents(experiment, workdir, split)
        with workdir.write(recipes.embeddings(experiment, split)) as draft:
            _embed_split(experiment, split, documents, encoder, draft.folder)
            draft.counts["documents"] = len(documents)


def open_documents(experiment: Experiment, workdir: Workdir, split: Split) -> DocumentStore:
    return DocumentStore(workdir.require(recipes.documents(experiment, split), "rac3 ingest").folder)


def _embed_split(
    experiment: Experiment, split: Split, documents: DocumentStore, encoder: MixedEncoder, folder: Path
) -> None:
    """Blocks in order; a block is done when its marker is there. Query embeddings are of the training split only."""
    names = [*PARTS, *(f"query_{part}" for part in PARTS if split == "train")]
    shape = (len(documents), encoder.clip.config.projection_dim)
    arrays = {name: create_array(folder / name, shape, "float32") for name in names}
    with Progress(f"embed {split}", len(documents), "documents") as bar:
        for start in range(0, len(documents), BLOCK):
            stop = min(start + BLOCK, len(documents))
            marker = folder / f"{start:09d}.done"
            if not marker.exists():
                items = documents.many(range(start, stop))
                for name, rows in _embed_block(experiment, items, encoder, dropped=split == "train").items():
                    arrays[name][start:stop].write(rows).result()
                marker.touch()
            bar.update(stop - start)
    for marker in folder.glob("*.done"):
        marker.unlink()


def _embed_block(
    experiment: Experiment, items: Sequence[TokenizedDocument], encoder: MixedEncoder, dropped: bool
) -> dict[str, Float[np.ndarray, "documents embed"]]:
    """Vectors by name; a part that a document lacks is zeros. A document of several images has their first."""
    texts = [item.document.text for item in items]
    has_text = [row for row, text in enumerate(texts) if text]
    has_image = [row for row, item in enumerate(items) if item.document.images]
    images = [items[row].document.images[0] for row in has_image]
    out = {}
    for prefix in ("", "query_") if dropped else ("",):
        keys = query_dropout_keys(experiment.seed, [item.document.key for item in items]) if prefix else None
        for part, rows in (("text", has_text), ("image", has_image)):
            chosen = None if keys is None else keys[np.array(rows, int)]
            rate = experiment.query_dropout
            vectors = np.zeros((len(items), encoder.clip.config.projection_dim), np.float32)
            if rows:
                vectors[rows] = (
                    encoder.embed_texts([texts[row] for row in rows], drop_keys=chosen, drop_rate=rate)
                    if part == "text"
                    else encoder.embed_images(images, drop_keys=chosen, drop_rate=rate)
                )
            out[prefix + part] = vectors
    return out


class DocumentEmbeddings:
    """The mixed-modal vectors of a split (paper, eq. 1), read and mixed when rows are asked for."""

    def __init__(self, folder: Path) -> None:
        self._text, self._image = open_array(folder / "text"), open_array(folder / "image")
        self.shape: tuple[int, ...] = tuple(self._text.shape)

    def __getitem__(self, rows: slice | np.ndarray) -> Float[np.ndarray, "rows embed"]:
        reading = [array[rows].read() for array in (self._text, self._image)]
        text, image = (np.asarray(future.result()) for future in reading)
        return mix(text, image, np.asarray(text.any(1)), np.asarray(image.any(1)))


def document_embeddings(folder: Path) -> EmbeddingRows:
    """The mixed-modal vectors of a split: in memory if they take at most a quarter of it, else read when asked for."""
    embeddings = DocumentEmbeddings(folder)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return embeddings[:] if 4 * math.prod(embeddings.shape) <= memory // 4 else embeddings


def query_embeddings(folder: Path, part: str, training: bool) -> Float[np.ndarray, "documents embed"]:
    """The vectors of one query part; zeros where a document lacks it."""
    name = f"query_{part}" if training else part
    return np.asarray(open_array(folder / name).read().result())
