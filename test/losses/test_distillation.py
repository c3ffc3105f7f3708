"""losses/distillation: brute force · gradient · limits · invariance · hostile input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espnet_pl.losses.distillation import (
    cross_entropy,
    discriminative,
    distance,
    posterior,
    ranking,
    reversed_ranking,
)
from test.losses.test_transducer import FRAMES, LABELS, LENGTHS, network, ours

OWNERS = torch.tensor([2, 0, 0, 2, 2, 3])  # of four utterances, one of them without a hypothesis
N = 4
KINDS = "l1", "squared", "huber"


def scores(seed=0):
    g = torch.Generator().manual_seed(seed)
    teacher, student = 3 * torch.randn(2, 6, generator=g, dtype=torch.float64)
    return teacher - 50, (student - 70).requires_grad_()


def written_out(teacher, student, scale):
    """The equations of the docstring, one utterance at a time, in probabilities."""
    w, entropies, divergences, backward, ratios = {}, [], [], [], []
    for n in range(N):
        own = [k for k in range(6) if OWNERS[k] == n]
        p_t = {k: math.exp(teacher[k]) ** scale for k in own}
        p_s = {k: math.exp(student[k]) ** scale for k in own}
        w |= {k: p_t[k] / sum(p_t.values()) for k in own}
        v = {k: p_s[k] / sum(p_s.values()) for k in own}
        entropies.append(-sum(w[k] * float(student[k]) for k in own))
        divergences.append(sum(w[k] * math.log(w[k] / v[k]) for k in own))
        backward.append(sum(v[k] * math.log(v[k] / w[k]) for k in own))
        ratios.append(sum(abs(math.log(w[k] / v[k])) for k in own))
    return [w[k] for k in range(6)], entropies, divergences, backward, ratios


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.sampled_from([0.0, 0.3, 1.0, 2.0]), st.integers(0, 10**6))
def test_equals_the_written_equation(scale, seed):
    teacher, student = scores(seed)
    w, entropies, divergences, backward, ratios = written_out(teacher, student.detach(), scale)
    log_w = posterior(teacher, OWNERS, N, scale)
    assert log_w.exp().tolist() == pytest.approx(w, rel=1e-12)
    of_sequences = cross_entropy(log_w, student, OWNERS, N)
    assert of_sequences.tolist() == pytest.approx(entropies, rel=1e-12)
    preferred = ranking(log_w, student, OWNERS, N, scale)
    assert preferred.tolist() == pytest.approx(divergences, abs=1e-11)
    avoided = reversed_ranking(log_w, student, OWNERS, N, scale)
    assert avoided.tolist() == pytest.approx(backward, abs=1e-11)
    of_ratios = discriminative(log_w, student, OWNERS, N, scale)
    assert of_ratios.tolist() == pytest.approx(ratios, abs=1e-11)


@pytest.mark.parametrize("loss", [cross_entropy, ranking, reversed_ranking, discriminative])
def test_gradient_is_the_numerical_one(loss):
    teacher, student = scores()
    log_w = posterior(teacher, OWNERS, N)
    assert torch.autograd.gradcheck(lambda x: loss(log_w, x, OWNERS, N), (student,))
    assert torch.autograd.gradcheck(lambda x: posterior(x, OWNERS, N, 0.5), (student,))


def test_gradient_is_the_written_one():
    teacher, student = scores()
    for scale in (0.5, 1.0):
        log_w = posterior(teacher, OWNERS, N, scale)
        (grad,) = torch.autograd.grad(ranking(log_w, student, OWNERS, N, scale).sum(), student)
        v = posterior(student.detach(), OWNERS, N, scale).exp()
        torch.testing.assert_close(grad, scale * (v - log_w.exp()))
        backward = reversed_ranking(log_w, student, OWNERS, N, scale)
        (grad,) = torch.autograd.grad(backward.sum(), student)
        expected = scale * v * (v.log() - log_w - backward.detach()[OWNERS])
        torch.testing.assert_close(grad, expected)
        (grad,) = torch.autograd.grad(
            discriminative(log_w, student, OWNERS, N, scale).sum(), student
        )
        s = (v.log() - log_w).sign()
        s[5] = 0  # the only one of its utterance
        total = torch.zeros(N, dtype=torch.float64).index_add(0, OWNERS, s)[OWNERS]
        torch.testing.assert_close(grad, scale * (s - v * total))


def test_one_hypothesis_is_a_hard_label():
    teacher, student = scores()
    own, alone = torch.arange(6), torch.arange(6)
    log_w = posterior(teacher, own, 6)
    assert (log_w == 0).all()
    torch.testing.assert_close(cross_entropy(log_w, student, alone, 6), -student)
    for loss in (ranking, reversed_ranking, discriminative):
        value = loss(log_w, student, alone, 6)
        (grad,) = torch.autograd.grad(value.sum(), student)
        assert (value == 0).all() and (grad == 0).all()


def test_a_large_scale_prefers_the_best_and_zero_none():
    teacher, _ = scores()
    best = [float(teacher[k] == teacher[OWNERS == OWNERS[k]].max()) for k in range(6)]
    assert posterior(teacher, OWNERS, N, 1e6).exp().tolist() == pytest.approx(best)
    alike = [1 / 3, 1 / 2, 1 / 2, 1 / 3, 1 / 3, 1]
    assert posterior(teacher, OWNERS, N, 0.0).exp().tolist() == pytest.approx(alike)


def test_only_differences_and_no_order_matter():
    """To the posterior, the ranking and the ratios: not how probable all of H are."""
    teacher, student = scores()
    log_w = posterior(teacher, OWNERS, N)
    shift = torch.tensor([5.0, 3.0, -900.0, 1.0], dtype=torch.float64)[OWNERS]
    torch.testing.assert_close(posterior(teacher + shift, OWNERS, N), log_w)
    for loss in (ranking, reversed_ranking, discriminative):
        before = loss(log_w, student, OWNERS, N)
        torch.testing.assert_close(loss(log_w, student + shift, OWNERS, N), before)
        assert (loss(log_w, teacher, OWNERS, N).abs() < 1e-12).all()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(posterior(teacher[order], OWNERS[order], N), log_w[order])
    for loss in (cross_entropy, ranking, reversed_ranking, discriminative):
        torch.testing.assert_close(
            loss(log_w[order], student[order], OWNERS[order], N), loss(log_w, student, OWNERS, N)
        )


def test_no_gradient_reaches_the_teacher():
    teacher, student = scores()
    teacher.requires_grad_()
    log_w = posterior(teacher, OWNERS, N)
    for loss in (cross_entropy, ranking, reversed_ranking, discriminative):
        loss(log_w, student, OWNERS, N).sum().backward()
    for kind in KINDS:
        distance(student, teacher, kind).sum().backward()
    assert teacher.grad is None and student.grad is not None


def test_what_the_teacher_deems_impossible_has_no_weight():
    teacher, student = scores()
    teacher[1], teacher[5] = -torch.inf, -torch.inf
    with torch.no_grad():
        student[1], student[5] = -torch.inf, -torch.inf
    log_w = posterior(teacher, OWNERS, N)
    assert log_w.exp()[[1, 2, 5]].tolist() == [0, 1, 0]
    for loss in (cross_entropy, ranking, reversed_ranking, discriminative):
        value = loss(log_w, student, OWNERS, N)
        (grad,) = torch.autograd.grad(value.sum(), student)
        assert value.isfinite().all() and value[3] == 0
        assert grad.isfinite().all() and grad[1] == 0 and grad[5] == 0


@pytest.mark.parametrize("loss", [cross_entropy, ranking])
def test_what_the_student_deems_impossible_costs_infinitely(loss):
    teacher, student = scores()
    with torch.no_grad():
        student[2] = -torch.inf
    value = loss(posterior(teacher, OWNERS, N), student, OWNERS, N)
    assert value[0] == torch.inf and value[[1, 2, 3]].isfinite().all()


def test_no_hypothesis_at_all_and_short_types():
    none = torch.zeros(0)
    nobody = torch.zeros(0, dtype=torch.long)
    assert posterior(none, nobody, 2).shape == distance(none, none).shape == (0,)
    for loss in (cross_entropy, ranking, reversed_ranking, discriminative):
        assert loss(none, none, nobody, 2).tolist() == [0, 0]
        teacher, student = (x.detach().float() for x in scores())
        log_w = posterior(teacher, OWNERS, N)
        exact = loss(log_w.double(), student.double(), OWNERS, N)
        torch.testing.assert_close(loss(log_w, student, OWNERS, N).double(), exact)


@pytest.mark.parametrize("bad", [-1.0, math.inf, math.nan])
def test_a_scale_that_cannot_be_is_refused(bad):
    with pytest.raises(ValueError, match="scale is"):
        posterior(scores()[0], OWNERS, N, bad)


def test_ratios_are_of_what_both_deem_possible():
    """What one of them excludes is left out, and the others share its part."""
    teacher, student = scores()
    w, v = (x.detach()[[0, 3]].log_softmax(0) for x in (teacher, student))
    expected = [0, 0, float((w - v).abs().sum()), 0]  # others have one hypothesis left, or none
    with torch.no_grad():
        student[2], teacher[4], student[4] = -torch.inf, -torch.inf, -torch.inf
    log_w = posterior(teacher, OWNERS, N)
    backward = [0, 0, float((v.exp() * (v - w)).sum()), 0]
    for loss, of in ((discriminative, expected), (reversed_ranking, backward)):
        value = loss(log_w, student, OWNERS, N)
        assert value.tolist() == pytest.approx(of, abs=1e-11)
        (grad,) = torch.autograd.grad(value.sum(), student)
        assert grad.isfinite().all() and (grad[[1, 2, 4, 5]] == 0).all() and grad[0] != 0


def test_the_reversed_ranking_of_alike_hypotheses_is_what_entropy_lacks():
    """Σ_k v_k log(v_k K) = log K − H(v)."""
    _, student = scores()
    value = reversed_ranking(torch.zeros(6, dtype=torch.float64), student, OWNERS, N)
    for n in range(N):
        v = student.detach()[OWNERS == n].softmax(0)
        expected = math.log(max(len(v), 1)) + float((v * v.log()).sum())
        assert value[n].item() == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize("loss", [reversed_ranking, discriminative])
@pytest.mark.parametrize("of_teacher", [-3.0, -math.inf, math.nan])
def test_ratios_do_not_hide_what_is_not_a_number(of_teacher, loss):
    teacher, student = scores()
    log_w = posterior(teacher, OWNERS, N)
    log_w[1] = of_teacher
    with torch.no_grad():
        student[1] = torch.nan
    value = loss(log_w, student, OWNERS, N)
    assert value.isnan().tolist() == [True, False, False, False]


def distance_written_out(student, teacher, kind, delta, lengths):
    """The table of the docstring: D and its gradient, one hypothesis at a time."""
    values, slopes = [], []
    for s, t, u in zip(student.tolist(), teacher.tolist(), lengths):
        d = (s - t) / u
        if kind == "l1":
            value, slope = abs(d), math.copysign(1, d)
        elif kind == "squared":
            value, slope = d**2, 2 * d
        else:
            near = abs(d) <= delta
            value = d**2 / 2 if near else delta * (abs(d) - delta / 2)
            slope = d if near else math.copysign(delta, d)
        values.append(value)
        slopes.append(slope / u)
    return values, slopes


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    st.sampled_from(KINDS), st.floats(0.1, 40),
    st.none() | st.lists(st.integers(1, 9), min_size=6, max_size=6), st.integers(0, 10**6),
)  # fmt: skip
def test_distance_and_its_gradient_are_the_written_ones(kind, delta, lengths, seed):
    teacher, student = scores(seed)
    counts = None if lengths is None else torch.tensor(lengths)
    loss = distance(student, teacher, kind, delta=delta, lengths=counts)
    values, slopes = distance_written_out(student, teacher, kind, delta, lengths or [1] * 6)
    assert loss.tolist() == pytest.approx(values, rel=1e-12)
    weights = torch.linspace(-1, 2, 6, dtype=torch.float64)
    (grad,) = torch.autograd.grad((weights * loss).sum(), student)
    assert (grad / weights).tolist() == pytest.approx(slopes, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_distance_is_the_numerical_one(kind):
    teacher, student = scores()
    lengths = torch.tensor([1, 2, 3, 4, 50, 6])
    assert torch.autograd.gradcheck(
        lambda x: distance(x, teacher, kind, delta=9.0, lengths=lengths), (student,)
    )


def test_huber_is_between_both():
    teacher, student = scores()
    l1, squared = (distance(student, teacher, kind) for kind in ("l1", "squared"))
    wide, narrow = (distance(student, teacher, "huber", delta=x) for x in (1e6, 1e-9))
    torch.testing.assert_close(2 * wide, squared)
    torch.testing.assert_close(narrow / 1e-9, l1)


def gradients_of_a_lattice(loss):
    """Of a loss of log P_S, through a real lattice: T = 1 with two labels, and U = 0 among them."""
    inputs = network(3, 4)
    log_p = ours(inputs, FRAMES, LABELS, LENGTHS, None, 0, exact=True)
    return torch.autograd.grad(loss(log_p), inputs)


def test_l1_is_hard_distillation_until_the_student_is_surer():
    hard = gradients_of_a_lattice(lambda log_p: -log_p.sum())
    less_sure = gradients_of_a_lattice(lambda x: distance(x, x.detach() + 0.1).sum())
    surer = gradients_of_a_lattice(lambda x: distance(x, x.detach() - 0.1).sum())
    torch.testing.assert_close(less_sure, hard)
    torch.testing.assert_close(surer, tuple(-x for x in hard))
    as_sure = gradients_of_a_lattice(lambda x: distance(x, x.detach()).sum())
    assert not any(x.any() for x in as_sure)


def test_squared_is_twice_the_difference_times_hard_distillation():
    ahead = torch.tensor([3.0, -2.0, 0.5], dtype=torch.float64)
    squared = gradients_of_a_lattice(lambda x: distance(x, x.detach() - ahead, "squared").sum())
    expected = gradients_of_a_lattice(lambda log_p: (2 * ahead * log_p).sum())
    torch.testing.assert_close(squared, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_that_are_not_finite_cost_nothing(kind):
    none = -math.inf
    student = torch.tensor([none, none, -5.0, -5.0, -7.0], requires_grad=True)
    teacher = torch.tensor([none, -3.0, none, math.nan, -6.0])
    loss = distance(student, teacher, kind)
    assert loss.tolist() == [0, 0, 0, 0, 0.5 if kind == "huber" else 1]
    loss.sum().backward()
    assert (student.grad[:4] == 0).all() and student.grad[4] != 0
    assert distance(student[:2], teacher[:2], kind).requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_impossible_labels_give_a_real_lattice_no_gradient(kind):
    inputs = network(3, 4)
    frames = FRAMES * torch.tensor([1, 1, 0])
    log_p = ours(inputs, frames, LABELS, LENGTHS, None, 0)
    loss = distance(log_p, torch.zeros(3), kind)
    (grad,) = torch.autograd.grad(loss.sum(), inputs[0])
    assert loss[2] == 0 and grad.isfinite().all() and not grad[2].any() and grad[:2].any()


@pytest.mark.parametrize("of_teacher", [-3.0, -math.inf, math.nan])
@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_not_a_number_is_not_hidden(kind, of_teacher):
    student = torch.tensor([math.nan, -1.0])
    value = distance(student, torch.tensor([of_teacher, -2.0]), kind)
    assert value.isnan().tolist() == [True, False]


def test_scores_of_other_types_are_compared_in_the_student_s():
    teacher, student = scores()
    for dtype in (torch.float32, torch.float16):
        loss = distance(student, teacher.to(dtype))
        assert loss.dtype == torch.float64
        torch.testing.assert_close(loss, distance(student, teacher), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"kind": "l2"}, "kind is 'l2'"),
        ({"kind": "huber", "delta": 0.0}, "delta is 0.0"),
        ({"kind": "huber", "delta": math.nan}, "delta is nan"),
        ({"lengths": torch.tensor([1, 1, 1, 0, 1, 1])}, r"lengths \[1, 1, 1, 0"),
    ],
)
def test_a_distance_that_cannot_be_is_refused(how, message):
    teacher, student = scores()
    with pytest.raises(ValueError, match=message):
        distance(student, teacher, **how)
