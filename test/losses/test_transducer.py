"""losses/transducer: brute force · gradient · closed form · invariance · hostile input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espnet_pl.losses import transducer
from espnet_pl.losses.joint import Joint
from espnet_pl.losses.transducer import (
    hypotheses,
    log_probability,
    log_probability_of_logits,
)
from test.losses.test_lattice import brute_force

TIGHT = {"rtol": 0, "atol": 1e-12}


def network(n, t, v=5, j=4, dtype=torch.float64, seed=0):
    """Projected encoder output, one predictor output for each label, weight and bias."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((n, t, j), (v, j), (v, j), (v,))
    return [torch.randn(s, generator=g, dtype=dtype).requires_grad_() for s in shapes]


def last_label(embedding, labels, blank):
    """A predictor with a memory of one label, (k, u1, j)."""
    start = labels.new_full((len(labels), 1), blank)
    return embedding[torch.cat([start, labels.clamp(0, len(embedding) - 1)], 1)]


def prefix_sum(embedding, labels, blank):
    """A predictor that remembers all labels and their order."""
    order = torch.arange(1, labels.shape[1] + 2)[:, None]
    return (last_label(embedding, labels, blank) * order).cumsum(1).sin()


def ours(inputs, frames, labels, lengths, utterance, blank, predictor=last_label, **how):
    encoded, embedding, weight, bias = inputs
    context = {"context": how.pop("context")} if "context" in how else {}
    hyps = hypotheses(labels, lengths, utterance, blank=blank, **context)
    predicted = hyps.of_states(predictor(embedding, labels, blank))
    return log_probability(Joint(weight, bias), encoded, frames, predicted, hyps, **how)


def dense(inputs, frames, labels, lengths, utterance, blank, predictor=last_label, fast_emit=0.0):
    """All logits of all hypotheses, and every alignment one by one."""
    encoded, embedding, weight, bias = inputs
    utterance = torch.arange(len(labels)) if utterance is None else utterance
    predicted = predictor(embedding, labels, blank)
    z = torch.tanh(encoded[utterance, None] + predicted[:, :, None]) @ weight.t() + bias
    log_p = z.log_softmax(-1)  # k u1 t v
    following = labels.clamp(0, len(bias) - 1)[:, :, None, None].expand(-1, -1, z.shape[2], 1)
    label = log_p[:, :-1].gather(3, following)[..., 0]
    label = label + fast_emit * (label - label.detach())  # nothing, with a gradient
    return brute_force(log_p[..., blank], label, frames[utterance], lengths)


@st.composite
def lattices(draw):
    """Frames, hypotheses with repeated labels, their utterances, and any blank."""
    v = 5
    blank = draw(st.integers(0, v - 1))
    frames = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    token = st.sampled_from([k for k in range(v) if k != blank])
    sequences = draw(st.lists(st.lists(token, max_size=4), min_size=1, max_size=4))
    owners = [draw(st.integers(0, len(frames) - 1)) for _ in sequences]
    width = max(map(len, sequences)) + draw(st.integers(0, 1))
    # The padding is a blank: whoever reads it, gets caught.
    rows = [y + [blank] * (width - len(y)) for y in sequences]
    labels = torch.tensor(rows, dtype=torch.long).view(len(rows), width)
    lengths = torch.tensor([len(y) for y in sequences])
    return torch.tensor(frames), labels, lengths, torch.tensor(owners), blank


@settings(deadline=None, max_examples=20, derandomize=True)
@given(lattices(), st.integers(0, 10**6))
@pytest.mark.parametrize(
    ("predictor", "context"), [(last_label, None), (last_label, 1), (prefix_sum, None)]
)
def test_equals_the_sum_over_all_alignments(predictor, context, lattice, seed):
    frames = lattice[0]
    inputs = network(len(frames), int(frames.max()) + 1, seed=seed)
    mine = ours(inputs, *lattice, predictor, exact=True, context=context)
    theirs = dense(inputs, *lattice, predictor)
    torch.testing.assert_close(mine, theirs, **TIGHT)
    weights = torch.linspace(-1, 2, len(mine), dtype=torch.float64)
    grads = [torch.autograd.grad((x * weights).sum(), inputs) for x in (mine, theirs)]
    torch.testing.assert_close(*grads, **TIGHT)


