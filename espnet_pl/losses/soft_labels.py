r"""Soft labels: the student's distribution in every frame is pulled to the teacher's.

Of the teacher's distribution p_t in frame t, its k greatest probabilities are kept, for the tokens
K_t, and the sum of the others, the rest.  The loss compares what is known of both: distributions
over K_t and one class of everything else,

    L(x) = Σ_t Σ_{c ∈ K_t ∪ {rest}} p_t(c) log( p_t(c) / q_t(c) )

    p_t = softmax(teacher's logits / τ'),   q_t = softmax(student's logits / τ),
    rest: the sum over v ∉ K_t

By the data-processing inequality this is at most the Kullback-Leibler divergence of p_t from q_t,
and grows towards it with k: with k the size of the vocabulary, and wherever the student shares out
its rest as the teacher does, they are the same.  Nothing is claimed about tokens that were not
kept, as it would be if the kept ones were made to sum up to one.  The gradient with respect to the
student's logits is

    ( q_t(v) − p_t(v) ) / τ for v ∈ K_t,      q_t(v) ( 1 − p_t(rest) / q_t(rest) ) / τ for others

The cross-entropy is L(x) plus ``entropy``, which has no gradient.  Frames may have weights: w_t
times their summand; 0 leaves one out.

With k = V and τ = τ' = 1 the cross-entropy is − Σ_π p(π|x) log q(π|x) over the alignments π of CTC,
whose frames are independent.

Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531,
section 2; as pseudo-labels arXiv:2211.06007, of which only the abstract was read.  The class of the
rest is ours.
Axes: n utterances, t frames, k tokens kept, d dimensions, v vocabulary, r frames of all utterances.
Unit: nats per utterance, summed over its frames; for a mean, divide by
``valid_frames(...).clamp(min=1)``.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from espnet_pl.losses.joint import product_type

SLACK = 2  # frames; subsampling may round differently for teacher and student, no more than that


@dataclass(frozen=True)
class SoftLabels:
    """What is kept of a teacher's frame distributions; made by ``soft_labels``.

    Args:
        log_p: of the tokens kept.
        tokens: which ones; those of a frame are different from each other.
        log_rest: of all others; −inf if there are none.
        frames: valid frames of each utterance.
    """

    log_p: Float[Tensor, "n t k"]
    tokens: Int[Tensor, "n t k"]
    log_rest: Float[Tensor, "n t"]
    frames: Int[Tensor, " n"]


@torch.no_grad()
def soft_labels(
    logits: Float[Tensor, "n t v"], frames: Int[Tensor, " n"], k: int, temperature: float = 1.0
) -> SoftLabels:
    """The teacher's k likeliest tokens in each frame, in float32 at least.

    Args:
        logits: or log-probabilities.
        temperature: τ'; it cannot be chosen later, when the rest is one number.  Below 1 it
            sharpens: towards 0, all probability is with the likeliest token.
    """
    if not 1 <= k <= logits.shape[-1] or not temperature > 0:
        raise ValueError(
            f"k is {k} of {logits.shape[-1]} tokens, temperature is {temperature}: "
            "k must be from 1 to all of them, temperature positive"
        )
    log_p = _log_softmax(logits, temperature)
    kept = log_p.topk(k, dim=-1)
    rest = log_p.scatter(-1, kept.indices, -torch.inf).logsumexp(-1)
    return SoftLabels(kept.values, kept.indices, rest, frames)


def valid_frames(frames: Int[Tensor, " n"], target: SoftLabels) -> Int[Tensor, " n"]:
    """The frames that student and teacher both have: the shorter of both counts.

    Raises:
        ValueError: they differ by more than two frames.
    """
    if len(frames) != len(target.frames):
        raise ValueError(f"{len(frames)} utterances with soft labels of {len(target.frames)}")
    if len(frames) and int((frames - target.frames).abs().max()) > SLACK:
        i = int((frames - target.frames).abs().argmax())
        raise ValueError(
            f"utterance {i} has {int(frames[i])} frames, but soft labels for "
            f"{int(target.frames[i])}: do teacher and student subsample alike?"
        )
    return torch.minimum(frames, target.frames)


def kl(
    logits: Float[Tensor, "n t v"],
    frames: Int[Tensor, " n"],
    target: SoftLabels,
    *,
    temperature: float = 1.0,
    rescale: bool = False,
    weights: Float[Tensor, "n frames"] | None = None,
) -> Float[Tensor, " n"]:
    """L of each utterance, in float32 at least.

    Args:
        logits: the student's, or its log-probabilities.
        frames: its valid frames.
        temperature: τ.
        rescale: take it τ² times.  With τ = τ', gradients shrink about as 1/τ²; this way their
            size, and the weight of the loss, need not change with τ.
        weights: w_t, on the axes of the soft labels; without gradient.

    Returns:
        L(x), 0 without any frame; infinite if the student's probability of something is 0 that the
        teacher deems possible, with a finite gradient.
    """
    rows = _Rows(frames, target, logits.shape[:2], logits.shape[-1], temperature, rescale, weights)
    return rows.per_utterance(_OfLogits.apply(rows.of(logits), rows))


def kl_of_linear(
    hidden: Float[Tensor, "n t d"],
    weight: Float[Tensor, "v d"],
    bias: Float[Tensor, " v"] | None,
    frames: Int[Tensor, " n"],
    target: SoftLabels,
    *,
    temperature: float = 1.0,
    rescale: bool = False,
    weights: Float[Tensor, "n frames"] | None = None,
    chunk: int = 256,
) -> Float[Tensor, " n"]:
    """``kl`` of the logits hidden · weightᵀ + bias, of which there is a chunk of frames at a time.

    The backward pass computes them again.  Padding is not computed at all.  Under autocast,
    products are in its type; sums are in float32.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}, must be positive")
    rows = _Rows(frames, target, hidden.shape[:2], len(weight), temperature, rescale, weights)
    return rows.per_utterance(_OfLinear.apply(rows.of(hidden), weight, bias, rows, chunk))


