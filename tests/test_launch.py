"""The scripts of `launch/` start valid rac3 commands, and end as they should. No cluster is started here."""

import os
import shlex
import signal
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


# Training.


@pytest.fixture
def local(tmp_path: Path):
    """Starts `launch/local.sh` over a `rac3` that is a shell script."""

    def start(body: str, *arguments: str, **programs: str) -> subprocess.Popen:
        for name, text in {"rac3": body, "nvidia-smi": "exit 1", **programs}.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
            (tmp_path / name).chmod(0o755)
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        return subprocess.Popen(
            [LAUNCH / "local.sh", *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


def test_local_starts_processes_that_find_each_other(local):
    process = local('line=$(printf "%s|" "$@"); echo "$line"', "3", "my config.py", "--workdir", "/shared/my runs")
    lines = sorted(process.communicate()[0].splitlines())
    assert process.returncode == 0
    places = []
    for line in lines:
        stage, config, *words = line.rstrip("|").split("|")
        assert (stage, config, words[:2]) == ("train", "my config.py", ["--workdir", "/shared/my runs"])
        experiment, options = parse("train", load_config_module("quickstart").get_config(), words)
        assert experiment.workdir == "/shared/my runs"
        places.append(options.distributed)
    assert [(each.processes, each.process) for each in places] == [(3, 0), (3, 1), (3, 2)]
    assert len({each.coordinator for each in places}) == 1


def test_local_divides_the_gpus(local):
    process = local('echo "${@: -1} $CUDA_VISIBLE_DEVICES"', "2", "x.py", **{"nvidia-smi": "seq 8"})
    assert sorted(process.communicate()[0].splitlines()) == ["0 0,1,2,3", "1 4,5,6,7"]
    process = local("true", "3", "x.py", **{"nvidia-smi": "seq 8"})
    assert "3 processes can't have equal shares of 8 GPUs" in process.communicate()[1]
    assert process.returncode == 2


@pytest.mark.slow  # waits for processes that hang
def test_local_fails_with_the_first_that_fails_and_leaves_none(local, tmp_path: Path):
    """Process 1 fails; process 0 hangs, as one does that waits in a collective, and hears no signal."""
    hangs = f'echo $$ > {tmp_path}/pid; trap "" TERM; while true; do sleep 1; done'
    body = f'if [ "${{@: -1}}" = 1 ]; then sleep 0.5; exit 7; fi; {hangs}'
    process = local(body, "2", "x.py")
    process.communicate()
    assert process.returncode == 7
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_local_passes_sigterm_on_and_waits_until_all_have_saved(local):
    process = local('trap "sleep 0.3; echo saved; exit 75" TERM; echo up; while true; do sleep 0.1; done', "2", "x.py")
    assert [process.stdout.readline() for _ in range(2)] == ["up\n", "up\n"]
    process.send_signal(signal.SIGTERM)
    assert process.communicate()[0] == "saved\nsaved\n"
    assert process.returncode == 75


def test_local_leaves_nothing_behind_if_it_is_stopped_as_it_starts(local, tmp_path: Path):
    """The first process stops the script before the second begins, as a signal would that comes so early."""
    early = f"echo $$ >>{tmp_path}/pids; kill -TERM $PPID; exec sleep 60"
    process = local(early, "40", "x.py")
    process.communicate(timeout=60)
    assert process.returncode != 0
    for pid in (tmp_path / "pids").read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


@pytest.mark.parametrize("arguments", [(), ("0", "x.py"), ("x.py",)])
def test_local_needs_a_number(local, arguments: tuple[str, ...]):
    process = local("true", *arguments)
    assert process.communicate()[1].startswith("usage: launch/local.sh N CONFIG")
    assert process.returncode == 2


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [
        (0, "0", False),
        (1, "0", False),
        (2, "0", False),
        (75, "3", True),
        (76, "0", True),
        (137, "0", True),
        (75, "100", False),
    ],
)
def test_slurm_queues_again_what_may_go_on(code: int, restarts: str, requeued: bool, tmp_path: Path):
    """With stand-ins for Slurm's commands; `tests/test_slurm.py` has the real ones."""
    for name, body in (("srun", f'printf "%s\\n" "$@"; exit {code}'), ("scontrol", 'echo "$@"'), ("sleep", "")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "12", "SLURM_CPUS_ON_NODE": "64", "SLURM_RESTART_COUNT": restarts}
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [LAUNCH / "slurm-train.sh", "my config.py", "--workdir", "/shared/my runs"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    words = done.stdout.splitlines()
    assert words[words.index("rac3") :][:5] == ["rac3", "train", "my config.py", "--workdir", "/shared/my runs"]
    assert ("requeue 12" in words) == requeued
    assert requeued or done.returncode == code


def test_slurm_signals_the_processes_and_not_the_script():
    """`B:` would signal the shell alone, which waits for srun."""
    text = (LAUNCH / "slurm-train.sh").read_text()
    asked = {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")}
    assert {"--requeue", "--signal=TERM@300", "--ntasks-per-node=1", "--open-mode=append", "--exclusive"} <= asked
    assert text.count("\nsrun ") == 1


# The fields of JobSet v1alpha2 (its API reference) that the manifest may use; those of a Job are Kubernetes' own.
JOBSET = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "failurePolicy": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "maxRestarts": {"type": "integer"},
                        "restartStrategy": {"enum": ["Recreate", "BlockingRecreate", "InPlaceRestart"]},
                        "rules": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "required": ["name", "action"],
                                "additionalProperties": False,
                                "properties": {
                                    "name": {"pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                                    "action": {
                                        "enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
                                    },
                                    "onJobFailureReasons": {
                                        "type": "array",
                                        "items": {
                                            "enum": [
                                                "BackoffLimitExceeded",
                                                "DeadlineExceeded",
                                                "FailedIndexes",
                                                "MaxFailedIndexesExceeded",
                                                "PodFailurePolicy",
                                            ]
                                        },
                                    },
                                    "targetReplicatedJobs": {"type": "array", "items": {"type": "string"}},
                                },
                            },
                        },
                    },
                },
                "network": {"type": "object"},
                "successPolicy": {"type": "object"},
                "suspend": {"type": "boolean"},
                "ttlSecondsAfterFinished": {"type": "integer"},
                "replicatedJobs": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["name", "template"],
                        "additionalProperties": False,
                        "properties": {
                            "name": {"type": "string"},
                            "replicas": {"type": "integer"},
                            "template": {"type": "object", "required": ["spec"]},
                        },
                    },
                },
            },
        },
    },
}


