"""tools/bench/checkpoints.py runs, and what it measures can be."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_checkpoints(exp, tmp_path):
    result = tmp_path / "result.json"
    argv = [sys.executable, "tools/bench/checkpoints.py", str(exp), "--repeat", "3"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*argv, "--json", str(result)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(result.read_text())
    assert 0 < found["s of a save"] < found["s to go on"] < found["s to the first update"]
    assert found["MB of a checkpoint"] > 0
    assert all(f"{name}: " in done.stdout for name in found if name != "machine")
