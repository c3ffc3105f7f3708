r"""The one way a network follows another: exponential moving average, snapshot, frozen.

    θ' ← d_k θ' + (1 − d_k) θ      after update k = 1, 2, …
    d_k = min(d, (1 + k) / (w + k)) with warm-up w > 0, else d

d = 0 is a snapshot of the last update; a teacher that is never told to follow is
frozen.  Buffers follow like parameters (batch normalisation keeps its statistics
there), integer buffers are copied.  The copy is kept in float32 at least: with
d = 0.999 the increments of a half-precision average round to nothing.

Source: Tarvainen and Valpola, "Mean teachers", arXiv:1703.01780, section 2; full
precision: Manohar et al., "Kaizen", arXiv:2106.07759, abstract; the warm-up is
TensorFlow's ExponentialMovingAverage(num_updates), with w = 10 there.
The averaging is torch.optim.swa_utils.AveragedModel: it handles buffers and devices.
"""

from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class Teacher(nn.Module):
    """A copy of a student that has no gradient, stays in eval mode, and follows when told to.

    Args:
        student: the network to copy.
        decay: d, from 0 (a snapshot) to 1 (frozen).
        warmup: w in updates; 0 switches the warm-up off.

    Raises:
        ValueError: decay outside [0, 1] or a negative warm-up.
    """

    def __init__(self, student: nn.Module, decay: float = 0.999, warmup: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay is {decay}, it must lie in [0, 1]")
        if warmup < 0:
            raise ValueError(f"warmup is {warmup}, it must not be negative")
        self.decay, self.warmup = decay, warmup
        self._average = AveragedModel(student, multi_avg_fn=self._follow, use_buffers=True)
        self._average.requires_grad_(False)
        for tensor in [*self._average.parameters(), *self._average.buffers()]:
            if tensor.is_floating_point() and tensor.element_size() < 4:
                tensor.data = tensor.data.float()
        self.eval()

    @property
    def network(self) -> nn.Module:
        """The copy; in eval mode always."""
        return self._average.module

    def copy(self, student: nn.Module) -> None:
        """Become the student, and count updates anew."""
        self._average.n_averaged.zero_()
        self._average.update_parameters(student)

    def follow(self, student: nn.Module) -> None:
        """One step of the moving average towards the student."""
        self._average.update_parameters(student)

    def train(self, mode: bool = True) -> "Teacher":
        """Ignored: a teacher is always in eval mode, whatever ESPnet's trainer switches on."""
        return super().train(False)

    @torch.no_grad()
    def _follow(self, mine: list[Tensor], theirs: list[Tensor], updates: Tensor) -> None:
        k, decay = int(updates), self.decay
        if self.warmup > 0:
            decay = min(decay, (1 + k) / (self.warmup + k))
        if mine[0].is_floating_point():
            theirs = [t.to(m.dtype) for m, t in zip(mine, theirs)]
            torch._foreach_lerp_(mine, theirs, 1 - decay)
        else:
            for m, t in zip(mine, theirs):
                m.copy_(t)


@contextmanager
def weak_view(network: nn.Module):
    """Inside: no gradient, no dropout, no SpecAugment.  Afterwards: every mode as before."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad():
            yield network
    finally:
        for module, mode in modes.items():
            module.training = mode
