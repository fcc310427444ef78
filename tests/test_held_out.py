"""Held-out documents: what stands for an entity in the memory, and who tells what a picture shows."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from replaced import with_members

from rac3 import held_out
from rac3.artifacts.workdir import Workdir
from rac3.documents.document import Document, Image, Text, encode_png
from rac3.documents.store import TokenizedDocument
from rac3.experiment import Experiment
from rac3.held_out import judge, shown_in_memory
from rac3.run import Run


class Other:
    """A source that draws no emblems."""

    shards = read = lambda *_: ()


class Store:
    """Documents by their numbers."""

    def __init__(self, items: Sequence[TokenizedDocument]) -> None:
        self.items, self.read = items, 0

    def __len__(self) -> int:
        return len(self.items)

    def many(self, rows: Sequence[int]) -> list[TokenizedDocument]:
        self.read += len(rows)
        return [self.items[row] for row in rows]


VECTORS = {1: (1.0, 0.0), 2: (0.0, 1.0), 3: (0.8, 0.6)}  # of a picture, by the value of its pixels


class TableEncoder:
    """An encoder that knows three pictures."""

    width = 2

    def embed_images(self, images: Sequence[Any]) -> np.ndarray:
        pixels = [image.pixels() if isinstance(image, Image) else image for image in images]
        return np.array([VECTORS[int(each[0, 0, 0])] for each in pixels], np.float32)


def picture(value: int) -> np.ndarray:
    return np.full((2, 2, 3), value, np.uint8)


def item(key: str, name: str | None, value: int | None) -> TokenizedDocument:
    """Of this entity, with this picture; None is none."""
    parts = (Text(key),) if value is None else (Text(key), Image(encode_png(picture(value))))
    metadata = {} if name is None else {"entity": name}
    return TokenizedDocument(Document(key, parts, metadata), tuple(np.zeros(1, np.int32) for _ in parts))


@pytest.fixture(scope="module")
def run(experiment: Experiment, store: Workdir) -> Run:
    return Run(experiment, store)


def remembering(run: Run, parts: Mapping[str, Sequence[TokenizedDocument]], withdrawn: Sequence[int] = ()) -> Any:
    """The run with these parts of the memory, a hand-made encoder, and a source that is not the procedural world."""
    stores = {part: Store(items) for part, items in parts.items()}
    return with_members(
        run,
        replace(run.experiment, data=replace(run.experiment.data, train=Other())),
        stores=stores,
        documents=lambda _, part: stores[part],
        withdrawn_rows=lambda _, part: np.array(withdrawn if part == "train" else [], np.int64),
        encoder=TableEncoder(),
    )


TRAIN = [
    item("t0", "a", 1),
    item("t1", "b", 3),
    item("t2", "a", None),
    item("t3", None, 1),
    item("t4", "a", 2),
    item("t5", "c", 1),
]
MEMORY = [item("m0", "b", 3), item("m1", "a", 2), item("m2", "a", 2), item("m3", "a", 1)]


def keys(found: Mapping[str, Sequence[TokenizedDocument]]) -> dict[str, list[str]]:
    return {name: [each.document.key for each in items] for name, items in found.items()}


@pytest.mark.parametrize("at_once", [1, 4, 1024])
def test_an_entity_is_shown_by_its_first_documents_with_an_image(at_once: int, run: Run, monkeypatch):
    monkeypatch.setattr(held_out, "READ", at_once)
    whole = remembering(run, {"train": TRAIN, "memory": MEMORY})
    assert keys(shown_in_memory(whole, "test", ["a", "b", "x", ""], 3)) == {"a": ["t0", "t4", "m1"], "b": ["t1", "m0"]}
    assert keys(shown_in_memory(whole, "validation", ["c"], 3)) == {"c": ["t5"]}
    assert shown_in_memory(whole, "test", [], 3) == {}
    less = remembering(run, {"train": TRAIN, "memory": MEMORY}, withdrawn=[1, 4])
    assert keys(shown_in_memory(less, "test", ["a", "b"], 3)) == {"a": ["t0", "m1", "m2"], "b": ["m0"]}


def test_no_more_of_the_memory_is_read_than_needed(run: Run, monkeypatch):
    monkeypatch.setattr(held_out, "READ", 2)
    whole = remembering(run, {"train": TRAIN, "memory": MEMORY})
    shown_in_memory(whole, "test", ["a", "b"], 1)
    assert [store.read for store in whole.stores.values()] == [2, 0]


def test_the_encoder_tells_by_the_mean_of_four_pictures(run: Run):
    """Of a: 1, 2, 2 and 2, with mean (1/4, 3/4); the fifth, which is 1, is not looked at. Of b: 3, with (0.8, 0.6).

    Picture 1 is most similar to one of a, but on average to b: 0.25 against 0.8.
    """
    tell = judge(remembering(run, {"train": TRAIN, "memory": MEMORY}), "test", ["b", "a", "a"])
    assert tell is not None
    assert tell(np.stack([picture(value) for value in (1, 2, 2, 1)])) == ["b", "a", "a", "b"]
    assert judge(remembering(run, {"train": TRAIN, "memory": MEMORY}), "test", ["x"]) is None
    assert judge(remembering(run, {"train": [], "memory": []}), "test", ["a"]) is None


def test_the_emblem_tells_in_the_procedural_world(run: Run):
    """Among all of its entities: those that are asked about play no part."""
    items = run.documents("test").many(range(4))
    tell = judge(run, "test", [])
    assert tell is not None
    pixels = np.stack([each.document.images[0].pixels() for each in items])
    assert tell(pixels) == [each.document.metadata["entity"] for each in items]
