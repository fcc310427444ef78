"""The scripts of `launch/` start valid rac3 commands. No cluster is started here."""

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from rac3.cli import parse
from rac3.config import load_config_module
from rac3.execution.ray import Ray
from rac3.experiment import Experiment

LAUNCH = Path(__file__).parents[1] / "launch"


def parsed(words: list[str], config: str) -> Experiment:
    """The experiment of a command line `rac3 prepare CONFIG ...`, over the quickstart."""
    assert words[:3] == ["rac3", "prepare", config]
    return parse("prepare", load_config_module("quickstart").get_config(), words[3:])[0]


def test_slurm_starts_one_ray_cluster_and_the_command(tmp_path: Path):
    """Slurm's commands are replaced: `srun` prints what it would run on each node."""
    for name, body in (("scontrol", "printf 'node7\\nnode8\\n'"), ("srun", 'printf "%s\\n" "$@"'), ("ray", "exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "64"}
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [LAUNCH / "slurm.sh", "my config.py", "--workdir", "/shared/my runs"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    start, rac3 = words[: words.index("--")], words[words.index("--") + 1 :]
    assert start[:2] == ["--cpus-per-task=64", "--kill-on-bad-exit=1"]
    assert shlex.join(start[2:]) == "ray symmetric-run --address node7:6379 --min-nodes 2 --num-cpus 64"
    experiment = parsed(rac3, "my config.py")
    assert experiment.executor == Ray(address="node7:6379")
    assert experiment.workdir == "/shared/my runs"


@pytest.mark.parametrize(("knows_tokens", "mode"), [(True, "token"), (False, "")])
def test_workers_need_a_token_if_this_ray_supports_them(knows_tokens: bool, mode: str, tmp_path: Path):
    """Otherwise anyone on the cluster's network could run code as its user."""
    said = tmp_path / "said"
    for name, body in (
        ("scontrol", "echo node7"),
        ("srun", 'echo "$RAY_AUTH_MODE"'),
        ("ray", f'echo "$@" > {said}; exit {0 if knows_tokens else 1}'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node7", "SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_ON_NODE": "8"}
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment.pop("RAY_AUTH_MODE", None)
    done = subprocess.run([LAUNCH / "slurm.sh", "x.py"], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == mode
    assert said.read_text() == "get-auth-token --generate\n"


def test_slurm_gives_each_node_to_one_ray():
    """The workers of that Ray share the node's GPUs, one each."""
    text = (LAUNCH / "slurm.sh").read_text()
    asked = {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")}
    assert {"--ntasks-per-node=1", "--gpus-per-node=8", "--exclusive"} <= asked


def test_the_script_is_refused_outside_of_slurm():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    done = subprocess.run([LAUNCH / "slurm.sh", "x"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "SLURM_JOB_NODELIST" in done.stderr


@pytest.fixture
def job() -> dict[str, Any]:
    return yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())


def test_kubernetes_starts_the_command_with_as_many_workers_as_pods(job: dict[str, Any]):
    experiment = parsed(shlex.split(job["spec"]["entrypoint"]), "/shared/config.py")
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert experiment.executor == Ray(workers=group["replicas"], address="auto")
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
    (container,) = group["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_the_head_runs_the_command_and_no_workers(job: dict[str, Any]):
    """A job that ends releases its pods, and one that fails resumes in a new cluster."""
    spec = job["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] >= 1
    head, (group,) = spec["rayClusterSpec"]["headGroupSpec"], spec["rayClusterSpec"]["workerGroupSpecs"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    containers = [pods["template"]["spec"]["containers"][0] for pods in (head, group)]
    assert containers[0]["image"] == containers[1]["image"]
    for container in containers:  # requests equal limits, so that no pod is evicted
        assert container["resources"]["requests"] == container["resources"]["limits"]
    assert "nvidia.com/gpu" not in containers[0]["resources"]["limits"]


def test_all_pods_see_the_files_of_the_command(job: dict[str, Any]):
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        (mount,) = container["volumeMounts"]
        assert mount["name"] in {volume["name"] for volume in pod["volumes"]}
        for word in shlex.split(job["spec"]["entrypoint"]):
            assert not word.startswith("/") or word.startswith(f"{mount['mountPath']}/")
