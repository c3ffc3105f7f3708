r"""Has a student collapsed?  Asked of what it says itself; no truth is needed.

Pseudo-labels can teach a student to say one token in every frame, nothing at all, or the same words
again and again.  What `parts/pseudo_labels.student_statistics` tells of each batch is smoothed,

    s_k ← s_k + (x_k − s_k) / 20,

and compared with its mean over the first updates that told of it, when all was well.  A student
that begins from nothing has not been well before it says something: until its length ratio is 0.5,
nothing counts as usual.  An alarm is raised when a quantity has been outside of its limits for so
many updates in a row:

    blank share      more than 0.06 above what was usual, or more than 0.12 below it
    frame entropy    more than 0.3 nats above it
    token entropy    less than half of it
    length ratio     less than 0.7 or more than 1.4 times as much
    loops            more than 0.15 above it
    label churn      more than 0.6 edits per token of the label that is replaced, and half of what
                     was usual: labels that are drawn at random differ each time

The limits were set after a look at single runs of four cells of fsdd (soft and hard labels, ten
unlabelled updates to a labelled one and none labelled).  Three were widened after they had raised
an alarm in runs that were well: the lower one of the blank, for soft labels broaden what is said;
that of the churn, for drawn labels; and when learning begins, for runs without a seed.  What they
find since is in docs/studies/soft_pl.md.
Source: the quantities are those of arXiv:2211.06007 (abstract: 'a degenerate token distribution per
frame') and of what else was seen to go wrong; the limits are ours.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from espnet_pl.parts.ranks import total

SMOOTHING = 20  # unlabelled updates
SPEAKS = 0.5  # length ratio from which on a student can be well
# Of each quantity: more than a + b · usual, or less than c + d · usual, is outside.
NEVER = float("inf")
LIMITS = {
    "student_blank_share": (0.06, 1.0, -0.12, 1.0),
    "student_frame_entropy": (0.3, 1.0, -NEVER, 0.0),
    "student_token_entropy": (NEVER, 0.0, 0.0, 0.5),
    "student_length_ratio": (0.0, 1.4, 0.0, 0.7),
    "student_loops": (0.15, 1.0, -NEVER, 0.0),
    "label_churn": (0.6, 0.5, -NEVER, 0.0),
}
LENGTH_RATIO = [*LIMITS].index("student_length_ratio")


class Monitor(nn.Module):
    """Sees the statistics of every unlabelled update; all ranks of a job see their mean.

    Args:
        learn: unlabelled updates from which it learns what is usual, of each quantity.
        patience: unlabelled updates in a row outside of the limits that make an alarm.
    """

    def __init__(self, learn: int = 50, patience: int = 25) -> None:
        super().__init__()
        if learn < 1 or patience < 1:
            raise ValueError(f"learn is {learn}, patience is {patience}: both must be at least 1")
        self.learn, self.patience = learn, patience
        none = torch.zeros(len(LIMITS), dtype=torch.float64)
        self.register_buffer("seen", none.long())  # values of each quantity
        self.register_buffer("usual", none.clone())
        self.register_buffer("smooth", none.clone())
        self.register_buffer("outside", none.long())
        limits = torch.tensor([*LIMITS.values()], dtype=torch.float64)
        self.register_buffer("limits", limits, persistent=False)

    @property
    def healthy(self) -> bool:
        """Whether what is usual is known and nothing is outside of it."""
        return bool(self.seen.max() >= self.learn) and not bool(self.outside.any())

    def see(self, values: Mapping[str, float]) -> str | None:
        """Take in one unlabelled update; in the one that raises an alarm, what is wrong, in words.

        Args:
            values: statistics by name; one that is missing is as usual.
        """
        x = self._of_all_ranks(values)
        known = ~x.isnan()
        if x[LENGTH_RATIO] < SPEAKS:  # no, if it is not known
            known &= self.seen >= self.learn
            self.seen.masked_fill_(self.seen < self.learn, 0)  # what was said before was babble
        self.seen += known
        learning = self.seen <= self.learn
        self.usual += torch.where(known & learning, x - self.usual, 0.0) / self.seen.clamp(min=1)
        step = torch.where(known, x - self.smooth, 0.0) / SMOOTHING
        self.smooth.copy_(torch.where(learning, self.usual, self.smooth + step))
        above, more, below, less = self.limits.unbind(1)
        high, low = above + more * self.usual, below + less * self.usual
        out = ~learning & ((self.smooth > high) | (self.smooth < low))
        self.outside.copy_(torch.where(known, torch.where(out, self.outside + 1, 0), self.outside))
        raised = (known & (self.outside == self.patience)).nonzero()[:, 0].tolist()
        if not raised:
            return None
        names = list(LIMITS)
        return "; ".join(
            f"{names[i]} is {self.smooth[i]:.2f}, it was {self.usual[i]:.2f}, "
            f"for {self.patience} unlabelled updates outside of "
            f"[{max(float(low[i]), 0.0):.2f}, {float(high[i]):.2f}]"
            for i in raised
        )

    def forgive(self) -> None:
        """Begin again from what was usual: the student has been put back."""
        self.smooth.copy_(self.usual)
        self.outside.zero_()

    def _of_all_ranks(self, values: Mapping[str, float]) -> Tensor:
        x = self.usual.new_tensor([values.get(name, torch.nan) for name in LIMITS])
        known = ~x.isnan()
        both = total(torch.stack([torch.where(known, x, 0.0), known.to(x)]))
        return both[0] / both[1]  # NaN where no rank knows
