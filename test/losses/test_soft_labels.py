"""losses/soft_labels: brute force · gradient · limits · invariance · memory · hostile input."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espnet_pl.losses import soft_labels as module
from espnet_pl.losses.soft_labels import entropy, kl, kl_of_linear, soft_labels, valid_frames

STUDENT, TEACHER = torch.tensor([4, 2, 0, 3]), torch.tensor([3, 4, 1, 3])
WEIGHTS = torch.tensor([0.3, -1.0, 2.0, 1.5], dtype=torch.float64)


def softmax(logits, temperature):
    mass = [math.exp(z / temperature) for z in logits]
    return [m / sum(mass) for m in mass]


def brute_force(logits, frames, teacher, teacher_frames, k, tau=1.0, teacher_tau=1.0):
    """The equation of the docstring, one frame and one class at a time."""
    losses = []
    for z, z_teacher, t, t_teacher in zip(
        logits.tolist(), teacher.tolist(), frames.tolist(), teacher_frames.tolist()
    ):
        loss = 0.0
        for student_row, teacher_row in list(zip(z[:t], z_teacher[:t_teacher])):
            q, p = softmax(student_row, tau), softmax(teacher_row, teacher_tau)
            order = sorted(range(len(p)), key=lambda v: -p[v])
            classes = [[v] for v in order[:k]] + ([order[k:]] if order[k:] else [])
            for tokens in classes:
                mass = sum(p[v] for v in tokens)
                loss += mass * math.log(mass / sum(q[v] for v in tokens))
        losses.append(loss)
    return torch.tensor(losses, dtype=logits.dtype)


def example(v=5, t=5, dtype=torch.float64, seed=0):
    """Logits of a student and of a teacher, who has a frame more than anybody needs."""
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(4, t, v, generator=g, dtype=dtype, requires_grad=True)
    return student, 2 * torch.randn(4, t + 1, v, generator=g, dtype=dtype)


def linear(v=5, d=3, dtype=torch.float64, seed=0):
    """Hidden vectors, weight and bias."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((4, 5, d), (v, d), (v,))
    return [torch.randn(s, generator=g, dtype=dtype).requires_grad_() for s in shapes]


def dense(hidden, weight, bias, frames, target, **how):
    return kl(torch.nn.functional.linear(hidden, weight, bias), frames, target, **how)


temperatures = st.sampled_from([0.3, 1.0, 2.5])


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(1, 6), st.data(), temperatures, temperatures, st.integers(0, 10**6))
def test_equals_the_written_equation(v, data, tau, teacher_tau, seed):
    k = data.draw(st.integers(1, v))
    student, teacher = example(v, seed=seed)
    target = soft_labels(teacher, TEACHER, k, teacher_tau)
    loss = kl(student, STUDENT, target, temperature=tau)
    expected = brute_force(student, STUDENT, teacher, TEACHER, k, tau, teacher_tau)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    rescaled = kl(student, STUDENT, target, temperature=tau, rescale=True)
    torch.testing.assert_close(rescaled, tau**2 * loss, rtol=1e-12, atol=0)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    st.integers(1, 6), st.data(), temperatures, st.booleans(), st.integers(1, 12),
    st.integers(0, 10**6),
)  # fmt: skip
def test_that_of_a_linear_layer_is_the_plain_one(v, data, tau, rescale, chunk, seed):
    k = data.draw(st.integers(1, v))
    inputs = linear(v, seed=seed)
    target = soft_labels(example(v, seed=seed)[1], TEACHER, k)
    how = {"temperature": tau, "rescale": rescale}
    mine = kl_of_linear(*inputs, STUDENT, target, **how, chunk=chunk)
    plain = dense(*inputs, STUDENT, target, **how)
    tight = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(mine, plain, **tight)
    grads = [torch.autograd.grad((loss * WEIGHTS).sum(), inputs) for loss in (mine, plain)]
    torch.testing.assert_close(*grads, **tight)


