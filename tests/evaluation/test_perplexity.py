import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations

from rac3.batches.groups import GroupBuilder
from rac3.batches.masking import Masking
from rac3.batches.packing import MAIN_IMAGE, MAIN_TEXT
from rac3.evaluation.perplexity import image_group, perplexity, text_group
from rac3.generation.tasks.score import make_token_cross_entropy
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


@pytest.fixture(scope="module")
def params(model: Transformer):
    ids = jnp.zeros((1, 2), jnp.int32)
    return nn.unbox(jax.jit(model.init)(jax.random.key(1), ids, ids, ids, ids))


@pytest.fixture(scope="module")
def log_probs_of(model: Transformer, params):
    """Log probabilities at each place of one group alone."""

    @jax.jit
    def plain(tokens, offsets, segments):
        hidden = model.apply(params, tokens, jnp.arange(64)[None], offsets, segments)
        return jax.nn.log_softmax(model.apply(params, hidden, method="logits")[0])

    def of(group):
        padding = [(0, 0), (0, 64 - len(group.tokens))]
        rows = (np.pad(each[None], padding) for each in (group.tokens, group.offsets, np.ones_like(group.tokens)))
        return np.asarray(plain(*rows))[: len(group.tokens)]

    return of


@pytest.mark.parametrize(
    ("build", "kind", "wanted"), [(image_group, MAIN_IMAGE, "image"), (text_group, MAIN_TEXT, "text")]
)
def test_packed_perplexity_is_that_of_each_group_alone(
    model: Transformer, params, log_probs_of, build, kind: int, wanted: str
) -> None:
    groups = [build(BUILDER, [document(i + 10)] * (i % 3), document(i)) for i in range(5)]
    total, count = 0.0, 0
    for group in groups:
        nats = -log_probs_of(group)[np.arange(len(group.targets)), group.targets]
        main = np.flatnonzero(group.kind == kind)
        total += float(nats[main].sum())
        count += len(main)
        in_range = VOCABULARY.is_image(group.targets) if wanted == "image" else VOCABULARY.is_text(group.targets)
        assert in_range[main].all()
    value = perplexity(make_token_cross_entropy(model), params, groups, kind, 64)
    assert value == pytest.approx(float(np.exp(total / count)), rel=1e-5)


def test_no_target_of_the_kind_has_no_perplexity(model: Transformer, params) -> None:
    text_only = encode(VOCABULARY, [Segment(False, np.arange(4))])
    image_only = encode(VOCABULARY, [Segment(True, np.arange(4))])
    cross_entropy = make_token_cross_entropy(model)
    for group, without, with_some in (
        (image_group(BUILDER, [image_only], text_only), MAIN_IMAGE, MAIN_TEXT),
        (text_group(BUILDER, [text_only], image_only), MAIN_TEXT, MAIN_IMAGE),
    ):
        assert perplexity(cross_entropy, params, [group], without, 64) is None
        assert perplexity(cross_entropy, params, [group], with_some, 64) is not None


def test_models_that_are_equal_share_their_programs(model: Transformer, params):
    """Each step and each split of an evaluation opens its model again."""
    groups = [image_group(BUILDER, [], document(0))]
    again = model.clone()
    assert again is not model
    perplexity(make_token_cross_entropy(model), params, groups, MAIN_IMAGE, 64)
    other = jax.tree.map(lambda leaf: leaf + 1, params)
    assert compilations(lambda: perplexity(make_token_cross_entropy(again), other, groups, MAIN_IMAGE, 64)) == 0


def test_all_rows_of_all_batches_count_each_target_once() -> None:
    """By losses that are known: the target's own id, in nats. Forty rows are three batches, the last one padded."""
    groups = [image_group(BUILDER, [], document(i)) for i in range(40)]
    seen = []

    def cross_entropy(params, batch):
        seen.append(batch.tokens.shape)
        return batch.targets / 100

    ids = np.concatenate([document(i).ids for i in range(40)])
    wanted = np.exp(np.mean(ids[VOCABULARY.is_image(ids)]) / 100)
    assert perplexity(cross_entropy, None, groups, MAIN_IMAGE, 14) == pytest.approx(wanted, rel=1e-6)
    assert seen == [(16, 14)] * 3  # one program for all of them


def test_rows_have_no_more_groups_than_the_model_has_room_for() -> None:
    groups = [image_group(BUILDER, [], document(i)) for i in range(10)]
    most = []

    def cross_entropy(params, batch):
        most.append(int(batch.segments.max()))
        return batch.targets / 100

    assert perplexity(cross_entropy, None, groups, MAIN_IMAGE, 1000) is not None
    assert perplexity(cross_entropy, None, groups, MAIN_IMAGE, 1000, max_groups=3) is not None
    assert most == [10, 3]


def test_the_text_group_hides_the_caption_until_the_image_is_over() -> None:
    main = document(1)
    group = text_group(BUILDER, [], main)
    ids = np.append(group.tokens, group.targets[-1])
    text = ids[VOCABULARY.is_text(ids)]
    np.testing.assert_array_equal(text, main.ids[VOCABULARY.is_text(main.ids)])
    assert np.flatnonzero(VOCABULARY.is_text(ids)).min() > np.flatnonzero(VOCABULARY.is_image(ids)).max()
    assert ids[-2] == END_OF_INFILL


def test_all_texts_of_a_document_are_hidden_as_far_as_there_are_sentinels() -> None:
    """Of three texts two are: ... <mask:0> " src=" I "> ... <mask:1> ... <mask:0> t t <eoi> <mask:1> u <eoi> <eod>"""
    few = Vocabulary(10, 12, num_masks=2)
    builder = GroupBuilder(few, Masking("none"), 1.0)
    texts, image = ([1, 2], [3], [4]), np.array([5])
    segments = [
        Segment(is_image, image if is_image else np.array(text)) for text in texts for is_image in (False, True)
    ]
    group = text_group(builder, [], encode(few, segments))
    first, second = few.mask(0), few.mask(1)
    body = [2, first, 3, 23, 4, 2, second, 3, 23, 4, 2, 12, 3, 23, 4]
    moved = [first, 9, 10, END_OF_INFILL, second, 11, END_OF_INFILL]
    assert [*group.tokens, group.targets[-1]] == [1, *body, *moved, 1]
    assert group.targets[group.kind == MAIN_TEXT].tolist() == [12, 9, 10, 11]


def test_retrieved_documents_stand_whole_before_the_main_one() -> None:
    retrieved = [document(3), document(4)]
    before = [1, *retrieved[0].ids, *retrieved[1].ids]
    for build in (image_group, text_group):
        group = build(BUILDER, retrieved, document(1))
        assert group.tokens[: len(before)].tolist() == before
        kinds = group.kind[: len(before) - 1]
        assert not np.isin(kinds, (MAIN_IMAGE, MAIN_TEXT)).any()
