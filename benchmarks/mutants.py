"""Plants mistakes in a copy of rac3, one at a time, and runs the tests that must catch each. None may survive.

    python benchmarks/mutants.py                    # all
    python benchmarks/mutants.py --quick            # only those marked `quick`, as in CI
    python benchmarks/mutants.py --only evaluation  # one file of benchmarks/mistakes/, or names that contain the word
    python benchmarks/mutants.py --check            # only check that each can be planted; runs no tests

`benchmarks/mistakes/AREA.toml` lists the mistakes. Each is a small edit of one file. The text in `find` must occur in
it exactly once, so that a mistake whose line has moved or changed is an error and does not go unnoticed.

    [[mistake]]
    name = "alpha is applied to the main document"
    file = "rac3/batches/groups.py"
    find = "np.where(main, 1.0, self.retrieved_weight)"
    replace = "np.where(main, self.retrieved_weight, 1.0)"
    tests = ["tests/batches/test_groups.py::test_weights"]
    quick = true

All tests first run without any mistake and must pass. A mistake is killed if its tests then fail, or take ten times as
long as that whole run. Exit code 0: all killed; 1: some survived; 2: a mistake or its tests cannot be run.
"""

import argparse
import ast
import functools
import multiprocessing
import os
import queue
import re
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import record

ROOT = Path(__file__).parents[1]
LIST = "benchmarks/mistakes"  # relative to the project root
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")
PASSED, FAILED = 0, 1  # exit codes of pytest
LEAST_PATIENCE = 60.0  # seconds
START_METHOD = "forkserver"
LIBRARIES = ("jax", "flax.linen", "optax", "orbax.checkpoint", "grain", "tensorstore", "transformers", "tyro")


class MistakeError(Exception):
    """A mistake that cannot be planted, or tests that cannot judge it."""


@functools.cache  # a file has many mistakes
def _syntax(text: str) -> str:
    return ast.dump(ast.parse(text))


@dataclass(frozen=True)
class Mistake:
    """One entry of `benchmarks/mistakes/AREA.toml`."""

    area: str
    name: str
    file: str
    find: str
    replace: str
    tests: tuple[str, ...]
    quick: bool = False

    def planted(self, text: str) -> str:
        """The text of `file` with the mistake in it.

        Raises:
          MistakeError: `find` does not occur exactly once, or the result is not valid, different Python.
        """
        count = text.count(self.find)
        if count != 1:
            raise MistakeError(f"{self.area}: {self.name!r}: its text occurs {count} times in {self.file}, not once")
        changed = text.replace(self.find, self.replace)
        try:
            same = ast.dump(ast.parse(changed)) == _syntax(text)
        except SyntaxError as error:
            raise MistakeError(f"{self.area}: {self.name!r} is not valid Python: {error}") from error
        if same:
            raise MistakeError(f"{self.area}: {self.name!r} changes nothing")
        return changed


@dataclass(frozen=True)
class Outcome:
    """The fate of a mistake: killed or survived; `detail` is the first test that failed."""

    mistake: Mistake
    killed: bool
    detail: str
    seconds: float


def read_mistakes(root: Path) -> list[Mistake]:
    """All mistakes, by area.

    Raises:
      MistakeError: an entry lacks a field or has an unknown one, or two have the same name.
    """
    mistakes = []
    for path in sorted((root / LIST).glob("*.toml")):
        for entry in tomllib.loads(path.read_text(encoding="utf-8"))["mistake"]:
            try:
                mistakes.append(Mistake(**{**entry, "area": path.stem, "tests": tuple(entry["tests"])}))
            except (TypeError, KeyError) as error:
                raise MistakeError(f"{path.name}: {entry.get('name', 'an entry')!r}: {error}") from error
    for name, count in Counter(mistake.name for mistake in mistakes).items():
        if count > 1:
            raise MistakeError(f"{name!r} names {count} mistakes; give each its own name")
    return mistakes