@pytest.mark.parametrize("k", [1, 5])
def test_weights_multiply_each_frame_s_summand(k):
    student, teacher = example()
    target = soft_labels(teacher, TEACHER, k)
    weights = torch.rand(4, 6, generator=torch.Generator().manual_seed(3)).double()
    weights[0, 1] = 0
    expected = torch.zeros(4, dtype=torch.float64)
    for t in range(5):
        alone = torch.zeros_like(weights)
        alone[:, t] = 1
        expected += weights[:, t] * kl(student, STUDENT, target, weights=alone)
    loss = kl(student, STUDENT, target, weights=weights)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        kl(student, STUDENT, target, weights=torch.ones_like(weights)), kl(student, STUDENT, target)
    )
    inputs = linear()
    mine = kl_of_linear(*inputs, STUDENT, target, weights=weights, chunk=3)
    plain = dense(*inputs, STUDENT, target, weights=weights)
    grads = [torch.autograd.grad((x * WEIGHTS).sum(), inputs) for x in (mine, plain)]
    torch.testing.assert_close(*grads)
    assert torch.autograd.gradcheck(lambda z: kl(z, STUDENT, target, weights=weights), (student,))


def test_a_frame_of_weight_0_may_be_impossible():
    student, teacher = example()
    target = soft_labels(teacher, TEACHER, 5)
    impossible = student.detach().clone()
    impossible[0, 1, 2] = -torch.inf
    impossible.requires_grad_()
    weights = torch.ones(4, 6)
    assert kl(impossible, STUDENT, target, weights=weights)[0] == torch.inf
    weights[0, 1] = 0
    loss = kl(impossible, STUDENT, target, weights=weights)
    torch.testing.assert_close(loss, kl(student, STUDENT, target, weights=weights))
    loss.sum().backward()
    assert impossible.grad.isfinite().all() and (impossible.grad[0, 1] == 0).all()
    with pytest.raises(ValueError, match="weights of 2 frames"):
        kl(student, STUDENT, target, weights=weights[:, :2])


@pytest.mark.parametrize("k", [1, 3, 5])
def test_gradient_is_the_numerical_one(k):
    student, teacher = example()
    target = soft_labels(teacher, TEACHER, k, 2.0)
    how = {"temperature": 2.0, "rescale": True}
    assert torch.autograd.gradcheck(lambda z: kl(z, STUDENT, target, **how), (student,))
    assert torch.autograd.gradcheck(
        lambda *x: kl_of_linear(*x, STUDENT, target, **how, chunk=4), linear()
    )


@pytest.mark.parametrize("k", [1, 3, 5])
def test_gradient_is_the_written_one(k):
    student, teacher = example()
    target = soft_labels(teacher, TEACHER, k)
    (grad,) = torch.autograd.grad(kl(student, STUDENT, target, temperature=2.0).sum(), student)
    for n, valid in enumerate(torch.minimum(STUDENT, TEACHER).tolist()):
        for t, v in itertools.product(range(5), range(5)):
            p, q = teacher[n, t].softmax(0), (student[n, t] / 2).softmax(0)
            kept = p.topk(k).indices
            rest = torch.ones(5, dtype=torch.bool)
            rest[kept] = False
            expected = q[v] - p[v] if v in kept else q[v] * (1 - p[rest].sum() / q[rest].sum())
            assert grad[n, t, v].item() == pytest.approx(
                expected.item() / 2 if t < valid else 0.0, abs=1e-12
            )


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_a_student_like_the_teacher_costs_nothing(k, tau):
    student, _ = example()
    target = soft_labels(student.detach(), STUDENT, k, tau)
    loss = kl(student, STUDENT, target, temperature=tau)
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-14)
    torch.testing.assert_close(student.grad, torch.zeros_like(student), rtol=0, atol=1e-14)


