"""losses/bound: above what it bounds · how near · what is not asked for · hostile input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espnet_pl.losses import transducer
from espnet_pl.losses.bound import upper_planes
from espnet_pl.losses.joint import Joint, Tile, ask, planes
from espnet_pl.losses.transducer import hypotheses, log_probability


def random(t, u, v, j, scale, seed, dtype=torch.float64):
    """(joint, encoded, frames, predicted, hypotheses) of two utterances, the second one shorter."""
    g = torch.Generator().manual_seed(seed)
    sizes = ((2, t, j), (2 * (u + 1), j), (v, j), (v,))
    encoded, predicted, weight, bias = (
        torch.randn(*size, generator=g, dtype=dtype) * scale for size in sizes
    )
    labels = torch.randint(1, v, (2, u), generator=g)
    hyps = hypotheses(labels, torch.tensor([u, u // 2]))
    frames = torch.tensor([t, max(1, t // 2)])
    return Joint(weight, bias), encoded, frames, hyps.of_states(predicted.view(2, u + 1, j)), hyps


def bounds_and_planes(joint, encoded, frames, predicted, hyps, which=None):
    asked = ask(joint, encoded, frames, predicted, hyps.owner, hyps.tokens)
    tile = Tile(encoded, predicted, joint.weight, joint.bias, asked, encoded.dtype)
    which = torch.ones(len(predicted), dtype=torch.bool) if which is None else which
    exact = planes(joint, encoded, frames, predicted, hyps.owner, hyps.tokens)
    return upper_planes(tile, which), exact


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    st.integers(1, 30), st.integers(0, 12), st.integers(2, 9), st.integers(1, 6),
    st.floats(0, 8), st.integers(0, 10**6),
)  # fmt: skip
def test_no_probability_is_above_its_bound(t, u, v, j, scale, seed):
    upper, exact = bounds_and_planes(*random(t, u, v, j, scale, seed))
    assert (upper >= exact - 1e-9).all() and upper.shape == exact.shape
    assert (upper.isneginf() == exact.isneginf()).all()  # padding, and behind the end


@pytest.mark.parametrize("activation", [torch.tanh, torch.nn.ReLU(), torch.nn.functional.silu])
def test_any_activation(activation):
    joint, *others = random(20, 7, 9, 6, 1.0, seed=1)
    upper, exact = bounds_and_planes(Joint(joint.weight, joint.bias, activation), *others)
    valid = exact.isfinite()
    assert (upper[valid] >= exact[valid] - 1e-9).all()
    assert (upper[valid] - exact[valid]).mean() < 2.0


def test_it_is_met_where_all_nodes_of_a_frame_are_the_same():
    joint, encoded, frames, predicted, hyps = random(20, 7, 9, 6, 2.0, seed=0)
    upper, exact = bounds_and_planes(joint, encoded, frames, predicted * 0 + predicted[0], hyps)
    torch.testing.assert_close(upper, exact)


def test_states_that_are_not_wanted_are_left_out():
    case = random(20, 7, 9, 6, 2.0, seed=0)
    which = torch.arange(len(case[3])) % 3 == 0
    upper, exact = bounds_and_planes(*case, which)
    assert upper[:, ~which].isneginf().all()
    assert (upper[:, which] >= exact[:, which] - 1e-9).all()


def calls(monkeypatch):
    """How many nodes each call computes, of those asked for."""
    seen = []

    def fill(self, out, index, original=Tile.fill):
        seen.append(len(index))
        original(self, out, index)

    monkeypatch.setattr(Tile, "fill", fill)
    monkeypatch.setattr(transducer, "LARGE", 0)
    return seen


@pytest.mark.parametrize("autocast", [False, True])
def test_half_of_an_untrained_network_is_not_computed(monkeypatch, autocast):
    joint, encoded, frames, predicted, hyps = random(800, 120, 30, 24, 0.5, 0, torch.float32)
    seen = calls(monkeypatch)
    tensors = [encoded, predicted, joint.weight * 0.2, joint.bias]
    encoded, predicted, weight, bias = (x.detach().requires_grad_() for x in tensors)
    results = []
    for exact in (False, True):
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = log_probability(
                Joint(weight, bias), encoded, frames, predicted, hyps, exact=exact
            )
        gradient = torch.autograd.grad(value.sum(), (encoded, predicted, weight, bias))
        results.append((value, gradient, sum(seen)))
    (value, gradient, some), (whole, expected, all_of_them) = results
    assert all_of_them == int((frames * (hyps.lengths + 1)).sum()) and some < 0.65 * all_of_them
    assert ((whole - value) <= 1e-5).all()
    for mine, theirs in zip(gradient, expected):
        assert (mine - theirs).norm() <= (1e-2 if autocast else 2e-6) * theirs.norm()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_has_no_bound_is_computed_completely(monkeypatch, bad):
    joint, encoded, frames, predicted, hyps = random(40, 10, 30, 24, 0.3, 0)
    seen = calls(monkeypatch)
    bias = joint.bias.clone()
    bias[3] = bad  # a token that nobody may say, if −inf
    case = Joint(joint.weight, bias), encoded, frames, predicted, hyps
    value, whole = (log_probability(*case, exact=exact) for exact in (False, True))
    assert seen[-1] == int((frames * (hyps.lengths + 1)).sum())
    torch.testing.assert_close(value, whole, equal_nan=True)