LABELS = torch.tensor([[1, 2, 2], [3, 1, 9], [9, 9, 9]])
LENGTHS = torch.tensor([3, 2, 0])
FRAMES = torch.tensor([4, 1, 2])


def test_gradient_is_the_numerical_one():
    def function(*inputs):
        return ours(inputs, FRAMES, LABELS, LENGTHS, None, 0, prefix_sum, exact=True)

    assert torch.autograd.gradcheck(function, network(3, 4))


def test_one_hypothesis_each_is_the_same_with_and_without_sharing():
    inputs = network(3, 4)
    alone = ours(inputs, FRAMES, LABELS, LENGTHS, None, 0)
    shared = ours(inputs, FRAMES, LABELS, LENGTHS, torch.arange(3), 0)
    torch.testing.assert_close(alone, shared, **TIGHT)


def test_one_frame_is_a_product():
    encoded, embedding, weight, bias = inputs = network(1, 1)
    labels = torch.tensor([[2, 3]])
    log_p = ours(inputs, torch.tensor([1]), labels, torch.tensor([2]), None, 0)
    arcs = [(0, 2), (2, 3), (3, 0)]  # state, token; the start is as after a blank
    z = [(weight @ torch.tanh(encoded[0, 0] + embedding[s]) + bias).log_softmax(0) for s, _ in arcs]
    torch.testing.assert_close(log_p[0], sum(row[k] for row, (_, k) in zip(z, arcs)))


def test_states_are_shared():
    labels = torch.tensor([[1, 2, 3], [1, 2, 4], [1, 3, 3]])
    lengths = torch.tensor([3, 3, 3])
    same, other = torch.zeros(3, dtype=torch.long), torch.tensor([0, 0, 1])
    assert len(hypotheses(labels, lengths).rows) == 12
    assert len(hypotheses(labels, lengths, same).rows) == 7
    assert len(hypotheses(labels, lengths, other).rows) == 9
    assert len(hypotheses(labels, lengths, same, context=1).rows) == 5  # start, 1, 2, 3, 4
    assert hypotheses(labels, lengths, same).tokens[1].tolist() == [0, 2, 3]


def test_company_and_padding_change_nothing():
    inputs = network(3, 6)
    together = ours(inputs, FRAMES, LABELS, LENGTHS, None, 0)
    for i in range(3):
        own = [inputs[0][i : i + 1, : FRAMES[i]], *inputs[1:]]
        alone = ours(
            own, FRAMES[i : i + 1], LABELS[i : i + 1, : LENGTHS[i]], LENGTHS[i : i + 1], None, 0
        )
        torch.testing.assert_close(alone[0], together[i], **TIGHT)


def test_renaming_the_tokens_changes_nothing():
    encoded, embedding, weight, bias = inputs = network(3, 4)
    order = torch.tensor([4, 2, 0, 1, 3])  # new name of each token; the blank becomes 4
    back = order.argsort()
    renamed = [encoded, embedding[back], weight[back], bias[back]]
    labels = torch.where(LABELS < 5, order[LABELS.clamp(max=4)], LABELS)
    before = ours(inputs, FRAMES, LABELS, LENGTHS, None, 0)
    torch.testing.assert_close(ours(renamed, FRAMES, labels, LENGTHS, None, 4), before)


def test_what_is_left_out_is_less_than_a_millionth():
    inputs = network(2, 30, v=20, j=16)
    inputs[3].data[0] = 6.0  # a blank that is almost certain, as in a trained model
    labels = torch.randint(1, 20, (2, 8), generator=torch.Generator().manual_seed(0))
    call = torch.tensor([30, 21]), labels, torch.tensor([8, 5]), None, 0
    lean, exact = (ours(inputs, *call, exact=e) for e in (False, True))
    torch.testing.assert_close(lean, exact, rtol=0, atol=0)
    grads = [torch.autograd.grad(x.sum(), inputs) for x in (lean, exact)]
    for mine, theirs in zip(*grads):
        assert (mine - theirs).norm() < 1e-5 * theirs.norm()


