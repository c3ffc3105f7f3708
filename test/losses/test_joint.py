"""losses/joint: dense by hand · gradient · limits · invariance · left-out nodes · hostile input."""

import pytest
import torch
from torch import nn

from espnet_pl.losses import joint as tiles
from espnet_pl.losses.joint import Joint, planes

FRAMES = torch.tensor([5, 3])
UTTERANCE = torch.tensor([0, 1, 0, 1])
TOKENS = torch.tensor([[6, 0, 1], [6, 2, -1], [6, -1, -1], [6, 5, 5]])


def example(dtype=torch.float64, j=4, v=7, seed=0):
    """Projections, weight and bias; two utterances, four states, the blank in the last place."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((2, 5, j), (4, j), (v, j), (v,))
    return [torch.randn(s, generator=g, dtype=dtype).requires_grad_() for s in shapes]


def ours(encoded, predicted, weight, bias, activation=torch.tanh, **how):
    network = Joint(weight, bias, activation)
    return planes(network, encoded, FRAMES, predicted, UTTERANCE, TOKENS, **how)


def dense(encoded, predicted, weight, bias, activation=torch.tanh, rest=False):
    """The equation of the docstring, one node at a time."""
    rows = []
    for s, n in enumerate(UTTERANCE.tolist()):
        for t in range(encoded.shape[1]):
            p = (weight @ activation(encoded[n, t] + predicted[s]) + bias).softmax(0)
            asked = [k for k in TOKENS[s].tolist() if k >= 0]
            row = [p[k].log() if k >= 0 else p.new_tensor(-torch.inf) for k in TOKENS[s].tolist()]
            row += [sum(p[k] for k in range(len(p)) if k not in asked).log()] if rest else []
            nothing = [p.new_tensor(-torch.inf)] * len(row)
            rows.append(torch.stack(row if t < FRAMES[n] else nothing))
    return torch.stack(rows, 1).view(-1, len(UTTERANCE), encoded.shape[1])


def finite_sum(log_p, seed=1):
    """A sum with weights of both signs of all that is finite."""
    g = torch.Generator().manual_seed(seed)
    weights = torch.randn(log_p.shape, generator=g, dtype=log_p.dtype)
    return (weights * log_p.masked_fill(log_p.isneginf(), 0.0)).sum()


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("activation", [torch.tanh, nn.Tanh(), nn.SiLU(), nn.functional.relu])
def test_equals_the_dense_network_with_its_gradients(activation, rest):
    inputs = example()
    mine, theirs = (f(*inputs, activation, rest=rest) for f in (ours, dense))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    grads = [torch.autograd.grad(finite_sum(log_p), inputs) for log_p in (mine, theirs)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rest", [False, True])
def test_gradient_is_the_numerical_one(rest):
    def function(*inputs):
        return finite_sum(ours(*inputs, rest=rest))

    assert torch.autograd.gradcheck(function, example())


def test_planes_and_rest_are_a_distribution():
    log_p = ours(*example(), rest=True)
    once = TOKENS[:, 1] != TOKENS[:, 2]  # the last state asks for one token twice
    total = log_p.exp().sum(0)[once]
    inside = torch.arange(5) < FRAMES[UTTERANCE[once], None]
    torch.testing.assert_close(total, inside.double())


def test_without_weights_every_token_is_equally_likely():
    encoded, predicted, weight, bias = example()
    log_p = ours(encoded, predicted, 0 * weight, 0 * bias)
    real = ~log_p.isneginf()
    assert real.sum() == 4 * 5 + 5 * 3  # of states 0 and 2, and of 1 and 3
    torch.testing.assert_close(log_p[real].exp(), torch.full((35,), 1 / 7, dtype=torch.float64))


@pytest.mark.parametrize("rows", [1, 3])
def test_the_size_of_a_tile_changes_nothing(rows, monkeypatch):
    inputs = example()
    before = ours(*inputs, rest=True)
    gradients = torch.autograd.grad(finite_sum(before), inputs)
    monkeypatch.setattr(tiles, "ROWS", rows)
    monkeypatch.setattr(tiles, "LEAST", rows)
    after = ours(*inputs, rest=True)
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(torch.autograd.grad(finite_sum(after), inputs), gradients)


def test_logits_of_a_tile_are_all_there_ever_is(monkeypatch):
    monkeypatch.setattr(tiles, "ROWS", 2)
    monkeypatch.setattr(tiles, "LEAST", 2)
    sizes = []
    softmax = torch.softmax
    monkeypatch.setattr(
        torch, "softmax", lambda x, *a, **k: sizes.append(len(x)) or softmax(x, *a, **k)
    )
    inputs = example()
    torch.autograd.grad(finite_sum(ours(*inputs)), inputs)
    assert max(sizes) == 2 and sum(sizes) == 16


def test_only_these_nodes():
    inputs = example()
    nodes = torch.zeros(4, 5, dtype=torch.bool)
    nodes[0, 1:3] = nodes[1, 0] = nodes[1, 4] = True  # the last one is padding
    log_p = ours(*inputs, nodes=nodes)
    expected = dense(*inputs)
    nodes[1, 4] = False
    torch.testing.assert_close(log_p[:, nodes], expected[:, nodes])
    assert log_p[:, ~nodes].isneginf().all()
    grads = [torch.autograd.grad(finite_sum(x), inputs) for x in (
        log_p, expected.masked_fill(~nodes, -torch.inf))]  # fmt: skip
    torch.testing.assert_close(*grads)


def test_known_values_are_taken_over_and_have_the_gradient():
    inputs = example()
    with torch.no_grad():
        known = ours(*inputs, rest=True)
    again = ours(*inputs, rest=True, known=known.clone())
    torch.testing.assert_close(again, known, rtol=0, atol=0)
    grads = [torch.autograd.grad(finite_sum(x), inputs) for x in (again, ours(*inputs, rest=True))]
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_what_is_left_out_is_small_for_its_utterance(monkeypatch):
    inputs = example()
    visited = []
    compute = tiles.Tile.compute
    monkeypatch.setattr(
        tiles.Tile, "compute", lambda self, i: visited.append(i) or compute(self, i)
    )
    log_p = ours(*inputs, skip=1e-3)
    visited.clear()
    weights = torch.zeros_like(log_p)
    weights[0, 0, 0], weights[1, 0, 1], weights[0, 2, 4] = 1.0, -2e-3, 1e-4  # one utterance
    weights[0, 1, 0], weights[1, 3, 2] = -1e-9, 1e-9  # the other: small, but its greatest
    (weights * log_p.masked_fill(log_p.isneginf(), 0.0)).sum().backward()
    assert torch.cat(visited).tolist() == [0, 1, 5, 17]
    assert inputs[0].grad.any()


def test_a_gradient_that_is_no_number_is_not_left_out():
    inputs = example()
    (ours(*inputs, skip=1e-3)[0, 0, 0] * torch.nan).backward()
    assert inputs[0].grad[0, 0].isnan().all()


def test_frozen_inputs_need_no_gradient():
    encoded, predicted, weight, bias = (x.detach() for x in example())
    assert not ours(encoded, predicted, weight, bias).requires_grad
    finite_sum(ours(encoded.requires_grad_(), predicted, weight, bias)).backward()
    assert encoded.grad.any()


def test_half_products_are_near_and_sums_are_float32():
    inputs = example(torch.float32, j=64, v=30)
    with torch.autocast("cpu", torch.bfloat16):
        short = ours(*inputs)
    full = ours(*inputs)
    assert short.dtype == torch.float32
    real = ~full.isneginf()
    torch.testing.assert_close(short[real], full[real], rtol=0, atol=0.2)
    grads = [torch.autograd.grad(finite_sum(x), inputs) for x in (short, full)]
    for mine, exact in zip(*grads):
        assert mine.dtype == torch.float32
        assert (mine - exact).norm() < 0.05 * exact.norm()


def test_a_token_that_cannot_be():
    encoded, predicted, weight, bias = example()
    with torch.no_grad():
        bias[5] = -torch.inf
    log_p = ours(encoded, predicted, weight, bias)
    assert log_p[1:, 3].isneginf().all() and not log_p[0, 3, :3].isneginf().any()
    log_p[0, 0, 0].backward()
    assert encoded.grad.isfinite().all() and bias.grad[5] == 0


def test_nothing_to_compute():
    encoded, predicted, weight, bias = example()
    none = torch.zeros(0, dtype=torch.long)
    network = Joint(weight, bias)
    log_p = planes(network, encoded, FRAMES, predicted[:0], none, none.view(0, 2))
    assert log_p.shape == (2, 0, 5)
    log_p.sum().backward()
    assert not encoded.grad.any()
    silent = planes(network, encoded, 0 * FRAMES, predicted, UTTERANCE, TOKENS)
    assert silent.isneginf().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"predicted": torch.zeros(4, 3)}, "joint network of 4 dimensions and 7 tokens, but"),
        ({"frames": torch.tensor([5, 6])}, "6 frames, but the encoder gave 5"),
        ({"tokens": TOKENS + 1}, "token 7, but the vocabulary has 7"),
        ({"utterance": UTTERANCE[:3]}, "4 states with 3 utterances"),
        ({"frames": FRAMES[:1]}, "2 utterances with 1 lengths"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    encoded, predicted, weight, bias = example(torch.float32)
    call = {
        "encoded": encoded, "frames": FRAMES, "predicted": predicted, "utterance": UTTERANCE,
        "tokens": TOKENS, **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        tiles._check(Joint(weight, bias), *call.values())  # in tests, annotations come before it
