"""The engine against computing everything again for each id: no cache, no batch, no tables."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
from plain_transformer import random_params

from rac3.config import InputError
from rac3.devices.mesh import MeshConfig
from rac3.generation.batch import Shape, prefill
from rac3.generation.engine import Engine, Entry, Progress, Slots
from rac3.generation.grammar import tabulate
from rac3.generation.request import Draw, Given, Request, Sample
from rac3.generation.sampling import Guidance, Sampling, stack
from rac3.model.transformer import TransformerConfig
from rac3.tokens.html import Segment, Sequenced, encode, segment_offsets
from rac3.tokens.vocabulary import END_OF_INFILL, EOD, IMAGE_ALT, IMAGE_SOURCE, Vocabulary

VOCABULARY = Vocabulary(text_size=40, image_size=30)  # text ids are 8 to 47, image ids 48 to 77, in a table of 128
POSITIONS, IMAGE = 64, 9
MODEL = TransformerConfig(
    num_layers=2, embed=32, num_heads=4, mlp=48, dtype="float32", remat="none", init_std=0.2
).build(VOCABULARY.padded_size, POSITIONS, POSITIONS)
PARAMS = random_params(MODEL, std=0.15)
GREEDY, WARM = Sampling(temperature=0.0), Sampling(temperature=2.0)  # so warm that texts stop early at times
ALL = np.arange(VOCABULARY.padded_size)
TEXT, CODES = VOCABULARY.is_text(ALL), VOCABULARY.is_image(ALL)
CAPTION, PICTURE = [Draw(TEXT, 10, END_OF_INFILL)], [Draw(CODES, IMAGE)]
MASK = np.array([VOCABULARY.mask(1)], np.int32)
# A text, a sentinel, and the last two codes of an image; then a text after it.
INFILL = [
    Draw(TEXT, 4, END_OF_INFILL),
    Given(MASK, np.zeros(1, np.int32)),
    Draw(CODES, 2, offset=8),
    Given(np.array([50, 4], np.int32), np.array([3, 0], np.int32)),
    Draw(TEXT, 3, END_OF_INFILL),
]


def sequenced(ids: Sequence[int] | np.ndarray) -> Sequenced:
    return Sequenced(np.asarray(ids, np.int32), segment_offsets(VOCABULARY, np.asarray(ids, np.int32)))


def prompt(text: int, seed: int, documents: int = 0) -> Sequenced:
    """Of 3 ids and a text of so many; each document before it has 16."""
    rng = np.random.default_rng(seed)
    before = [
        encode(VOCABULARY, [Segment(False, rng.integers(0, 40, 3)), Segment(True, rng.integers(0, 30, IMAGE))]).ids
        for _ in range(documents)
    ]
    ids = [EOD, *(id for each in before for id in each), IMAGE_ALT, *VOCABULARY.from_text(rng.integers(0, 40, text))]
    return sequenced([*ids, IMAGE_SOURCE])


PROMPTS = [prompt(5, 0), prompt(4, 1, documents=1), prompt(9, 2), sequenced([EOD])]


@pytest.fixture(scope="module")
def engine() -> Engine:
    """Of eight rows."""
    return Engine(MODEL, PARAMS, VOCABULARY, rows=8)


def drawn(
    engine: Engine, requests: Sequence[Request], sampling: Sampling | Sequence[Sampling] = WARM, seed: int = 0
) -> list[list[Sample]]:
    """The samples of each request."""
    each = [sampling] * len(requests) if isinstance(sampling, Sampling) else sampling
    found = dict(engine.run(requests, each, [seed] * len(requests)))
    return [found[index] for index in range(len(requests))]


Forward = Callable[[list[int], list[int]], np.ndarray]


@pytest.fixture(scope="module")
def logits_after() -> Forward:
    """Logits after the last of some ids, by the forward pass of training."""

    @jax.jit
    def last(tokens, offsets, length):
        segments = (jnp.arange(POSITIONS) < length).astype(jnp.int32)[None]
        hidden: Any = MODEL.apply(PARAMS, tokens[None], jnp.arange(POSITIONS)[None], offsets[None], segments)
        return MODEL.apply(PARAMS, hidden[0, length - 1], method="logits")

    def of(ids: list[int], offsets: list[int]) -> np.ndarray:
        padded = np.zeros((2, POSITIONS), np.int32)
        padded[:, : len(ids)] = ids, offsets
        return np.asarray(last(*padded, len(ids)), np.float64)

    return of


def plain(forward: Forward, request: Request, sampling: Sampling, seed: int, number: int) -> Sample:
    """The oracle: the whole sequence again for each id, run by run."""
    digest = prompt_digest(request.prompts[0].ids)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), digest), number)
    ids = [each.ids.tolist() for each in request.prompts]
    offsets = [each.offsets.tolist() for each in request.prompts]
    sample, place = Sample([], []), 0

    def put(id: int, offset: int) -> None:
        for own, places in zip(ids, offsets, strict=True):
            own.append(id)
            places.append(offset)

    for run in request.grammar:
        if isinstance(run, Given):
            for id, offset in zip(run.ids.tolist(), run.offsets.tolist(), strict=True):
                put(id, offset)
            place += len(run.ids)
            continue
        chosen, terms, stopped = [], [], False
        allowed = run.allowed | (run.stop == ALL)
        for step in range(run.count):
            each = []
            for own, places in zip(ids, offsets, strict=True):
                weights = np.where(allowed, np.exp(forward(own, places)), 0)
                each.append(weights / weights.sum())
            guidance = sampling.guidance.scale
            conditioned = len(each) // 2 if guidance != 1 else len(each)  # the others lack the text
            probs = np.mean(each[:conditioned], axis=0)
            log_probs = guided = np.where(allowed, np.log(np.where(allowed, probs, 1)), -np.inf)
            if guidance != 1:
                lacking = np.log(np.where(allowed, np.mean(each[conditioned:], axis=0), 1))
                pulled = lacking + guidance * (np.where(allowed, log_probs, 0) - lacking)
                guided = np.where(allowed, pulled, -np.inf)
            if sampling.temperature == 0:
                id = int(guided.argmax())
            else:
                scaled = jnp.float32(guided / sampling.temperature)
                id = int(jax.random.categorical(jax.random.fold_in(key, place + step), scaled))
            terms.append(log_probs[id])
            if id == run.stop:
                stopped = True
                put(id, 0)
                break
            chosen.append(id)
            put(id, run.offset + step)
        last = run is request.grammar[-1]
        if run.stop >= 0 and not stopped and not last:
            put(run.stop, 0)
        place += run.count + (run.stop >= 0 and not last)
        sample.runs.append(np.array(chosen, np.int32))
        sample.log_probs.append(np.array(terms, np.float32))
    return sample


def prompt_digest(ids: np.ndarray) -> int:
    content = b"".join(int(id).to_bytes(4, "little") for id in ids)
    return int.from_bytes(hashlib.blake2b(content, digest_size=4).digest(), "little")


def assert_same(samples: Sequence[Sample], expected: Sequence[Sample]) -> None:
    assert len(samples) == len(expected)
    for one, other in zip(samples, expected, strict=True):
        assert [ids.tolist() for ids in one.runs] == [ids.tolist() for ids in other.runs]
        for terms, wanted in zip(one.log_probs, other.log_probs, strict=True):
            # float32 logits of scale 10 in two orders of summation
            np.testing.assert_allclose(terms, wanted, rtol=0, atol=1e-4)


REQUESTS = [
    Request([PROMPTS[0]], CAPTION, 3),
    Request([PROMPTS[1]], PICTURE, 2),
    Request([PROMPTS[2]], INFILL, 4),
    Request([PROMPTS[3]], INFILL, 1, first=5),
    Request([PROMPTS[1]], [*PICTURE, Given(np.array([4], np.int32), np.zeros(1, np.int32))], 1),
]


@pytest.mark.parametrize("sampling", [GREEDY, WARM])
def test_requests_of_all_kinds_in_one_batch_are_as_computed_again_for_each_id(engine, logits_after, sampling):
    """Prompts of 1 to 26 ids, and grammars of one run and of five. Each id has its own noise: with that of another
    step, other ids would come."""
    for request, samples in zip(REQUESTS, drawn(engine, REQUESTS, sampling), strict=True):
        numbers = range(request.first, request.first + request.samples)
        assert_same(samples, [plain(logits_after, request, sampling, 0, number) for number in numbers])


def test_several_prompts_have_the_mean_of_their_probabilities(engine, logits_after):
    """Of 8, 23 and 12 ids."""
    request = Request(PROMPTS[:3], INFILL, 2)
    (samples,) = drawn(engine, [request])
    assert_same(samples, [plain(logits_after, request, WARM, 0, number) for number in range(2)])


def ending_otherwise(documents: int, seed: int, *ends: list[int]) -> list[Sequenced]:
    """Prompts of the same documents, of 16 ids each, and different ends."""
    before = prompt(0, seed, documents).ids[: 1 + 16 * documents].tolist()
    return [sequenced([*before, *end]) for end in ends]


TEXT_ENDS = [IMAGE_ALT, 9, 10, 11, 12, 13, IMAGE_SOURCE], [IMAGE_ALT, *MASK.tolist(), IMAGE_SOURCE]
ONE, OTHER = ending_otherwise(2, 7, *TEXT_ENDS), ending_otherwise(1, 8, *TEXT_ENDS)
FORKED = [
    Request(ONE, PICTURE, 2, endings=2),
    Request(ONE[::-1], INFILL, 3, endings=2),
    Request(OTHER, PICTURE, 1, first=2, endings=2),
    Request(ending_otherwise(0, 0, [], [IMAGE_ALT, *range(9, 40)]), CAPTION, 2, endings=2),  # nothing in common
    Request([OTHER[0], Sequenced(*(x[:20] for x in OTHER[0]))], PICTURE, 1, endings=2),  # one begins as the other
    Request([OTHER[1], OTHER[1]], PICTURE, 1, endings=2),
    # An ensemble of two contexts, each with and without its text; and three endings of one context.
    Request([ONE[0], OTHER[0], ONE[1], OTHER[1]], PICTURE, 2, endings=2),
    Request(ending_otherwise(1, 9, *TEXT_ENDS, [IMAGE_SOURCE]), INFILL, 2, endings=3),
]


def test_how_many_ids_endings_have_in_common():
    """Up to the documents of 16 ids after <eod>, and <img alt=" where both have it. The last id is always fed."""
    shared = [request.shared.tolist() for request in FORKED]
    assert shared == [[34], [34], [18], [0], [19], [19], [34, 18], [17]]
    assert Request(PROMPTS[:3], PICTURE).shared.tolist() == [7, 22, 11]
    turned = Sequenced(ONE[0].ids, ONE[0].offsets + (np.arange(len(ONE[0].ids)) == 20))
    assert Request([ONE[0], turned], PICTURE, endings=2).shared.tolist() == [20]
    with pytest.raises(InputError, match="3 prompts can't have 2 endings each"):
        Request(PROMPTS[:3], PICTURE, endings=2)