def test_float32_is_near_float64():
    inputs = network(2, 40, v=20, j=16)
    labels = torch.randint(1, 20, (2, 10), generator=torch.Generator().manual_seed(0))
    call = torch.tensor([40, 33]), labels, torch.tensor([10, 7]), None, 0
    short = [x.detach().float().requires_grad_() for x in inputs]
    lean, exact = ours(short, *call), ours(inputs, *call, exact=True)
    torch.testing.assert_close(lean, exact, rtol=1e-7, atol=0)
    for mine, theirs in zip(
        torch.autograd.grad(lean.sum(), short), torch.autograd.grad(exact.sum(), inputs)
    ):
        assert (mine - theirs).norm() < 1e-6 * theirs.norm()


def test_impossible_tokens_and_no_frames():
    encoded, embedding, weight, bias = network(3, 4)
    bias = torch.where(torch.arange(5) == 3, -torch.inf, bias)  # of the second utterance's labels
    log_p = ours([encoded, embedding, weight, bias], FRAMES * torch.tensor([1, 1, 0]),
                 LABELS, LENGTHS, None, 0)  # fmt: skip
    assert log_p.isneginf().tolist() == [False, True, True]
    gradient = torch.autograd.grad(log_p.sum(), encoded)[0]
    assert gradient.isfinite().all() and gradient[0].any() and not gradient[1:].any()


@pytest.mark.parametrize(
    ("labels", "lengths", "message"),
    [
        ([[1, 0]], [2], "the blank, 0, is among the labels"),
        ([[1, 2]], [3], r"lengths \[3\] for labels of shape \(1, 2\)"),
        ([[1, 2]], [-1], r"lengths \[-1\]"),
    ],
)
def test_hypotheses_that_cannot_be(labels, lengths, message):
    with pytest.raises(ValueError, match=message):
        hypotheses(torch.tensor(labels), torch.tensor(lengths))


def test_fast_emit_pushes_labels_only():
    inputs = network(3, 4)
    call = FRAMES, LABELS, LENGTHS, None, 0
    pushed, plain = (ours(inputs, *call, exact=True, fast_emit=f) for f in (0.5, 0.0))
    torch.testing.assert_close(pushed, plain, rtol=0, atol=0)
    expected = dense(inputs, *call, fast_emit=0.5)
    grads = [torch.autograd.grad(x.sum(), inputs) for x in (pushed, expected)]
    torch.testing.assert_close(*grads, **TIGHT)


@pytest.mark.parametrize("utterance", [None, torch.tensor([1, 0])])
def test_tensors_are_made_where_the_inputs_are(utterance, monkeypatch):
    """As a GPU needs it; here anything made without saying where has no numbers."""
    monkeypatch.setattr(transducer, "LARGE", 0)  # look for a band
    inputs = network(2, 40, v=12)
    frames, lengths = torch.tensor([40, 33]), torch.tensor([3, 2])
    labels = torch.tensor([[1, 2, 3], [4, 5, 0]])
    predicted = torch.randn(2, 4, 4, dtype=torch.float64)
    with torch.device("meta"):
        encoded, _, weight, bias = inputs
        hyps = hypotheses(labels, lengths, utterance, blank=11)
        states, joint = hyps.of_states(predicted), Joint(weight, bias)
        for exact in (False, True):
            log_p = log_probability(joint, encoded, frames, states, hyps, exact=exact)
            assert log_p.isfinite().all()
            log_p.sum().backward()
        logits = torch.tanh(encoded[:, :, None] + predicted[:, None]) @ weight.t() + bias
        log_p = log_probability_of_logits(logits, frames, labels, lengths, blank=11)
        log_p.sum().backward()
    assert encoded.grad.any()
