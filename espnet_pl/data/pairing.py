r"""Which labelled and unlabelled batches meet in which update.

A ``Pairing`` is what a method wants; ``plan`` turns it into one ``Step`` per
update, a pure function of the numbers of batches and the seed (and of the chances
below, where there are some).  Nothing else here depends on the model, so a run is
continued by asking for the steps from where it stopped, and every rank of a
distributed job knows what the others do.

In turn: blocks of N_L labelled and N_U unlabelled updates, shuffled inside each
block: the ratio is exact, the order random.  Together: every update sees one
batch of each; or E updates see an unlabelled batch only, the next J both, and so on.
The shorter stream cycles; each pass over a stream is shuffled anew.

The cache (capacity C > 0, replacement p), in the words of the released slimIPL
recipe (mode 'fixed-pre-cache'): a list of C unlabelled batches.  An unlabelled
update trains on the next entry of a shuffled snapshot of the list and, with
probability p, puts the next batch of a shuffled pass over the unlabelled set in
its place.  New entries are labelled before the update, and used from the next
sweep on.  While the list is being filled there is no update to make: those
batches are labelled in the next update that there is, where the model is still
the same.

Whether an entry is replaced may also depend on how much its labels changed, so on
what the model made of it when it was used: then the plan asks for the chance of that
turn, as many turns later as batches are loaded ahead of their update.  An entry that
has left is not used again, not even in the sweep that has begun.

Source: Likhomanenko et al., "slimIPL", arXiv:2010.11524, and
flashlight/wav2letter recipes/slimIPL/src/Train.cpp.  Chances that depend on the labels:
arXiv:2210.08711 (abstract).
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from random import Random
from typing import Literal

Chance = Callable[[int], float]  # that what an unlabelled turn used is replaced, by its number


@dataclass(frozen=True)
class Pairing:
    """What a method wants to see.

    Raises:
        ValueError: a value that no plan can be made of.
    """

    labelled: int = 1  # N_L, labelled updates of a block
    unlabelled: int = 0  # N_U, unlabelled updates of a block
    together: bool = False  # both in every update; N_L and N_U are 1 then
    explore: int = 0  # E, unlabelled updates before every J that see both
    joint: int = 0  # J; 0: all that follow the first E
    warmup: int = 0  # M, labelled updates before the first unlabelled one
    capacity: int = 0  # C, batches in the cache; 0: none, an unlabelled batch comes unannounced
    replace: float = 0.1  # p, how likely a used entry is replaced
    # At random, or the more likely the more, or the less, its labels have changed; p is the most.
    replace_when: Literal["random", "changed", "settled"] = "random"

    def __post_init__(self) -> None:
        counts = (self.labelled, self.unlabelled, self.warmup, self.capacity)
        if min(*counts, self.explore, self.joint) < 0:
            raise ValueError(f"negative count in {self}")
        if self.labelled + self.unlabelled == 0:
            raise ValueError("labelled and unlabelled are both 0: there is nothing to train on")
        if not 0.0 <= self.replace <= 1.0:
            raise ValueError(f"replace is {self.replace}, it must lie in [0, 1]")
        if self.replace_when != "random" and not self.capacity:
            raise ValueError(f"replace_when is {self.replace_when!r}: that takes capacity > 0")
        if self.together and (self.labelled, self.unlabelled) != (1, 1):
            raise ValueError("together means one labelled and one unlabelled batch per update")
        if (self.explore or self.joint) and not self.together:
            raise ValueError("explore and joint are of updates that see both: together")

    def explores(self, turn: int) -> bool:
        """Whether the turn-th unlabelled batch, counted from 0, comes without a labelled one."""
        block = self.explore + self.joint
        return (turn % block if self.joint else turn) < self.explore


@dataclass(frozen=True)
class Step:
    """The batches of one update, as indices; None where the update has none of that kind."""

    labelled: int | None = None
    unlabelled: int | None = None
    fresh: tuple[int, ...] = ()  # unlabelled batches to be labelled before the update
    gone: tuple[int, ...] = ()  # batches that are not in the cache any more after the update


def plan(
    pairing: Pairing,
    n_labelled: int | None,
    n_unlabelled: int | None,
    seed: int = 0,
    chance: Chance | None = None,
    ahead: int = 0,
) -> Iterator[Step]:
    """The steps of a run from its first update on, without end.

    Args:
        n_labelled: labelled batches of one pass; None: no batch comes twice, 0, 1, 2, …
        n_unlabelled: unlabelled batches of one pass, or None.
        chance: of each unlabelled turn, counted from 0; None: always ``pairing.replace``.
        ahead: turns that are planned before the chance of the first of them is known; at least 1
            where it depends on the update.

    Raises:
        ValueError: the pairing asks for batches of a stream that has none, or would keep some of a
            stream in which none comes again.
    """
    if n_unlabelled is None and pairing.capacity:
        raise ValueError("a cache is of unlabelled batches that come again")
    if n_labelled == 0 and (pairing.labelled or pairing.warmup):
        raise ValueError("there is no labelled batch")
    if n_unlabelled == 0 and pairing.unlabelled:
        raise ValueError("there is no unlabelled batch")
    chance = chance or (lambda _: pairing.replace)
    return _plan(pairing, n_labelled, n_unlabelled, seed, chance, ahead)


def _plan(pairing, n_labelled, n_unlabelled, seed, chance, ahead):
    labelled = _passes(n_labelled, f"labelled {seed}")
    for _ in range(pairing.warmup):
        yield Step(labelled=next(labelled))

    unlabelled = _unlabelled(pairing, n_unlabelled, seed, chance, ahead)
    if pairing.together:
        for turn, (used, fresh, gone) in enumerate(unlabelled):
            yield Step(None if pairing.explores(turn) else next(labelled), used, fresh, gone)
    order = Random(f"order {seed}")
    block = [True] * pairing.labelled + [False] * pairing.unlabelled
    fresh = ()
    while True:
        order.shuffle(block)
        for is_labelled in block:
            if is_labelled:
                yield Step(labelled=next(labelled), fresh=fresh)
                fresh = ()
                continue
            used, new, gone = next(unlabelled)
            fresh += new
            if used is not None:  # else the cache is being filled: no update of its own
                yield Step(unlabelled=used, fresh=fresh, gone=gone)
                fresh = ()


def _passes(n: int | None, seed: str) -> Iterator[int]:
    """Shuffled pass after shuffled pass over n batches; None: one in order, which never ends."""
    if n is None:
        yield from count()
    random = Random(seed)
    while True:
        order = list(range(n))
        random.shuffle(order)
        yield from order


def _unlabelled(
    pairing: Pairing, n: int | None, seed: int, chance: Chance, ahead: int
) -> Iterator[tuple[int | None, tuple[int, ...], tuple[int, ...]]]:
    """For each unlabelled turn: the batch to train on, those to label, those that leave."""
    batches = _passes(n, f"unlabelled {seed}")
    if pairing.capacity == 0:
        for batch in batches:
            yield batch, (), ()

    random = Random(f"cache {seed}")
    entries = enumerate(batches)  # numbered: a batch may be in the cache twice
    cache = []
    for _ in range(pairing.capacity):
        cache.append(next(entries))
        yield None, (cache[-1][1],), ()
    undecided = deque()
    turns = 0
    while True:
        random.shuffle(cache)
        for entry in list(cache):  # what enters waits for the next sweep
            if entry not in cache:
                continue
            fresh, gone = (), ()
            undecided.append((turns, entry))
            turns += 1
            if len(undecided) > ahead:
                turn, old = undecided.popleft()
                if random.random() < chance(turn) and old in cache:
                    cache[cache.index(old)] = new = next(entries)
                    fresh = (new[1],)
                    gone = () if any(old[1] == batch for _, batch in cache) else (old[1],)
            yield entry[1], fresh, gone
