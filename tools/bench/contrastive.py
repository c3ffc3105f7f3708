#!/usr/bin/env python3
"""Time and memory of the supervised contrastive loss, beside other implementations of it.

    tools/bench/contrastive.py [--frames N ...] [--small] [--json FILE]

Each implementation computes the mean loss of N frames and its gradient, on one thread: in turn in
one process, the minimum of several times (processor time).  Memory is what the resident set grows
by at its peak, in a process of its own (Linux).  ``pytorch-metric-learning`` takes part where it
is installed.  No number of any implementation is kept here: all are measured when this runs.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import status

from espnet_pl.losses.contrastive import Frames, contrastive

DIMENSIONS, CLASSES, UTTERANCES, TEMPERATURE = 256, 200, 64, 0.1
PEER = "pytorch-metric-learning"


def ours(
    z: torch.Tensor, labels: torch.Tensor, denominator: str = "all", utterances: int = 0
) -> torch.Tensor:
    """The mean over frames that have a positive; of so many utterances, or of one."""
    own = torch.arange(len(z)) % utterances if utterances else None
    loss, positives, _ = contrastive(
        Frames(z, labels, own), temperature=TEMPERATURE, denominator=denominator
    )
    return loss.sum() / (positives > 0).sum()


def dense(z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What one would write first: all pairs at once."""
    z = torch.nn.functional.normalize(z)
    itself = torch.eye(len(z), dtype=torch.bool)
    similarity = (z @ z.t() / TEMPERATURE).masked_fill(itself, -torch.inf)
    log_p = similarity - similarity.logsumexp(1, keepdim=True)
    positive = (labels[:, None] == labels) & ~itself
    count = positive.sum(1)
    loss = -log_p.masked_fill(~positive, 0.0).sum(1) / count.clamp(min=1)
    return loss.sum() / (count > 0).sum()


def metric_learning(z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """SupConLoss of pytorch-metric-learning, which normalises and takes the mean too."""
    from pytorch_metric_learning.losses import SupConLoss

    return SupConLoss(temperature=TEMPERATURE)(z, labels)


def implementations() -> dict:
    """Those that can run here, ours first, and at the end our other losses."""
    found = {"ours": ours, "dense torch": dense}
    if importlib.util.find_spec("pytorch_metric_learning"):
        found[PEER] = metric_learning
    found["ours, negatives of the same utterance"] = functools.partial(ours, utterances=UTTERANCES)
    found["ours, a positive against negatives"] = functools.partial(ours, denominator="one")
    both = functools.partial(ours, denominator="one", utterances=UTTERANCES)
    return found | {"ours, both": both}


def example(frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random features and labels; the same for every implementation."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(frames, DIMENSIONS, generator=g).requires_grad_()
    return z, torch.randint(0, CLASSES, (frames,), generator=g)


def step(function, frames: int) -> dict:
    """One loss and its gradient, and the processor time they took."""
    z, labels = example(frames)
    start = time.process_time()
    loss = function(z, labels)
    loss.backward()
    return {"seconds": time.process_time() - start, "loss": loss.item(), "gradient": z.grad}


def growth(name: str, frames: int) -> float:
    """MB by which one step makes the resident set grow, in a fresh process."""
    command = [sys.executable, __file__, "--frames", str(frames), "--memory", name]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(run.stdout)


def measure(frames: int, repeats: int) -> dict:
    """Seconds, MB, loss, and how far the gradient is from that of ours, of each implementation."""
    functions = implementations()
    steps = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            steps[name].append(step(function, frames))
    reference = steps["ours"][0]["gradient"]
    return {
        name: {
            "seconds": min(s["seconds"] for s in done),
            "megabytes": growth(name, frames),
            "loss": done[0]["loss"],
            "difference": _difference(done[0]["gradient"], reference) if "," not in name else None,
        }
        for name, done in steps.items()
    }


def _difference(gradient: torch.Tensor, reference: torch.Tensor) -> float:
    return float((gradient - reference).norm() / reference.norm())


def table(frames: int, rows: dict) -> str:
    """Ratios are to ours."""
    lines = [
        f"{frames} frames, {DIMENSIONS} dimensions, {CLASSES} classes, temperature {TEMPERATURE}",
        "| | seconds | ratio | MB | ratio | loss | gradient differs by |",
        "|-|-:|-:|-:|-:|-:|-:|",
    ]
    mine = rows["ours"]
    for name, row in rows.items():
        time_ratio = row["seconds"] / mine["seconds"]
        memory_ratio = row["megabytes"] / max(mine["megabytes"], 1e-3)
        lines.append(
            f"| {name} | {row['seconds']:.3f} | {time_ratio:.1f} | {row['megabytes']:.0f} "
            f"| {memory_ratio:.1f} | {row['loss']:.6f} | {_short(row['difference'])} |"
        )
    if PEER not in rows:
        lines.append(f"{PEER} is not installed: not measured")
    return "\n".join(lines)


def _short(difference: float | None) -> str:
    return "another loss" if difference is None else f"{difference:.1e}"


def main() -> None:
    """Measure, print, and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, nargs="+", default=[4096, 12800])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="256 frames, to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--memory", help=argparse.SUPPRESS)  # what the fresh process is asked
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory:
        function = implementations()[args.memory]
        step(function, 64)  # so that libraries are loaded before
        before = status("VmRSS")
        step(function, args.frames[0])
        print(status("VmHWM") - before)
        return

    frames = [256] if args.small else args.frames
    result = {n: measure(n, args.repeats) for n in frames}
    print("\n\n".join(table(n, rows) for n, rows in result.items()))
    if args.json:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        if PEER in implementations():
            versions[PEER] = importlib.metadata.version(PEER)
        record = {"versions": versions, "machine": platform.machine(), "frames": result}
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
