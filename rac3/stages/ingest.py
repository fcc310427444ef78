"""Ingest: sources -> filtered, tokenized documents in `array_record` shards, and what was rejected.

A shard of the source becomes a shard of documents.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from rac3 import recipes
from rac3.artifacts.workdir import Draft, temporary_path
from rac3.batches.groups import GroupBuilder
from rac3.batches.masking import Masking
from rac3.config import InputError
from rac3.documents.document import Document, Image, Reject, Source
from rac3.documents.store import (
    COLUMNS,
    TokenizedDocument,
    columns_of,
    id_type,
    write_columns,
    write_id_starts,
    write_shard,
)
from rac3.execution.shards import Shard, Tally, clear
from rac3.execution.shards import run as run_shards
from rac3.experiment import Experiment, Split
from rac3.run import Run, tokenize
from rac3.tokens.text import Tokenizer

REJECTS = "rejects.jsonl"
DOCUMENTS_AT_ONCE = 512  # that a thread holds in memory


def ingest(run: Run) -> None:
    """Makes the documents of every split that has none yet.

    Raises:
      InputError: a source gives no documents, or more rejects than `max_reject_fraction`.
    """
    experiment, workdir = run.experiment, run.workdir
    found = {split: run.recipe(recipes.documents, split) for split in experiment.data.sources()}
    missing = {split: recipe for split, recipe in found.items() if not workdir.find(recipe)}
    if not missing:
        return
    run.require_encoders(recipes.text, recipes.vqgan)
    with ExitStack() as stack:
        drafts = {split: stack.enter_context(workdir.write(recipe)) for split, recipe in missing.items()}
        shards = {split: _shards(experiment, split, draft.folder) for split, draft in drafts.items()}
        everything = [shard for part in shards.values() for shard in part]
        throughput = run_shards(experiment.executor, _Ingest(run), everything)
        for split, draft in drafts.items():
            _merge(experiment, split, shards[split], draft)
            draft.counts["throughput"] = throughput
        clear(everything)


def _shards(experiment: Experiment, split: Split, folder: Path) -> list[Shard]:
    """The shards of the source, by its names."""
    names = experiment.data.sources()[split].shards(Path(experiment.data_dir))
    return [Shard(split, number, name, folder) for number, name in enumerate(names)]


@dataclass(frozen=True)
class _Ingest:
    """The job."""

    run: Run
    label: str = "ingest"

    def open(self) -> "_Ingester":
        return _Ingester(self.run)


class _Ingester:
    """Reads, filters and tokenizes the documents of a shard."""

    def __init__(self, run: Run) -> None:
        experiment = run.experiment
        self.experiment, self.tokenizer, self.images = experiment, run.tokenizer, run.images
        self.builder = GroupBuilder(run.vocabulary, Masking("none"), 1.0)
        self.sources: dict[str, Source] = {str(split): source for split, source in experiment.data.sources().items()}

    def __call__(self, shard: Shard, tally: Tally) -> dict[str, Any]:
        kind = id_type(self.tokenizer.size, self.images.codebook_size)
        summary = _Summary(ids=np.dtype(kind).name)
        items = iter(self.sources[shard.part].read(Path(self.experiment.data_dir), shard.name))
        summary.id_bytes = write_shard(shard.folder, shard.number, self._kept(items, summary, tally), kind)
        return asdict(summary)

    def _kept(
        self, items: Iterator[Document | Reject], summary: "_Summary", tally: Tally
    ) -> Iterator[TokenizedDocument]:
        """The tokenized documents; counts and rejects go into `summary`."""
        limit = self.experiment.max_text_tokens
        while block := list(islice(items, DOCUMENTS_AT_ONCE)):
            documents = []
            for item in block:
                if isinstance(item, Reject):
                    summary.rejects.append(asdict(item))
                elif reason := self.experiment.filter.reason(item.metadata):
                    summary.filtered[reason] = summary.filtered.get(reason, 0) + 1
                else:
                    documents.append(item)
            tally.add(len(block), sum(isinstance(item, Reject) for item in block))
            for tokenized in tokenize(documents, self.tokenizer, self.images, limit):
                if not all(len(ids) for ids in tokenized.ids):  # a control character alone, for some tokenizers
                    summary.rejects.append(asdict(Reject(tokenized.document.key, "text without ids")))
                    continue
                for name, value in columns_of(tokenized, len(self.builder.sequence(tokenized.tokens).ids)).items():
                    summary.columns[name].append(value)
                summary.texts_cut += _is_cut(tokenized, self.tokenizer, limit)
                yield tokenized


@dataclass
class _Summary:
    """What is kept of a shard besides its records."""

    ids: str  # the type of the token ids on disk
    columns: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in COLUMNS})
    id_bytes: list[int] = field(default_factory=list)
    filtered: dict[str, int] = field(default_factory=dict)
    rejects: list[dict[str, str]] = field(default_factory=list)
    texts_cut: int = 0


def _is_cut(item: TokenizedDocument, tokenizer: Tokenizer, limit: int) -> bool:
    pairs = zip(item.document.segments, item.ids, strict=True)
    return any(
        not isinstance(segment, Image) and len(ids) == limit and len(tokenizer.encode(segment.text)) > limit
        for segment, ids in pairs
    )


def _merge(experiment: Experiment, split: Split, shards: Sequence[Shard], draft: Draft) -> None:
    """The shards' summaries as one: columns, rejects, counts. Holds one shard's at a time."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
    id_bytes: list[np.ndarray] = []
    filtered: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    texts_cut, ids = 0, ""
    temporary = temporary_path(draft.folder / REJECTS)
    with temporary.open("w") as lines:
        for shard in shards:
            summary = shard.read_summary()
            for name, values in summary["columns"].items():
                columns[name].append(np.array(values, COLUMNS[name]))
            id_bytes.append(np.array(summary["id_bytes"], np.int32))
            filtered.update(summary["filtered"])
            texts_cut, ids = texts_cut + summary["texts_cut"], summary["ids"]
            reasons.update(reject["reason"].split(":")[0] for reject in summary["rejects"])
            lines.writelines(json.dumps(reject, ensure_ascii=False) + "\n" for reject in summary["rejects"])
    temporary.replace(draft.folder / REJECTS)
    documents = sum(map(len, columns["lengths"]))
    rejects, seen = reasons.total(), documents + reasons.total() + filtered.total()
    if rejects > experiment.max_reject_fraction * seen:
        raise InputError(
            f"{rejects} of {seen} documents of {split} are damaged, more than max_reject_fraction="
            f"{experiment.max_reject_fraction}; see {draft.folder / REJECTS}, fix them or raise --max-reject-fraction"
        )
    if documents == 0:
        raise InputError(
            f"the source of {split} gives no documents ({rejects} damaged, {filtered.total()} filtered); "
            "check its folder and the filter"
        )
    write_columns(draft.folder, columns)
    write_id_starts(draft.folder, id_bytes)
    draft.counts.update(
        documents=documents,
        tokens=sum(int(part.sum(dtype=np.int64)) for part in columns["lengths"]),
        filtered=dict(filtered),
        rejects=dict(reasons),
        texts_cut=texts_cut,
        ids=ids,
    )


def counts_line(run: Run, split: Split) -> str:
    """The counts of an ingested split as one line."""
    counts = run.artifact(recipes.documents, split).manifest["counts"]
    parts = [f"{counts['documents']} documents, {counts['tokens']} tokens"]
    for name in ("filtered", "rejects"):
        if counts[name]:
            parts.append(f"{name}: " + ", ".join(f"{number} {reason}" for reason, number in counts[name].items()))
    return "; ".join(parts)
