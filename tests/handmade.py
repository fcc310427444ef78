"""A handful of documents, and encoders in plain NumPy: the offline stages run on them in a moment.

An image is any bytes here: nobody decodes it. What a text or an image becomes is a function of its content alone, which
a test can compute again.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_config

from rac3 import recipes
from rac3.artifacts.workdir import Workdir
from rac3.documents.document import Document, Image, Reject, Text
from rac3.experiment import Experiment
from rac3.run import Run
from rac3.vqgan.codec import VQGANCodec

WIDTH = 8
CODES, PER_IMAGE = 64, 4
SHARDS: dict[str, list[list[Document | Reject]]] = {}  # of each source, by its name


@dataclass(frozen=True)
class Listed:
    """The documents of `SHARDS[name]`."""

    name: str

    def shards(self, data_dir: Path) -> Sequence[str]:
        return [f"shard-{number}" for number in range(len(SHARDS[self.name]))]

    def read(self, data_dir: Path, shard: str) -> Iterator[Document | Reject]:
        yield from SHARDS[self.name][int(shard.removeprefix("shard-"))]


def document(key: str, *parts: str | bytes, **metadata: float) -> Document:
    """Of texts and images in this order."""
    return Document(key, tuple(Text(part) if isinstance(part, str) else Image(part) for part in parts), metadata)


def random(*content: str | bytes | float) -> np.random.Generator:
    return np.random.default_rng(
        [zlib.crc32(part if isinstance(part, bytes) else str(part).encode()) for part in content]
    )


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def vector(content: str | bytes, key: Sequence[int] = (), rate: float = 0.0) -> np.ndarray:
    """Of a text or an image; with query dropout, one that is near it."""
    plain = random(content).normal(size=WIDTH)
    noise = random(content, *key, rate).normal(size=WIDTH) if key else 0
    return unit(plain + rate * noise)


class PlainEncoder:
    """An encoder of a user's own, which notes how it was asked: (content, key, rate), one of each item."""

    width = WIDTH

    def __init__(self) -> None:
        self.asked: list[tuple[str | bytes, tuple[int, ...], float]] = []

    def embed_texts(self, texts: Sequence[str], *, drop_keys=None, drop_rate: float = 0.2) -> np.ndarray:
        return self._embed(texts, drop_keys, drop_rate)

    def embed_images(self, images: Sequence[Image], *, drop_keys=None, drop_rate: float = 0.2) -> np.ndarray:
        return self._embed([image.data for image in images], drop_keys, drop_rate)

    def _embed(self, contents: Sequence[str | bytes], keys, rate: float) -> np.ndarray:
        numbers = [()] * len(contents) if keys is None else map(tuple, np.asarray(jax.random.key_data(keys)).tolist())
        asked = [(content, key, rate if key else 0.0) for content, key in zip(contents, numbers, strict=True)]
        self.asked += asked
        return np.stack([vector(*each) for each in asked])


def codes_of(data: bytes) -> np.ndarray:
    return random(data).integers(0, CODES, PER_IMAGE).astype(np.int32)


class PlainCodec(VQGANCodec):
    """Codes that are a hash of the image."""

    codebook_size, tokens_per_image, resolution = CODES, PER_IMAGE, 2

    def __init__(self) -> None:
        pass

    def encode(self, images: Sequence[Image]) -> np.ndarray:
        return np.stack([np.zeros(PER_IMAGE, np.int32), *(codes_of(image.data) for image in images)])[1:]


def experiment_of(sources: Mapping[str, Sequence[Sequence[Document | Reject]]], **fields: object) -> Experiment:
    """The tiny config over these shards: train, validation, test, and parts of the memory. An id is a byte of text."""
    SHARDS.update({name: list(map(list, shards)) for name, shards in sources.items()})
    splits = {name: Listed(name) for name in sources}
    held_out = {name: splits.pop(name, None) for name in ("validation", "test")}
    tiny = tiny_config.get_config()
    data = replace(tiny.data, train=splits.pop("train"), memory=splits, fit_on=("train",), **held_out)
    return replace(tiny, data=data, text=replace(tiny.text, vocab_size=256), **fields)


@contextmanager
def plain_encoders(experiment: Experiment, folder: Path) -> Iterator[tuple[Workdir, PlainEncoder]]:
    """A workdir that has these encoders, and a tokenizer that is fitted on nothing."""
    workdir, encoder = Workdir(folder, experiment.name), PlainEncoder()
    with workdir.write(recipes.text(experiment)) as draft:
        experiment.text.fit([], draft.folder)
    for recipe in (recipes.vqgan(experiment), recipes.clip(experiment)):
        with workdir.write(recipe):
            pass
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "encoder", encoder)
        patch.setattr(Run, "images", PlainCodec())
        yield workdir, encoder
