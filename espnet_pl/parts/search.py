r"""The n best label sequences of frame distributions: a prefix search over all utterances at once.

    p(y|x) = Σ_{π ∈ B⁻¹(y)} Π_t p_t(π_t)

The probability of a prefix is kept in two parts, of alignments that end in a blank and of those
that do not; a frame adds a blank, repeats the last label, or says one of its likeliest tokens:

    p_b(y)  ← (p_b(y) + p_n(y)) · p_t(blank)
    p_n(y)  ← p_n(y) · p_t(last of y)
    p_n(yc) ← p_n(yc) + p_t(c) · ( p_b(y) if c is the last of y, else p_b(y) + p_n(y) )

and the likeliest prefixes go on.  Two of them that have become the same are one: they are known by
a number that is made of their labels.

Source: Graves, "Supervised Sequence Labelling with Recurrent Neural Networks", 2012, section 7.5.2;
Hannun et al., "First-Pass Large Vocabulary Continuous Speech Recognition using Bi-Directional
Recurrent DNNs", arXiv:1408.2873, algorithm 1.
Axes: n utterances, t frames, v vocabulary, k prefixes, m tokens of a frame.  Unit: nats.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from espnet_pl.parts.decoding import pad

ROOT, FACTOR = 1469598103934665603, 1099511628211  # of the FNV hash, here for whole tokens


class Proposal(NamedTuple):
    """A label sequence, and log p(labels|x)."""

    labels: list[int]
    log_p: float


def prefix_search(
    log_p: Float[Tensor, "n t v"],
    frames: Int[Tensor, " n"],
    beam: int,
    tokens: int = 20,
    blank: int = 0,
) -> list[list[Proposal]]:
    """The likeliest label sequences of each utterance, best first.

    Args:
        beam: prefixes that go on from each frame, and sequences that are returned at most.
        tokens: labels of a frame that are looked at, the likeliest ones.

    Returns:
        Different ones, fewer than ``beam`` if there are no more.  Their log p leaves out alignments
        that the search did not follow; with all tokens and a wide enough beam it is exact.
    """
    n, t, v = log_p.shape
    if beam < 1 or tokens < 1:
        raise ValueError(f"beam is {beam}, tokens is {tokens}: both must be at least 1")
    if not 0 <= blank < v:
        raise ValueError(f"blank is {blank}, the vocabulary has {v} tokens")
    log_p = log_p.detach().double()
    of_blank = log_p[:, :, blank]
    labels = log_p.index_fill(2, torch.tensor([blank], device=log_p.device), -torch.inf)
    likely, likeliest = labels.topk(min(tokens, v), dim=2)  # n t m

    never = log_p.new_full((n, beam), -torch.inf)
    ends_blank, ends_label = never.clone(), never.clone()
    ends_blank[:, 0] = 0.0
    name = torch.full((n, beam), ROOT, dtype=torch.long, device=log_p.device)
    last = torch.full_like(name, -1)
    # For each frame, which prefix each came from and what it added (−1: nothing).
    steps: list[tuple[Tensor, Tensor]] = []
    for i in range(t):
        going = (i < frames)[:, None]
        both = torch.logaddexp(ends_blank, ends_label)
        stay_blank = both + of_blank[:, i, None]
        repeat = log_p[:, i].gather(1, last.clamp(min=0)).masked_fill(last < 0, -torch.inf)
        stay_label = ends_label + repeat
        c = likeliest[:, i, None]  # n 1 m
        before = torch.where(c == last[:, :, None], ends_blank[:, :, None], both[:, :, None])
        say = before + likely[:, i, None]  # n k m
        new_name = (name[:, :, None] ^ (c + 1)) * FACTOR
        # A prefix that is in the beam already takes over what leads to it.
        same = (new_name.flatten(1)[:, :, None] == name[:, None]) & ~both.isneginf()[:, None]
        found = say.flatten(1)[:, :, None].masked_fill(~same, -torch.inf).logsumexp(1)
        stay_label = torch.logaddexp(stay_label, found)
        say = say.flatten(1).masked_fill(same.any(2), -torch.inf)

        score = torch.cat([torch.logaddexp(stay_blank, stay_label), say], 1)
        best = score.topk(beam, dim=1).indices  # n k
        stays = best < beam
        origin = torch.where(stays, best, (best - beam) // c.shape[2])
        added = c.expand(-1, beam, -1).flatten(1).gather(1, (best - beam).clamp(min=0))
        added = added.masked_fill(stays | ~going, -1)
        origin = torch.where(going, origin, torch.arange(beam, device=best.device))
        steps.append((origin, added))
        nothing = torch.full_like(say, -torch.inf)
        ends_blank = torch.where(
            going, torch.cat([stay_blank, nothing], 1).gather(1, best), ends_blank
        )
        ends_label = torch.where(going, torch.cat([stay_label, say], 1).gather(1, best), ends_label)
        names = torch.cat([name, new_name.flatten(1)], 1).gather(1, best)
        name = torch.where(going, names, name)
        last = torch.where(added >= 0, added, last.gather(1, origin))
    return _read(torch.logaddexp(ends_blank, ends_label), steps)


def flat(
    proposals: Sequence[Sequence[Proposal]], device: torch.device | str = "cpu"
) -> tuple[Int[Tensor, "k u"], Int[Tensor, " k"], Int[Tensor, " k"]]:
    """All label sequences in a row, padded, their lengths, and whose they are."""
    text, lengths = pad([p.labels for own in proposals for p in own], device)
    sizes = torch.tensor([len(own) for own in proposals], device=device)
    return text, lengths, torch.arange(len(proposals), device=device).repeat_interleave(sizes)


def rank(
    proposals: Sequence[Sequence[Proposal]], log_p: Float[Tensor, " k"]
) -> list[list[Proposal]]:
    """The same with other scores, those of ``flat``'s order, and in the order of these."""
    scores = iter(log_p.tolist())
    own = [[Proposal(p.labels, next(scores)) for p in several] for several in proposals]
    return [sorted(several, key=lambda p: -p.log_p) for several in own]


def _read(log_p, steps) -> list[list[Proposal]]:
    """Follow each prefix back through the frames."""
    order = log_p.argsort(dim=1, descending=True)
    place, said = order, []
    for origin, added in reversed(steps):
        said.append(added.gather(1, place))
        place = origin.gather(1, place)
    shape = (*order.shape, 0)
    said = torch.stack(said[::-1], 2).tolist() if said else order.new_zeros(shape).tolist()
    values = log_p.gather(1, order).tolist()
    return [
        [
            Proposal([c for c in row if c >= 0], value)
            for row, value in zip(rows, own)
            if value > -torch.inf
        ]
        for rows, own in zip(said, values)
    ]
