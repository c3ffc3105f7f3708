r"""The part of a transducer's lattice that matters, found while its nodes are computed.

Of a trained model's lattice only a band of nodes is ever reached with any probability.  Let B be
some nodes, P_B the sum over the alignments inside of B, and α(v) the probability of all partial
alignments inside of B that end in node v.  An alignment that leaves B does so once for the first
time, by an arc a from a node v; whatever follows has a probability of at most 1.  Hence

    P_B ≤ P ≤ P_B + E,        E = Σ α(v) · p(a)  over the arcs a that leave B

    0 ≤ log P − log P_B ≤ log(1 + E / P_B)

The bound is made of B's own nodes: whatever B is, a band that leaves out too much does not go
unnoticed.  Here B grows with the frames, a block of them at a time: followed are the states whose α
is within a share of the greatest, and as many more as labels reach from there.  Where the bound is
not met, the share is lowered by what is missing; where that would take most of the lattice, the
hypothesis is computed completely.

Source: ours.
Axes: k hypotheses, u1 predictor states of each, s predictor states of all utterances, t frames, p
planes.  Unit: nats.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from espnet_pl.losses.joint import Tile

BLOCK = 16  # frames: enough for tiles of a thousand nodes, and few enough to follow the labels
REACH = 8  # states above those that are followed, for the labels of a block
MARGIN = 6.0  # there are many arcs to leave by
PASSES = 3
MOST = 0.6  # of a lattice: beyond that, to compute all of it takes less time
NEVER = -700.0  # the log of less than float64 can tell from 0 beside anything else


def band(
    tile: Tile,
    states: Int[Tensor, "k u1"],
    columns: Int[Tensor, "k u"],
    frames: Int[Tensor, " k"],
    lengths: Int[Tensor, " k"],
    tolerance: float,
) -> tuple[Float[Tensor, "p s t"], Bool[Tensor, "s t"], Float[Tensor, " k"]]:
    """The planes of a band in which log P is at most ``tolerance`` less than in all of the lattice.

    Args:
        states, columns: as in ``transducer.Hypotheses``.
        frames, lengths: of each hypothesis.

    Returns:
        The planes, −inf outside of the band; the band; and the bound of log P − log P_B of each
        hypothesis, 0 for those that were computed completely.
    """
    search = _Search(tile, states, columns, frames, lengths)
    threshold = math.log(tolerance)
    gap = torch.full(frames.shape, torch.inf, dtype=torch.float64, device=frames.device)
    share = torch.full_like(gap, MARGIN - threshold)
    left = torch.arange(len(states), device=states.device)
    for _ in range(PASSES):
        log_p, leak = search.follow(left, share[left])
        excess = torch.where(log_p.isneginf(), torch.inf, leak - log_p)
        gap[left] = excess.exp().log1p()
        share[left] += (excess - threshold).clamp(min=0) + 2
        left = left[(gap[left] > tolerance) & excess.isfinite()]
    wide = gap > tolerance
    search.complete(wide)
    return search.planes, search.done, gap.masked_fill(wide, 0.0)


class _Search:
    """The nodes computed so far, and walks over the frames that compute more of them."""

    def __init__(self, tile: Tile, states, columns, frames, lengths):
        self.tile, self.states, self.frames, self.lengths = tile, states, frames, lengths
        self.columns = torch.nn.functional.pad(columns, (0, 1))  # the last state has no label
        self.flat = tile.empty_planes()
        self.known = torch.zeros_like(self.flat[0], dtype=torch.bool)
        self.u = torch.arange(states.shape[1], device=states.device)

    @property
    def planes(self) -> Float[Tensor, "p s t"]:
        return self.flat.unflatten(1, (-1, self.tile.t))

    @property
    def done(self) -> Bool[Tensor, "s t"]:
        return self.known.unflatten(0, (-1, self.tile.t))

    def complete(self, which: Bool[Tensor, " k"]) -> None:
        """Compute all nodes of these hypotheses."""
        inside = (self.u <= self.lengths[:, None]) & which[:, None]
        time = torch.arange(self.tile.t, device=inside.device)
        self._compute(inside, time)

    def follow(self, rows: Int[Tensor, " k"], share: Float[Tensor, " k"]):
        """Once through the frames, for these hypotheses.

        Args:
            share: how much less than the greatest an α may be and still be followed; its log.

        Returns:
            log P_B and log E; log P_B is −inf where the band became too wide to go on.
        """
        frames, lengths = self.frames[rows], self.lengths[rows]
        alpha = torch.full((len(rows), len(self.u)), -torch.inf, dtype=torch.float64)
        alpha[:, 0] = 0.0
        leak = torch.full(frames.shape, -torch.inf, dtype=torch.float64)
        log_p, nodes = leak.clone(), torch.zeros_like(frames)
        most = MOST * frames * (lengths + 1)
        for start in range(0, int(frames.max()) if len(rows) else 0, BLOCK):
            followed = alpha >= (alpha.amax(1) - share)[:, None]
            followed &= ((frames > start) & (nodes < most))[:, None]
            low = torch.where(followed, self.u, len(self.u)).amin(1, keepdim=True)
            high = torch.where(followed, self.u, -1).amax(1)
            reach = torch.full_like(high, REACH)
            while True:
                top = torch.minimum(high + reach, lengths)
                window = (self.u >= low) & (self.u <= top[:, None])
                end, out, final = self._block(rows, window, top, alpha, start)
                # Labels that leave with more than the share: there is more to see.
                short = (out > end.amax(1).maximum(final) - share) & (top < lengths)
                if not short.any():
                    break
                reach = torch.where(short, 2 * reach, reach)
            lost = alpha.masked_fill(window, -torch.inf).logsumexp(1)
            leak = leak.logaddexp(out).logaddexp(lost)
            nodes += window.sum(1) * BLOCK
            alpha, log_p = end, log_p.maximum(final)
        return log_p, leak

    def _block(self, rows, window, top, alpha, start):
        """α behind a block of frames; log of the probability to leave by a label, and to end."""
        time = torch.arange(start, min(start + BLOCK, self.tile.t), device=rows.device)
        frames, lengths = self.frames[rows], self.lengths[rows, None]
        blank, label = self._arcs(rows, window, time)
        alpha = alpha.masked_fill(~window, -torch.inf)
        out = torch.full_like(alpha[:, 0], -torch.inf)
        final = out.clone()
        # log of the probability of all labels before u: α(t,u) = before(u) + log Σ_{v ≤ u} …
        before = label.masked_fill(~window[:, :, None], 0.0).cumsum(1).roll(1, 1)
        before[:, 0] = 0.0
        leaves = (top[:, None] < lengths) & (self.u == top[:, None])
        for i, t in enumerate(time.tolist()):
            here = before[:, :, i] + (alpha - before[:, :, i]).logcumsumexp(1)
            here = here.masked_fill(~(window & (frames > t)[:, None]), -torch.inf)
            gone = (here + label[:, :, i]).masked_fill(~leaves, -torch.inf)
            out = out.logaddexp(gone.amax(1))
            alpha = here + blank[:, :, i]
            ends = (frames == t + 1)[:, None]
            final = final.maximum(
                alpha.masked_fill(~(ends & (self.u == lengths)), -torch.inf).amax(1)
            )
            alpha = alpha.masked_fill(ends, -torch.inf)
        return alpha, out, final

    def _arcs(self, rows, window, time):
        """Blanks and next labels in the window, (k, u1, t) in float64; computed if need be."""
        self._compute(window, time, rows)
        index = self.states[rows][:, :, None] * self.tile.t + time
        blank = self.flat[0][index].double()
        label = self.flat[self.columns[rows][:, :, None], index].double().clamp(min=NEVER)
        return blank, label

    def _compute(self, window, time, rows=slice(None)):
        valid = window[:, :, None] & (time < self.frames[rows, None, None])
        index = (self.states[rows][:, :, None] * self.tile.t + time)[valid]
        index = index[~self.known[index]].unique()
        for part in self.tile.split(index):
            self.flat[:, part] = self.tile.log_probs(part)
        self.known[index] = True
