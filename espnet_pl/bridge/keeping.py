"""Keeps a training: saves it between two updates, and brings it back to just there.

What decides the next update is in the checkpoint: student, method (teacher, cache, counters),
optimisers, schedulers, scaler, gradients that are not used up, the random states of each rank, the
reports so far, and how many updates of the epoch are done, from which the plan of both streams
follows.  What the trainer writes at the end of an epoch is saved with the next epoch's first look,
where all ranks take part.
"""

import logging
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from espnet2.train.reporter import Average, SubReporter, WeightedAverage
from torch import Tensor

from espnet_pl.bridge import checkpoints, fits
from espnet_pl.bridge.batches import PairedIterFactory
from espnet_pl.bridge.model import SAVED_AS, PLModel
from espnet_pl.bridge.owner import Owner
from espnet_pl.methods.base import ConfigError
from espnet_pl.parts.ranks import by_first, gather, leave, rank, several
from espnet_pl.parts.signals import AGAIN, SIGNALS


class Interval:
    """How much may be lost: ``500`` updates, or what fits into ``10min`` or ``30s``.

    Raises:
        ConfigError: it is neither.
    """

    def __init__(self, words: str | int) -> None:
        found = re.fullmatch(r"([1-9]\d*)(min|s|)", str(words))
        if not found:
            raise ConfigError(
                f"save_interval is {words!r}; give a number of updates (500) or a time (10min, 30s)"
            )
        number, unit = int(found[1]), found[2]
        self.updates = None if unit else number
        self.seconds = number * {"min": 60, "s": 1}[unit] if unit else None
        self.begin(0)

    def begin(self, update: int) -> None:
        """Nothing can be lost at this update."""
        self.update, self.time = update, time.monotonic()

    def over(self, update: int) -> bool:
        """Whether it is time."""
        if self.updates:
            return update - self.update >= self.updates
        return time.monotonic() - self.time >= self.seconds


