"""Which frames of its input an encoder does not hear, and what of its output they are.

Of an utterance an encoder makes t frames of the s that it is given.  To frame j of its output
belong the frames ⌊j·s/t⌋ … ⌊(j+1)·s/t⌋ − 1 of its input, each to one frame; any rate will do.  What
a frame of output is asked for is the mean of its frames of input, and only if all are hidden.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def hide_future(frames: Int[Tensor, " n"], width: int, least: float) -> Bool[Tensor, "n s"]:
    """True for all frames of an utterance from a random one on.

    Args:
        frames: valid ones of each utterance.
        width: s, those of the longest one, or more.
        least: the share of an utterance that is heard at least; a frame is in any case, and an
            utterance of one frame is heard whole.
    """
    heard = (least * frames).ceil().long().clamp(min=1)
    choices = (frames - heard).clamp(min=0)
    cut = heard + (torch.rand(len(frames), device=frames.device) * choices).long()
    place = torch.arange(width, device=frames.device)
    return (place >= cut[:, None]) & (place < frames[:, None])


def hide_spans(
    frames: Int[Tensor, " n"], width: int, share: float, span: int
) -> Bool[Tensor, "n s"]:
    """True for frames in spans that begin anywhere, and may overlap.

    Args:
        frames, width: as above.
        share: of the frames that are hidden, in the mean; fewer at the beginning of an utterance.
        span: frames of one, except at the end of an utterance.
    """
    begins = torch.rand(len(frames), width, device=frames.device) < 1 - (1 - share) ** (1 / span)
    begun = begins.long().cumsum(1)
    ended = torch.nn.functional.pad(begun, (span, 0))[:, :width]
    place = torch.arange(width, device=frames.device)
    return (begun > ended) & (place < frames[:, None])


class Bins:
    """The frames of input that belong to each frame of output.

    Args:
        inputs: valid frames of input of each utterance, at most s.
        outputs: valid frames of output, at most t.
    """

    def __init__(
        self, inputs: Int[Tensor, " n"], s: int, outputs: Int[Tensor, " n"], t: int
    ) -> None:
        self.t = t
        place = torch.arange(s, device=inputs.device)
        before = (place + 1) * outputs[:, None] + inputs[:, None] - 1
        # The last j with ⌊j·s/t⌋ ≤ place; the padding has a place of its own, behind all others.
        own = before.div(inputs[:, None].clamp(min=1), rounding_mode="floor") - 1
        there = (place < inputs[:, None]) & (outputs[:, None] > 0)
        self.of = torch.where(there, own, t)
        self.sizes = self._sum(torch.ones(*self.of.shape, 1, device=inputs.device))[..., 0]

    def mean(self, features: Float[Tensor, "n s f"]) -> Float[Tensor, "n t f"]:
        """Of the frames of input, in float32 at least; 0 where there are none."""
        exact = torch.promote_types(features.dtype, torch.float32)
        return self._sum(features.to(exact)) / self.sizes.clamp(min=1)[..., None]

    def all(self, hidden: Bool[Tensor, "n s"]) -> Bool[Tensor, "n t"]:
        """Whether a frame of output has frames of input, and all of them are hidden."""
        count = self._sum(hidden[..., None].float())[..., 0]
        return (count == self.sizes) & (self.sizes > 0)

    def _sum(self, x: Tensor) -> Tensor:
        out = x.new_zeros(len(x), self.t + 1, x.shape[2])
        return out.scatter_add(1, self.of[..., None].expand_as(x), x)[:, : self.t]
