"""Maps over shards: an executor opens a job once per worker, and each worker makes one shard after another.

    run(executor, job, shards)   Local: one worker, this process
                                 Ray:   workers on all machines of a cluster, each with its own models and devices

A shard's summary is written last: a shard is done when it has one. A run makes the missing shards, in any order. The
results do not depend on the executor.
"""

import contextlib
import json
import os
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rac3.artifacts.files import TEMPORARY, UNWRITABLE, damaged, refusal
from rac3.artifacts.workdir import write_atomic
from rac3.config import InputError
from rac3.execution.progress import Progress

ATTEMPTS = 3  # per shard, before the run goes on without it
MAX_POISONED = 20  # failed shards that stop the run: the cause is not the shards
BEAT = 1.0  # seconds between `Beat`s
TENSORSTORE_TEMPORARY = ".__lock"  # left over from a killed write


@dataclass(frozen=True)
class Shard:
    """A piece of a stage's work. Writes its own files into `folder`, which it may share with other shards.

    Attributes:
      part: the split.
      number: index within the part.
      name: within the part, for messages.
      folder: where its files and summary go.
      kind: what the stage makes in it, if it makes several things.
    """

    part: str
    number: int
    name: str
    folder: Path
    kind: str = ""

    @property
    def summary(self) -> Path:
        return self.folder / f"{self.number:06d}.json"

    def __str__(self) -> str:
        return " ".join(filter(None, (self.part, self.kind, self.name)))

    def read_summary(self) -> dict[str, Any]:
        """The worker's result for this shard."""
        try:
            return json.loads(self.summary.read_bytes())
        except ValueError as error:
            raise damaged(self.summary, "is damaged: it is no JSON") from error


def document_shards(part: str, documents: int, per_shard: int, folder: Path, kind: str = "") -> list[Shard]:
    """Split documents into ranges; a range is one file in each array that a stage makes of them."""
    starts = range(0, documents, per_shard)
    names = [f"documents {start} to {min(start + per_shard, documents) - 1}" for start in starts]
    return [Shard(part, number, name, folder, kind) for number, name in enumerate(names)]


def document_rows(shard: Shard, documents: int, per_shard: int) -> range:
    """The rows of the documents in a shard of `document_shards`."""
    start = shard.number * per_shard
    return range(start, min(start + per_shard, documents))


class Tally:
    """A worker's progress in a shard. An interrupted run stops at the next call of `add`."""

    def __init__(self, stopped: threading.Event | None = None) -> None:
        self.documents = self.rejects = 0
        self._stopped = stopped

    def add(self, documents: int, rejects: int = 0) -> None:
        if self._stopped is not None and self._stopped.is_set():
            raise _StoppedError
        self.documents += documents
        self.rejects += rejects


class _StoppedError(BaseException):
    """Ends a thread of an interrupted run. Not an Exception, which a source might swallow."""


@runtime_checkable
class Worker(Protocol):
    """Makes a shard: writes its files and returns its summary, JSON data. Called from many threads."""

    def __call__(self, shard: Shard, tally: Tally) -> Mapping[str, Any]: ...


@runtime_checkable
class Job(Protocol):
    """A stage as sent to the workers: small and picklable."""

    @property
    def label(self) -> str: ...

    def open(self) -> Worker:
        """Load the models onto the devices of this process."""
        ...


@dataclass(frozen=True)
class Outcome:
    """An attempt at a shard; it succeeded if `error` is None."""

    shard: Shard
    documents: int = 0
    rejects: int = 0
    error: str | None = None
    trace: str = ""
    stops: bool = False  # an InputError: other attempts and shards would fail, too
    refused: tuple[int, str] | None = None  # error number and path, where the disk can't be written: likewise


@dataclass(frozen=True)
class Beat:
    """A sign of life: the number of open workers, and their progress in unfinished shards."""

    workers: int
    documents: int = 0
    rejects: int = 0


Events = Generator[Outcome | Beat, None, None]


@runtime_checkable
class Executor(Protocol):
    """Makes shards, here or elsewhere."""

    def outcomes(self, job: Job, missing: deque[Shard]) -> Events:
        """Take shards from `missing` until it is empty; the caller may append shards to try again."""
        ...


