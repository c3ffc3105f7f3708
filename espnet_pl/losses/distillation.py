r"""What a teacher thinks of several hypotheses, as a target.

A teacher gives each hypothesis y_k of an utterance a full sum log P_T(y_k|x); among the hypotheses
H of that utterance its opinion is

    w_k = P_T(y_k|x)^κ / Σ_{j ∈ H} P_T(y_j|x)^κ

and a student with log P_S(y_k|x) learns it by

    cross_entropy   L(x) = − Σ_k w_k log P_S(y_k|x)                       say what is likely
    ranking         L(x) = Σ_k w_k log( w_k / v_k ),   v from P_S, as w   prefer what is likelier

The first is the Kullback-Leibler divergence of P_S from the teacher's distribution over sequences,
cut to H, less a constant; with one hypothesis, the loss on a hard label.  The second compares the
distributions over H only: it is 0 if the student prefers as the teacher does, whatever probability
it gives to all of H.  Its gradient with respect to log P_S(y_k|x) is κ (v_k − w_k).

Source: the first is sequence-level knowledge distillation (Kim and Rush, arXiv:1606.07947,
section 3.2) with a beam's hypotheses in place of its best one; the second is theirs of the
n-best list in arXiv:2303.05958 (abstract) as a divergence.
Axes: n utterances, k hypotheses of all utterances.  Unit: nats per utterance.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def posterior(
    log_p: Float[Tensor, " k"], utterance: Int[Tensor, " k"], n: int, scale: float = 1.0
) -> Float[Tensor, " k"]:
    """log w of each hypothesis among those of its utterance; with gradient.

    Args:
        log_p: full sums; −inf has no share, also where no other has any.
        utterance: whose hypothesis each one is, from 0 to n − 1.
        scale: κ, at least 0: 0 makes all alike that are possible, large ones prefer the best.
    """
    if not 0 <= scale < float("inf"):
        raise ValueError(f"scale is {scale}, must be a number that is not negative")
    possible = ~log_p.isneginf()
    scaled = scale * torch.where(possible, log_p, 0.0)
    most = scaled.new_full((n,), -torch.inf)
    most = most.scatter_reduce(0, utterance, scaled.detach().where(possible, -torch.inf), "amax")
    shifted = scaled - most.where(most.isfinite(), 0.0)[utterance]
    mass = torch.where(possible, shifted.exp(), 0.0)
    total = mass.new_zeros(n).index_add(0, utterance, mass)
    return torch.where(possible, shifted - total[utterance].clamp(min=1.0).log(), -torch.inf)


def cross_entropy(
    log_w: Float[Tensor, " k"], log_p: Float[Tensor, " k"], utterance: Int[Tensor, " k"], n: int
) -> Float[Tensor, " n"]:
    """− Σ_k w_k log P_S(y_k|x) of each utterance; 0 without a hypothesis.

    Args:
        log_w: the teacher's, from ``posterior``; no gradient goes there.
        log_p: the student's full sums; infinite loss if one is impossible that has weight.
    """
    return -_expected(log_w.detach(), log_p, utterance, n)


def ranking(
    log_w: Float[Tensor, " k"],
    log_p: Float[Tensor, " k"],
    utterance: Int[Tensor, " k"],
    n: int,
    scale: float = 1.0,
) -> Float[Tensor, " n"]:
    """Σ_k w_k log(w_k / v_k) of each utterance; 0 without a hypothesis, or with one only.

    Args:
        log_w: the teacher's, from ``posterior`` with the same scale; no gradient goes there.
        log_p: the student's full sums.
        scale: κ.
    """
    log_w = log_w.detach()
    log_v = posterior(log_p, utterance, n, scale)
    difference = torch.where(log_w.isneginf(), 0.0, log_w) - log_v
    return _expected(log_w, difference, utterance, n)


def _expected(log_w, values, utterance, n):
    """Σ_k w_k times the value of k; an infinite one without weight counts for nothing."""
    weighted = log_w.exp() * torch.where(log_w.isneginf(), 0.0, values)
    return weighted.new_zeros(n).index_add(0, utterance, weighted)