@pytest.mark.parametrize(("rows", "chunk"), [(8, None), (16, 8)])
def test_prompts_that_share_their_documents_are_as_computed_apart(logits_after, rows, chunk):
    """Twice over, so that slots and the ring are used again."""
    engine = Engine(MODEL, PARAMS, VOCABULARY, rows=rows, chunk=chunk, steps=5)
    found = drawn(engine, FORKED * 2)
    for request, once, again in zip(FORKED, found[: len(FORKED)], found[len(FORKED) :], strict=True):
        expected = [plain(logits_after, request, WARM, 0, request.first + n) for n in range(request.samples)]
        assert_same(once, expected)
        assert_same(again, expected)


def test_guidance_goes_from_the_second_ending_to_the_first(logits_after):
    """Of one context and of an ensemble of two, whose means have it: exchanged, other ids would come."""
    engine = Engine(MODEL, PARAMS, VOCABULARY, rows=16, chunk=8)
    guided = Sampling(temperature=2.0, guidance=Guidance(3.0))
    requests = [FORKED[0], FORKED[6], replace(FORKED[6], grammar=INFILL)]
    for request, samples in zip(requests, drawn(engine, requests, guided), strict=True):
        assert_same(samples, [plain(logits_after, request, guided, 0, number) for number in range(2)])


