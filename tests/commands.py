"""The real command in processes of its own, which tests may kill.

They are forked from a server that has imported what the command imports, which takes most of a short command's time:

    pytest -> forkserver (imports once) -> rac3 prepare ...
                                        -> rac3 train ...
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
def started(folder: Path, *arguments: str) -> Iterator[Command]:
    """`rac3 ARGUMENTS`, in the root of the project; its output goes into files of `folder`. None is left running."""
    errors = folder / f"err-{time.monotonic_ns()}"
    process = FORKED.Process(target=_main, args=(list(arguments), str(errors)))
    process.start()
    command = Command(process, errors)
    try:
        yield command
    finally:
        if not command.ended():
            process.kill()
        process.join()
        process.close()


def wait_until(happened: Callable[[], bool], command: Command) -> None:
    """Waits for something that the command does before it ends."""
    while not happened():
        assert not command.ended(), command.err()
        time.sleep(0.002)


def _main(arguments: list[str], errors: str) -> None:
    with open(errors, "wb") as err, open(os.devnull, "r+b") as null:
        os.dup2(null.fileno(), 0)
        os.dup2(null.fileno(), 1)
        os.dup2(err.fileno(), 2)
    os.chdir(ROOT)
    sys.argv = ["rac3", *arguments]
    from rac3.cli import main

    main()
