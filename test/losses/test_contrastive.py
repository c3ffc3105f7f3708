"""losses/contrastive: brute force · gradient · limits · invariance · memory · hostile input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from espnet_pl.losses import contrastive as module
from espnet_pl.losses.contrastive import Frames, contrastive


def brute_force(anchors, candidates=None, temperature=0.1, denominator="all"):
    """The first equations of the docstring, one anchor and one positive at a time."""
    own, candidates = candidates is None, candidates or anchors
    c = [z / z.norm() for z in candidates.features]
    losses, positives, negatives = [], [], []
    for i, (z, label) in enumerate(zip(anchors.features, anchors.labels.tolist())):
        others = [a for a in range(len(c)) if candidates.labels[a] >= 0 and not (own and a == i)]
        same = [p for p in others if candidates.labels[p] == label]
        if anchors.utterance is not None:
            here = [a for a in others if candidates.utterance[a] == anchors.utterance[i]]
            others = sorted({*same, *here})
        same, others = ([], []) if label < 0 else (same, others)
        positives.append(len(same))
        negatives.append(len(others) - len(same))
        z = z / z.norm()
        terms = []
        for p in same:
            against = [p, *(a for a in others if a not in same)]
            against = others if denominator == "all" else against
            mass = sum((z @ c[a] / temperature).exp() for a in against)
            terms.append(((z @ c[p] / temperature).exp() / mass).log())
        losses.append(-sum(terms) / len(terms) if terms else 0 * z.sum())
    empty = anchors.features.new_zeros(0)
    return torch.stack(losses) if losses else empty, positives, negatives


def example(n, classes=3, d=4, utterances=None, dtype=torch.float64, seed=0):
    """Random frames; one label in ``classes + 1`` is padding."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, generator=g, dtype=dtype).requires_grad_()
    labels = torch.randint(-1, classes, (n,), generator=g)
    utterance = torch.randint(0, utterances, (n,), generator=g) if utterances else None
    return Frames(z, labels, utterance)


def gradients(loss, *frames):
    weights = torch.linspace(-1.5, 2, len(loss), dtype=loss.dtype)
    inputs = [f.features for f in frames]
    return torch.autograd.grad((loss * weights).sum(), inputs, materialize_grads=True)


def assert_equals_brute_force(anchors, candidates=None, *, block, **how):
    tight = {"rtol": 1e-12, "atol": 1e-12}
    mine = contrastive(anchors, candidates, block=block, **how)
    loss, positives, negatives = brute_force(anchors, candidates, **how)
    torch.testing.assert_close(mine.loss, loss, **tight)
    assert mine.positives.tolist() == positives and mine.negatives.tolist() == negatives
    if len(loss):
        both = [anchors] if candidates is None else [anchors, candidates]
        torch.testing.assert_close(gradients(mine.loss, *both), gradients(loss, *both), **tight)


shapes = st.tuples(st.integers(0, 9), st.integers(1, 4), st.integers(1, 5))
scopes = st.sampled_from([None, 1, 3])
hows = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.05, 0.1, 1.0, 3.0]),
        "denominator": st.sampled_from(["all", "one"]),
        "block": st.integers(1, 10),
    }
)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(shapes, scopes, hows, st.integers(0, 10**6))
def test_equals_the_written_equation(shape, scope, how, seed):
    frames = example(*shape, utterances=scope, seed=seed)
    assert_equals_brute_force(frames, **how)


@settings(deadline=None, max_examples=80, derandomize=True)
@given(shapes, st.integers(0, 7), scopes, hows, st.integers(0, 10**6))
def test_other_candidates_equal_it_too(shape, m, scope, how, seed):
    _, classes, d = shape
    anchors = example(*shape, utterances=scope, seed=seed)
    candidates = example(m, classes, d, utterances=scope, seed=seed + 1)
    assert_equals_brute_force(anchors, candidates, **how)


@pytest.mark.parametrize("denominator", ["all", "one"])
@pytest.mark.parametrize("scope", [None, 2])
def test_gradient_is_the_numerical_one(scope, denominator):
    how = {"temperature": 0.5, "denominator": denominator}
    frames, others = example(7, utterances=scope), example(5, utterances=scope, seed=1)

    def alone(z):
        return contrastive(Frames(z, frames.labels, frames.utterance), **how).loss

    def against(z, c):
        candidates = Frames(c, others.labels, others.utterance)
        anchors = Frames(z, frames.labels, frames.utterance)
        return contrastive(anchors, candidates, block=3, **how).loss

    assert torch.autograd.gradcheck(alone, (frames.features,))
    assert torch.autograd.gradcheck(against, (frames.features, others.features))


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("n, m", [(40, None), (7, None), (2, None), (9, 30)])
def test_is_that_of_pytorch_metric_learning(n, m, temperature):
    # It has one loss for us: all positives in the denominator, negatives of all utterances, and
    # the mean over anchors with a positive; without negatives it says 0, and we do not.
    from pytorch_metric_learning.losses import SupConLoss

    def one_more_class(frames):
        return Frames(frames.features, frames.labels + 1)

    anchors = one_more_class(example(n))
    candidates = m and one_more_class(example(m, seed=1))
    anchors.labels[: 2 if m is None else 1] = 0
    mine = contrastive(anchors, candidates, temperature=temperature)
    mean = mine.loss.sum() / (mine.positives > 0).sum()
    other = [candidates.features, candidates.labels] if m else []
    theirs = SupConLoss(temperature=temperature)(anchors.features, anchors.labels, None, *other)
    if not mine.negatives.any():
        assert theirs == 0
        return
    torch.testing.assert_close(mean, theirs)
    given = [f.features for f in (anchors, candidates) if f]
    for a, b in zip(*(torch.autograd.grad(x, given) for x in (mean, theirs))):
        torch.testing.assert_close(a, b)