@pytest.fixture
def jobset() -> dict[str, Any]:
    return yaml.safe_load((LAUNCH / "kubernetes-train.yaml").read_text())


def test_the_jobset_has_the_fields_of_its_api(jobset: dict[str, Any]):
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator(JOBSET).validate(jobset)


def test_the_job_has_the_fields_of_kubernetes(jobset: dict[str, Any]):
    """By the models of Kubernetes' own client."""
    client = pytest.importorskip("kubernetes.client")

    def check(kind: str, value: Any, where: str) -> None:
        if kind.startswith(("list[", "List[")):
            for number, each in enumerate(value):
                check(kind[5:-1], each, f"{where}[{number}]")
        elif model := getattr(client, kind, None):
            types = {model.attribute_map[name]: each for name, each in model.openapi_types.items()}
            assert value.keys() <= types.keys(), where
            for name, each in value.items():
                check(types[name], each, f"{where}.{name}")
        else:
            expected = {"str": str, "int": int, "bool": bool, "object": object}.get(kind, dict)
            assert isinstance(value, expected), where

    (job,) = jobset["spec"]["replicatedJobs"]
    check("V1JobTemplateSpec", job["template"], job["name"])


def test_the_pods_of_the_jobset_find_each_other(jobset: dict[str, Any]):
    """Pod 0 of job 0 is `<jobset>-<replicated job>-0-0`, in a service with the name of the JobSet."""
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"][:3] == ["rac3", "train", "/shared/config.py"]
    words = [word.replace("$(JOB_COMPLETION_INDEX)", "3") for word in container["command"][3:]]
    experiment, options = parse("train", load_config_module("quickstart").get_config(), words)
    assert experiment.workdir == "/shared/runs/mine"
    name = jobset["metadata"]["name"]
    (port,) = (each["containerPort"] for each in container["ports"])
    assert options.distributed.coordinator == f"{name}-{replicated['name']}-0-0.{name}:{port}"
    assert options.distributed.processes == job["completions"] == job["parallelism"]
    assert (replicated["replicas"], job["completionMode"], options.distributed.process) == (1, "Indexed", 3)
    assert {each["name"] for each in container["volumeMounts"]} == {
        each["name"] for each in job["template"]["spec"]["volumes"]
    }
    assert container["resources"]["requests"] == container["resources"]["limits"]


def test_only_bad_input_ends_the_jobset_at_once(jobset: dict[str, Any]):
    """A pod that fails otherwise, whatever its code, fails its job, and the JobSet starts again."""
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (job["backoffLimit"], job["template"]["spec"]["restartPolicy"]) == (0, "Never")
    (policy,) = job["podFailurePolicy"]["rules"]
    (container,) = job["template"]["spec"]["containers"]
    assert policy["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert (policy["action"], rule["action"], rule["onJobFailureReasons"]) == (
        "FailJob",
        "FailJobSet",
        ["PodFailurePolicy"],
    )
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 10
