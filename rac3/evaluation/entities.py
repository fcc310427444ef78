"""Accuracy of what generated images show and generated captions name: the entity alone, or jointly with all else.

An image is right jointly if every field that its source judges has the value of the document's metadata; a caption if
it holds all of these values. A copied document shows the entity, but seldom what else is asked for.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from rac3.documents.document import Document


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


def values_of(document: Document, fields: Iterable[str]) -> dict[str, str]:
    """What a document shows, by those of the metadata fields that it has."""
    found = {field: entity_of(document, field) for field in fields}
    return {field: value for field, value in found.items() if value is not None}


def shown_accuracy(shown: Sequence[Mapping[str, str]], wanted: Sequence[Mapping[str, str]]) -> float:
    """Share of the images that show every wanted value.

    Args:
      shown: what each image shows, as a `Judge` says.
      wanted: of each image, the values of some fields.
    """
    return float(np.mean([right.items() <= found.items() for found, right in zip(shown, wanted, strict=True)]))


def named_accuracy(captions: Sequence[str], wanted: Sequence[Mapping[str, str]]) -> float:
    """Share of the captions that contain every wanted value as whole words, in any case."""
    pairs = zip(captions, wanted, strict=True)
    return float(np.mean([all(names(caption, value) for value in right.values()) for caption, right in pairs]))


def names(caption: str, value: str) -> bool:
    """Whether a caption contains a value as whole words, in any case."""
    return re.search(rf"(?<!\w){re.escape(value.lower())}(?!\w)", caption.lower()) is not None