def test_shared_documents_are_prefilled_and_held_once(monkeypatch):
    """Of 40 and 36 ids, the last of which are fed: 5 chunks of 8 for the first. Of the second, 34 are known
    then, so that only the chunk from 32 on is prefilled again. Apart, it would be all 5."""
    chunks = []

    def counted(decoder, weights, cache, tokens, offsets, start):
        chunks.append((int(start), tokens.shape))
        return prefill(decoder, weights, cache, tokens, offsets, start)

    monkeypatch.setattr("rac3.generation.engine.prefill", counted)
    engine = Engine(MODEL, PARAMS, VOCABULARY, rows=8, chunk=8)
    drawn(engine, [FORKED[0]])
    assert chunks == [(start, (1, 8)) for start in (0, 8, 16, 24, 32, 32)]
    group = [Entry(0, FORKED[6], stack([WARM]), 0, tabulate(PICTURE))]
    slots = Slots(engine, Shape(1, 4, 2, 64, 64, 8, endings=2, ending=32), group)
    assert slots.batch.prefix[0].keys.shape == (2, 4, 8, 64)  # contexts, not prompts
    assert slots.batch.endings[0].keys.shape == (4, 4, 8, 32)
    assert slots.rows.own[0].keys.shape == (2, 4, 4, 8, 64)  # of each context, two samples for each ending


