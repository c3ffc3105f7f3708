"""losses/lattice: brute force · gradient · closed form · invariance · hostile input."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espnet_pl.losses.lattice import full_sum


def brute_force(blank, label, frames, lengths):
    """Every order of T − 1 blanks and U labels, and the last blank; one hypothesis at a time."""
    sums = []
    for b, y, t_end, u_end in zip(blank, label, frames.tolist(), lengths.tolist()):
        alignments = []
        steps = t_end - 1 + u_end
        for labels_at in itertools.combinations(range(steps), u_end) if t_end else ():
            t = u = 0
            arcs = []
            for step in range(steps):
                if step in labels_at:
                    arcs.append(y[u, t])
                    u += 1
                else:
                    arcs.append(b[u, t])
                    t += 1
            alignments.append(sum([*arcs, b[u_end, t_end - 1]]))
        nothing = blank.new_full((), -torch.inf)
        sums.append(torch.stack(alignments).logsumexp(0) if alignments else nothing)
    return torch.stack(sums)


def arcs(frames, lengths, dtype=torch.float64, seed=0, room=1):
    """Random arcs with room behind every end; in the room are numbers that must not be read."""
    g = torch.Generator().manual_seed(seed)
    k, t, u = len(frames), max(frames) + room, max(lengths) + room
    blank = torch.randn(k, u + 1, t, generator=g, dtype=dtype) - 1
    label = torch.randn(k, u, t, generator=g, dtype=dtype) - 1
    return blank, label, torch.tensor(frames), torch.tensor(lengths)


def gradients(function, blank, label, frames, lengths, weights):
    blank, label = (x.clone().requires_grad_() for x in (blank, label))
    total = (function(blank, label, frames, lengths) * weights).sum()
    return torch.autograd.grad(total, (blank, label), materialize_grads=True)


sizes = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 4)), min_size=1, max_size=4)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(sizes, st.integers(0, 10**6))
def test_equals_the_sum_over_all_alignments(sizes, seed):
    example = arcs(*zip(*sizes), seed=seed)
    tight = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(full_sum(*example), brute_force(*example), **tight)
    weights = torch.linspace(-1.5, 2, len(sizes), dtype=torch.float64)
    ours, theirs = (gradients(f, *example, weights) for f in (full_sum, brute_force))
    torch.testing.assert_close(ours, theirs, **tight)


def test_gradient_is_the_numerical_one():
    blank, label, *rest = arcs([3, 1, 2], [2, 2, 0])
    inputs = (blank.requires_grad_(), label.requires_grad_())
    assert torch.autograd.gradcheck(lambda b, y: full_sum(b, y, *rest), inputs)


def test_equal_arcs_are_counted():
    blank, label, frames, lengths = arcs([7], [5], room=0)
    log_p = full_sum(blank.fill_(-0.5), label.fill_(-2.0), frames, lengths)
    alignments = math.comb(7 - 1 + 5, 5)
    assert log_p.item() == pytest.approx(math.log(alignments) - 7 * 0.5 - 5 * 2.0, abs=1e-12)


def test_each_alignment_has_t_blanks_and_u_labels():
    frames, lengths = [6, 4, 1], [3, 4, 2]
    example = arcs(frames, lengths)
    blank, label = gradients(full_sum, *example, torch.ones(3))
    torch.testing.assert_close(blank.sum((1, 2)), torch.tensor(frames).double())
    torch.testing.assert_close(label.sum((1, 2)), torch.tensor(lengths).double())


def test_time_reversed_is_the_same():
    blank, label, frames, lengths = arcs([5], [3], room=0)
    # The last blank stays the last: turned round, it is the first arc of every alignment.
    inner = full_sum(blank, label, frames, lengths) - blank[:, -1, -1]
    blank, label = blank.clone(), label.flip(1, 2)
    last = blank[:, -1, -1].clone()
    moved = blank.flip(1, 2).roll(-1, 2)
    moved[:, -1, -1] = last
    torch.testing.assert_close(full_sum(moved, label, frames, lengths) - last, inner)


def test_company_and_padding_change_nothing():
    blank, label, frames, lengths = arcs([6, 2, 4], [2, 4, 0])
    together = full_sum(blank, label, frames, lengths)
    for i, (t, u) in enumerate(zip(frames.tolist(), lengths.tolist())):
        own = blank[i : i + 1, : u + 1, :t], label[i : i + 1, :u, :t]
        alone = full_sum(*own, frames[i : i + 1], lengths[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=0)


def test_impossible_arcs_leave_the_others():
    blank, label, frames, lengths = arcs([4, 4], [2, 2], room=0)
    blank[0, 0, 1] = label[0, 0, 0] = -torch.inf  # what is left to do first is nothing
    blank[1, 0, 1] = -torch.inf
    log_p = full_sum(blank, label, frames, lengths)
    expected = brute_force(blank, label, frames, lengths)
    torch.testing.assert_close(log_p, expected)
    for gradient in gradients(full_sum, blank, label, frames, lengths, torch.ones(2)):
        assert gradient.isfinite().all()


def test_no_alignment_is_minus_infinity_with_no_gradient():
    blank, label, frames, lengths = arcs([0, 3, 0], [0, 1, 2])
    label[1] = -torch.inf
    assert full_sum(blank, label, frames, lengths).isneginf().all()
    for gradient in gradients(full_sum, blank, label, frames, lengths, torch.ones(3)):
        assert not gradient.any()


def test_what_is_not_a_number_is_not_hidden():
    blank, label, frames, lengths = arcs([3], [1])
    blank[0, 0, 0] = torch.nan
    assert full_sum(blank, label, frames, lengths).isnan().all()


def test_nothing_at_all():
    none = torch.zeros(0, dtype=torch.long)
    assert full_sum(torch.zeros(0, 1, 3), torch.zeros(0, 0, 3), none, none).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_short_types_are_summed_in_float64(dtype):
    blank, label, frames, lengths = arcs([200], [40], dtype=torch.float32, room=0)
    blank, label = (5 * blank).to(dtype), (5 * label).to(dtype)
    expected = full_sum(blank.double(), label.double(), frames, lengths)
    torch.testing.assert_close(full_sum(blank, label, frames, lengths), expected, rtol=0, atol=0)
    gradient = gradients(full_sum, blank, label, frames, lengths, torch.ones(1))
    assert gradient[0].dtype == dtype
