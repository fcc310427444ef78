"""Accuracy of entities: whether a generated image shows, or a generated caption names, the right one."""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from rac3.documents.document import Document
from rac3.documents.world import Entity, nearest_entities


def entity_of(document: Document, field: str) -> str | None:
    """What a document shows, by the metadata field that names it; None if it has no name there."""
    name = document.metadata.get(field) if field else None
    return None if name is None else str(name).strip() or None


def left_out(split: str, field: str, documents: int, without: int) -> str:
    """One line about documents that no figure about entities counts; "" if there are none."""
    if not without:
        return ""
    if without == documents:
        return f"{split}: no document has {field!r} in its metadata, so there is no accuracy or recall of entities"
    return f"{split}: {without} of {documents} documents have no {field!r} in their metadata; accuracies leave them out"


def emblem_accuracy(
    images: UInt8[np.ndarray, "images height width 3"], wanted: Sequence[str], entities: Sequence[Entity]
) -> float:
    """Share of the images whose emblem is nearest, in pixels, to that of the wanted entity of the procedural world."""
    names, _ = nearest_entities(images, entities)
    return float(np.mean([name == right for name, right in zip(names, wanted, strict=True)]))


def name_accuracy(captions: Sequence[str], wanted: Sequence[str]) -> float:
    """Share of the captions that contain the wanted name as whole words, in any case."""
    found = [
        re.search(rf"(?<!\w){re.escape(name.lower())}(?!\w)", caption.lower()) is not None
        for caption, name in zip(captions, wanted, strict=True)
    ]
    return float(np.mean(found))
