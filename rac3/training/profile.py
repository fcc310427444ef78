"""A trace of some steps of a run, for TensorBoard's profiler or Perfetto."""

import contextlib
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

PROFILE = "profile"  # the subfolder of a run's folder that holds the trace


class Profile:
    """A context manager that traces the steps from `first` to `last`, of which each has its number in the trace.

    Args:
      steps: first and last; (0, 0) traces none.
    """

    def __init__(self, steps: tuple[int, int], folder: Path) -> None:
        self.first, self.last = steps
        self.folder = folder / PROFILE
        self.running = False

    def step(self, number: int) -> contextlib.AbstractContextManager[Any]:
        """What step `number` is to run in."""
        if number == self.first:
            jax.profiler.start_trace(str(self.folder))
            self.running = True
        return jax.profiler.StepTraceAnnotation("train", step_num=number) if self.running else contextlib.nullcontext()

    def after(self, number: int, state: Any) -> None:
        """Ends the trace after its last step, when the devices have made `state`."""
        if self.running and number == self.last:
            jax.block_until_ready(state)
            self._stop()

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.running:
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self.running = False