def run(executor: Executor, job: Job, shards: Sequence[Shard]) -> dict[str, int | float]:
    """Make the missing shards.

    Returns:
      Statistics of this run for the manifest: documents, seconds, documents_per_second, workers.

    Raises:
      InputError: a worker raised one, or shards failed `ATTEMPTS` times; the others are still made, unless
        `MAX_POISONED` fail.
    """
    missing = deque(shard for shard in shards if not shard.summary.exists())
    ledger = _Ledger(missing, time.monotonic())
    if missing:
        with (
            Progress(job.label, len(shards), "shards", initial=len(shards) - len(missing)) as bar,
            contextlib.closing(executor.outcomes(job, missing)) as events,
        ):
            for event in events:
                bar.update(ledger.take(event), ledger.note())
                if len(ledger.poisoned) == MAX_POISONED:
                    break
    if ledger.poisoned:
        left = sum(not shard.summary.exists() for shard in shards) - len(ledger.poisoned)
        raise InputError(_poisoned(job.label, ledger.poisoned, left)) from _trace(ledger.poisoned)
    for folder in {shard.folder for shard in shards}:
        for path in folder.rglob("*"):
            if path.suffix in (TEMPORARY, TENSORSTORE_TEMPORARY):  # of killed writes
                path.unlink()
    return ledger.throughput()


def clear(shards: Sequence[Shard]) -> None:
    """Remove the summaries; call when the artifact is complete."""
    for shard in shards:
        shard.summary.unlink()


@dataclass
class _Ledger:
    """The state of a run: counts, attempts and failures."""

    missing: deque[Shard]
    started: float
    documents: int = 0
    rejects: int = 0
    workers: int = 0
    beat: Beat = Beat(0)
    attempts: Counter[Shard] = field(default_factory=Counter)
    poisoned: list[Outcome] = field(default_factory=list)

    def take(self, event: Outcome | Beat) -> int:
        """Record an event. Returns how many shards it completes, 0 or 1. A failed shard goes to the end of the queue.

        Raises:
          InputError: a worker raised it.
          OSError: no worker can write.
        """
        if isinstance(event, Beat):
            self.beat, self.workers = event, max(self.workers, event.workers)
            return 0
        if event.refused is not None:
            number, path = event.refused
            raise OSError(number, os.strerror(number), path) from _trace([event])
        if event.stops:
            raise InputError(event.error) from _trace([event])
        if event.error is None:
            self.documents += event.documents
            self.rejects += event.rejects
            self.beat = Beat(self.beat.workers)
            return 1
        self.attempts[event.shard] += 1
        if self.attempts[event.shard] < ATTEMPTS:
            self.missing.append(event.shard)
        else:
            self.poisoned.append(event)
        return 0

    def note(self) -> str:
        documents, rejects = self.documents + self.beat.documents, self.rejects + self.beat.rejects
        rate = documents / max(time.monotonic() - self.started, 1e-9)
        counts = [_count(rejects, "reject"), _count(self.beat.workers, "worker")]
        failed = [f"{_count(len(self.poisoned), 'shard')} failed"] if self.poisoned else []
        return ", ".join([_count(documents, "document"), f"{rate:.4g}/s", *counts, *failed])

    def throughput(self) -> dict[str, int | float]:
        seconds = time.monotonic() - self.started
        return {
            "documents": self.documents,
            "seconds": round(seconds, 2),
            "documents_per_second": round(self.documents / max(seconds, 1e-9), 2),
            "workers": self.workers,
        }


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("" if number == 1 else "s")


def _poisoned(label: str, outcomes: Sequence[Outcome], left: int) -> str:
    """The error message for failed shards."""
    named = "; ".join(f"{outcome.shard} ({outcome.error})" for outcome in outcomes[:5])
    more = f"; and {len(outcomes) - 5} more" if len(outcomes) > 5 else ""
    rest = f"{left} others are not done" if left else "all others are done"
    return (
        f"{label}: {_count(len(outcomes), 'shard')} failed {ATTEMPTS} times each: {named}{more}; {rest}; fix "
        "the causes and run the same command again, which makes only the missing shards"
    )


def _trace(outcomes: Sequence[Outcome]) -> RuntimeError | None:
    """The workers' tracebacks, which `--debug` shows."""
    traces = [f"{outcome.shard}:\n{outcome.trace}" for outcome in outcomes if outcome.trace]
    return RuntimeError("\n".join(["in a worker", *traces])) if traces else None


def attempt(worker: Worker, shard: Shard, tally: Tally) -> Outcome:
    """Make a shard in this process, and write its summary last."""
    try:
        summary = worker(shard, tally)
        write_atomic(shard.summary, json.dumps(summary))
    except Exception as error:
        text = " ".join(str(error).split())
        stops = isinstance(error, InputError)
        text = text if stops else f"{type(error).__name__}: {text}"
        refused, system = None, None if stops else refusal(error, shard.folder)
        if system is not None and system.errno in UNWRITABLE:
            refused = system.errno, str(system.filename or shard.folder)
        return Outcome(shard, error=text, trace=traceback.format_exc(), stops=stops, refused=refused)
    return Outcome(shard, tally.documents, tally.rejects)


def check_counts(executor: str, **numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise InputError(f"{executor}.{name}={value} is below 1; use at least 1")
