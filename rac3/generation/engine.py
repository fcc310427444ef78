"""The engine: requests of all tasks and lengths in one batch, whose samples share the cache of their prompt.

Prefill and decoding are compiled apart (`rac3.generation.batch`), for a few shapes: another prompt, temperature or
number of samples finds its program compiled. A sample is a function of the parameters, the seed, the first prompt, the
grammar, the sampling and its number. It does not depend on the batch, the order, or how many are asked for.
"""

import contextlib
import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, PyTree

from rac3.config import InputError
from rac3.devices.batches import power_of_two
from rac3.devices.mesh import DeviceMesh
from rac3.generation.batch import Arrivals, Batch, Rows, Shape, Tables, advance, blank, empty, ending, insert, prefill
from rac3.generation.grammar import Table, allowed_ids, longest, parse, tabulate
from rac3.generation.request import Draw, Request, Sample
from rac3.generation.sampling import Sampling, stack
from rac3.model.decoder import Cache, Decoder
from rac3.model.transformer import Transformer
from rac3.tokens.vocabulary import Vocabulary

FEWEST_MASKS = 8  # sets of allowed ids that each program has room for
FEWEST_PLACES = 64
FEWEST_SLOTS = 256
FEWEST_ENDING = 64
EXCESS = 4  # a program that is compiled serves if none of its sizes is more than this many times too large
FEW_ROUNDS = 2  # and if it fills its slots at most so often


class Progress(NamedTuple):
    """How far a run is.

    Attributes:
      drawn: ids of all samples so far. A sample that has ended counts as one of the longest form.
      total: ids of all samples.
      partial: gives the samples that are being drawn: request -> number -> what there is of the sample.
    """

    drawn: int
    total: int
    partial: Callable[[], dict[int, dict[int, Sample]]]


@dataclass(frozen=True, eq=False)
class Entry:
    """A request.

    Attributes:
      index: its place in the call.
      samples: those that have ended, by number.
    """

    index: int
    request: Request
    sampling: PyTree
    seed: int
    table: Table
    samples: dict[int, Sample] = field(default_factory=dict)


class Part(NamedTuple):
    """As many samples of a request as a slot has: `size` from the number `first` on."""

    entry: Entry
    first: int
    size: int


