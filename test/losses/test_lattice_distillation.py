"""losses/lattice_distillation: brute force · gradient · bounds · invariance · hostile input."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espnet_pl.losses import joint as tiles
from espnet_pl.losses.joint import Joint
from espnet_pl.losses.lattice_distillation import (
    best_alignment,
    classes,
    collapsed,
    common_frames,
    full_lattice,
    hidden_at,
    one_best,
    path_targets,
)
from espnet_pl.losses.transducer import Lattices, hypotheses
from test.losses.small_lattices import (
    FRAMES,
    LABELS,
    LENGTHS,
    TIGHT,
    a_path,
    brute_force,
    distribution,
    each_token,
    gradients,
    kl,
    lattices,
    network,
    nodes,
    of_all,
    of_three,
    three,
)
from test.losses.test_transducer import last_label

# Three classes ---------------------------------------------------------------------------------


def test_classes_are_the_written_sums():
    inputs = network()
    log_p = classes(lattices(inputs))
    expected = torch.full((3, 4, 4, 5), -torch.inf, dtype=torch.float64)
    for k, t, u in nodes():
        p = distribution(inputs, k, t, u).exp()
        for c, group in enumerate(three(k, u, 5)):
            expected[c, k, u, t] = sum([p[v] for v in group], p.new_zeros(())).log()
    torch.testing.assert_close(log_p, expected, **TIGHT)
    there = log_p[0].isfinite()
    torch.testing.assert_close(log_p.exp().sum(0), there.double())
    assert there.sum() == 4 * 4 + 1 * 3 + 2 * 1 + 2 * 4


def test_shared_states_are_the_same():
    """A predictor with a memory of one label, after which several may follow."""
    encoded, embedding, weight, bias = network()
    predicted = last_label(embedding.flatten(0, 1)[:5], LABELS, 0)
    owners = torch.tensor([0, 1, 3, 0])  # of four utterances, the third without a hypothesis
    joint, own = Joint(weight, bias), encoded[owners]
    apart = hypotheses(LABELS, LENGTHS)
    expected = Lattices(joint, own, FRAMES[owners], apart.of_states(predicted), apart)
    shared = hypotheses(LABELS, LENGTHS, owners, context=1)
    assert len(shared.rows) < len(apart.rows) and shared.tokens.shape[1] > 2
    mine = Lattices(joint, encoded, FRAMES, shared.of_states(predicted), shared)
    torch.testing.assert_close(classes(mine), classes(expected), **TIGHT)
    t, u = (torch.tensor([[0, 1], [0, 0], [1, 1], [0, 3]]), torch.tensor([[1, 3], [2, 0]] * 2))
    u[2] = 0
    torch.testing.assert_close(hidden_at(mine, t, u, 1), hidden_at(expected, t, u, 1))
    teacher = network(seed=1)[2:]
    mine, expected = (
        full_lattice(x, dataclasses.replace(x, joint=Joint(*teacher))) for x in (mine, expected)
    )
    torch.testing.assert_close(mine, expected, **TIGHT)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(st.integers(5, 8), st.integers(1, 5), st.integers(0, 10**6))
@pytest.mark.parametrize(("loss", "grouping"), [(of_three, three), (of_all, each_token)])
def test_equals_the_written_sum(loss, grouping, v, j, seed):
    """With a teacher of another size; weights of both signs."""
    student, teacher = network(seed, v=v), network(seed + 1, j, v)
    mine, theirs = loss(student, teacher), brute_force(student, teacher, grouping)
    torch.testing.assert_close(mine, theirs, **TIGHT)
    torch.testing.assert_close(gradients(mine, student), gradients(theirs, student), **TIGHT)


@pytest.mark.parametrize("loss", [of_three, of_all])
def test_gradient_is_the_numerical_one(loss):
    teacher = network(1, j=3)
    assert torch.autograd.gradcheck(lambda *x: loss(x, teacher), network())


def test_two_tokens_are_classes():
    """The blank and a label: nothing is lumped together, in any row."""
    labels = torch.ones_like(LABELS)
    student, teacher = (lattices(network(i, v=2), labels=labels) for i in (0, 1))
    mine = collapsed(classes(student), classes(teacher), FRAMES, LENGTHS)
    torch.testing.assert_close(mine, full_lattice(student, teacher), **TIGHT)


def test_three_tokens_are_classes_but_in_the_last_row():
    student, teacher = network(0, v=3), network(0, v=3)
    labels = LABELS.remainder(2) + 1
    with torch.no_grad():  # the last row, where two labels are lumped together, is alike
        for k, u in enumerate(LENGTHS.tolist()):
            student[1][k, :u] += 1
    student, teacher = (lattices(x, labels=labels) for x in (student, teacher))
    mine = collapsed(classes(student), classes(teacher), FRAMES, LENGTHS)
    torch.testing.assert_close(mine, full_lattice(student, teacher), **TIGHT)
    assert (mine[[0, 1, 3]] > 0.01).all()


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.integers(5, 9), st.integers(0, 10**6))
def test_what_three_classes_leave_out_is_within_the_rest(v, seed):
    """The data-processing inequality, and by how much."""
    student, teacher = network(seed, v=v), network(seed + 1, v=v)
    whole, part = of_all(student, teacher), of_three(student, teacher)
    assert (part >= 0).all() and (part <= whole).all()
    for k, t, u in nodes():
        rest = three(k, u, v)[2]
        log_p, log_q = (distribution(x, k, t, u)[rest] for x in (teacher, student))
        within = kl(log_p.log_softmax(0), log_q.log_softmax(0), [[i] for i in range(len(rest))])
        part[k] = part[k] + log_p.exp().sum() * within
    torch.testing.assert_close(part, whole, **TIGHT)


def of_logits(z, labels, dtype=torch.float64):
    """One frame, whose logits are z after each prefix."""
    z = torch.as_tensor(z, dtype=dtype)
    v, identity = z.shape[1], lambda x: x
    hyps = hypotheses(torch.tensor([labels]), torch.tensor([len(labels)]))
    joint = Joint(torch.eye(v, dtype=dtype), torch.zeros(v, dtype=dtype), identity)
    return Lattices(joint, torch.zeros(1, 1, v, dtype=dtype), torch.tensor([1]), z, hyps)


def losses_of_logits(student, teacher, labels):
    of_each = [classes(x) for x in (student, teacher)]
    return (
        collapsed(*of_each, torch.tensor([1]), torch.tensor([len(labels)])),
        full_lattice(student, teacher),
    )


def test_gradients_of_the_logits_are_the_written_ones():
    g = torch.Generator().manual_seed(0)
    z, z_teacher = torch.randn(2, 2, 5, generator=g, dtype=torch.float64)
    z.requires_grad_()
    of_classes, of_tokens = (
        torch.autograd.grad(loss.sum(), z)[0]
        for loss in losses_of_logits(of_logits(z, [3]), of_logits(z_teacher, [3]), [3])
    )
    p, q = z_teacher.softmax(1), z.detach().softmax(1)
    torch.testing.assert_close(of_tokens, q - p)
    for u, rest in enumerate([[1, 2, 4], [1, 2, 3, 4]]):
        expected = q[u] - p[u]
        expected[rest] = q[u, rest] - p[u, rest].sum() * q[u, rest] / q[u, rest].sum()
        torch.testing.assert_close(of_classes[u], expected)


@pytest.mark.parametrize("z_teacher", itertools.permutations([30.0, 0.0, -30.0]))
@pytest.mark.parametrize("z", itertools.permutations([30.0, 0.0, -30.0]))
def test_extreme_logits_lose_nothing_in_float32(z, z_teacher):
    p = torch.tensor([30.0, 0.0, -30.0]).softmax(0)
    assert 1 - p[0] - p[1] < 0  # why the rest is not what is left of 1
    values = []
    for dtype in (torch.float32, torch.float64):
        student = torch.tensor([z, z], dtype=dtype, requires_grad=True)
        teacher = of_logits([z_teacher] * 2, [1], dtype)
        losses = losses_of_logits(of_logits(student, [1], dtype), teacher, [1])
        values.append([(x, torch.autograd.grad(x.sum(), student)[0]) for x in losses])
    for (loss, grad), (exact, exact_grad) in zip(*values):
        torch.testing.assert_close(loss, exact, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-5, atol=1e-5)
        assert loss >= -1e-6


@pytest.mark.parametrize("loss", [of_three, of_all])
def test_no_gradient_reaches_the_teacher(loss):
    student, teacher = network(), network(1)
    loss(student, teacher).sum().backward()
    assert all(x.grad is None for x in teacher) and all(x.grad.any() for x in student)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_planes_may_be_short(dtype):
    student, teacher = (classes(lattices(network(i, dtype=torch.float32))) for i in (0, 1))
    exact = collapsed(student, teacher, FRAMES, LENGTHS)
    stored = collapsed(student, teacher.to(dtype), FRAMES, LENGTHS)
    torch.testing.assert_close(stored, exact, rtol=0.02, atol=0.02)
    assert not torch.equal(stored, exact)
    # Rounded, three classes do not sum to 1; a divergence from that could be negative.
    alike = collapsed(student, student.to(dtype), FRAMES, LENGTHS)
    assert (alike >= -1e-6).all() and (alike < 1e-3).all()


def test_planes_may_have_any_room():
    student, teacher = (classes(lattices(network(i))) for i in (0, 1))
    expected = collapsed(student, teacher, FRAMES, LENGTHS)
    for mine, theirs in itertools.product(
        *([x, x[..., :4], torch.nn.functional.pad(x, (0, 2, 0, 3), value=torch.nan)]
          for x in (student, teacher))
    ):  # fmt: skip
        again = collapsed(mine, theirs, FRAMES, LENGTHS)
        torch.testing.assert_close(again, expected, rtol=0, atol=0)
        torch.testing.assert_close(
            *(torch.autograd.grad(x.sum(), student, retain_graph=True) for x in (again, expected))
        )
    for mine, theirs in ((student, teacher[..., :3]), (student[..., :3], teacher)):
        with pytest.raises(ValueError, match=r"frames \[4, 1, 2, 2\], but the planes have room"):
            collapsed(mine, theirs, FRAMES, LENGTHS)
    for mine, theirs in ((student, teacher[:, :, :3]), (student[:, :, :3], teacher)):
        with pytest.raises(ValueError, match=r"lengths \[3, 2, 0, 3\], but the planes have room"):
            collapsed(mine, theirs, FRAMES, LENGTHS)


def test_frames_that_a_teacher_does_not_have_are_seen():
    student, teacher = (classes(lattices(network(i))) for i in (0, 1))
    loss = collapsed(student, teacher, FRAMES + torch.tensor([0, 1, 0, 0]), LENGTHS)
    assert loss.isnan().tolist() == [False, True, False, False]


# All tokens ------------------------------------------------------------------------------------


def test_only_the_same_distributions_cost_nothing():
    student, teacher = network(), network()
    wider = [torch.cat([x, 0 * x], -1) for x in teacher[:3]]  # the same, of twice the size
    for alike in (teacher, [*teacher[:3], teacher[3] + 7], [*wider, teacher[3]]):
        loss = of_all(student, alike)
        torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-12)
        assert all(x.abs().max() < 1e-12 for x in gradients(loss, student))
    with torch.no_grad():
        teacher[1][0, 3] += 0.01  # one state of one hypothesis
    assert (of_all(student, teacher) > 1e-9).tolist() == [True, False, False, False]


@pytest.mark.parametrize("rows", [1, 3])
def test_logits_of_a_tile_are_all_there_ever_is(rows, monkeypatch):
    student, teacher = network(), network(1, j=3)
    before = of_all(student, teacher)
    expected = gradients(before, student)
    monkeypatch.setattr(tiles, "ROWS", rows)
    monkeypatch.setattr(tiles, "LEAST", rows)
    sizes, log_softmax = [], torch._log_softmax
    monkeypatch.setattr(
        torch, "_log_softmax", lambda x, *a, **k: sizes.append(len(x)) or log_softmax(x, *a, **k)
    )
    after = of_all(student, teacher)
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(gradients(after, student), expected)
    assert max(sizes) == rows and sum(sizes) == 4 * 29  # both networks, forwards and backwards


def test_hypotheses_without_a_gradient_are_not_computed_again(monkeypatch):
    student, teacher = network(), network(1)
    loss = of_all(student, teacher)
    sizes, log_softmax = [], torch._log_softmax
    monkeypatch.setattr(
        torch, "_log_softmax", lambda x, *a, **k: sizes.append(len(x)) or log_softmax(x, *a, **k)
    )
    grads = torch.autograd.grad(loss[1], student)
    assert sum(sizes) == 2 * 3 and grads[0][1, 0].any() and not grads[0][[0, 2, 3]].any()
    assert (
        torch.autograd.grad(of_all(student, teacher)[1] * math.nan, student)[0][1, 0].isnan().all()
    )


def test_any_activation():
    student, teacher = network(), network(1)
    mine = full_lattice(*(lattices(x, activation=torch.sin) for x in (student, teacher)))
    expected = brute_force(student, teacher, each_token, activation=torch.sin)
    torch.testing.assert_close(mine, expected, **TIGHT)
    torch.testing.assert_close(gradients(mine, student), gradients(expected, student), **TIGHT)


def test_impossible_tokens():
    student, teacher = network(), network(1)
    bias = torch.where(torch.arange(5) == 4, -torch.inf, 0.0).double()  # no other's next label
    for mine, theirs, infinite in ((0, 0, False), (bias, bias, False), (0, bias, False),
                                   (bias, 0, True)):  # fmt: skip
        inputs = [*student[:3], (student[3].detach() + mine).requires_grad_()]
        loss = of_all(inputs, [*teacher[:3], teacher[3] + theirs])
        assert loss.isposinf().all() if infinite else loss.isfinite().all()
        assert all(x.isfinite().all() for x in gradients(loss, inputs))


@pytest.mark.parametrize("loss", [of_three, of_all])
@pytest.mark.parametrize("whose", [0, 1])
def test_nothing_that_is_no_number_is_hidden(loss, whose):
    pair = network(), network(1)
    with torch.no_grad():
        pair[whose][0][2, 1, 0] = torch.nan
        pair[1 - whose][0][0, 4] = torch.nan  # behind the last frame
    assert loss(*pair).isnan().tolist() == [False, False, True, False]


# Frames, company, types, nothing ---------------------------------------------------------------


def test_a_few_frames_are_rounded_away():
    student, teacher = network(), network(1)
    longer = FRAMES + torch.tensor([1, 2, 0, -1])
    mine, theirs = lattices(student), lattices(teacher, longer)
    shorter = torch.tensor([4, 1, 2, 1])
    assert common_frames(FRAMES, longer).tolist() == shorter.tolist()
    expected = brute_force(student, teacher, each_token, shorter)
    torch.testing.assert_close(full_lattice(mine, theirs), expected, **TIGHT)
    assert one_best(mine, *a_path(theirs)).isfinite().all()
    # A student without a frame is not asked for what is in its padding.
    none = lattices([torch.full_like(student[0], torch.nan), *student[1:]], 0 * FRAMES)
    loss = one_best(none, *a_path(lattices(teacher, FRAMES.clamp(max=2))))
    assert loss.tolist() == [0] * 4
    assert not gradients(loss, student)[2].any()


def another(**how):
    return lattices(network(1), **how)


def longer():
    return another(frames=FRAMES + torch.tensor([0, 0, 0, 3]))


def fewer():
    encoded, predicted, *joint = network(1)
    return lattices([encoded[:3], predicted[:3], *joint], FRAMES[:3], LABELS[:3], LENGTHS[:3])


def narrow():
    encoded, predicted, *joint = network(1)
    most = LENGTHS.clamp(max=2)
    return lattices([encoded, predicted[:, :3], *joint], labels=LABELS[:, :2], lengths=most)


def of_another_utterance():
    hyps = another().hyps
    utterance, owner = torch.tensor([0, 1, 2, 2]), hyps.owner.clamp(max=2)
    return dataclasses.replace(
        another(), hyps=dataclasses.replace(hyps, utterance=utterance, owner=owner)
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: full_lattice(x, lattices(network(v=6))), "a teacher of 6 tokens for a student"),
        (lambda x: full_lattice(x, longer()), "utterance 3 has 2 frames, but 5 in the teacher's"),
        (lambda x: full_lattice(x, fewer()), "4 utterances for a teacher of 3"),
        (lambda x: full_lattice(x, narrow()), r"shape \(4, 3\), the teacher's \(4, 2\)"),
        (
            lambda x: full_lattice(x, another(labels=LABELS + (LABELS == 3))),
            "hypothesis 1 is another label sequence in the teacher's lattice",
        ),
        (
            lambda x: full_lattice(x, another(lengths=LENGTHS - torch.tensor([0, 1, 0, 0]))),
            "hypothesis 1 is another label sequence",
        ),
        (lambda x: full_lattice(x, of_another_utterance()), "hypothesis 3 is another label"),
        (lambda x: one_best(x, *a_path(longer())), "utterance 3 has 2 frames, but 5"),
        (lambda x: one_best(fewer(), *a_path(x)), "soft labels of 4 paths for 3 hypotheses"),
        (lambda x: hidden_at(fewer(), *a_path(x)[:2]), "4 paths through the lattices of 3"),
        (lambda x: a_path(x, 6), "k is 6 of 5 tokens"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(lattices(network()))


def every_loss(student, teacher):
    """Each loss of these lattices."""
    planes = [classes(x) for x in (student, teacher)]
    frames = common_frames(student.frames, teacher.frames)[student.hyps.utterance]
    t, u, count = best_alignment(planes[1], teacher.frames, teacher.hyps.lengths)
    return (
        collapsed(*planes, frames, student.hyps.lengths),
        full_lattice(student, teacher),
        one_best(student, t, u, path_targets(teacher, t, u, count, 3), 1),
    )


def test_company_and_padding_change_nothing():
    pair = network(), network(1)
    together = every_loss(*(lattices(x) for x in pair))
    for k, (t, u) in enumerate(zip(FRAMES.tolist(), LENGTHS.tolist())):
        one = slice(k, k + 1)
        alone = every_loss(*(
            lattices(
                [x[0][one, :t], x[1][one, : u + 1], *x[2:]],
                FRAMES[one], LABELS[one, :u], LENGTHS[one],
            )
            for x in pair
        ))  # fmt: skip
        for mine, expected in zip(alone, together):
            torch.testing.assert_close(mine[0], expected[k], **TIGHT)


def test_renaming_the_labels_changes_nothing():
    pair = network(), network(1)
    order = torch.tensor([0, 3, 4, 1, 2])  # new name of each token
    labels = torch.where(LABELS < 5, order[LABELS.clamp(max=4)], LABELS)
    back = order.argsort()
    before = every_loss(*(lattices(x) for x in pair))
    after = every_loss(*(lattices([*x[:2], x[2][back], x[3][back]], labels=labels) for x in pair))
    torch.testing.assert_close(after, before, **TIGHT)


def test_half_products_are_near():
    student, teacher = (network(i, j=64, v=30, dtype=torch.float32) for i in (0, 1))
    with torch.no_grad():
        for x in (student, teacher):
            x[2] *= 0.3
    full = every_loss(lattices(student), lattices(teacher))
    with torch.autocast("cpu", torch.bfloat16):
        short = every_loss(lattices(student), lattices(teacher))
    for mine, expected in zip(short, full):
        assert mine.dtype == expected.dtype and not torch.equal(mine, expected)
        torch.testing.assert_close(mine, expected, rtol=0.05, atol=0.05)
        grads = zip(gradients(mine, student), gradients(expected, student))
        for x, (half, exact) in zip(student, grads):
            assert half.dtype == x.dtype and (half - exact).norm() < 0.05 * exact.norm()


def test_float32_is_near_float64():
    pairs = [
        [[y.detach().to(dtype).requires_grad_() for y in network(i, j=64, v=30)] for i in (0, 1)]
        for dtype in (torch.float32, torch.float64)
    ]
    short, exact = (every_loss(*(lattices(x) for x in pair)) for pair in pairs)
    for mine, expected in zip(short, exact):
        torch.testing.assert_close(mine.double(), expected, rtol=1e-5, atol=1e-5)
        grads = zip(gradients(mine, pairs[0][0]), gradients(expected, pairs[1][0]))
        assert all((a - b).norm() < 1e-5 * b.norm() for a, b in grads)


@pytest.mark.parametrize("utterances", [0, 4])
@pytest.mark.parametrize("room", [1, 5])
def test_nothing_to_compare(utterances, room):
    pair = network(0, room=room), network(1, room=room)
    frames = 0 * FRAMES[:utterances]
    for loss in every_loss(*(
        lattices(
            [x[0][:utterances], x[1][:utterances], *x[2:]],
            frames, LABELS[:utterances], LENGTHS[:utterances],
        )
        for x in pair
    )):  # fmt: skip
        assert loss.tolist() == [0] * utterances
        grads = torch.autograd.grad(loss.sum(), pair[0], retain_graph=True, materialize_grads=True)
        assert loss.requires_grad and not any(x.any() for x in grads)


def test_tensors_are_made_where_the_inputs_are():
    """As a GPU needs it; here anything made without saying where has no numbers."""
    student, teacher = network(), network(1)
    with torch.device("meta"):
        losses = every_loss(lattices(student), lattices(teacher))
        sum(x.sum() for x in losses).backward()
    assert all(x.isfinite().all() for x in losses) and student[0].grad.any()
