"""A map over shards: each is made once, despite failures and killed workers, locally and on Ray."""

import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rac3.config import InputError
from rac3.execution import shards as executors
from rac3.execution.local import Local
from rac3.execution.ray import Ray, _keep_token_private, _RayWorker
from rac3.execution.shards import ATTEMPTS, MAX_POISONED, Beat, Outcome, Shard, Tally, _Ledger, attempt, clear, run

# Ray starts its processes by fork and exec, which is safe, but JAX, running since an earlier test, warns of any fork
pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")

HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="ray is not installed")
# Ray leaves its sockets and files to the garbage collector.
untidy = pytest.mark.filterwarnings("ignore::ResourceWarning")
RAY = Ray(workers=2, threads=2)
LOCAL, IN_RAY = pytest.param(Local(threads=3), id="local"), pytest.param(RAY, id="ray", marks=[needs_ray, untidy])
MOSTLY_LOCAL = [LOCAL, pytest.param(RAY, id="ray", marks=[needs_ray, untidy, pytest.mark.slow])]


@dataclass(frozen=True)
class Squares:
    """Squares numbers. Files in `traps` make it fail: "raise 3", "refuse 3", "die 3" (once), "die always 3"."""

    traps: Path
    label: str = "square"

    def open(self) -> "Squares":
        self.log("open")
        return self

    def __call__(self, shard: Shard, tally: Tally) -> Mapping[str, Any]:
        self.log(f"make {shard.number}")
        if (self.traps / f"raise {shard.number}").exists():
            raise ValueError("a bad\nnumber")
        if (self.traps / f"refuse {shard.number}").exists():
            raise InputError("numbers=3 are odd; use 4")
        if (self.traps / f"full {shard.number}").exists():
            raise ValueError("RESOURCE_EXHAUSTED: [os_error_code='28'] No space left on device")
        if (self.traps / f"die always {shard.number}").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        once = self.traps / f"die {shard.number}"
        if once.exists():
            once.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        tally.add(10, 1)
        (shard.folder / f"{shard.number}.txt").write_text(str(shard.number**2))
        return {"square": shard.number**2}

    def log(self, line: str) -> None:
        with (self.traps / "log").open("a") as file:
            file.write(f"{line}\n")

    def made(self) -> Counter[str]:
        """How often each line was logged."""
        return Counter((self.traps / "log").read_text().splitlines())


@pytest.fixture
def job(tmp_path: Path) -> Squares:
    (tmp_path / "traps").mkdir()
    return Squares(tmp_path / "traps")


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    (tmp_path / "draft").mkdir()
    return [Shard("train", number, f"number {number}", tmp_path / "draft") for number in range(8)]


def assert_made(shards: list[Shard], but: tuple[int, ...] = ()) -> None:
    for shard in shards:
        assert shard.summary.exists() == (shard.number not in but)
        if shard.number not in but:
            assert shard.read_summary() == {"square": shard.number**2}
            assert (shard.folder / f"{shard.number}.txt").read_text() == str(shard.number**2)


@pytest.mark.parametrize("executor", [LOCAL, IN_RAY])
def test_every_shard_is_made_once(executor: Local | Ray, job: Squares, shards: list[Shard]):
    (shards[0].folder / "left.json.0123.tmp").write_text("of a killed write")
    (shards[0].folder / "c").mkdir()
    (shards[0].folder / "c" / "0.__lock").write_text("the same, by tensorstore")
    did = run(executor, job, shards)
    assert_made(shards)
    assert did["documents"] == 80
    assert did["workers"] in ((1,) if executor == Local(threads=3) else (1, 2))
    assert did["documents_per_second"] > 0
    assert len(list(shards[0].folder.rglob("*.*"))) == 2 * len(shards)
    first = job.made()
    assert {line: count for line, count in first.items() if line != "open"} == {f"make {n}": 1 for n in range(8)}
    assert run(executor, job, shards)["documents"] == 0
    assert job.made() == first
    shards[5].summary.unlink()
    assert run(Local(), job, shards)["documents"] == 10
    assert job.made() - first == Counter(["open", "make 5"])
    clear(shards)
    assert not list(shards[0].folder.glob("*.json"))