def test_all_tokens_give_the_whole_divergence():
    student, teacher = example()
    target = soft_labels(teacher, TEACHER, 5)
    assert target.log_rest.isneginf().all()
    for i, t in enumerate(valid_frames(STUDENT, target).tolist()):
        p, q = teacher[i, :t].log_softmax(-1), student[i, :t].log_softmax(-1)
        expected = torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True)
        torch.testing.assert_close(kl(student, STUDENT, target)[i], expected)


def test_the_bound_grows_with_every_token_kept():
    student, teacher = example(v=8)
    bounds = [kl(student, STUDENT, soft_labels(teacher, TEACHER, k)) for k in range(1, 9)]
    for lower, higher in itertools.pairwise(bounds):
        assert (lower <= higher + 1e-12).all()
    assert bounds[0].min() >= 0 and bounds[0].sum() < 0.9 * bounds[-1].sum()


def test_a_rest_shared_out_alike_loses_nothing():
    student, teacher = example()
    with torch.no_grad():
        likeliest = teacher[:, :5].topk(2).indices
        student.copy_((teacher[:, :5] - 1).scatter_add(2, likeliest, student[..., :2]))
    losses = [kl(student, STUDENT, soft_labels(teacher, TEACHER, k)) for k in (2, 5)]
    torch.testing.assert_close(*losses)


def test_a_sharp_teacher_is_a_hard_label():
    student, teacher = example()
    target = soft_labels(teacher, TEACHER, 2, temperature=1e-3)
    for i, t in enumerate(valid_frames(STUDENT, target).tolist()):
        expected = torch.nn.functional.cross_entropy(
            student[i, :t], teacher[i, :t].argmax(-1), reduction="sum"
        )
        torch.testing.assert_close(kl(student, STUDENT, target)[i], expected)


def test_great_temperatures_compare_logits():
    student, teacher = example()
    target = soft_labels(teacher, TEACHER, 5, temperature=1e4)
    loss = kl(student, STUDENT, target, temperature=1e4, rescale=True)
    variance = (student - teacher[:, :5]).var(-1, correction=0) / 2
    inside = torch.arange(5) < valid_frames(STUDENT, target)[:, None]
    torch.testing.assert_close(loss, (variance * inside).sum(1), rtol=1e-3, atol=1e-3)


def test_entropy_makes_it_the_cross_entropy():
    student, teacher = example()
    target = soft_labels(teacher, TEACHER, 5)
    cross = -(teacher[:, :5].softmax(-1) * student.log_softmax(-1)).sum(-1)
    inside = torch.arange(5) < valid_frames(STUDENT, target)[:, None]
    total = kl(student, STUDENT, target) + entropy(STUDENT, target)
    torch.testing.assert_close(total, (cross * inside).sum(1))
    lumped = entropy(STUDENT, soft_labels(teacher, TEACHER, 2))
    assert (lumped <= entropy(STUDENT, target)).all() and lumped[0] > 0


def test_cross_entropy_sums_over_alignments():
    student, teacher = example(v=3)
    target = soft_labels(teacher, TEACHER, 3)
    p, q = teacher[0].softmax(-1).tolist(), student[0].softmax(-1).tolist()
    expected = 0.0
    for path in itertools.product(range(3), repeat=3):
        mine, theirs = (math.prod(x[t][v] for t, v in enumerate(path)) for x in (q, p))
        expected -= theirs * math.log(mine)
    total = kl(student, STUDENT, target) + entropy(STUDENT, target)
    assert total[0].item() == pytest.approx(expected, rel=1e-12)


def test_padding_company_and_shifts_change_nothing():
    student, teacher = example()
    target = soft_labels(teacher, TEACHER, 2)
    together = kl(student, STUDENT, target)
    with torch.no_grad():
        hostile = student + 3
        for i, t in enumerate(torch.minimum(STUDENT, TEACHER).tolist()):
            hostile[i, t:] = torch.nan
            teacher[i, t:] = torch.nan
            part = slice(i, i + 1)
            one = soft_labels(teacher[part, :t] - 5, TEACHER[part].clamp(max=t), 2)
            alone = kl(student[part, :t], STUDENT[part].clamp(max=t), one)
            torch.testing.assert_close(alone[0], together[i])
    torch.testing.assert_close(kl(hostile, STUDENT, target), together)
    again = kl(hostile.requires_grad_(), STUDENT, soft_labels(teacher, TEACHER, 2))
    torch.testing.assert_close(again, together)
    assert torch.autograd.grad(again.sum(), hostile)[0].isfinite().all()


