r"""What a recogniser's frame distributions look like, without knowing the truth.

With p_t the distribution over v tokens in frame t, T valid frames in all, and
m = (1/T) Σ_t p_t the mean distribution,

    blank share     (1/T) · #{t : argmax_k p_t(k) = blank}
    frame entropy   (1/T) · Σ_t H(p_t)
    token entropy   H(m)

A degenerate recogniser shows here first: the blank share runs to 1 (nothing is
said any more) or to 0, frames become flat (frame entropy grows) or the same
token is said everywhere (token entropy falls).

Source: the degenerate solutions of continuous pseudo-labelling, arXiv:2211.06007;
H is Shannon's entropy.
Axes: n utterances, t frames, v vocabulary.  Unit: nats (shares: 0 to 1).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class FrameStatistics(NamedTuple):
    """Averages over all valid frames of a batch; scalars, detached."""

    blank_share: Tensor
    frame_entropy: Tensor
    token_entropy: Tensor


@torch.no_grad()
def frame_statistics(
    log_p: Float[Tensor, "n t v"], frames: Int[Tensor, " n"], blank: int = 0
) -> FrameStatistics:
    """Blank share, mean frame entropy and entropy of the mean token distribution.

    A batch without any valid frame has statistics 0.
    """
    valid = torch.arange(log_p.shape[1], device=log_p.device) < frames[:, None]
    log_p = log_p[valid].float()  # n t v → T v
    count = max(len(log_p), 1)
    mean = log_p.exp().sum(dim=0) / count
    return FrameStatistics(
        blank_share=(log_p.argmax(dim=-1) == blank).sum() / count,
        frame_entropy=torch.special.entr(log_p.exp()).sum() / count,
        token_entropy=torch.special.entr(mean).sum(),
    )
