"""The quickstart's world as a web crawl would have it: most documents are there twice.

    python benchmarks/ablations.py benchmarks/near_copies.py --workdir DIR --seeds 0 1 2 --steps 600

Web data are full of near copies: another compression of a picture, another stop after its caption. A model that
retrieves them in training learns to copy the document in front of it, and is lost where there is none: the paper's
reason for redundancy avoidance (section 3.2). In the quickstart's own world, where no document resembles another that
much, redundancy avoidance has nothing to do.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rac3.configs.quickstart import get_config as quickstart
from rac3.documents.document import Document, Image, Reject, Text, encode_png
from rac3.documents.world import World
from rac3.experiment import Experiment

SHIFT = 2  # how much brighter a copy is, of 255


@dataclass(frozen=True)
class NearCopies:
    """The documents of a source, each followed by a near copy: other bytes, and no new information."""

    source: World

    def shards(self, data_dir: Path) -> Sequence[str]:
        return self.source.shards(data_dir)

    def read(self, data_dir: Path, shard: str) -> Iterator[Document | Reject]:
        for document in self.source.read(data_dir, shard):
            yield document
            if isinstance(document, Document):
                yield near_copy(document)


def near_copy(document: Document) -> Document:
    """Pictures a little brighter, and a stop at the end of texts."""

    def changed(segment: Text | Image) -> Text | Image:
        if isinstance(segment, Text):
            return Text(f"{segment.text} .")
        pixels = np.minimum(segment.pixels().astype(np.int16) + SHIFT, 255).astype(np.uint8)
        return Image(encode_png(pixels))

    return Document(f"{document.key}-copy", tuple(map(changed, document.segments)), document.metadata)


def get_config(seed: int = 0) -> Experiment:
    config = quickstart(seed)
    train, memory = config.data.train, config.data.memory["memory"]
    if not isinstance(train, World) or not isinstance(memory, World):
        raise TypeError("the quickstart's documents are not those of a World")
    return replace(
        config,
        name="near_copies",
        data=replace(config.data, train=NearCopies(train), memory={"memory": NearCopies(memory)}),
    )
