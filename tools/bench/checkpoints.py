#!/usr/bin/env python3
"""What checkpoints cost a training, and how soon one goes on.

    tools/bench/checkpoints.py exp/slimipl [--json FILE]

run in a recipe's folder, of a training that was done there: its command is in ``train.job.json``.
The same training, of so few updates, saves after each of them; then it is started again, for one
more epoch.  Printed are the medians of an update and of a save, the share of training time that
saves take at the default interval, and how long after the start of its process the second training
was where the first had been, and had made an update.  Time is that of the wall.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from statistics import median

from common import ROOT, machine, parser

INTERVAL = 600.0  # seconds, the default of save_interval


def run(words: list[str], epochs: int, updates: int) -> tuple[str, float]:
    """The log of a training, and when its process was started."""
    argv = [sys.executable, "-m", "espnet_pl.bridge.train", *words, "--resume", "true"]
    argv += ["--max_epoch", str(epochs), "--num_iters_per_epoch", str(updates)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    began = time.time()
    done = subprocess.run(
        [*argv, "--log_interval", "1", "--save_interval", "1"],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"the training failed:\n{done.stdout[-2000:]}")
    return done.stdout, began


def at(text: str, what: str) -> float:
    """When a line was logged, in seconds of the epoch."""
    found = re.search(rf"\[\w[^\]]*\] (\S+ \S+),(\d+) .*{what}", text)
    return datetime.fromisoformat(found[1]).timestamp() + int(found[2]) / 1000


def measure(exp: Path, updates: int) -> dict[str, float]:
    """All figures, in seconds and per cent."""
    words = shlex.split(json.loads((exp / "train.job.json").read_text())["shell"])
    words = words[words.index("espnet_pl.bridge.train") + 1 :]
    with tempfile.TemporaryDirectory() as folder:
        words += ["--output_dir", folder]
        first, _ = run(words, 1, updates)
        size = (Path(folder) / "checkpoint.pth").stat().st_size
        second, began = run(words, 2, updates)
    saves = [float(s) for s in re.findall(r"saved update \d+ of epoch \d+ in ([\d.]+) s", first)]
    steps = [float(s) for s in re.findall(r"train_time=([\d.e+-]+)", first)]
    return {
        "MB of a checkpoint": size / 1e6,
        "s of a save": median(saves),
        "s of an update, with its save": median(steps),
        "% of the time at the default interval": 100 * median(saves) / INTERVAL,
        "s to go on": at(second, "going on from") - began,
        "s to the first update": at(second, "2epoch:train:1-1batch") - began,
    }


def main() -> None:
    """Measure, print, write."""
    made = parser(__doc__, 30, "updates of an epoch")
    made.add_argument("exp", type=Path)
    options = made.parse_args()
    found = measure(options.exp, options.repeat)
    for name, value in found.items():
        print(f"{name}: {value:.3g}")
    if options.json:
        options.json.write_text(json.dumps({**found, "machine": machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
