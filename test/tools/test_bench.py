"""tools/bench: the benchmarks run, and what they compare agrees."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
reads_memory = pytest.mark.skipif(
    not Path("/proc/self/status").is_file(), reason="memory is read from /proc"
)


@pytest.fixture
def bench(tmp_path):
    """Run a benchmark in small; what it prints, and what it writes."""

    def run(name):
        result = tmp_path / "result.json"
        command = [sys.executable, f"tools/bench/{name}.py", "--small", "--json", result]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout, json.loads(result.read_text())

    return run


@reads_memory
def test_contrastive(bench):
    printed, result = bench("contrastive")
    rows = result["frames"]["256"]
    assert {"ours", "dense torch"} <= rows.keys()
    assert ("pytorch-metric-learning" in rows) != ("is not installed" in printed)
    for name, row in rows.items():
        assert row["seconds"] > 0 and f"| {name} |" in printed
        assert abs(row["loss"] - rows["ours"]["loss"]) < 1e-4 and row["difference"] < 1e-4


@reads_memory
def test_ctc(bench):
    printed, result = bench("ctc")
    sums, soft = result["cases"].values()
    assert len(sums) == 3 and len(soft) == 4
    for name, row in (sums | soft).items():
        assert row["seconds"] > 0 and f"| {name} |" in printed
        assert row["value_error"] < 1e-5 and row["gradient_error"] < 1e-4
    assert len({round(row["mean"], 3) for row in sums.values()}) == 1
    # Of some classes in one the divergence cannot be greater.
    assert all(row["mean"] < soft["torch, dense"]["mean"] + 1e-4 for row in soft.values())
