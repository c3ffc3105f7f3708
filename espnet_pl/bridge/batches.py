"""ESPnet's flat dictionaries, and the iterator that fills them from two streams.

A flat dictionary holds the labelled utterances under ESPnet's own names
(``speech``, ``text``, …), the others under ``unlabelled_…`` and ``fresh_…``.
"""

import random
import signal
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from espnet2.iterators.abs_iter_factory import AbsIterFactory
from espnet2.iterators.sequence_iter_factory import SequenceIterFactory, worker_init_fn
from torch.utils.data import DataLoader

from espnet_pl.data.label_aware import LabelAwareBatches
from espnet_pl.data.pairing import Chance, Pairing, Step, plan
from espnet_pl.methods.base import Batch, ConfigError, Utterances
from espnet_pl.parts.ranks import gather
from espnet_pl.parts.signals import SIGNALS

PREFIXES = {"labelled": "", "unlabelled": "unlabelled_", "fresh": "fresh_"}


def to_batch(flat: dict[str, Any]) -> Batch:
    """The flat dictionary as a batch."""
    parts = {}
    for kind, prefix in PREFIXES.items():
        if f"{prefix}speech" not in flat:
            continue
        text = {k: flat[prefix + k] for k in ("text", "text_lengths") if prefix + k in flat}
        parts[kind] = Utterances(
            utt_id=list(flat[f"{kind}_utt_id"]),
            speech=flat[f"{prefix}speech"],
            speech_lengths=flat[f"{prefix}speech_lengths"],
            **text,
        )
    return Batch(**parts, gone=flat.get("gone_utt_id", []))


