"""Decoding is measured at a size that takes moments."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT

pytest.importorskip("torch")


@pytest.mark.slow
def test_ours_is_measured_next_to_both_of_theirs(tmp_path: Path):
    """Over the same weights: the script itself ends with an error if the first ids differ."""
    out = tmp_path / "out.json"
    sizes = ["--layers", "1", "--width", "64", "--prompt", "32", "--new", "8", "--batches", "1", "--only", "step"]
    script = [sys.executable, "benchmarks/decode.py", *sizes, "--rounds", "2", "--json", str(out)]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text(encoding="utf-8"))["results"]
    (row,) = results.pop("step")
    assert not results
    assert row["case"] == "batch 1"
    assert row["seconds"].keys() == {"ours", "dynamic", "static", "ours, prefill", "dynamic, prefill"}
    assert min(row["seconds"].values()) > 0
    assert row["over_ours"].keys() == row["same_ids"].keys() == {"dynamic", "static"}
    assert min(row["over_ours"][name]["min"] for name in row["over_ours"]) > 0
