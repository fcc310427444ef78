"""Every contestant trains at the size that CPUs can do, but those that need a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT

pytest.importorskip("torch")


@pytest.mark.slow
def test_every_contestant_has_a_rate(tmp_path: Path):
    out = tmp_path / "out.json"
    sizes = ["--size", "tiny", "--groups", "4", "--steps", "2", "--minutes", "60"]
    script = [sys.executable, "benchmarks/train_gpu.py", *sizes, "--json", str(out)]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text(encoding="utf-8"))["results"]
    assert {(row["who"], row["rows"], row["remat"], row["attention"]) for row in results} == {
        *(("rac3", "packed", remat, "auto") for remat in ("dots", "none", "attention", "full")),
        *(("rac3", "packed", "dots", attention) for attention in ("blockwise", "cudnn")),
        ("rac3", "one group a row", "dots", "auto"),
        ("torch", "one group a row", "none", "sdpa"),
    }
    (refused,) = (row for row in results if row["attention"] == "cudnn")
    assert "model.attention=cudnn cannot be used" in refused["error"]
    for row in results:
        if row is refused:
            continue
        assert "error" not in row, row
        assert row["tokens_per_second"] > 0
        assert row["real_tokens"] == results[0]["real_tokens"] > 0
        assert row["loss"] == pytest.approx(results[0]["loss"], abs=1e-2)
