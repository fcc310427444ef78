"""The stream of batches: a pure function of (seed, position), for any number of hosts and restarts."""

import dataclasses
import shutil
import threading
from contextlib import closing
from itertools import islice, pairwise
from pathlib import Path

import jax
import numpy as np
import pytest

from rac3.batches import draws
from rac3.batches.groups import GroupBuilder
from rac3.batches.loader import BatchConfig, BatchStream, StreamState
from rac3.batches.masking import Masking
from rac3.batches.packing import MAIN_IMAGE, MAIN_TEXT, RETRIEVED_IMAGE, RETRIEVED_TEXT, PackedBatch
from rac3.config import InputError
from rac3.documents.document import Document, Image, Text
from rac3.documents.store import NARROW, DocumentStore, TokenizedDocument, write_id_starts, write_shard
from rac3.tokens.vocabulary import EOD, Vocabulary

DOCUMENTS = 300
VOCABULARY = Vocabulary(text_size=DOCUMENTS, image_size=20)
CONFIG = BatchConfig(context_length=110, row_length=160, rows=8, read_threads=2)
PLAIN = dataclasses.replace(CONFIG, masking=Masking("none"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> DocumentStore:
    """Document n has its own number as its first text id, so that groups can be read back."""
    folder: Path = tmp_path_factory.mktemp("documents")
    rng = np.random.default_rng(0)
    builder = GroupBuilder(VOCABULARY, Masking("none"), 1.0)
    items = []
    for number in range(DOCUMENTS):
        ids = (np.array([number] * rng.integers(2, 9), np.int32), rng.integers(0, 20, 16).astype(np.int32))
        items.append(TokenizedDocument(Document(str(number), (Text("x"), Image(b"x")), {}), ids))
    write_id_starts(folder, [write_shard(folder, 0, items[:200], NARROW), write_shard(folder, 1, items[200:], NARROW)])
    np.save(folder / "lengths.npy", np.array([len(builder.sequence(item.tokens).ids) for item in items], np.int32))
    return DocumentStore(folder)


@pytest.fixture(scope="module")
def neighbors() -> np.ndarray:
    """Six neighbors by text and six others by image; some documents have fewer, and some none by text."""
    table = (np.arange(DOCUMENTS)[:, None, None] + np.array([[1, 2, 3, 4, 5, 6], [11, 12, 13, 14, 15, 16]])) % DOCUMENTS
    table[5, :, 1:] = -1
    table[6, 0] = -1
    table[7] = -1
    return table


def stream(store, neighbors, config=PLAIN, seed=0, hosts=1, host=0) -> BatchStream:
    builder = GroupBuilder(VOCABULARY, config.masking, config.retrieved_weight)
    made = BatchStream(config, seed, store, neighbors, builder, hosts, host)
    made.block_batches = 10  # of some 250 groups: most blocks hold the end of one epoch and the start of the next
    return made


def equal(one: PackedBatch, other: PackedBatch) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def take(from_stream: BatchStream, count: int, state: StreamState = StreamState()) -> list:  # noqa: B008  # a tuple
    return list(islice(from_stream.batches(state), count))


def groups_of(batch: PackedBatch) -> list[list[int]]:
    """The documents of each group, the main one last."""
    found = []
    for tokens, segments in zip(batch.tokens, batch.segments, strict=True):
        for segment in range(1, segments.max() + 1):
            ids = tokens[segments == segment]
            assert ids[0] == EOD
            documents = np.split(ids[1:], np.flatnonzero(ids[1:] == EOD) + 1)
            found.append([int(part[VOCABULARY.is_text(part)][0]) - 8 for part in documents])
    return found


def test_a_restart_goes_on_where_the_stream_stood(store, neighbors):
    """Across the borders of blocks, and with masking."""
    made = stream(store, neighbors, CONFIG)
    whole = take(made, 26)
    assert len({state.group for _, state in whole}) >= 3
    for place in (0, 7, 20):
        again = take(stream(store, neighbors, CONFIG), 3, StreamState(*list(whole[place][1])))
        for (batch, state), (other, other_state) in zip(again, whole[place + 1 : place + 4], strict=True):
            assert equal(batch, other)
            assert state == other_state
    assert not equal(whole[0][0], whole[1][0])
    assert not equal(whole[0][0], take(stream(store, neighbors, CONFIG, seed=1), 1)[0][0])


def test_four_hosts_read_what_one_host_reads(store, neighbors):
    one = take(stream(store, neighbors, CONFIG), 12)
    four = [take(stream(store, neighbors, CONFIG, hosts=4, host=host), 12) for host in range(4)]
    for number, (whole, state) in enumerate(one):
        parts = [host[number][0] for host in four]
        assert all(part.tokens.shape == (2, 160) for part in parts)
        assert equal(jax.tree.map(lambda *rows: np.concatenate(rows), *parts), whole)
        assert all(host[number][1] == state for host in four)


def test_every_epoch_visits_every_document_once(store, neighbors):
    made = stream(store, neighbors)
    groups = made.groups(np.arange(5 * DOCUMENTS + 100))
    orders = [groups.main[groups.epoch == epoch] for epoch in range(5)]
    assert all(sorted(order) == list(range(DOCUMENTS)) for order in orders)
    assert not any(np.array_equal(one, other) for one, other in pairwise(orders))


def test_each_seed_has_its_order(store):
    orders = [stream(store, None, seed=seed).groups(np.arange(DOCUMENTS)).main for seed in (0, 1, 0)]
    assert not np.array_equal(orders[0], orders[1])
    np.testing.assert_array_equal(orders[0], orders[2])


def test_withdrawn_documents_are_not_trained_on(store):
    gone = np.array([0, 17, 299])
    made = BatchStream(PLAIN, 0, store, None, GroupBuilder(VOCABULARY, PLAIN.masking, 0.1), withdrawn=gone)
    groups = made.groups(np.arange(2 * 297))
    for epoch in (0, 1):
        assert sorted(groups.main[groups.epoch == epoch].tolist()) == sorted({*range(DOCUMENTS)} - {0, 17, 299})


def test_every_group_of_the_stream_is_in_one_row(store, neighbors):
    """A block holds whole batches, and the next one goes on where it ends; by the real number of batches."""
    builder = GroupBuilder(VOCABULARY, Masking(), 0.1)
    for config in (CONFIG, dataclasses.replace(CONFIG, row_length=1600), dataclasses.replace(CONFIG, rows=64)):
        made = BatchStream(config, 0, store, neighbors, builder)
        assert made.block_batches * config.rows == 1024
        first = 40
        for _ in range(3):
            plan = made.plan(first)
            numbers = sorted(group for row in plan.rows for group in row)
            assert numbers == list(range(plan.stop - first))
            assert len(plan.rows) == 1024
            assert min(plan.groups.lengths[row].sum() for row in plan.rows[:-100]) > 0.5 * config.row_length
            whole = made.groups(np.arange(first, plan.stop))
            assert all(np.array_equal(a[: plan.stop - first], b) for a, b in zip(plan.groups, whole, strict=True))
            first = plan.stop


def test_a_block_has_at_least_four_batches(store):
    """So that the next one is planned in time, however large a batch."""
    made = stream(store, None, dataclasses.replace(PLAIN, rows=2000))
    assert BatchStream(made.config, 0, store, None, made.builder).block_batches == 4


def test_the_next_block_is_planned_while_one_is_read(store, neighbors, monkeypatch: pytest.MonkeyPatch):
    """Its plan is begun with the first batch. All batches of the block before come while it is not done."""
    expected = take(stream(store, neighbors), 11)
    made = stream(store, neighbors)
    plan, begun, may_end = made.plan, threading.Event(), threading.Event()

    def planned(first: int):
        if first:
            begun.set()
            assert may_end.wait(10)
        return plan(first)

    monkeypatch.setattr(made, "plan", planned)
    with closing(made.batches(StreamState())) as batches:
        found = [next(batches)]
        assert begun.wait(10)
        found += islice(batches, 9)
        assert not may_end.is_set()
        may_end.set()
        found.append(next(batches))
    for (batch, state), (other, other_state) in zip(found, expected, strict=True):
        assert equal(batch, other)
        assert state == other_state


def test_batches_are_read_by_threads_that_are_there(store, neighbors, monkeypatch: pytest.MonkeyPatch):
    started, start = [], threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda thread: started.append(thread) or start(thread))
    with closing(stream(store, neighbors).batches(StreamState())) as batches:
        list(islice(batches, 3))
        before = len(started)
        list(islice(batches, 20))
    assert len(started) - before < CONFIG.read_threads


def test_rows_hold_at_most_max_groups(store, neighbors):
    config = dataclasses.replace(PLAIN, row_length=1600, max_groups=3)
    numbers = [batch.segments.max(1) for batch, _ in take(stream(store, neighbors, config), 12)]
    assert {int(each) for each in np.concatenate(numbers)} == {3}


def test_batches_hold_the_groups_of_the_plan(store, neighbors):
    made = stream(store, neighbors)
    plan = made.plan(0)
    for number, (batch, _) in enumerate(take(made, 4)):
        rows = plan.rows[number * 8 : number * 8 + 8]
        members = [[*plan.groups.neighbors[group], plan.groups.main[group]] for row in rows for group in row]
        assert groups_of(batch) == [[int(each) for each in group if each >= 0] for group in members]
        assert (batch.segments > 0).sum(1).max() > PLAIN.context_length  # rows are longer than groups, and used


def test_the_documents_of_a_batch_are_named(store, neighbors):
    """Keys are numbers here, and so is each document's first text id. Two hosts have half of the rows each."""
    made = stream(store, neighbors, hosts=2)
    state = StreamState()
    for (mine, after), (other, _) in zip(
        take(made, 4), take(stream(store, neighbors, hosts=2, host=1), 4), strict=True
    ):
        held = {str(each) for batch in (mine, other) for group in groups_of(batch) for each in group}
        assert made.keys(state) == sorted(held)
        state = after


def test_k_is_uniform_and_neighbors_come_from_the_candidates(store, neighbors):
    """6,000 groups: the share of each K has a standard deviation of 0.006."""
    made = stream(store, neighbors, dataclasses.replace(PLAIN, context_length=160))
    plan = made.groups(np.arange(6000))
    plain = ~np.isin(plan.main, [5, 6, 7])
    k = (plan.neighbors >= 0).sum(1)
    for number in (0, 1, 2):
        assert (k[plain] == number).mean() == pytest.approx(1 / 3, abs=0.03)
    uses = {1: 0, 2: 0, 3: 0, 4: 0, 11: 0, 12: 0, 13: 0, 14: 0}
    for main, row in zip(plan.main[plain], plan.neighbors[plain], strict=True):
        away = [int(each - main) % DOCUMENTS for each in row if each >= 0]
        assert away == sorted(set(away))  # most relevant first, none twice
        assert len({each > 10 for each in away}) <= 1  # by text or by image, not both
        assert uses.keys() >= set(away)  # the first four of six
        for each in away:
            uses[each] += 1
    total = sum(uses.values())
    assert all(count / total == pytest.approx(1 / 8, abs=0.02) for count in uses.values())


def test_a_document_with_few_neighbors_gets_those(store, neighbors):
    made = stream(store, neighbors, dataclasses.replace(PLAIN, context_length=160, num_retrieved=(2,)))
    plan = made.groups(np.arange(3000))
    found = {document: plan.neighbors[plan.main == document] for document in (5, 6, 7, 8)}
    assert {tuple(row) for row in found[5]} == {(6, -1), (16, -1)}
    assert all(set(row) <= {17, 18, 19, 20} and len(set(row)) == 2 for row in found[6])  # it has only its image
    assert (found[7] == -1).all()
    assert (found[8] >= 0).all()


def drawn(made: BatchStream, epochs: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """K, whether the query is the image, and the first neighbor's place in the ranking, by epoch and document."""
    plans = [made.groups(epoch * DOCUMENTS + np.arange(DOCUMENTS)) for epoch in epochs]
    tables = [plan.neighbors[np.argsort(plan.main)] for plan in plans]
    neighbors = np.delete(np.stack(tables), [5, 6, 7], axis=1)
    away = (neighbors[..., 0] - np.delete(np.arange(DOCUMENTS), [5, 6, 7])) % DOCUMENTS
    return (neighbors >= 0).sum(-1), away > 10, away % 10


@pytest.mark.parametrize("other", ["the next epoch", "another seed"])
def test_a_document_has_other_neighbors_in_each_epoch_and_for_each_seed(store, neighbors, other):
    """1,485 pairs of draws of one document are equal as often as independent ones are, within 5 deviations."""
    config = dataclasses.replace(PLAIN, context_length=160)
    k, image, place = drawn(stream(store, neighbors, config), range(5))
    if other == "the next epoch":
        k_2, image_2, place_2 = drawn(stream(store, neighbors, config), range(1, 6))
    else:
        k_2, image_2, place_2 = drawn(stream(store, neighbors, config, seed=1), range(5))
    assert (k == k_2).mean() == pytest.approx(1 / 3, abs=0.065)
    both = (k > 0) & (k_2 > 0)
    assert (image == image_2)[both].mean() == pytest.approx(1 / 2, abs=0.1)
    ones = (k == 1) & (k_2 == 1) & (image == image_2)
    assert (place == place_2)[ones].mean() == pytest.approx(1 / 4, abs=0.25)


def test_k_the_query_and_the_neighbors_are_independent(store, neighbors):
    """Some 990 groups of each K, with 120 for each query and candidate where K is 1: shares within 5 deviations."""
    k, image, place = drawn(stream(store, neighbors, dataclasses.replace(PLAIN, context_length=160)), range(10))
    for number in (1, 2):
        assert image[k == number].mean() == pytest.approx(1 / 2, abs=0.08)
    for query in (False, True):
        chosen = place[(k == 1) & (image == query)]
        assert all((chosen == each).mean() == pytest.approx(1 / 4, abs=0.1) for each in (1, 2, 3, 4))


def test_queries_of_all_views_are_used(store):
    """A text and an image query in each of two views. A document without a text has its image's of the same view."""
    first = np.array([1, 11, 21, 31])
    table = (np.arange(DOCUMENTS)[:, None, None] + first[:, None] + np.arange(4)) % DOCUMENTS
    table[:100, ::2] = -1
    made = stream(store, table, dataclasses.replace(PLAIN, context_length=160, num_retrieved=(1,)))
    plan = made.groups(np.arange(10 * DOCUMENTS))
    query = (plan.neighbors[:, 0] - plan.main) % DOCUMENTS // 10
    for documents, share in ((plan.main < 100, [0, 1 / 2, 0, 1 / 2]), (plan.main >= 100, [1 / 4] * 4)):
        assert np.bincount(query[documents], minlength=4) / documents.sum() == pytest.approx(share, abs=0.08)


def test_each_document_of_each_group_is_masked_by_its_own_draws(store, neighbors):
    """Whichever slot it is in, in each epoch and for each seed; and the plan has room for just these masks."""
    config = dataclasses.replace(CONFIG, masking=Masking(mean_spans=2.0), context_length=200, row_length=200)
    masks = []

    class Watched(GroupBuilder):  # of these streams alone: threads of others may still read ahead
        def build(self, documents, rows):
            assert len(documents) == len(rows)
            masks.append(rows)
            return super().build(documents, rows)

    for seed in (0, 1):
        made = stream(store, neighbors, config, seed)
        made.builder = Watched(VOCABULARY, config.masking, config.retrieved_weight)
        for epoch in (0, 1):
            plan = made.plan(epoch * DOCUMENTS)
            for number in range(12):
                before = len(masks)
                made.row(plan, number)
                for group, rows in zip(plan.rows[number], masks[before:], strict=True):
                    members = [each for each in (*plan.groups.neighbors[group], plan.groups.main[group]) if each >= 0]
                    spans = config.masking.num_spans(rows).sum()
                    assert plan.groups.lengths[group] == store.lengths[members].sum() + 3 * spans
    rows = np.concatenate(masks)
    assert len(rows) > 200
    assert len(np.unique(rows[:, 0])) == len(np.unique(rows[:, 1])) == len(rows)


def test_a_group_that_is_masked_as_a_whole_has_room_for_the_spans_of_its_main_document(store, neighbors):
    """By the draws of the main document, whichever it retrieves; and the groups fit where they were planned."""
    masking = Masking("metaseq", mean_spans=2.0)
    config = dataclasses.replace(CONFIG, masking=masking, context_length=200, row_length=200)
    made = stream(store, neighbors, config)
    plan = made.plan(0)
    groups = plan.groups
    rows = draws.uniform(0, groups.epoch, groups.main, draws.MASK, masking.draws_per_document)
    for group, row in enumerate(rows):
        members = [each for each in (*groups.neighbors[group], groups.main[group]) if each >= 0]
        assert groups.lengths[group] == store.lengths[members].sum() + 3 * masking.num_spans(row[None])[0]
    builder, spans = made.builder, 0
    for number in range(20):
        row, start = made.row(plan, number), 0
        for group in plan.rows[number]:
            members = [each for each in (*groups.neighbors[group], groups.main[group]) if each >= 0]
            mask_draws = np.repeat(rows[group][None], len(members), 0)
            expected = builder.build([store.tokens(int(each)) for each in members], mask_draws)
            np.testing.assert_array_equal(row.tokens[start : start + len(expected.tokens)], expected.tokens)
            start += len(expected.tokens)
            spans += int(VOCABULARY.is_mask(expected.targets).sum()) // 2
    assert spans > 50


def test_the_main_document_is_never_among_the_retrieved(store, neighbors):
    batches = take(stream(store, neighbors), 10)
    groups = [group for batch, _ in batches for group in groups_of(batch)]
    assert sum(len(group) for group in groups) > 300
    assert all(len(set(group)) == len(group) for group in groups)


def test_without_neighbors_every_group_is_one_document(store):
    groups = [group for batch, _ in take(stream(store, None), 4) for group in groups_of(batch)]
    assert all(len(group) == 1 for group in groups)
    assert len(groups) > 50


def test_weights_by_kind(store, neighbors):
    config = dataclasses.replace(PLAIN, retrieved_weight=0.25)
    batch = jax.tree.map(lambda *b: np.concatenate(b), *[b for b, _ in take(stream(store, neighbors, config), 5)])
    for kind, weight in ((MAIN_TEXT, 1), (MAIN_IMAGE, 1), (RETRIEVED_TEXT, 0.25), (RETRIEVED_IMAGE, 0.25)):
        assert (batch.kind == kind).sum() > 100
        assert (batch.loss_weight[batch.kind == kind] == weight).all()
    assert not batch.loss_weight[batch.segments == 0].any()
    inside = (batch.segments[:, 1:] == batch.segments[:, :-1]) & (batch.segments[:, 1:] > 0)
    np.testing.assert_array_equal(batch.targets[:, :-1][inside], batch.tokens[:, 1:][inside])


def test_a_group_that_is_too_long_loses_its_least_relevant_document(store, neighbors):
    lengths = store.lengths
    wide = stream(store, neighbors, dataclasses.replace(PLAIN, context_length=160)).groups(np.arange(250))
    config = dataclasses.replace(PLAIN, context_length=int(lengths.max()) * 2 + 10)
    plan = stream(store, neighbors, config).groups(np.arange(250))
    np.testing.assert_array_equal(wide.main, plan.main)
    dropped = 0
    for main, all_of_them, kept in zip(plan.main, wide.neighbors, plan.neighbors, strict=True):
        members = [int(each) for each in all_of_them if each >= 0]
        while lengths[[main, *members]].sum() > config.context_length:
            members.pop()
            dropped += 1
        assert [each for each in kept if each >= 0] == members
    assert dropped > 20


def test_no_group_is_longer_than_the_context(store, neighbors):
    """With many masks, which make documents longer."""
    config = dataclasses.replace(CONFIG, masking=Masking(mean_spans=3.0))
    for batch, _ in take(stream(store, neighbors, config), 6):
        assert batch.positions.max() < CONFIG.context_length
        assert batch.tokens.shape == (8, 160)


def test_damaged_ids_end_the_stream(store, tmp_path: Path):
    """With the file's name, wherever in the threads they are read."""
    folder = tmp_path / "documents"
    shutil.copytree(store.folder, folder)
    path = folder / "000001.u2"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    made = stream(DocumentStore(folder), None)
    with pytest.raises(InputError, match=r"000001\.u2 is damaged: the ids of document 299"):
        take(made, 30)


def test_what_cannot_be_batched_is_refused(store, neighbors, tmp_path: Path):
    longest = int(store.lengths.max())
    builder = GroupBuilder(VOCABULARY, Masking(), 0.1)
    config = dataclasses.replace(CONFIG, context_length=longest + 47)
    with pytest.raises(InputError, match=rf"the longest has {longest} tokens, .*use at least {longest + 48}"):
        BatchStream(config, 0, store, neighbors, builder)
    BatchStream(dataclasses.replace(CONFIG, context_length=longest + 48), 0, store, neighbors, builder)
    unmasked = dataclasses.replace(PLAIN, context_length=longest)
    BatchStream(unmasked, 0, store, neighbors, GroupBuilder(VOCABULARY, Masking("none"), 0.1))
    with pytest.raises(InputError, match="rows=8 is not a multiple of the 3 hosts"):
        BatchStream(CONFIG, 0, store, neighbors, builder, hosts=3)
    np.save(tmp_path / "lengths.npy", np.zeros(0, np.int32))
    with pytest.raises(InputError, match="no training documents"):
        BatchStream(CONFIG, 0, DocumentStore(tmp_path), None, builder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_groups": -1}, "max_groups=-1 is negative"),
        ({"row_length": 4095}, "row_length=4095 is below batches.context_length=4096"),
        ({"num_retrieved": ()}, "num_retrieved"),
        ({"num_retrieved": (0, -1)}, "num_retrieved"),
        ({"num_retrieved": (0, 5)}, "asks for more than batches.candidates=4"),
        ({"rows": 0}, "rows=0"),
        ({"retrieved_weight": -0.1}, "retrieved_weight"),
    ],
)
def test_fields_are_checked(fields: dict, message: str):
    with pytest.raises(InputError, match=message):
        BatchConfig(**fields)
    assert BatchConfig().row == 4096
    assert BatchConfig(row_length=9000).row == 9000


def test_the_defaults_are_those_of_the_paper():
    """Section 4.1: contexts of 4096 tokens with 0 to 2 retrieved documents, whose loss weighs 0.1."""
    config = BatchConfig()
    assert (config.context_length, config.num_retrieved, config.retrieved, config.retrieved_weight) == (
        4096, (0, 1, 2), "document", 0.1
    )  # fmt: skip
    assert config.masking == Masking("ra_cm3", mean_spans=1.0, max_spans=16, whole_segments=0.0)


@pytest.mark.parametrize(("shown", "other"), [("text", RETRIEVED_IMAGE), ("image", RETRIEVED_TEXT)])
def test_batches_with_one_modality_of_the_retrieved_documents(shown, other, neighbors: np.ndarray, tmp_path: Path):
    """Every third document has no text, every fifth no image; lengths are planned for what is shown."""
    rng, items = np.random.default_rng(0), []
    for number in range(DOCUMENTS):
        parts = [(Text("x"), np.full(rng.integers(2, 9), number)), (Image(b"x"), rng.integers(0, 20, 16))]
        parts = parts[1:] if number % 3 == 0 else parts[:1] if number % 5 == 0 else parts
        segments, ids = zip(*parts, strict=True)
        items.append(TokenizedDocument(Document(str(number), segments, {}), tuple(x.astype(np.int32) for x in ids)))
    write_id_starts(tmp_path, [write_shard(tmp_path, 0, items, NARROW)])
    config = dataclasses.replace(PLAIN, retrieved=shown)
    builder = GroupBuilder(VOCABULARY, config.masking, 0.1, shown)
    texts = [
        sum(len(x) for x, s in zip(item.ids, item.document.segments, strict=True) if isinstance(s, Text))
        for item in items
    ]
    np.save(tmp_path / "lengths.npy", np.array([len(builder.sequence(item.tokens).ids) for item in items], np.int32))
    store = DocumentStore(tmp_path)
    with pytest.raises(InputError, match=r"text_lengths\.npy is missing"):
        BatchStream(config, 0, store, neighbors, builder)
    np.save(tmp_path / "text_lengths.npy", np.array(texts, np.int32))
    views = [builder.shown(item.tokens) for item in items]
    wanted = [0 if view is None else len(builder.sequence(view).ids) for view in views]
    np.testing.assert_array_equal(store.shown_lengths(shown), wanted)
    np.testing.assert_array_equal(store.shown_lengths("document"), store.lengths)
    made = BatchStream(config, 0, store, neighbors, builder)
    plan = made.plan(0)
    main, retrieved = plan.groups.main, plan.groups.neighbors
    assert (retrieved >= 0).any()
    assert all(wanted[number] for number in retrieved[retrieved >= 0])
    assert plan.groups.lengths.tolist() == [
        store.lengths[document] + sum(wanted[number] for number in found if number >= 0)
        for document, found in zip(main, retrieved, strict=True)
    ]
    assert (made.row(plan, 0).segments > 0).sum() == plan.groups.lengths[plan.rows[0]].sum()
    kinds = np.concatenate([batch.kind.ravel() for batch, _ in islice(made.batches(StreamState()), 4)])
    assert not (kinds == other).any()
    assert (kinds == {"text": RETRIEVED_TEXT, "image": RETRIEVED_IMAGE}[shown]).any()
    assert (kinds == MAIN_TEXT).any()
    assert (kinds == MAIN_IMAGE).any()