@pytest.mark.parametrize("executor", [LOCAL, IN_RAY])
def test_a_poisoned_shard_is_named_and_the_others_are_made(executor: Local | Ray, job: Squares, shards: list[Shard]):
    for number in (2, 7):
        (job.traps / f"raise {number}").touch()
    with pytest.raises(InputError, match=r"number [27].* number [27]") as raised:
        run(executor, job, shards)
    line = str(raised.value)
    assert line.startswith("square: 2 shards failed 3 times each: train number ")
    assert "number 2 (ValueError: a bad number)" in line
    assert "all others are done" in line
    assert "\n" not in line
    assert "in __call__" in str(raised.value.__cause__)  # what --debug shows
    assert_made(shards, but=(2, 7))
    assert job.made()["make 2"] == job.made()["make 7"] == ATTEMPTS
    (job.traps / "raise 2").unlink()
    (job.traps / "raise 7").unlink()
    before = job.made()
    run(executor, job, shards)
    assert_made(shards)
    assert {line for line in job.made() - before if line != "open"} == {"make 2", "make 7"}


@pytest.mark.parametrize("executor", MOSTLY_LOCAL)
def test_bad_input_stops_at_once(executor: Local | Ray, job: Squares, tmp_path: Path, shards: list[Shard]):
    (job.traps / "refuse 0").touch()
    many = [Shard("train", number, f"number {number}", shards[0].folder) for number in range(300)]
    with pytest.raises(InputError, match="numbers=3 are odd; use 4"):
        run(executor, job, many)
    assert job.made()["make 0"] == 1
    assert len(job.made()) < 150


@pytest.mark.parametrize("executor", MOSTLY_LOCAL)
def test_a_full_disk_stops_at_once(executor: Local | Ray, job: Squares, shards: list[Shard]):
    """As what it is, whatever a library made of it, and not as bad shards; the same run goes on later."""
    (job.traps / "full 2").touch()
    with pytest.raises(OSError, match="No space left on device") as raised:
        run(executor, job, shards)
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(shards[2].folder))
    assert job.made()["make 2"] == 1
    (job.traps / "full 2").unlink()
    run(executor, job, shards)
    assert_made(shards)


def test_the_run_stops_when_too_many_shards_fail(job: Squares, shards: list[Shard]):
    many = [Shard("train", number, f"number {number}", shards[0].folder) for number in range(100)]
    for number in range(100):
        (job.traps / f"raise {number}").touch()
    with pytest.raises(InputError, match=f"{MAX_POISONED} shards failed .*; and 15 more; 80 others are not done"):
        run(Local(), job, many)


def test_a_shard_that_fails_goes_to_the_end_of_the_line(job: Squares, shards: list[Shard]):
    (job.traps / "raise 2").touch()
    with pytest.raises(InputError, match="1 shard failed 3 times each: train number 2"):
        run(Local(threads=1), job, shards)
    made = (job.traps / "log").read_text().split("\n")[:-1]
    assert made == ["open", *(f"make {number}" for number in (0, 1, 2, 3, 4, 5, 6, 7, 2, 2))]


@dataclass
class Crowd:
    """Shards that only finish in groups of `size`."""

    size: int
    label: str = "meet"

    def open(self) -> "Crowd":
        self.here, self.most, self.lock, self.all = 0, 0, threading.Lock(), threading.Barrier(self.size)
        return self

    def __call__(self, shard: Shard, tally: Tally) -> Mapping[str, Any]:
        with self.lock:
            self.here += 1
            self.most = max(self.most, self.here)
        self.all.wait(timeout=20)
        with self.lock:
            self.here -= 1
        return {}


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_as_many_shards_are_under_way_as_there_are_threads(threads: int, shards: list[Shard]):
    job = Crowd(threads)
    run(Local(threads), job, shards)
    assert job.most == threads


def test_the_tally_ends_a_run_that_is_given_up():
    """It is not an Exception, which a source might swallow."""
    stopped = threading.Event()
    tally = Tally(stopped)
    tally.add(3, 1)
    stopped.set()
    with pytest.raises(BaseException) as raised:  # noqa: PT011
        tally.add(1)
    assert not isinstance(raised.value, Exception)
    assert (tally.documents, tally.rejects) == (3, 1)


