r"""The sum over all alignments of a transducer's lattice, and how often its arcs are used.

The lattice of T frames and U labels has nodes (t, u), a blank arc to (t+1, u) and a label arc to
(t, u+1); an alignment runs from (0, 0) to (T, U), the last arc being the blank of (T−1, U).  With b
and y for the log-probabilities of the arcs,

    α(t,u) = log( e^{α(t−1,u) + b(t−1,u)} + e^{α(t,u−1) + y(t,u−1)} ),          α(0,0) = 0
    β(t,u) = log( e^{b(t,u) + β(t+1,u)} + e^{y(t,u) + β(t,u+1)} ),              β(T,U) = 0
    log P  = α(T,U) = β(0,0)
    ∂ log P / ∂ b(t,u) = exp( α(t,u) + b(t,u) + β(t+1,u) − log P )              the arc's occupancy

and the same for labels.  All are summed in float64, one diagonal t + u at a time: in float32 the
rounding of α + β − log P, near −1000 each, is a part in ten thousand of the gradient.

Source: Graves, "Sequence Transduction with Recurrent Neural Networks", 2012, section 2.4
(arXiv:1211.3711).
Axes: k hypotheses, u labels, u1 = u + 1 predictor states, t frames.  Unit: nats.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from espnet_pl.losses import kernels


def full_sum(
    blank: Float[Tensor, "k u1 t"],
    label: Float[Tensor, "k u t"],
    frames: Int[Tensor, " k"],
    lengths: Int[Tensor, " k"],
) -> Float[Tensor, " k"]:
    """log P of each hypothesis, summed over its alignments; −inf without any.

    Args:
        blank: log-probability of the blank at each node; behind the end anything.
        label: that of the next label.
        frames: T of each hypothesis; with 0 there is no alignment.
        lengths: U of each hypothesis; 0 leaves one alignment, all blank.

    Gradients are occupancies times the gradient of log P, whatever its sign; they are 0 where log P
    is −inf.
    """
    return _FullSum.apply(blank, label, frames, lengths)


class _FullSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, blank, label, frames, lengths):
        grid = _Grid(blank, label, frames, lengths)
        wanted = any(ctx.needs_input_grad[:2])
        alpha, beta = grid.sweeps(wanted)
        log_p = alpha[-1].gather(1, lengths[:, None])[:, 0]
        log_p = log_p.masked_fill(frames == 0, -torch.inf)
        if wanted:
            ctx.save_for_backward(*grid.occupancies(alpha, beta, log_p))
        return log_p

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        blank, label = ctx.saved_tensors
        grad = grad[:, None, None]
        return (grad * blank).to(blank.dtype), (grad * label).to(label.dtype), None, None


class _Grid:
    """The arcs of some lattices in float64, by diagonals: (t + u, k, u).

    Where a lattice has ended, its last node has a blank of probability 1 to itself: all end on the
    same diagonal.
    """

    def __init__(self, blank, label, frames, lengths):
        self.k, self.states, self.t = blank.shape
        self.type, self.lengths = blank.dtype, lengths
        t = torch.arange(self.t, device=blank.device)
        u = torch.arange(self.states, device=blank.device)
        inside = t < frames[:, None, None]  # k 1 t
        last = u[:, None] == lengths[:, None, None]  # k u 1
        # The only blank of the last frame that leads anywhere is that of the last state.
        leads = (t < frames[:, None, None] - 1) & (u[:, None] <= lengths[:, None, None])
        self.blank_arcs = leads | (inside & last)
        self.label_arcs = inside & (u[:-1, None] < lengths[:, None, None])
        self.blank = self._skew(blank, self.blank_arcs)
        self.label = self._skew(label, self.label_arcs)
        d = torch.arange(len(self.blank), device=blank.device)[:, None, None]
        self.blank.masked_fill_((d >= (frames + lengths)[:, None]) & (u == lengths[:, None]), 0.0)
        self.last = last[:, :, 0]

    def sweeps(self, both: bool):
        """α, and β if ``both``."""
        if kernels.available(self.blank):
            alpha, *beta = kernels.sweeps(self.blank, self.label, self.lengths, both)
            return alpha, beta[0] if both else None
        return self.forward(), self.backward() if both else None

    def forward(self) -> Float[Tensor, "d k u1"]:
        """α."""
        alpha = torch.full_like(self.blank, -torch.inf)
        alpha[0, :, 0] = 0.0
        for before, now, b, y in zip(alpha, alpha[1:], self.blank, self.label):
            torch.add(before, b, out=now)
            torch.logaddexp(now[:, 1:], before[:, :-1] + y, out=now[:, 1:])
        return alpha

    def backward(self) -> Float[Tensor, "d k u1"]:
        """β."""
        beta = torch.full_like(self.blank, -torch.inf)
        beta[-1].masked_fill_(self.last, 0.0)
        for d in range(len(beta) - 2, -1, -1):
            torch.add(beta[d + 1], self.blank[d], out=beta[d])
            start = beta[d, :, :-1]
            torch.logaddexp(start, beta[d + 1, :, 1:] + self.label[d], out=start)
        return beta

    def occupancies(self, alpha, beta, log_p):
        """Of the blank and the label arcs, (k, u+1, t) and (k, u, t)."""
        possible = ~log_p.isneginf()[:, None]
        blank = (alpha[:-1] + self.blank[:-1]).add_(beta[1:])
        label = (alpha[:-1, :, :-1] + self.label[:-1]).add_(beta[1:, :, 1:])
        return [
            self._straight(
                occupancy.sub_(log_p[:, None]).exp_().masked_fill_(~possible, 0.0), arcs
            ).to(self.type)
            for occupancy, arcs in ((blank, self.blank_arcs), (label, self.label_arcs))
        ]

    def _skew(self, x, mask):
        """(k, u, t) → (t + u, k, u): rows written longer by one than they are read."""
        k, u, t = x.shape
        d = self.t + self.states
        room = torch.full((k, u, d + 1), -torch.inf, dtype=torch.float64, device=x.device)
        room[:, :, :t] = torch.where(mask, x.double(), -torch.inf)
        skewed = room.flatten(1)[:, : u * d].view(k, u, d)
        return skewed.permute(2, 0, 1).contiguous()

    def _straight(self, x, mask):
        """The way back, zero where there is no arc; x ends one diagonal earlier."""
        d, k, u = x.shape
        room = x.new_zeros(k, u * (d + 2))
        room[:, : u * (d + 1)].view(k, u, d + 1)[:, :, :d] = x.permute(1, 2, 0)
        return torch.where(mask, room.view(k, u, d + 2)[:, :, : self.t], 0.0)
