"""Maps over shards. A job is opened once in each worker, which then makes one shard after another.

    run(executor, job, shards)   Local: one worker, this process
                                 Ray:   workers on all machines of a cluster, each with models and devices of its own

A shard is done when its summary is there, which is written last. A run makes the shards that are not done, in any
order. Nothing that an executor decides changes what is made.
"""

import contextlib
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections import Counter, defaultdict, deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rac3.artifacts import TEMPORARY, write_atomic
from rac3.config import CONFIG_MODULE, InputError
from rac3.progress import Progress

ATTEMPTS = 3  # at a shard, before it is left and the others go on
MAX_POISONED = 20  # shards that are left before the run stops: something is wrong with more than shards
MAX_LOST = 3  # workers that die one after another before they are open
BEAT = 1.0  # seconds between signs of life
OBJECT_STORE = 100 * 2**20  # bytes, of a cluster of one's own: only jobs and counts are sent
TENSORSTORE_TEMPORARY = ".__lock"  # what is left of a write that was killed


@dataclass(frozen=True)
class Shard:
    """A piece of a stage's work, and of what it writes into `folder`. No two shards write one file.

    Attributes:
      part: the split.
      number: of the shard within its part.
      name: within its part, for messages.
    """

    part: str
    number: int
    name: str
    folder: Path

    @property
    def summary(self) -> Path:
        return self.folder / f"{self.number:06d}.json"

    def __str__(self) -> str:
        return f"{self.part} {self.name}"

    def read_summary(self) -> dict[str, Any]:
        """What the worker returned for this shard."""
        return json.loads(self.summary.read_text())


class Tally:
    """What a worker has done of a shard so far. To count is also where a run that is interrupted stops."""

    def __init__(self, stopped: threading.Event | None = None) -> None:
        self.documents = self.rejects = 0
        self._stopped = stopped

    def add(self, documents: int, rejects: int = 0) -> None:
        if self._stopped is not None and self._stopped.is_set():
            raise _StoppedError
        self.documents += documents
        self.rejects += rejects


class _StoppedError(BaseException):
    """Ends a thread of a run that is interrupted: not an Exception, which a source might swallow."""


@runtime_checkable
class Worker(Protocol):
    """Makes a shard: writes its files, and returns what is worth keeping of it, as JSON. Called from many threads."""

    def __call__(self, shard: Shard, tally: Tally) -> Mapping[str, Any]: ...


@runtime_checkable
class Job(Protocol):
    """A stage, as it is sent to the workers: small, picklable, and opened where it runs."""

    @property
    def label(self) -> str: ...

    def open(self) -> Worker:
        """Loads the models onto the devices of this process."""
        ...


@dataclass(frozen=True)
class Outcome:
    """An attempt at a shard, which is done if `error` is None."""

    shard: Shard
    documents: int = 0
    rejects: int = 0
    error: str | None = None
    trace: str = ""
    stops: bool = False  # an InputError: neither another attempt nor another shard would do better


@dataclass(frozen=True)
class Beat:
    """A sign of life: the workers that are open, and what they have done of shards that are not done yet."""

    workers: int
    documents: int = 0
    rejects: int = 0


Events = Generator[Outcome | Beat, None, None]


