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
not met, the share is lowered by what is missing.

A model that knows little yet has no such band: the probability of any one alignment is small
against 1.  There each arc outside of B has an upper bound of its own (`bound.upper_planes`), and
with P⁺ for the sum with p(a) inside of B and the bounds outside

    P_B ≤ P ≤ P⁺

B are the nodes that have an occupancy worth the name in the lattice of the bounds.  Where that
would take most of the lattice, or neither bound is met, the hypothesis is computed completely.

Source: ours.
Axes: k hypotheses, u1 predictor states of each, s predictor states of all utterances, t frames, p
planes.  Unit: nats.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from espnet_pl.losses.bound import upper_planes
from espnet_pl.losses.joint import Tile
from espnet_pl.losses.lattice import full_sum

BLOCK = 16  # frames: enough for tiles of some hundred nodes, and few enough to follow the labels
REACH = 4  # states above those that are followed
PACE = 1.0  # and for each frame behind the first of a block, times the labels of an average frame
SHARE = 12.0  # of the first walk, which is to find log P to within little
MARGIN = 3.0  # there are many arcs to leave by
WALKS = 3
HOPELESS = 40.0  # where so much more has left than goes on, no walk will do; the log of the ratio
OCCUPANCIES = 1e-8, 1e-11  # of a node, at least, where arcs have bounds of their own
MOST = 0.6  # of a lattice: beyond that, to compute all of it takes less time than more walks
WORTH = 0.8  # of a lattice whose arcs have bounds: computing the rest takes no longer than they did
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
    gap = torch.full(frames.shape, torch.inf, dtype=torch.float64, device=frames.device)
    floor = torch.full_like(gap, -torch.inf)
    left = torch.arange(len(states), device=states.device)
    share, margin = SHARE, MARGIN
    for _ in range(WALKS):
        if not len(left):
            break
        log_p, leak = search.follow(left, share, floor[left])
        # Labels that nobody can say count as e^NEVER in a walk: near that, nothing is certain.
        excess = torch.where(log_p > NEVER / 2, leak - log_p, torch.inf)
        gap[left] = excess.exp().log1p()
        # What is lost by an arc is at most α: follow all that could be too much to lose.
        floor[left] = log_p + math.log(tolerance) - margin
        share, margin = torch.inf, margin + MARGIN
        left = left[(gap[left] > tolerance) & excess.isfinite()]
    wide = ~(gap <= tolerance)  # also what is not a number
    if wide.any():
        left = wide.nonzero()[:, 0]
        gap[left] = search.enclose(left, tolerance)
        wide = ~(gap <= tolerance)
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
        self.time = torch.arange(tile.t, device=states.device)

    @property
    def planes(self) -> Float[Tensor, "p s t"]:
        return self.flat.unflatten(1, (-1, self.tile.t))

    @property
    def done(self) -> Bool[Tensor, "s t"]:
        return self.known.unflatten(0, (-1, self.tile.t))

    def complete(self, which: Bool[Tensor, " k"]) -> None:
        """Compute all nodes of these hypotheses."""
        inside = (self.u <= self.lengths[:, None]) & which[:, None]
        inside = inside[:, :, None] & (self.time < self.frames[:, None, None])
        self._compute(self._index(slice(None), self.time)[inside])

    def enclose(self, rows: Int[Tensor, " k"], tolerance: float) -> Float[Tensor, " k"]:
        """log P⁺ − log P_B of these hypotheses; infinite, or no number, where B is too wide."""
        self.tile.release()
        used = torch.zeros_like(self.done[:, 0])
        used[self.states[rows]] = True
        mixed = upper_planes(self.tile, used).flatten(1)
        mixed[:, self.known] = self.flat[:, self.known]
        index = self._index(rows, self.time)
        gap = torch.full(rows.shape, torch.nan, dtype=torch.float64, device=rows.device)
        for least in OCCUPANCIES:
            inside = self._occupancies(rows, index, mixed) > least
            inside &= ~(gap <= tolerance)[:, None, None]
            share = inside.flatten(1).sum(1) / (self.frames * (self.lengths + 1))[rows]
            self._compute(index[inside & (share < WORTH)[:, None, None]])
            self.tile.release()
            mixed[:, self.known] = self.flat[:, self.known]
            gap = self._sum(rows, index, mixed) - self._sum(rows, index, self.flat)
            if bool((gap <= tolerance).all()):
                break
        return gap

    def _sum(self, rows, index, flat):
        """log P of these hypotheses with such planes."""
        blank, label = self._gather(rows, index, flat)
        return full_sum(blank, label[:, :-1], self.frames[rows], self.lengths[rows])

    def _occupancies(self, rows, index, flat):
        """Of all nodes of these hypotheses, (k, u1, t), with such planes."""
        blank, label = self._gather(rows, index, flat)
        with torch.enable_grad():
            arcs = blank.requires_grad_(), label[:, :-1].requires_grad_()
            total = full_sum(*arcs, self.frames[rows], self.lengths[rows]).sum()
        occupancy, labels = torch.autograd.grad(total, arcs)
        occupancy[:, :-1] += labels
        return occupancy

    def follow(self, rows: Int[Tensor, " k"], share: float, floor: Float[Tensor, " k"]):
        """Once through the frames, for these hypotheses.

        Args:
            share: how much less than the greatest an α may be and still be followed; its log.
            floor: log of the least α that is followed.

        Returns:
            log P_B and log E; log P_B is −inf where the band became too wide to go on.
        """
        frames, lengths = self.frames[rows], self.lengths[rows]
        leak = torch.full(frames.shape, -torch.inf, dtype=torch.float64, device=rows.device)
        alpha = leak[:, None].repeat(1, len(self.u))
        alpha[:, 0] = 0.0
        log_p, nodes = leak.clone(), torch.zeros_like(frames)
        most = MOST * frames * (lengths + 1)
        pace = PACE * lengths / frames.clamp(min=1)
        reach = torch.full_like(frames, REACH)
        for start in range(0, int(frames.max()) if len(rows) else 0, BLOCK):
            time = self.time[start : start + BLOCK]
            least = floor.maximum(alpha.amax(1) - share)
            followed = alpha >= least[:, None]
            going_on = leak < alpha.logsumexp(1) + HOPELESS
            followed &= ((frames > start) & (nodes < most) & going_on)[:, None]
            low = torch.where(followed, self.u, len(self.u)).amin(1)
            high = torch.where(followed, self.u, -1).amax(1)
            ahead = (pace[:, None] * (time - start)).long()
            reach = (reach - 1).clamp(min=REACH)  # speech that was fast a moment ago still is
            while True:
                top = torch.minimum((high + reach)[:, None] + ahead, lengths[:, None])  # k t
                end, out, final, size = self._block(rows, low, top, alpha, time)
                # Labels that leave with more than that: there is more to see.
                short = (out > least) & (high >= 0)
                if not short.any():
                    break
                reach = torch.where(short, 2 * reach, reach)
            outside = (self.u < low[:, None]) | (self.u > top[:, :1])
            leak = leak.logaddexp(out)
            leak = leak.logaddexp(alpha.masked_fill(~outside, -torch.inf).logsumexp(1))
            nodes += size
            alpha, log_p = end, log_p.maximum(final)
        return log_p, leak

    def _block(self, rows, low, top, alpha, time):
        """α behind a block of frames; log of the probability to leave by a label, and to end.

        Args:
            low, top: the states of the window, (k,) and for each frame (k, t).
        """
        u, frames, lengths = self.u[:, None], self.frames[rows], self.lengths[rows]
        window = (u >= low[:, None, None]) & (u <= top[:, None])  # k u1 t
        window &= time < frames[:, None, None]
        blank, label = self._arcs(rows, window, time)
        blank = blank.masked_fill(~window, -torch.inf)
        # log of the probability of all labels before u: α(t,u) = before(u) + log Σ_{v ≤ u} …
        before = torch.zeros_like(label)
        before[:, 1:] = label.masked_fill(~window, 0.0).cumsum(1)[:, :-1]
        here = torch.full_like(label, -torch.inf)
        alpha = alpha.masked_fill(~window[:, :, 0], -torch.inf)
        for now, b, y in zip(here.unbind(2), blank.unbind(2), before.unbind(2)):
            torch.add((alpha - y).logcumsumexp(1), y, out=now)
            alpha = now + b  # −inf outside of the window, which does not become narrower
        here = here.masked_fill(~window, -torch.inf)
        leaves = (u == top[:, None]) & (u < lengths[:, None, None])
        out = (here + label).masked_fill(~leaves, -torch.inf).flatten(1).logsumexp(1)
        ends = (u == lengths[:, None, None]) & (time == frames[:, None, None] - 1)
        final = (here + blank).masked_fill(~ends, -torch.inf).flatten(1).amax(1)
        going_on = (frames > int(time[-1]) + 1)[:, None]
        return alpha.masked_fill(~going_on, -torch.inf), out, final, window.flatten(1).sum(1)

    def _arcs(self, rows, window, time):
        """Blanks and next labels in the window, (k, u1, t) in float64; computed if need be."""
        index = self._index(rows, time)
        self._compute(index[window])
        blank, label = self._gather(rows, index, self.flat)
        return blank, label.clamp(min=NEVER)

    def _index(self, rows, time):
        """Where the hypotheses' nodes are in the planes, (k, u1, t)."""
        return self.states[rows][:, :, None] * self.tile.t + time

    def _gather(self, rows, index, flat):
        """Blanks and next labels of the hypotheses' nodes, in float64."""
        return flat[0][index].double(), flat[self.columns[rows][:, :, None], index].double()

    def _compute(self, index):
        index = index[~self.known[index]].unique()  # hypotheses may share states
        self.tile.fill(self.flat, index)
        self.known[index] = True
