"""The real command in processes of its own, which tests may kill.

They are forked from a server that has imported what the command imports, which takes most of a short command's time:

    pytest -> forkserver (imports once) -> rac3 prepare ...
                                        -> rac3 train ...
"""

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).parents[1]
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    ["rac3.cli", "rac3.stages.generate", "rac3.report.experiment", "tyro", "transformers.models.auto.tokenization_auto"]
)


@dataclass
class Command:
    """A command that runs, or has ended."""

    process: BaseProcess
    errors: Path

    def ended(self) -> bool:
        return not self.process.is_alive()

    def wait(self) -> int:
        """The exit code; minus the signal that killed it."""
        self.process.join()
        code = self.process.exitcode
        assert code is not None
        return code

    def kill(self) -> None:
        """As a machine that fails does: this process, and nothing else."""
        self.process.kill()
        assert self.wait() == -9

    def err(self) -> str:
        """What it wrote to standard error."""
        return self.errors.read_text()


@contextmanager
def started(folder: Path, *arguments: str, devices: int = 8) -> Iterator[Command]:
    """`rac3 ARGUMENTS`, in the root of the project; its output goes into files of `folder`. None is left running.

    Args:
      devices: fake CPU devices of the process.
    """
    errors = folder / f"err-{time.monotonic_ns()}"
    process = FORKED.Process(target=_main, args=(list(arguments), str(errors), devices))
    process.start()
    command = Command(process, errors)
    try:
        yield command
    finally:
        if not command.ended():
            process.kill()
        process.join()
        process.close()


def free_port() -> int:
    """One on which nothing listens now."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@contextmanager
def many_started(
    folder: Path, count: int, *arguments: str, last: tuple[str, ...] = (), devices: int = 8
) -> Iterator[list[Command]]:
    """One `rac3 ARGUMENTS` in `count` processes that find each other; they share the devices.

    Args:
      last: more arguments of the last process alone.
    """
    place = "--distributed.coordinator", f"localhost:{free_port()}", "--distributed.processes", str(count)
    place, share = (*place, "--distributed.process"), devices // count
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                started(folder, *arguments, *(last if number == count - 1 else ()), *place, str(number), devices=share)
            )
            for number in range(count)
        ]


def wait_until(happened: Callable[[], bool], command: Command) -> None:
    """Waits for something that the command does before it ends."""
    while not happened():
        assert not command.ended(), command.err()
        time.sleep(0.002)


def _main(arguments: list[str], errors: str, devices: int) -> None:
    flags = os.environ["XLA_FLAGS"].split()
    kept = [flag for flag in flags if "device_count" not in flag]
    os.environ["XLA_FLAGS"] = " ".join([*kept, f"--xla_force_host_platform_device_count={devices}"])
    with open(errors, "wb") as err, open(os.devnull, "r+b") as null:
        os.dup2(null.fileno(), 0)
        os.dup2(null.fileno(), 1)
        os.dup2(err.fileno(), 2)
    os.chdir(ROOT)
    sys.argv = ["rac3", *arguments]
    from rac3.cli import main

    main()
