"""ESPnet's flat dictionaries, and the iterator that fills them from two streams.

A flat dictionary holds the labelled utterances under ESPnet's own names
(``speech``, ``text``, …), the others under ``unlabelled_…`` and ``fresh_…``.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from espnet2.iterators.abs_iter_factory import AbsIterFactory
from espnet2.iterators.sequence_iter_factory import SequenceIterFactory, worker_init_fn
from torch.utils.data import DataLoader

from espnet_pl.data.pairing import Pairing, Step, plan
from espnet_pl.methods.base import Batch, Utterances

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
    return Batch(**parts)


class PairedIterFactory(AbsIterFactory):
    """One iterator over the steps of a pairing, cut into epochs.

    Args:
        pairing: what the method wants to see.
        labelled: ESPnet's factory of the labelled set: its batches (sharded by rank), data set
            and collation are used, its order is not.
        unlabelled: the same of the unlabelled set, or None.
        steps_per_epoch: updates of an epoch; None: so many that an epoch sees every labelled
            batch once (every unlabelled one, where no update is labelled).
    """

    def __init__(
        self,
        pairing: Pairing,
        labelled: SequenceIterFactory,
        unlabelled: SequenceIterFactory | None,
        steps_per_epoch: int | None,
        seed: int,
    ) -> None:
        self.pairing, self.seed = pairing, seed
        self.streams = {"labelled": labelled, "unlabelled": unlabelled, "fresh": unlabelled}
        self.batches = {
            kind: list(stream.sampler.batches) if stream else []
            for kind, stream in self.streams.items()
        }
        self.steps_per_epoch = steps_per_epoch or self._one_pass()
        self._steps, self._next_epoch = None, None

    def build_iter(self, epoch: int, shuffle: bool | None = None) -> DataLoader:
        """The updates of an epoch, counted from 1; ESPnet's ``shuffle`` means nothing here."""
        steps = self._steps_of(epoch)
        loader = self.streams["labelled"] or self.streams["unlabelled"]
        return DataLoader(
            dataset=_Both({k: s.dataset for k, s in self.streams.items() if s}),
            batch_sampler=[list(self._keys(step)) for step in steps],
            collate_fn=partial(_collate, {k: s.collate_fn for k, s in self.streams.items() if s}),
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            worker_init_fn=partial(worker_init_fn, base_seed=epoch + self.seed),
        )

    def _one_pass(self) -> int:
        labelled, unlabelled = len(self.batches["labelled"]), len(self.batches["unlabelled"])
        if self.pairing.together or not self.pairing.unlabelled:
            return labelled
        if not self.pairing.labelled:
            return unlabelled
        block = self.pairing.labelled + self.pairing.unlabelled
        return -(-labelled // self.pairing.labelled) * block

    def _steps_of(self, epoch: int) -> list[Step]:
        if epoch != self._next_epoch:  # the first epoch of a process: replay what went before
            self._steps = plan(
                self.pairing,
                len(self.batches["labelled"]),
                len(self.batches["unlabelled"]),
                self.seed,
            )
            for _ in range((epoch - 1) * self.steps_per_epoch):
                next(self._steps)
        self._next_epoch = epoch + 1
        return [next(self._steps) for _ in range(self.steps_per_epoch)]

    def _keys(self, step: Step) -> Iterator[tuple[str, str]]:
        fresh = step.fresh
        for kind, batches in (
            ("labelled", [] if step.labelled is None else [step.labelled]),
            ("unlabelled", [] if step.unlabelled is None else [step.unlabelled]),
            ("fresh", fresh),
        ):
            for batch in batches:
                for utt_id in self.batches[kind][batch]:
                    yield kind, utt_id


class _Both:
    """The data sets of all streams, addressed by (stream, utterance id)."""

    def __init__(self, datasets: dict[str, Any]) -> None:
        self.datasets = datasets

    def __getitem__(self, key: tuple[str, str]) -> tuple[str, Any]:
        kind, utt_id = key
        return kind, self.datasets[kind][utt_id]


def _collate(collate_fns: dict[str, Any], items: list) -> tuple[list[str], dict[str, Any]]:
    flat, trained = {}, []
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
