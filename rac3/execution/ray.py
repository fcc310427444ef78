"""The executor of a Ray cluster: actors that hold the models, and a driver that keeps them busy.

`shards.py` defines jobs and shards. Ray is imported only when the executor runs.
"""

import contextlib
import logging
import os
import secrets
import sys
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rac3.config import CONFIG_MODULE, InputError
from rac3.execution.shards import BEAT, Beat, Events, Job, Outcome, Shard, Tally, Worker, attempt, check_counts

MAX_LOST = 3  # consecutive workers that die before they are open
LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0": Ray listens on 127.0.0.1 alone, on any system
OBJECT_STORE = 100 * 2**20  # bytes, for a cluster that we start: only jobs and counts are sent


@dataclass(frozen=True)
class Ray:
    """Makes shards in the workers of a Ray cluster, whose machines must share the workdir and the data.

    Attributes:
      workers: processes, each with its own models. 0 means one per `gpus_per_worker` GPUs, or one per machine in a
        cluster without GPUs, since XLA and ScaNN use all cores of a machine.
      gpus_per_worker: GPUs over which a worker shards its batches; None means 1 if the cluster has GPUs, else 0.
      cpus_per_worker: cores that a worker reserves.
      threads: shards in progress at once per worker, as in `Local`.
      address: of a running cluster, "auto" or host:port; "" means RAY_ADDRESS if set, else only this machine.
    """

    workers: int = 0
    gpus_per_worker: int | None = None
    cpus_per_worker: int = 1
    threads: int = 4
    address: str = ""

    def __post_init__(self) -> None:
        check_counts("ray", threads=self.threads, cpus_per_worker=self.cpus_per_worker)
        if self.workers < 0 or (self.gpus_per_worker or 0) < 0:
            raise InputError(
                f"ray.workers={self.workers} and ray.gpus_per_worker={self.gpus_per_worker} must be at least 0"
            )

    def outcomes(self, job: Job, missing: deque[Shard]) -> Events:
        """As `Executor.outcomes`. Replaces workers that die."""
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
        """The ray module, connected to the cluster."""
        address = self.address or os.environ.get("RAY_ADDRESS") or "local"
        own: dict[str, Any] = {}
        if address == "local":
            own = {"include_dashboard": False, "object_store_memory": OBJECT_STORE}
            if "ray" not in sys.modules:  # it reads these on import
                os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
                os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray's default for this case, without its notice
                os.environ.setdefault(LOOPBACK_ONLY, "0")
            _keep_token_private()
        try:
            import ray
        except ImportError as error:
            raise InputError(f"executor ray cannot import ray ({error}); pip install 'rac3[ray]'") from error
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"cannot connect to a Ray cluster at {address!r} ({reason}); give another --ray.address, or set "
                "RAY_AUTH_MODE=token if the cluster requires a token"
            ) from error
        if own:  # Ray starts a process of its dashboard in any case, for statistics that are off
            with contextlib.suppress(Exception):  # by a name that is not promised
                ray._private.worker._global_node.kill_dashboard(check_alive=False)  # type: ignore[union-attr, attr-defined, unused-ignore]
        try:
            yield ray
        finally:
            ray.shutdown()

    def _room(self, nodes: Sequence[Mapping[str, Any]], shards: int) -> tuple[int, int]:
        """The number of workers, and GPUs per worker.

        Raises:
          InputError: no machine has room for a worker.
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


def _keep_token_private() -> None:
    """Makes the token by which the processes of a cluster know each other, or its file, readable to its owner alone.

    Ray writes it readable to all. A token in RAY_AUTH_TOKEN, or a path in RAY_AUTH_TOKEN_PATH, stays as it is.
    """
    if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        return
    path = Path.home() / ".ray" / "auth_token"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        path.chmod(0o600)
        return
    with os.fdopen(file, "w") as token:
        token.write(secrets.token_hex(32))


def _put(ray: Any, job: Job) -> Any:
    """Put the job into Ray's object store, classes of a config file by value: workers cannot import that file."""
    for name, module in list(sys.modules.items()):
        if name.startswith(CONFIG_MODULE):
            ray.cloudpickle.register_pickle_by_value(module)
    try:
        return ray.put(job)
    except Exception as error:
        raise InputError(f"the config cannot be sent to Ray's workers: {type(error).__name__}: {error}") from error


class _RayWorker:
    """The actor: one worker process."""

    def __init__(self, folder: str, path: list[str]) -> None:
        self._folder = folder
        self._worker: Worker | None = None
        sys.path += [entry for entry in path if entry not in sys.path]  # for a config that imports files next to it

    def open(self, job: Job) -> str | None:
        """Open the worker. Returns the reason if that fails, else None."""
        try:
            os.chdir(self._folder)  # relative paths in the config start where the command ran
            self._worker = job.open()
        except InputError as error:
            return str(error)
        except Exception as error:
            return f"a Ray worker cannot start: {type(error).__name__}: {' '.join(str(error).split())}"
        return None

    def make(self, shard: Shard) -> Outcome:
        if self._worker is None:
            raise RuntimeError("the worker is not open")
        if not shard.folder.is_dir():
            return Outcome(
                shard,
                error=f"a Ray worker on {os.uname().nodename} cannot see {shard.folder.absolute()}; give a --workdir "
                "on a file system that all machines share",
                stops=True,
            )
        return attempt(self._worker, shard, Tally())


@dataclass(eq=False)
class _Seat:
    """A worker, as the driver tracks it."""

    actor: Any
    open: bool = False
    lost: bool = False
    shards: set[Shard] = field(default_factory=set)  # in progress


class _RayPool:
    """The workers of one run. Keeps each busy with `threads` shards and replaces those that die."""

    def __init__(self, ray: Any, remote: Any, job: Any, workers: int, threads: int) -> None:
        self._ray, self._remote, self._job, self._threads = ray, remote, job, threads
        self._running: dict[Any, tuple[_Seat, Shard | None]] = {}  # by Ray reference; None: the worker is opening
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
        """Whether to give the next shard to this worker now.

        A shard that has failed before gets a worker to itself, so that no other shard fails with it, and a worker that
        has not tried it if there is one. When few shards are left, each worker takes its share.
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
        """The attempt that has finished; None for a worker that has opened, or has died before it was open.

        Raises:
          InputError: a worker cannot start.
        """
        try:
            result = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            if shard is None:
                self._lost_unopened += 1
                if self._lost_unopened == MAX_LOST or not isinstance(error, self._ray.exceptions.RayActorError):
                    reason = str(error).strip().splitlines()[-1]
                    raise InputError(f"a Ray worker cannot start: {reason}") from error
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
