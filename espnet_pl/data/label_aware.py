r"""Label-aware batches: of every label that was drawn, two utterances at least are in the batch.

A contrastive loss learns from what is alike in a batch.  Batches at random hardly ever hold a rare
label twice; here a label is drawn, two random utterances that contain it are added, and so on until
the batch is full:

    p(c) ∝ n_c^−power,   n_c utterances contain label c, of all c with n_c ≥ 2

Source: Xiao, Fuegen, Mohamed, "Contrastive Semi-supervised Learning for ASR", arXiv:2103.05149, as
others describe it; the paper itself was not read.  Unverified are therefore p(c) ("rare labels"),
and everything that follows.

Draws: no utterance is twice in a batch.  A label that fewer than two utterances outside the batch
contain is drawn again; when nothing is found any more, the batch is as full as it gets.

Full: as in ESPnet's batch_type numel, longest utterance × number of utterances ≤ bins, but never
more.  The pair that would be too much is the first of the next batch: were it dropped, long
utterances would be rarer than short ones.  An utterance so long that a pair for each rank does not
fit at its length is left out, and counted.

Passes: a fixed number of batches, which depend on the seed and the number of the pass only.  A pass
does not see every utterance once (``seen`` says how many it sees), and those of which no label is
in a second utterance are never seen (``never``).

Ranks draw the same batches, and rank r of R has their pairs r, r + R, …: as ESPnet shares out
batches, but two utterances of a label stay together.  So each rank must be able to read all speech.
"""

import math
from array import array
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, NamedTuple

import numpy as np

CHUNK = 1 << 14  # utterances that are sorted at once, which bounds the memory this takes
TRIES = 100  # labels drawn in vain before a batch is closed


@dataclass(frozen=True)
class Batching:
    """Settings; whether they are the paper's is not known.

    Raises:
        ValueError: a value that there are no batches of.
    """

    power: float = 1.0  # 0: all labels alike; the greater, the rarer the labels
    order: int = 1  # tokens in a row that are a label; more make few tokens rare labels
    stream: Literal["unlabelled", "labelled", "both"] = "unlabelled"

    def __post_init__(self) -> None:
        if not 0 <= self.power < math.inf:
            raise ValueError(f"power is {self.power}, it must be 0 or more, and finite")
        if self.order < 1:
            raise ValueError(f"order is {self.order}, it must be 1 or more")


class Index:
    """The utterances that contain each label, both numbered in the order in which they come.

    Takes 4 bytes for each label of each utterance, and 8 for each label; a little more than twice
    that while it is being made.

    Args:
        labels: of each utterance; how often one is there does not matter.
    """

    def __init__(self, labels: Iterable[Iterable[Hashable]]) -> None:
        numbers: dict[Hashable, int] = {}
        flat, ends = array("i"), array("q", [0])
        for own in labels:
            flat.extend({numbers.setdefault(label, len(numbers)) for label in own})
            ends.append(len(flat))
        self.size = len(ends) - 1  # utterances
        parts = [ends[begin : begin + CHUNK + 1] for begin in range(0, self.size, CHUNK)]
        flat = np.asarray(flat, dtype=np.int32)
        self.starts = np.zeros(len(numbers) + 1, np.int64)
        for part in parts:
            self.starts[1:] += np.bincount(flat[part[0] : part[-1]], minlength=len(numbers))
        np.cumsum(self.starts, out=self.starts)
        self.utterances = np.empty(len(flat), np.int32)  # of label 0, of label 1, …
        free = self.starts[:-1].copy()
        for k, part in enumerate(parts):
            own = flat[part[0] : part[-1]]
            order = np.argsort(own, kind="stable")
            own = own[order]
            place = free[own] + np.arange(len(own)) - np.searchsorted(own, own)
            utterances = np.repeat(np.arange(len(part) - 1) + k * CHUNK, np.diff(part))
            self.utterances[place] = utterances[order]
            free += np.bincount(own, minlength=len(numbers))

    @property
    def nbytes(self) -> int:
        """Memory."""
        return self.starts.nbytes + self.utterances.nbytes

    @property
    def counts(self) -> np.ndarray:
        """How many utterances contain each label."""
        return np.diff(self.starts)

    def containing(self, label: int) -> np.ndarray:
        """The utterances that contain a label."""
        return self.utterances[self.starts[label] : self.starts[label + 1]]

    def law(self, power: float) -> np.ndarray:
        """p(c) of each label.

        Raises:
            ValueError: no label is in two utterances.
        """
        counts = self.counts
        if not (counts >= 2).any():
            raise ValueError("no label is in two utterances")
        log_p = np.where(counts >= 2, -power * np.log(np.maximum(counts, 1)), -np.inf)
        p = np.exp(log_p - log_p.max())
        return p / p.sum()

    def never(self) -> int:
        """How many utterances have no label that another one has."""
        there = np.zeros(self.size, bool)
        there[self.utterances[np.repeat(self.counts >= 2, self.counts)]] = True
        return self.size - int(there.sum())


