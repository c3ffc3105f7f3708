#!/usr/bin/env python3
"""What label-aware batches cost: memory and time of the index, time and coverage of a pass.

    tools/bench/batching.py [--utterances 1000000] [--json FILE]

Made-up utterances, each with so many labels, drawn by Zipf's law; all is of one process.  Peak is
the growth of the resident set while the index is made, of which the ids are a part.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from common import machine, reset_peak, status

from espnet_pl.data.label_aware import Batching, LabelAwareBatches


def speech(utterances: int, labels: int, drawn: int):
    """Utterance ids, each with tokens: frequent ones and rare ones."""
    generator = np.random.default_rng(0)
    below = np.cumsum(1 / np.arange(1, labels + 1))
    for number in range(utterances):
        yield (
            f"utt{number:07d}",
            np.searchsorted(below, generator.random(drawn) * below[-1]).tolist(),
        )


def main() -> None:
    """Measure, print, and write what was measured."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    options.add_argument("--utterances", type=int, default=10_000)
    options.add_argument("--labels", type=int, default=10_000, help="that there are")
    options.add_argument(
        "--drawn", type=int, default=60, help="for an utterance, some of them twice"
    )
    options.add_argument("--seconds", type=float, default=1600, help="of speech in a batch")
    options.add_argument("--json", type=Path, metavar="FILE")
    args = options.parse_args()
    lengths = np.random.default_rng(1).integers(2, 17, args.utterances).tolist()  # seconds
    sizes = {f"utt{number:07d}": length for number, length in enumerate(lengths)}
    batches = int(sum(lengths) // args.seconds) or 1
    tokens = speech(args.utterances, args.labels, args.drawn)
    began = time.process_time()
    for _ in speech(args.utterances, args.labels, args.drawn):
        pass
    nothing, before, began = time.process_time() - began, reset_peak(), time.process_time()
    made = LabelAwareBatches(Batching(), tokens, sizes, int(args.seconds), batches)
    index = time.process_time() - began - nothing
    peak, began = status("VmHWM") - before, time.process_time()
    of_pass = made.of_pass(0)
    seconds = time.process_time() - began
    padded = sum(
        max(made.sizes[u] for pair in batch for u in pair[1:]) * 2 * len(batch) for batch in of_pass
    )
    heard = sum(int(made.sizes[u]) for batch in of_pass for pair in batch for u in pair[1:])
    result = {
        "machine": machine(),
        "labels": len(made.index.counts),
        "labels of utterances": len(made.index.utterances),
        "index MB": made.index.nbytes / 1e6,
        "index peak MB": peak,
        "index seconds": index,
        "batches of a pass": batches,
        "pass seconds": seconds,
        "utterances seen": made.seen(0),
        "speech of padded": heard / int(padded),
    }
    for name, value in result.items():
        print(f"{name}: {value:.3f}" if isinstance(value, float) else f"{name}: {value}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
