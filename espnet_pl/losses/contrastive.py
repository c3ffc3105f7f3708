r"""Supervised contrastive loss: frames of the same label attract each other, all others repel.

For an anchor i with label y_i, features z of length 1 and a temperature τ,

    L_i  = − 1/|P(i)| Σ_{p ∈ P(i)} log( exp(z_i·z_p/τ) / Σ_{a ∈ A(i)} exp(z_i·z_a/τ) )
         = log Σ_{a ∈ A(i)} exp(z_i·z_a/τ) − z_i · (Σ_{p ∈ P(i)} z_p) / (|P(i)| τ)

    P(i) = { p ≠ i : y_p = y_i }                               its positives
    A(i) = { a ≠ i }                                           all others, or
    A(i) = P(i) ∪ { a : a of the same utterance as i }         negatives from its own utterance only

The sum over positives is a sum over their class, without i.  Or a positive stands against the
negatives only, and not against the other positives:

    L_i  = − 1/|P(i)| Σ_{p ∈ P(i)} log( exp(z_i·z_p/τ) / (exp(z_i·z_p/τ) + exp(M_i)) )
         = 1/|P(i)| Σ_{p ∈ P(i)} log(1 + exp(M_i − z_i·z_p/τ))

    M_i  = log Σ_{n ∈ A(i) ∖ P(i)} exp(z_i·z_n/τ)

Sums over pairs are taken in square blocks of similarities, which the backward pass computes again:
what is kept is O(frames · dimensions).  If anchors and candidates are the same frames, the
similarities are symmetric, and half of the blocks do.

Source: Khosla et al., "Supervised Contrastive Learning", arXiv:2004.11362, equation 2 (L_out).  The
other denominator is InfoNCE's, van den Oord et al., arXiv:1807.03748, averaged over the positives.
Negatives from the same utterance: Xiao et al., "Contrastive Semi-supervised Learning for ASR",
arXiv:2103.05149; not read there, but in a description of the paper by others.
Axes: n anchors, m candidates, d dimensions.  Unit: nats per anchor.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Frames:
    """Frames of any number of utterances.

    Args:
        features: of any length; the loss divides by it.  A vector of zeros stays one.
        labels: those below 0 are padding: neither anchor nor positive nor negative.
        utterance: whose frame it is; given where negatives are from the same utterance only.
    """

    features: Float[Tensor, "n d"]
    labels: Int[Tensor, " n"]
    utterance: Int[Tensor, " n"] | None = None


class Contrast(NamedTuple):
    """L_i, and how many positives and negatives anchor i has: |P(i)| and |A(i)| − |P(i)|."""

    loss: Float[Tensor, " n"]
    positives: Int[Tensor, " n"]
    negatives: Int[Tensor, " n"]


def contrastive(
    anchors: Frames,
    candidates: Frames | None = None,
    *,
    temperature: float = 0.1,
    denominator: Literal["all", "one"] = "all",
    block: int = 512,
) -> Contrast:
    """L of each anchor, in float32 at least.

    Args:
        candidates: what anchors are compared with, for example a teacher's features of the same
            frames; no pair is left out then, nor the one of a frame with itself.  They have a
            gradient if they ask for one.  None: the anchors are compared with each other.
        denominator: of a positive, the sum over A(i) (``all``), or over itself and the negatives
            (``one``): an anchor without negatives then costs 0.
        block: so many anchors and candidates are compared at a time.

    Returns:
        Padding and anchors without a positive cost exactly 0 with zero gradient.  A mean is over
        the others: ``loss.sum() / (positives > 0).sum().clamp(min=1)``.

    Raises:
        ValueError: shapes, utterances, temperature or block that cannot be.
    """
    _check(anchors, candidates, temperature, block)
    own = candidates is None
    given = anchors if candidates is None else candidates
    exact = torch.promote_types(anchors.features.dtype, given.features.dtype)
    exact = torch.promote_types(exact, torch.float32)
    a = _ready(anchors, temperature, exact)
    c = a if own else _ready(given, temperature, exact)

    class_of_a, class_of_c, sizes = _classes(a.labels, c.labels)
    positives = sizes[class_of_a] - int(own)
    negatives = len(c.labels) - sizes[class_of_a]
    if a.utterance is not None:
        negatives = _same(a.utterance, c.utterance) - _same_in_both(a, c)
    x, y = a.features, None if own else c.features
    if denominator == "all":
        sums = c.features.new_zeros(len(sizes), c.features.shape[1])
        near = sums.index_add(0, class_of_c, c.features)[class_of_a]
        near = near - a.features if own else near
        attraction = (a.features * near).sum(1) / positives.clamp(min=1)
        total = _LogSumExp.apply(x, y, _Pairs(a, c, own, block, "all"))
        loss = torch.where(positives > 0, total - attraction, 0.0)
    else:
        repulsion = _LogSumExp.apply(x, y, _Pairs(a, c, own, block, "negatives"))
        margins = _Margins.apply(x, y, repulsion, _Pairs(a, c, own, block, "positives"))
        loss = margins / positives.clamp(min=1)

    def unpacked(x: Tensor) -> Tensor:
        return x.new_zeros(len(anchors.labels)).masked_scatter(anchors.labels >= 0, x)

    return Contrast(unpacked(loss), unpacked(positives), unpacked(negatives))


def _ready(frames: Frames, temperature: float, dtype: torch.dtype) -> Frames:
    """Without padding, and with length τ^−½: products are similarities over τ."""
    real = frames.labels >= 0
    z = frames.features[real].to(dtype)
    length = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    # What has no direction gets no infinite gradient.
    z = z / (torch.where(length > 0, length, 1.0) * temperature**0.5)
    return Frames(
        z, frames.labels[real], None if frames.utterance is None else frames.utterance[real]
    )


def _classes(anchors: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The class of each anchor and of each candidate, and how many candidates a class has."""
    names, place = torch.cat([anchors, candidates]).unique(return_inverse=True)
    mine, theirs = place.split([len(anchors), len(candidates)])
    return mine, theirs, torch.bincount(theirs, minlength=len(names))


