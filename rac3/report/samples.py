"""What the report shows of a held-out split: a few documents, and what each model made of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from rac3.documents.document import Document, Image, Judge, prepare_image
from rac3.documents.store import TokenizedDocument
from rac3.evaluation.entities import entity_of, names, values_of
from rac3.experiment import Split
from rac3.report.page import Captioned, Mark, Picture, Strip
from rac3.report.table import model_label
from rac3.run import PARTS, Run

SHOWN = 8  # documents


@dataclass(frozen=True)
class Samples:
    """Some documents of a held-out split, with what each model made of them.

    Attributes:
      rows: of the evaluation of each model: text, caption, what was retrieved.
      images: the generated images by model; one for each of `rows` with a text, in order.
      numbers: of the documents, in the split.
    """

    run: Run
    split: Split
    items: Sequence[TokenizedDocument]
    rows: Mapping[str, Sequence[Mapping[str, Any]]]
    images: Mapping[str, UInt8[np.ndarray, "n height width 3"]]
    numbers: Sequence[int] = range(SHOWN)

    @classmethod
    def open(cls, run: Run, split: Split, models: Mapping[str, Run], numbers: Sequence[int] | None = None) -> "Samples":
        """Opens documents of `split`, and of the evaluation of each model what was made of them.

        Args:
          numbers: of the documents; None is the first ones.
        """
        documents = run.documents(split)
        if numbers is None:
            numbers = range(min(len(documents), run.experiment.evaluation.documents, SHOWN))
        rows, images = {}, {}
        for name, model in models.items():
            made, drawn = _evaluated(model, split)
            places = {number: place for place, number in enumerate(_prompted(made))}
            rows[name] = [made[number] for number in numbers]
            images[name] = drawn[[places[number] for number in numbers if number in places]]
        return cls(run, split, documents.many(numbers), rows, images, numbers)

    def strips(self) -> list[Strip]:
        strips = []
        first = next(iter(self.rows.values()))
        for rank, number in enumerate(_prompted(first)):
            pictures = self._retrieved(number)
            pictures += [
                self._generated(name, np.asarray(images[rank]), number) for name, images in self.images.items()
            ]
            pictures.append(Picture("truth", self._pixels(self.items[number].document)))
            strips.append(Strip(first[number]["text"], pictures))
        return strips

    def captions(self) -> list[Captioned]:
        """Pictures with their captions; evaluation keeps captions only where every document has a picture."""
        made = []
        for number, item in enumerate(self.items):
            if not item.document.images or any(rows[number]["caption"] is None for rows in self.rows.values()):
                continue
            captions: dict[str, tuple[str, Mark | None]] = {"truth": (item.document.text, None)}
            for name, rows in self.rows.items():
                caption = rows[number]["caption"]
                wanted = self._wanted(item.document)
                mark = Mark(all(names(caption, value) for value in wanted.values()), "") if wanted else None
                captions[model_label(name)] = (caption, mark)
            made.append(Captioned(Picture("", self._pixels(item.document)), captions))
        return made

    def reconstructions(self) -> list[tuple[Picture, Picture]]:
        """First pictures of the documents, and what the VQGAN makes of their stored codes."""
        pictured = [item for item in self.items if item.document.images]
        if not pictured:
            return []
        codes = [
            next(
                ids for segment, ids in zip(item.document.segments, item.ids, strict=True) if isinstance(segment, Image)
            )
            for item in pictured
        ]
        decoded = self.run.images.decode(np.stack(codes))
        return [
            (Picture("original", self._pixels(item.document)), Picture("from codes", pixels))
            for item, pixels in zip(pictured, decoded, strict=True)
        ]

    def _retrieved(self, number: int) -> list[Picture]:
        """What the text of a document retrieved, with its similarity; empty for a model that does not retrieve."""
        first = next(iter(self.rows.values()))
        found = [i for i in first[number]["neighbors"][PARTS.index("text")] if i >= 0]
        found = found[: self.run.experiment.evaluation.num_retrieved]
        if not found:
            return []
        row = self.numbers[number]
        scores = self.run.neighbors(self.split, "scores")[row : row + 1][0, PARTS.index("text"), : len(found)]
        wanted = self._entity(self.items[number].document)
        pictures = []
        for memory_id, score in zip(found, scores, strict=True):
            document = self._remembered(memory_id)
            same = wanted is not None and self._entity(document) == wanted
            mark = Mark(same, "same" if same else "other") if wanted is not None else None
            pictures.append(Picture(f"found, {score:.2f}", self._pixels(document), document.text, mark))
        return pictures

    def _remembered(self, memory_id: int) -> Document:
        """A document by its global id in the memory, without opening indexes or embeddings."""
        for part in self.run.experiment.data.memory_splits("test"):
            store = self.run.documents(part)
            if memory_id < len(store):
                return store[memory_id].document
            memory_id -= len(store)
        raise IndexError(f"the memory ends {memory_id} documents before that")

    def _generated(self, name: str, pixels: UInt8[np.ndarray, "height width 3"], number: int) -> Picture:
        source, wanted = self.run.experiment.data.train, self._wanted(self.items[number].document)
        if not isinstance(source, Judge) or not wanted:
            return Picture(model_label(name), pixels)
        shown = source.shown(pixels[None])[0]
        wrong = [shown[field] for field, value in wanted.items() if shown.get(field, value) != value]
        return Picture(
            model_label(name), pixels, "", Mark(not wrong, f"wrong: {', '.join(wrong)}" if wrong else "right")
        )

    def _wanted(self, document: Document) -> dict[str, str]:
        """The entity that a document shows, and all else that its source judges; empty if it names no entity."""
        data = self.run.experiment.data
        judged = data.train.judged if isinstance(data.train, Judge) else ()
        return values_of(document, dict.fromkeys([data.entity_field, *judged])) if self._entity(document) else {}

    def _entity(self, document: Document) -> str | None:
        """What a document shows; None if that is not known."""
        return entity_of(document, self.run.experiment.data.entity_field)

    def _pixels(self, document: Document) -> UInt8[np.ndarray, "height width 3"] | None:
        """The first picture as the models see it."""
        if not document.images:
            return None
        return prepare_image(document.images[0].pixels(), self.run.images.resolution)


def by_similarity(run: Run, split: Split) -> list[int]:
    """The numbers of the evaluated documents with a text: first what the encoder finds drawn most like its text."""
    made, drawn = _evaluated(run, split)
    prompted = _prompted(made)
    if not prompted:
        return []
    texts = run.encoder.embed_texts([made[number]["text"] for number in prompted])
    similarities = np.einsum("pe,pe->p", texts, run.encoder.embed_images([*np.asarray(drawn)]))
    return [prompted[place] for place in np.argsort(-similarities, kind="stable").tolist()]


def _evaluated(run: Run, split: Split) -> tuple[list[dict[str, Any]], UInt8[np.ndarray, "n height width 3"]]:
    """What an evaluation has of each document, and the pictures of those with a text, on disk."""
    folder = run.evaluation().folder
    rows = json.loads((folder / f"{split}.json").read_text(encoding="utf-8"))
    return rows, np.load(folder / f"{split}.npy", mmap_mode="r", allow_pickle=False)


def _prompted(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """The places of the rows with a text, of which there are pictures."""
    return [place for place, row in enumerate(rows) if row["text"]]
