"""parts/gradients: weighed on the way, and compared where two losses meet."""

import math

import pytest
import torch

from espnet_pl.parts.gradients import compare, gradients, weighed


@pytest.mark.parametrize("weight", [0.0, 0.3, 2.0])
def test_only_what_comes_back_is_weighed(weight):
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    y = weighed(x, weight)
    assert torch.equal(x, y)
    (y**2).sum().backward()
    assert torch.equal(x.grad, weight * 2 * x.detach())
    half = torch.ones(2, dtype=torch.float16, requires_grad=True)
    weighed(half, weight).sum().backward()
    assert half.grad.dtype == torch.float16


def test_lengths_and_angle_of_what_is_shared():
    shared, first, second = (
        torch.tensor(v, requires_grad=True) for v in ([3.0, 1.0], [1.0], [2.0])
    )
    upper = (shared * torch.tensor([3.0, 4.0])).sum() * first.sum()
    lower = (shared * torch.tensor([1.0, 0.0])).sum() + second.sum()
    of = [shared, first, second]
    found = compare(gradients(upper, of), gradients(lower, of))
    assert found == (5.0, 1.0, pytest.approx(0.6))
    upper.backward()  # the graph is still there
    assert shared.grad.tolist() == [3.0, 4.0]


def test_a_weight_on_the_way_is_gone_around():
    x = torch.tensor([2.0], requires_grad=True)
    before = 3 * x
    behind = weighed(before, 0.0)
    loss = (behind**2).sum()
    assert gradients(loss, [x])[0].tolist() == [0.0]
    assert gradients(loss, [x], through=(behind, before))[0].tolist() == [36.0]
    nothing = (before.detach() ** 2).sum() + 0 * x.sum()
    assert gradients(nothing, [x], through=(behind, before))[0].tolist() == [0.0]


def test_what_is_frozen_has_none():
    x, fixed = torch.ones(2, requires_grad=True), torch.ones(2)
    assert gradients(fixed.sum(), [x]) == [None]
    assert gradients((x * fixed).sum(), [x], through=(fixed, fixed)) == [None]


def test_nothing_shared_and_no_length():
    one = torch.ones(2)
    assert compare([one, None], [None, one]) == (0.0, 0.0, 0.0)
    assert compare([one], [torch.zeros(2)]) == (pytest.approx(math.sqrt(2)), 0.0, 0.0)
    assert compare([torch.full((2,), 1e-30)], [one]).gradient_cosine == pytest.approx(1.0)
