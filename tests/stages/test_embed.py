"""Document embeddings on disk."""

import os
from pathlib import Path

import numpy as np
import pytest

from rac3.arrays import create_array
from rac3.retrieval.encoder import mix
from rac3.retrieval.memory import MemoryPart
from rac3.stages.embed import document_embeddings


def test_embeddings_that_do_not_fit_in_memory_are_mixed_as_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rng = np.random.default_rng(0)
    parts = {}
    for name, lacking in (("text", 3), ("image", 5)):
        rows = rng.normal(size=(40, 8)).astype(np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        rows[lacking] = 0
        create_array(tmp_path / name, rows.shape, "float32").write(rows).result()
        parts[name] = rows
    text, image = parts["text"], parts["image"]
    wanted = mix(text, image, text.any(1), image.any(1))
    in_memory = document_embeddings(tmp_path)
    assert isinstance(in_memory, np.ndarray)
    np.testing.assert_array_equal(in_memory, wanted)
    monkeypatch.setattr(os, "sysconf", lambda name: 64)
    lazy = document_embeddings(tmp_path)
    assert not isinstance(lazy, np.ndarray)
    part = MemoryPart("train", lazy, [""] * 40)
    for rows in (slice(2, 9), np.array([39, 3, 5, 3])):
        np.testing.assert_array_equal(part.read(rows), wanted[rows])
