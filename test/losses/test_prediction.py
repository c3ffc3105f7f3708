"""losses/prediction: brute force · gradient · limits · invariance · hostile input."""

import math

import pytest
import torch

from espnet_pl.losses.prediction import (
    code_of,
    info_nce,
    of_codes,
    per_utterance,
    standardised,
)

FRAMES = torch.tensor([5, 0, 3])
ROWS, PLACES = torch.tensor([0, 0, 2, 2, 2]), torch.tensor([1, 4, 0, 2, 2])


def example(dtype=torch.float64, d=4, seed=0):
    """Predictions of some frames, and targets of all, padding too."""
    g = torch.Generator().manual_seed(seed)
    predictions = torch.randn(len(ROWS), d, generator=g, dtype=dtype).requires_grad_()
    targets = torch.randn(3, 6, d, generator=g, dtype=dtype).requires_grad_()
    return predictions, targets


def by_loops(predictions, targets, negatives, tau):
    """The first equation of the docstring, one prediction and one candidate at a time."""
    losses, candidates = [], []
    for p, row, place in zip(predictions.tolist(), ROWS.tolist(), PLACES.tolist()):

        def likeness(n, t, p=p):
            v = targets[n, t].tolist()
            return sum(a * b for a, b in zip(p, v)) / math.hypot(*p) / math.hypot(*v) / tau

        whose = [row] if negatives == "utterance" else range(3)
        all_of = [likeness(n, t) for n in whose for t in range(int(FRAMES[n]))]
        candidates.append(len(all_of))
        losses.append(-math.log(math.exp(likeness(row, place)) / sum(map(math.exp, all_of))))
    return torch.tensor(losses, dtype=torch.float64), candidates


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tau", [0.1, 1.0])
@pytest.mark.parametrize("negatives", ["utterance", "batch"])
def test_info_nce_equals_the_written_equation(negatives, tau, seed):
    predictions, targets = example(seed=seed)
    how = {"negatives": negatives, "temperature": tau}
    found = info_nce(predictions, ROWS, PLACES, targets, FRAMES, **how)
    loss, candidates = by_loops(predictions, targets, negatives, tau)
    torch.testing.assert_close(found.loss, loss)
    assert found.candidates.tolist() == candidates
    assert candidates == ([5, 5, 3, 3, 3] if negatives == "utterance" else [8] * 5)


@pytest.mark.parametrize("negatives", ["utterance", "batch"])
def test_gradients_are_the_numerical_ones(negatives):
    def loss(predictions, targets):
        how = {"negatives": negatives, "temperature": 0.5}
        return info_nce(predictions, ROWS, PLACES, targets, FRAMES, **how).loss

    assert torch.autograd.gradcheck(loss, example())
    logits = example(d=6)[0]
    codes = torch.tensor([0, 5, 2, 2, 1])
    assert torch.autograd.gradcheck(lambda x: of_codes(x, codes).loss, (logits,))
    assert torch.autograd.gradcheck(lambda x: per_utterance(x, ROWS, 3), (logits[:, 0],))


@pytest.mark.parametrize("negatives, count", [("utterance", [5, 5, 3, 3, 3]), ("batch", [8] * 5)])
def test_equal_frames_cost_the_log_of_how_many_there_are(negatives, count):
    predictions, targets = example()
    same = torch.ones_like(targets)
    loss = info_nce(predictions, ROWS, PLACES, same, FRAMES, negatives=negatives).loss
    torch.testing.assert_close(loss, torch.tensor(count).double().log())


def test_one_frame_costs_nothing():
    predictions, targets = example()
    frames = torch.tensor([0, 0, 1])
    rows, places = torch.tensor([2]), torch.tensor([0])
    for negatives in ("utterance", "batch"):
        how = {"negatives": negatives}
        found = info_nce(predictions[:1], rows, places, targets, frames, **how)
        assert found.loss.tolist() == [0.0] and found.candidates.tolist() == [1]
        (grad,) = torch.autograd.grad(found.loss.sum(), targets)
        assert not grad.any()


def test_a_perfect_prediction_among_orthogonal_frames():
    targets = torch.eye(4, dtype=torch.float64)[None]
    found = info_nce(
        targets[0], torch.zeros(4, dtype=torch.long), torch.arange(4), targets, torch.tensor([4]),
        temperature=0.2,
    )  # fmt: skip
    expected = math.log(math.exp(5) + 3) - 5
    torch.testing.assert_close(found.loss, torch.full((4,), expected, dtype=torch.float64))


def test_neither_length_nor_padding_matters():
    predictions, targets = example()
    for negatives in ("utterance", "batch"):
        how = {"negatives": negatives}
        loss = info_nce(predictions, ROWS, PLACES, targets, FRAMES, **how).loss
        with torch.no_grad():
            other = 3 * targets.clone()
            other[0, 5:], other[1], other[2, 3:] = 7.0, -7.0, torch.nan
        again = info_nce(0.1 * predictions, ROWS, PLACES, other, FRAMES, **how).loss
        torch.testing.assert_close(again, loss)


