"""Audit of files: is everything in the workdir as it was written?

Artifacts of other settings are read too. Drafts are not: whoever resumes one makes what is missing.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from rac3.artifacts.arrays import Rows
from rac3.artifacts.files import ARRAY, damage, damaged
from rac3.artifacts.workdir import Artifact, Workdir
from rac3.config import InputError
from rac3.documents.store import DocumentStore
from rac3.execution.progress import Progress

AT_ONCE_BYTES = 64 * 2**20  # of an array
DOCUMENTS_AT_ONCE = 1024


def audit_files(workdir: Workdir) -> str:
    """Reads every file; returns a summary for the terminal.

    Raises:
      InputError: files are missing or damaged; all of them are named on standard error.
    """
    artifacts, wrong, files, size, unknown = workdir.artifacts(), [], 0, 0, 0
    with Progress("audit files", len(artifacts), "artifacts") as bar:
        for artifact in artifacts:
            found = list(dict.fromkeys(_wrong(artifact)))
            print(*(f"rac3: {each}\n" for each in found), sep="", end="", file=sys.stderr)
            wrong += found
            if not found:
                known = artifact.manifest.get("files", {})
                files, size = files + len(known), size + sum(each for each, _ in known.values())
                unknown += "files" not in artifact.manifest
            bar.update()
    if wrong:
        raise InputError(f"{len(wrong)} of the files in {workdir.path} are missing or damaged; first: {wrong[0]}")
    old = f"; {unknown} artifacts of an older version have no record of their files" if unknown else ""
    return f"audit: {files:,} files of {len(artifacts)} artifacts, {size / 1e6:,.1f} MB: all as they were written{old}"


def _wrong(artifact: Artifact) -> Iterator[str]:
    """What is wrong with each file of an artifact that is not as it was written."""
    try:
        files = artifact.manifest.get("files", {})
    except InputError as error:
        yield str(error)
        return
    for path, what in damage(artifact.folder, files, everything=True):
        yield str(damaged(path, what))
    for path in sorted(artifact.folder.rglob(ARRAY)):
        yield from _wrong_rows(path.parent)
    if artifact.folder.parent.name == "documents":
        yield from _wrong_documents(artifact.folder)


def _wrong_rows(path: Path) -> Iterator[str]:
    try:
        rows = Rows(path)
        width = max(1, rows[:1].nbytes) if len(rows) else 1
    except InputError as error:
        yield str(error)
        return
    step = max(1, AT_ONCE_BYTES // width)
    for start in range(0, len(rows), step):
        try:
            rows[start : start + step]
        except InputError as error:
            yield str(error)


def _wrong_documents(folder: Path) -> Iterator[str]:
    try:
        store = DocumentStore(folder)
        total = len(store)
    except InputError as error:
        yield str(error)
        return
    for start in range(0, total, DOCUMENTS_AT_ONCE):
        rows = range(start, min(start + DOCUMENTS_AT_ONCE, total))
        for read in (lambda rows: [store.tokens(row) for row in rows], store.many):  # two files
            try:
                read(rows)
            except InputError as error:
                yield str(error)