def check(mistakes: Sequence[Mistake], root: Path) -> None:
    """Check that each mistake can be planted and that its test functions exist; takes less than a second.

    Raises:
      MistakeError: the message has one line per problem.
    """
    wrong = []
    for mistake in mistakes:
        try:
            if not (root / mistake.file).is_file():
                raise MistakeError(f"{mistake.area}: {mistake.name!r}: {mistake.file} does not exist")
            mistake.planted((root / mistake.file).read_text(encoding="utf-8"))
            if not mistake.tests:
                raise MistakeError(f"{mistake.area}: {mistake.name!r} names no test")
            for test in mistake.tests:
                path, _, function = test.partition("::")
                text = (root / path).read_text(encoding="utf-8") if (root / path).is_file() else ""
                if not text or (function and not re.search(rf"def {re.escape(function.partition('[')[0])}\(", text)):
                    raise MistakeError(f"{mistake.area}: {mistake.name!r}: there is no test {test}")
        except MistakeError as error:
            wrong.append(str(error))
    if wrong:
        raise MistakeError("\n".join(wrong))


@contextmanager
def scratch(root: Path) -> Iterator[Path]:
    """A copy of the project to plant mistakes in."""
    with tempfile.TemporaryDirectory(prefix="mistakes-") as folder:
        copy = Path(shutil.copytree(root, Path(folder) / "copy", ignore=LEFT_OUT))
        if (copy / "configs").is_dir() and not (copy / "rac3" / "configs").exists():
            (copy / "rac3" / "configs").symlink_to("../configs")  # as setup.cfg maps it
        yield copy