def test_renaming_the_tokens_changes_nothing():
    student, teacher = example()
    order = torch.tensor([3, 0, 4, 1, 2])
    losses = [
        kl(z, STUDENT, soft_labels(z_teacher, TEACHER, 3))
        for z, z_teacher in ((student, teacher), (student[..., order], teacher[..., order]))
    ]
    torch.testing.assert_close(*losses)


def test_logits_of_a_chunk_are_all_there_ever_is(monkeypatch):
    sizes = []
    log_softmax = module._log_softmax
    monkeypatch.setattr(
        module, "_log_softmax", lambda x, tau: sizes.append(len(x)) or log_softmax(x, tau)
    )
    target = soft_labels(example()[1], TEACHER, 2)
    sizes.clear()
    kl_of_linear(*linear(), STUDENT, target, chunk=3).sum().backward()
    assert sizes == [3, 3, 2] * 2  # 3 + 2 + 0 + 3 frames, forwards and backwards


def test_frozen_inputs_and_no_bias():
    hidden, weight, bias = linear()
    target = soft_labels(example()[1], TEACHER, 2)
    frozen = kl_of_linear(hidden.detach(), weight.detach(), bias.detach(), STUDENT, target)
    assert not frozen.requires_grad
    loss = kl_of_linear(hidden, weight.detach(), None, STUDENT, target)
    torch.testing.assert_close(loss, dense(hidden, weight, None, STUDENT, target))
    loss.sum().backward()
    assert hidden.grad.any() and weight.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_single(dtype):
    student, teacher = example(v=50, dtype=torch.float32)
    target = soft_labels(teacher.to(dtype), TEACHER, 8)
    short = student.detach().to(dtype).requires_grad_()
    loss = kl(short, STUDENT, target)
    assert target.log_p.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(loss, kl(short.float(), STUDENT, target), rtol=0, atol=0)
    loss.sum().backward()
    assert short.grad.dtype == dtype and short.grad.isfinite().all()
    kept = dataclasses.replace(target, log_p=target.log_p.to(dtype))  # as a cache might
    torch.testing.assert_close(kl(short, STUDENT, kept), loss, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("autocast", [True, False])
def test_half_products_of_a_linear_layer_are_near(autocast):
    exact = linear(v=30, d=64, dtype=torch.float32)
    inputs = exact if autocast else [x.detach().bfloat16().requires_grad_() for x in exact]
    target = soft_labels(example(v=30, dtype=torch.float32)[1], TEACHER, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        short = kl_of_linear(*inputs, STUDENT, target)
    full = kl_of_linear(*exact, STUDENT, target)
    assert short.dtype == torch.float32 and not torch.equal(short, full)
    torch.testing.assert_close(short, full, rtol=0.02, atol=0.02)
    grads = zip(torch.autograd.grad(short.sum(), inputs), torch.autograd.grad(full.sum(), exact))
    for x, (mine, expected) in zip(inputs, grads):
        assert mine.dtype == x.dtype
        assert (mine - expected).norm() < 0.05 * expected.norm()


def test_half_gradients_of_many_chunks_are_summed_in_single():
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(s, generator=g).bfloat16() for s in ((1, 400, 4), (3, 4)))
    frames = torch.tensor([400])
    target = soft_labels(torch.randn(1, 400, 3, generator=g), frames, 2)
    weight.requires_grad_()
    grads = [
        torch.autograd.grad(
            kl_of_linear(hidden, weight, None, frames, target, chunk=chunk).sum(), weight
        )[0]
        for chunk in (1, 400)
    ]
    torch.testing.assert_close(*grads, rtol=0.01, atol=0.1)


def test_a_token_that_the_teacher_excludes():
    student, teacher = example()
    teacher[..., 2] = -torch.inf
    with torch.no_grad():
        student[..., 2] = -torch.inf  # the student may, too
    for k in (4, 5):
        loss = kl(student, STUDENT, soft_labels(teacher, TEACHER, k))
        others = [0, 1, 3, 4]
        expected = kl(student[..., others], STUDENT, soft_labels(teacher[..., others], TEACHER, 4))
        torch.testing.assert_close(loss, expected)
        assert torch.autograd.grad(loss.sum(), student)[0].isfinite().all()


@pytest.mark.parametrize("k", [1, 5])
def test_a_token_that_only_the_student_excludes(k):
    student, teacher = example()
    likeliest = teacher[0, 0].argmax()
    with torch.no_grad():
        student[0, 0, likeliest] = -torch.inf
    loss = kl(student, STUDENT, soft_labels(teacher, TEACHER, k))
    assert loss[0] == torch.inf and loss[1:].isfinite().all()
    assert torch.autograd.grad(loss.sum(), student)[0].isfinite().all()


def test_a_teacher_too_sharp_for_its_type():
    student, teacher = example(dtype=torch.float32)
    with torch.no_grad():
        student[..., 1] = -torch.inf
    teacher[..., 1] -= 1000  # probability 0 in float32, though its logarithm is finite
    loss = kl(student, STUDENT, soft_labels(teacher, TEACHER, 5))
    assert loss.isfinite().all()
    assert torch.autograd.grad(loss.sum(), student)[0].isfinite().all()


def test_nothing_that_is_no_number_is_hidden():
    student, teacher = example()
    teacher[0, 0, 0] = torch.nan
    loss = kl(student, STUDENT, soft_labels(teacher, TEACHER, 2))
    assert loss[0].isnan() and loss[1:].isfinite().all()


@pytest.mark.parametrize("utterances", [0, 4])
def test_nothing_to_compare(utterances):
    student, teacher = example()
    none = torch.zeros(utterances, dtype=torch.long)
    target = soft_labels(teacher[:utterances], none, 2)
    hidden, *layer = linear()
    for x, loss in (
        (student, kl(student[:utterances], none, target)),
        (hidden, kl_of_linear(hidden[:utterances], *layer, none, target)),
    ):
        assert loss.tolist() == [0.0] * utterances
        loss.sum().backward()
        assert not x.grad.any()
    assert entropy(none, target).tolist() == [0.0] * utterances


def test_the_shorter_of_both_counts():
    target = soft_labels(example()[1], TEACHER, 2)
    assert valid_frames(STUDENT, target).tolist() == [3, 2, 0, 3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z, y: kl(z, torch.tensor([4, 2, 0, 6]), y), "utterance 3 has 6 frames, but soft"),
        (lambda z, y: kl(z[:3], STUDENT[:3], y), "3 utterances with soft labels of 4"),
        (lambda z, y: kl(z[:, :2], STUDENT, y), "3 frames, but there are only 2"),
        (lambda z, y: kl(z[..., :4], STUDENT, y), "token 4, but the vocabulary has 4"),
        (lambda z, y: kl(z, STUDENT, y, temperature=0.0), "temperature is 0.0"),
        (lambda z, y: soft_labels(z, STUDENT, 6), "k is 6 of 5 tokens"),
        (lambda z, y: soft_labels(z, STUDENT, 0), "k is 0 of 5 tokens"),
        (lambda z, y: soft_labels(z, STUDENT, 1, math.nan), "temperature is nan"),
        (lambda z, y: kl_of_linear(*linear(), STUDENT, y, chunk=0), "chunk is 0"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    student, teacher = example()
    with pytest.raises(ValueError, match=message):
        call(student, soft_labels(teacher, TEACHER, 4))
