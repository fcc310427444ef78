"""Published checkpoints, small, and copies to change."""

import json
import shutil
from pathlib import Path

import pytest
from published_clips import CONFIG, random_weights, write_processor, write_tokenizer
from published_siglips import write_siglip


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A folder as `openai/clip-vit-base-patch32` is, but small; its end of text is the highest id (eos_token_id 2)."""
    from safetensors.numpy import save_file

    folder = tmp_path_factory.mktemp("clip") / "published"
    write_tokenizer(folder)
    write_processor(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(random_weights(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def copy(published, tmp_path) -> Path:
    return shutil.copytree(published, tmp_path / "copy")


@pytest.fixture(scope="module")
def published_siglip(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("siglip") / "published"
    write_siglip(folder)
    return folder


@pytest.fixture
def siglip_copy(published_siglip, tmp_path) -> Path:
    return shutil.copytree(published_siglip, tmp_path / "copy")