def test_nothing_to_predict_is_zero_and_on_the_graph():
    predictions, targets = example()
    none = torch.zeros(0, dtype=torch.long)
    for frames in (FRAMES, torch.zeros(3, dtype=torch.long)):
        loss = info_nce(predictions[:0], none, none, targets, frames).loss
        each = per_utterance(loss, none, 3)
        assert each.tolist() == [0.0] * 3
        each.sum().backward()
        assert not predictions.grad.any()
    each = per_utterance(of_codes(predictions[:0], none).loss, none, 3)
    each.sum().backward()
    assert each.tolist() == [0.0] * 3


def test_a_frame_that_is_none_is_refused():
    predictions, targets = example()
    for place in (5, -1):
        with pytest.raises(ValueError, match="behind the last one"):
            info_nce(predictions[:1], ROWS[:1], torch.tensor([place]), targets, FRAMES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    predictions, targets = (x.detach().to(dtype).requires_grad_() for x in example())
    loss = info_nce(predictions, ROWS, PLACES, targets, FRAMES, temperature=0.01).loss
    loss.sum().backward()
    assert loss.dtype == torch.float32 and loss.isfinite().all()
    assert predictions.grad.isfinite().all() and targets.grad.isfinite().all()
    codes = torch.tensor([0, 1, 2, 3, 0])
    loss = of_codes(3000 * predictions, codes).loss
    assert loss.dtype == torch.float32 and loss.isfinite().all()
    exact = of_codes(3000 * predictions.detach().double(), codes).loss
    torch.testing.assert_close(loss.double(), exact, rtol=0.02, atol=10.0)


def test_vectors_without_direction_have_a_finite_gradient():
    predictions, targets = example()
    with torch.no_grad():
        predictions[0], targets[2, 1] = 0.0, 0.0
    loss = info_nce(predictions, ROWS, PLACES, targets, FRAMES).loss
    loss.sum().backward()
    assert loss[0].item() == pytest.approx(math.log(5)) and predictions.grad.isfinite().all()
    assert targets.grad.isfinite().all()


def test_codes_equal_the_written_equation():
    logits, codes = example(d=6)[0], torch.tensor([0, 5, 2, 2, 1])
    found = of_codes(logits, codes)
    expected = [
        -math.log(math.exp(row[y]) / sum(map(math.exp, row)))
        for row, y in zip(logits.tolist(), codes.tolist())
    ]
    torch.testing.assert_close(found.loss, torch.tensor(expected, dtype=torch.float64))
    assert found.candidates.tolist() == [6] * 5
    uniform = of_codes(torch.zeros(5, 6, dtype=torch.float64), codes).loss
    torch.testing.assert_close(uniform, torch.full((5,), math.log(6), dtype=torch.float64))
    shifted = of_codes(logits + 9.0, codes).loss
    torch.testing.assert_close(shifted, found.loss)


def test_the_code_is_the_nearest_direction():
    g = torch.Generator().manual_seed(0)
    features, book = torch.randn(2, 9, 5, generator=g), torch.randn(7, 3, generator=g)
    projection = torch.randn(5, 3, generator=g)
    codes = code_of(features.requires_grad_(), projection, book)
    assert not codes.requires_grad and len(codes.unique()) > 2
    for row, own in zip(features.tolist(), codes.tolist()):
        for x, code in zip(row, own):
            p = [sum(a * float(w[i]) for a, w in zip(x, projection)) for i in range(3)]
            p = [v / math.hypot(*p) for v in p]
            vectors = [[v / math.hypot(*w) for v in w] for w in book.tolist()]
            apart = [math.dist(p, w) for w in vectors]
            assert code == apart.index(min(apart))
    assert torch.equal(code_of(5 * features, projection, 3 * book), codes)


def test_standardised_by_utterance_and_dimension():
    g = torch.Generator().manual_seed(0)
    x = 5 + 3 * torch.randn(3, 6, 2, generator=g)
    x[0, :5, 1] = 4.2  # never changes
    x[0, 5:], x[2, 3:] = torch.nan, torch.inf  # padding
    x[1] = 8.0
    out = standardised(x, FRAMES)
    own = x[0, :5, 0]
    torch.testing.assert_close(out[0, :5, 0], (own - own.mean()) / own.std(correction=0))
    assert not out[0, :, 1].any() and not out[0, 5:].any() and not out[1].any()
    torch.testing.assert_close(out[2, :3].square().mean(0), torch.ones(2))
    assert not standardised(x[:, :1], torch.ones(3, dtype=torch.long)).any()  # a single frame
