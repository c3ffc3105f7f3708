r"""What a transducer learns of a teacher's distributions at the nodes of the label's lattice.

With ŷ the teacher's label, T̃ its distributions at each node of the lattice of ŷ (a frame t and a
prefix of u labels) and S the student's,

    L = collapsed · Σ_{t,u} KL over {blank, ŷ_{u+1}, all others}
      + one_best · Σ_{nodes of the teacher's best path} KL over all tokens
      + full_lattice · Σ_{t,u} KL over all tokens

each a mean over utterances, in nats per utterance.  Both must have the same tokens and, of an
utterance, the same frames; of the best path, the student may be ``shift`` frames late.

What is remembered of a teacher: of ``collapsed`` three numbers a node, in half precision; of
``one_best`` the path and the likeliest tokens on it.  ``full_lattice`` needs the teacher itself:
its projections are remembered, from which its distributions are computed once more, beside the
student's.

Source: collapsed arXiv:2011.06110; the best path, and its shift, arXiv:2110.03334; all nodes is
what the former starts from.  See losses/lattice_distillation.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from espnet_pl.losses.lattice_distillation import (
    best_alignment,
    classes,
    collapsed,
    common_frames,
    full_lattice,
    one_best,
    path_targets,
)
from espnet_pl.losses.soft_labels import SoftLabels
from espnet_pl.losses.transducer import Lattices
from espnet_pl.parts.cache import Record
from espnet_pl.parts.objectives import Objectives, Summand, average


@dataclass(frozen=True)
class NodeObjectives(Objectives):
    """Settings; the weights are of the summands above."""

    collapsed: float = 0.0
    one_best: float = 0.0
    full_lattice: float = 0.0
    shift: int = 0  # frames; one_best only

    def __post_init__(self) -> None:
        for name in (*OF_NODES, "shift"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}, it must not be negative")
        super().__post_init__()

    @property
    def by_nodes(self) -> bool:
        """Whether teacher and student must be transducers with the same tokens and frames."""
        return any(getattr(self, name) for name in OF_NODES)

    @property
    def learns(self) -> bool:
        """Whether anything is learnt of a teacher."""
        return self.by_nodes or super().learns


OF_NODES = ("collapsed", "one_best", "full_lattice")
ON_PATH = ("t", "u", "log_p", "tokens", "log_rest")


@torch.no_grad()
def nodes_of(how: NodeObjectives, heard: Any, labels: list[list[int]]) -> list[Record]:
    """What must be known of a teacher's lattices to learn from them later.

    Args:
        heard: the utterances, as the teacher hears them (``methods.base.Heard``).
        labels: ŷ of each.
    """
    records: list[Record] = [{} for _ in labels]
    if not how.by_nodes:
        return records
    lattices = heard.lattices(labels)
    frames, lengths = lattices.frames, lattices.hyps.lengths
    sizes = list(zip(records, frames.tolist(), lengths.tolist()))
    if how.collapsed or how.one_best:
        planes = classes(lattices)
    if how.collapsed:
        for own, plane, (_, t, u) in zip(records, planes.unbind(1), sizes):
            own["classes"] = plane[:, : u + 1, :t].half().cpu()
    if how.one_best:
        t, u, arcs = best_alignment(planes, frames, lengths)
        target = path_targets(lattices, t, u, arcs, min(how.keep, len(lattices.joint.bias)))
        halves = target.log_p.half(), target.tokens.int(), target.log_rest.half()
        parts = (t.short(), u.short(), *halves)
        for name, rows in zip(ON_PATH, parts):
            for own, row, a in zip(records, rows.cpu(), arcs.tolist()):
                own[f"path_{name}"] = row[:a].clone()
    if how.full_lattice:
        ends = zip(sizes, lattices.encoded.cpu(), lattices.hyps.states.cpu())
        predicted = lattices.predicted.cpu()
        for (own, t, u), encoded, states in ends:
            own["encoded"] = encoded[:t].clone()
            own["predicted"] = predicted[states[: u + 1]]
    return records


def node_objective(
    how: NodeObjectives,
    heard: Any,
    labels: list[list[int]],
    records: Sequence[Mapping[str, Tensor]],
    max_labels: int,
    teacher: Any = None,
) -> dict[str, Summand]:
    """The student's loss at the nodes of the teacher's lattices, by name.

    Args:
        heard: the utterances, as the student hears them.
        max_labels: utterances with longer labels are left out, as are those with empty ones.
        teacher: the joint network of the teacher; ``full_lattice`` needs it.

    Raises:
        ValueError: the student has more or fewer frames than the teacher.
    """
    there = torch.tensor([0 < len(y) <= max_labels for y in labels])
    usable = [y if kept else [] for y, kept in zip(labels, there.tolist())]
    lattices = heard.lattices(usable)
    at = lattices.frames.device
    there = there.to(at)

    def agreed(theirs: list[int]) -> tuple[Tensor, Lattices]:
        """The frames that both have, none of utterances that are left out."""
        frames = _agree(lattices.frames, torch.tensor(theirs, device=at), there)
        return frames, replace(lattices, frames=frames)

    out = {}
    if how.collapsed:
        planes = [own["classes"] for own in records]
        frames, mine = agreed([x.shape[2] for x in planes])
        room = [max((x.shape[axis] for x in planes), default=0) for axis in (1, 2)]
        teachers = planes[0].new_full((3, len(planes), *room), -torch.inf)
        for row, x in zip(teachers.unbind(1), planes):
            row[:, : x.shape[1], : x.shape[2]] = x
        out["collapsed"] = collapsed(classes(mine), teachers.to(at), frames, mine.hyps.lengths)
    if how.one_best:
        t, u, log_p, tokens, log_rest = (
            _padded(records, f"path_{part}").to(at) for part in ON_PATH
        )
        arcs = torch.tensor([len(own["path_t"]) for own in records], device=at)
        lengths = torch.tensor([len(y) for y in labels], device=at)
        _, mine = agreed((arcs - lengths).tolist())
        arcs = arcs.where(there, 0)
        target = SoftLabels(log_p.float(), tokens.long(), log_rest.float(), arcs)
        out["one_best"] = one_best(mine, t.long(), u.long(), target, how.shift)
    if how.full_lattice:
        encoded = _padded(records, "encoded").to(at)
        frames, mine = agreed([len(own["encoded"]) for own in records])
        # One state after each prefix, as the student has.
        predicted = torch.cat([own["predicted"][: len(y) + 1] for own, y in zip(records, usable)])
        theirs = Lattices(teacher, encoded, frames, predicted.to(at), mine.hyps)
        out["full_lattice"] = full_lattice(mine, theirs)
    every = torch.ones(len(labels))
    return {
        f"pseudo_{name}": average(loss, getattr(how, name), every, there)
        for name, loss in out.items()
    }


def _agree(frames: Tensor, theirs: Tensor, there: Tensor) -> Tensor:
    """The frames that both have; none of utterances that are left out.

    Raises:
        ValueError: the numbers differ by more than rounding does.
    """
    try:
        return common_frames(frames.where(there, 0), theirs.where(there, 0))
    except ValueError as error:
        raise ValueError(
            f"{error} {', '.join(OF_NODES)} compare them node by node; hard, full_sum, "
            "discriminative, sequences and ranking do not"
        ) from None


def _padded(records: Sequence[Mapping[str, Tensor]], name: str) -> Tensor:
    rows = [own[name] for own in records]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
