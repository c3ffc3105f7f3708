#!/usr/bin/env python3
"""A lattice whose logits would have more than 2³¹ elements: right, and within memory.

    tools/bench/fullsum_huge.py [--shape 32,400,80,5000] [--json FILE]

The whole batch at once, and each utterance alone: log P and gradients are compared, and the growth
of the peak resident set is shown beside what the logits would take.  Minutes on one thread.
"""

import argparse
import json
import math
import time

import torch
from common import machine, reset_peak, status
from fullsum import JOINT, NAMES, ours, random_inputs


def main() -> None:
    """One shape."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", default="32,400,80,5000")
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    n, t, u, v = map(int, args.shape.split(","))
    x = random_inputs(n, t, u, v)
    tensors = [x[name].requires_grad_() for name in NAMES]
    before, began = reset_peak(), time.process_time()
    log_p = ours(x)
    together = torch.autograd.grad(-log_p.sum(), tensors)
    cpu_s, peak = time.process_time() - began, status("VmHWM") - before
    rows = ("encoded", "predicted", "labels", "frames", "lengths")
    alone, sums = [], [torch.zeros_like(g, dtype=torch.float64) for g in together]
    for i in range(n):
        one = ours({**x, **{name: x[name][i : i + 1] for name in rows}})
        alone.append(one.detach())
        for total, gradient in zip(sums, torch.autograd.grad(-one.sum(), tensors)):
            total += gradient
    gap = max(((a - b).norm() / b.norm()).item() for a, b in zip(together, sums))
    result = {
        "shape": [n, t, u, v],
        "joint": JOINT,
        "logits": n * t * (u + 1) * v,
        "logits_over_2^31": n * t * (u + 1) * v / 2**31,
        "cpu_s": cpu_s,
        "peak_mb": peak,
        "logits_mb": n * t * (u + 1) * v * 4 / 2**20,
        "log_p_differs_by": (log_p - torch.cat(alone)).abs().max().item(),
        "gradient_differs_by": gap,
        "machine": machine(),
    }
    assert math.isfinite(gap)
    print(json.dumps(result, indent=1))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