def test_equal_frames_of_one_class_cost_the_log_of_the_others():
    frames = Frames(torch.ones(6, 3, dtype=torch.float64), torch.full((6,), 4))
    loss, positives, negatives = contrastive(frames)
    torch.testing.assert_close(loss, torch.full((6,), math.log(5), dtype=torch.float64))
    assert positives.tolist() == [5] * 6 and not negatives.any()


def test_two_classes_at_right_angles():
    z = torch.eye(2, dtype=torch.float64).repeat_interleave(3, 0)
    loss = contrastive(Frames(z, torch.tensor([0, 0, 0, 1, 1, 1])), temperature=0.2).loss
    expected = math.log(2 * math.exp(5) + 3) - 5  # two positives, three negatives
    torch.testing.assert_close(loss, torch.full((6,), expected, dtype=torch.float64))


def test_one_positive_stands_against_the_negatives_only():
    z = torch.eye(2, dtype=torch.float64).repeat_interleave(3, 0)
    frames = Frames(z, torch.tensor([0, 0, 0, 1, 1, 1]))
    loss = contrastive(frames, temperature=0.2, denominator="one").loss
    expected = math.log1p(3 * math.exp(-5))
    torch.testing.assert_close(loss, torch.full((6,), expected, dtype=torch.float64))
    alone = Frames(z, torch.zeros(6, dtype=torch.long))  # positives only
    assert not contrastive(alone, denominator="one").loss.any()


def test_with_one_positive_each_both_denominators_are_the_same():
    z = example(8).features
    frames = Frames(z, torch.arange(4).repeat(2))
    losses = [contrastive(frames, denominator=name).loss for name in ("all", "one")]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(gradients(loss, frames) for loss in losses))


def test_a_hot_softmax_counts_the_others():
    loss = contrastive(example(9, utterances=None), temperature=1e9)
    expected = (loss.positives + loss.negatives).double().log()
    expected = expected.masked_fill(loss.positives == 0, 0.0)
    torch.testing.assert_close(loss.loss, expected, rtol=0, atol=1e-8)


def test_order_rotation_and_length_change_nothing():
    frames = example(9, utterances=2)
    before = contrastive(frames)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    mixed = Frames(frames.features[order], frames.labels[order], frames.utterance[order])
    torch.testing.assert_close(contrastive(mixed).loss, before.loss[order])
    turn = torch.linalg.qr(example(4).features.detach()).Q
    lengths = torch.linspace(0.1, 10, 9, dtype=torch.float64)[:, None]
    turned = Frames(frames.features @ turn * lengths, frames.labels, frames.utterance)
    torch.testing.assert_close(contrastive(turned).loss, before.loss)
    renamed = Frames(frames.features, frames.labels * 1000, frames.utterance + 7)
    torch.testing.assert_close(
        contrastive(renamed).loss, torch.where(frames.labels < 0, 0.0, before.loss)
    )


@pytest.mark.parametrize("block", [1, 4, 100])
def test_the_size_of_a_block_changes_nothing(block):
    frames = example(11)
    losses = [contrastive(frames, block=b).loss for b in (512, block)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(gradients(loss, frames) for loss in losses))


def test_padding_is_never_read():
    frames = example(8, utterances=2)
    real = frames.labels >= 0
    hostile = torch.where(real[:, None], frames.features, torch.nan)
    loss = contrastive(Frames(hostile, frames.labels, frames.utterance)).loss
    alone = Frames(frames.features[real], frames.labels[real], frames.utterance[real])
    torch.testing.assert_close(loss[real], contrastive(alone).loss)
    assert not loss[~real].any()
    assert gradients(loss, frames)[0].isfinite().all()


def test_candidates_have_a_gradient_only_if_they_ask():
    anchors, candidates = example(6), example(6, seed=1)
    frozen = Frames(candidates.features.detach(), candidates.labels)
    expected = gradients(contrastive(anchors, candidates).loss, anchors, candidates)
    torch.testing.assert_close(
        gradients(contrastive(anchors, frozen).loss, anchors)[0], expected[0]
    )
    still = Frames(anchors.features.detach(), anchors.labels)
    torch.testing.assert_close(
        gradients(contrastive(still, candidates).loss, candidates)[0], expected[1]
    )
    assert not contrastive(still, frozen).loss.requires_grad


