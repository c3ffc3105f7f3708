#!/usr/bin/env python3
"""How much faster two processes on two cores train than one on one: slimIPL with its cache.

    tools/bench/ranks.py [--recipe egs/mini_alnum/pl1] [--json FILE]

The model and the slimIPL of a recipe, through ESPnet's trainer, on noise of one to two seconds that
is made for it.  Two processes share the batches of an update: as much speech as the recipe says,
and --batches times as much, for what an update costs whatever it hears is not shared.  They also
compare with one process that hears half as much in an update, as each of the two does.  Both are
ratios of the speech heard in a second, 2 at best.

They take turns, --repeat times.  Time is that of the wall, of the median of a training's epochs
once its cache is full: no start, no validation.  Other work on the machine makes it worthless: the
load before the first run is printed, too.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import soundfile
import torch
import yaml
from common import ROOT, machine, parser

RATE = 8000
FILLING = 2  # epochs in which the cache is not full


def corpus(folder: Path, utterances: int) -> None:
    """Noise, with letters for words."""
    generator = np.random.default_rng(0)
    for name in ("labelled", "unlabelled", "dev"):
        own = folder / name
        own.mkdir()
        lines: dict[str, list[str]] = {"wav.scp": [], "text": [], "speech_shape": []}
        for i in range(2 if name == "dev" else utterances):
            samples = int(generator.integers(RATE, 2 * RATE))
            path = own / f"{i:04d}.wav"
            soundfile.write(path, 0.1 * generator.standard_normal(samples), RATE)
            lines["wav.scp"].append(f"{name}{i:04d} {path}")
            lines["text"].append(f"{name}{i:04d} {' '.join(generator.choice(list('ABC'), 5))}")
            lines["speech_shape"].append(f"{name}{i:04d} {samples}")
        for file, content in lines.items():
            (own / file).write_text("\n".join(content) + "\n")
    (folder / "tokens.txt").write_text("<blank>\n<unk>\nA\nB\nC\n<sos/eos>\n")


def command(
    recipe: Path, folder: Path, out: Path, processes: int, batches: int, changes: dict
) -> list[str]:
    """A training in so many processes, which have so many of the recipe's batches in an update."""
    path = folder / f"{batches}.yaml"
    path.write_text(yaml.safe_dump(changes | {"batch_bins": changes["batch_bins"] * batches}))
    argv = [sys.executable, "-m", "espnet_pl.bridge.train", "--output_dir", str(out)]
    files = [recipe / "conf/asr.yaml", recipe / "conf/slimipl.yaml", path]
    argv += [word for file in files for word in ("--config", str(file))]
    argv += ["--token_type", "word", "--token_list", str(folder / "tokens.txt"), "--ngpu", "0"]
    for flag, name in (("train", "labelled"), ("valid", "dev"), ("unlabelled", "unlabelled")):
        own = folder / name
        argv += [f"--{flag}_data_path_and_name_and_type", f"{own}/wav.scp,speech,sound"]
        argv += [f"--{flag}_shape_file", f"{own}/speech_shape"]
        if flag != "unlabelled":
            argv += [f"--{flag}_data_path_and_name_and_type", f"{own}/text,text,text"]
    return [*argv, "--num_processes", str(processes)] if processes > 1 else argv


def seconds(argv: list[str], out: Path, cores: list[int]) -> float:
    """The time of an update."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        argv, env=env, capture_output=True, text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"the training failed:\n{done.stderr[-2000:]}")
    reporter = torch.load(out / "checkpoint.pth", weights_only=False)["reporter"]["stats"]
    return median(reporter[epoch]["train"]["train_time"] for epoch in sorted(reporter)[FILLING:])


def main() -> None:
    """Measure, print, and write what was measured."""
    options = parser(__doc__, 3, "trainings of each kind")
    options.add_argument("--recipe", type=Path, default=ROOT / "egs/mini_alnum/pl1")
    options.add_argument("--batches", type=int, nargs="+", default=[1, 2, 16], help="of an update")
    options.add_argument("--small", action="store_true", help="to see that it runs")
    args = options.parse_args()
    own = yaml.safe_load((args.recipe / "conf/asr.yaml").read_text(encoding="utf-8"))
    changes = {"max_epoch": FILLING + 3, "num_iters_per_epoch": 12, "batch_bins": own["batch_bins"]}
    if args.small:
        changes = {"max_epoch": FILLING + 1, "num_iters_per_epoch": 3, "batch_bins": 30000}
        args.batches = [1, 2]
    cores = sorted(os.sched_getaffinity(0))[:2]
    load = os.getloadavg()[0]
    times: dict[tuple[int, int], list[float]] = {
        (processes, batches): [] for batches in args.batches for processes in (1, 2)
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        corpus(root, 16 if args.small else 400)
        for turn in range(1 if args.small else args.repeat):
            for (processes, batches), own in times.items():
                out = root / f"exp{processes}.{batches}.{turn}"
                argv = command(args.recipe, root, out, processes, batches, changes)
                own.append(seconds(argv, out, cores[:processes]))
    print(f"load before: {load:.1f}; cores: {len(cores)}\n")
    print("| batches an update | 1 process, updates/s | 2 | to 1 | to 1 with half as much |")
    print("|-|-:|-:|-:|-:|")
    rows = []
    for size in args.batches:
        one, two = (median(times[processes, size]) for processes in (1, 2))
        half = median(times[1, size // 2]) if size / 2 in args.batches else None
        rows.append({"batches": size, "1": times[1, size], "2": times[2, size], "to 1": one / two})
        rows[-1]["to half"] = half and 2 * half / two
        beside = f"{2 * half / two:.2f}" if half else "–"
        print(f"| {size} | {1 / one:.2f} | {1 / two:.2f} | {one / two:.2f} | {beside} |")
    if args.json:
        found = {"machine": machine(), "load": load, "rows": rows}
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
