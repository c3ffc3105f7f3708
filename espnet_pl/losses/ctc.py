r"""Connectionist temporal classification against hard labels.

For frame log-probabilities log p_t(k) over tokens and blank, and a label sequence y,

    L(y) = − log p(y|x) = − log Σ_{π ∈ B⁻¹(y)} Π_t p_t(π_t)

where B merges repeats and then drops blanks.  An alignment exists only if the
utterance has at least as many frames as y has labels and adjacent repeats
(a blank must stand between two equal labels): ``feasible``.

Source: Graves, Fernández, Gomez, Schmidhuber, "Connectionist Temporal
Classification", ICML 2006, equations 3 and 8.  The sum is torch's own
``ctc_loss``; here are the shapes, the checks and the rule for labels without
any alignment.
Axes: n utterances, t frames, u labels, v vocabulary.  Unit: nats per utterance.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def ctc(
    log_p: Float[Tensor, "n t v"],
    frames: Int[Tensor, " n"],
    labels: Int[Tensor, "n u"],
    label_lengths: Int[Tensor, " n"],
    blank: int = 0,
) -> Float[Tensor, " n"]:
    """Negative log-likelihood of each label sequence, summed over all alignments.

    Args:
        log_p: log-softmax over the last axis.  torch's backward pass relies on that:
            the gradient is right with respect to the logits underneath.
        frames: valid frames of each utterance; what lies behind them is ignored.
        labels: token numbers, padded at the end with anything.
        label_lengths: 0 is allowed and costs −Σ_t log p_t(blank).
        blank: index of the blank.

    Returns:
        L(y).  A sequence without any alignment costs exactly 0 with zero gradient,
        never infinity: ask ``feasible`` which ones those are.
    """
    if not 0 <= blank < log_p.shape[-1]:
        raise ValueError(f"blank is {blank}, the vocabulary has {log_p.shape[-1]} tokens")
    possible = feasible(frames, labels, label_lengths)
    # Half precision underflows within a few frames, so the sum is taken in float32 at least.
    log_p = log_p if log_p.dtype == torch.float64 else log_p.float()
    loss = torch.nn.functional.ctc_loss(
        log_p.transpose(0, 1),  # n t v → t n v
        # Padding must be a valid token for torch, whatever the caller padded with.
        labels.masked_fill(_padding(labels, label_lengths), (blank + 1) % log_p.shape[-1]),
        frames,
        label_lengths,
        blank=blank,
        reduction="none",
        zero_infinity=True,
    )
    return torch.where(possible, loss, torch.zeros_like(loss))


def feasible(
    frames: Int[Tensor, " n"],
    labels: Int[Tensor, "n u"],
    label_lengths: Int[Tensor, " n"],
) -> Bool[Tensor, " n"]:
    """True where at least one alignment exists: frames ≥ labels + adjacent repeats, and ≥ 1."""
    repeats = (labels[:, 1:] == labels[:, :-1]) & ~_padding(labels, label_lengths)[:, 1:]
    return (frames >= label_lengths + repeats.sum(dim=1)) & (frames > 0)


def _padding(labels, label_lengths):
    return torch.arange(labels.shape[1], device=labels.device) >= label_lengths[:, None]
