"""A file of prompts is killed and resumed, and its files are compared with those of a run that was not killed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT


@pytest.mark.slow
def test_a_killed_file_of_prompts_ends_with_the_same_files(workdir: Path, tmp_path: Path):
    out = tmp_path / "out.json"
    script = [sys.executable, "benchmarks/bulk.py", str(workdir), "--prompts", "80", "--json", str(out)]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text(encoding="utf-8"))["results"]
    assert len(results["kills"]) == 3
    assert all(0 < kill < 80 for kill in results["kills"])
    assert results["files"] == 1 + 2 * 16  # of five tasks, two draw
    assert results["same_pictures_and_texts"]
    assert results["largest_difference"] <= 1e-5
