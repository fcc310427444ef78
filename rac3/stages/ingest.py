"""Ingest: sources -> filtered, tokenized documents in `array_record` shards, and what was rejected.

A shard of the source becomes a shard of documents.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from rac3.documents.document import (
    Document,
    Framing,
    Image,
    ImageError,
    Note,
    Reject,
    SampleError,
    Source,
    framed,
    image_size,
)
from rac3.documents.store import (
    COLUMNS,
    TokenizedDocument,
    columns_of,
    id_type,
    unstorable,
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
        items = self._heard(self.sources[shard.part].read(Path(self.experiment.data_dir), shard.name), shard, summary)
        summary.id_bytes = write_shard(shard.folder, shard.number, self._kept(items, summary, tally), kind)
        return asdict(summary)

    def _heard(
        self, items: Iterable[Document | Reject | Note], shard: Shard, summary: "_Summary"
    ) -> Iterator[Document | Reject]:
        """The samples; what else the source says goes into `summary`, unless the filter can't work with it."""
        for item in items:
            if isinstance(item, Note):
                self.experiment.filter.check(item, f"shard {shard.name} of {shard.part}")
                count, example = summary.notes.get(item.what, (0, item.example))
                summary.notes[item.what] = count + item.count, example
            else:
                yield item

    def _kept(
        self, items: Iterator[Document | Reject], summary: "_Summary", tally: Tally
    ) -> Iterator[TokenizedDocument]:
        """The tokenized documents; counts and rejects go into `summary`."""
        limit = self.experiment.max_text_tokens
        while block := list(islice(items, DOCUMENTS_AT_ONCE)):
            documents = []
            for item in block:
                checked = item if isinstance(item, Reject) else self._filtered(item)
                if isinstance(checked, Reject):
                    summary.rejects.append(asdict(checked))
                elif isinstance(checked, str):
                    summary.filtered[checked] = summary.filtered.get(checked, 0) + 1
                else:
                    documents.append(checked)
            tally.add(len(block), sum(isinstance(item, Reject) for item in block))
            for tokenized in tokenize(documents, self.tokenizer, self.images, limit):
                if not all(len(ids) for ids in tokenized.ids):  # a control character alone, for some tokenizers
                    summary.rejects.append(asdict(Reject(tokenized.document.key, "text without ids")))
                    continue
                for name, value in columns_of(tokenized, len(self.builder.sequence(tokenized.tokens).ids)).items():
                    summary.columns[name].append(value)
                summary.texts_cut += _is_cut(tokenized, self.tokenizer, limit)
                summary.pictures.add(tokenized)
                yield tokenized

    def _filtered(self, document: Document) -> Document | Reject | str:
        """The document; or a reject; or why the filter drops it."""
        if why := unstorable(document):
            return Reject(document.key, f"metadata that can't be stored: {why}")
        try:
            return self.experiment.filter.reason(document.metadata) or framed(document, self.experiment.framing)
        except SampleError as error:
            return Reject(document.key, str(error))


@dataclass
class Pictures:
    """What becomes of the pictures of a split.

    Attributes:
      count, not_square: how many there are, and how many are not square.
      area: the sum over the pictures of the share that lies outside their middle square.
      lowest, highest: codes; -1 without any.
    """

    count: int = 0
    not_square: int = 0
    area: float = 0.0
    lowest: int = -1
    highest: int = -1

    def add(self, item: TokenizedDocument) -> None:
        for segment, ids in zip(item.document.segments, item.ids, strict=True):
            if not isinstance(segment, Image) or not len(ids):
                continue
            low, high = int(ids.min()), int(ids.max())
            share = _outside(segment)
            self.include(Pictures(1, int(share > 0), share, low, high))

    def include(self, others: "Pictures") -> None:
        """Counts others with these."""
        if others.count:
            self.lowest = min(self.lowest, others.lowest) if self.count else others.lowest
            self.highest = max(self.highest, others.highest)
        self.count, self.not_square = self.count + others.count, self.not_square + others.not_square
        self.area += others.area

    def lines(self, framing: Framing) -> list[str]:
        """What is odd about them, in words."""
        said = []
        if self.not_square:
            what = f"{self.not_square} of {self.count} pictures are not square, and "
            share = f"{self.area / self.count:.1%}"
            if framing == "crop":
                said.append(f"{what}{share} of the area is cropped (--framing pad-white keeps it)")
            else:
                said.append(f"{what}padded rather than cropped by {share} of the area")
        if self.count > 1 and self.lowest == self.highest:
            said.append(f"WARNING: all {self.count} pictures are code {self.lowest} alone; check the VQGAN's weights")
        return said


def _outside(image: Image) -> float:
    """The share of a picture outside its middle square; 0 if only a user's own encoder knows its format."""
    try:
        sides = image_size(image.data)
    except ImageError:
        return 0.0
    return 1 - min(sides) / max(sides)


