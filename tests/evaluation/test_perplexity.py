import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rac3.batches.groups import GroupBuilder
from rac3.batches.masking import Masking
from rac3.batches.packing import MAIN_IMAGE, MAIN_TEXT
from rac3.evaluation.perplexity import image_group, make_losses, perplexity, text_group
from rac3.model.transformer import Transformer, TransformerConfig
from rac3.tokens.html import Segment, Sequenced, encode
from rac3.tokens.vocabulary import END_OF_INFILL, Vocabulary

VOCABULARY = Vocabulary(10, 12)
BUILDER = GroupBuilder(VOCABULARY, Masking("none"), 1.0)


def document(seed: int) -> Sequenced:
    rng = np.random.default_rng(seed)
    text, image = rng.integers(10, size=3 + seed % 3), rng.integers(12, size=4)
    return encode(VOCABULARY, [Segment(False, text), Segment(True, image)])


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = TransformerConfig(num_layers=1, embed=16, num_heads=2, mlp=32, dtype="float32", remat="none", init_std=0.5)
    return config.build(VOCABULARY.padded_size, 64, 5)


@pytest.mark.parametrize(
    ("build", "kind", "wanted"), [(image_group, MAIN_IMAGE, "image"), (text_group, MAIN_TEXT, "text")]
)
def test_packed_perplexity_is_that_of_each_group_alone(model: Transformer, build, kind: int, wanted: str) -> None:
    ids = jnp.zeros((1, 2), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), ids, ids, ids, ids)
    params = jax.tree.map(jnp.asarray, jax.device_get(params))
    params = nn.unbox(params)
    groups = [build(BUILDER, [document(i + 10)] * (i % 3), document(i)) for i in range(5)]
    total, count = 0.0, 0
    for group in groups:
        row = jnp.asarray(group.tokens)[None]
        positions = jnp.arange(row.shape[1])[None]
        hidden, _ = model.apply(params, row, positions, jnp.asarray(group.offsets)[None], jnp.ones_like(row))
        log_probs = jax.nn.log_softmax(model.apply(params, hidden, method="logits")[0])
        nats = -log_probs[jnp.arange(len(group.targets)), group.targets]
        main = np.flatnonzero(group.kind == kind)
        total += float(nats[main].sum())
        count += len(main)
        in_range = VOCABULARY.is_image(group.targets) if wanted == "image" else VOCABULARY.is_text(group.targets)
        assert in_range[main].all()
    value = perplexity(make_losses(model), params, groups, kind, 64)
    assert value == pytest.approx(float(np.exp(total / count)), rel=1e-5)


def test_no_target_of_the_kind_has_no_perplexity(model: Transformer) -> None:
    text_only = encode(VOCABULARY, [Segment(False, np.arange(4))])
    group = image_group(BUILDER, [], text_only)
    assert not (group.kind == MAIN_IMAGE).any()


def test_the_text_group_hides_the_caption_until_the_image_is_over() -> None:
    main = document(1)
    group = text_group(BUILDER, [], main)
    ids = np.append(group.tokens, group.targets[-1])
    text = ids[VOCABULARY.is_text(ids)]
    np.testing.assert_array_equal(text, main.ids[VOCABULARY.is_text(main.ids)])
    assert np.flatnonzero(VOCABULARY.is_text(ids)).min() > np.flatnonzero(VOCABULARY.is_image(ids)).max()
    assert ids[-2] == END_OF_INFILL
