"""How processes find each other, what they compare, and the watchdog."""

import inspect
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import pytest
from commands import free_port

import rac3
from rac3.config import InputError
from rac3.devices.processes import (
    STALLED,
    Distributed,
    Place,
    Processes,
    code_digest,
    differences,
    first_host,
    from_slurm,
)

STEP = {
    "SLURM_JOB_ID": "4099",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("changed", "place"),
    [
        ({}, Place("gpu03:61443", 2, 1)),  # 61440 + 4099 % 4096
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Place("gpu03:61443", 1, 0)),
        # Several tasks on a node have a device each; if Slurm shows each only its own, that is number 0 there.
        (
            {"SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "13", "SLURM_LOCALID": "5"},
            Place("gpu03:61443", 16, 13, (5,)),
        ),
        (
            {"SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "5", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"},
            Place("gpu03:61443", 16, 1, (5,)),
        ),
        (
            {"SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "5", "CUDA_VISIBLE_DEVICES": "5"},
            Place("gpu03:61443", 16, 1),
        ),
    ],
)
def test_slurm_tells_a_task_its_place(changed: dict[str, str], place: Place):
    assert from_slurm({**STEP, **changed}) == place


def test_a_batch_script_or_shell_is_no_task_of_srun():
    """There, Slurm sets only what is true of the whole job."""
    assert (
        from_slurm({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_NODELIST": "n1"}) is None
    )
    assert from_slurm({}) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node001", "node001"),
        ("node001,host2", "node001"),
        ("node[001-015],host2", "node001"),
        ("node[003,007-015]", "node003"),
        ("node[12]", "node12"),
        ("login,node[1-2]", "login"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coordinator": "host1:8476"}, "give all three, such as host1:8476, 2 and 0"),
        ({"processes": 2, "process": 0}, "give all three"),
        ({"coordinator": "host1", "processes": 2, "process": 0}, "'host1' has no port; give HOST:PORT"),
        ({"coordinator": "host1:1", "processes": 2, "process": 2}, "distributed.process=2 .*count from 0 to 1"),
        ({"start_seconds": 0}, "distributed.start_seconds=0 is below 1"),
        ({"heartbeat_seconds": 0}, "distributed.heartbeat_seconds=0 is below 1"),
    ],
)
def test_what_is_no_place_is_refused(settings: dict, message: str):
    with pytest.raises(InputError, match=message):
        Distributed(**settings)


@pytest.mark.parametrize("environ", [{}, {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}])
def test_one_process_alone_waits_for_nobody(environ: dict[str, str]):
    with Distributed().start(environ=environ) as alone:
        assert alone.first
        alone.meet("here")
        alone.compare("all", {"code": "1"})
        assert alone.from_first("value", [1]) == [1]


def test_the_nodes_of_a_cold_cluster_have_time_to_boot(monkeypatch: pytest.MonkeyPatch):
    """JAX itself would give them 300 s. When our time is over, it has another minute."""
    asked, signature = [], inspect.signature(jax.distributed.initialize)

    def initialize(*given: Any, **named: Any) -> None:
        asked.append(signature.bind(*given, **named).arguments)

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    Distributed().start(environ={**STEP, "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "5"})
    Distributed("host1:8476", 3, 2, start_seconds=7, heartbeat_seconds=9).start(environ=STEP)
    names = "coordinator_address", "num_processes", "process_id", "local_device_ids"
    assert [tuple(each[name] for name in names) for each in asked] == [
        ("gpu03:61443", 16, 1, [5]),
        ("host1:8476", 3, 2, None),
    ]
    times = [(each["initialization_timeout"], each["heartbeat_timeout_seconds"]) for each in asked]
    assert times == [(1860, 100), (67, 9)]


def test_processes_that_do_not_come_are_one_line():
    """Of two, the first waits for the other, and the other for the first."""
    code = "from rac3.devices.processes import Distributed; Distributed('localhost:{}', 2, {}, start_seconds=1).start()"
    ports = [free_port(), free_port()]
    alone = [
        subprocess.Popen([sys.executable, "-c", code.format(*place)], stderr=subprocess.PIPE, text=True)
        for place in zip(ports, (0, 1), strict=True)
    ]
    for number, process in enumerate(alone):
        _, err = process.communicate()
        assert process.returncode == 2, err
        (line,) = (line for line in err.splitlines() if line.startswith("rac3: "))
        assert line == (
            f"rac3: process {number} of 2 did not meet the others at localhost:{ports[number]} within 1 s; start all "
            "of them, with that address and their own numbers, or raise --distributed.start-seconds"
        )


def test_a_start_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch):
    def initialize(*given: Any, **named: Any) -> None:
        raise jax.errors.JaxRuntimeError("UNKNOWN: no such port\nand more")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(InputError) as refused:
        Distributed("host1:8476", 3, 2, start_seconds=1).start(environ={})
    assert str(refused.value) == (
        "process 2 of 3 can't start at host1:8476 (UNKNOWN: no such port); "
        "start all of them, with one address and their own numbers"
    )
    time.sleep(1.5)  # the timer has been stopped, or it would end this process


def found(*digests: dict[str, str]) -> dict[int, dict]:
    return {number: {"host": f"h{number}", "parts": parts} for number, parts in enumerate(digests)}


def test_the_odd_process_is_named_and_what_differs():
    one, other = {"code": "a", "config": "b"}, {"code": "a", "config": "c"}
    assert differences(found(one, one, one)) == ""
    assert differences(found(one, other)).startswith("process 1 (h1) has another config than the others; ")
    assert differences(found(other, one, one)).startswith("process 0 (h0) has another config than the others; ")
    two = differences(found(one, one, other, one, one, {"code": "z", "config": "c"}))
    assert two.startswith(
        "process 5 (h5) has another code than the others; "
        "processes 2 (h2), 5 (h5) have another config than the others; start all"
    )


def test_the_digest_of_the_code_changes_with_each_file(tmp_path: Path):
    package = shutil.copytree(Path(rac3.__file__).parent, tmp_path / "rac3")
    assert code_digest(package) == code_digest()
    with (package / "tokens" / "html.py").open("a") as file:
        file.write("#")
    assert code_digest(package) != code_digest()
    shutil.copy(Path(rac3.__file__).parent / "tokens" / "html.py", package / "tokens" / "html.py")
    assert code_digest(package) == code_digest()
    (package / "tokens" / "html.py").rename(package / "tokens" / "html5.py")  # in the same place of the order
    assert code_digest(package) != code_digest()


class GoneError(Exception):
    pass


def test_a_failure_of_a_process_alone_is_its_own():
    with pytest.raises(GoneError), Processes():
        raise GoneError


def watched(body: str, seconds: float) -> subprocess.Popen:
    """A process with a watchdog of so many seconds, which says `ready` and runs `body`."""
    code = f"""
import time
from rac3.devices.processes import COMPILING, Processes

def spin(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end: pass

with Processes(stall_minutes={seconds} / 60) as processes:
    processes.at("a batch", 7)
    print("ready", flush=True)
    {body}
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def rest(process: subprocess.Popen) -> tuple[str, str]:
    """What it writes until it ends; `communicate` would miss what `readline` has read ahead."""
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        return process.stdout.read(), process.stderr.read()


def test_the_watchdog_ends_a_process_that_is_stuck_in_c():
    """The main thread holds no GIL, and never returns; what was printed before is not lost."""
    process = watched("print('last words'); __import__('threading').Lock().acquire() and time.sleep(60)", 1.0)
    begun = time.monotonic()
    out, err = rest(process)
    assert process.returncode == STALLED
    assert 0.5 < time.monotonic() - begun < 30
    assert out == "last words\n"
    assert re.fullmatch(
        r"rac3: process 0 of 1 \(\S+\) has not got on for 0.0167 minutes \(training.stall_minutes\): "
        r"it waits for a batch at step 7, in <module> \(<string>:12\); "
        r"it ends with code 76, run the same command to go on\n",
        err,
    )


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("for step in range(8): processes.at('the step', 1); time.sleep(0.25)", 0),  # the same words are a sign of life
        ("processes.at(COMPILING); spin(2)", 0),
        ("processes.at(COMPILING); time.sleep(60)", STALLED),
        ("spin(60)", STALLED),
    ],
)
def test_what_counts_as_getting_on(body: str, code: int):
    process = watched(body, 1.0)
    _, err = rest(process)
    assert process.returncode == code, err


def test_a_process_that_was_stopped_goes_on():
    """Whoever stops it (Ctrl-Z, a debugger) for longer than the limit has not found it stuck."""
    process = watched("for _ in range(30): time.sleep(0.05)", 4.0)
    time.sleep(0.5)  # until the watchdog has looked once
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(5)
    os.kill(process.pid, signal.SIGCONT)
    _, err = rest(process)
    assert process.returncode == 0, err
