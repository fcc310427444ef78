"""The command and its parts are timed on a finished run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT


@pytest.mark.slow
def test_the_command_is_timed_with_and_without_programs(workdir: Path, tmp_path: Path):
    """The first command has to compile; a part is not longer than the whole."""
    out = tmp_path / "out.json"
    options = ["--prompt", "a fox", "--samples", "1", "2", "--rounds", "1", "--json", str(out)]
    script = [sys.executable, "benchmarks/generate.py", str(workdir), *options]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text(encoding="utf-8"))["results"]
    assert [(row["samples"], row["compiled"]) for row in results["command"]] == [(1, False), (1, True), (2, True)]
    assert min(row["seconds"] for row in results["command"]) > 0
    parts = results["parts"]
    named = {name: parts[name] for name in ("retrieve", "draw", "decode", "rank")}
    assert min(named.values()) > 0
    assert sum(named.values()) <= parts["seconds"]
