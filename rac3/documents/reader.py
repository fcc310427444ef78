"""Some documents of several sources, in memory: what encoders are fitted on and judged by."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from rac3.config import InputError
from rac3.documents.document import Document, Framing, Note, Reject, SampleError, Source, framed
from rac3.documents.filter import LaionFilter
from rac3.execution.progress import progress


def read_documents(
    sources: Mapping[str, Source], data_dir: Path, filter: LaionFilter, limit: int, framing: Framing = "crop"
) -> list[Document]:
    """At most `limit` documents that pass the filter: as many from each shard of all sources, in their order.

    Args:
      sources: by the names of their splits.
      data_dir: the folder that relative paths of the sources start from.

    Raises:
      InputError: no document passes the filter, or the filter can't know.
    """
    names = " and ".join(sources)
    shards = [(source, shard) for source in sources.values() for shard in source.shards(data_dir)]
    per_shard = -(-limit // len(shards))
    documents: list[Document] = []
    dropped: Counter[str] = Counter()
    for source, shard in progress(shards, f"read {names} documents", len(shards), "shards"):
        taken = 0
        for item in source.read(data_dir, shard):
            if isinstance(item, Note):
                filter.check(item, f"shard {shard} of {names}")
            if reason := _dropped(filter, item):
                dropped[reason] += 1
            if reason or not isinstance(item, Document):
                continue
            documents.append(framed(item, framing))
            taken += 1
            if taken == per_shard:
                break
    if not documents:
        most = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common(3)) or "it is empty"
        raise InputError(f"the source of {names} gives no documents that pass the filter ({most}); check its folder")
    return documents[:limit]


def _dropped(filter: LaionFilter, item: Document | Reject | Note) -> str | None:
    """Why an item is no document to read, as a category; None if it is one, or a note."""
    if isinstance(item, Reject):
        return item.reason.split(":")[0]
    try:
        return filter.reason(item.metadata) if isinstance(item, Document) else None
    except SampleError as error:
        return str(error).split(":")[0]
