"""A handful of documents, and encoders in plain NumPy: the offline stages run on them in a moment.

An image is any bytes here: nobody decodes it. What a text or an image becomes is a function of its content alone, which
a test can compute again.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tiny_config

from rac3 import recipes
from rac3.artifacts.workdir import Workdir
from rac3.documents.document import Document, Image, Reject, Text
from rac3.experiment import Experiment

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


ASKED: list[tuple[str | bytes, tuple[int, ...], float]] = []  # of every PlainEncoder: content, key, rate; in order


@dataclass(frozen=True)
class PlainEncoder:
    """An encoder of a config's own, whose vectors are hashes of the contents."""

    dtype: str = "float32"
    width = WIDTH

    def embed_texts(self, texts: Sequence[str], *, drop_keys=None, drop_rate: float = 0.2) -> np.ndarray:
        return self._embed(texts, drop_keys, drop_rate)

    def embed_images(self, images: Sequence[Image], *, drop_keys=None, drop_rate: float = 0.2) -> np.ndarray:
        return self._embed([image.data for image in images], drop_keys, drop_rate)

    def _embed(self, contents: Sequence[str | bytes], keys, rate: float) -> np.ndarray:
        numbers = [()] * len(contents) if keys is None else map(tuple, np.asarray(jax.random.key_data(keys)).tolist())
        asked = [(content, key, rate if key else 0.0) for content, key in zip(contents, numbers, strict=True)]
        ASKED.extend(asked)
        return np.stack([vector(*each) for each in asked])


def codes_of(data: bytes, codebook_size: int = CODES, tokens_per_image: int = PER_IMAGE) -> np.ndarray:
    return random(data).integers(0, codebook_size, tokens_per_image).astype(np.int32)


@dataclass(frozen=True)
class PlainCodec:
    """An image tokenizer of a config's own, whose codes are a hash of the image."""

    codebook_size: int = CODES
    tokens_per_image: int = PER_IMAGE
    resolution = 2

    def encode(self, images: Sequence[Image]) -> np.ndarray:
        codes = [codes_of(image.data, self.codebook_size, self.tokens_per_image) for image in images]
        return np.stack([np.zeros(self.tokens_per_image, np.int32), *codes])[1:]

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Each of one gray, that of its first code."""
        gray = (codes[:, 0] % 256).astype(np.uint8)
        return np.tile(gray[:, None, None, None], (1, 2, 2, 3))


def experiment_of(sources: Mapping[str, Sequence[Sequence[Document | Reject]]], **fields: Any) -> Experiment:
    """The tiny config over these shards: train, those held out, and parts of the memory. An id is a byte of text.

    Its encoder and its image tokenizer are the plain ones.
    """
    SHARDS.update({name: list(map(list, shards)) for name, shards in sources.items()})
    splits = {name: Listed(name) for name in sources}
    held_out = {name: splits.pop(name, None) for name in ("validation", "tuning", "test")}
    tiny = tiny_config.get_config()
    data = replace(tiny.data, train=splits.pop("train"), memory=splits, fit_on=("train",), **held_out)
    plain: dict[str, Any] = {"vqgan": PlainCodec(), "clip": PlainEncoder()}
    return replace(tiny, data=data, text=replace(tiny.text, vocab_size=256), **plain | fields)


def workdir_of(experiment: Experiment, folder: Path) -> Workdir:
    """A workdir that has a tokenizer, fitted on nothing; the plain encoders need no artifact."""
    workdir = Workdir(folder, experiment.name)
    with workdir.write(recipes.text(experiment)) as draft:
        experiment.text.fit([], draft.folder)
    return workdir