def _same(anchors: Tensor, candidates: Tensor) -> Int[Tensor, " n"]:
    mine, _, sizes = _classes(anchors, candidates)
    return sizes[mine]


def _same_in_both(a: Frames, c: Frames) -> Int[Tensor, " n"]:
    label, other_label, _ = _classes(a.labels, c.labels)
    utterance, other_utterance, sizes = _classes(a.utterance, c.utterance)
    return _same(label * len(sizes) + utterance, other_label * len(sizes) + other_utterance)


@dataclass(frozen=True)
class _Pairs:
    """Which pairs of anchors and candidates there are, block by block."""

    a: Frames
    c: Frames
    own: bool
    block: int
    which: Literal["all", "positives", "negatives"]

    def similarities(
        self, x: Tensor, y: Tensor, none: float = -torch.inf
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """Rows, columns and their products; ``none`` where they are no pair."""
        for i in range(0, len(x), self.block):
            for j in range(i if self.own else 0, len(y), self.block):
                rows, columns = slice(i, i + self.block), slice(j, j + self.block)
                s = x[rows] @ y[columns].t()
                for mask in self._no_pairs(rows, columns):
                    s.masked_fill_(mask, none)
                if self.own and i == j:
                    s.fill_diagonal_(none)
                yield rows, columns, s

    def _no_pairs(self, rows: slice, columns: slice) -> Iterator[Tensor]:
        differ = self.a.labels[rows, None] != self.c.labels[columns]
        if self.which != "all":
            yield differ if self.which == "positives" else ~differ
        if self.which != "positives" and self.a.utterance is not None:
            yield differ & (self.a.utterance[rows, None] != self.c.utterance[columns])


class _LogSumExp(torch.autograd.Function):
    """log Σ_a exp(x_i · y_a) over the pairs there are; y is None where it is x."""

    @staticmethod
    def forward(ctx, x, y, pairs):
        total = x.new_full((len(x),), -torch.inf)
        ctx.pairs = pairs
        with torch.autocast(x.device.type, enabled=False):
            for rows, columns, s in pairs.similarities(x, x if y is None else y):
                total[rows] = torch.logaddexp(total[rows], s.logsumexp(1))
                if y is None and rows != columns:
                    total[columns] = torch.logaddexp(total[columns], s.logsumexp(0))
        ctx.save_for_backward(x, y, total)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, y, total = ctx.saved_tensors
        # An anchor without candidates has shares of 0, not 0/0.
        total = total.masked_fill(total.isneginf(), torch.inf)[:, None]

        def share(s, anchors):
            return (s - total[anchors]).exp_().mul_(grad[anchors, None])

        return *_gradients(ctx, x, y, share), None


class _Margins(torch.autograd.Function):
    """Σ_p log(1 + exp(m_i − x_i · y_p)) over the pairs there are; y is None where it is x."""

    @staticmethod
    def forward(ctx, x, y, m, pairs):
        total = torch.zeros_like(m)
        ctx.pairs = pairs
        minus = torch.nn.functional.logsigmoid  # −log(1 + exp(−·)), exact for large numbers too
        with torch.autocast(x.device.type, enabled=False):
            for rows, columns, s in pairs.similarities(x, x if y is None else y, torch.inf):
                total[rows] -= minus(s - m[rows, None]).sum(1)
                if y is None and rows != columns:
                    total[columns] -= minus(s - m[columns]).sum(0)
        ctx.save_for_backward(x, y, m)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, y, m = ctx.saved_tensors
        of_m = torch.zeros_like(m)

        def share(s, anchors):
            pull = (m[anchors, None] - s).sigmoid_().mul_(grad[anchors, None])
            of_m[anchors] += pull.sum(1)
            return pull.neg_()

        return *_gradients(ctx, x, y, share, torch.inf), of_m, None


def _gradients(ctx, x, y, share, none=-torch.inf) -> tuple[Tensor | None, Tensor | None]:
    """Of x and y, where ``share(s, anchors)`` is that of a block of anchors and candidates."""
    of_x, of_y = (torch.zeros_like(z) if z is not None else None for z in (x, y))
    wants_x, wants_y, *_ = ctx.needs_input_grad
    with torch.autocast(x.device.type, enabled=False):
        for rows, columns, s in ctx.pairs.similarities(x, x if y is None else y, none):
            pull = share(s, rows)
            if y is None:  # the candidates are anchors, too; on the diagonal, the same ones
                other = pull if rows == columns else share(s.t(), columns)
                pull = pull + other.t()
                of_x[rows].addmm_(pull, x[columns])
                if rows != columns:
                    of_x[columns].addmm_(pull.t(), x[rows])
                continue
            if wants_x:
                of_x[rows].addmm_(pull, y[columns])
            if wants_y:
                of_y[columns].addmm_(pull.t(), x[rows])
    return of_x if wants_x else None, of_y if wants_y else None


def _check(anchors: Frames, candidates: Frames | None, temperature: float, block: int) -> None:
    given = (anchors,) if candidates is None else (anchors, candidates)
    for frames in given:
        sizes = [len(x) for x in (frames.labels, frames.utterance) if x is not None]
        if any(size != len(frames.features) for size in sizes):
            raise ValueError(f"{len(frames.features)} frames, but labels or utterances of {sizes}")
    if len({frames.features.shape[1] for frames in given}) > 1:
        raise ValueError(
            f"anchors of {anchors.features.shape[1]} dimensions, "
            f"candidates of {given[-1].features.shape[1]}"
        )
    if len({frames.utterance is None for frames in given}) > 1:
        raise ValueError("utterances are given for anchors and candidates, or for neither")
    if not temperature > 0 or block < 1:
        raise ValueError(f"temperature is {temperature}, block is {block}: both must be positive")
