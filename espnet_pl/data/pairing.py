r"""Which labelled and unlabelled batches meet in which update.

A ``Pairing`` is what a method wants; ``plan`` turns it into one ``Step`` per
update, a pure function of the numbers of batches and the seed.  Nothing here
depends on the model, so a run is continued by asking for the steps from where
it stopped, and every rank of a distributed job knows what the others do.

In turn: blocks of N_L labelled and N_U unlabelled updates, shuffled inside each
block: the ratio is exact, the order random.  Together: every update sees one
batch of each.  The shorter stream cycles; each pass over a stream is shuffled anew.

The cache (capacity C > 0, replacement p), in the words of the released slimIPL
recipe (mode 'fixed-pre-cache'): a list of C unlabelled batches.  An unlabelled
update trains on the next entry of a shuffled snapshot of the list and, with
probability p, puts the next batch of a shuffled pass over the unlabelled set in
its place.  New entries are labelled before the update, and used from the next
sweep on.  While the list is being filled there is no update to make: those
batches are labelled in the next update that there is, where the model is still
the same.

Source: Likhomanenko et al., "slimIPL", arXiv:2010.11524, and
flashlight/wav2letter recipes/slimIPL/src/Train.cpp.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Pairing:
    """What a method wants to see.

    Raises:
        ValueError: a value that no plan can be made of.
    """

    labelled: int = 1  # N_L, labelled updates of a block
    unlabelled: int = 0  # N_U, unlabelled updates of a block
    together: bool = False  # both in every update; N_L and N_U are 1 then
    warmup: int = 0  # M, labelled updates before the first unlabelled one
    capacity: int = 0  # C, batches in the cache; 0: none, an unlabelled batch comes unannounced
    replace: float = 0.1  # p, how likely a used entry is replaced

    def __post_init__(self) -> None:
        if min(self.labelled, self.unlabelled, self.warmup, self.capacity) < 0:
            raise ValueError(f"negative count in {self}")
        if self.labelled + self.unlabelled == 0:
            raise ValueError("labelled and unlabelled are both 0: there is nothing to train on")
        if not 0.0 <= self.replace <= 1.0:
            raise ValueError(f"replace is {self.replace}, it must lie in [0, 1]")
        if self.together and (self.labelled, self.unlabelled) != (1, 1):
            raise ValueError("together means one labelled and one unlabelled batch per update")


@dataclass(frozen=True)
class Step:
    """The batches of one update, as indices; None where the update has none of that kind."""

    labelled: int | None = None
    unlabelled: int | None = None
    fresh: tuple[int, ...] = ()  # unlabelled batches to be labelled before the update


def plan(pairing: Pairing, n_labelled: int, n_unlabelled: int, seed: int = 0) -> Iterator[Step]:
    """The steps of a run from its first update on, without end.

    Args:
        n_labelled: labelled batches of one pass.
        n_unlabelled: unlabelled batches of one pass.

    Raises:
        ValueError: the pairing asks for batches of a stream that has none.
    """
    if n_labelled == 0 and (pairing.labelled or pairing.warmup):
        raise ValueError("there is no labelled batch")
    if n_unlabelled == 0 and pairing.unlabelled:
        raise ValueError("there is no unlabelled batch")
    return _plan(pairing, n_labelled, n_unlabelled, seed)


def _plan(pairing, n_labelled, n_unlabelled, seed):
    labelled = _passes(n_labelled, f"labelled {seed}")
    for _ in range(pairing.warmup):
        yield Step(labelled=next(labelled))

    unlabelled = _unlabelled(pairing, n_unlabelled, seed)
    if pairing.together:
        for used, fresh in unlabelled:
            yield Step(next(labelled), used, fresh)
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
            used, new = next(unlabelled)
            fresh += new
            if used is not None:  # else the cache is being filled: no update of its own
                yield Step(unlabelled=used, fresh=fresh)
                fresh = ()


def _passes(n: int, seed: str) -> Iterator[int]:
    """Shuffled pass after shuffled pass over n batches."""
    random = Random(seed)
    while True:
        order = list(range(n))
        random.shuffle(order)
        yield from order


def _unlabelled(
    pairing: Pairing, n: int, seed: int
) -> Iterator[tuple[int | None, tuple[int, ...]]]:
    """For each unlabelled turn: the batch to train on, and the batches to label."""
    batches = _passes(n, f"unlabelled {seed}")
    if pairing.capacity == 0:
        for batch in batches:
            yield batch, ()

    random = Random(f"cache {seed}")
    cache = []
    for _ in range(pairing.capacity):
        cache.append(next(batches))
        yield None, (cache[-1],)
    while True:
        random.shuffle(cache)
        for place, used in enumerate(cache):  # what enters takes the place of what was just used
            if random.random() < pairing.replace:
                cache[place] = next(batches)
                yield used, (cache[place],)
            else:
                yield used, ()
