"""`launch/slurm-train.sh` on a real Slurm: a controller and two nodes on this machine, started by the test.

Needs Debian's `slurm-wlm` and root, which `slurmd` asks for.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import ROOT, free_port, many_started
from test_many_processes import TINY, trained

from rac3.training.loop import TrainingConfig
from rac3.training.metrics import read_metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("slurmctld") is None or os.geteuid() != 0, reason="needs slurm-wlm and root"),
]

STEPS = 30
LONG = "--no-compare-with-cm3", "--training.steps", str(STEPS), "--training.checkpoint-every", "1000"
SLOW = f"""
import time
from pathlib import Path
from rac3.batches.loader import BatchStream
from rac3.config import load_config_module

batches = BatchStream.batches


def slowly(self, state):
    for each in batches(self, state):
        time.sleep(2 * Path(__file__).with_name("slow").exists())
        yield each


BatchStream.batches = slowly
get_config = load_config_module({TINY!r}).get_config
"""

# Nodes are named by their loopback addresses, as they are the hosts that processes look for.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/linear
SwitchType=switch/none
MpiDefault=none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=127.0.0.1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=127.0.0.2 NodeHostname={host} NodeAddr=127.0.0.2 Port={ports[2]} CPUs=2
PartitionName=usual Nodes=127.0.0.[1-2] Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=127.0.0.[1-2] MaxTime=INFINITE PriorityTier=2
"""


def slurm(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def wait_until(happened, seconds: float = 400.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a cluster that is up, whose jobs find this rac3 and four fake devices a node."""
    folder = tmp_path_factory.mktemp("slurm")  # a short path: those of sockets have at most 108 bytes
    (folder / "state").mkdir()
    (folder / "rac3").write_text(f'#!/bin/sh\nexec {sys.executable} -c "from rac3.cli import main; main()" "$@"\n')
    (folder / "rac3").chmod(0o755)
    (folder / "slurm.conf").write_text(
        CONFIG.format(host=socket.gethostname(), folder=folder, ports=[free_port() for _ in range(3)])
    )
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4"))
    daemons = ["slurmctld", "-D"], ["slurmd", "-D", "-N", "127.0.0.1"], ["slurmd", "-D", "-N", "127.0.0.2"]
    with ExitStack() as stack:
        running = []
        for number, daemon in enumerate(daemons):
            log = stack.enter_context((folder / f"log-{number}").open("w"))
            running.append(subprocess.Popen(daemon, stdout=log, stderr=log))
        try:
            wait_until(lambda: "idle 127.0.0.[1-2]" in subprocess.run("sinfo", capture_output=True, text=True).stdout)
            yield folder
        finally:
            subprocess.run(["scancel", "--full", "--signal=KILL", "--user=root"], check=False)
            for process in reversed(running):
                process.terminate()
                process.wait()


def state(job: str) -> str:
    return slurm("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}").strip()


def test_a_preempted_job_is_queued_again_and_ends_as_one_that_was_not(
    cluster: Path, finished_workdir: tuple[Path, Path], tmp_path: Path
):
    """An urgent job takes its nodes in the middle of the training."""
    without = shutil.ignore_patterns("train")
    preempted, whole = (
        shutil.copytree(finished_workdir[1], tmp_path / name, ignore=without) for name in ("preempted", "whole")
    )
    config, slow, output = tmp_path / "config.py", tmp_path / "slow", cluster / "output"
    config.write_text(SLOW)
    slow.touch()
    no_gpus = f"--output={output}", "--gpus-per-node=0"
    arguments = str(config), "--workdir", str(preempted), *LONG
    job = slurm("sbatch", "--parsable", *no_gpus, str(ROOT / "launch" / "slurm-train.sh"), *arguments).strip()
    wait_until(lambda: any(each.stat().st_size for each in preempted.glob("train/*.partial/metrics.jsonl")))
    urgent = slurm(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=2", f"--output={cluster}/urgent", "--wrap", "sleep 1"
    ).strip()
    wait_until(lambda: state(urgent) == "COMPLETED")
    slow.unlink()
    (partial,) = (preempted / "train").glob("*.partial")
    saved = max(int(path.name) for path in (partial / "checkpoints").iterdir())
    assert "ended with code 75; queued again" in output.read_text()
    assert f"stopped after step {saved}, saved" in output.read_text()
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm would wait for two minutes
    wait_until(lambda: state(job) == "COMPLETED")
    assert "Restarts=1" in slurm("scontrol", "show", "job", job)

    with many_started(tmp_path, 2, "train", str(config), "--workdir", str(whole), *LONG) as both:
        assert [command.wait() for command in both] == [0, 0]
    one, other = (trained(workdir, training=TrainingConfig(steps=STEPS)) for workdir in (preempted, whole))
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_array_equal(a, b)
    lines = [[line["loss"] for line in read_metrics(run.trained_model().folder)] for run in (one, other)]
    assert lines[0][-1] == lines[1][-1]


def test_bad_input_and_defects_are_not_queued_again(cluster: Path, tmp_path: Path):
    job = slurm(
        "sbatch", "--parsable", f"--output={cluster}/output", "--gpus-per-node=0",
        str(ROOT / "launch" / "slurm-train.sh"), TINY, "--workdir", str(tmp_path / "none"),
    ).strip()  # fmt: skip
    wait_until(lambda: state(job) == "FAILED")
    assert "ExitCode=2:0" in slurm("scontrol", "show", "job", job)
    said = (cluster / "output").read_text()
    assert said.count("is missing in ") == 2