class Engine:
    """A model that continues prompts.

    Args:
      params: as `init` and the checkpoints of training have them.
      mesh: that the parameters are laid out over, if any. The rows of a batch are sharded over it too.
      image_width: codes in a row of an image; 0 is unknown.
      word_starts: whether each id begins a word, for `Copying`; None is unknown.
      rows: the most samples in a batch; each counts as often as its request has prompts.
      cache_bytes: the most that the caches of a batch may take; one request per shard is always decoded.
      chunk: ids that are prefilled at a time; None is what suits the device.
      steps: ids of each row between two reports of progress.
    """

    def __init__(
        self,
        model: Transformer,
        params: PyTree,
        vocabulary: Vocabulary,
        mesh: DeviceMesh | None = None,
        image_width: int = 0,
        word_starts: Bool[np.ndarray, " vocab"] | None = None,
        rows: int = 64,
        cache_bytes: float = 8e9,
        chunk: int | None = None,
        steps: int = 32,
    ) -> None:
        self.model, self.vocabulary, self.mesh, self.image_width = model, vocabulary, mesh, image_width
        self.word_starts = word_starts
        self.rows, self.cache_bytes, self.steps = rows, cache_bytes, steps
        self.shards = mesh.num_shards("batch") if mesh else 1
        usual = 128 if jax.default_backend() == "cpu" else 512
        self.chunk = min(chunk or usual, power_of_two(model.max_positions))
        self.decoder = Decoder(model)
        with self.on_mesh():
            self.weights = self.decoder.weights(params)
        self._shapes: set[tuple[Any, Shape]] = set()  # that programs are compiled for, with the structure of sampling

    @contextlib.contextmanager
    def on_mesh(self) -> Iterator[None]:
        """Sets the mesh, if any, for what is traced or run inside."""
        with self.mesh.use() if self.mesh else contextlib.nullcontext():
            yield

    def check(self, request: Request) -> None:
        """Refuses what does not fit: `rac3.generation.prompts` makes requests that do.

        Raises:
          InputError: no prompt, one that leaves no room for the output, or a text longer than the model is trained on.
        """
        lengths = [len(prompt.ids) for prompt in request.prompts]
        if min(lengths, default=0) == 0:
            raise InputError("a request has no prompt, or an empty one; give at least one id, such as <eod>")
        model, drawn, prompt = self.model, longest(request.grammar), max(lengths)
        if prompt + drawn > model.max_positions:
            raise InputError(
                f"a prompt of {prompt} tokens and {drawn} to generate exceed the {model.max_positions} "
                "positions of the model; use fewer retrieved documents or a shorter prompt"
            )
        ends = [
            run.offset + run.count - 1 if isinstance(run, Draw) else max(run.offsets, default=0)
            for run in request.grammar
        ]
        segment = max(*ends, *(prompt.offsets.max() for prompt in request.prompts))
        if segment > model.max_segment_tokens:
            raise InputError(
                f"a text of {segment} tokens, given or to generate, exceeds the {model.max_segment_tokens} that the "
                "model was trained for (max_text_tokens); use a shorter one"
            )

    def run(
        self,
        requests: Sequence[Request],
        samplings: Sequence[Sampling],
        seeds: Sequence[int],
        on_progress: Callable[[Progress], None] | None = None,
        steps: int | None = None,
    ) -> Iterator[tuple[int, list[Sample]]]:
        """Yields the place of each request in `requests` and its samples, as they finish.

        Args:
          samplings: one for each request. Requests with as many prompts and endings and samplings of one structure
            share batches.
          seeds: one for each request.
          on_progress: called after every few steps.
          steps: how many these are; None is as many as the engine has.

        Raises:
          InputError: at once, if a request does not fit (`check` says so of each).
        """
        groups: dict[Any, list[Entry]] = {}
        for index, (request, sampling, seed) in enumerate(zip(requests, samplings, seeds, strict=True)):
            self.check(request)
            stacked = stack([sampling])
            kind = len(request.prompts), request.endings, jax.tree.structure(stacked)
            groups.setdefault(kind, []).append(Entry(index, request, stacked, seed, tabulate(request.grammar)))
        return self._finished(groups, on_progress, self.steps if steps is None else steps)

    def _finished(
        self,
        groups: dict[Any, list[Entry]],
        on_progress: Callable[[Progress], None] | None,
        steps: int,
    ) -> Iterator[tuple[int, list[Sample]]]:
        total = sum(len(entry.table.run) * entry.request.samples for group in groups.values() for entry in group)
        before = 0
        for kind, group in groups.items():
            slots = Slots(self, self._shape(kind, group), group)
            while not slots.done:
                slots.fill()
                finished = slots.advance(steps)
                if on_progress is not None:
                    on_progress(Progress(before + slots.drawn, total, slots.partial))
                for entry in finished:
                    yield entry.index, [entry.samples[number] for number in sorted(entry.samples)]
            before += slots.drawn

    def _shape(self, kind: Any, group: list[Entry]) -> Shape:
        """The shape that suits the requests. For few of them, one that is compiled and not far from it."""
        prompts, endings, _ = kind
        prompt = max(len(prompt.ids) for entry in group for prompt in entry.request.prompts)
        ended = max(int(_endings(entry.request).max()) for entry in group)
        places = max(len(entry.table.run) for entry in group)
        masks = len(_masks(group, self.vocabulary.padded_size)[0])
        samples = max(entry.request.samples for entry in group)

        def parts(samples: int) -> int:
            return sum(-(-entry.request.samples // samples) for entry in group)

        of_slot = min(power_of_two(samples), _power_below(self.rows // prompts))
        slots = -(-min(_rounded(prompt, FEWEST_SLOTS), self.model.max_positions) // self.chunk) * self.chunk
        own = min(_rounded(places, FEWEST_PLACES), self.model.max_positions)
        kept = power_of_two(max(ended, FEWEST_ENDING)) if endings > 1 else 0
        config = self.model.config
        of_id = 2 * config.num_layers * config.embed * jnp.dtype(config.dtype).itemsize
        of_request = prompts // endings * (slots + endings * (kept + of_slot * own))
        most = min(self.rows / of_slot / prompts, self.cache_bytes / of_id / of_request) / self.shards
        requests = self.shards * min(power_of_two(-(-parts(of_slot) // self.shards)), _power_below(int(most)))
        suiting = Shape(requests, prompts, of_slot, slots, own, power_of_two(max(masks, FEWEST_MASKS)), endings, kept)

        def serves(shape: Shape) -> bool:
            large_enough = shape.slots >= prompt and shape.places >= places and shape.masks >= masks
            large_enough &= shape.ending >= ended
            rows = shape.requests * shape.samples, suiting.requests * suiting.samples
            sizes = [rows, *zip(shape[3:], suiting[3:], strict=True)]
            few = -(-parts(shape.samples) // shape.requests) <= FEW_ROUNDS
            return large_enough and few and all(size <= EXCESS * wanted for size, wanted in sizes)

        ready = [shape for of, shape in self._shapes if of == kind and serves(shape)]
        shape = suiting if suiting in ready else min(ready, default=suiting)
        self._shapes.add((kind, shape))
        return shape


class Slots:
    """Requests of one kind on their way through the slots of a batch.

    Attributes:
      drawn: ids so far.
    """

    def __init__(self, engine: Engine, shape: Shape, group: list[Entry]) -> None:
        self.engine, self.shape = engine, shape
        self.waiting = deque(
            Part(entry, first, min(shape.samples, entry.request.samples - first))
            for entry in group
            for first in range(0, entry.request.samples, shape.samples)
        )
        self.parts: list[Part | None] = [None] * shape.requests
        table, self.mask_of = _masks(group, engine.vocabulary.padded_size)
        masks = np.zeros((shape.masks, engine.vocabulary.padded_size), bool)
        masks[: len(table)] = table
        self.sampling = group[0].sampling
        self.ended = 0
        self.batch: Batch
        self.rows: Rows
        self.prefilled: Cache
        with engine.on_mesh():
            self.batch, self.rows, self.prefilled = empty(engine.decoder, shape, engine.shards, masks, self.sampling)
        self.host = self._read()

    @property
    def done(self) -> bool:
        return not self.waiting and not any(self.parts)

    def fill(self) -> None:
        """Prefills waiting requests into the free slots, at a time one of each shard of the batch."""
        of_shard = self.shape.requests // self.engine.shards
        starts = range(0, self.shape.requests, of_shard)
        while self.waiting:
            free = [next((n for n in range(at, at + of_shard) if self.parts[n] is None), -1) for at in starts]
            if max(free) < 0:
                return
            for slot in free:
                if slot >= 0 and self.waiting:
                    self.parts[slot] = self.waiting.popleft()
            self._insert([slot if slot >= 0 and self.parts[slot] else None for slot in free])

    def _insert(self, slots: list[int | None]) -> None:
        """Prefills what is newly in these slots, one of each shard."""
        engine, shape = self.engine, self.shape
        shards, parts = len(slots), [None if slot is None else self.parts[slot] for slot in slots]

        samplings = [self.sampling if part is None else part.entry.sampling for part in parts]
        new = Arrivals(
            slots=np.array([shape.requests if slot is None else slot for slot in slots], np.int32),
            tables=replace(
                blank(shards, shape, self.sampling),
                sampling=jax.tree.map(lambda *leaves: np.concatenate(leaves), *samplings),
            ),
            seeds=np.zeros((shards, 2), np.uint32),
            digest=np.zeros(shards, np.uint32),
            numbers=np.zeros((shards, shape.samples), np.int32),
            count=np.zeros(shards, np.int32),
        )
        tables = new.tables
        for shard, part in enumerate(parts):
            if part is None:
                continue
            entry, table = part.entry, part.entry.table
            tables.shared[shard] = entry.request.shared
            for number, prompt in enumerate(entry.request.prompts):
                length = len(prompt.ids)
                tables.tokens[shard, number, :length], tables.offsets[shard, number, :length] = prompt
                tables.lengths[shard, number] = length
            places = len(table.run)
            tables.places[shard] = places
            for name in ("forced", "stop", "jump", "offset"):
                getattr(tables, name)[shard, :places] = getattr(table, name)
            tables.allowed[shard, :places] = self.mask_of[entry.index][table.run]
            new.seeds[shard] = jax.random.key_data(jax.random.key(entry.seed))
            new.digest[shard] = prompt_digest(entry.request.prompts[0].ids)
            new.numbers[shard] = entry.request.first + part.first + np.arange(shape.samples)
            new.count[shard] = part.size
        with engine.on_mesh():
            endings = self._prefill(tables)
            self.batch, self.rows = insert(engine.decoder, self.batch, self.rows, self.prefilled, endings, new)

    def _prefill(self, tables: Tables) -> list[Cache]:
        """Prefills these requests, one of each shard; gives the endings of the prompts if there are several."""
        engine, shape = self.engine, self.shape
        endings = []
        for first in range(0, shape.prompts, shape.streams):
            of_ending = slice(first, first + shape.streams)
            tokens, offsets = (x[:, of_ending].reshape(-1, shape.slots) for x in (tables.tokens, tables.offsets))
            lengths = tables.lengths[:, of_ending].reshape(-1) - 1
            # What the first ending has left in the cache is that of the others too, up to where prompts differ.
            shared = int(tables.shared.reshape(-1)[lengths > 0].min(initial=shape.slots)) if first else 0
            begin = shared // engine.chunk * engine.chunk
            for start in range(begin, int(lengths.max()), engine.chunk):
                chunk = [x[:, start : start + engine.chunk] for x in (tokens, offsets)]
                self.prefilled = prefill(engine.decoder, engine.weights, self.prefilled, *chunk, np.int32(start))
            if shape.endings > 1:
                endings.append(ending(engine.decoder, self.prefilled, tables.shared.reshape(-1), shape.ending))
        return endings

    def advance(self, steps: int) -> list[Entry]:
        """Decodes for some steps, or until a slot is free for a waiting request; gives the requests that finished."""
        engine, limits = self.engine, (np.int32(steps), np.bool_(bool(self.waiting)))
        with engine.on_mesh():
            constant = engine.decoder, engine.vocabulary, engine.image_width, engine.weights, engine.word_starts
            self.rows = advance(*constant, self.batch, self.rows, *limits)
        self.host = self._read()
        finished = []
        for slot, part in enumerate(self.parts):
            if part is None or (self.host.place[slot] < len(part.entry.table.run)).any():
                continue
            entry = part.entry
            entry.samples.update(self._samples(slot, part))
            self.ended += len(entry.table.run) * part.size
            self.parts[slot] = None
            if any(np.isnan(log_probs).any() for each in entry.samples.values() for log_probs in each.log_probs):
                raise InputError(
                    "the model gives no number for the probability of an id: its parameters are damaged, or a "
                    "processor of the sampling leaves no id; restore another checkpoint, or remove the processor"
                )
            if len(entry.samples) == entry.request.samples:
                finished.append(entry)
        return finished

    @property
    def drawn(self) -> int:
        counts = self.host.count.sum(1)
        return self.ended + sum(int(counts[slot]) for slot, part in enumerate(self.parts) if part is not None)

    def partial(self) -> dict[int, dict[int, Sample]]:
        """What there is of the samples in the slots: request -> number -> sample."""
        found: dict[int, dict[int, Sample]] = {}
        for slot, part in enumerate(self.parts):
            if part is not None:
                found.setdefault(part.entry.index, {}).update(self._samples(slot, part))
        return found

    def _samples(self, slot: int, part: Part) -> dict[int, Sample]:
        entry, found = part.entry, {}
        for number in range(part.size):
            count = self.host.count[slot, number]
            ids, log_probs = self.host.drawn[slot, number, :count], self.host.log_probs[slot, number, :count]
            found[entry.request.first + part.first + number] = parse(entry.request.grammar, entry.table, ids, log_probs)
        return found

    def _read(self) -> "Drawn":
        rows = self.rows
        return Drawn(*map(np.asarray, jax.device_get((rows.place, rows.count, rows.drawn, rows.log_probs))))


@dataclass(frozen=True)
class Drawn:
    """What the host reads of the rows after some steps, as in `Rows`."""

    place: Int[np.ndarray, "requests samples"]
    count: Int[np.ndarray, "requests samples"]
    drawn: Int[np.ndarray, "requests samples places"]
    log_probs: Float[np.ndarray, "requests samples places"]


def prompt_digest(prompt: Int[np.ndarray, " seq"]) -> int:
    """32 bits of the prompt's ids."""
    return int.from_bytes(hashlib.blake2b(np.asarray(prompt, "<i4").tobytes(), digest_size=4).digest(), "little")


def _endings(request: Request) -> Int[np.ndarray, " prompts"]:
    """The ids of each prompt between those that it shares and its last."""
    lengths = np.array([len(prompt.ids) for prompt in request.prompts])
    return lengths - 1 - np.tile(request.shared, request.endings)


def _masks(
    group: list[Entry], size: int
) -> tuple[Bool[np.ndarray, "masks vocab"], dict[int, Int[np.ndarray, " runs"]]]:
    """The different sets of allowed ids, and for each request, by its index, which of them its runs have."""
    rows: dict[bytes, int] = {}
    numbers = {
        entry.index: np.array(
            [rows.setdefault(allowed_ids(run, size).tobytes(), len(rows)) for run in entry.request.grammar], np.int32
        )
        for entry in group
    }
    return np.frombuffer(b"".join(rows), bool).reshape(len(rows), size), numbers


def _rounded(n: int, least: int) -> int:
    """The smallest of `least`, 3/2 `least`, 2 `least`, 3 `least`, 4 `least`, ... that is at least n."""
    twice = max(least, power_of_two(n))
    return max(least, twice * 3 // 4 if n <= twice * 3 // 4 else twice)


def _power_below(n: int) -> int:
    """The largest power of two up to n; 1 for less."""
    return 1 << (max(n, 1).bit_length() - 1)
