"""Some documents of several sources, in memory: what encoders are fitted on and judged by."""

from collections.abc import Mapping
from pathlib import Path

from rac3.config import InputError
from rac3.documents.document import Document, Reject, Source
from rac3.documents.filter import LaionFilter
from rac3.execution.progress import progress


def read_documents(sources: Mapping[str, Source], data_dir: Path, filter: LaionFilter, limit: int) -> list[Document]:
    """At most `limit` documents that pass the filter: as many from each shard of all sources, in their order.

    Args:
      sources: by the names of their splits.
      data_dir: the folder that relative paths of the sources start from.

    Raises:
      InputError: no document passes the filter.
    """
    names = " and ".join(sources)
    shards = [(source, shard) for source in sources.values() for shard in source.shards(data_dir)]
    per_shard = -(-limit // len(shards))
    documents: list[Document] = []
    for source, shard in progress(shards, f"read {names} documents", len(shards), "shards"):
        taken = 0
        for item in source.read(data_dir, shard):
            if isinstance(item, Reject) or filter.reason(item.metadata):
                continue
            documents.append(item)
            taken += 1
            if taken == per_shard:
                break
    if not documents:
        raise InputError(f"the source of {names} gives no documents that pass the filter; check data_dir and filter")
    return documents[:limit]
