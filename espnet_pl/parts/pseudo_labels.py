r"""Hard pseudo-labels: what a teacher says, and the student's loss on it.

    ŷ = greedy(teacher, weak(x)),    L = − (1/|K|) Σ_{x ∈ K} log p_θ(ŷ|strong(x))

K are the utterances whose label can be trained on.  Not in K: an empty label
(its loss −Σ_t log p(blank) teaches silence), a label longer than a limit (a
looping teacher), a label that no alignment of the student can produce.  They
are dropped and counted, never clipped.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor, nn

from espnet_pl.losses.diagnostics import FrameStatistics, frame_statistics
from espnet_pl.parts.cache import PseudoLabelCache
from espnet_pl.parts.decoding import consensus, greedy
from espnet_pl.parts.teacher import weak_view


class Labels(NamedTuple):
    """One label sequence per utterance, and what the teacher's frames looked like."""

    labels: list[list[int]]
    statistics: FrameStatistics


def propose(teacher: nn.Module, x: Any) -> Labels:
    """The teacher's greedy labels of x in the weak view; leaves the teacher's modes as they are."""
    with weak_view(teacher):
        log_p, frames = teacher.frame_log_probs(x)
    return Labels(
        greedy(log_p, frames, teacher.blank), frame_statistics(log_p, frames, teacher.blank)
    )


def agree(views: Sequence[Labels], others: Sequence[list[list[int]]] = ()) -> Labels:
    """The consensus, utterance by utterance.

    Args:
        views: a teacher's labels in each view; the statistics are their mean.
        others: labels of the same utterances by other teachers.
    """
    if len(views) == 1 and not others:
        return views[0]
    several = zip(*(view.labels for view in views), *others)
    statistics = zip(*(view.statistics for view in views))
    return Labels(
        [consensus(labels) for labels in several],
        FrameStatistics(*(torch.stack(values).mean() for values in statistics)),
    )


class PseudoLoss(NamedTuple):
    """The mean loss over the kept utterances; ``dropped``: shares of all, by reason."""

    loss: Tensor  # scalar, 0 and on the graph if nothing was kept
    kept: int
    dropped: dict[str, float]


def pseudo_loss(student: nn.Module, x: Any, labels: list[list[int]], max_labels: int) -> PseudoLoss:
    """The student's loss on pseudo-labels of x, in the view of its present mode.

    Args:
        max_labels: a label with more tokens is dropped.

    Raises:
        ValueError: as many labels as utterances are needed.
    """
    if len(labels) != len(x):
        raise ValueError(f"{len(labels)} labels for {len(x)} utterances")
    too_long = [len(y) > max_labels for y in labels]
    # A dropped utterance is scored with an empty label, which costs no memory, and then
    # masked: the loss stays on the graph even if nothing is kept.
    usable = [[] if long else y for y, long in zip(labels, too_long)]
    score = student.score(x, usable)
    said = torch.tensor([bool(y) for y in usable], device=score.device)
    keep = said & ~score.isneginf()  # a NaN is not hidden: the trainer skips such a step
    kept = int(keep.sum())
    dropped = {
        "empty": sum(not y for y in labels),
        "too_long": sum(too_long),
        "infeasible": int(said.sum()) - kept,
    }
    return PseudoLoss(
        loss=-torch.where(keep, score, torch.zeros_like(score)).sum() / max(kept, 1),
        kept=kept,
        dropped={f"labels_{why}": count / len(labels) for why, count in dropped.items()},
    )


def label_statistics(
    x: Any,
    made: Labels,
    before: PseudoLabelCache,
    truth: Mapping[str, list[int]],
) -> dict[str, float]:
    """What new labels of x look like.

    Args:
        before: labels made earlier; those of the same utterances give the churn,
            edits between old and new label per old token.
        truth: held-back labels by utterance id; where there are some they give the label
            error rate.

    Returns:
        Shares and entropies by name; churn and error rate only where they are defined.
    """
    values = {name: value.item() for name, value in made.statistics._asdict().items()}
    new = dict(zip(x.utt_id, made.labels))
    again = [i for i in new if i in before]
    if again:
        old = [before.get(i) for i in again]
        values["label_churn"] = label_error_rate([new[i] for i in again], old)
    known = [i for i in new if i in truth]
    if known:
        values["label_error_rate"] = label_error_rate(
            [new[i] for i in known], [truth[i] for i in known]
        )
    return values


def label_error_rate(labels: list[list[int]], truth: list[list[int]]) -> float:
    """Edits per true token, summed over the utterances before dividing; 0 without any token."""
    edits = sum(Levenshtein.distance(y, t) for y, t in zip(labels, truth))
    return edits / max(sum(map(len, truth)), 1)
