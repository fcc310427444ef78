"""What a published file is known by."""

import os
from pathlib import Path

import numpy as np

from rac3.weights.checkpoint_files import WHOLE, content_identity


def test_any_byte_of_a_small_file_counts(tmp_path: Path):
    path, data = tmp_path / "tokenizer.json", bytearray(1_000_000)
    path.write_bytes(data)
    before = content_identity([path])
    for place in (0, 5000, 777_777, 999_999):  # also between what would be blocks
        changed = data.copy()
        changed[place] = 1
        path.write_bytes(changed)
        assert content_identity([path]) != before
    path.write_bytes(data)
    os.utime(path, (1, 1))
    assert content_identity([path]) == before  # whenever it was written
    assert before["tokenizer.json"][0] == 1_000_000


def test_any_training_changes_the_identity(tmp_path: Path):
    """Which changes all of a large file, or all of its second half if the first one is frozen."""
    weights = np.zeros(WHOLE, np.float32)
    path = tmp_path / "model.safetensors"
    path.write_bytes(weights.tobytes())
    before = content_identity([path])
    weights[WHOLE // 2 :] += 1e-3
    path.write_bytes(weights.tobytes())
    assert content_identity([path]) != before