def run(executor: "Local | Ray", job: Job, shards: Sequence[Shard]) -> dict[str, int | float]:
    """Makes the shards that are not done.

    Returns:
      What this run did, for the manifest: documents, seconds, documents_per_second, workers.

    Raises:
      InputError: a worker raised one; or shards failed `ATTEMPTS` times, which stops none of the others.
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
            if path.suffix in (TEMPORARY, TENSORSTORE_TEMPORARY):  # of writes that were killed
                path.unlink()
    return ledger.throughput()


def clear(shards: Sequence[Shard]) -> None:
    """Removes the summaries, once nothing more is to be read from them: the artifact is complete."""
    for shard in shards:
        shard.summary.unlink()


@dataclass
class _Ledger:
    """What has happened in a run."""

    missing: deque[Shard]
    started: float
    documents: int = 0
    rejects: int = 0
    workers: int = 0
    beat: Beat = Beat(0)
    attempts: Counter[Shard] = field(default_factory=Counter)
    poisoned: list[Outcome] = field(default_factory=list)

    def take(self, event: Outcome | Beat) -> int:
        """How many shards are done by it: 1 or 0. A shard that failed goes to the end of the line.

        Raises:
          InputError: of a worker.
        """
        if isinstance(event, Beat):
            self.beat, self.workers = event, max(self.workers, event.workers)
            return 0
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
    """The one line about shards that cannot be made."""
    named = "; ".join(f"{outcome.shard} ({outcome.error})" for outcome in outcomes[:5])
    more = f"; and {len(outcomes) - 5} more" if len(outcomes) > 5 else ""
    rest = f"{left} others are not done" if left else "all others are done"
    return (
        f"{label}: {_count(len(outcomes), 'shard')} failed {ATTEMPTS} times each: {named}{more}; {rest}; mend what "
        "they name and run the same command again, which makes only what is not done"
    )


def _trace(outcomes: Sequence[Outcome]) -> RuntimeError | None:
    """What `--debug` shows."""
    traces = [f"{outcome.shard}:\n{outcome.trace}" for outcome in outcomes if outcome.trace]
    return RuntimeError("\n".join(["in a worker", *traces])) if traces else None


def _attempt(worker: Worker, shard: Shard, tally: Tally) -> Outcome:
    """Makes a shard, wherever this runs; its summary comes last."""
    try:
        summary = worker(shard, tally)
        write_atomic(shard.summary, json.dumps(summary))
    except Exception as error:
        text = " ".join(str(error).split())
        stops = isinstance(error, InputError)
        text = text if stops else f"{type(error).__name__}: {text}"
        return Outcome(shard, error=text, trace=traceback.format_exc(), stops=stops)
    return Outcome(shard, tally.documents, tally.rejects)


@dataclass(frozen=True)
class Local:
    """The shards in this process, on all of its devices.

    Attributes:
      threads: shards under way at once. While the devices compute for one, others are read, decoded and written.
    """

    threads: int = 4

    def __post_init__(self) -> None:
        _check("local", threads=self.threads)

    def outcomes(self, job: Job, missing: deque[Shard]) -> Events:
        """Takes shards from `missing` until there are none; the reader may append what is to be tried again."""
        worker = job.open()
        stopped = threading.Event()
        running: dict[Future[Outcome], Tally] = {}
        with ThreadPoolExecutor(self.threads, "shard") as threads:
            try:
                while missing or running:
                    while missing and len(running) < self.threads:
                        tally = Tally(stopped)
                        running[threads.submit(_attempt, worker, missing.popleft(), tally)] = tally
                    done, _ = wait(running, BEAT, FIRST_COMPLETED)
                    for future in done:
                        del running[future]
                        yield future.result()
                    tallies = running.values()
                    yield Beat(1, sum(tally.documents for tally in tallies), sum(tally.rejects for tally in tallies))
            finally:
                stopped.set()


@dataclass(frozen=True)
class Ray:
    """The shards in the workers of a Ray cluster, whose machines share the file system of the workdir and the data.

    Attributes:
      workers: processes, each with models of its own; 0 is one for each `gpus_per_worker` GPUs of the cluster, or one
        for each machine if it has no GPUs, for XLA and ScaNN use all cores of a machine.
      gpus_per_worker: over which a worker spreads its batches; None is 1 if the cluster has GPUs, else 0.
      cpus_per_worker: cores that a worker reserves.
      threads: shards that a worker has under way at once, as of `Local`.
      address: of a cluster that runs, "auto" or host:port; "" is what RAY_ADDRESS says, else this machine alone.
    """

    workers: int = 0
    gpus_per_worker: int | None = None
    cpus_per_worker: int = 1
    threads: int = 4
    address: str = ""

    def __post_init__(self) -> None:
        _check("ray", threads=self.threads, cpus_per_worker=self.cpus_per_worker)
        if self.workers < 0 or (self.gpus_per_worker or 0) < 0:
            raise InputError(
                f"ray.workers={self.workers} and ray.gpus_per_worker={self.gpus_per_worker} must be at least 0"
            )

    def outcomes(self, job: Job, missing: deque[Shard]) -> Events:
        """As of `Local`. A worker that dies is replaced."""
        with self._cluster() as ray:
            workers, gpus = self._room(ray.nodes(), len(missing))
            remote = ray.remote(_RayWorker).options(
                num_cpus=self.cpus_per_worker,
                num_gpus=gpus,
                max_concurrency=self.threads,
                scheduling_strategy="SPREAD",
            )
            yield from _RayPool(ray, remote, _put(ray, job), workers, self.threads).outcomes(missing)

    @contextlib.contextmanager
    def _cluster(self) -> Iterator[Any]:
        """The ray module, connected."""
        address = self.address or os.environ.get("RAY_ADDRESS") or "local"
        own: dict[str, Any] = {}
        if address == "local":
            own = {"include_dashboard": False, "object_store_memory": OBJECT_STORE}
            if "ray" not in sys.modules:  # which reads these when it is imported
                os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
                os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray's default there, without its notice
        try:
            import ray
        except ImportError as error:
            raise InputError(f"executor ray cannot import ray ({error}); pip install 'rac3[ray]'") from error
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"no Ray cluster can be used at {address!r} ({reason}); give another --ray.address, or set "
                "RAY_AUTH_MODE=token if the cluster asks for a token"
            ) from error
        try:
            yield ray
        finally:
            ray.shutdown()

    def _room(self, nodes: Sequence[Mapping[str, Any]], shards: int) -> tuple[int, int]:
        """How many workers, and the GPUs of each.

        Raises:
          InputError: no machine has room for one.
        """
        machines = [node["Resources"] for node in nodes if node["Alive"]]
        gpus = self.gpus_per_worker
        if gpus is None:
            gpus = int(any(machine.get("GPU", 0) for machine in machines))
        if self.workers:
            return min(self.workers, shards), gpus
        workers = 0
        for machine in machines:
            room = int(machine.get("CPU", 0)) // self.cpus_per_worker
            workers += min(room, int(machine.get("GPU", 0)) // gpus if gpus else 1)
        if not workers:
            raise InputError(
                f"no machine of the Ray cluster has {self.cpus_per_worker} CPUs and {gpus} GPUs for a worker; lower "
                "--ray.cpus-per-worker or --ray.gpus-per-worker, or set --ray.workers to wait for machines"
            )
        return min(workers, shards), gpus


def _check(executor: str, **numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise InputError(f"{executor}.{name}={value} is below 1; use at least 1")


def _put(ray: Any, job: Job) -> Any:
    """The job as an object of the cluster. Classes of a config file go by value: workers cannot import that file."""
    for name, module in list(sys.modules.items()):
        if name.startswith(CONFIG_MODULE):
            ray.cloudpickle.register_pickle_by_value(module)
    try:
        return ray.put(job)
    except Exception as error:
        raise InputError(f"the config cannot be sent to Ray's workers: {type(error).__name__}: {error}") from error


class _RayWorker:
    """The process of a worker."""

    def __init__(self, folder: str, path: list[str]) -> None:
        self._folder = folder
        self._worker: Worker | None = None
        sys.path += [entry for entry in path if entry not in sys.path]  # a config imports what is beside it

    def open(self, job: Job) -> str | None:
        """Why it cannot be opened; None if it is."""
        try:
            os.chdir(self._folder)  # relative paths of the config start where the command was given
            self._worker = job.open()
        except InputError as error:
            return str(error)
        except Exception as error:
            return f"a Ray worker cannot be opened: {type(error).__name__}: {' '.join(str(error).split())}"
        return None

    def make(self, shard: Shard) -> Outcome:
        if self._worker is None:
            raise RuntimeError("the worker is not open")
        if not shard.folder.is_dir():
            return Outcome(
                shard,
                error=f"a Ray worker on {os.uname().nodename} does not see {shard.folder.absolute()}; give a --workdir "
                "on a file system that all machines share",
                stops=True,
            )
        return _attempt(self._worker, shard, Tally())


@dataclass(eq=False)
class _Seat:
    """A worker that the driver knows of."""

    actor: Any
    open: bool = False
    lost: bool = False
    shards: set[Shard] = field(default_factory=set)  # under way


class _RayPool:
    """The workers of one run: keeps each busy with `threads` shards, and replaces those that die."""

    def __init__(self, ray: Any, remote: Any, job: Any, workers: int, threads: int) -> None:
        self._ray, self._remote, self._job, self._threads = ray, remote, job, threads
        self._running: dict[Any, tuple[_Seat, Shard | None]] = {}  # by what ray waits for; None: it is being opened
        self._failed: defaultdict[Shard, list[_Seat]] = defaultdict(list)
        self._lost_unopened = 0
        self._seats = [self._seat() for _ in range(workers)]

    def outcomes(self, missing: deque[Shard]) -> Events:
        while missing or any(seat.shards for seat, _ in self._running.values()):
            while missing and (free := [seat for seat in self._seats if self._takes(seat, missing)]):
                seat, shard = min(free, key=lambda seat: len(seat.shards)), missing.popleft()
                seat.shards.add(shard)
                self._running[seat.actor.make.remote(shard)] = seat, shard
            done, _ = self._ray.wait(list(self._running), timeout=BEAT)
            for ref in done:
                seat, known = self._running.pop(ref)
                if known is not None:
                    seat.shards.remove(known)
                outcome = self._result(ref, seat, known)
                if outcome is not None:
                    yield outcome
            yield Beat(sum(seat.open for seat in self._seats))

    def _seat(self) -> _Seat:
        seat = _Seat(self._remote.remote(os.getcwd(), sys.path))
        self._running[seat.actor.open.remote(self._job)] = seat, None
        return seat

    def _takes(self, seat: _Seat, missing: deque[Shard]) -> bool:
        """Whether it is given the next shard now.

        One that has failed before has a worker to itself, so that it is not held against others if the worker dies, and
        another worker than before if there is one. Where few are left, each worker takes its share.
        """
        shard = missing[0]
        if not seat.open or any(other in self._failed for other in seat.shards):
            return False
        if shard not in self._failed:
            left = len(missing) + sum(len(other.shards) for other in self._seats)
            return len(seat.shards) < min(self._threads, -(-left // len(self._seats)))
        untried = [other for other in self._seats if other.open and other not in self._failed[shard]]
        return not seat.shards and (seat in untried or not untried)

    def _result(self, ref: Any, seat: _Seat, shard: Shard | None) -> Outcome | None:
        """What has come back: an attempt, or None for a worker that is open now, or lost before.

        Raises:
          InputError: a worker cannot be opened.
        """
        try:
            result = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            if shard is None:
                self._lost_unopened += 1
                if self._lost_unopened == MAX_LOST or not isinstance(error, self._ray.exceptions.RayActorError):
                    reason = str(error).strip().splitlines()[-1]
                    raise InputError(f"a Ray worker cannot be opened: {reason}") from error
            self._replace(seat)
            if shard is None:
                return None
            self._failed[shard].append(seat)
            return Outcome(shard, error="its worker died: killed, out of memory, or crashed", trace=str(error))
        if shard is None:
            if result is not None:
                raise InputError(result)
            seat.open, self._lost_unopened = True, 0
            return None
        if result.error is not None:
            self._failed[shard].append(seat)
        return result

    def _replace(self, seat: _Seat) -> None:
        if not seat.lost:
            seat.lost, seat.open = True, False
            self._ray.kill(seat.actor)  # it may still run, unreachable
            self._seats[self._seats.index(seat)] = self._seat()
