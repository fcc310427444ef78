"""What a model made of one prompt: pictures or texts, best first, or probabilities; and what it had in context."""

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import Float, UInt8

from rac3.artifacts.workdir import write_atomic
from rac3.documents.document import Document, Text, encode_png

PICTURE = 128  # pixels of a picture in a notebook, at most; the files that `save` writes have their own size


Part = PIL.Image.Image | str  # of a sample


@dataclass(frozen=True)
class Answer:
    """The samples for one prompt. In a notebook it shows itself: the documents in context above the samples.

    Attributes:
      task: `draw`, `caption`, ...
      prompt: what was asked, as plain data.
      samples: best first; each is what was made, in order: most tasks make one picture or one text.
      scores: one for each sample; `score` names their unit.
      documents: in context, best first; `similarities` to the query, None for one that was given by hand.
      dropped: documents that did not fit into the context.
      notes: what else the caller should know, such as a text that was truncated.
      settings: seed, sampling, and the like, as plain data.
    """

    task: str
    prompt: dict[str, Any]
    samples: list[tuple[Part, ...]]
    scores: list[float]
    score: str
    documents: list[Document]
    similarities: list[float | None]
    dropped: list[Document]
    notes: list[str]
    settings: dict[str, Any]

    @property
    def images(self) -> list[PIL.Image.Image]:
        """The pictures of all samples."""
        return [part for sample in self.samples for part in sample if not isinstance(part, str)]

    @property
    def texts(self) -> list[str]:
        """The texts of all samples."""
        return [part for sample in self.samples for part in sample if isinstance(part, str)]

    def to_json(self, files: Sequence[str] = ()) -> str:
        """One line of JSON. Pictures are not in it: `files` names where each of `images` is, if it is anywhere."""
        names = iter(files or [""] * len(self.images))
        samples = [
            [{"text": part} if isinstance(part, str) else {"image": next(names)} for part in sample]
            for sample in self.samples
        ]
        plain = {
            "task": self.task,
            "prompt": self.prompt,
            "samples": samples,
            "scores": [round(score, 6) for score in self.scores],
            "score": self.score,
            "documents": plain_documents(self.documents, self.similarities),
            "dropped": [document.key for document in self.dropped],
            "notes": self.notes,
            "settings": self.settings,
        }
        return json.dumps(plain, ensure_ascii=False, allow_nan=False)

    def save(self, folder: Path, name: str) -> list[str]:
        """Writes the pictures as `NAME-0.png`, `NAME-1.png`, ..., each whole or not at all; returns these names."""
        folder.mkdir(parents=True, exist_ok=True)
        names = [f"{name}-{number}.png" for number in range(len(self.images))]
        for image, file in zip(self.images, names, strict=True):
            write_atomic(folder / file, encode_png(np.asarray(image)))
        return names

    def _repr_html_(self) -> str:
        shown = [_document(*each) for each in zip(self.documents, self.similarities, strict=True)]
        made = [
            _figure(sample, f"{self.score} {value:.3g}")
            for sample, value in zip(self.samples, self.scores, strict=True)
        ]
        notes = [f"{document.key} did not fit into the context" for document in self.dropped] + self.notes
        strips = [*([_strip("in context", shown)] if shown else []), _strip(self.task, made)]
        return "".join([*strips, *(f"<p>{html.escape(note)}</p>" for note in notes)])


@dataclass(frozen=True)
class Classified:
    """How probable each label of an image is.

    Attributes:
      probabilities: of each label, the most probable first.
      notes: as of `Answer`.
    """

    probabilities: dict[str, float]
    notes: list[str]


@dataclass(frozen=True, eq=False)
class Likelihood:
    """The log-likelihood of a segment of a document.

    Attributes:
      log_probs: of each id, in nats.
      documents, similarities, dropped, notes: as of `Answer`.
    """

    log_probs: Float[np.ndarray, " ids"]
    documents: list[Document]
    similarities: list[float | None]
    dropped: list[Document]
    notes: list[str]


def plain_documents(documents: Sequence[Document], similarities: Sequence[float | None]) -> list[dict[str, Any]]:
    """The documents of a context as plain data."""
    return [
        {"key": document.key, "text": document.text, "similarity": None if value is None else round(value, 6)}
        for document, value in zip(documents, similarities, strict=True)
    ]


def _document(document: Document, similarity: float | None) -> str:
    parts = [
        segment.text if isinstance(segment, Text) else PIL.Image.fromarray(segment.pixels())
        for segment in document.segments
    ]
    return _figure(parts, "given" if similarity is None else f"similarity {similarity:.2f}")


def _figure(parts: Sequence[Part], caption: str) -> str:
    inside = "".join(f"<div>{html.escape(part)}</div>" if isinstance(part, str) else _picture(part) for part in parts)
    style = f"max-width:{2 * PICTURE}px;margin:0"
    return f"<figure style='{style}'>{inside}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _strip(title: str, cells: list[str]) -> str:
    row = f"<div style='display:flex;flex-wrap:wrap;gap:8px'>{''.join(cells)}</div>"
    return f"<div><b>{html.escape(title)}</b></div>{row}"


def _picture(image: PIL.Image.Image) -> str:
    return f"<img style='width:{PICTURE}px;image-rendering:pixelated' src='{png_uri(np.asarray(image))}'>"


def png_uri(pixels: UInt8[np.ndarray, "height width 3"]) -> str:
    """A picture as the `src` of an `<img>`."""
    return "data:image/png;base64," + base64.b64encode(encode_png(pixels)).decode()
