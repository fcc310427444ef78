"""The processes that train one model together: how they find each other, wait for each other, and end together.

    first    lock   compare   step step step ... save   manifest
    others   wait   compare   step step step ... save   wait

All run the same command. JAX's coordination service, which is in the first one, connects them. Two threads of each
process see to it that nothing waits forever: one listens for the failure of another process, one watches whether this
process gets on.
"""

import contextlib
import hashlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import jax
from jax._src.distributed import global_state  # jax.distributed has no barriers that do without devices

from rac3.config import InputError

STALLED = 76  # the exit code of a process that has not got on for too long: run the same command again
FAILED = "rac3/failed"  # key of the coordination service
COMPILING = "compilation"
SPARE = 60  # seconds that JAX has for the start after our own time is over: it would abort without a line
LONGEST = 7 * 24 * 3600 * 1000  # milliseconds at a barrier; the watchdog ends a process that waits there for too long
PARTING = 15.0  # seconds that the first process stays after a failure, so that all others hear of it
LISTENING = 1.0  # seconds between two looks for failures

T = TypeVar("T")


@dataclass(frozen=True)
class Distributed:
    """How the processes of one training find each other. Slurm tells each of its tasks all of this.

    Attributes:
      coordinator: HOST:PORT of process 0, where a free port is; "" trains in this process alone, outside of Slurm.
      processes: how many there are.
      process: the number of this one, from 0.
      start_seconds: how long to wait for the others at the start; nodes of a cold cluster boot one after another.
      heartbeat_seconds: how long a process may be silent until all others end.
    """

    coordinator: str = ""
    processes: int = 0
    process: int = -1
    start_seconds: int = 1800
    heartbeat_seconds: int = 100

    def __post_init__(self) -> None:
        given = bool(self.coordinator), self.processes > 0, self.process >= 0
        if any(given) and not all(given):
            raise InputError(
                f"distributed.coordinator={self.coordinator!r}, distributed.processes={self.processes} and "
                f"distributed.process={self.process}: give all three, such as host1:8476, 2 and 0; or none"
            )
        if self.coordinator and not self.coordinator.rpartition(":")[2].isdecimal():
            raise InputError(f"distributed.coordinator={self.coordinator!r} has no port; give HOST:PORT")
        if all(given) and self.process >= self.processes:
            raise InputError(
                f"distributed.process={self.process} of distributed.processes={self.processes}; "
                f"count from 0 to {self.processes - 1}"
            )
        for name in ("start_seconds", "heartbeat_seconds"):
            if getattr(self, name) < 1:
                raise InputError(f"distributed.{name}={getattr(self, name)} is below 1; use at least 1")

    def start(
        self, stall_minutes: float = 0.0, orderly: tuple[type[BaseException], ...] = (), environ: Mapping = os.environ
    ) -> "Processes":
        """Connects this process with the others, before JAX looks for devices.

        Ends the process, with one line and exit code 2, if they don't all come in time.

        Args:
          stall_minutes, orderly: as of `Processes`.

        Raises:
          InputError: JAX can't start, since something else listens on the port, say.
        """
        place = Place(self.coordinator, self.processes, self.process) if self.coordinator else from_slurm(environ)
        if place is None or place.processes == 1:
            return Processes(stall_minutes=stall_minutes, orderly=orderly)
        late = threading.Timer(self.start_seconds, self._too_late, (place,))
        late.daemon = True
        late.start()
        try:
            jax.distributed.initialize(
                place.coordinator,
                place.processes,
                place.process,
                list(place.devices) or None,
                cluster_detection_method="deactivate",
                initialization_timeout=self.start_seconds + SPARE,
                heartbeat_timeout_seconds=self.heartbeat_seconds,
            )
        except jax.errors.JaxRuntimeError as error:
            raise InputError(
                f"process {place.process} of {place.processes} can't start at {place.coordinator} "
                f"({str(error).splitlines()[0]}); start all of them, with one address and their own numbers"
            ) from error
        finally:
            late.cancel()
        return Processes(
            place.processes, place.process, global_state.client, stall_minutes=stall_minutes, orderly=orderly
        )

    def _too_late(self, place: "Place") -> NoReturn:
        _say(
            f"process {place.process} of {place.processes} did not meet the others at {place.coordinator} within "
            f"{self.start_seconds} s; start all of them, with that address and their own numbers, or raise "
            "--distributed.start-seconds"
        )
        os._exit(2)


@dataclass(frozen=True)
class Place:
    """The place of a process among all; `devices` are the numbers of those that it uses, or () for all it sees."""

    coordinator: str
    processes: int
    process: int
    devices: tuple[int, ...] = ()


