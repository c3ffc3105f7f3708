"""A gradient that is weighed on its way, and what two losses want of the same parameters."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


def weighed(x: Tensor, weight: float) -> Tensor:
    """x itself; what comes back through it is multiplied by ``weight``."""
    return _Weighed.apply(x, weight)


class _Weighed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.weight, None


class Comparison(NamedTuple):
    """Lengths of two gradients of the same parameters, and the cosine of the angle between them.

    The cosine is 0 where one of them has no length.
    """

    gradient_upper: float
    gradient_lower: float
    gradient_cosine: float


def gradients(
    loss: Float[Tensor, ""], of: Sequence[Tensor], through: tuple[Tensor, Tensor] | None = None
) -> list[Tensor | None]:
    """∂loss/∂x of each x; None where there is none.  The graph stays as it is.

    Args:
        through: a tensor that the loss depends on, and one with the same value that is left of it
            in the graph: the gradient goes from the first to the second with nothing in between.
    """
    if not loss.requires_grad or (through and not through[0].requires_grad):
        return [None] * len(of)  # as of an encoder that is frozen
    if through is None:
        return [*torch.autograd.grad(loss, of, retain_graph=True, allow_unused=True)]
    behind, before = through
    (grad,) = torch.autograd.grad(loss, behind, retain_graph=True, allow_unused=True)
    grad = torch.zeros_like(behind) if grad is None else grad
    return [*torch.autograd.grad(before, of, grad, retain_graph=True, allow_unused=True)]


def compare(upper: Iterable[Tensor | None], lower: Iterable[Tensor | None]) -> Comparison:
    """Of the parameters for which both have a gradient."""
    both = [(a, b) for a, b in zip(upper, lower) if a is not None and b is not None]
    if not both:
        return Comparison(0.0, 0.0, 0.0)
    sums = [[(x.double() * y.double()).sum() for x, y in ((a, a), (b, b), (a, b))] for a, b in both]
    aa, bb, ab = torch.stack([torch.stack(row) for row in sums]).sum(0).tolist()
    length = (aa * bb) ** 0.5
    return Comparison(aa**0.5, bb**0.5, ab / length if length else 0.0)