def run_tests(
    copy: Path, tests: Sequence[str], patience: float | None = None, workers: int = 1
) -> tuple[int | None, str]:
    """Run pytest in a copy up to the first failure; returns its exit code (None: out of patience) and output.

    The process is forked from one that has imported the libraries, since importing takes as long as many of the tests.
    """
    options = ["-q", "-x", "-o", "addopts=", "-p", "no:cacheprovider", "--tb=line", "-rfE"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # about plugins that are imported already
    options += ["-n", str(workers), "--dist", "loadfile"] if workers > 1 else []
    context: Any = multiprocessing.get_context(START_METHOD)
    context.set_forkserver_preload(["pytest", *LIBRARIES])
    with tempfile.NamedTemporaryFile("r", encoding="utf-8", errors="replace") as output:
        process = context.Process(target=_pytest_in, args=(copy, output.name, [*options, *tests]))
        process.start()
        process.join(patience)
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            return None, ""
        return process.exitcode, output.read()


def _pytest_in(copy: Path, output: str, arguments: list[str]) -> None:
    """Run pytest in a copy, its output to a file. Called in a forked process."""
    os.setsid()  # so that it can be killed together with the processes that tests start
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    os.environ |= {"PYTHONPATH": str(copy), "PY_COLORS": "0"}
    os.environ.pop("PYTEST_ADDOPTS", None)
    with open(output, "w", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    import pytest

    sys.exit(int(pytest.main(arguments)))


def check_tests(copy: Path, mistakes: Sequence[Mistake], workers: int) -> float:
    """Run the tests of all mistakes without any mistake; returns the seconds it took.

    Raises:
      MistakeError: a test fails or is skipped, so it cannot judge a mistake.
    """
    started = time.monotonic()
    tests = sorted({test for mistake in mistakes for test in mistake.tests})
    code, output = run_tests(copy, tests, workers=workers)
    last = (output.splitlines() or ["no output"])[-1]
    if code != PASSED:
        raise MistakeError(f"the tests fail without any mistake:\n{output}")
    if "skipped" in last:
        raise MistakeError(f"tests are skipped ({last}); install what they need: pip install -e '.[dev,parity]'")
    return time.monotonic() - started


def plant(mistake: Mistake, copy: Path, patience: float) -> Outcome:
    """Plant a mistake in a copy, run its tests, and remove the mistake.

    Raises:
      MistakeError: the tests could not be collected or run.
    """
    path = copy / mistake.file
    text, started = path.read_text(encoding="utf-8"), time.monotonic()
    write_newer(path, mistake.planted(text))
    try:
        code, output = run_tests(copy, mistake.tests, patience)
    finally:
        write_newer(path, text)
    failed = re.search(r"^(?:FAILED|ERROR) \S+?::(\S+)", output, re.M)
    if code not in (PASSED, FAILED, None) or (code == FAILED and not failed):
        raise MistakeError(f"{mistake.area}: {mistake.name!r}: pytest ended with code {code}:\n{output}")
    detail = "takes too long" if code is None else failed[1] if failed else ""
    return Outcome(mistake, code != PASSED, detail, time.monotonic() - started)


def write_newer(path: Path, text: str) -> None:
    """Write a file, with a time one second later: Python reuses compiled code if time and size are unchanged."""
    after = int(path.stat().st_mtime) + 1
    path.write_text(text, encoding="utf-8")
    os.utime(path, (after, after))


def plant_all(mistakes: Sequence[Mistake], root: Path, workers: int) -> list[Outcome]:
    """Plant all mistakes; returns the outcomes as they finish, and prints a line for each.

    Raises:
      MistakeError: a mistake or its tests cannot be run.
    """
    outcomes: list[Outcome] = []
    with ExitStack() as stack:
        shared = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mistakes-shared-")))
        # The copies share compiled programs, and one finished run that the tests read.
        os.environ.setdefault("RAC3_TEST_WORKDIR", str(shared / "tiny"))
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(root / ".jax_cache"))
        # JAX reads these on import, before tests/conftest.py sets them
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
        made = [stack.enter_context(scratch(root)) for _ in range(workers)]
        for copy in made:
            copies.put(copy)

        def one(mistake: Mistake) -> Outcome:
            copy = copies.get()
            try:
                return plant(mistake, copy, patience)
            finally:
                copies.put(copy)

        print(f"{len(mistakes)} mistakes; running their tests without any first", flush=True)
        spent = check_tests(made[0], mistakes, workers)
        patience = max(LEAST_PATIENCE, 10 * spent)
        print(f"they pass ({spent:.0f} s)", flush=True)
        started = time.monotonic()
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        stack.callback(pool.shutdown, cancel_futures=True)  # after an error; before the copies are removed
        for number, future in enumerate(as_completed([pool.submit(one, each) for each in mistakes]), 1):
            outcome = future.result()
            outcomes.append(outcome)
            left = (time.monotonic() - started) / number * (len(mistakes) - number)
            word = "killed  " if outcome.killed else "SURVIVED"
            name = f"{outcome.mistake.area}: {outcome.mistake.name}"
            print(f"{number:4d}/{len(mistakes)} {word} {name} [{outcome.detail}] {left:.0f} s left", flush=True)
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """A table of mistakes planted, killed and survived, by area and in total."""
    areas = sorted({outcome.mistake.area for outcome in outcomes})
    lines = [f"{'area':<12} {'planted':>8} {'killed':>8} {'survived':>8}"]
    for area in [*areas, "all"]:
        killed = [outcome.killed for outcome in outcomes if area in (outcome.mistake.area, "all")]
        lines.append(f"{area:<12} {len(killed):>8} {sum(killed):>8} {len(killed) - sum(killed):>8}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only those marked `quick`")
    parser.add_argument("--only", default="", help="an area, or a word of the names")
    parser.add_argument("--check", action="store_true", help="only check that each can be planted")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes at a time")
    parser.add_argument("--out", type=Path, help="write the outcomes to this JSON file")
    options = parser.parse_args(arguments)
    try:
        mistakes = read_mistakes(root)
        chosen = [
            mistake
            for mistake in mistakes
            if (mistake.quick or not options.quick)
            and (mistake.area == options.only or options.only.lower() in mistake.name.lower())
        ]
        if not chosen:
            raise MistakeError(f"none of {len(mistakes)} mistakes is selected; give --only an area or a word of a name")
        check(chosen, root)
        if options.check:
            print(f"{len(chosen)} mistakes can be planted")
            return 0
        outcomes = plant_all(chosen, root, max(1, options.workers))
    except MistakeError as error:
        print(f"mutants: {error}", file=sys.stderr)
        return 2
    survivors = [f"{each.mistake.area}: {each.mistake.name}" for each in outcomes if not each.killed]
    print(table(outcomes))
    print("\n".join(f"SURVIVED {name}" for name in survivors) or "none survived")
    if options.out:
        results = [
            {
                "area": each.mistake.area,
                "name": each.mistake.name,
                "killed": each.killed,
                "by": each.detail,
                "seconds": round(each.seconds, 1),
            }
            for each in sorted(outcomes, key=lambda each: (each.mistake.area, each.mistake.name))
        ]
        options.out.write_text(
            record("python benchmarks/mutants.py", ("jax", "flax", "pytest"), results), encoding="utf-8"
        )
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
