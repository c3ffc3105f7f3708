"""losses/diagnostics: closed forms, padding, and a degenerate recogniser."""

import math

import torch

from espnet_pl.losses.diagnostics import frame_statistics


def log_p(*frames):
    return torch.tensor([frames], dtype=torch.float64).log()


def test_flat_frames_have_the_entropy_of_the_vocabulary():
    s = frame_statistics(log_p([0.25] * 4, [0.25] * 4), torch.tensor([2]))
    assert math.isclose(s.frame_entropy, math.log(4), rel_tol=1e-6)
    assert math.isclose(s.token_entropy, math.log(4), rel_tol=1e-6)


def test_certain_frames_that_differ_have_token_entropy_only():
    s = frame_statistics(log_p([1.0, 0.0, 0.0], [0.0, 1.0, 0.0]), torch.tensor([2]))
    assert s.frame_entropy == 0
    assert math.isclose(s.token_entropy, math.log(2), rel_tol=1e-6)
    assert s.blank_share == 0.5


def test_one_token_everywhere_has_no_entropy_at_all():
    s = frame_statistics(log_p(*[[0.0, 1.0]] * 5), torch.tensor([5]))
    assert s.frame_entropy == 0 and s.token_entropy == 0 and s.blank_share == 0


def test_padding_is_not_looked_at():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 4).log_softmax(-1)
    y = x.clone()
    y[0, 3:] = torch.tensor([0.0, -torch.inf, -torch.inf, -torch.inf])
    frames = torch.tensor([3, 6])
    for a, b in zip(frame_statistics(x, frames), frame_statistics(y, frames)):
        torch.testing.assert_close(a, b)


def test_the_blank_may_be_any_token():
    s = frame_statistics(log_p([0.1, 0.2, 0.7]), torch.tensor([1]), blank=2)
    assert s.blank_share == 1


def test_no_frame_at_all_is_no_nan():
    s = frame_statistics(torch.zeros(1, 3, 4), torch.tensor([0]))
    assert all(v == 0 for v in s)