class PairedIterFactory(AbsIterFactory):
    """One iterator over the steps of a pairing, cut into epochs.

    Args:
        pairing: what the method wants to see.
        labelled: ESPnet's factory of the labelled set: its batches (sharded by rank; or label-aware
            ones in their place), data set and collation are used, its order is not.
        unlabelled: the same of the unlabelled set, or None.
        steps_per_epoch: updates of an epoch; None: so many that an epoch sees every labelled
            batch once (every unlabelled one, where no update is labelled).
        chance: how likely the entry of the cache that an unlabelled update used is replaced, where
            that is known after the update only.

    Raises:
        ConfigError: the ranks of a distributed job have different numbers of batches.
    """

    def __init__(
        self,
        pairing: Pairing,
        labelled: SequenceIterFactory,
        unlabelled: SequenceIterFactory | None,
        steps_per_epoch: int | None,
        seed: int,
        chance: Chance | None = None,
    ) -> None:
        self.pairing, self.seed, self.chance = pairing, seed, chance
        self.streams = {"labelled": labelled, "unlabelled": unlabelled, "fresh": unlabelled}
        self.batches = {
            kind: stream.sampler.batches if stream else [] for kind, stream in self.streams.items()
        }
        self.batches["gone"] = self.batches["unlabelled"]
        counts = gather({kind: len(batches) for kind, batches in self.batches.items()})
        if any(count != counts[0] for count in counts):
            raise ConfigError(
                f"the ranks have different numbers of batches: {counts}; they would not make the "
                "same updates.  Give all of them the same data and settings"
            )
        self.steps_per_epoch = steps_per_epoch or self._one_pass()
        self._steps, self._next_epoch = None, None
        self.done = (1, 0)  # epoch in which a training goes on, updates of it that were made before

    def done_of(self, epoch: int) -> int:
        """How many updates of an epoch are not made again."""
        return self.done[1] if epoch == self.done[0] else 0

    def build_iter(self, epoch: int, shuffle: bool | None = None) -> DataLoader:
        """The updates of an epoch, counted from 1; ESPnet's ``shuffle`` means nothing here."""
        loader = self.streams["labelled"] or self.streams["unlabelled"]
        return DataLoader(
            dataset=_Both({k: s.dataset for k, s in self.streams.items() if s}),
            batch_sampler=_Epoch(self, epoch, loader.num_workers > 0),
            collate_fn=partial(_collate, {k: s.collate_fn for k, s in self.streams.items() if s}),
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            worker_init_fn=partial(_begin_worker, base_seed=epoch + self.seed),
        )

    def _one_pass(self) -> int:
        labelled, unlabelled = len(self.batches["labelled"]), len(self.batches["unlabelled"])
        if self.pairing.together:
            explore, joint = self.pairing.explore, self.pairing.joint
            return labelled + explore * (-(-labelled // joint) if joint else 1)
        if not self.pairing.unlabelled:
            return labelled
        if not self.pairing.labelled:
            return unlabelled
        block = self.pairing.labelled + self.pairing.unlabelled
        return -(-labelled // self.pairing.labelled) * block

    def _of_a_pass(self, kind: str) -> int | None:
        """How many batches come again in the next pass."""
        batches = self.batches[kind]
        return None if isinstance(batches, LabelAwareBatches) else len(batches)

    def steps_of(self, epoch: int) -> Iterator[Step]:
        """The steps of an epoch that are left; each is planned when it is asked for."""
        if epoch != self._next_epoch:  # the first epoch of a process: replay what went before
            # A loader with workers asks for two batches of each before it wants the first.
            workers = (self.streams["labelled"] or self.streams["unlabelled"]).num_workers
            self._steps = plan(
                self.pairing,
                self._of_a_pass("labelled"),
                self._of_a_pass("unlabelled"),
                self.seed,
                self.chance,
                0 if self.chance is None else 1 + 2 * workers,
            )
            for _ in range((epoch - 1) * self.steps_per_epoch):
                next(self._steps)
        self._next_epoch = None  # until this one is over
        for number in range(self.steps_per_epoch):
            step = next(self._steps)
            if number >= self.done_of(epoch):
                yield step
        self._next_epoch = epoch + 1

    def keys(self, step: Step) -> Iterator[tuple[str, str]]:
        """What a step is made of: (stream, utterance id)."""
        for kind, batches in (
            ("labelled", [] if step.labelled is None else [step.labelled]),
            ("unlabelled", [] if step.unlabelled is None else [step.unlabelled]),
            ("fresh", step.fresh),
            ("gone", step.gone),
        ):
            for batch in batches:
                for utt_id in self.batches[kind][batch]:
                    yield kind, utt_id


class _Epoch:
    """The updates of one epoch as lists of keys, each made when it is asked for.

    Args:
        seeded: each begins with the seed that its worker is to draw from: which worker loads an
            update, and what it loaded before, are others where a training goes on.
    """

    def __init__(self, factory: PairedIterFactory, epoch: int, seeded: bool) -> None:
        self.factory, self.epoch, self.seeded = factory, epoch, seeded

    def __iter__(self) -> Iterator[list[tuple[str, str]]]:
        for number, step in enumerate(
            self.factory.steps_of(self.epoch), self.factory.done_of(self.epoch)
        ):
            seed = f"{self.factory.seed} {self.epoch} {number}"
            yield [("seed", seed)] * self.seeded + list(self.factory.keys(step))

    def __len__(self) -> int:
        return self.factory.steps_per_epoch


class _Both:
    """The data sets of all streams, addressed by (stream, utterance id)."""

    def __init__(self, datasets: dict[str, Any]) -> None:
        self.datasets = datasets

    def __getitem__(self, key: tuple[str, str]) -> tuple[str, Any]:
        kind, utt_id = key
        if kind == "seed":
            seed = random.Random(utt_id).getrandbits(32)
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            return kind, None
        return kind, utt_id if kind == "gone" else self.datasets[kind][utt_id]


def _begin_worker(worker_id: int, base_seed: int) -> None:
    """As ESPnet's; signals are for the process that trains, which still needs its batches."""
    for sign in SIGNALS:
        signal.signal(sign, signal.SIG_IGN)
    worker_init_fn(worker_id, base_seed)


def _collate(collate_fns: dict[str, Any], items: list) -> tuple[list[str], dict[str, Any]]:
    flat, trained = {}, []
    if gone := [utt_id for kind, utt_id in items if kind == "gone"]:
        flat["gone_utt_id"] = gone
    for kind, collate_fn in collate_fns.items():
        mine = [data for k, data in items if k == kind]
        if not mine:
            continue
        ids, tensors = collate_fn(mine)
        flat |= {PREFIXES[kind] + name: tensor for name, tensor in tensors.items()}
        flat[f"{kind}_utt_id"] = list(ids)
        if kind != "fresh":
            trained += ids
    return trained, flat
