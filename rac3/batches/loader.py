"""The training batches: a pure function of (seed, position), read through grain.

Documents are shuffled again for each epoch. The stream of groups is split into blocks. A block is planned from lengths
alone: which documents each group retrieves, how long the group is, and which row it goes to. The rows are then read and
built in parallel, by each host its share. The state of the stream is two numbers.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
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


@dataclass(frozen=True)
class BatchConfig:
    """What a training batch consists of. Lengths are in tokens.

    Attributes:
      context_length: the longest group: retrieved documents and main document (paper: 4096).
      row_length: the length of a packed row; 0 is `context_length`. Longer rows have less padding.
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
        if not self.num_retrieved or min(self.num_retrieved) < 0:
            raise InputError(
                f"batches.num_retrieved={self.num_retrieved} must list numbers from 0; the paper uses 0 1 2"
            )
        if max(self.num_retrieved) > self.candidates:
            raise InputError(
                f"batches.num_retrieved={self.num_retrieved} asks for more than batches.candidates={self.candidates}; "
                "raise candidates"
            )
        if self.rows < 1 or self.retrieved_weight < 0:
            raise InputError(f"batches.rows={self.rows} must be at least 1, and batches.retrieved_weight at least 0")

    @property
    def row(self) -> int:
        return self.row_length or self.context_length


class StreamState(NamedTuple):
    """The position of the stream: the next batch is batch `batch` of block `block`."""

    block: int = 0
    batch: int = 0


class BlockPlan(NamedTuple):
    """The groups of one block. A group's documents are its neighbors (-1 is none), then its main document.

    Attributes:
      epoch: of each group.
      main, neighbors: row numbers in the document store.
      rows: group numbers of each packed row.
    """

    epoch: Int[np.ndarray, " groups"]
    main: Int[np.ndarray, " groups"]
    neighbors: Int[np.ndarray, "groups max_k"]
    rows: list[list[int]]


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
        self._main = np.setdiff1d(np.arange(len(documents)), [] if withdrawn is None else withdrawn)
        if len(self._main) == 0:
            raise InputError("there are no training documents; the source gave none that passed filter and takedowns")
        check_context(config, int(documents.lengths.max()))
        self.config, self.seed, self.documents, self.neighbors = config, seed, documents, neighbors
        self.builder, self.hosts, self.host = builder, hosts, host
        self._retrieved_lengths = documents.shown_lengths(builder.retrieved)
        # Rows after the last whole batch of a block are dropped. Blocks have at least 64 batches, so that these are
        # under 2%: retrieved documents make groups longer than their main document, and the rows more.
        groups_per_row = -(-config.row // int(documents.lengths.mean()))
        self.block_groups = max(4096, 64 * config.rows * groups_per_row)
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def batches(self, state: StreamState) -> Iterator[tuple[PackedBatch, StreamState]]:
        """Batches from `state` on, each with the state after it."""
        import grain

        local = self.config.rows // self.hosts
        block, first = state
        while True:
            plan = self.plan(block)
            count = len(plan.rows) // self.config.rows
            source = _BlockRows(self, plan, count * local, local)
            dataset = grain.MapDataset.source(source).batch(local, batch_fn=_stack)[first:]
            threads = grain.ReadOptions(num_threads=self.config.read_threads, prefetch_buffer_size=4)
            for index, batch in enumerate(dataset.to_iter_dataset(threads), first):
                last = index + 1 == count
                yield batch, StreamState(block + 1, 0) if last else StreamState(block, index + 1)
            block, first = block + 1, 0

    def plan(self, block: int) -> BlockPlan:
        """The groups of a block and how they are packed; reads no documents."""
        number = np.arange(block * self.block_groups, (block + 1) * self.block_groups)
        epoch, place = np.divmod(number, len(self._main))
        main = np.empty_like(number)
        for each in np.unique(epoch):
            main[epoch == each] = self._order(int(each))[place[epoch == each]]
        neighbors = self._draw_neighbors(epoch, main)
        lengths = self._lengths(epoch, main, neighbors)
        # A group that is too long drops its least relevant documents first.
        for column in reversed(range(neighbors.shape[1])):
            too_long = lengths.sum(1) > self.config.context_length
            lengths[too_long, column] = 0
            neighbors[too_long, column] = -1
        return BlockPlan(epoch, main, neighbors, pack(lengths.sum(1), self.config.row))

    def keys(self, state: StreamState) -> list[str]:
        """The keys of all documents of the next batch of all hosts, sorted."""
        plan, first = self.plan(state.block), state.batch * self.config.rows
        groups = [group for row in plan.rows[first : first + self.config.rows] for group in row]
        documents = set(plan.main[groups].tolist()) | set(plan.neighbors[groups].ravel().tolist()) - {-1}
        return sorted(item.document.key for item in self.documents.many(sorted(documents)))

    def row(self, plan: BlockPlan, number: int) -> PackedBatch:
        """Row `number` of a block, without the rows axis."""
        groups = []
        for group in plan.rows[number]:
            slots = np.append(np.arange(1, 1 + plan.neighbors.shape[1]), 0)  # the stream of each document's mask draws
            epoch, main = int(plan.epoch[group]), int(plan.main[group])
            members = np.append(plan.neighbors[group], main)
            kept = members >= 0
            count = self.builder.masking.draws_per_document
            mask_draws = np.stack(
                [draws.uniform(self.seed, epoch, main, draws.MASK + int(slot), count)[0] for slot in slots[kept]]
            )
            groups.append(self.builder.build(self.documents.many(members[kept].tolist()), mask_draws))
        return packed_row(groups, self.config.row)

    def _shuffled(self, epoch: int) -> Int[np.ndarray, " documents"]:
        return np.random.default_rng([self.seed, draws.ORDER, epoch]).permutation(self._main)

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
        pool, of_other_part = (np.where(self._retrieved_lengths[ids] > 0, ids, -1) for ids in (pool, of_other_part))
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
            lengths = self._retrieved_lengths if slot else self.documents.lengths
            length = lengths[np.maximum(member, 0)] + TOKENS_PER_SPAN * masking.num_spans(drawn)
            columns.append(np.where(member >= 0, length, 0))
        return np.stack(columns, 1)


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


class _BlockRows:
    """This host's rows of one block, as a grain source."""

    def __init__(self, stream: BatchStream, plan: BlockPlan, size: int, local: int) -> None:
        self.stream, self.plan, self.size, self.local = stream, plan, size, local

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> PackedBatch:
        batch, row = divmod(int(index), self.local)
        return self.stream.row(self.plan, batch * self.stream.config.rows + self.stream.host * self.local + row)


def _stack(rows: list[PackedBatch]) -> PackedBatch:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