class Keeper:
    """Of one run of the trainer; as a context, it owns the folder and listens to signals.

    Args:
        folder: of the training.
        interval: between two checkpoints.
        traits: what a checkpoint must agree with.
        model: with the method.
        factory: of the training's batches; it is told what is done.
        accumulated: batches of one update.
    """

    def __init__(
        self,
        folder: Path,
        interval: Interval,
        traits: dict[str, str],
        model: PLModel,
        optimizers: Any,
        schedulers: Any,
        factory: PairedIterFactory,
        accumulated: int = 1,
    ) -> None:
        self.folder, self.interval, self.traits, self.model = folder, interval, traits, model
        self.optimizers, self.schedulers, self.factory = optimizers, schedulers, factory
        self.accumulated = accumulated
        self.scaler = None
        self.epochs = {"epoch": 0, "stats": {}}  # the trainer's reports of those that are over
        self.epoch, self.step, self.train = 1, 0, None  # where the run is; reports of this epoch
        self.mine: dict[str, Any] = {}  # what the checkpoint knows of this rank, once
        self.random: dict[str, Any] | None = None  # before a validation, which is begun anew
        self.saved: tuple[int, int] = (1, 0)  # where it was; a new run has nothing to save
        self.stopped_by: str | None = None

    def __enter__(self) -> "Keeper":
        self.owner, self.before = None, {}
        by_first(self._own)
        if threading.current_thread() is threading.main_thread():
            for sign in SIGNALS:
                self.before[sign] = signal.signal(sign, self._note)
        return self

    def __exit__(self, *_) -> None:
        for sign, handler in self.before.items():
            signal.signal(sign, handler)
        if self.owner:
            self.owner.leave()

    def newest(self, resume: bool) -> bool:
        """Whether there is a whole checkpoint to go on from."""
        look = checkpoints.newest if resume else checkpoints.put_aside
        return by_first(lambda: look(self.folder)) is not None

    def resume(self, reporter: Any, scaler: Any, device: str, strict: bool) -> None:
        """Bring the run back to where its checkpoint is.

        Raises:
            ConfigError: the checkpoint is of another training.
        """
        path = self.folder / checkpoints.NAME
        states = checkpoints.read(path, device)
        if "traits" not in states:
            raise ConfigError(f"{path} says nothing of its training: start anew, elsewhere")
        fits.check(states["traits"], self.traits, self.folder)
        ranks = states["ranks"]
        if len(ranks) != len(gather(None)):
            logging.warning(
                f"{path} was written by {len(ranks)} processes, there are {len(gather(None))} now: "
                "the batches are shared out anew, random numbers are other ones"
            )
            ranks = [{**ranks[0], "random": None}] * len(gather(None))
        self.mine = ranks[rank()]
        states["optimizers"][0][SAVED_AS] |= self.mine["method"]
        self.model.load_state_dict(states["model"], strict=strict)
        for optimizer, state in zip(self.optimizers, states["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        for scheduler, state in zip(self.schedulers, states["schedulers"], strict=True):
            if scheduler is not None:
                scheduler.load_state_dict(state)
        if scaler is not None:
            scaler.load_state_dict(states["scaler"])
        for name, parameter in self.model.named_parameters():
            parameter.grad = states["gradients"].get(name)
        self.epochs = states["reporter"]
        reporter.load_state_dict(states["reporter"])
        self.epoch, self.step = self.saved = (states["epoch"], states["step"])
        self.factory.done = self.saved
        logging.info(f"going on from {path}: update {self.step} of epoch {self.epoch} is done")

    def training(self, batches: Any, reporter: SubReporter, scaler: Any) -> Iterator[Any]:
        """The batches of an epoch that are left; between two of them, all is kept if it is time."""
        self.train, self.scaler, self.epoch = reporter, scaler, reporter.get_epoch()
        self.step = self.factory.done_of(self.epoch)
        batches = iter(batches)  # draws a random number
        if self.mine:
            if self.step:
                _restore_reports(reporter, self.mine["reports"])
                if self.mine["random"]:
                    _restore_random(self.mine["random"])
            self.mine = {}
        while True:
            if self.step % self.accumulated == 0 or self.step == self.factory.steps_per_epoch:
                self._look(self.step == 0)
            try:
                batch = next(batches)
            except StopIteration:
                self.random = _random()  # ESPnet's transducer also validates with dropout
                return
            yield batch
            self.step += 1

    def validating(self, batches: Any) -> Iterator[Any]:
        """The batches of a validation; a signal ends it, and it is begun anew later."""
        batches = iter(batches)
        while True:
            self._look(False)
            try:
                batch = next(batches)
            except StopIteration:
                self.random = None
                return
            yield batch

    def epoch_is_over(self, states: dict[str, Any]) -> None:
        """Take note of what the trainer would save at the end of an epoch."""
        reports = states["reporter"]
        self.epochs = {"epoch": reports["epoch"], "stats": dict(reports["stats"])}

    def over(self) -> None:
        """Save a run that has come to its end: it may be given more epochs later."""
        if self.train:  # else there was nothing left to do
            self.epoch, self.step = self.epoch + 1, 0
            self.save()

    def save(self) -> None:
        """Write the checkpoint of where the run is; all ranks take part."""
        begin = time.monotonic()
        ours = {
            "random": self.random or _random(),
            "reports": _reports(self.train) if self.step else None,
        }
        ranks = gather({**ours, "method": self._other_than_first()})
        by_first(lambda: self._write(ranks))
        self.saved = (self.epoch, self.step)
        self.interval.begin(self._update())
        logging.info(
            f"saved update {self.step} of epoch {self.epoch} in {time.monotonic() - begin:.2f} s"
        )

    def _own(self) -> None:
        self.owner = Owner(self.folder)
        checkpoints.tidy(self.folder)

    def _write(self, ranks: list[dict[str, Any]]) -> None:
        self.owner.check()
        parameters = self.model.named_parameters()
        states = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [s.state_dict() if s else None for s in self.schedulers],
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "gradients": {name: p.grad for name, p in parameters if p.grad is not None},
            "reporter": self.epochs,
            "epoch": self.epoch,
            "step": self.step,
            "ranks": ranks,
            "traits": self.traits,
        }
        checkpoints.write(states, self.folder / checkpoints.NAME)

    def _note(self, number: int, _) -> None:
        self.stopped_by = signal.Signals(number).name

    def _update(self) -> int:
        return (self.epoch - 1) * self.factory.steps_per_epoch + self.step

    def _look(self, at_start: bool) -> None:
        """Save if it is time, and end the process if it was told to; all ranks do the same."""
        said = gather((at_start or self.interval.over(self._update()), self.stopped_by))
        due, stopped_by = said[0][0], next((by for _, by in said if by), None)  # the first's clock
        if (due or stopped_by) and self.saved != (self.epoch, self.step):
            self.save()
        if stopped_by:
            logging.warning(f"{stopped_by}: all is saved, the same command goes on from there")
            leave()
            raise SystemExit(AGAIN)

    def _other_than_first(self) -> dict[str, Tensor]:
        """What of the method's state is not as on rank 0, which saves its own."""
        if not several():
            return {}
        state = self.model.method.state_dict()
        first = gather({name: _content(value) for name, value in state.items()})[0]
        if rank() == 0:
            return {}
        return {
            name: _on_cpu(value)
            for name, value in state.items()
            if first.get(name) != _content(value)
        }


def _content(value: Any) -> Any:
    """What two equal values share, and others do not."""
    if isinstance(value, dict):
        return {name: _content(entry) for name, entry in value.items()}
    if isinstance(value, Tensor):
        return checkpoints.content(value)
    return value


def _on_cpu(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _on_cpu(entry) for name, entry in value.items()}
    return value.cpu() if isinstance(value, Tensor) else value


def _random() -> dict[str, Any]:
    """The states of all random numbers, as tensors and plain values."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "numpy": (name, torch.tensor(keys.astype(np.int64)), *rest),
        "python": random.getstate(),
    }


def _restore_random(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    random.setstate(states["python"])


def _reports(reporter: SubReporter) -> dict[str, Any]:
    """What was reported of the epoch's updates so far."""
    return {
        "seconds": time.perf_counter() - reporter.start_time,
        "count": reporter.count,
        "total_count": reporter.total_count,
        "stats": {
            name: (
                torch.tensor([v.value for v in values], dtype=torch.float64),
                torch.tensor([v.weight for v in values], dtype=torch.float64)
                if isinstance(values[0], WeightedAverage)
                else None,
            )
            for name, values in reporter.stats.items()
        },
    }


def _restore_reports(reporter: SubReporter, states: dict[str, Any]) -> None:
    reporter.start_time -= states["seconds"]
    reporter.count, reporter.total_count = states["count"], states["total_count"]
    for name, (values, weights) in states["stats"].items():
        reporter.stats[name] = (
            [Average(v) for v in values.tolist()]
            if weights is None
            else [WeightedAverage(v, w) for v, w in zip(values.tolist(), weights.tolist())]
        )
