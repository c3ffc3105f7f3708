r"""Log-probabilities of blank and next label, from logits that somebody else has computed.

Of logits z at each frame t and predictor state u of an utterance, as ``joint.planes`` of its own,

    log p(k|t,u) = z_k(t,u) − log Σ_j exp z_j(t,u)

for the two tokens that its lattice asks for.  The forward pass makes no second tensor of the size
of the logits: it reads some frames of one utterance at a time, valid nodes only, and keeps two
numbers for each.  The backward pass computes each softmax again; with g_m for the gradient of plane
m at a node,

    ∂/∂z_k = Σ_m g_m (1[k = k_m] − p(k))

Source: the derivative of a log-softmax; computing it again is Chen et al., arXiv:1604.06174.
Axes: n utterances, t frames, u labels, u1 = u + 1 predictor states, v vocabulary.  Unit: nats.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from espnet_pl.losses.joint import LOGITS


def planes_of_logits(
    logits: Float[Tensor, "n t u1 v"],
    frames: Int[Tensor, " n"],
    labels: Int[Tensor, "n u"],
    lengths: Int[Tensor, " n"],
    *,
    blank: int = 0,
    in_place: bool = False,
) -> Float[Tensor, "2 n u1 t"]:
    """Log-probability of the blank, and of the next label, at every valid node; −inf elsewhere.

    Args:
        logits: of any floating type; shorter ones than float32 are summed in float32.  Behind the
            ends of an utterance they are never read.
        frames: valid frames of each utterance.
        labels: padded at the end with anything.
        lengths: valid labels of each utterance.
        in_place: the backward pass writes the gradient over the logits, which destroys them, and
            needs no second tensor of their size either.  PyTorch refuses a backward pass, a second
            one or that of another function, that needs what was there.

    Raises:
        ValueError: shapes that do not fit together, or a token outside of the vocabulary.
    """
    _check(logits, frames, labels, lengths, blank, in_place)
    sizes = list(zip(frames.tolist(), lengths.tolist()))
    return _Planes.apply(logits, labels.long(), sizes, blank, in_place)


class _Planes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, sizes, blank, in_place):
        ctx.save_for_backward(logits, labels)
        ctx.rest = sizes, blank, in_place
        n, t, u1, _ = logits.shape
        exact = torch.promote_types(logits.dtype, torch.float32)
        out = logits.new_full((2, n, u1, t), -torch.inf, dtype=exact)
        for i, ts, u in _tiles(logits, sizes):
            log_p = logits[i, ts, : u + 1].log_softmax(-1, dtype=exact)
            out[0, i, : u + 1, ts] = log_p[..., blank].t()
            following = labels[i, :u, None].expand(len(log_p), -1, 1)
            out[1, i, :u, ts] = log_p[:, :u].gather(2, following)[..., 0].t()
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        logits, labels = ctx.saved_tensors
        sizes, blank, in_place = ctx.rest
        # Detached, it shares the logits' version: whoever has saved them gets an error, not these.
        out = logits.detach() if in_place else torch.empty_like(logits)
        for i, ts, u in _tiles(logits, sizes):
            p = logits[i, ts, : u + 1].softmax(-1, dtype=grad.dtype)
            g_blank, g_label = grad[0, i, : u + 1, ts].t(), grad[1, i, :u, ts].t()
            total = g_blank.clone()
            total[:, :u] += g_label
            p.mul_(-total[..., None])
            p[..., blank] += g_blank
            following = labels[i, :u, None].expand(len(p), -1, 1)
            p[:, :u].scatter_add_(2, following, g_label[..., None])
            out[i, ts, : u + 1] = p
        for row, (t, u) in zip(out, sizes):
            row[t:] = 0.0
            row[:t, u + 1 :] = 0.0
        return out, None, None, None, None


def _tiles(logits: Tensor, sizes: list[tuple[int, int]]) -> Iterator[tuple[int, slice, int]]:
    """An utterance, some of its frames, and its labels, until all valid nodes are named."""
    for i, (t, u) in enumerate(sizes):
        step = max(1, LOGITS // ((u + 1) * logits.shape[3]))
        for start in range(0, t, step):
            yield i, slice(start, min(start + step, t)), u


def _check(logits, frames, labels, lengths, blank, in_place) -> None:
    if logits.dim() != 4 or labels.dim() != 2:
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}, but (utterances, "
            "frames, labels + 1, vocabulary) and (utterances, labels) are needed"
        )
    n, t, u1, v = logits.shape
    if labels.shape != (n, u1 - 1) or frames.shape != (n,) or lengths.shape != (n,):
        raise ValueError(
            f"logits {tuple(logits.shape)} ask for labels {(n, u1 - 1)} and {n} lengths of frames "
            f"and of labels, not {tuple(labels.shape)}, {tuple(frames.shape)}, "
            f"{tuple(lengths.shape)}"
        )
    for name, sizes, most in (("frames", frames, t), ("lengths", lengths, u1 - 1)):
        if n and not 0 <= int(sizes.min()) <= int(sizes.max()) <= most:
            raise ValueError(f"{name} {sizes.tolist()}, but the logits have room for {most}")
    inside = torch.arange(u1 - 1, device=labels.device) < lengths[:, None]
    used = labels[inside].tolist()
    for token in (blank, *used):
        if not 0 <= token < v:
            raise ValueError(f"token {token}, but the vocabulary has {v}")
    if blank in used:
        raise ValueError(f"the blank, {blank}, is among the labels")
    if in_place and not logits.is_contiguous():
        raise ValueError("in_place: the logits are not contiguous; leave it out, or copy them")