def test_texts_end_by_themselves_and_at_their_longest(engine):
    """Of 24 samples, both come. What stopped has the log probability of its stop id too."""
    (samples,) = drawn(engine, [Request([PROMPTS[2]], INFILL, 24)])
    first = [len(sample.runs[0]) for sample in samples]
    assert min(first) < 4
    assert max(first) == 4
    for sample in samples:
        for ids, terms, run in zip(sample.runs, sample.log_probs, INFILL[::2], strict=True):
            assert len(terms) == min(len(ids) + (run.stop >= 0), run.count)
            assert run.allowed[ids].all()
        assert len(sample.runs[1]) == 2
        assert sample.mean_log_prob == pytest.approx(np.mean([term for terms in sample.log_probs for term in terms]))


def test_a_shared_prompt_is_as_separate_requests(engine):
    """Six samples of one request, six requests of one sample, and a request that goes on where another ended."""
    (together,) = drawn(engine, [Request([PROMPTS[1]], CAPTION, 6)])
    assert len({tuple(sample.runs[0]) for sample in together}) == 6
    two = Engine(MODEL, PARAMS, VOCABULARY, rows=2)
    apart = drawn(two, [Request([PROMPTS[1]], CAPTION, 1, first=number) for number in range(6)])
    assert_same(together, [sample for samples in apart for sample in samples])
    (later,) = drawn(engine, [Request([PROMPTS[1]], CAPTION, 4, first=2)])
    assert_same(later, together[2:])


def test_a_request_does_not_depend_on_the_others(engine):
    """Alone, or in another order; by the seed, it does."""
    together = drawn(engine, REQUESTS)
    for request, samples in zip(REQUESTS, together, strict=True):
        assert_same(drawn(engine, [request])[0], samples)
    for samples, expected in zip(drawn(engine, REQUESTS[::-1]), together[::-1], strict=True):
        assert_same(samples, expected)
    otherwise = drawn(engine, REQUESTS[:1], seed=1)[0]
    assert [sample.runs[0].tolist() for sample in otherwise] != [sample.runs[0].tolist() for sample in together[0]]


LONG = [Request([prompt(3, seed)], [Draw(TEXT, 30, END_OF_INFILL)], 1) for seed in range(9)]


def test_rows_that_start_at_different_times_share_a_ring(logits_after):
    """Nine texts of up to 30 ids in two slots: together more steps than the ring has slots, and each text begins where
    another has ended. Those that have ended early run on, past the last position, next to the others."""
    engine = Engine(MODEL, PARAMS, VOCABULARY, rows=2, steps=7)
    samples = drawn(engine, LONG)
    lengths = [len(each[0].log_probs[0]) for each in samples]
    assert sum(lengths) > 2 * POSITIONS
    assert len(set(lengths)) > 2
    for request, own in zip(LONG, samples, strict=True):
        assert_same(own, [plain(logits_after, request, WARM, 0, 0)])


def test_prompts_are_prefilled_in_chunks(logits_after):
    """Of 1, 8, 9, 16, 17 and 41 ids: the last one is not prefilled."""
    engine = Engine(MODEL, PARAMS, VOCABULARY, rows=2, chunk=8)
    whole = prompt(9, 3, documents=2)
    requests = [Request([Sequenced(*(x[:size] for x in whole))], PICTURE, 1) for size in (1, 8, 9, 16, 17, 41)]
    for request, samples in zip(requests, drawn(engine, requests, GREEDY), strict=True):
        assert_same(samples, [plain(logits_after, request, GREEDY, 0, 0)])


