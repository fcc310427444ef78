"""A near copy of each document: nearly the same picture and words, which redundancy avoidance tells from others."""

from pathlib import Path
from types import ModuleType

import numpy as np

from rac3.documents.document import Document, Image, Source, encode_png
from rac3.documents.world import World

WORLD = World("train", seen=5, unseen=2, documents_per_entity=3, documents_per_shard=4)


def read(source: Source) -> list[Document]:
    return [document for shard in source.shards(Path()) for document in source.read(Path(), shard)]


def test_each_document_has_one_copy_right_after_it(near_copies: ModuleType):
    documents, both = read(WORLD), read(near_copies.NearCopies(WORLD))
    assert [each.key for each in both[::2]] == [each.key for each in documents]
    assert [each.text for each in both[::2]] == [each.text for each in documents]
    assert len({each.key for each in both}) == len(both) == 30
    for document, copy in zip(both[::2], both[1::2], strict=True):
        assert copy.text == f"{document.text} ."
        assert copy.metadata == document.metadata
        apart = copy.images[0].pixels().astype(int) - document.images[0].pixels()
        assert (apart >= 0).all()
        assert apart.max() == 2


def test_what_is_asked_for_has_no_copies(near_copies: ModuleType):
    config = near_copies.get_config(seed=3)
    assert config.seed == 3
    assert {type(source) for source in (config.data.test, config.data.tuning, config.data.validation)} == {World}
    assert {type(source) for source in (config.data.train, *config.data.memory.values())} == {near_copies.NearCopies}
    assert config.data.train.source == near_copies.quickstart(3).data.train


def test_a_white_pixel_stays_white(near_copies: ModuleType):
    white = Document("white", (Image(encode_png(np.full((4, 4, 3), 254, np.uint8))),), {})
    assert (near_copies.near_copy(white).images[0].pixels() == 255).all()
