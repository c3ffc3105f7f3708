r"""Frame labels: which unit of speech a teacher hears in each frame, as records and as tensors.

A path π says a token or the blank in each frame of the teacher: the likeliest alignment of its
likeliest hypothesis to its CTC layer (``alignment``), or the likeliest of each frame (``argmax``).
Both are the same if the hypothesis is the greedy one.  What is kept are the runs of π.  From them
come the units: a token (``order`` 1), or a token with the one said before it (2), which is what
letters are in context; of v tokens there are v + 1 and (v + 1)² of them, the blank being the 0-th
and the first token's left neighbour.

Or the units are clusters of the teacher's features (``clusters``, parts/clusters.py): a path says
one in each frame, and never the blank.

The blank of CTC is no silence: a token is said in a frame or two, and lasts longer.  So a token
lasts from its first frame to that of the next one, or to the end (``blank: spread``); the frames
before the first token have no label.  Otherwise frames of the blank have none (``drop``), or the
blank is a unit like others (``keep``).

A frame without a label has −1.  Where a student has other frames than its teacher, each of its
frames has the label that the teacher gives at the same time.

Axes: n utterances, t frames, r runs, s segments.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from espnet_pl.losses.ctc import best_alignment, feasible
from espnet_pl.parts.cache import Record
from espnet_pl.parts.clusters import nearest
from espnet_pl.parts.decoding import pad
from espnet_pl.parts.search import flat


@dataclass(frozen=True)
class FrameLabels:
    """Settings; ``units``, ``beam`` and ``clusters`` change what a teacher is asked."""

    units: Literal["alignment", "argmax", "clusters"] = "alignment"
    beam: int = 8  # hypotheses, of which the likeliest is aligned
    clusters: int = 200  # how many, where they are the units
    order: Literal[1, 2] = 1
    blank: Literal["spread", "drop", "keep"] = "spread"

    def __post_init__(self) -> None:
        for name in ("beam", "clusters"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be at least 1")

    @property
    def asked(self) -> dict[str, Any]:
        """What records depend on, in JSON."""
        depends = {"alignment": ["beam"], "argmax": [], "clusters": ["clusters"]}[self.units]
        return {name: getattr(self, name) for name in ["units", *depends]}

    def said(self, tokens: int) -> int:
        """How many things a path may say: of so many tokens, the blank among them, or clusters."""
        return self.clusters if self.units == "clusters" else tokens

    def number_of_units(self, tokens: int) -> int:
        """Labels are below it."""
        return (self.said(tokens) + 1) ** self.order


@torch.no_grad()
def record(how: FrameLabels, heard: Any, blank: int, centres: Tensor | None = None) -> list[Record]:
    """The runs of the teacher's path: ``labels`` (r), −1 for blanks, and ``lengths`` (r), frames.

    Args:
        heard: the utterances, as the teacher hears them (``methods.base.Heard``).
        centres: of the clusters, where they are the units.
    """
    if how.units == "clusters":
        features, frames = heard.features()
        return _runs(nearest(features, centres), frames)
    log_p, frames = heard.frame_log_probs()
    if how.units == "argmax":
        path = log_p.argmax(2)
    else:
        found = heard.propose(how.beam)
        text, lengths, of = flat(found, log_p.device)
        fits = feasible(frames[of], text, lengths)  # a transducer may say more in a frame than one
        first: dict[int, list[int]] = {}
        for i, fit, proposal in zip(of.tolist(), fits.tolist(), itertools.chain(*found)):
            if fit:
                first.setdefault(i, proposal.labels)
        labels = [first.get(i, []) for i in range(len(found))]
        path = best_alignment(log_p, frames, *pad(labels, log_p.device), blank)
    return _runs(path.masked_fill(path == blank, -1), frames)


def _runs(path: Int[Tensor, "n t"], frames: Int[Tensor, " n"]) -> list[Record]:
    path = path.to("cpu", torch.int32)
    runs = [
        torch.unique_consecutive(own[:t], return_counts=True)
        for own, t in zip(path, frames.tolist())
    ]
    return [{"labels": labels, "lengths": n.to(torch.int32)} for labels, n in runs]


def unit_of_each_run(how: FrameLabels, record: Record, tokens: int) -> Int[Tensor, " r"]:
    """What is said in each run of a record; −1 where nothing is.

    Args:
        tokens: how many the teacher has.
    """
    path = record["labels"].long()
    said = path >= 0
    units = torch.where(said, path + 1, 0 if how.blank == "keep" else -1)
    if how.order == 2:
        left = torch.nn.functional.pad(path[said][:-1], (1, 0), value=-1)
        units[said] += (left[: int(said.sum())] + 1) * (how.said(tokens) + 1)
    if how.blank == "spread":
        runs = torch.arange(len(path))
        last = torch.where(said, runs, -1).cummax(0).values
        units = torch.where(last >= 0, units[last], -1)
    return units


def frame_labels(
    how: FrameLabels, records: Sequence[Record], tokens: int, frames: Int[Tensor, " n"]
) -> Int[Tensor, "n t"]:
    """The labels of a student's frames, −1 behind the valid ones.

    Args:
        tokens: how many the teacher has.
        frames: of the student; each record has those of the teacher.
    """
    labels = torch.full((len(records), max([0, *frames.tolist()])), -1)
    for row, own, t in zip(labels, records, frames.tolist()):
        teacher = unit_of_each_run(how, own, tokens).repeat_interleave(own["lengths"].long())
        if len(teacher):
            middle = (2 * torch.arange(t) + 1) * len(teacher)  # in halves of a frame, times t
            row[:t] = teacher[middle // (2 * t)]
    return labels


def draw_of_segments(labels: Int[Tensor, "n t"]) -> tuple[Int[Tensor, " s"], Int[Tensor, " s"]]:
    """One frame of each segment, at random: its utterance and its place.

    A segment is a maximal run of frames of an utterance that have the same label.
    """
    n, t = labels.shape
    begins = torch.ones_like(labels, dtype=torch.bool)
    begins[:, 1:] = labels[:, 1:] != labels[:, :-1]
    begin = begins.flatten().nonzero()[:, 0]  # frames of all utterances, one behind the other
    length = torch.diff(begin, append=begin.new_tensor([n * t]))
    there = labels.flatten()[begin] >= 0
    begin, length = begin[there], length[there]
    place = begin + (torch.rand(len(begin)) * length).long().clamp(max=length - 1)
    return place // max(t, 1), place % max(t, 1)
