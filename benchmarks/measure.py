"""Shared by the benchmarks: interleaved timing, and the record of a run."""

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any


def seconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def interleaved(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function in each round, after one warm-up call of each.

    Interleaved calls see the same load on the machine, so ratios within a round are more reliable than times.
    """
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds):
        order = list(functions) if number % 2 == 0 else list(reversed(functions))
        for name in order:
            times[name].append(seconds(functions[name]))
    return times


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """How many times as fast the second is: median, minimum and maximum over the rounds."""
    each = [a / b for a, b in zip(slow, fast, strict=True)]
    return {"median": round(statistics.median(each), 3), "min": round(min(each), 3), "max": round(max(each), 3)}


def hardware() -> str:
    cpu = next(
        (
            line
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        "",
    )
    return f"{len(os.sched_getaffinity(0))} cores of {cpu.partition(':')[2].strip() or platform.machine()}"


def record(command: str, packages: tuple[str, ...], results: Any, **more: Any) -> str:
    """The JSON of a run: command, date, hardware, versions, results."""
    found = {package: metadata.version(package) for package in packages}
    head = {"command": command, "date": datetime.date.today().isoformat(), "hardware": hardware(), "versions": found}
    return json.dumps({**head, **more, "results": results}, indent=2) + "\n"
