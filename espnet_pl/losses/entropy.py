r"""Entropies of a student's frame distributions, as terms of an objective.

    frame entropy   L(x) = Σ_t H(q_t)               a penalty: frames shall have an opinion
    token entropy   H(m),  m = (1/T) Σ_t q_t        a bonus: not everywhere the same one

with q_t the distribution over tokens and blank in frame t, T the valid frames of all utterances,
and H(q) = −Σ_v q(v) log q(v).  A penalty of the first pulls each frame to one token, and the same
in all is as good to it as any other; a bonus of the second pulls the other way.

Source: the first is entropy minimisation (Grandvalet and Bengio, "Semi-supervised Learning by
Entropy Minimization", NIPS 2004); both together are the mutual information of frame and token
(Krause, Perona, Gomes, "Discriminative Clustering by Regularized Information Maximization", NIPS
2010, equation 3).  That they are what arXiv:2211.06007 means by regularisation is not known: of it
only the abstract was read.
Axes: n utterances, t frames, v vocabulary.  Unit: nats.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor


def frame_entropy(log_p: Float[Tensor, "n t v"], frames: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Σ_t H(q_t) of each utterance, in float32 at least; 0 without any frame.

    Args:
        log_p: log-softmax over the last axis.
        frames: valid frames; what lies behind them is ignored.
    """
    log_p, valid = _exact(log_p), _valid(log_p, frames)
    entropy = -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(2)
    return torch.where(valid, entropy, 0.0).sum(1)


def token_entropy(
    log_p: Float[Tensor, "n t v"],
    frames: Int[Tensor, " n"],
    total: Callable[[Tensor], Tensor] = lambda x: x,
) -> Float[Tensor, ""]:
    """H of the mean distribution of all valid frames, in float32 at least; 0 without any frame.

    Args:
        total: from a sum over these utterances to that over more, which others have.
    """
    log_p, valid = _exact(log_p), _valid(log_p, frames)
    said = torch.where(valid[:, :, None], log_p.exp(), 0.0).sum((0, 1))
    mean = total(said) / total(valid.sum()).clamp(min=1)
    return -(mean * mean.clamp(min=torch.finfo(mean.dtype).tiny).log()).sum()


def _exact(log_p):
    return log_p.to(torch.promote_types(log_p.dtype, torch.float32))


def _valid(log_p, frames):
    return torch.arange(log_p.shape[1], device=log_p.device) < frames[:, None]
