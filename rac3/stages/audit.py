"""Audit: does the target of a prompt reach the model by any way but the prompt?

neighbors   of training documents: none is the document itself, repeats its text or its image, is more similar to it
            than selection allows, or is withdrawn
groups      as training packs them: no other document has the image ids, or the text ids, of the main one
held out    queries: the vector of a text is that of the text alone, and of an image that of the image alone, so that
            the target could not influence the retrieval; and nothing retrieved is a copy of the target
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Int

from rac3.artifacts.workdir import write_atomic
from rac3.config import InputError
from rac3.execution.progress import Progress
from rac3.experiment import Split
from rac3.retrieval.open_memory import OpenMemory
from rac3.run import PARTS, Run

DOCUMENTS_AT_ONCE = 8192
GROUPS = 1024  # of training, whose documents are read
QUERIES = 256  # held-out documents that are embedded again
NAMED = 20  # leaks that are named
ROUNDING = 1e-5  # of inner products of float32 vectors
SAME_VECTOR = {"float32": 1e-3, "bfloat16": 2e-2, "int8": 2e-2}  # by how they are stored


@dataclass
class Findings:
    """What was looked at, what leaks, and the first leaks by name."""

    counts: Counter[str] = field(default_factory=Counter)
    leaks: Counter[str] = field(default_factory=Counter)
    named: list[str] = field(default_factory=list)

    def add(self, what: str, count: int, names: Sequence[str]) -> None:
        """Leaks of one kind, the first of them by name."""
        if count:
            self.leaks[what] += count
            self.named += [f"{what}: {name}" for name in names[: NAMED - len(self.named)]]


def audit(run: Run) -> str:
    """Looks for leaks and writes `report/audit.json`; returns a summary for the terminal.

    Raises:
      InputError: something leaks, or is not made yet.
    """
    experiment = run.experiment
    if not experiment.retrieves:
        return "audit: retriever:none retrieves nothing"
    findings = Findings()
    held_out = [split for split in experiment.data.sources() if experiment.data.role(split) == "held out"]
    _audit_neighbors(run, findings)
    _audit_groups(run, findings)
    for split in held_out:
        _audit_queries(run, split, findings)
        _audit_targets(run, split, findings)
    path = run.workdir.path / "report" / "audit.json"
    path.parent.mkdir(exist_ok=True)
    result = {"counts": findings.counts, "leaks": findings.leaks, "named": findings.named}
    write_atomic(path, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    lines = [f"audit: {count:,} {what}" for what, count in findings.counts.items()]
    if findings.leaks:
        print("\n".join(lines))
        total = ", ".join(f"{count} x {what}" for what, count in findings.leaks.items())
        raise InputError(
            f"leaks: {total}; first: {findings.named[0]}; {path} names more; take them down, or make them again"
        )
    looked = any(count for what, count in findings.counts.items() if what != "groups of training")
    return "\n".join([*lines, "audit: no leak" if looked else "audit: there are no neighbors or queries to look at"])


def _audit_neighbors(run: Run, findings: Findings) -> None:
    """All that selection has kept for training, from which every epoch draws."""
    opened = run.memory("train")
    neighbors, memory = run.neighbors("train"), opened.memory
    limit = opened.selection.max_similarity + ROUNDING
    with Progress("audit neighbors", len(neighbors), "documents") as bar:
        for start in range(0, len(neighbors), DOCUMENTS_AT_ONCE):
            ids = neighbors[start : start + DOCUMENTS_AT_ONCE]
            ids = ids.reshape(len(ids), -1)
            main = np.arange(start, start + len(ids))
            vectors = memory.embeddings_of(ids)
            similarity = np.matmul(vectors, memory.embeddings_of(main)[:, :, None])[:, :, 0]
            broken = {
                "retrieves itself": ids == main[:, None],
                "retrieves its own text or image": memory.duplicates(ids, main),
                "retrieves a document more similar than max_similarity": similarity > limit,
                "retrieves what is withdrawn": memory.are_withdrawn(ids),
            }
            for what, where in broken.items():
                _name_leaks(opened, findings, f"training document {what}", main, ids, where & (ids >= 0))
            findings.counts["neighbors of training documents"] += int((ids >= 0).sum())
            bar.update(len(ids))


def _name_leaks(
    opened: OpenMemory,
    findings: Findings,
    what: str,
    main: Int[np.ndarray, " documents"],
    ids: Int[np.ndarray, "documents neighbors"],
    where: Bool[np.ndarray, "documents neighbors"],
) -> None:
    places = np.argwhere(where)
    pairs = [(int(main[row]), int(ids[row, column])) for row, column in places[:NAMED]]
    keys = [" -> ".join(opened.document(number).document.key for number in pair) for pair in pairs]
    findings.add(what, len(places), keys)


def _audit_groups(run: Run, findings: Findings) -> None:
    """Compares the ids of the documents in the first groups that training packs."""
    stream = run.training_stream()
    groups, leaks = stream.groups(np.arange(GROUPS)), []
    for neighbors, number in zip(groups.neighbors.tolist(), groups.main.tolist(), strict=True):
        *others, main = stream.documents.many([*(each for each in neighbors if each >= 0), number])
        ids = {part.tobytes() for part in main.ids}
        leaks += [
            f"{main.document.key} -> {other.document.key}" for other in others if ids & {x.tobytes() for x in other.ids}
        ]
        findings.counts["groups of training"] += 1
    findings.add("group of training whose main image or text is among the retrieved", len(leaks), leaks)


def _audit_queries(run: Run, split: Split, findings: Findings) -> None:
    """Embeds some queries again, from the one part that a query may hold."""
    documents, encoder = run.documents(split), run.encoder
    items = [item.document for item in documents.many(range(min(QUERIES, len(documents))))]
    for part in PARTS:
        rows = [row for row, item in enumerate(items) if (item.text if part == "text" else item.images)]
        if not rows:
            continue
        alone = (
            encoder.embed_texts([items[row].text for row in rows])
            if part == "text"
            else encoder.embed_images([items[row].images[0] for row in rows])
        )
        stored = run.queries(split, part)[np.array(rows)]
        coarse = getattr(run.experiment.clip, "dtype", "") == "bfloat16"
        limit = SAME_VECTOR[run.experiment.embedding_dtype] + (2e-2 if coarse else 0)
        away = np.abs(stored - alone).max(axis=1) > limit
        findings.counts[f"{split}: queries embedded again"] += len(rows)
        wrong = [items[rows[number]].key for number in np.flatnonzero(away)]
        findings.add(f"{split}: {part} query that is not of the {part} alone", len(wrong), wrong)


def _audit_targets(run: Run, split: Split, findings: Findings) -> None:
    """A text asks for an image, an image for a text: nothing retrieved may be a copy of it."""
    documents, opened, neighbors = run.documents(split), run.memory(split), run.neighbors(split)
    columns = {"text": "image_hashes", "image": "text_hashes"}
    theirs = {
        name: np.concatenate([store.column(name) for store in (part.documents for part in opened.parts)])
        for name in columns.values()
    }
    for start in range(0, len(neighbors), DOCUMENTS_AT_ONCE):
        ids = neighbors[start : start + DOCUMENTS_AT_ONCE]
        for number, part in enumerate(PARTS):
            found, name = ids[:, number], columns[part]
            own = documents.column(name)[start : start + len(ids), None]
            copies = (found >= 0) & (theirs[name][np.maximum(found, 0)] == own) & (own != 0)
            findings.counts[f"{split}: documents retrieved"] += int((found >= 0).sum())
            target = "image" if part == "text" else "text"
            places = np.argwhere(copies)
            pairs = [(start + int(row), int(found[row, column])) for row, column in places[:NAMED]]
            keys = [f"{documents[asked].document.key} -> {opened.document(copy).document.key}" for asked, copy in pairs]
            findings.add(f"{split}: {target} that is retrieved", len(places), keys)