def entropy(frames: Int[Tensor, " n"], target: SoftLabels) -> Float[Tensor, " n"]:
    """Σ_t of the entropy of the teacher's k + 1 classes, over the frames that ``kl`` sums over."""
    rows = _Rows(frames, target, target.log_rest.shape)
    log_p = torch.cat([rows.log_p, rows.log_rest[:, None]], dim=1)
    return rows.per_utterance(torch.special.entr(log_p.exp()).sum(1))


class _Rows:
    """The valid frames of all utterances, one after the other, and their soft labels."""

    def __init__(
        self, frames, target, shape, vocabulary=None, temperature=1.0, rescale=False, weights=None
    ):
        valid = valid_frames(frames, target)
        self.t = min(shape[1], target.log_rest.shape[1])
        if len(valid) and int(valid.max()) > self.t:
            raise ValueError(f"{int(valid.max())} frames, but there are only {self.t}")
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}, must be positive")
        self.valid = torch.arange(self.t, device=frames.device) < valid[:, None]
        self.log_p, self.tokens, self.log_rest = (
            self.of(x) for x in (target.log_p.detach(), target.tokens, target.log_rest.detach())
        )
        if vocabulary and self.tokens.numel() and int(self.tokens.max()) >= vocabulary:
            raise ValueError(f"token {int(self.tokens.max())}, but the vocabulary has {vocabulary}")
        self.temperature, self.scale = temperature, temperature**2 if rescale else 1.0
        if weights is not None and weights.shape[1] < self.t:
            raise ValueError(f"weights of {weights.shape[1]} frames, soft labels of {self.t}")
        self.weights = None if weights is None else self.of(weights.detach())

    def of(self, x: Tensor) -> Tensor:
        """(n, t, ...) → (r, ...)."""
        return x[:, : self.t][self.valid]

    def per_utterance(self, x: Float[Tensor, " r"]) -> Float[Tensor, " n"]:
        if self.weights is not None:
            weights = self.weights.to(x.dtype)
            x = torch.where(weights == 0, 0.0, weights * x)  # of an infinite one too
        return x.new_zeros(len(self.valid)).index_add(0, self.valid.nonzero()[:, 0], x)

    def compare(self, logits, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Of a part of these frames: log q of all tokens, log q of the rest, and the loss."""
        log_q = _log_softmax(logits, self.temperature)
        tokens = self.tokens[part]
        rest = log_q.scatter(1, tokens, -torch.inf).logsumexp(1)
        kept = divergence(self.log_p[part], log_q.gather(1, tokens)).sum(1)
        return log_q, rest, self.scale * (kept + divergence(self.log_rest[part], rest))

    def gradient(self, log_q, rest, grad, part: slice) -> Float[Tensor, "r v"]:
        """With respect to the logits, if ``grad`` is that of the loss."""
        tokens = self.tokens[part]
        p, p_rest = (x[part].to(log_q.dtype).exp() for x in (self.log_p, self.log_rest))
        out = log_q.exp().mul_((p.sum(1) + p_rest)[:, None])  # times 1, but for rounding
        kept = out.gather(1, tokens) - p
        # q(v) / q(rest), also where both are next to nothing; 0 where the student has no rest.
        share = (log_q - rest.masked_fill(rest.isneginf(), torch.inf)[:, None]).exp_()
        out.sub_(share.mul_(p_rest[:, None])).scatter_(1, tokens, kept)
        return out.mul_((grad * self.scale / self.temperature)[:, None])


class _OfLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, rows):
        log_q, rest, value = rows.compare(logits, slice(None))
        ctx.save_for_backward(log_q, rest)
        ctx.rows, ctx.type = rows, logits.dtype
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return ctx.rows.gradient(*ctx.saved_tensors, grad, slice(None)).to(ctx.type), None


class _OfLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, rows, chunk):
        ctx.product = product_type(hidden)
        ctx.rows, ctx.chunk = rows, chunk
        ctx.save_for_backward(hidden, weight, bias)
        values = hidden.new_empty(len(hidden), dtype=_exact(hidden.dtype))
        with torch.autocast(hidden.device.type, enabled=False):
            for part, _, logits in _chunks(ctx, hidden, weight, bias):
                values[part] = rows.compare(logits, part)[2]
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden, weight, bias = ctx.saved_tensors
        short = weight.to(ctx.product)
        of_hidden = torch.empty_like(hidden)
        of_weight = torch.zeros_like(weight, dtype=grad.dtype)
        of_bias = grad.new_zeros(len(weight))
        with torch.autocast(hidden.device.type, enabled=False):
            for part, h, logits in _chunks(ctx, hidden, weight, bias):
                log_q, rest, _ = ctx.rows.compare(logits, part)
                g = ctx.rows.gradient(log_q, rest, grad[part], part)
                of_bias += g.sum(0)
                g = g.to(ctx.product)
                of_hidden[part] = g @ short
                of_weight += g.t() @ h
        of_bias = None if bias is None else of_bias.to(bias.dtype)
        return of_hidden, of_weight.to(weight.dtype), of_bias, None, None


def _chunks(ctx, hidden, weight, bias):
    """Which frames, their hidden vectors and their logits, always a chunk of them."""
    short = weight.to(ctx.product).t()
    for start in range(0, len(hidden), ctx.chunk):
        part = slice(start, start + ctx.chunk)
        h = hidden[part].to(ctx.product)
        logits = (h @ short).to(_exact(hidden.dtype))
        yield part, h, logits if bias is None else logits.add_(bias)


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return (logits.to(_exact(logits.dtype)) / temperature).log_softmax(-1)


def divergence(
    log_p: Float[Tensor, "*classes"], log_q: Float[Tensor, "*classes"]
) -> Float[Tensor, "*classes"]:
    """p log(p/q), which is 0 where p is, even if q is 0 there too."""
    log_p = log_p.to(log_q.dtype)
    p = log_p.exp()
    return torch.where(p == 0, 0.0, p * (log_p - log_q))