def test_threads_end_with_the_run_that_is_given_up(shards: list[Shard], monkeypatch: pytest.MonkeyPatch):
    """As after Ctrl-C: each thread stops at its next count, and writes no summary."""
    monkeypatch.setattr(executors, "BEAT", 0.05)

    class Endless:
        label = "endless"
        ended = 0

        def open(self) -> "Endless":
            return self

        def __call__(self, shard: Shard, tally: Tally) -> Mapping[str, Any]:
            try:
                while True:
                    tally.add(1, 0)
                    time.sleep(0.001)
            finally:
                self.ended += 1

    job, missing = Endless(), deque(shards)
    events = Local(threads=2).outcomes(job, missing)
    beat = next(event for event in events if event.documents)
    assert isinstance(beat, Beat)
    assert (beat.workers, beat.rejects) == (1, 0)
    events.close()
    assert job.ended == 2
    assert len(missing) == len(shards) - 2
    assert not any(shard.summary.exists() for shard in shards)


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch) -> _Ledger:
    """The ledger of a run that began four seconds ago, with hand-made events."""
    monkeypatch.setattr(executors.time, "monotonic", lambda: 14.0)
    return _Ledger(deque(), 10.0)


def test_documents_count_once_whether_under_way_or_done(ledger: _Ledger, shards: list[Shard]):
    assert ledger.take(Beat(2, documents=30, rejects=1)) == 0
    assert ledger.note() == "30 documents, 7.5/s, 1 reject, 2 workers"
    assert ledger.take(Outcome(shards[0], documents=40, rejects=3)) == 1
    assert ledger.note() == "40 documents, 10/s, 3 rejects, 2 workers"
    assert ledger.take(Beat(1, documents=2, rejects=1)) == 0
    assert ledger.note() == "42 documents, 10.5/s, 4 rejects, 1 worker"
    assert ledger.throughput() == {
        "documents": 40,
        "seconds": 4.0,
        "documents_per_second": 10.0,
        "workers": 2,  # the maximum so far
    }


def test_a_shard_has_three_attempts(ledger: _Ledger, shards: list[Shard]):
    """Failures of other shards do not count."""
    one, other = (Outcome(shard, documents=9, rejects=9, error="ValueError: bad") for shard in shards[3:5])
    for event in (other, one, one, other):
        assert ledger.take(event) == 0
    assert [shard.number for shard in ledger.missing] == [4, 3, 3, 4]
    assert ledger.poisoned == []
    assert ledger.take(one) == 0
    assert ledger.poisoned == [one]
    assert ledger.take(other) == 0
    assert ledger.poisoned == [one, other]
    assert [shard.number for shard in ledger.missing] == [4, 3, 3, 4]
    assert ledger.note() == "0 documents, 0/s, 0 rejects, 0 workers, 2 shards failed"


def test_bad_input_ends_the_run(ledger: _Ledger, shards: list[Shard]):
    with pytest.raises(InputError, match=r"^use 4$"):
        ledger.take(Outcome(shards[0], error="use 4", stops=True))


def test_an_attempt_says_what_happened(job: Squares, shards: list[Shard]):
    """A shard has a summary only if its attempt succeeded."""
    tally = Tally()
    assert attempt(job, shards[3], tally) == Outcome(shards[3], documents=10, rejects=1)
    assert shards[3].summary == shards[3].folder / "000003.json"
    assert shards[3].read_summary() == {"square": 9}
    (job.traps / "raise 2").touch()
    (job.traps / "refuse 4").touch()
    failed, refused = attempt(job, shards[2], Tally()), attempt(job, shards[4], Tally())
    assert (failed.error, failed.stops) == ("ValueError: a bad number", False)
    assert (refused.error, refused.stops) == ("numbers=3 are odd; use 4", True)
    assert "in __call__" in failed.trace
    assert (failed.documents, failed.rejects) == (0, 0)
    assert sorted(path.name for path in shards[0].folder.glob("*.json")) == ["000003.json"]


