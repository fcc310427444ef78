"""Documents of several sources: evenly from all shards, and only those that pass the filter."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from rac3.config import InputError
from rac3.documents.document import Document, Reject, Text
from rac3.documents.filter import LaionFilter
from rac3.documents.reader import read_documents

DATA_DIR = Path("/somewhere")


@dataclass(frozen=True)
class Shelf:
    """A source of shards a, b and c with so many documents each; the first of a shard is damaged, the second unsafe."""

    name: str
    sizes: tuple[int, int, int]

    def shards(self, data_dir: Path) -> Sequence[str]:
        return [f"{data_dir}/{shard}" for shard in "abc"]

    def read(self, data_dir: Path, shard: str) -> Iterator[Document | Reject]:
        yield Reject("damaged", "image")
        yield Document("unsafe", (Text("x"),), {"punsafe": 0.9})
        for number in range(self.sizes["abc".index(shard.removeprefix(f"{data_dir}/"))]):
            yield Document(f"{self.name}:{shard.removeprefix(f'{data_dir}/')}{number}", (Text("x"),), {"punsafe": 0.1})


TRAIN, MEMORY = Shelf("train", (5, 1, 6)), Shelf("memory", (2, 2, 2))


def keys(limit: int, **sources: Shelf) -> list[str]:
    return [document.key for document in read_documents(sources, DATA_DIR, LaionFilter(), limit)]


def test_documents_come_evenly_from_all_shards_and_pass_the_filter():
    few = ["train:a0", "train:a1", "train:b0", "train:c0", "train:c1"]
    assert keys(6, train=TRAIN) == few  # two of each shard that has them
    assert keys(5, train=TRAIN) == few
    assert keys(4, train=TRAIN) == few[:4]
    assert keys(3, train=TRAIN) == ["train:a0", "train:b0", "train:c0"]
    assert len(keys(1000, train=TRAIN)) == 12


def test_all_sources_are_read_in_their_order():
    both = [f"{split}:{shard}0" for split in ("train", "memory") for shard in "abc"]
    assert keys(6, train=TRAIN, memory=MEMORY) == both
    assert keys(6, memory=MEMORY, train=TRAIN) == both[3:] + both[:3]
    assert keys(1, memory=MEMORY) == ["memory:a0"]


def test_sources_without_a_document_that_passes_are_refused():
    with pytest.raises(InputError, match="of train and memory gives no documents that pass the filter"):
        keys(6, train=Shelf("train", (0, 0, 0)), memory=Shelf("memory", (0, 0, 0)))
