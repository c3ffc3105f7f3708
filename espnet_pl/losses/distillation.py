r"""What a teacher thinks of several hypotheses, as a target.

A teacher gives each hypothesis y_k of an utterance a full sum log P_T(y_k|x); among the hypotheses
H of that utterance its opinion is

    w_k = P_T(y_k|x)^κ / Σ_{j ∈ H} P_T(y_j|x)^κ

and a student with log P_S(y_k|x) learns it by

    cross_entropy   L(x) = − Σ_k w_k log P_S(y_k|x)                       say what is likely
    ranking         L(x) = Σ_k w_k log( w_k / v_k ),   v from P_S, as w   prefer what is likelier
    reversed        L(x) = Σ_k v_k log( v_k / w_k )                       avoid what is unlikely
    discriminative  L(x) = Σ_k | log w_k − log v_k |                      the same, likely or not
    distance        L(y_k) = D( log P_S(y_k|x) − log P_T(y_k|x) )         be as sure as the teacher

The first is the Kullback-Leibler divergence of P_S from the teacher's distribution over sequences,
cut to H, less a constant; with one hypothesis, the loss on a hard label.  The second compares the
distributions over H only: it is 0 if the student prefers as the teacher does, whatever probability
it gives to all of H.  Its gradient with respect to log P_S(y_k|x) is κ (v_k − w_k).  ``reversed``
is 0 there, too; its gradient is κ v_k ( log(v_k / w_k) − L ), so a student that is sure of one
hypothesis learns little of the others.  ``discriminative`` does as the second does, but an unlikely
hypothesis counts as much as a likely one; its gradient is κ (s_k − v_k Σ_j s_j) with
s_k = sign( log v_k − log w_k ).

The last is full-sum distillation: of the teacher it needs one number, and neither its frames nor
its alignments.  With d for the difference, D and its gradient with respect to log P_S(y_k|x) are

    l1        |d|                                               sign(d)
    squared   d²                                                2 d
    huber     d²/2 if |d| ≤ δ, else δ (|d| − δ/2)               d, cut to [−δ, δ]

l1 with a student less sure than its teacher has the gradient of a hard label, − log P_S(y_k|x); of
a student that is surer, the opposite of it.  squared is l1 times 2 |d|, and |d| may be hundreds of
nats when training begins; 2 · huber is squared for δ → ∞, huber / δ is l1 for δ → 0.

Source: the first is sequence-level knowledge distillation (Kim and Rush, arXiv:1606.07947,
section 3.2) with a beam's hypotheses in place of its best one.  The others are Zeineldeen et al.,
"Robust Knowledge Distillation from RNN-T Models With Noisy Training Labels Using Full-Sum Loss",
arXiv:2303.05958, of which only the abstract was read: it distils the probability of the sequence,
and in a variant the teacher's "sequence discriminative knowledge".  Which D it takes, and how it
writes the variant, is not verified: the three forms of D are ours, and so are the others.
Axes: n utterances, k hypotheses of all utterances.  Unit: nats per utterance; that of ``distance``,
nats per hypothesis, or their squares.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import huber_loss


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


def reversed_ranking(
    log_w: Float[Tensor, " k"],
    log_p: Float[Tensor, " k"],
    utterance: Int[Tensor, " k"],
    n: int,
    scale: float = 1.0,
) -> Float[Tensor, " n"]:
    """Σ_k v_k log(v_k / w_k) of each utterance; 0 without a hypothesis, or with one only.

    Args:
        log_w: the teacher's, from ``posterior``; no gradient goes there.
        log_p: the student's full sums.  H is without what either of both deems impossible: such a
            hypothesis costs nothing, and w and v are shared out among the others.
        scale: κ, of v.
    """
    log_w, log_v = _of_both(log_w.detach(), log_p, utterance, n, scale)
    ratio = log_v - torch.where(log_w.isneginf(), 0.0, log_w)
    return _expected(log_v, ratio, utterance, n)


def discriminative(
    log_w: Float[Tensor, " k"],
    log_p: Float[Tensor, " k"],
    utterance: Int[Tensor, " k"],
    n: int,
    scale: float = 1.0,
) -> Float[Tensor, " n"]:
    """Σ_k |log w_k − log v_k| of each utterance; 0 without a hypothesis, or with one only.

    Args:
        log_w: the teacher's, from ``posterior`` with the same scale; no gradient goes there.
        log_p: the student's full sums.  H is without what either of both deems impossible: such a
            hypothesis costs nothing, and w and v are shared out among the others.
        scale: κ.

    What is not a number, of teacher or student, makes its utterance's loss so.
    """
    log_w, log_v = _of_both(log_w.detach(), log_p, utterance, n, scale)
    size = torch.where(log_v.isneginf(), 0.0, log_w - log_v).abs()
    return size.new_zeros(n).index_add(0, utterance, size)


def distance(
    log_p: Float[Tensor, " k"],
    teacher: Float[Tensor, " k"],
    kind: str = "l1",
    *,
    delta: float = 1.0,
    lengths: Int[Tensor, " k"] | None = None,
) -> Float[Tensor, " k"]:
    """D(log P_S(y_k|x) − log P_T(y_k|x)) of each hypothesis.

    Args:
        log_p: the student's full sums.
        teacher: the teacher's, of the same hypotheses; no gradient goes there.
        kind: D: ``l1``, ``squared``, or ``huber``.
        delta: δ in nats, positive.
        lengths: labels of each hypothesis, at least 1: the difference is divided by it before D
            is taken.

    A hypothesis costs 0, with a gradient of 0, if one of its scores is not finite: count those, and
    leave them out of a mean.  But what is not a number in the student's scores comes out as such.
    """
    if kind not in ("l1", "squared", "huber") or not 0 < delta < float("inf"):
        raise ValueError(
            f"kind is {kind!r}, delta is {delta}: they must be l1, squared, or huber, and a "
            "positive number"
        )
    if lengths is not None and lengths.numel() and int(lengths.min()) < 1:
        raise ValueError(f"lengths {lengths.tolist()}: a hypothesis without labels has no mean")
    comparable = log_p.isnan() | (log_p.isfinite() & teacher.isfinite())
    difference = torch.where(comparable, log_p - teacher.detach(), 0.0)
    if lengths is not None:
        difference = difference / lengths
    if kind == "huber":
        nothing = torch.zeros_like(difference)
        return huber_loss(difference, nothing, reduction="none", delta=delta)
    return difference.abs() if kind == "l1" else difference.square()


def _of_both(log_w, log_p, utterance, n, scale):
    """log w and log v among what both deem possible; −inf elsewhere."""
    possible = ~(log_w + log_p).isneginf()  # with what is not a number, the sum is none either
    return (
        posterior(x.masked_fill(~possible, -torch.inf), utterance, n, kappa)
        for x, kappa in ((log_w, 1.0), (log_p, scale))
    )


def _expected(log_w, values, utterance, n):
    """Σ_k w_k times the value of k; an infinite one without weight counts for nothing."""
    weighted = log_w.exp() * torch.where(log_w.isneginf(), 0.0, values)
    return weighted.new_zeros(n).index_add(0, utterance, weighted)
