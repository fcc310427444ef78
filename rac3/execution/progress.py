"""Progress of long stages: a bar with rate and ETA on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
LINE_EVERY = 15.0  # seconds between plain lines


class Progress:
    """A context manager that reports progress through `total` units of work on standard error, if it is `shown`."""

    def __init__(self, label: str, total: int, unit: str, initial: int = 0, shown: bool = True) -> None:
        self.shown = shown
        self.label, self.total, self.unit, self.initial = label, total, unit, initial
        self.done = initial
        self.note = ""
        self.started = self.last_line = time.monotonic()
        terminal = sys.stderr.isatty()
        options = {"desc": label, "total": total, "unit": f" {unit}", "initial": initial, "leave": True}
        self.bar = tqdm(dynamic_ncols=True, **options) if terminal and shown else None

    def update(self, count: int = 1, note: str = "") -> None:
        """Add `count` units (or none); `note` appears after the rate."""
        self.done += count
        self.note = note or self.note
        if self.bar is not None:
            if note:
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(count)
            if not count:
                self.bar.refresh()  # only a new note
        elif time.monotonic() - self.last_line > LINE_EVERY:
            self.last_line = time.monotonic()
            self._line()

    def _line(self) -> None:
        if not self.shown:
            return
        elapsed = time.monotonic() - self.started
        rate = (self.done - self.initial) / max(elapsed, 1e-9)
        left = (self.total - self.done) / rate if rate else float("inf")
        eta = f", ETA {tqdm.format_interval(int(left))}" if 0 < left < float("inf") else ""
        note = f"  {self.note}" if self.note else ""
        took = tqdm.format_interval(int(elapsed))
        print(
            f"{self.label}: {self.done}/{self.total} {self.unit}, {rate:.3g}/s, {took}{eta}{note}",
            file=sys.stderr,
            flush=True,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()
        elif kind is None:
            self._line()


def progress(items: Iterable[T], label: str, total: int, unit: str) -> Iterator[T]:
    """Yield the items, reporting progress."""
    with Progress(label, total, unit) as bar:
        for item in items:
            yield item
            bar.update()
