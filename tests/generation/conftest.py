"""A generator with a small random model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from decoding_spy import Call, watch_decoding

from rac3.generation.engine import Engine
from rac3.generation.generator import Generator
from rac3.model.transformer import TransformerConfig
from rac3.tokens.vocabulary import Vocabulary


@pytest.fixture(scope="session")
def generator() -> Generator:
    """Of 64 positions, for images of 9 tokens; text ids are 8 to 47, image ids 48 to 77."""
    vocabulary = Vocabulary(text_size=40, image_size=30)
    config = TransformerConfig(num_layers=2, embed=32, num_heads=4, mlp=48, dtype="float32", remat="none", init_std=0.2)
    model = config.build(vocabulary.padded_size, 64, 64)
    ids = jnp.zeros((1, 2), jnp.int32)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), ids, ids, ids, ids))
    return Generator(Engine(model, params, vocabulary), tokens_per_image=9)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    return watch_decoding(monkeypatch)
