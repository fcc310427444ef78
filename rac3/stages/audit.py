"""Audit: does what a model is to produce reach it by another way than by its prompt?

neighbors   of training documents: none is the document itself, repeats its text or its image, is more similar to it
            than selection allows, or is withdrawn
groups      as training packs them: the ids of a document's image stand in none of the documents retrieved for it
held out    queries: the vector of a text is that of the text alone, and of an image that of the image alone, so that
            the target had no part in what was retrieved; and nothing retrieved is a copy of the target
"""

import json
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Int

from rac3.artifacts import Workdir, write_atomic
from rac3.batches.packing import MAIN_IMAGE, RETRIEVED_IMAGE
from rac3.config import InputError
from rac3.experiment import Experiment, Split
from rac3.progress import Progress
from rac3.stages import recipes
from rac3.stages.embed import PARTS, open_documents, open_queries
from rac3.stages.encoders import open_clip, open_text, open_vqgan
from rac3.stages.ingest import vocabulary_of
from rac3.stages.memory import OpenMemory
from rac3.stages.retrieve import read_neighbors
from rac3.stages.train import training_stream

DOCUMENTS_AT_ONCE = 8192
ROWS = 64  # packed rows that are read
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

    def leak(self, what: str, where: str) -> None:
        self.leaks[what] += 1
        if len(self.named) < NAMED:
            self.named.append(f"{what}: {where}")


def audit(experiment: Experiment, workdir: Workdir) -> str:
    """Looks for leaks, and writes what it found to `report/audit.json`; the report for a terminal.

    Raises:
      InputError: something leaks, or is not made yet.
    """
    if not recipes.retrieves(experiment):
        return "audit: retriever:none retrieves nothing"
    findings = Findings()
    held_out = [split for split in experiment.data.sources() if experiment.data.role(split) == "held out"]
    _audit_neighbors(experiment, workdir, findings)
    _audit_groups(experiment, workdir, findings)
    for split in held_out:
        _audit_queries(experiment, workdir, split, findings)
        _audit_targets(experiment, workdir, split, findings)
    path = workdir.path / "report" / "audit.json"
    path.parent.mkdir(exist_ok=True)
    result = {"counts": findings.counts, "leaks": findings.leaks, "named": findings.named}
    write_atomic(path, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    lines = [f"audit: {count:,} {what}" for what, count in findings.counts.items()]
    if findings.leaks:
        print("\n".join(lines))
        total = ", ".join(f"{count} x {what}" for what, count in findings.leaks.items())
        raise InputError(f"leaks: {total}; first: {findings.named[0]}; {path} names more; take them down, or make anew")
    return "\n".join([*lines, "audit: no leak"])


def _audit_neighbors(experiment: Experiment, workdir: Workdir, findings: Findings) -> None:
    """All that selection has kept for training, from which every epoch draws."""
    opened = OpenMemory(experiment, workdir, recipes.memory_splits(experiment, "train"))
    neighbors, memory = read_neighbors(experiment, workdir, "train"), opened.memory
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
    for row, column in np.argwhere(where):
        keys = "(many)"
        if len(findings.named) < NAMED:
            keys = " -> ".join(opened.document(int(i)).document.key for i in (main[row], ids[row, column]))
        findings.leak(what, keys)


def _audit_groups(experiment: Experiment, workdir: Workdir, findings: Findings) -> None:
    """The tokens of the first rows that training packs."""
    vocabulary = vocabulary_of(open_text(experiment, workdir), open_vqgan(experiment, workdir))
    stream = training_stream(experiment, workdir, vocabulary)
    plan = stream.plan(0)
    for number in range(min(ROWS, len(plan.rows))):
        row = stream.row(plan, number)
        for segment in range(1, int(row.segments.max()) + 1):
            here = row.segments == segment
            main, retrieved = (
                np.asarray(row.targets[here & (row.kind == kind)]) for kind in (MAIN_IMAGE, RETRIEVED_IMAGE)
            )
            findings.counts["packed groups"] += 1
            if len(main) and _contains(retrieved, main):
                findings.leak("packed group with its main image among the retrieved", f"row {number}, group {segment}")


def _contains(ids: Int[np.ndarray, " n"], wanted: Int[np.ndarray, " m"]) -> bool:
    """Whether `wanted` stands in `ids`, in one piece."""
    if len(ids) < len(wanted):
        return False
    return bool((np.lib.stride_tricks.sliding_window_view(ids, len(wanted)) == wanted).all(axis=1).any())


def _audit_queries(experiment: Experiment, workdir: Workdir, split: Split, findings: Findings) -> None:
    """Embeds some queries again, from the one part that a query may hold."""
    documents, encoder = open_documents(experiment, workdir, split), open_clip(experiment, workdir)
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
        stored = open_queries(experiment, workdir, split, part)[np.array(rows)]
        limit = SAME_VECTOR[experiment.embedding_dtype] + (2e-2 if experiment.clip.dtype == "bfloat16" else 0)
        for row, away in zip(rows, np.abs(stored - alone).max(axis=1), strict=True):
            findings.counts[f"{split}: queries embedded again"] += 1
            if away > limit:
                findings.leak(f"{split}: {part} query that is not of the {part} alone", items[row].key)


def _audit_targets(experiment: Experiment, workdir: Workdir, split: Split, findings: Findings) -> None:
    """A text asks for an image, an image for a text: nothing retrieved may be a copy of it."""
    documents = open_documents(experiment, workdir, split)
    opened = OpenMemory(experiment, workdir, recipes.memory_splits(experiment, split))
    neighbors = read_neighbors(experiment, workdir, split)
    columns = {"text": "image_hashes", "image": "text_hashes"}
    theirs = {name: np.concatenate([store.column(name) for store in opened.stores]) for name in columns.values()}
    for start in range(0, len(neighbors), DOCUMENTS_AT_ONCE):
        ids = neighbors[start : start + DOCUMENTS_AT_ONCE]
        for number, part in enumerate(PARTS):
            found, name = ids[:, number], columns[part]
            own = documents.column(name)[start : start + len(ids), None]
            copies = (found >= 0) & (theirs[name][np.maximum(found, 0)] == own) & (own != 0)
            findings.counts[f"{split}: documents retrieved"] += int((found >= 0).sum())
            target = "image" if part == "text" else "text"
            for row, column in np.argwhere(copies):
                key = documents[start + int(row)].document.key
                copy = opened.document(int(found[row, column])).document.key
                findings.leak(f"{split}: {target} that is retrieved", f"{key} -> {copy}")