@dataclass
class _Summary:
    """What is kept of a shard besides its records."""

    ids: str  # the type of the token ids on disk
    columns: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in COLUMNS})
    id_bytes: list[int] = field(default_factory=list)
    filtered: dict[str, int] = field(default_factory=dict)
    rejects: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, tuple[int, str]] = field(default_factory=dict)  # how many, and an example
    texts_cut: int = 0
    pictures: Pictures = field(default_factory=Pictures)


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
    lost = _Lost()
    notes: dict[str, tuple[int, str]] = {}
    texts_cut, ids, pictures = 0, "", Pictures()
    temporary = temporary_path(draft.folder / REJECTS)
    with temporary.open("w", encoding="utf-8", errors="backslashreplace") as lines:
        for shard in shards:
            summary = shard.read_summary()
            for name, values in summary["columns"].items():
                columns[name].append(np.array(values, COLUMNS[name]))
            id_bytes.append(np.array(summary["id_bytes"], np.int32))
            filtered.update(summary["filtered"])
            pictures.include(Pictures(**summary["pictures"]))
            texts_cut, ids = texts_cut + summary["texts_cut"], summary["ids"]
            known = Counter({reason: 0 for reason in map(_category, summary["rejects"])})
            for reject in summary["rejects"]:
                known[_category(reject)] += reject["documents"] or 0
            reasons.update(known)
            here = len(summary["columns"]["lengths"]) + known.total() + sum(summary["filtered"].values())
            lost.add(here, [_category(each) for each in summary["rejects"] if each["documents"] is None])
            for what, (count, example) in summary["notes"].items():
                notes[what] = notes.get(what, (0, ""))[0] + count, notes.get(what, (0, example))[1]
            lines.writelines(json.dumps(reject, ensure_ascii=False) + "\n" for reject in summary["rejects"])
    temporary.replace(draft.folder / REJECTS)
    reasons.update(lost.documents())
    documents = sum(map(len, columns["lengths"]))
    rejects, seen = reasons.total(), documents + reasons.total() + filtered.total()
    if documents == 0:
        most = "".join(f", most of them {reason}" for reason, _ in reasons.most_common(1))
        raise InputError(
            f"the source of {split} gives no documents ({rejects} damaged{most}, {filtered.total()} filtered); "
            "check its folder and the filter"
        )
    if rejects > experiment.max_reject_fraction * seen:
        most = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(3))
        raise InputError(
            f"{rejects} of {seen} documents of {split} are damaged ({most}), more than max_reject_fraction="
            f"{experiment.max_reject_fraction}; see {draft.folder / REJECTS}, fix them or raise --max-reject-fraction"
        )
    write_columns(draft.folder, columns)
    write_id_starts(draft.folder, id_bytes)
    draft.counts.update(
        documents=documents,
        tokens=sum(int(part.sum(dtype=np.int64)) for part in columns["lengths"]),
        filtered=dict(filtered),
        rejects=dict(reasons),
        notes={what: {"count": count, "example": example} for what, (count, example) in notes.items()},
        texts_cut=texts_cut,
        pictures=asdict(pictures),
        framing=experiment.framing,
        ids=ids,
    )


def _category(reject: dict[str, Any]) -> str:
    return str(reject["reason"]).split(":")[0]


@dataclass
class _Lost:
    """Shards of which it is not known how many documents they should have had: as many as the others on average."""

    whole: list[int] = field(default_factory=list)  # documents of the other shards
    cut: list[tuple[int, list[str]]] = field(default_factory=list)  # what was read of these, and why not more

    def add(self, seen: int, reasons: list[str]) -> None:
        if reasons:
            self.cut.append((seen, reasons))
        else:
            self.whole.append(seen)

    def documents(self) -> Counter[str]:
        """How many are lost, by reason; at least one for each shard."""
        usual = round(float(np.mean(self.whole))) if self.whole else max([seen for seen, _ in self.cut], default=0)
        missing: Counter[str] = Counter()
        for seen, reasons in self.cut:
            missing[reasons[0]] += max(1, usual - seen)
        return missing


def counts_line(run: Run, split: Split) -> str:
    """The counts of an ingested split as one line."""
    counts = run.artifact(recipes.documents, split).manifest["counts"]
    parts = [f"{counts['documents']} documents, {counts['tokens']} tokens"]
    for name in ("filtered", "rejects"):
        if counts[name]:
            parts.append(f"{name}: " + ", ".join(f"{number} {reason}" for reason, number in counts[name].items()))
    return "; ".join([*parts, *noted_lines(counts)])


def noted_lines(counts: Mapping[str, Any]) -> list[str]:
    """What else the counts of a split say: what belongs to no sample, what is cropped."""
    said = [
        f"{note['count']} {what}" + (f" (such as {note['example']})" if note["example"] else "")
        for what, note in counts.get("notes", {}).items()
    ]
    pictures = Pictures(**counts["pictures"]).lines(counts["framing"]) if "pictures" in counts else []
    return said + pictures  # documents of older versions have neither