class _Largest(TorchDispatchMode):
    """Remembers the most elements any tensor had that any operation made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("denominator", ["all", "one"])
@pytest.mark.parametrize("scope", [None, 3])
@pytest.mark.parametrize("own", [True, False])
def test_no_tensor_has_the_size_of_all_pairs(own, scope, denominator):
    anchors = example(300, utterances=scope)
    candidates = None if own else example(200, utterances=scope, seed=1)
    with _Largest() as seen:
        loss = contrastive(anchors, candidates, denominator=denominator, block=20).loss
        loss.sum().backward()
    assert 400 <= seen.elements <= 300 * 4
    assert anchors.features.grad.any()


@pytest.mark.parametrize("denominator", ["all", "one"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_single(dtype, denominator):
    half = example(60, d=16, dtype=dtype)
    single = Frames(half.features.detach().float().requires_grad_(), half.labels)
    with torch.autocast("cpu", torch.bfloat16):
        loss = contrastive(half, denominator=denominator).loss
        (short,) = gradients(loss, half)
    expected = contrastive(single, denominator=denominator).loss
    assert loss.dtype == torch.float32 and short.dtype == dtype
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    torch.testing.assert_close(short, gradients(expected, single)[0].to(dtype))


def test_single_precision_is_near_double():
    double = example(200, d=32)
    single = Frames(double.features.detach().float().requires_grad_(), double.labels)
    losses = contrastive(single).loss, contrastive(double).loss
    torch.testing.assert_close(losses[0].double(), losses[1], rtol=1e-5, atol=1e-5)
    (mine,), (exact,) = gradients(losses[0], single), gradients(losses[1], double)
    assert (mine - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.parametrize("denominator", ["all", "one"])
@pytest.mark.parametrize("labels", [[], [2], [-1], [0, 1, 2, 3], [-1, -1], [-1, 5, 6]])
def test_nothing_to_attract(labels, denominator):
    frames = Frames(torch.randn(len(labels), 3).requires_grad_(), torch.tensor(labels).long())
    loss, positives, _ = contrastive(frames, denominator=denominator)
    assert loss.shape == (len(labels),) and not loss.any() and not positives.any()
    loss.sum().backward()
    assert not frames.features.grad.any()


def test_no_candidates_at_all():
    anchors = example(3)
    none = Frames(anchors.features[:0].detach(), anchors.labels[:0])
    loss = contrastive(anchors, none).loss
    loss.sum().backward()
    assert not loss.any() and not anchors.features.grad.any()


@pytest.mark.parametrize("denominator", ["all", "one"])
def test_a_cold_softmax_does_not_overflow(denominator):
    double = example(40, d=8)
    single = Frames(double.features.detach().float().requires_grad_(), double.labels)
    how = {"temperature": 1e-3, "denominator": denominator}
    losses = [contrastive(f, **how).loss for f in (single, double)]
    torch.testing.assert_close(losses[0].double(), losses[1], rtol=1e-4, atol=1e-2)
    assert gradients(losses[0], single)[0].isfinite().all()


def test_vectors_without_a_direction():
    z = torch.randn(5, 3)
    z[1] = 0.0
    z[2] *= 1e-30
    z[3] *= 1e15
    frames = Frames(z.requires_grad_(), torch.zeros(5, dtype=torch.long))
    loss = contrastive(frames).loss
    loss.sum().backward()
    assert loss.isfinite().all() and frames.features.grad.isfinite().all()


def test_a_feature_that_is_no_number_is_seen():
    z = torch.randn(4, 3)
    z[2, 0] = torch.nan
    assert contrastive(Frames(z, torch.zeros(4, dtype=torch.long))).loss.isnan().all()


Z, Y = torch.zeros(3, 2), torch.zeros(3, dtype=torch.long)


@pytest.mark.parametrize(
    ("anchors", "candidates", "how", "message"),
    [
        ((Z, Y[:2]), None, {}, r"3 frames, but labels or utterances of \[2\]"),
        ((Z, Y, Y[:1]), None, {}, r"labels or utterances of \[3, 1\]"),
        ((Z, Y), (Z[:, :1], Y), {}, "anchors of 2 dimensions, candidates of 1"),
        ((Z, Y), (Z, Y, Y), {}, "for anchors and candidates, or for neither"),
        ((Z, Y), None, {"temperature": 0.0}, "temperature is 0.0"),
        ((Z, Y), None, {"temperature": math.nan}, "temperature is nan"),
        ((Z, Y), None, {"block": 0}, "block is 0"),
    ],
)
def test_what_does_not_fit_is_refused(anchors, candidates, how, message):
    def frames(features, labels, utterance=None):
        made = object.__new__(Frames)  # in tests, annotations come before the check
        made.__dict__.update(features=features, labels=labels, utterance=utterance)
        return made

    how = {"temperature": 0.1, "block": 512, **how}
    with pytest.raises(ValueError, match=message):
        module._check(frames(*anchors), candidates and frames(*candidates), **how)
