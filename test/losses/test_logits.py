"""losses/logits: brute force · gradient · the other way to the same numbers · hostile input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espnet_pl.losses import logits as tiles
from espnet_pl.losses import transducer
from espnet_pl.losses.joint import Joint
from espnet_pl.losses.transducer import (
    hypotheses,
    log_probability,
    log_probability_of_logits,
    self_test,
)
from test.losses.test_lattice import brute_force

TIGHT = {"rtol": 0, "atol": 1e-12}
FRAMES = torch.tensor([4, 1, 2])
LABELS = torch.tensor([[1, 2, 2], [3, 1, 9], [9, 9, 9]])
LENGTHS = torch.tensor([3, 2, 0])  # more labels than frames in the second, none in the third
WEIGHTS = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def example(dtype=torch.float64, shape=(3, 5, 4, 5), seed=0):
    g = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype).requires_grad_()


def dense(logits, frames, labels, lengths, blank=0, fast_emit=0.0):
    """A log-softmax of everything, and every alignment one by one."""
    log_p = logits.log_softmax(-1).transpose(1, 2)  # n u1 t v
    following = labels.long().clamp(0, logits.shape[3] - 1)
    following = following[:, :, None, None].expand(-1, -1, log_p.shape[2], 1)
    label = log_p[:, :-1].gather(3, following)[..., 0]
    if fast_emit:
        label = label + fast_emit * (label - label.detach())  # nothing, with a gradient
    return brute_force(log_p[..., blank], label, frames, lengths)


def ours(logits, frames=FRAMES, labels=LABELS, lengths=LENGTHS, **how):
    return log_probability_of_logits(logits, frames, labels, lengths, **how)


def gradient(log_p, logits):
    return torch.autograd.grad((log_p * WEIGHTS[: len(log_p)]).sum(), logits)[0]


@st.composite
def lattices(draw):
    """Sizes, labels and any blank; the padding is a blank: whoever reads it, gets caught."""
    blank = draw(st.integers(0, 4))
    frames = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    token = st.sampled_from([k for k in range(5) if k != blank])
    sequences = [draw(st.lists(token, max_size=4)) for _ in frames]
    width = max(map(len, sequences)) + draw(st.integers(0, 1))
    rows = [y + [blank] * (width - len(y)) for y in sequences]
    labels = torch.tensor(rows, dtype=torch.int32).view(len(rows), width)
    lengths = torch.tensor([len(y) for y in sequences], dtype=torch.int32)
    return torch.tensor(frames, dtype=torch.int32), labels, lengths, blank


@settings(deadline=None, max_examples=40, derandomize=True)
@given(lattices(), st.integers(0, 10**6), st.sampled_from([1, 13, 2**21]))
def test_equals_the_sum_over_all_alignments(lattice, seed, size):
    frames, labels, lengths, blank = lattice
    shape = (len(frames), int(frames.max()) + 1, labels.shape[1] + 1, 5)
    logits = example(shape=shape, seed=seed)
    expected = dense(logits, *lattice, fast_emit=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "LOGITS", size)
        mine = ours(logits, frames, labels, lengths, blank=blank, fast_emit=0.5)
        torch.testing.assert_close(mine, expected, **TIGHT)
        torch.testing.assert_close(gradient(mine, logits), gradient(expected, logits), **TIGHT)


def test_gradient_is_the_numerical_one():
    assert torch.autograd.gradcheck(ours, example())


def test_the_same_network_without_its_logits_is_the_same():
    g = torch.Generator().manual_seed(0)
    shapes = ((3, 5, 4), (3, 4, 4), (5, 4), (5,))
    inputs = [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]
    encoded, predicted, weight, bias = inputs
    hyps = hypotheses(LABELS, LENGTHS)
    states = hyps.of_states(predicted)
    lean = log_probability(Joint(weight, bias), encoded, FRAMES, states, hyps, exact=True)
    logits = torch.tanh(encoded[:, :, None] + predicted[:, None]) @ weight.t() + bias
    mine = ours(logits)
    torch.testing.assert_close(mine, lean, **TIGHT)
    grads = [torch.autograd.grad((x * WEIGHTS).sum(), inputs) for x in (mine, lean)]
    torch.testing.assert_close(*grads, **TIGHT)


def test_one_frame_is_a_product():
    logits = example(shape=(1, 1, 3, 5))
    log_p = logits[0, 0].log_softmax(-1)
    mine = ours(logits, torch.tensor([1]), torch.tensor([[2, 3]]), torch.tensor([2]))
    torch.testing.assert_close(mine[0], log_p[0, 2] + log_p[1, 3] + log_p[2, 0])


def test_a_constant_at_a_node_changes_nothing_and_gradients_sum_to_nothing():
    logits = example()
    constant = 100 * example(shape=(3, 5, 4, 1), seed=1).detach()
    torch.testing.assert_close(ours(logits + constant), ours(logits))
    total = gradient(ours(logits), logits).sum(-1)
    torch.testing.assert_close(total, torch.zeros_like(total))


@pytest.mark.parametrize("in_place", [False, True])
def test_padding_is_not_read_and_has_no_gradient(in_place):
    clean = example()
    logits = clean.detach().clone()
    inside = torch.zeros(3, 5, 4, dtype=torch.bool)
    for i, (t, u) in enumerate(zip(FRAMES, LENGTHS)):
        inside[i, :t, : u + 1] = True
    logits[~inside] = torch.nan
    log_p = ours(logits.requires_grad_(), in_place=in_place)
    torch.testing.assert_close(log_p, ours(clean), rtol=0, atol=0)
    given = gradient(log_p, logits)
    assert not given[~inside].any()
    torch.testing.assert_close(given, gradient(ours(clean), clean), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_in_place_is_the_same_and_destroys_the_logits(dtype):
    logits = example(dtype)
    expected = gradient(ours(logits), logits)
    network = logits.detach().clone().requires_grad_()
    written = network * 1  # as a joint network's last layer, which does not need what it gave
    given = []
    written.register_hook(given.append)
    log_p = ours(written, in_place=True)
    torch.testing.assert_close(gradient(log_p, network), expected, rtol=0, atol=0)
    assert given[0].data_ptr() == written.data_ptr()
    torch.testing.assert_close(written.detach(), expected, rtol=0, atol=0)


def test_who_needs_destroyed_logits_gets_an_error():
    def destroy(logits):
        loss = ours(logits, in_place=True).sum()
        loss.backward(retain_graph=True)
        return loss

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        destroy(example() * 1).backward()  # a second time
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        destroy(example().log_softmax(-1))  # its own backward pass reads what it gave


@pytest.mark.parametrize(
    ("dtype", "near"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)]
)
def test_short_types_are_summed_in_float32(dtype, near):
    logits = example(dtype, (1, 60, 13, 40))
    call = torch.tensor([60]), torch.randint(1, 40, (1, 12)), torch.tensor([12])
    short, exact = logits, logits.detach().double().requires_grad_()
    values = [ours(x, *call) for x in (short, exact)]
    torch.testing.assert_close(*values, rtol=1e-6, atol=0)
    mine, theirs = (gradient(log_p, x) for log_p, x in zip(values, (short, exact)))
    assert mine.dtype == dtype
    assert (mine.double() - theirs).norm() < near * theirs.norm()


def test_any_strides_and_types_of_lengths():
    logits = example()
    expected = ours(logits)
    turned = logits.transpose(1, 2).contiguous().transpose(1, 2)
    mine = ours(turned, FRAMES.int(), LABELS.int(), LENGTHS.int())
    torch.testing.assert_close(mine, expected, rtol=0, atol=0)
    torch.testing.assert_close(gradient(mine, logits), gradient(expected, logits))


def test_impossible_tokens_and_no_frames():
    logits = example().detach()
    logits[0, 0, 0, 1] = -torch.inf  # one alignment less
    logits[1, :, :, 3] = -torch.inf  # a label that cannot be
    frames = FRAMES * torch.tensor([1, 1, 0])
    log_p = ours(logits.requires_grad_(), frames)
    assert log_p.isneginf().tolist() == [False, True, True]
    torch.testing.assert_close(log_p[:2], dense(logits, frames, LABELS, LENGTHS)[:2])
    given = gradient(log_p, logits)
    assert given.isfinite().all() and given[0].any() and not given[1:].any()


def test_what_is_not_a_number_is_not_hidden():
    logits = example().detach()
    logits[0, 0, 0, 4] = torch.nan
    assert ours(logits).isnan().tolist() == [True, False, False]


def test_the_forward_pass_makes_nothing_of_their_size(monkeypatch):
    monkeypatch.setattr(tiles, "LOGITS", 40)
    sizes = []
    softmax = torch.Tensor.log_softmax
    monkeypatch.setattr(
        torch.Tensor,
        "log_softmax",
        lambda x, *a, **k: sizes.append(x.numel()) or softmax(x, *a, **k),
    )
    ours(example())
    assert max(sizes) <= 40 and sum(sizes) == (4 * 4 + 1 * 3 + 2 * 1) * 5


def test_nothing_at_all():
    none = torch.zeros(0, dtype=torch.long)
    assert ours(torch.zeros(0, 3, 1, 5), none, none.view(0, 0), none).shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3, 5, 5)}, r"logits \(3, 5, 5\) and labels \(3, 3\)"),
        ({"labels": LABELS[:, :2]}, r"ask for labels \(3, 3\) .* not \(3, 2\)"),
        ({"frames": FRAMES[:2]}, r"3 lengths of frames and of labels, not \(3, 3\), \(2,\)"),
        ({"lengths": LENGTHS[:, None]}, r"\(3, 1\)"),
        ({"frames": FRAMES + 2}, r"frames \[6, 3, 4\], but the logits have room for 5"),
        ({"lengths": LENGTHS - 1}, r"lengths \[2, 1, -1\], but the logits have room for 3"),
        ({"lengths": LENGTHS + 1}, r"lengths \[4, 3, 1\], but the logits have room for 3"),
        ({"labels": LABELS + 3}, "token 5, but the vocabulary has 5"),
        ({"blank": 5}, "token 5, but the vocabulary has 5"),
        ({"blank": 2}, "the blank, 2, is among the labels"),
        ({"logits": torch.zeros(3, 4, 5, 5).transpose(1, 2), "in_place": True}, "not contiguous"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    call = {
        "logits": example(), "frames": FRAMES, "labels": LABELS, "lengths": LENGTHS, "blank": 0,
        "in_place": False, **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        tiles._check(*call.values())  # in tests, annotations come before it


@pytest.mark.parametrize("fault", ["value", "gradient", "logits", "no number"])
def test_a_loss_that_is_off_is_noticed(fault, monkeypatch):
    self_test.cache_clear()
    self_test()
    true = transducer.full_sum

    def off(blank, label, frames, lengths):
        if fault == "value":
            return true(blank, label, frames, lengths) + 1e-6
        if fault == "no number":
            return true(blank, label, frames, lengths) * torch.nan
        label = label + 1e-6 * (label - label.detach())  # right value, wrong gradient
        return true(blank, label, frames, lengths)

    if fault == "logits":
        planes = transducer.planes_of_logits
        monkeypatch.setattr(
            transducer, "planes_of_logits", lambda *a, **k: planes(*a, **k) * (1 + 1e-6)
        )
    else:
        monkeypatch.setattr(transducer, "full_sum", off)
    self_test()  # once in a process is enough
    self_test.cache_clear()
    for _ in range(2):  # a failure is not forgotten
        with pytest.raises(RuntimeError, match="is not the sum over all alignments"):
            self_test()
    monkeypatch.undo()
    self_test()


def test_the_self_test_runs_in_any_state():
    state = torch.get_rng_state()
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        self_test.cache_clear()
        with context:
            self_test()
    with torch.device("meta"):  # where a model is built without memory
        self_test.cache_clear()
        self_test()
    assert torch.equal(torch.get_rng_state(), state)
