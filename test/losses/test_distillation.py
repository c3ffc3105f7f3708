"""losses/distillation: brute force · gradient · limits · invariance · hostile input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espnet_pl.losses.distillation import cross_entropy, posterior, ranking

OWNERS = torch.tensor([2, 0, 0, 2, 2, 3])  # of four utterances, one of them without a hypothesis
N = 4


def scores(seed=0):
    g = torch.Generator().manual_seed(seed)
    teacher, student = 3 * torch.randn(2, 6, generator=g, dtype=torch.float64)
    return teacher - 50, (student - 70).requires_grad_()


def written_out(teacher, student, scale):
    """The equations of the docstring, one utterance at a time, in probabilities."""
    w, entropies, divergences = {}, [], []
    for n in range(N):
        own = [k for k in range(6) if OWNERS[k] == n]
        p_t = {k: math.exp(teacher[k]) ** scale for k in own}
        p_s = {k: math.exp(student[k]) ** scale for k in own}
        w |= {k: p_t[k] / sum(p_t.values()) for k in own}
        v = {k: p_s[k] / sum(p_s.values()) for k in own}
        entropies.append(-sum(w[k] * float(student[k]) for k in own))
        divergences.append(sum(w[k] * math.log(w[k] / v[k]) for k in own))
    return [w[k] for k in range(6)], entropies, divergences


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.sampled_from([0.0, 0.3, 1.0, 2.0]), st.integers(0, 10**6))
def test_equals_the_written_equation(scale, seed):
    teacher, student = scores(seed)
    w, entropies, divergences = written_out(teacher, student.detach(), scale)
    log_w = posterior(teacher, OWNERS, N, scale)
    assert log_w.exp().tolist() == pytest.approx(w, rel=1e-12)
    of_sequences = cross_entropy(log_w, student, OWNERS, N)
    assert of_sequences.tolist() == pytest.approx(entropies, rel=1e-12)
    preferred = ranking(log_w, student, OWNERS, N, scale)
    assert preferred.tolist() == pytest.approx(divergences, abs=1e-11)


@pytest.mark.parametrize("loss", [cross_entropy, ranking])
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


def test_one_hypothesis_is_a_hard_label():
    teacher, student = scores()
    own, alone = torch.arange(6), torch.arange(6)
    log_w = posterior(teacher, own, 6)
    assert (log_w == 0).all()
    torch.testing.assert_close(cross_entropy(log_w, student, alone, 6), -student)
    assert (ranking(log_w, student, alone, 6) == 0).all()


def test_a_large_scale_prefers_the_best_and_zero_none():
    teacher, _ = scores()
    best = [float(teacher[k] == teacher[OWNERS == OWNERS[k]].max()) for k in range(6)]
    assert posterior(teacher, OWNERS, N, 1e6).exp().tolist() == pytest.approx(best)
    alike = [1 / 3, 1 / 2, 1 / 2, 1 / 3, 1 / 3, 1]
    assert posterior(teacher, OWNERS, N, 0.0).exp().tolist() == pytest.approx(alike)


def test_only_differences_and_no_order_matter():
    """To the posterior and to the ranking: not how probable all of H are."""
    teacher, student = scores()
    log_w = posterior(teacher, OWNERS, N)
    shift = torch.tensor([5.0, 3.0, -900.0, 1.0], dtype=torch.float64)[OWNERS]
    torch.testing.assert_close(posterior(teacher + shift, OWNERS, N), log_w)
    torch.testing.assert_close(
        ranking(log_w, student + shift, OWNERS, N), ranking(log_w, student, OWNERS, N)
    )
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(posterior(teacher[order], OWNERS[order], N), log_w[order])
    for loss in (cross_entropy, ranking):
        torch.testing.assert_close(
            loss(log_w[order], student[order], OWNERS[order], N), loss(log_w, student, OWNERS, N)
        )
    assert (ranking(log_w, teacher, OWNERS, N).abs() < 1e-12).all()


def test_no_gradient_reaches_the_teacher():
    teacher, student = scores()
    teacher.requires_grad_()
    log_w = posterior(teacher, OWNERS, N)
    (cross_entropy(log_w, student, OWNERS, N) + ranking(log_w, student, OWNERS, N)).sum().backward()
    assert teacher.grad is None and student.grad is not None


def test_what_the_teacher_deems_impossible_has_no_weight():
    teacher, student = scores()
    teacher[1], teacher[5] = -torch.inf, -torch.inf
    with torch.no_grad():
        student[1], student[5] = -torch.inf, -torch.inf
    log_w = posterior(teacher, OWNERS, N)
    assert log_w.exp()[[1, 2, 5]].tolist() == [0, 1, 0]
    for loss in (cross_entropy, ranking):
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
    assert posterior(none, nobody, 2).shape == (0,)
    for loss in (cross_entropy, ranking):
        assert loss(none, none, nobody, 2).tolist() == [0, 0]
        teacher, student = (x.detach().float() for x in scores())
        log_w = posterior(teacher, OWNERS, N)
        exact = loss(log_w.double(), student.double(), OWNERS, N)
        torch.testing.assert_close(loss(log_w, student, OWNERS, N).double(), exact)


@pytest.mark.parametrize("bad", [-1.0, math.inf, math.nan])
def test_a_scale_that_cannot_be_is_refused(bad):
    with pytest.raises(ValueError, match="scale is"):
        posterior(scores()[0], OWNERS, N, bad)