def from_slurm(environ: Mapping[str, str]) -> Place | None:
    """The place that `srun` gives to a task; None outside of `srun`.

    A task that is alone on its node has all devices. Of several on a node, each has the one of its local number, unless
    Slurm shows it only one.
    """
    if "SLURM_STEP_NODELIST" not in environ or "SLURM_PROCID" not in environ:
        return None
    tasks, nodes = int(environ["SLURM_STEP_NUM_TASKS"]), int(environ["SLURM_STEP_NUM_NODES"])
    port = 61440 + int(environ["SLURM_JOB_ID"]) % 4096  # two jobs may share a node
    alone = tasks <= nodes or len(environ.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1
    return Place(
        f"{first_host(environ['SLURM_STEP_NODELIST'])}:{port}",
        tasks,
        int(environ["SLURM_PROCID"]),
        () if alone else (int(environ["SLURM_LOCALID"]),),
    )


def first_host(nodes: str) -> str:
    """The first of Slurm's list of nodes: `node007` of `node[007-009,12],login1`."""
    prefix, bracket, rest = nodes.partition("[")
    if "," in prefix or not bracket:
        return nodes.partition(",")[0]
    return prefix + rest.partition("]")[0].replace("-", ",").partition(",")[0]


@dataclass(frozen=True)
class Activity:
    """What a process does, and what it waits for."""

    waits_for: str
    step: int | None = None

    def __str__(self) -> str:
        return f"waits for {self.waits_for}" + ("" if self.step is None else f" at step {self.step}")


class Processes:
    """All processes of a run, seen from one of them. A context manager: at the end, all leave together.

    Args:
      count, number: how many, and which one this is.
      client: JAX's, of the coordination service; None for one process.
      stall_minutes: the watchdog ends this process when it has not got on for so long; 0 never does.
      orderly: exceptions with which all processes leave at the same point. With any other, one process has failed, and
        the others end with its message.
    """

    def __init__(
        self,
        count: int = 1,
        number: int = 0,
        client: Any = None,
        *,
        stall_minutes: float = 0.0,
        orderly: tuple[type[BaseException], ...] = (),
    ) -> None:
        self.count, self.number, self.client, self.orderly = count, number, client, orderly
        self.activity = Activity("the start")
        self.others: dict[str, str] = {}  # what they last said
        self._names: Counter[str] = Counter()
        self._done = threading.Event()
        self._moves = 0
        self._threads: list[threading.Thread] = []
        if stall_minutes > 0:
            self._threads.append(threading.Thread(target=self._watch, args=(60 * stall_minutes,), daemon=True))
        if client is not None:
            self._threads.append(threading.Thread(target=self._listen, daemon=True))

    def __str__(self) -> str:
        return f"process {self.number} of {self.count} ({socket.gethostname()})"

    @property
    def first(self) -> bool:
        """Whether this one does what only one may do: locks, manifests, metrics."""
        return self.number == 0

    def __enter__(self) -> "Processes":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is not None and not isinstance(error, self.orderly):
            code = 2 if isinstance(error, InputError) else 1
            message = str(error) if code == 2 else f"{type(error).__name__}: {error}"
            self._done.set()
            if self.client is not None:
                failure = {"from": str(self), "code": code, "message": message.partition("\n")[0]}
                with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one has failed before
                    self.client.key_value_set(FAILED, json.dumps(failure))
            return
        if self.client is not None:
            self.at("the end of the other processes")
            self.meet("end")
        self._done.set()
        for thread in self._threads:
            thread.join()
        if self.client is not None:
            jax.distributed.shutdown()

    # Together.

    def at(self, waits_for: str, step: int | None = None) -> None:
        """Notes what comes next. Each note is a sign of life for the watchdog."""
        self.activity = Activity(waits_for, step)
        self._moves += 1

    def meet(self, name: str) -> None:
        """Returns once all processes have come here."""
        if self.client is not None:
            self.at(f"the other processes at {name!r}", self.activity.step)
            self.client.wait_at_barrier(self._key("meet", name), LONGEST)

    def from_first(self, name: str, value: T) -> T:
        """The first process's `value`, plain data, in all of them."""
        if self.client is None:
            return value
        key = self._key("from-first", name)
        if self.first:
            self.client.key_value_set(key, json.dumps(value))
            return value
        self.at(f"the first process, for {name}", self.activity.step)
        return json.loads(self.client.blocking_key_value_get(key, LONGEST))

    def compare(self, name: str, parts: Mapping[str, str]) -> None:
        """Compares what must be the same in all processes.

        Args:
          parts: what is compared -> a digest of it.

        Raises:
          InputError: in all processes; names those that differ from most others, and in what.
        """
        if self.client is None:
            return
        key = self._key("compare", name)
        own = {"host": socket.gethostname(), "parts": dict(parts)}
        self.client.key_value_set(f"{key}/{self.number}", json.dumps(own))
        self.meet(f"compare {name}")
        found = {int(path.rpartition("/")[2]): json.loads(text) for path, text in self.client.key_value_dir_get(key)}
        if message := differences({number: found[number] for number in sorted(found)}):
            raise InputError(message)

    def _key(self, kind: str, name: str) -> str:
        """The name of a meeting; all processes have the same meetings in the same order."""
        self._names[kind] += 1
        return f"rac3/{kind}/{self._names[kind]} {name}"

    # Failing together.

    def _listen(self) -> None:
        """The thread that ends this process once another one has failed. It also says what this one does."""
        said = ""
        while not self._done.wait(LISTENING):
            try:
                if said != (said := str(self.activity)):
                    self.client.key_value_set(f"rac3/at/{self.number}", f"{self}: {said}", allow_overwrite=True)
                self.others = dict(self.client.key_value_dir_get("rac3/at/"))
                failure = json.loads(self.client.key_value_try_get(FAILED))
            except jax.errors.JaxRuntimeError:  # no failure, or no connection: JAX's own threads see to that
                continue
            if not self._done.is_set():
                _say(f"{failure['from']} failed: {failure['message']}")
                leave(failure["code"])

    # The watchdog.

    def _watch(self, limit: float) -> None:
        """The thread that ends this process when it has not got on for `limit` seconds.

        A compilation may take long: it gets on as long as it uses a core. Time in which the whole process was stopped
        does not count.
        """
        pause = min(5.0, limit / 20)
        still, moves, before, cpu = 0.0, self._moves, time.monotonic(), time.process_time()
        while not self._done.wait(pause):
            passed, worked = time.monotonic() - before, time.process_time() - cpu
            before, cpu = before + passed, cpu + worked
            compiles = self.activity.waits_for == COMPILING and worked > passed / 5
            still = 0.0 if compiles or moves != self._moves else still + min(passed, 2 * pause)
            moves = self._moves
            if still >= limit:
                _say(self._stalled(limit))
                os._exit(STALLED)

    def _stalled(self, limit: float) -> str:
        own = f"rac3/at/{self.number}"
        others = "".join(f"; {said}" for path, said in sorted(self.others.items()) if path != own)
        return (
            f"{self} has not got on for {limit / 60:.3g} minutes (training.stall_minutes): it {self.activity}, "
            f"in {main_thread()}{others}; it ends with code {STALLED}, run the same command to go on"
        )


def differences(found: Mapping[int, Mapping[str, Any]]) -> str:
    """What differs between processes, as a message that names the odd ones; "" if nothing does.

    Args:
      found: of each process its `host` and its `parts`.
    """
    messages = []
    for part in next(iter(found.values()))["parts"]:
        digests = {number: each["parts"][part] for number, each in found.items()}
        (usual, _), *_ = Counter(digests.values()).most_common(1)  # of equally many, that of the first process
        odd = [f"{number} ({found[number]['host']})" for number, digest in digests.items() if digest != usual]
        if odd:
            have = "process " + odd[0] + " has" if len(odd) == 1 else "processes " + ", ".join(odd) + " have"
            messages.append(f"{have} another {part} than the others")
    return "; ".join(messages) and "; ".join(messages) + "; start all processes with the same rac3, config and jax"


def code_digest(package: Path = Path(__file__).parents[1]) -> str:
    """Of the files of rac3, without its configs: their names and what is in them."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        if path.relative_to(package).parts[0] == "configs":
            continue
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def main_thread() -> str:
    """Where the main thread is: the innermost lines of rac3, and what they call."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    stack = traceback.extract_stack(frame) if frame else []
    own = [each for each in stack if f"{os.sep}rac3{os.sep}" in each.filename] or stack
    names = [f"{each.name} ({Path(each.filename).name}:{each.lineno})" for each in own[-3:]]
    return " > ".join(names) or "no Python code"


def leave(code: int) -> NoReturn:
    """Ends the command after a failure.

    One of several processes ends at once, as threads of JAX would wait for others that have ended. The coordination
    service ends with the first one, which therefore waits until all others have heard of the failure.
    """
    client = global_state.client
    if client is None:
        sys.exit(code)
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.key_value_set(f"rac3/heard/{global_state.process_id}", "", allow_overwrite=True)
        until = time.monotonic() + (PARTING if global_state.process_id == 0 else 0.0)
        while time.monotonic() < until and len(client.key_value_dir_get("rac3/heard/")) < global_state.num_processes:
            time.sleep(0.05)
    _say("")
    os._exit(code)


def _say(message: str) -> None:
    """Prints, and flushes what was printed before. Waits for no reader who is gone."""

    def say() -> None:
        if message:
            print(f"rac3: {message}", file=sys.stderr)
        sys.stderr.flush()
        sys.stdout.flush()

    speaker = threading.Thread(target=say, daemon=True)
    speaker.start()
    speaker.join(5.0)
