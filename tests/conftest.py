"""Eight fake CPU devices for every test, jaxtyping shapes checked at run time, and what many tests start from."""

import fcntl
import gc
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
# Compiled programs are kept from run to run, and shared by the processes of one.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".jax_cache"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# Programs of a few steps: most of the time would go into compiling them well.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {QUICK}"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("rac3", "beartype.beartype")

MOST_PROCESSES = 8  # each takes gigabytes


def _is_whole_suite(config: pytest.Config) -> bool:
    """No file or test is named."""
    return config.args_source != pytest.Config.ArgsSource.ARGS


def pytest_configure(config: pytest.Config) -> None:
    if _is_whole_suite(config) and not config.option.markexpr:
        config.option.markexpr = "not slow"


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The whole suite runs on all cores; what is named runs in this process, which starts at once."""
    return min(MOST_PROCESSES, len(os.sched_getaffinity(0))) if _is_whole_suite(config) else 0


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real test data that RAC3_TEST_DATA names; tests that ask for it are skipped elsewhere."""
    folder = os.environ.get("RAC3_TEST_DATA")
    if not folder:
        pytest.skip("set RAC3_TEST_DATA to the folder that holds emoji-captions to run this test")
    return Path(folder)


@pytest.fixture(scope="session")
def finished_workdir(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(config, workdir) of a whole run of the shrunken quickstart, made once for all processes of the session.

    `RAC3_TEST_WORKDIR` names a folder where it is kept, so that several sessions of one version of the code find it.
    """
    from rac3.cli import run

    config = Path(__file__).parent / "tiny_config.py"
    session = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        session = session.parent  # that of all processes
    workdir = Path(os.environ.get("RAC3_TEST_WORKDIR") or session / "finished")
    done = workdir.with_suffix(".done")
    with workdir.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            run(["run", str(config), "--workdir", str(workdir)])
            done.touch()
    return config, workdir


@pytest.fixture(scope="session")
def experiment():
    """That of the finished run."""
    import tiny_config

    return tiny_config.get_config()


@pytest.fixture(scope="session")
def store(finished_workdir: tuple[Path, Path]):
    """The finished run itself, to read."""
    from rac3.artifacts.workdir import Workdir

    return Workdir(finished_workdir[1], "tiny")


@pytest.fixture
def workdir(finished_workdir: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return shutil.copytree(finished_workdir[1], tmp_path / "tiny")


@pytest.fixture
def collects() -> Iterator[None]:
    """For tests of damaged checkpoints, which expect `PytestUnraisableExceptionWarning`.

    At the first part that fails, orbax leaves the others to fail later, where Python can only report it: in this test.
    """
    yield
    gc.collect()


@pytest.fixture
def rac3(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the command in this process; gives its exit code."""
    from rac3.cli import main

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["rac3", *arguments])
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return run
