"""Ingest: sources -> filtered, tokenized documents in `array_record` shards, and what was rejected."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from rac3.artifacts import Draft, Workdir, write_atomic
from rac3.batches.groups import GroupBuilder
from rac3.batches.masking import Masking
from rac3.config import InputError
from rac3.documents.document import Document, Image, Reject
from rac3.documents.store import KEY_HASHES, LENGTHS, TEXT_LENGTHS, TokenizedDocument, key_hash, write_shard
from rac3.experiment import Experiment, Split
from rac3.progress import Progress
from rac3.stages import recipes
from rac3.stages.encoders import ImageCodec, open_text, open_vqgan
from rac3.tokens.text import Tokenizer
from rac3.tokens.vocabulary import Vocabulary

REJECTS = "rejects.jsonl"
IMAGES_AT_ONCE = 512  # pixels of this many images are held at a time


def vocabulary_of(tokenizer: Tokenizer, codec: ImageCodec) -> Vocabulary:
    return Vocabulary(tokenizer.size, codec.codes)


def ingest(experiment: Experiment, workdir: Workdir) -> None:
    """Makes the documents of every split that has none yet.

    Raises:
      InputError: a source gives no documents, or more rejects than `max_reject_fraction`.
    """
    missing = [split for split in experiment.data.sources() if not workdir.find(recipes.documents(experiment, split))]
    if not missing:
        return
    tokenizer, codec = open_text(experiment, workdir), open_vqgan(experiment, workdir)
    builder = GroupBuilder(vocabulary_of(tokenizer, codec), Masking("none"), 1.0)
    for split in missing:
        with workdir.write(recipes.documents(experiment, split)) as draft:
            _ingest_split(experiment, split, tokenizer, codec, builder, draft)


def _ingest_split(
    experiment: Experiment,
    split: Split,
    tokenizer: Tokenizer,
    codec: ImageCodec,
    builder: GroupBuilder,
    draft: Draft,
) -> None:
    source, data_dir = experiment.data.sources()[split], Path(experiment.data_dir)
    shards = source.shards(data_dir)
    with Progress(f"ingest {split}", len(shards), "shards") as bar:
        for number, shard in enumerate(shards):
            done = draft.folder / f"{number:05d}.json"
            if not done.exists():
                items = source.read(data_dir, shard)
                _ingest_shard(experiment, items, tokenizer, codec, builder, draft.folder / f"{number:05d}.array_record")
            bar.update()
    _merge(experiment, split, len(shards), draft)


def _ingest_shard(
    experiment: Experiment,
    items: Iterator[Document | Reject],
    tokenizer: Tokenizer,
    codec: ImageCodec,
    builder: GroupBuilder,
    path: Path,
) -> None:
    """One shard: its records first, then the summary that says the shard is whole."""
    rejects: list[dict[str, str]] = []
    filtered: Counter[str] = Counter()
    kept: list[TokenizedDocument] = []
    waiting: list[Document] = []
    for item in items:
        if isinstance(item, Reject):
            rejects.append(asdict(item))
        elif reason := experiment.filter.reason(item.metadata):
            filtered[reason] += 1
        else:
            waiting.append(item)
            if len(waiting) == IMAGES_AT_ONCE:
                kept += tokenize(waiting, tokenizer, codec, experiment.max_text_tokens)
                waiting = []
    kept += tokenize(waiting, tokenizer, codec, experiment.max_text_tokens)
    temporary = path.with_suffix(".tmp")
    write_shard(temporary, kept)
    temporary.replace(path)
    summary = {
        "lengths": [len(builder.sequence(item).ids) for item in kept],
        "text_lengths": [_text_length(item) for item in kept],
        "key_hashes": [key_hash(item.document.key) for item in kept],
        "filtered": filtered,
        "rejects": rejects,
        "texts_cut": sum(_is_cut(item, tokenizer, experiment.max_text_tokens) for item in kept),
    }
    write_atomic(path.with_suffix(".json"), json.dumps(summary))


def tokenize(
    documents: Sequence[Document], tokenizer: Tokenizer, codec: ImageCodec, max_text_tokens: int
) -> list[TokenizedDocument]:
    """Text ids and image codes of each document."""
    codes = iter(codec.encode([image for document in documents for image in document.images]))
    tokenized = []
    for document in documents:
        ids = [
            next(codes)
            if isinstance(segment, Image)
            else np.array(tokenizer.encode(segment.text)[:max_text_tokens], np.int32)
            for segment in document.segments
        ]
        tokenized.append(TokenizedDocument(document, tuple(ids)))
    return tokenized


def _text_length(item: TokenizedDocument) -> int:
    pairs = zip(item.document.segments, item.ids, strict=True)
    return sum(len(ids) for segment, ids in pairs if not isinstance(segment, Image))


def _is_cut(item: TokenizedDocument, tokenizer: Tokenizer, limit: int) -> bool:
    pairs = zip(item.document.segments, item.ids, strict=True)
    return any(
        not isinstance(segment, Image) and len(ids) == limit and len(tokenizer.encode(segment.text)) > limit
        for segment, ids in pairs
    )


def _merge(experiment: Experiment, split: Split, shards: int, draft: Draft) -> None:
    """The shards' summaries as one: lengths, keys, rejects, counts."""
    paths = [draft.folder / f"{number:05d}.json" for number in range(shards)]
    summaries: list[dict[str, Any]] = [json.loads(path.read_text()) for path in paths]
    rejects = [reject for summary in summaries for reject in summary["rejects"]]
    lengths, text_lengths, key_hashes = (
        np.array([value for summary in summaries for value in summary[name]], dtype)
        for name, dtype in (("lengths", np.int32), ("text_lengths", np.int32), ("key_hashes", np.uint64))
    )
    filtered = sum((Counter(summary["filtered"]) for summary in summaries), Counter())
    lines = "".join(json.dumps(reject, ensure_ascii=False) + "\n" for reject in rejects)
    write_atomic(draft.folder / REJECTS, lines)
    seen = len(lengths) + len(rejects) + filtered.total()
    if len(rejects) > experiment.max_reject_fraction * seen:
        raise InputError(
            f"{len(rejects)} of {seen} documents of {split} are damaged, more than max_reject_fraction="
            f"{experiment.max_reject_fraction}; see {draft.folder / REJECTS}, mend them or raise --max-reject-fraction"
        )
    if len(lengths) == 0:
        raise InputError(
            f"the source of {split} gives no documents ({len(rejects)} damaged, {filtered.total()} filtered); "
            "check its folder and the filter"
        )
    np.save(draft.folder / LENGTHS, lengths)
    np.save(draft.folder / TEXT_LENGTHS, text_lengths)
    np.save(draft.folder / KEY_HASHES, key_hashes)
    reasons = Counter(reject["reason"].split(":")[0] for reject in rejects)
    draft.counts.update(
        documents=len(lengths),
        tokens=int(lengths.sum()),
        filtered=dict(filtered),
        rejects=dict(reasons),
        texts_cut=sum(summary["texts_cut"] for summary in summaries),
    )
    for path in paths:
        path.unlink()


def counts_line(experiment: Experiment, workdir: Workdir, split: Split) -> str:
    """The counts of an ingested split as one line."""
    counts = workdir.require(recipes.documents(experiment, split), "rac3 ingest").manifest["counts"]
    parts = [f"{counts['documents']} documents, {counts['tokens']} tokens"]
    for name in ("filtered", "rejects"):
        if counts[name]:
            parts.append(f"{name}: " + ", ".join(f"{number} {reason}" for reason, number in counts[name].items()))
    return "; ".join(parts)
