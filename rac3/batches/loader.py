"""The training batches: a pure function of (seed, position), read through grain.

Documents are shuffled again for each epoch, in which each is the main document of one group. The stream of groups is
planned in blocks, from lengths alone: which documents each group retrieves, how long it is, and which row it goes to. A
block has a fixed number of rows and takes as many groups as they hold; the next block goes on with the next group.
While a block is read, a thread plans the one after it. Rows are read and built in parallel, by each host its share. The
state of the stream is two numbers.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from threading import Lock
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from rac3.artifacts.arrays import Rows
from rac3.batches import draws
from rac3.batches.groups import GroupBuilder
from rac3.batches.masking import TOKENS_PER_SPAN, Masking
from rac3.batches.packing import PackedBatch, pack, packed_row
from rac3.config import InputError
from rac3.documents.store import DocumentStore, Shown

BLOCK_ROWS = 1024  # of a block, at least: its last rows are less full, since no later group can go into them
BLOCK_BATCHES = 4  # of a block, at least: the next one is planned while they are trained on


@dataclass(frozen=True)
class BatchConfig:
    """What a training batch consists of. Lengths are in tokens.

    Attributes:
      context_length: the longest group: retrieved documents and main document (paper: 4096).
      row_length: the length of a packed row; 0 is `context_length`. Longer rows have less padding.
      max_groups: a row has at most this many groups; 0 is any number.
      rows: rows of the global batch.
      num_retrieved: K is drawn uniformly from these (paper: 0, 1, 2).
      retrieved: which part of a retrieved document is in context, in training and at inference: all of it, or only its
        images or texts (paper, appendix C.3). A document without such a part is not retrieved.
      retrieved_weight: alpha, the loss weight of retrieved documents (paper, eq. 2-3: 0.1).
      candidates: the K documents are drawn from the first this many selected neighbors.
      masking: CM3 masking.
      read_threads: threads of the loader on each host.
    """

    context_length: int = 4096
    row_length: int = 0
    max_groups: int = 0
    rows: int = 256
    num_retrieved: tuple[int, ...] = (0, 1, 2)
    retrieved: Shown = "document"
    retrieved_weight: float = 0.1
    candidates: int = 4
    masking: Masking = field(default_factory=Masking)
    read_threads: int = 8

    def __post_init__(self) -> None:
        if self.context_length < 1:
            raise InputError(f"batches.context_length={self.context_length} is below 1; the paper uses 4096")
        if self.row_length and self.row_length < self.context_length:
            raise InputError(
                f"batches.row_length={self.row_length} is below batches.context_length={self.context_length}; "
                "a group is never split, so make rows at least as long, or 0 for the same"
            )
        if self.max_groups < 0:
            raise InputError(
                f"batches.max_groups={self.max_groups} is negative; use 0 for any number of groups in a row"
            )
        if not self.num_retrieved or min(self.num_retrieved) < 0:
            raise InputError(
                f"batches.num_retrieved={self.num_retrieved} must list numbers from 0; the paper uses 0 1 2"
            )
        if max(self.num_retrieved) > self.candidates:
            raise InputError(
                f"batches.num_retrieved={self.num_retrieved} asks for more than batches.candidates={self.candidates}; "
                "raise candidates"
            )
        if self.read_threads < 1:
            raise InputError(f"batches.read_threads={self.read_threads} is below 1; use at least 1")
        if self.rows < 1 or self.retrieved_weight < 0:
            raise InputError(f"batches.rows={self.rows} must be at least 1, and batches.retrieved_weight at least 0")

    @property
    def row(self) -> int:
        return self.row_length or self.context_length


class StreamState(NamedTuple):
    """The position of the stream: the next batch is batch `batch` of the block that begins with group `group`."""

    group: int = 0
    batch: int = 0


class Groups(NamedTuple):
    """Consecutive groups of the stream. A group's documents are its neighbors (-1 is none), then its main document.

    Attributes:
      epoch: of each group.
      main, neighbors: row numbers in the document store.
      lengths: in tokens, with room for all mask spans.
    """

    epoch: Int[np.ndarray, " groups"]
    main: Int[np.ndarray, " groups"]
    neighbors: Int[np.ndarray, "groups max_k"]
    lengths: Int[np.ndarray, " groups"]


class BlockPlan(NamedTuple):
    """The groups of one block.

    Attributes:
      groups: at least those of this block, which come first.
      rows: group numbers, within `groups`, of each packed row.
      stop: the number, in the stream, of the first group of the next block.
    """

    groups: Groups
    rows: list[list[int]]
    stop: int


class BatchStream:
    """An endless stream of `PackedBatch`es, restored exactly from a `StreamState`.

    Args:
      config: what a batch consists of.
      seed: of all draws.
      documents: the training documents.
      neighbors: row numbers in `documents` of each document's neighbors, best first; -1 is none. Query
        `2 * view + part` of a document asks with its text (part 0) or its image (part 1). The neighbors of one block
        are read at a time. None trains without retrieval (K = 0).
      builder: builds the groups.
      hosts, host: the number of hosts, and which one this is; each reads its share of the rows of a batch.
      withdrawn: row numbers of documents that are not trained on.

    Raises:
      InputError: there are no documents, one is longer than the context, or the hosts can't share the rows evenly.
    """

    def __init__(
        self,
        config: BatchConfig,
        seed: int,
        documents: DocumentStore,
        neighbors: Rows | Int[np.ndarray, "documents queries depth"] | None,
        builder: GroupBuilder,
        hosts: int = 1,
        host: int = 0,
        withdrawn: Int[np.ndarray, " rows"] | None = None,
    ) -> None:
        if config.rows % hosts:
            raise InputError(f"batches.rows={config.rows} is not a multiple of the {hosts} hosts; make it one")
        gone = np.unique([] if withdrawn is None else withdrawn).astype(np.int64)
        self.size = len(documents) - len(gone)  # of an epoch
        if self.size == 0:
            raise InputError("there are no training documents; the source gave none that passed filter and takedowns")
        check_context(config, int(documents.lengths.max()))
        self._gone_before = gone - np.arange(len(gone))  # of each withdrawn document, the number of those kept
        self.config, self.seed, self.documents, self.neighbors = config, seed, documents, neighbors
        self.builder, self.hosts, self.host = builder, hosts, host
        self.block_batches = max(BLOCK_BATCHES, -(-BLOCK_ROWS // config.rows))
        documents.shown_lengths(builder.retrieved, slice(0))  # fails now if they are missing

    def batches(self, state: StreamState) -> Iterator[tuple[PackedBatch, StreamState]]:
        """Batches from `state` on, each with the state after it."""
        import grain

        group, first = state
        with ThreadPoolExecutor(1, "plan") as planner:
            plans = _Plans(self, group, planner)
            dataset = grain.MapDataset.source(_HostBatches(self, plans, first))
            threads = grain.ReadOptions(
                num_threads=self.config.read_threads, prefetch_buffer_size=self.config.read_threads
            )
            for number, batch in enumerate(dataset.to_iter_dataset(threads), first):
                block, index = divmod(number, self.block_batches)
                if index == 0 and block:
                    group = plans[block - 1].stop
                last = index + 1 == self.block_batches
                yield batch, StreamState(plans[block].stop, 0) if last else StreamState(group, index + 1)

    def plan(self, first: int) -> BlockPlan:
        """The block that begins with group `first`, and how it is packed; reads no documents."""
        rows = self.block_batches * self.config.rows
        capacity = rows * self.config.row
        at_a_time = -(-capacity // (8 * int(self.documents.lengths.mean())))  # retrieved documents make groups longer
        parts: list[Groups] = []
        stop = first
        while sum(int(part.lengths.sum()) for part in parts) < capacity:
            parts.append(self.groups(np.arange(stop, stop + at_a_time)))
            stop += at_a_time
        groups = Groups(*map(np.concatenate, zip(*parts, strict=True)))
        packed = pack(groups.lengths, self.config.row, rows, self.config.max_groups)
        return BlockPlan(groups, packed, first + sum(map(len, packed)))

    def groups(self, number: Int[np.ndarray, " groups"]) -> Groups:
        """The groups with these numbers, ascending, in the stream; reads no documents."""
        epoch, place = np.divmod(number, self.size)
        rank = np.concatenate(
            [draws.permuted(self.seed, int(each), self.size, place[epoch == each]) for each in np.unique(epoch)]
        )
        main = rank + np.searchsorted(self._gone_before, rank, side="right")  # skips withdrawn documents
        neighbors = self._draw_neighbors(epoch, main)
        lengths = self._lengths(epoch, main, neighbors)
        # A group that is too long drops its least relevant documents first.
        for column in reversed(range(neighbors.shape[1])):
            too_long = lengths.sum(1) > self.config.context_length
            lengths[too_long, column] = 0
            neighbors[too_long, column] = -1
        return Groups(epoch, main, neighbors, lengths.sum(1))

    def keys(self, state: StreamState) -> list[str]:
        """The keys of all documents of the next batch of all hosts, sorted."""
        plan, first = self.plan(state.group), state.batch * self.config.rows
        numbers = [group for row in plan.rows[first : first + self.config.rows] for group in row]
        main, neighbors = plan.groups.main[numbers], plan.groups.neighbors[numbers]
        documents = set(main.tolist()) | set(neighbors.ravel().tolist()) - {-1}
        return sorted(item.document.key for item in self.documents.many(sorted(documents)))

    def row(self, plan: BlockPlan, number: int) -> PackedBatch:
        """Row `number` of a block, without the rows axis."""
        epoch, main, neighbors, _ = (each[plan.rows[number]] for each in plan.groups)
        members = np.column_stack([neighbors, main])
        group, column = np.nonzero(members >= 0)
        slots = np.append(np.arange(1, members.shape[1]), 0)[column]  # the stream of each document's mask draws
        count = self.builder.masking.draws_per_document
        mask_draws = draws.uniform(self.seed, epoch[group], main[group], draws.MASK + slots, count)
        documents = [self.documents.tokens(each) for each in members[group, column].tolist()]
        edges = np.searchsorted(group, np.arange(len(main) + 1)).tolist()
        built = [self.builder.build(documents[start:stop], mask_draws[start:stop]) for start, stop in pairwise(edges)]
        return packed_row(built, self.config.row)

    def _draw_neighbors(self, epoch: np.ndarray, main: np.ndarray) -> Int[np.ndarray, "groups max_k"]:
        """Draws K, the query (its view and part), and K of its first candidates, which stay in their order."""
        if self.neighbors is None:
            return np.full((len(main), 0), -1, np.int64)
        choices = np.array(self.config.num_retrieved)
        most = int(choices.max())
        k = choices[(draws.uniform(self.seed, epoch, main, draws.NUM_RETRIEVED)[:, 0] * len(choices)).astype(int)]
        query = (draws.uniform(self.seed, epoch, main, draws.QUERY)[:, 0] * self.neighbors.shape[1]).astype(int)
        candidates = self.neighbors[main][:, :, : self.config.candidates].astype(np.int64)
        view, part = np.divmod(query, 2)
        other_part = 2 * view + 1 - part
        pool, of_other_part = (candidates[np.arange(len(main)), each] for each in (query, other_part))
        pool, of_other_part = (np.where(self._shown_lengths(ids) > 0, ids, -1) for ids in (pool, of_other_part))
        # A document without this part has no query of it: the other part of the same view asks instead.
        pool = np.where((pool >= 0).any(1, keepdims=True), pool, of_other_part)
        pool = np.pad(pool, ((0, 0), (0, max(0, most - pool.shape[1]))), constant_values=-1)
        keys = draws.uniform(self.seed, epoch, main, draws.NEIGHBOR, pool.shape[1])
        rank = np.where(pool >= 0, keys, 2.0).argsort(1).argsort(1)
        taken = (rank < k[:, None]) & (pool >= 0)
        first = np.argsort(~taken, axis=1, kind="stable")[:, :most]
        return np.where(np.take_along_axis(taken, first, 1), np.take_along_axis(pool, first, 1), -1)

    def _lengths(self, epoch: np.ndarray, main: np.ndarray, neighbors: np.ndarray) -> np.ndarray:
        """Tokens of each document of each group, neighbors first, with room for the mask spans."""
        masking, columns = self.builder.masking, []
        for slot in [*range(1, 1 + neighbors.shape[1]), 0]:
            member = neighbors[:, slot - 1] if slot else main
            drawn = draws.uniform(self.seed, epoch, main, draws.MASK + slot, 1)
            lengths = self._shown_lengths(member) if slot else self.documents.lengths[member]
            if not (slot and masking.per_group):
                lengths = lengths + TOKENS_PER_SPAN * masking.num_spans(drawn)
            columns.append(np.where(member >= 0, lengths, 0))
        return np.stack(columns, 1)

    def _shown_lengths(self, rows: np.ndarray) -> np.ndarray:
        return self.documents.shown_lengths(self.builder.retrieved, np.maximum(rows, 0))


def check_context(config: BatchConfig, longest: int) -> None:
    """Refuses a context that is too short for the longest document.

    Raises:
      InputError: names the length that is needed.
    """
    needed = longest + (TOKENS_PER_SPAN * config.masking.max_spans if config.masking.preset != "none" else 0)
    if needed > config.context_length:
        raise InputError(
            f"batches.context_length={config.context_length} is too short for one document: the longest has {longest} "
            f"tokens, {needed} with room for its masks; use at least {needed}"
        )


class _Plans:
    """The plans of consecutive blocks, the first of which begins with group `group`.

    Whoever asks for one has the next one planned. Only the last few are kept.
    """

    def __init__(self, stream: BatchStream, group: int, planner: ThreadPoolExecutor) -> None:
        self._stream, self._planner, self._lock = stream, planner, Lock()
        self._plans: dict[int, Future[BlockPlan]] = {0: planner.submit(stream.plan, group)}

    def __getitem__(self, block: int) -> BlockPlan:
        with self._lock:
            for number in range(max(self._plans), block + 1):
                self._plans[number + 1] = self._planner.submit(self._after, self._plans[number])
            found = self._plans[block]
            for number in [number for number in self._plans if number < block - 2]:
                del self._plans[number]
        return found.result()

    def _after(self, plan: Future[BlockPlan]) -> BlockPlan:
        return self._stream.plan(plan.result().stop)


class _HostBatches:
    """This host's rows of each batch from batch `first` of the first block on, as a grain source."""

    def __init__(self, stream: BatchStream, plans: _Plans, first: int) -> None:
        self.stream, self.plans, self.first = stream, plans, first

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, index: int) -> PackedBatch:
        stream = self.stream
        block, batch = divmod(self.first + int(index), stream.block_batches)
        plan, local = self.plans[block], stream.config.rows // stream.hosts
        start = batch * stream.config.rows + stream.host * local
        return _stack([stream.row(plan, number) for number in range(start, start + local)])


def _stack(rows: Sequence[PackedBatch]) -> PackedBatch:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
