r"""Connectionist temporal classification against hard labels.

For frame log-probabilities log p_t(k) over tokens and blank, and a label sequence y,

    L(y) = − log p(y|x) = − log Σ_{π ∈ B⁻¹(y)} Π_t p_t(π_t)

where B merges repeats and then drops blanks.  An alignment exists only if the
utterance has at least as many frames as y has labels and adjacent repeats
(a blank must stand between two equal labels): ``feasible``.

Of several hypotheses per utterance, ``log_probability`` gives log p(y|x) each, in float64.  Its
gradient with respect to log p_t(k) is how often alignments of y say k at t, in expectation; it is
summed from forward and backward variables over the sequence of labels with blanks between them.

The likeliest single alignment, argmax_π Π_t p_t(π_t) over the same π, is found by the same
recursion with a maximum in place of the sum.

Source: Graves, Fernández, Gomez, Schmidhuber, "Connectionist Temporal
Classification", ICML 2006, equations 3, 8 and (occupancies) 14.  The sum of
``ctc`` is torch's own ``ctc_loss``; here are the shapes, the checks and the rule
for labels without any alignment.  The maximum is Viterbi's; torchaudio's ``forced_align`` finds it
of one utterance at a time, and where its compiled part is installed.
Axes: n utterances, k hypotheses, t frames, u labels, v vocabulary.  Unit: nats.
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
    _check_blank(blank, log_p.shape[-1])
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


def log_probability(
    log_p: Float[Tensor, "n t v"],
    frames: Int[Tensor, " n"],
    labels: Int[Tensor, "k u"],
    label_lengths: Int[Tensor, " k"],
    utterance: Int[Tensor, " k"],
    blank: int = 0,
) -> Float[Tensor, " k"]:
    """log p(y|x) of each hypothesis, summed over all alignments in float64.

    Args:
        log_p: frame log-probabilities, which hypotheses of the same utterance share.  The gradient
            is with respect to them, whether they sum up to one or not.
        labels: padded at the end with anything.
        utterance: whose hypothesis each one is.

    Returns:
        log p(y|x); exactly 0 with zero gradient, never −inf, for a hypothesis without alignment:
        ask ``feasible(frames[utterance], ...)`` which ones those are.
    """
    _check_blank(blank, log_p.shape[-1])
    labels = labels.masked_fill(_padding(labels, label_lengths), blank)
    possible = feasible(frames[utterance], labels, label_lengths)
    return _Hypotheses.apply(log_p, frames, labels, label_lengths, utterance, blank, possible)


def occupancies(
    log_p: Float[Tensor, "n t v"],
    frames: Int[Tensor, " n"],
    labels: Int[Tensor, "k u"],
    label_lengths: Int[Tensor, " k"],
    utterance: Int[Tensor, " k"],
    weights: Float[Tensor, " k"],
    blank: int = 0,
) -> Float[Tensor, "n t v"]:
    """How often alignments of the hypotheses say each token in each frame, in expectation.

        γ_t(v) = Σ_k w_k · p(π_t = v | y_k, x)

    With w_k the probability of hypothesis k among those of its utterance, γ_t is the distribution
    of a frame's token given that one of them was said.  Frames are then not independent any more:
    every label of a hypothesis is said somewhere.  Without gradient.

    Args:
        weights: w_k; those of a hypothesis without alignment count for nothing.
    """
    with torch.enable_grad():
        leaf = log_p.detach().requires_grad_()
        each = log_probability(leaf, frames, labels, label_lengths, utterance, blank)
        (gamma,) = torch.autograd.grad((weights.detach() * each).sum(), leaf)
    return gamma


@torch.no_grad()
def best_alignment(
    log_p: Float[Tensor, "n t v"],
    frames: Int[Tensor, " n"],
    labels: Int[Tensor, "n u"],
    label_lengths: Int[Tensor, " n"],
    blank: int = 0,
) -> Int[Tensor, "n t"]:
    """The likeliest alignment of each label sequence: the token or blank of each frame.

    Args:
        labels: padded at the end with anything.

    Returns:
        π; −1 behind the valid frames, and throughout where there is no alignment (``feasible``).
    """
    _check_blank(blank, log_p.shape[-1])
    labels = labels.masked_fill(_padding(labels, label_lengths), blank)
    said, jump, final = _states(labels, label_lengths, blank)
    emit = log_p.double().gather(2, said[:, None].expand(-1, log_p.shape[1], -1))  # n t s
    score = torch.full_like(said, -torch.inf, dtype=torch.float64)
    score[:, 0] = 0.0  # as if the first blank had been said before: it, or the first label, follow
    steps = []
    for t, e in enumerate(emit.unbind(1)):
        by = torch.full((3, *score.shape), -torch.inf, dtype=score.dtype, device=score.device)
        by[0] = score
        by[1, :, 1:] = score[:, :-1]
        by[2, :, 2:] = score[:, :-2].masked_fill(~jump[:, 2:], -torch.inf)
        best, step = by.max(0)
        inside = t < frames[:, None]
        score = torch.where(inside, best + e, score)
        steps.append(torch.where(inside, step, 0))
    total, state = score.masked_fill(~final, -torch.inf).max(1, keepdim=True)
    path = torch.full(log_p.shape[:2], -1, dtype=labels.dtype, device=log_p.device)
    for t in range(len(steps) - 1, -1, -1):
        path[:, t : t + 1] = said.gather(1, state)
        state = state - steps[t].gather(1, state)
    outside = torch.arange(path.shape[1], device=path.device) >= frames[:, None]
    return path.masked_fill(outside | total.isneginf(), -1)


def _states(labels, lengths, blank) -> tuple[Tensor, Tensor, Tensor]:
    """Labels with blanks between them, where they may be entered from two before, where they end.

    A label may follow another one without a blank between them if it is not the same.
    """
    k, u = labels.shape
    said = labels.new_full((k, 2 * u + 1), blank)  # k s
    said[:, 1::2] = labels
    jump = torch.zeros_like(said, dtype=torch.bool)
    jump[:, 3::2] = labels[:, 1:] != labels[:, :-1]
    s = torch.arange(2 * u + 1, device=labels.device)
    final = (s == 2 * lengths[:, None]) | (s == 2 * lengths[:, None] - 1)
    return said, jump, final


class _Hypotheses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, log_p, frames, labels, lengths, utterance, blank, possible):
        n, t, v = log_p.shape
        said, jump, final = _states(labels, lengths, blank)
        time = torch.arange(t, device=log_p.device)[:, None, None]
        place = (utterance[:, None] * t + time) * v + said  # t k s, in the flattened log_p
        emit = log_p.reshape(-1)[place].double()
        ends = final & (time == frames[utterance][:, None] - 1)  # t k s

        alpha = torch.full_like(emit, -torch.inf)
        alpha[:1, :, :2] = emit[:1, :, :2]
        for before, now, e in zip(alpha, alpha[1:], emit[1:]):
            torch.add(_arrive(before, jump), e, out=now)
        total = alpha.masked_fill(~ends, -torch.inf).permute(1, 0, 2).flatten(1).logsumexp(1)
        if ctx.needs_input_grad[0]:
            beta = torch.full_like(emit, -torch.inf).masked_fill_(ends, 0.0)
            for t in range(len(beta) - 2, -1, -1):
                step = _leave(beta[t + 1] + emit[t + 1], jump)
                torch.logaddexp(beta[t], step, out=beta[t])
            share = (alpha + beta - total[:, None]).exp()
            said_at_all = ~total.isneginf()[:, None]
            ctx.save_for_backward(place, share.where(said_at_all, 0.0).to(log_p.dtype))
            ctx.shape = log_p.shape
        return torch.where(possible, total, 0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        place, share = ctx.saved_tensors
        out = share.new_zeros(ctx.shape.numel())
        out.scatter_add_(0, place.flatten(), (grad[:, None] * share).to(share.dtype).flatten())
        return out.view(ctx.shape), None, None, None, None, None, None


def _arrive(x: Tensor, jump: Tensor) -> Tensor:
    """log Σ over the states from which s can be reached: s, s − 1 and, by a jump, s − 2."""
    out = x.clone()
    torch.logaddexp(out[:, 1:], x[:, :-1], out=out[:, 1:])
    skipped = x[:, :-2].masked_fill(~jump[:, 2:], -torch.inf)
    torch.logaddexp(out[:, 2:], skipped, out=out[:, 2:])
    return out


def _leave(x: Tensor, jump: Tensor) -> Tensor:
    """log Σ over the states that can be reached from s."""
    out = x.clone()
    torch.logaddexp(out[:, :-1], x[:, 1:], out=out[:, :-1])
    skipped = x[:, 2:].masked_fill(~jump[:, 2:], -torch.inf)
    torch.logaddexp(out[:, :-2], skipped, out=out[:, :-2])
    return out


def feasible(
    frames: Int[Tensor, " n"],
    labels: Int[Tensor, "n u"],
    label_lengths: Int[Tensor, " n"],
) -> Bool[Tensor, " n"]:
    """True where at least one alignment exists: frames ≥ labels + adjacent repeats, and ≥ 1."""
    repeats = (labels[:, 1:] == labels[:, :-1]) & ~_padding(labels, label_lengths)[:, 1:]
    return (frames >= label_lengths + repeats.sum(dim=1)) & (frames > 0)


def _check_blank(blank: int, tokens: int) -> None:
    if not 0 <= blank < tokens:
        raise ValueError(f"blank is {blank}, the vocabulary has {tokens} tokens")


def _padding(labels, label_lengths):
    return torch.arange(labels.shape[1], device=labels.device) >= label_lengths[:, None]
