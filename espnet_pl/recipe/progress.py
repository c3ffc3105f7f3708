"""What a user sees while jobs run: one line per event, one per epoch, never a wall of text."""

import functools
import re
import shutil
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from espnet_pl.recipe import markers

SHOWN = ("cer_ctc", "cer", "wer", "acc", "loss")  # of the validation set, the first there is


class Display:
    """Prints lines; on a terminal also a line that is overwritten, with what is going on."""

    def __init__(self):
        self.began, self.live, self.last = time.monotonic(), sys.stdout.isatty(), ""

    def line(self, text: str) -> None:
        """One line that stays."""
        self._clear()
        print(text, flush=True)

    def status(self, running: int, waiting: int) -> None:
        """The passing line; nothing in a log file or when nothing runs."""
        text = f"[{running} running, {waiting} waiting, {duration(time.monotonic() - self.began)}]"
        if not self.live or not running:
            self._clear()
        elif text != self.last:
            self.last = text
            print(f"\r\033[K{text[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)

    def _clear(self) -> None:
        if self.last:
            print("\r\033[K", end="", flush=True)
            self.last = ""


class Epochs:
    """Reads the epochs of a training off its log: how far, how well, how long still."""

    def __init__(self, job, offset: int, show: Display):
        self.name, self.log, self.offset, self.show = job.name, job.log, offset, show
        self.first: tuple[int, float] | None = None
        self.total = 0
        self.tail = b""

    def look(self) -> None:
        """Shows the epochs that ended since the last look."""
        if not self.name.startswith("train "):
            return
        with open(self.log, "rb") as file:
            file.seek(self.offset)
            new = file.read()
        self.offset += len(new)
        *lines, self.tail = (self.tail + new).split(b"\n")
        for line in lines:
            text = line.decode(errors="replace")
            if begun := re.search(r"(\d+)/(\d+)epoch started", text):
                self.total = int(begun[2])
                self.first = self.first or (int(begun[1]), time.monotonic())
            elif ended := re.search(r"(\d+)epoch results: (.*)", text):
                self._show(int(ended[1]), ended[2])

    def _show(self, epoch: int, results: str) -> None:
        valid = "".join(re.findall(r"\[valid\] ([^\[]*)", results))
        values = dict(re.findall(r"(\w+)=([-+.\w]+)", valid))
        name = next((name for name in SHOWN if name in values), None)
        value = f", valid {name} {values[name]}" if name else ""
        left = ""
        if self.first and self.total > epoch:
            each = (time.monotonic() - self.first[1]) / (epoch - self.first[0] + 1)
            left = f", {duration(each * (self.total - epoch))} left"
        name = self.name.removeprefix("train ")
        self.show.line(f"{name}: epoch {epoch}/{self.total or '?'}{value}{left}")


class Times:
    """How long earlier jobs took, by their markers in some folders."""

    def __init__(self, folders: Iterable[Path]):
        self.folders = [Path(folder) for folder in folders]

    @functools.cached_property
    def seconds(self) -> dict[str, list[float]]:
        """By the first two words of the name, and by the first."""
        seconds: dict[str, list[float]] = {}
        for path in [path for folder in self.folders for path in folder.rglob("*.job.json")]:
            marker = markers.read(path)
            if marker and marker.get("state") == "done":
                words = str(marker["name"]).split()
                for key in {" ".join(words[:2]), words[0]}:
                    seconds.setdefault(key, []).append(marker["wall_s"])
        return seconds

    def usual(self, name: str) -> float | None:
        """The median of the jobs most like this one; None if there was none."""
        words = name.split()
        found = self.seconds.get(" ".join(words[:2])) or self.seconds.get(words[0])
        return statistics.median(found) if found else None


def duration(seconds: float) -> str:
    """``0.4 s``, ``12 s``, ``3 min 05 s``, ``2 h 04 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