def test_the_worker_of_another_machine_must_see_the_workdir(tmp_path: Path, job: Squares, shards: list[Shard]):
    """It works in the folder of the command; if it cannot see the workdir, the run stops. Needs no Ray."""
    here = os.getcwd()
    try:
        worker = _RayWorker(str(tmp_path), ["/a/folder/of/the/config"])
        assert sys.path.pop() == "/a/folder/of/the/config"
        with pytest.raises(RuntimeError, match="not open"):
            worker.make(shards[0])
        assert worker.open(Unopened("refuse")) == "no models; fit them"
        assert worker.open(Unopened("raise")) == "a Ray worker cannot start: OSError: no space left"
        assert worker.open(job) is None
        assert Path.cwd() == tmp_path
        assert worker.make(shards[3]) == Outcome(shards[3], documents=10, rejects=1)
        elsewhere = worker.make(Shard("train", 0, "a", tmp_path / "nowhere"))
        assert elsewhere.stops
        assert "cannot see" in str(elsewhere.error)
    finally:
        os.chdir(here)


@pytest.mark.parametrize("trap", ["die 3", "die 0"])
@untidy
@needs_ray
def test_a_worker_that_is_killed_is_replaced(trap: str, job: Squares, shards: list[Shard]):
    (job.traps / trap).touch()
    did = run(RAY, job, shards)
    assert_made(shards)
    assert did["documents"] == 80
    assert not (job.traps / trap).exists()
    assert job.made()["open"] >= 2


@untidy
@needs_ray
def test_a_shard_that_kills_its_workers_is_named_alone(job: Squares, shards: list[Shard]):
    """One worker with two shards at a time: the other shard dies with it, but is not blamed."""
    (job.traps / "die always 6").touch()
    with pytest.raises(InputError, match=r"1 shard failed 3 times each: train number 6 .its worker died"):
        run(Ray(workers=1, threads=2), job, shards)
    assert_made(shards, but=(6,))
    assert job.made()["make 6"] == ATTEMPTS


@dataclass(frozen=True)
class Together:
    """Shards that finish once four are in progress, and return their process id."""

    label: str = "meet"

    def open(self) -> "Together":
        return self

    def __call__(self, shard: Shard, tally: Tally) -> Mapping[str, Any]:
        (shard.folder / f"here {shard.number}").touch()
        while len(list(shard.folder.glob("here *"))) < 4:
            time.sleep(0.01)
        return {"process": os.getpid()}


@pytest.mark.slow
@untidy
@needs_ray
def test_the_first_worker_leaves_their_share_to_the_others(shards: list[Shard]):
    run(Ray(workers=2, threads=4), Together(), shards[:4])
    made = Counter(shard.read_summary()["process"] for shard in shards[:4])
    assert sorted(made.values()) == [2, 2]


@dataclass(frozen=True)
class Unopened:
    """A job that fails to open."""

    how: str
    label: str = "open"

    def open(self) -> Squares:
        if self.how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        raise InputError("no models; fit them") if self.how == "refuse" else OSError("no space left")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("refuse", "^no models; fit them$"),
        ("raise", "a Ray worker cannot start: OSError: no space left"),
        ("die", "a Ray worker cannot start: The actor is dead"),
    ],
)
@untidy
@needs_ray
def test_workers_that_cannot_be_opened_are_not_tried_for_ever(how: str, says: str, shards: list[Shard]):
    with pytest.raises(InputError, match=says):
        run(Ray(workers=1), Unopened(how), shards)


SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell start with SIGINT ignored
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from rac3.cli import main
import rac3.cli, rac3.execution.shards as ex
from rac3.execution.local import Local
from rac3.execution.ray import Ray

class Slow:
    label = "slow"
    def open(self): return self
    def __call__(self, shard, tally):
        (shard.folder / f"started {shard.number}").touch()
        for _ in range(1200):
            time.sleep(0.05)
            tally.add(1)
        return {}

