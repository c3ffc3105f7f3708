"""tools/bench: the benchmarks run, and what they compare agrees."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
def test_contrastive(tmp_path):
    result = tmp_path / "result.json"
    command = [sys.executable, "tools/bench/contrastive.py", "--small", "--json", result]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = json.loads(result.read_text())["frames"]["256"]
    assert {"ours", "dense torch"} <= rows.keys()
    assert ("pytorch-metric-learning" in rows) != ("is not installed" in run.stdout)
    for name, row in rows.items():
        assert row["seconds"] > 0 and f"| {name} |" in run.stdout
        assert abs(row["loss"] - rows["ours"]["loss"]) < 1e-4 and row["difference"] < 1e-4
