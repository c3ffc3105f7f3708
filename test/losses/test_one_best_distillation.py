"""losses/lattice_distillation, one path: brute force · gradient · bounds · hostile input."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espnet_pl.losses.lattice_distillation import (
    best_alignment,
    classes,
    full_lattice,
    hidden_at,
    one_best,
)
from espnet_pl.losses.soft_labels import kl_of_linear
from test.losses.small_lattices import (
    FRAMES,
    LABELS,
    LENGTHS,
    TIGHT,
    a_path,
    distribution,
    gradients,
    kl,
    lattices,
    network,
)
from test.losses.test_lattice import arcs


def alignments(t_end, u_end):
    """Of T frames and U labels: the nodes that the arcs leave, and which of them are labels."""
    for labels_at in itertools.combinations(range(t_end - 1 + u_end), u_end):
        t, u, path = 0, 0, []
        for step in range(t_end + u_end):
            path.append((t, u, step in labels_at))
            t, u = t + (step not in labels_at), u + (step in labels_at)
        yield path


def score(path, blank, label):
    return sum(float(label[u, t] if said else blank[u, t]) for t, u, said in path)


def best_by_hand(blank, label, t_end, u_end):
    """The likeliest; of several, that whose labels, seen from the end, are earliest."""
    return min(
        alignments(t_end, u_end),
        key=lambda path: (-score(path, blank, label), [t for t, _, said in path[::-1] if said]),
    )


sizes = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 4)), min_size=1, max_size=4)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(sizes, st.booleans(), st.integers(0, 10**6))
def test_best_alignment_is_the_best_of_all(sizes, ties, seed):
    blank, label, frames, lengths = arcs(*zip(*sizes), seed=seed)
    if ties:
        blank, label = blank.round(), label.round()
    planes = torch.stack([blank, torch.nn.functional.pad(label, (0, 0, 0, 1))])
    t, u, count = best_alignment(planes, frames, lengths)
    assert count.tolist() == [sum(x) for x in sizes]
    for k, (t_end, u_end) in enumerate(sizes):
        expected = best_by_hand(blank[k], label[k], t_end, u_end)
        path = list(zip(t[k].tolist(), u[k].tolist()))
        assert path[: count[k]] == [(a, b) for a, b, _ in expected]
        assert set(path[count[k] :]) <= {(t_end - 1, u_end)}


def test_what_is_behind_the_end_does_not_lead_a_path():
    planes = classes(lattices(network()))
    t, u, count = best_alignment(planes, FRAMES, LENGTHS)
    for hostile in (torch.inf, torch.nan):
        loud = planes.nan_to_num(neginf=-1.0)
        for k, (frames, labels) in enumerate(zip(FRAMES.tolist(), LENGTHS.tolist())):
            loud[:, k, labels + 1 :] = loud[:, k, :, frames:] = loud[1, k, labels] = hostile
        again = best_alignment(loud, FRAMES, LENGTHS)
        assert all(map(torch.equal, again, (t, u, count)))
    assert all(map(torch.equal, best_alignment(planes[:2], FRAMES, LENGTHS), (t, u, count)))


@pytest.mark.parametrize("value", [-1.0, -math.inf, math.nan])
def test_alike_or_impossible_arcs_still_make_a_path(value):
    t, u, count = best_alignment(torch.full((3, 4, 4, 5), value), FRAMES, LENGTHS)
    for k in range(4):
        path = list(zip(t[k].tolist(), u[k].tolist()))[: count[k]]
        first = [(0, i) for i in range(LENGTHS[k])]  # all labels, then all blanks
        assert path == first + [(i, LENGTHS[k]) for i in range(FRAMES[k])]


def test_paths_of_nothing():
    none = torch.zeros(0, dtype=torch.long)
    t, u, count = best_alignment(torch.zeros(3, 0, 2, 4), none, none)
    assert t.shape == u.shape == (0, 0) and count.shape == (0,)
    t, u, count = best_alignment(torch.zeros(3, 4, 4, 0), 0 * FRAMES, LENGTHS)
    assert t.shape == u.shape == (4, 0) and count.tolist() == [0] * 4
    frames = FRAMES * torch.tensor([1, 0, 1, 1])
    t, u, count = best_alignment(classes(lattices(network(), frames)), frames, LENGTHS)
    assert count.tolist() == [7, 0, 2, 5] and (t[1] == 0).all()
    with pytest.raises(ValueError, match="but the planes have room for 2"):
        best_alignment(torch.zeros(3, 4, 4, 2), FRAMES, LENGTHS)


@pytest.mark.parametrize("shift", [0, 1, 3, -1])
@pytest.mark.parametrize("keep", [1, 3, 5])
def test_one_best_is_the_written_sum(keep, shift):
    student, teacher = network(), network(1, j=3)
    t, u, target = a_path(lattices(teacher), keep)
    mine = one_best(lattices(student), t, u, target, shift)
    losses = []
    for k, (t_end, u_end) in enumerate(zip(FRAMES.tolist(), LENGTHS.tolist())):
        log_p = torch.stack([
            torch.stack([distribution(teacher, k, i, j) for i in range(t_end)])
            for j in range(u_end + 1)
        ])  # fmt: skip
        label = log_p[:-1].gather(2, LABELS[k, :u_end, None, None].expand(-1, t_end, 1))[..., 0]
        loss = torch.zeros((), dtype=torch.float64)
        for i, j, _ in best_by_hand(log_p[..., 0].detach(), label.detach(), t_end, u_end):
            at = min(max(i + shift, 0), t_end - 1)
            order = log_p[j, i].argsort(descending=True).tolist()
            groups = [[v] for v in order[:keep]] + [order[keep:]]
            loss = loss + kl(log_p[j, i].detach(), distribution(student, k, at, j), groups)
        losses.append(loss)
    theirs = torch.stack(losses)
    torch.testing.assert_close(mine, theirs, **TIGHT)
    torch.testing.assert_close(gradients(mine, student), gradients(theirs, student), **TIGHT)


def test_one_best_is_a_part_of_the_lattice():
    student, teacher = lattices(network()), lattices(network(1))
    loss, whole = one_best(student, *a_path(teacher)), full_lattice(student, teacher)
    assert (loss <= whole + 1e-12).all()
    # With one frame, or without a label, every node is on the path.
    torch.testing.assert_close(loss[1:3], whole[1:3], **TIGHT)


def test_one_best_of_the_student_s_own_path_costs_nothing():
    student = lattices(network())
    loss = one_best(student, *a_path(student))
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-12)


def test_hidden_vectors_are_those_of_the_joint_network():
    inputs = network()
    mine = lattices(inputs)
    t, u, target = a_path(mine)
    hidden = hidden_at(mine, t, u)
    for k, i in itertools.product(range(4), range(t.shape[1])):
        expected = torch.tanh(inputs[0][k, t[k, i]] + inputs[1][k, u[k, i]])
        torch.testing.assert_close(hidden[k, i], expected)
    loss = kl_of_linear(hidden, *inputs[2:], target.frames, target)
    torch.testing.assert_close(loss, one_best(mine, t, u, target))
    assert torch.autograd.gradcheck(
        lambda *x: one_best(lattices(x), *a_path(lattices(network(1))), 1), network()
    )