def test_requests_of_a_batch_have_their_own_sampling(engine):
    samplings = [GREEDY, Sampling(temperature=1.0), Sampling(0.7, 0.5), WARM, Sampling(0.7, 0.9)]
    for request, sampling, samples in zip(REQUESTS, samplings, drawn(engine, REQUESTS, samplings), strict=True):
        assert_same(drawn(engine, [request], sampling)[0], samples)


@pytest.mark.parametrize(
    "sizes", [(2, 2, 2), *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in [(8, 1, 1), (1, 4, 2), (1, 1, 4)])]
)
def test_many_devices_draw_what_one_draws(engine, sizes):
    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = MeshConfig(*sizes).build(devices)
    boxed = jax.eval_shape(MODEL.init, jax.random.key(0), *[jnp.zeros((1, 2), jnp.int32)] * 4)
    params = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), PARAMS, mesh.abstract(boxed))
    sharded = Engine(MODEL, params, VOCABULARY, mesh, rows=16, chunk=16, steps=5)
    kernels = [leaf for leaf in jax.tree.leaves(sharded.weights) if leaf.ndim > 1]
    parts = {leaf.size // leaf.addressable_shards[0].data.size for leaf in kernels}
    assert max(parts) == sizes[1] * sizes[2]  # as in training
    requests = [*REQUESTS, *FORKED[:3]]
    requests += [Request(PROMPTS[:2], CAPTION, 2), *FORKED[3:]] if sizes == (1, 4, 2) else []
    for samples, expected in zip(drawn(sharded, requests), drawn(engine, requests), strict=True):
        assert_same(samples, expected)


def test_another_prompt_sample_count_or_temperature_compiles_nothing():
    """Nor another seed or grammar. A program for 4 samples draws 2, 3 and 8 as well, and a few requests one by one."""
    model = TransformerConfig(num_layers=1, embed=16, num_heads=2, mlp=16, dtype="float32").build(128, 64, 64)
    engine = Engine(model, random_params(model), VOCABULARY)  # for which nothing is compiled yet
    request = Request([PROMPTS[0]], CAPTION, 4)
    assert compilations(lambda: drawn(engine, [request])) > 0
    for other, sampling, seed in [
        (request, WARM, 1),
        (request, Sampling(temperature=0.2), 0),
        (request, GREEDY, 0),
        (replace(request, prompts=[PROMPTS[1]]), WARM, 0),
        (replace(request, grammar=INFILL), WARM, 0),
        (replace(request, grammar=PICTURE), WARM, 0),
        *((replace(request, samples=samples), WARM, 0) for samples in (1, 2, 3, 5, 8)),
    ]:
        assert compilations(lambda case=(other, sampling, seed): drawn(engine, [case[0]], *case[1:])) == 0
    assert compilations(lambda: drawn(engine, [request, replace(request, prompts=[PROMPTS[2]])])) == 0
    assert compilations(lambda: drawn(engine, FORKED[:1])) > 0
    for other in FORKED[1:4]:  # other documents, longer endings
        assert compilations(lambda other=other: drawn(engine, [other])) == 0


def test_many_requests_do_not_wait_for_a_program_of_few_rows():
    """Nine requests after one: they have their own program, of two rows."""
    engine = Engine(MODEL, PARAMS, VOCABULARY, rows=2)
    assert [len(reports_of(engine, [Request([PROMPTS[0]], PICTURE)] * count)) for count in (1, 9)] == [1, 5]


def test_progress_and_what_is_drawn_so_far(engine):
    """In ids: 3 samples of 10 and 4 of 13. What is partial begins the sample that comes."""
    requests = [REQUESTS[0], REQUESTS[2]]
    few = Engine(MODEL, PARAMS, VOCABULARY, rows=4, steps=3)
    reports: list[tuple[int, int]] = []
    parts: list[dict[int, dict[int, Sample]]] = []

    def keep(progress: Progress) -> None:
        reports.append((progress.drawn, progress.total))
        parts.append(progress.partial())

    finished = dict(few.run(requests, [WARM, WARM], [0, 0], keep))
    assert {total for _, total in reports} == {3 * 10 + 4 * 13}
    counts = [count for count, _ in reports]
    assert counts == sorted(counts)
    assert counts[-1] == 3 * 10 + 4 * 13
    assert counts[0] < counts[-1]
    several = 0
    for found in parts:
        for index, samples in found.items():
            for number, sample in samples.items():
                for ids, whole in zip(sample.runs, finished[index][number].runs, strict=True):
                    assert ids.tolist() == whole.tolist()[: len(ids)]
                    several += 0 < len(ids) < len(whole)
    assert several


def reports_of(engine: Engine, requests: Sequence[Request], sampling: Sampling = WARM) -> list[int]:
    """How many ids there are at each report of progress."""
    found: list[int] = []
    dict(
        engine.run(
            requests, [sampling] * len(requests), [0] * len(requests), lambda progress: found.append(progress.drawn)
        )
    )
    return found


def test_a_free_slot_is_filled_while_others_go_on():
    """Requests of 40, 3 and 5 ids in two slots: the third begins when the second has ended."""
    engine = Engine(MODEL, PARAMS, VOCABULARY, rows=2, steps=100)
    requests = [Request([PROMPTS[0]], [Draw(CODES, size)]) for size in (40, 3, 5)]
    assert reports_of(engine, requests) == [3 + 3, 48]
    assert [index for index, _ in engine.run(requests, [WARM] * 3, [0] * 3)] == [1, 0, 2]


def test_a_slot_is_free_when_those_that_are_asked_for_have_ended(engine):
    """One sample by the program of four: the other rows are not waited for."""
    (samples,) = drawn(engine, [Request([PROMPTS[1]], CAPTION, 16)])
    lengths = [len(sample.log_probs[0]) for sample in samples]
    first = next(number for number in range(13) if lengths[number] < max(lengths[number : number + 4]))
    fresh = Engine(MODEL, PARAMS, VOCABULARY, steps=1)
    for count in (4, 1):
        reports = reports_of(fresh, [Request([PROMPTS[1]], CAPTION, count, first=first)])
        assert len(reports) == max(lengths[first : first + count])


def test_a_slot_keeps_nothing_of_the_request_before(engine):
    """What processors of the sampling look at: the prompt and the ids after it, then zeros."""
    requests = [Request([PROMPTS[1]], PICTURE), Request([PROMPTS[0]], [Draw(TEXT, 2), INFILL[1]])]
    group = [
        Entry(index, request, stack([WARM]), 0, tabulate(request.grammar)) for index, request in enumerate(requests)
    ]
    slots = Slots(engine, Shape(1, 1, 1, 64, 64, 8), group)
    finished = []
    while not slots.done:
        slots.fill()
        finished += slots.advance(32)
    assert [entry.index for entry in finished] == [0, 1]
    drawn = [*group[1].samples[0].runs[0], MASK[0]]
    rows, batch = slots.rows, slots.batch
    assert np.asarray(rows.drawn[0, 0]).tolist() == drawn + [0] * 61
    assert np.asarray(rows.drawn_offsets[0, 0]).tolist() == [1, 2] + [0] * 62
    assert np.asarray(batch.tables.tokens[0, 0]).tolist() == PROMPTS[0].ids.tolist() + [0] * 56
    assert np.asarray(batch.tables.offsets[0, 0]).tolist() == [0, 0, 1, 2, 3, 4, 5] + [0] * 57
    assert (int(rows.count[0, 0]), batch.tables.lengths.tolist()) == (3, [[8]])


def test_a_prompt_may_end_within_a_text(engine, logits_after):
    """Its last id has an offset, from which the drawn ones go on."""
    request = Request([Sequenced(*(x[:8] for x in PROMPTS[2]))], [Draw(TEXT, 4, END_OF_INFILL, offset=7), INFILL[1]])
    (samples,) = drawn(engine, [request], GREEDY)
    assert_same(samples, [plain(logits_after, request, GREEDY, 0, 0)])


def test_each_id_is_drawn_with_its_own_noise():
    """A model of zeros gives all 30 codes the same probability after any prompt. Ids of two steps, or of two rows, are
    then equal 1 time in 30: of 9,216 and 2,295 pairs, within 5 deviations."""
    engine = Engine(MODEL, jax.tree.map(np.zeros_like, PARAMS), VOCABULARY, rows=8)
    (samples,) = drawn(engine, [Request([PROMPTS[0]], PICTURE, 256)], Sampling())
    ids = np.stack([sample.runs[0] for sample in samples])
    steps = [(ids[:, one] == ids[:, other]).mean() for one in range(IMAGE) for other in range(one)]
    assert np.mean(steps) == pytest.approx(1 / 30, abs=0.0095)
    assert max(steps) < 0.1
    assert (ids[1:] == ids[:-1]).mean() == pytest.approx(1 / 30, abs=0.019)
    counts = np.bincount(ids.ravel() - VOCABULARY.image_start, minlength=30)
    assert ((counts - 76.8) ** 2 / 76.8).sum() < 72  # chi-square of 29 degrees of freedom: above it 2 in 100,000 times
    np.testing.assert_allclose([sample.mean_log_prob for sample in samples], -np.log(30), rtol=1e-5)


def test_what_does_not_fit_is_refused_at_once(engine):
    long = sequenced([EOD] * (POSITIONS - IMAGE + 1))
    with pytest.raises(InputError, match=r"a prompt of 56 tokens and 9 to generate exceed the 64 positions"):
        engine.run([Request([PROMPTS[0]], PICTURE), Request([long], PICTURE)], [WARM, WARM], [0, 0])
    with pytest.raises(InputError, match=r"a prompt of 56 tokens and 9 to generate exceed the 64 positions"):
        engine.check(Request([PROMPTS[0], long], PICTURE))
    with pytest.raises(InputError, match=r"a prompt of 64 tokens and 10 to generate exceed the 64 positions"):
        engine.check(Request([sequenced([EOD] * POSITIONS)], CAPTION))
    with pytest.raises(InputError, match=r"a prompt of 57 tokens and 13 to generate exceed the 64 positions"):
        engine.check(Request([sequenced([EOD] * 57)], INFILL))
    for nothing in ([], [sequenced([])]):
        with pytest.raises(InputError, match="no prompt, or an empty one"):
            engine.check(Request(nothing, PICTURE))
    assert [len(run.runs[0]) for run in drawn(engine, [Request([sequenced([EOD] * 55)], PICTURE)])[0]] == [IMAGE]
    assert list(engine.run([], [], [])) == []


def test_a_longer_text_than_the_model_is_trained_on_is_refused():
    """Offsets have rows in a table, which a longer text would leave. One as long as the table is taken."""
    model = MODEL.clone(max_segment_tokens=9)
    table = PARAMS["params"]["offset_embedding"][:10]
    short = Engine(model, {"params": {**PARAMS["params"], "offset_embedding": table}}, VOCABULARY)
    for text in (CAPTION, [Draw(TEXT, 3, END_OF_INFILL, offset=8)], [Given(np.array([9]), np.array([10]))]):
        with pytest.raises(InputError, match=r"a text of 10 tokens, given or to generate, exceeds the 9"):
            short.check(Request([PROMPTS[0]], text))
    with pytest.raises(InputError, match=r"a text of 11 tokens, given or to generate, exceeds the 9"):
        short.check(Request([prompt(11, 0)], PICTURE))
    request = Request([PROMPTS[2]], PICTURE)
    assert_same(drawn(short, [request])[0], drawn(Engine(MODEL, PARAMS, VOCABULARY), [request])[0])


def test_prompts_are_padded_within_the_positions_of_the_model(logits_after):
    """A prompt of 57 ids is padded to 64, of which there are 60."""
    table = PARAMS["params"]["position_embedding"][:60]
    cropped = {"params": {**PARAMS["params"], "position_embedding": table}}
    request = Request([prompt(54, 6)], [Draw(CODES, 3)])
    (samples,) = drawn(Engine(MODEL.clone(max_positions=60), cropped, VOCABULARY), [request], GREEDY)
    assert_same(samples, [plain(logits_after, request, GREEDY, 0, 0)])


@pytest.mark.parametrize(
    ("asked", "limit", "rounds"),
    [
        *((Request([PROMPTS[0]], PICTURE), *case) for case in [(1.0, 4), (131_071.0, 4), (131_072.0, 2)]),
        *((FORKED[0], *case) for case in [(458_751.0, 4), (458_752.0, 2)]),
    ],
)
def test_caches_keep_to_their_memory(asked, limit, rounds):
    """A request takes 2 layers x 2 x 32 numbers x 4 bytes of each slot: of 64 + 64 slots, 65,536. With two
    endings of 64, and two samples of each of 64, next to 64 of the documents, 448 make 229,376."""
    engine = Engine(MODEL, PARAMS, VOCABULARY, rows=8 if asked is FORKED[0] else 2, cache_bytes=limit)
    assert len(reports_of(engine, [asked] * 4)) == rounds
