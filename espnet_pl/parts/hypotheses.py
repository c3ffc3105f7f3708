"""Several label sequences of an utterance, and what a teacher thinks of each, as records."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from espnet_pl.parts.cache import Record
from espnet_pl.parts.decoding import collapse
from espnet_pl.parts.search import Proposal


def possible(
    found: Sequence[Sequence[Proposal]],
) -> tuple[list[list[Proposal]], Int[Tensor, "n 2"]]:
    """Those that say something, with a score; and of how many each is not true."""
    good = [[p for p in own if p.labels and math.isfinite(p.log_p)] for own in found]
    empty = [sum(not p.labels for p in own) for own in found]
    of_no_score = [len(own) - len(kept) - n for own, kept, n in zip(found, good, empty)]
    return good, torch.tensor([empty, of_no_score], dtype=torch.long).T


def draw(
    log_p: Float[Tensor, "n t v"], frames: Int[Tensor, " n"], temperature: float, blank: int
) -> list[list[int]]:
    """A label sequence of each utterance, by a token drawn in each frame."""
    p = (log_p / temperature).softmax(2)
    path = torch.multinomial(p.flatten(0, 1), 1).view(p.shape[:2]) if p.numel() else p[..., 0]
    return [collapse(row[:t].long(), blank) for row, t in zip(path.cpu(), frames.tolist())]


def draw_several(
    log_p: Float[Tensor, "n t v"],
    frames: Int[Tensor, " n"],
    temperature: float,
    blank: int,
    several: int,
) -> list[list[Proposal]]:
    """Label sequences that are drawn, each with the logarithm of how often it was."""
    drawn = [draw(log_p, frames, temperature, blank) for _ in range(several)]
    return [
        [
            Proposal(list(y), math.log(own.count(list(y))))
            for y in sorted(set(map(tuple, own)) - {()})
        ]
        for own in zip(*drawn)
    ]


def likeliest(records: Sequence[Record]) -> list[list[int]]:
    """The first hypothesis of each utterance; nothing where there is none."""
    first = ((own["labels"][:1], own["lengths"][:1].tolist()) for own in records)
    return [y[0, : length[0]].tolist() if length else [] for y, length in first]


def shuffled(log_w: Float[Tensor, " k"], of: Int[Tensor, " k"]) -> Float[Tensor, " k"]:
    """The same opinions, of other hypotheses of the same utterance."""
    order = torch.randperm(len(of))
    return log_w[order[of[order].argsort(stable=True)]]


def usable(
    records: Sequence[Record], max_labels: int
) -> tuple[list[list[int]], Float[Tensor, " k"], Int[Tensor, " k"]]:
    """The hypotheses of all utterances that are not too long, log w of each, and whose they are."""
    flat, log_w, of = [], [torch.zeros(0)], []
    for i, own in enumerate(records):
        short = own["lengths"] <= max_labels
        for row, length in zip(own["labels"][short], own["lengths"][short].tolist()):
            flat.append(row[:length].tolist())
            of.append(i)
        log_w.append(own["log_w"][short])
    return flat, torch.cat(log_w), torch.tensor(of, dtype=torch.long)
