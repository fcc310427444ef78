"""Does a generated image show, or a generated caption name, the right entity?"""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from rac3.documents.world import Entity, nearest_entities


def emblem_accuracy(
    images: UInt8[np.ndarray, "images height width 3"], wanted: Sequence[str], entities: Sequence[Entity]
) -> float:
    """Share of the images of the procedural world whose emblem is nearest, in pixels, to the wanted entity's."""
    names, _ = nearest_entities(images, entities)
    return float(np.mean([name == right for name, right in zip(names, wanted, strict=True)]))


def name_accuracy(captions: Sequence[str], wanted: Sequence[str]) -> float:
    """Share of the captions that hold the wanted name as whole words, whatever their case."""
    found = [
        re.search(rf"(?<!\w){re.escape(name.lower())}(?!\w)", caption.lower()) is not None
        for caption, name in zip(captions, wanted, strict=True)
    ]
    return float(np.mean(found))
