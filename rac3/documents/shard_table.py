"""The parquet table next to a webdataset tar: the metadata of its samples."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from rac3.documents.document import JSON, Note, plain_json

MAX_ROWS, MAX_BYTES = 10_000_000, 2**30  # of a table: img2dataset's have 10,000 rows


class ShardTable:
    """Rows by sample. Read on first use: most shards never need it.

    Attributes:
      defect: why the table, or a column of it, could not be read; None if all was, or none was needed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.defect: str | None = None
        self._columns: tuple[str, ...] = ()
        self._unread: tuple[str, ...] = ()
        self._asked = self._found = 0
        self._missed = ""  # the first sample without a row

    @cached_property
    def rows(self) -> dict[str, dict[str, JSON]]:
        """Rows by sample key; empty if the table is missing or unreadable."""
        import pyarrow
        import pyarrow.parquet

        if not self._path.is_file():
            return {}
        try:
            with pyarrow.parquet.ParquetFile(self._path) as file:
                size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
                if file.metadata.num_rows > MAX_ROWS or size > MAX_BYTES:
                    raise ValueError(f"{file.metadata.num_rows} rows, {size} bytes are too many")
                table = file.read()
        except (pyarrow.ArrowException, OSError, ValueError, TypeError, MemoryError) as error:
            return self._broken(" ".join(str(error).split())[:120])
        self._columns = tuple(table.column_names)
        if "key" not in self._columns:
            return self._broken(f"no column `key` among {', '.join(self._columns)}"[:120])
        columns = {name: _values(table.column(name)) for name in self._columns}
        self._unread = tuple(name for name, values in columns.items() if values is None)
        if self._unread:
            self.defect = f"broken column: {', '.join(self._unread)} can't be converted"
        known = {name: values for name, values in columns.items() if values is not None}
        if "key" not in known:
            return self._broken("its keys can't be read")
        rows = (dict(zip(known, values, strict=True)) for values in zip(*known.values(), strict=True))
        return {str(row["key"]): {name: plain_json(value) for name, value in row.items()} for row in rows}

    def _broken(self, why: str) -> dict[str, dict[str, JSON]]:
        self.defect, self._unread = f"broken table: {why}", ("*",)
        return {}

    def row(self, key: str) -> dict[str, JSON]:
        """The row of a sample; empty if it has none."""
        found = self.rows.get(key)
        self._asked, self._found = self._asked + 1, self._found + (found is not None)
        if found is None and not self._missed:
            self._missed = key
        return found or {}

    def notes(self) -> Iterator[Note]:
        """What the samples that were looked up miss."""
        if self._unread and self._asked:
            yield Note("metadata can't be read from the table", self._asked, self._path.name, self._unread)
        if not self.rows_were_read or self._found == self._asked:
            return
        if self._found:
            yield Note("the table has no row for the sample", self._asked - self._found, self._missed)
        else:
            first = next(iter(self.rows))
            example = f"{self._path.name} has {first!r}, the shard {self._missed!r}"
            yield Note("the keys of the table match no sample", self._asked, example, self._columns)

    @property
    def rows_were_read(self) -> bool:
        return bool(self.__dict__.get("rows"))


def _values(column: Any) -> list[Any] | None:
    """The values of a column; what Python has no type for (nanoseconds, years past 9999) as text; None if neither."""
    import pyarrow

    for convert in (lambda: column.to_pylist(), lambda: column.cast(pyarrow.string()).to_pylist()):
        try:
            values: list[Any] = convert()
            return values
        except (pyarrow.ArrowException, ValueError, OverflowError, TypeError):
            continue
    return None
