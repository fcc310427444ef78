"""Which vectors the embed stage makes of which documents, and in what form they are read."""

import os
from pathlib import Path

import numpy as np
import pytest

from rac3 import recipes
from rac3.artifacts.workdir import Workdir
from rac3.clip.encoder import mix, query_dropout_keys
from rac3.config import load_config_module
from rac3.experiment import Split
from rac3.retrieval.memory import MemoryPart
from rac3.run import Run


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("train", {"document", "text", "image"}),
        ("memory", {"document"}),
        ("validation", {"text", "image"}),
        ("test", {"text", "image"}),
    ],
)
def test_each_split_has_the_vectors_that_it_is_asked_for(
    split: Split, names: set[str], finished_workdir: tuple[Path, Path]
):
    experiment = load_config_module(str(finished_workdir[0])).get_config()
    workdir = Workdir(finished_workdir[1], "tiny")
    kinds = {"embeddings": recipes.embeddings, "queries": recipes.queries}
    folders = {name: found.folder for name, kind in kinds.items() if (found := workdir.find(kind(experiment, split)))}
    assert {path.name for folder in folders.values() for path in folder.iterdir() if path.is_dir()} == names
    run = Run(experiment, workdir)
    documents = [item.document for item in run.documents(split).many(range(4))]
    encoder = run.encoder
    texts, images = [document.text for document in documents], [document.images[0] for document in documents]
    text, image = encoder.embed_texts(texts), encoder.embed_images(images)
    if "document" in names:
        everywhere = np.ones(4, bool)
        np.testing.assert_allclose(
            run.embeddings(split)[:4], mix(text, image, everywhere, everywhere), atol=1e-5, rtol=0
        )
    if "text" in names:
        if split == "train":
            keys = query_dropout_keys(experiment.seed, [document.key for document in documents])
            dropout = {"drop_keys": keys, "drop_rate": experiment.query_dropout}
            text, image = encoder.embed_texts(texts, **dropout), encoder.embed_images(images, **dropout)
        np.testing.assert_allclose(run.queries(split, "text")[:4], text, atol=1e-5, rtol=0)
        np.testing.assert_allclose(run.queries(split, "image")[:4], image, atol=1e-5, rtol=0)


def test_a_large_memory_stays_on_disk(finished_workdir: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch):
    """36 vectors of 64 numbers are a sixteenth of a machine of 384 pages of 384 bytes."""
    experiment, workdir = (
        load_config_module(str(finished_workdir[0])).get_config(),
        Workdir(finished_workdir[1], "tiny"),
    )
    monkeypatch.setattr(os, "sysconf", lambda name: 384)
    small = Run(experiment, workdir).embeddings("train")
    assert isinstance(small, np.ndarray)
    assert small.shape == (36, 64)
    monkeypatch.setattr(os, "sysconf", lambda name: 383)
    large = Run(experiment, workdir).embeddings("train")
    assert not isinstance(large, np.ndarray)
    part = MemoryPart("train", large, [""] * 36)
    for rows in (slice(2, 9), np.array([35, 3, 5, 3])):
        np.testing.assert_array_equal(part.read(rows), small[rows])
