"""A small random model: what its prompts are made of, and the plain engine that continues them."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_engine import PlainEngine

from rac3.batches.groups import GroupBuilder
from rac3.batches.masking import Masking
from rac3.generation.prompts import Form
from rac3.generation.request import Draw, Request
from rac3.model.transformer import TransformerConfig
from rac3.tokens.vocabulary import Vocabulary


@pytest.fixture(scope="session")
def form() -> Form:
    """Of 64 positions, texts of at most 40 ids, and images of 3 x 3 codes; text ids are 8 to 47, codes 48 to 77."""
    return Form(GroupBuilder(Vocabulary(text_size=40, image_size=30), Masking("none"), 1.0), 9, 64, 40, 2)


@pytest.fixture(scope="session")
def engine(form: Form) -> PlainEngine:
    config = TransformerConfig(num_layers=2, embed=32, num_heads=4, mlp=48, dtype="float32", remat="none", init_std=0.2)
    model = config.build(form.vocabulary.padded_size, form.max_positions, form.max_segment_tokens)
    ids = jnp.zeros((1, 2), jnp.int32)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), ids, ids, ids, ids))
    return PlainEngine(model, params, form.vocabulary, form.image_width)


Ids = list[tuple[int, int]]  # with their offsets


@pytest.fixture(scope="session")
def completed() -> Callable[[Request, Sequence[np.ndarray]], list[Ids]]:
    """The sequence of each prompt of a request when its runs are drawn as these joint ids."""

    def of(request: Request, runs: Sequence[np.ndarray]) -> list[Ids]:
        after: Ids = []
        drawn = iter(runs)
        for run in request.grammar:
            if isinstance(run, Draw):
                ids = next(drawn)
                assert np.all(run.allowed[ids])
                assert len(ids) == run.count if run.stop < 0 else len(ids) <= run.count
                after += [(int(id), run.offset + place) for place, id in enumerate(ids)]
                after += [(run.stop, 0)] if run.stop >= 0 else []
            else:
                after += zip(run.ids.tolist(), run.offsets.tolist(), strict=True)
        assert next(drawn, None) is None
        return [[*zip(each.ids.tolist(), each.offsets.tolist(), strict=True), *after] for each in request.prompts]

    return of