folder = Path(sys.argv[2])
executor = Local(threads=2) if sys.argv[3] == "local" else Ray(workers=1)
rac3.cli.run = lambda arguments: ex.run(executor, Slow(), [ex.Shard("a", n, str(n), folder) for n in range(3)])
main()
"""


@pytest.mark.parametrize("name", ["local", pytest.param("ray", marks=[needs_ray, pytest.mark.slow])])
def test_an_interrupt_ends_the_run(name: str, tmp_path: Path):
    """Ctrl-C does not wait for a shard that takes a minute."""
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", SLOW, root, str(tmp_path), name]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        while not list(tmp_path.glob("started *")):
            assert process.poll() is None
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        started = time.monotonic()
        _, err = process.communicate(timeout=50)
        assert time.monotonic() - started < 30
    assert process.returncode == 130
    assert err.splitlines()[-1] == "rac3: interrupted; run the same command to go on"
    assert "Traceback" not in err
    assert not list(tmp_path.glob("*.json"))


def test_without_ray_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, job: Squares, shards: list[Shard]):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'rac3\[ray\]'"):
        run(RAY, job, shards)


def node(cpus: float, gpus: float = 0, alive: bool = True) -> dict[str, Any]:
    return {"Alive": alive, "Resources": {"CPU": cpus} | ({"GPU": gpus} if gpus else {})}


@pytest.mark.parametrize(
    ("executor", "nodes", "workers", "gpus"),
    [
        (Ray(), [node(8)], 1, 0),
        (Ray(), [node(8), node(4), node(9, alive=False)], 2, 0),
        (Ray(), [node(0), node(64, 8), node(64, 8)], 16, 1),
        (Ray(gpus_per_worker=4), [node(64, 8), node(64, 8)], 4, 4),
        (Ray(cpus_per_worker=16), [node(64, 8)], 4, 1),
        (Ray(gpus_per_worker=0), [node(64, 8), node(64, 8)], 2, 0),
        (Ray(workers=3), [node(64, 8)], 3, 1),
        (Ray(workers=300), [node(64)], 100, 0),
    ],
)
def test_there_are_as_many_workers_as_the_cluster_has_room_for(
    executor: Ray, nodes: list[dict[str, Any]], workers: int, gpus: int
):
    assert executor._room(nodes, shards=100) == (workers, gpus)


def test_a_cluster_without_room_is_refused():
    with pytest.raises(InputError, match="no machine of the Ray cluster has 4 CPUs and 0 GPUs"):
        Ray(cpus_per_worker=4)._room([node(2)], shards=10)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Local(threads=0), "local.threads=0"),
        (lambda: Ray(threads=0), "ray.threads=0"),
        (lambda: Ray(cpus_per_worker=0), "ray.cpus_per_worker=0"),
        (lambda: Ray(workers=-1), "ray.workers=-1"),
        (lambda: Ray(gpus_per_worker=-1), "ray.gpus_per_worker=-1"),
    ],
)
def test_numbers_out_of_range_are_refused(make: Any, says: str):
    with pytest.raises(InputError, match=says):
        make()


def test_summaries_are_plain_json(job: Squares, shards: list[Shard]):
    run(Local(), job, shards[:1])
    assert json.loads(shards[0].summary.read_text()) == {"square": 0}


@pytest.mark.parametrize("exists", [False, True])
def test_the_token_of_a_cluster_is_its_owners_alone(exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / ".ray" / "auth_token"
    if exists:  # as Ray writes it
        path.parent.mkdir()
        path.write_text("known")
        path.chmod(0o644)
    _keep_token_private()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text() == "known" if exists else len(path.read_text()) == 64
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    path.unlink()
    _keep_token_private()
    assert not path.exists()


LISTENING = """
import os, sys
from rac3.execution.ray import Ray

def below(pid):
    children = [int(p) for p in os.listdir("/proc") if p.isdigit() and parent(p) == pid]
    return [pid, *(each for child in children for each in below(child))]

def parent(pid):
    try:
        return int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1])
    except OSError:
        return -1

def links(pid):
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            yield os.readlink(f"/proc/{pid}/fd/{name}")
        except OSError:
            pass

with Ray()._cluster():
    pids = below(os.getpid())
    sockets = {link for pid in pids for link in links(pid)}
    for table in ("tcp", "tcp6"):
        for line in open(f"/proc/net/{table}").read().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                print("listens", fields[1].partition(":")[0])
    for pid in pids:
        print("runs", open(f"/proc/{pid}/cmdline").read().replace("\\0", " "))
"""


@needs_ray
@pytest.mark.slow
def test_a_cluster_of_one_machine_is_closed_to_others(tmp_path: Path):
    """Its processes listen on 127.0.0.1 (as the kernel writes it: 0100007F), and none is of the dashboard."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", LISTENING], capture_output=True, text=True, env=environment | {"HOME": str(tmp_path)}
    )
    lines = [line.partition(" ")[::2] for line in done.stdout.splitlines()]
    addresses = {address[-8:] for what, address in lines if what == "listens"}
    assert addresses == {"0100007F"}, done
    assert not any("dashboard.py" in command for what, command in lines if what == "runs")
    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
