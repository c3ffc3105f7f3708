"""Four small lattices, of more labels than frames, of one frame and of no label, by hand."""

import itertools

import torch

from espnet_pl.losses.joint import Joint
from espnet_pl.losses.lattice_distillation import (
    best_alignment,
    classes,
    collapsed,
    full_lattice,
    path_targets,
)
from espnet_pl.losses.transducer import Lattices, hypotheses

# More labels than frames, one frame, no labels; 9 is padding, and no token.
LABELS = torch.tensor([[1, 2, 2], [3, 1, 9], [9, 9, 9], [2, 2, 4]])
LENGTHS = torch.tensor([3, 2, 0, 3])
FRAMES = torch.tensor([4, 1, 2, 2])
WEIGHTS = torch.tensor([0.3, -1.0, 2.0, 1.5], dtype=torch.float64)
TIGHT = {"rtol": 1e-12, "atol": 1e-12}


def network(seed=0, j=4, v=5, room=5, dtype=torch.float64):
    """Projected encoder output, predictor output after each prefix, weight and bias."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((4, room, j), (4, 4, j), (v, j), (v,))
    return [torch.randn(s, generator=g, dtype=dtype).requires_grad_() for s in shapes]


def lattices(
    inputs, frames=FRAMES, labels=LABELS, lengths=LENGTHS, activation=torch.tanh
) -> Lattices:
    encoded, predicted, weight, bias = inputs
    hyps = hypotheses(labels, lengths)
    joint = Joint(weight, bias, activation)
    return Lattices(joint, encoded, frames, hyps.of_states(predicted), hyps)


def distribution(inputs, k, t, u, activation=torch.tanh):
    """log p(·|t,u) of hypothesis k."""
    encoded, predicted, weight, bias = inputs
    return (weight @ activation(encoded[k, t] + predicted[k, u]) + bias).log_softmax(0)


def nodes(frames=FRAMES):
    for k, (t, u) in enumerate(zip(frames.tolist(), LENGTHS.tolist())):
        yield from itertools.product([k], range(t), range(u + 1))


def three(k, u, v):
    """Tokens of each class: the blank, the next label, others."""
    label = [int(LABELS[k, u])] if u < LENGTHS[k] else []
    return [[0], label, [token for token in range(1, v) if token not in label]]


def kl(log_p, log_q, groups):
    """Σ_c p(c) log( p(c) / q(c) ) over groups of tokens, in probabilities."""
    p, q = log_p.exp(), log_q.exp()
    pairs = [(sum(p[v] for v in group), sum(q[v] for v in group)) for group in groups if group]
    return sum(a * (a / b).log() for a, b in pairs)


def brute_force(student, teacher, grouping, frames=FRAMES, activation=torch.tanh):
    """Σ over the nodes of the divergence of some groups of tokens."""
    v = len(student[3])
    losses = [torch.zeros((), dtype=torch.float64) for _ in LENGTHS]
    for k, t, u in nodes(frames):
        log_p, log_q = (distribution(x, k, t, u, activation) for x in (teacher, student))
        losses[k] = losses[k] + kl(log_p.detach(), log_q, grouping(k, u, v))
    return torch.stack(losses)


def each_token(k, u, v):
    return [[token] for token in range(v)]


def of_three(student, teacher, frames=FRAMES):
    mine, theirs = (classes(lattices(x)) for x in (student, teacher))
    return collapsed(mine, theirs, frames, LENGTHS)


def of_all(student, teacher):
    return full_lattice(lattices(student), lattices(teacher))


def gradients(loss, inputs):
    total = (loss * WEIGHTS).sum()
    return torch.autograd.grad(total, inputs, retain_graph=True, materialize_grads=True)


def a_path(teacher, keep=5):
    """The teacher's best path, and what it says there."""
    t, u, count = best_alignment(classes(teacher), teacher.frames, LENGTHS)
    return t, u, path_targets(teacher, t, u, count, keep)
