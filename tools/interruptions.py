#!/usr/bin/env python3
"""What is left of a training that is killed, told to stop, or runs out of disk?

    tools/interruptions.py kill exp/slimipl --times 50 --work /tmp/kills

run in a recipe's folder, of a training that was done there: its command is in ``train.job.json``.
The same training, shorter (``--options``), is made once undisturbed; then again and again, and

    kill    ended by SIGKILL at a random moment
    stop    told to stop by SIGTERM, SIGUSR1 or SIGUSR2 at a random moment
    full    on a disk with so little room left that a checkpoint does not fit (needs root: tmpfs)
    damage  ended by SIGKILL, and its checkpoint cut short or a bit of it flipped

and gone on with, until it was disturbed so often.  Counted are the checkpoints that were lost, the
updates that were made again, and the finished trainings that are not bit by bit the undisturbed
one: in weights, method (teacher, cache), optimiser, schedule, models of epochs, and what is logged
of every update.  A training whose only checkpoint was damaged must be refused.  ``--record`` writes
the counts to a file.
"""

import argparse
import itertools
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch

from espnet_pl.bridge import checkpoints, train
from espnet_pl.parts.signals import AGAIN, SIGNALS
from espnet_pl.recipe.markers import environment

UPDATE = re.compile(r"(\d+)epoch:train:(\d+)-\d+batch: (.*)")
EPOCH = re.compile(r"(\d+)epoch results: (.*)")
TIMES = re.compile(r"(\w+_time|time)=[^,\]]*(, [^,=\]]*(?=, |$))*|, total_count=\d+")
GOING_ON = re.compile(r"going on from .*: update (\d+) of epoch (\d+) is done")
MODES = ("kill", "stop", "full", "damage")
DISK = "disk"  # the folder of the one that is filled
SHORT = "--max_epoch 2 --num_iters_per_epoch 12 --save_interval 2"