class Pair(NamedTuple):
    """A label that was drawn, and two utterances that contain it."""

    label: int
    first: int
    second: int


class LabelAwareBatches:
    """Batches without end, numbered on from pass to pass: batch i is one of pass i // len(self).

    Args:
        tokens: utterance ids, each with the tokens whose ``settings.order``-grams are its labels.
        sizes: of all these utterances, in bins.
        bins: of a batch, all ranks together, with padding.
        batches: of a pass.
        rank: whose pairs of a batch an index gives, of ``ranks``.

    Raises:
        ValueError: no label is in two utterances that are short enough.
    """

    def __init__(
        self,
        settings: Batching,
        tokens: Iterable[tuple[str, Sequence[Hashable]]],
        sizes: Mapping[str, int],
        bins: int,
        batches: int,
        seed: int | str = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.bins, self.batches, self.seed = bins, batches, seed
        self.rank, self.ranks = rank, ranks
        self.utt_ids: list[str] = []
        self.too_long = 0

        def labels():
            for utt_id, own in tokens:
                self.utt_ids.append(utt_id)
                fits = 2 * ranks * sizes[utt_id] <= bins
                self.too_long += not fits
                yield zip(*(own[k:] for k in range(settings.order))) if fits else ()

        self.index = Index(labels())
        self.sizes = np.array([sizes[utt_id] for utt_id in self.utt_ids], np.int64)
        try:
            self._below = np.cumsum(self.index.law(settings.power))
        except ValueError as error:
            raise ValueError(f"{error}, of {len(self.utt_ids)}{self._long()}") from None
        self._below /= self._below[-1]  # exactly 1, which no random number reaches
        self._pass: tuple[int, list[list[Pair]]] = (-1, [])  # the last one made

    def __len__(self) -> int:
        """Batches of a pass."""
        return self.batches

    def __getitem__(self, index: int) -> list[str]:
        """This rank's utterances of a batch, longest first; all batches of a pass at once."""
        number, place = divmod(index, self.batches)
        pairs = self.of_pass(number)[place][self.rank :: self.ranks]
        mine = [u for pair in pairs for u in pair[1:]]
        return [self.utt_ids[u] for u in sorted(mine, key=lambda u: -self.sizes[u])]

    def of_pass(self, number: int) -> list[list[Pair]]:
        """The batches of a pass, of all ranks.

        Raises:
            ValueError: a batch has not a pair for each rank.
        """
        if self._pass[0] != number:
            self._pass = number, self._make(number)
        return self._pass[1]

    def _make(self, number: int) -> list[list[Pair]]:
        random = Random(f"label-aware {self.seed} {number}")
        made: list[list[Pair]] = []
        batch: list[Pair] = []
        inside: set[int] = set()
        longest = 0
        while len(made) < self.batches:
            pair = self._draw(random, inside)
            size = max(int(self.sizes[u]) for u in pair[1:]) if pair else 0
            if pair is None or max(longest, size) * (len(inside) + 2) > self.bins:
                if len(batch) < self.ranks:
                    raise ValueError(
                        f"found {len(batch)} pairs of utterances with a label in common for "
                        f"{self.ranks} ranks"
                    )
                made.append(batch)
                batch, inside, longest = [], set(), 0
            if pair:
                batch.append(pair)
                inside.update(pair[1:])
                longest = max(longest, size)
        return made

    def _draw(self, random: Random, inside: set[int]) -> Pair | None:
        """A label, and two random ones of the utterances outside the batch that contain it."""
        for _ in range(TRIES):
            label = int(np.searchsorted(self._below, random.random(), side="right"))
            own = self.index.containing(label)
            # Mostly two are enough; of so many that more cannot be inside, two are outside.
            for enough in (2, len(inside) + 2):
                places = random.sample(range(len(own)), min(enough, len(own)))
                outside = [u for u in own[places].tolist() if u not in inside]
                if len(outside) >= 2:
                    return Pair(label, *outside[:2])
        return None

    def seen(self, number: int) -> float:
        """The share of all utterances that are in a pass."""
        there = {u for batch in self.of_pass(number) for pair in batch for u in pair[1:]}
        return len(there) / len(self.utt_ids)

    def report(self) -> str:
        """What a log should say of these batches."""
        shared, never = int((self.index.counts >= 2).sum()), self.index.never()
        return (
            f"{shared} of {len(self.index.counts)} labels are in two utterances or more, index of "
            f"{self.index.nbytes / 1e6:.1f} MB; the first pass, {self.batches} batches, sees "
            f"{self.seen(0):.1%} of {len(self.utt_ids)} utterances; {never} are never seen, for no "
            f"other has a label of theirs{self._long()}"
        )

    def _long(self) -> str:
        several = 2 * self.ranks
        why = f"{several} of their length do not fit into a batch of {self.bins}"
        return f" ({self.too_long} were left out, because {why})" if self.too_long else ""
