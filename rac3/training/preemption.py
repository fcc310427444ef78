"""Stopping a run between two steps: SIGTERM from a launcher, Ctrl-C from a person.

SIGTERM or SIGINT -> the step in progress ends -> checkpoint -> exit code 75 -> the same command goes on from there
"""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

import jax

RUN_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: all is saved, and the same command goes on


class PreemptedError(Exception):
    """A run was asked to stop, and is saved. The command exits with code 75, on which launchers start it again."""


class Preemption:
    """A context manager that keeps SIGTERM and SIGINT from ending the process, and notes them.

    SIGTERM may come any number of times, since launchers repeat it. A second SIGINT ends the process at once. The
    handlers that were there before return at the end. Only a program's main thread can catch signals; in any other
    thread they do what they did before.

    Of several processes, one may be signaled before the others. JAX's preemption service, which
    `jax.distributed.initialize` starts, catches SIGTERM itself and makes all processes stop after the same step, so its
    handler stays, and SIGINT is passed on as SIGTERM.
    """

    def __init__(self) -> None:
        self.several = jax.process_count() > 1
        self.signaled = False
        self.interrupted = False
        self._before: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT,) if self.several else (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None is a handler that Python did not set

    def reached(self, step: int, service: Callable[[int], bool]) -> bool:
        """Whether to stop after `step`: the same for all processes. Ask after each step.

        Args:
          service: what the preemption service says of a step (orbax: `CheckpointManager.reached_preemption`).
        """
        return service(step) if self.several else self.signaled

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT:
            if self.interrupted:  # end as a process does that catches no signals
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self.interrupted = True
            name = "interrupted"
        if not self.signaled:
            # Not print: the signal may have come while something was being printed.
            os.write(2, f"\nrac3: {name}; saving after this step (Ctrl-C again stops at once)\n".encode())
        self.signaled = True
        if self.several and number == signal.SIGINT:
            os.kill(os.getpid(), signal.SIGTERM)