class Run:
    """One start of the training, in a process of its own that has all modules already.

    Args:
        argv: of ``espnet_pl.bridge.train``.
        folder: that it trains in.
    """

    def __init__(self, argv: list[str], folder: Path) -> None:
        self.log = log_of(folder)
        self.log.touch()
        self.begin = self.log.stat().st_size
        words = [*argv, "--output_dir", str(folder), "--resume", "true", "--log_interval", "1"]
        self.process = os.fork()
        if self.process:
            return
        os.setsid()
        sink = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        code = 1
        try:
            train.main(words)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException as error:  # the parent reads it in the log
            print(f"{type(error).__name__}: {error}", flush=True)
        finally:
            sys.stdout.flush()
            os._exit(code)

    def text(self) -> str:
        """What it has logged so far."""
        with open(self.log, encoding="utf-8", errors="replace") as file:
            file.seek(self.begin)
            return file.read()

    def updates(self) -> list[tuple[int, int]]:
        """(epoch, update) that it has made."""
        return [(int(m[1]), int(m[2])) for m in UPDATE.finditer(self.text())]

    def wait(self, seconds: float | None = None) -> int | None:
        """Its exit code, negative for a signal; None: it still runs."""
        end = None if seconds is None else time.monotonic() + seconds
        while True:
            pid, status, _ = os.wait4(self.process, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if end and time.monotonic() >= end:
                return None
            time.sleep(0.001 if end else 0.02)

    def wait_for_updates(self, count: int) -> int | None:
        """Until it has made so many; its exit code if it ends before."""
        while len(self.updates()) < count:
            if (code := self.wait(0.02)) is not None:
                return code
        return None


def log_of(folder: Path) -> Path:
    """Beside a training's folder, but not on the disk that is filled."""
    beside = folder.parent.parent if folder.parent.name == DISK else folder.parent
    return beside / f"{folder.name}.log"


def number(position: tuple[int, int], per_epoch: int) -> int:
    """Of an update, over all epochs."""
    return (position[0] - 1) * per_epoch + position[1]


def logged(text: str) -> dict[str, str]:
    """What is said of each update and epoch, without times; the last word counts."""
    said = {f"{m[1]} {m[2]}": TIMES.sub("", m[3]) for m in UPDATE.finditer(text)}
    return said | {f"epoch {m[1]}": TIMES.sub("", m[2]) for m in EPOCH.finditer(text)}


def same(a, b) -> bool:
    """Bit by bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and checkpoints.content(a) == checkpoints.content(b)
        )
    return a == b


def differences(whole: Path, parts: Path) -> list[str]:
    """What of a finished training is not as in the undisturbed one."""
    found = []
    ours, theirs = (checkpoints.read(f / checkpoints.NAME) for f in (parts, whole))
    for name in ("model", "optimizers", "schedulers", "scaler", "gradients", "epoch", "step"):
        if not same(ours[name], theirs[name]):
            found.append(f"checkpoint: {name}")
    names = sorted(p.name for p in whole.glob("*.pth") if not p.name.startswith("checkpoint"))
    if names != sorted(p.name for p in parts.glob("*.pth") if not p.name.startswith("checkpoint")):
        found.append("names of models")
    for name in names:
        if not (parts / name).exists() or not same(
            *(torch.load(f / name, weights_only=True) for f in (parts, whole))
        ):
            found.append(name)
    first, second = (logged(log_of(f).read_text()) for f in (whole, parts))
    found += [f"log of {key}" for key in first if first[key] != second.get(key)]
    return found


def damage(path: Path, draw: random.Random) -> None:
    """Cut a file short, or flip one of its bits."""
    content = bytearray(path.read_bytes())
    if draw.random() < 0.5:
        content = content[: draw.randrange(len(content))]
    else:
        bit = draw.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def leave_room(folder: Path, share: float) -> Path:
    """Fill the disk of a folder but for this share of a checkpoint; the file that does."""
    room = int(share * (folder / checkpoints.NAME).stat().st_size)
    filler = folder / "filler"
    with suppress(OSError), open(filler, "wb", buffering=0) as file:  # the training writes, too
        while (free := os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize) > room:
            file.write(bytes(min(free - room, 1 << 20)))
    return filler


def disturb(mode: str, run: Run, folder: Path, draw: random.Random, pause: float) -> str:
    """Disturb a run, and wait for its end; in a word what happened."""
    code = run.wait_for_updates(draw.randint(3 if mode == "full" else 1, 8))
    if code is None:
        code = run.wait(draw.uniform(0, pause))
    if code is not None:
        return "done" if code == 0 else f"exit code {code}"
    if mode == "stop":
        os.kill(run.process, draw.choice(SIGNALS))
        made, code = len(run.updates()), run.wait()
        if code == 0:
            return "done"
        late = len(run.updates()) - made
        return "stopped" if code == AGAIN and late <= 1 else f"exit code {code}, {late} updates"
    if mode == "full":
        os.kill(run.process, signal.SIGSTOP)  # it would be done before the disk is full
        filler = leave_room(folder, draw.uniform(0, 0.9))
        os.kill(run.process, signal.SIGCONT)
        code = run.wait()
        filler.unlink()
        said = "cannot write" in run.text() and "Make room" in run.text()
        return "done" if code == 0 else "disk full" if said else f"exit code {code}"
    saving = any(folder.glob(".checkpoint*"))
    os.killpg(run.process, signal.SIGKILL)
    run.wait()
    if mode == "damage" and (folder / checkpoints.NAME).exists():
        damage(folder / checkpoints.NAME, draw)
        return "damaged"
    return "killed in a save" if saving else "killed"


def main(argv: list[str] | None = None) -> int:
    """Disturb; say what was lost."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("exp", type=Path, help="folder of a training that was done")
    parser.add_argument("--times", type=int, default=50, help="how often it is disturbed")
    parser.add_argument("--options", default=SHORT, help="of the training, beside its own")
    parser.add_argument("--work", type=Path, required=True, help="an empty folder for all this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="a json file, to which the counts are added")
    options = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)  # a process that is forked must not wait for threads it has not
    shell = json.loads((options.exp / "train.job.json").read_text())["shell"]
    words = shlex.split(shell)
    words = words[words.index("espnet_pl.bridge.train") + 1 :] + shlex.split(options.options)
    options.work.mkdir(parents=True, exist_ok=True)
    if [*options.work.iterdir()]:
        parser.error(f"{options.work} is not empty")
    folder = options.work
    if options.mode == "full":
        folder = options.work / DISK
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512m", "tmpfs", folder], check=True)
    begin = time.monotonic()
    try:
        counts = _disturbed(options, words, folder)
    finally:
        if options.mode == "full":
            subprocess.run(["umount", "--lazy", folder], check=True)
    counts |= {"seconds": round(time.monotonic() - begin), "command": shlex.join(sys.argv)}
    print(json.dumps(counts, indent=1))
    if options.record:
        before = json.loads(options.record.read_text()) if options.record.exists() else []
        text = json.dumps([*before, counts | {"environment": environment()}], indent=1)
        options.record.write_text(text + "\n")
    return 1 if counts["wrong"] else 0


def _disturbed(options: argparse.Namespace, words: list[str], folder: Path) -> dict:
    draw, whole = random.Random(f"{options.mode} {options.seed}"), folder / "whole"
    run = Run(words, whole)
    started = run.wait_for_updates(1) is None
    clock = time.monotonic()
    if not started or run.wait() != 0:
        raise SystemExit(f"the undisturbed training failed:\n{run.text()[-3000:]}")
    made = run.updates()
    pause = 2 * (time.monotonic() - clock) / len(made)
    per_epoch = max(update for _, update in made)
    counts = {
        "method": options.exp.name, "mode": options.mode, "options": options.options,
        "seed": options.seed, "disturbed": 0, "happened": Counter(), "again_most": 0,
        "updates_a_training": len(made), "finished": 0, "refused": 0, "wrong": [],
    }  # fmt: skip
    trainings = itertools.count()
    while counts["disturbed"] < options.times and len(counts["wrong"]) < 20:
        parts = folder / f"parts{next(trainings)}"
        last, damaged = 0, False
        while True:
            path = parts / checkpoints.NAME
            kept, alone = path.exists(), not checkpoints.previous(path).exists()
            run = Run(words, parts)
            last_time = counts["disturbed"] >= options.times
            what = "done" if last_time else disturb(options.mode, run, parts, draw, pause)
            if last_time and (code := run.wait()) != 0:
                what = f"exit code {code}"
            text = run.text()
            at = GOING_ON.search(text)
            at = number((int(at[2]), int(at[1])), per_epoch) if at else 0
            if damaged and alone and "no checkpoint is whole" in text:  # as it should
                counts["refused"] += 1
                break
            if kept and not at:
                counts["wrong"].append(f"{parts.name}: not gone on with")
            counts["again_most"] = max(counts["again_most"], last - at)
            if damaged and "the one before" not in text and at:
                counts["wrong"].append(f"{parts.name}: damage was not seen")
            last = max([last, *(number(p, per_epoch) for p in run.updates())])
            damaged = what == "damaged"
            if what == "done":
                break
            if what.startswith("exit"):
                counts["wrong"].append(f"{parts.name}: {what}: {text[-500:]}")
                break
            counts["disturbed"] += 1
            counts["happened"][what] += 1
            try:
                if what != "damaged" and path.exists():
                    checkpoints.read(path)
            except checkpoints.DamagedError as error:
                counts["wrong"].append(f"{parts.name}: lost: {error}")
        if what == "done":
            counts["finished"] += 1
            counts["wrong"] += [f"{parts.name}: {what}" for what in differences(whole, parts)]
        print(f"{counts['disturbed']} of {options.times}: {dict(counts['happened'])}", flush=True)
        subprocess.run(["rm", "-r", str(parts)], check=True)
    return counts


if __name__ == "__main__":
    raise SystemExit(main())
