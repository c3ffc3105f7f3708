"""What the benchmarks have in common: memory, fresh processes, times, and where figures are from.

Only torch is needed, so that a script which uses this also runs in the Python of its peers.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def parser(text: str, repeat: int, of: str) -> argparse.ArgumentParser:
    """What every benchmark can be asked: to repeat, and to write what it measured."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawTextHelpFormatter)
    made.add_argument("--repeat", type=int, default=repeat, help=of)
    made.add_argument("--json", type=Path, metavar="FILE")
    return made


def reset_peak() -> float:
    """The resident set in MB; from now on its peak is counted anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(key: str) -> float:
    """A line of this process's status, in MB: memory now (VmRSS) or at most (VmHWM)."""
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def fresh(python: str | None, *command: str) -> dict:
    """What a script prints as its last line, in a process of its own, or why it does not."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [python or sys.executable, *command], env=env, capture_output=True, text=True
    )
    if done.returncode:
        return {"why": (done.stderr.strip().splitlines() or ["it died"])[-1][:100]}
    return json.loads(done.stdout.splitlines()[-1])


def timed(repeat: int, function: Callable, *x: Any, most: float = 5.0) -> tuple[float, Any]:
    """The least processor time of several calls, and a result; no more calls after ``most`` s."""
    times: list[float] = []
    while len(times) < repeat and sum(times) < most:
        began = time.process_time()
        result = function(*x)
        times.append(time.process_time() - began)
    return min(times), result


def machine() -> dict:
    """Where the figures are from."""
    model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": model[1] if model else "unknown",
        "bf16": "avx512_bf16" in Path("/proc/cpuinfo").read_text(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
