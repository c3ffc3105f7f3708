"""losses/entropy: brute force · gradient · limits · invariance · hostile input."""

import math

import pytest
import torch

from espnet_pl.losses.diagnostics import frame_statistics
from espnet_pl.losses.entropy import frame_entropy, token_entropy

FRAMES = torch.tensor([4, 2, 0])


def logits(v=5, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(3, 4, v, generator=g, dtype=dtype)).requires_grad_()


def written_out(z, frames):
    """The equations of the docstring, one frame and one token at a time."""
    of_frames, all_frames = [], []
    for rows, valid in zip(z.softmax(-1).tolist(), frames.tolist()):
        of_frames.append(sum(-q * math.log(q) for row in rows[:valid] for q in row))
        all_frames += rows[:valid]
    mean = [sum(column) / len(all_frames) for column in zip(*all_frames)]
    return of_frames, sum(-m * math.log(m) for m in mean)


@pytest.mark.parametrize("v", [1, 2, 7])
def test_equals_the_written_equation(v):
    z = logits(v)
    of_frames, of_mean = written_out(z, FRAMES)
    log_p = z.log_softmax(-1)
    assert frame_entropy(log_p, FRAMES).tolist() == pytest.approx(of_frames, abs=1e-12)
    assert token_entropy(log_p, FRAMES).item() == pytest.approx(of_mean, abs=1e-12)


@pytest.mark.parametrize("loss", [frame_entropy, token_entropy])
def test_gradient_is_the_numerical_one(loss):
    assert torch.autograd.gradcheck(lambda z: loss(z.log_softmax(-1), FRAMES), (logits(),))


def test_the_least_and_the_most():
    """One-hot frames have none; equal ones have log V each."""
    sure = torch.full((3, 4, 5), -torch.inf, dtype=torch.float64)
    sure[:, :, 2] = 0
    flat = torch.full((3, 4, 5), -math.log(5), dtype=torch.float64)
    assert frame_entropy(sure, FRAMES).tolist() == [0, 0, 0] and token_entropy(sure, FRAMES) == 0
    expected = [4 * math.log(5), 2 * math.log(5), 0]
    assert frame_entropy(flat, FRAMES).tolist() == pytest.approx(expected)
    assert token_entropy(flat, FRAMES).item() == pytest.approx(math.log(5))


def test_sure_frames_that_differ_have_token_entropy_only():
    z = torch.full((1, 4, 4), -torch.inf, dtype=torch.float64)
    z[0, range(4), range(4)] = 0
    frames = torch.tensor([4])
    assert frame_entropy(z, frames) == 0
    assert token_entropy(z, frames).item() == pytest.approx(math.log(4))


def test_they_are_the_diagnostics_of_the_same_name():
    log_p = logits().log_softmax(-1).detach()
    told = frame_statistics(log_p, FRAMES)
    mean = frame_entropy(log_p, FRAMES).sum() / FRAMES.sum()
    torch.testing.assert_close(told.frame_entropy.double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        told.token_entropy.double(), token_entropy(log_p, FRAMES), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("loss", [frame_entropy, token_entropy])
def test_padding_and_the_order_of_tokens_have_no_say(loss):
    z = logits()
    other = z.detach().clone()
    other[1, 2:], other[2] = 1e4, -torch.inf
    other = other[:, :, torch.randperm(5)].requires_grad_()
    torch.testing.assert_close(
        loss(other.log_softmax(-1).nan_to_num(5.0), FRAMES), loss(z.log_softmax(-1), FRAMES)
    )


@pytest.mark.parametrize("loss", [frame_entropy, token_entropy])
def test_hostile_input(loss):
    """Impossible tokens, half precision, nothing to sum over: finite values and gradients."""
    z = logits(dtype=torch.float32).detach()
    z[:, :, 3], z[:, 1, :4] = -torch.inf, -torch.inf
    z.requires_grad_()
    value = loss(z.log_softmax(-1), FRAMES)
    value.sum().backward()
    assert value.isfinite().all() and z.grad.isfinite().all() and z.grad.abs().sum() > 0
    half = loss(z.detach().log_softmax(-1).bfloat16(), FRAMES)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, value.detach(), rtol=0.05, atol=0.05)
    none = z.detach().clone().requires_grad_()
    value = loss(none.log_softmax(-1), torch.zeros(3, dtype=torch.long)).sum()
    value.backward()
    assert value == 0 and (none.grad == 0).all()
    assert loss(z.log_softmax(-1)[:0], FRAMES[:0]).sum() == 0
