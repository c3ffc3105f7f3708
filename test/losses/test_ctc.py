"""losses/ctc: brute force over alignments · gradient · closed form · invariance · hostile input."""

import itertools
import math

import pytest
import torch

from espnet_pl.losses.ctc import best_alignment, ctc, feasible, log_probability, occupancies


def collapse(path, blank):
    merged = [k for k, _ in itertools.groupby(path)]
    return [k for k in merged if k != blank]


def brute_force(log_p, frames, labels, label_lengths, blank):
    """The equation of the docstring: every path of the vocabulary, one utterance at a time."""
    losses = []
    for lp, t, y, u in zip(
        log_p.tolist(), frames.tolist(), labels.tolist(), label_lengths.tolist()
    ):
        mass = 0.0
        for path in itertools.product(range(log_p.shape[-1]), repeat=t):
            if collapse(path, blank) == y[:u]:
                mass += math.exp(sum(lp[i][k] for i, k in enumerate(path)))
        losses.append(-math.log(mass) if mass else 0.0)
    return torch.tensor(losses, dtype=log_p.dtype)


def example(blank=0, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 4, 3, generator=g, dtype=dtype, requires_grad=True)
    a, b = [k for k in range(3) if k != blank]
    labels = torch.tensor([[a, b, -1], [a, a, -1], [a, b, a], [-1, -1, -1], [a, a, a]])
    return logits, torch.tensor([4, 3, 4, 2, 4]), labels, torch.tensor([2, 2, 3, 0, 3])


@pytest.mark.parametrize("blank", [0, 1, 2])
def test_equals_the_sum_over_all_alignments(blank):
    logits, *rest = example(blank)
    log_p = logits.log_softmax(-1)
    torch.testing.assert_close(ctc(log_p, *rest, blank=blank), brute_force(log_p, *rest, blank))


def test_gradient_is_the_numerical_one():
    logits, *rest = example()
    assert torch.autograd.gradcheck(lambda z: ctc(z.log_softmax(-1), *rest), (logits,))


def test_one_frame_one_label_is_cross_entropy():
    log_p = torch.tensor([[[0.2, 0.5, 0.3]]], dtype=torch.float64).log()
    loss = ctc(log_p, torch.tensor([1]), torch.tensor([[2]]), torch.tensor([1]))
    torch.testing.assert_close(loss.exp(), torch.tensor([1 / 0.3], dtype=torch.float64))


def test_an_empty_label_costs_the_blanks():
    logits, frames, labels, _ = example()
    log_p = logits.log_softmax(-1)
    loss = ctc(log_p, frames, labels, torch.zeros(5, dtype=torch.long))
    expected = [-log_p[i, :t, 0].sum() for i, t in enumerate(frames.tolist())]
    torch.testing.assert_close(loss, torch.stack(expected))


def test_padding_and_company_change_nothing():
    logits, frames, labels, lengths = example()
    log_p = logits.log_softmax(-1)
    together = ctc(log_p, frames, labels, lengths)
    for i, (t, u) in enumerate(zip(frames.tolist(), lengths.tolist())):
        alone = ctc(
            log_p[i : i + 1, :t], frames[i : i + 1], labels[i : i + 1, :u], lengths[i : i + 1]
        )
        torch.testing.assert_close(alone[0], together[i])


def test_renaming_the_tokens_changes_nothing():
    logits, frames, labels, lengths = example()
    swapped = torch.where(labels > 0, 3 - labels, labels)
    torch.testing.assert_close(
        ctc(logits.log_softmax(-1), frames, labels, lengths),
        ctc(logits[..., [0, 2, 1]].log_softmax(-1), frames, swapped, lengths),
    )


def test_feasible_counts_the_blank_between_repeats():
    frames = torch.tensor([2, 3, 2, 1, 0, 4])
    labels = torch.tensor([[1, 1], [1, 1], [1, 2], [1, 2], [0, 0], [1, 1]])
    lengths = torch.tensor([2, 2, 2, 2, 0, 1])
    assert feasible(frames, labels, lengths).tolist() == [False, True, True, False, False, True]


def test_no_alignment_costs_nothing_and_gives_no_gradient():
    logits = torch.zeros(2, 2, 3, requires_grad=True)
    loss = ctc(
        logits.log_softmax(-1),
        torch.tensor([2, 2]),
        torch.tensor([[1, 1], [1, 2]]),
        torch.tensor([2, 2]),
    )
    loss.sum().backward()
    assert loss[0] == 0 and loss[1] > 0
    assert (logits.grad[0] == 0).all() and logits.grad.isfinite().all()


def test_a_zero_probability_is_no_nan():
    log_p = torch.tensor([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]]).log()
    loss = ctc(log_p, torch.tensor([2]), torch.tensor([[1]]), torch.tensor([1]))
    torch.testing.assert_close(loss, torch.tensor([math.log(2)]))


def test_half_precision_is_summed_in_single():
    logits, *rest = example(dtype=torch.float32)
    single = ctc(logits.log_softmax(-1), *rest)
    half = ctc(logits.bfloat16().log_softmax(-1), *rest)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, single, rtol=0.02, atol=0.02)


def test_a_blank_outside_the_vocabulary_is_refused():
    logits, *rest = example()
    with pytest.raises(ValueError, match="blank is 3"):
        ctc(logits.log_softmax(-1), *rest, blank=3)


# --- several hypotheses of an utterance ----------------------------------------------------------


def hypotheses(blank=0, seed=0):
    """Logits of two utterances, and hypotheses: repeats, an empty one, one that cannot be."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 4, 3, generator=g, dtype=torch.float64, requires_grad=True)
    a, b = [k for k in range(3) if k != blank]
    labels = torch.tensor([[a, b, -1], [a, a, blank], [b, a, b], [-1, -1, -1], [b, b, b]])
    owners = torch.tensor([0, 0, 1, 1, 1])
    return logits, torch.tensor([4, 3]), labels, torch.tensor([2, 2, 3, 0, 3]), owners


@pytest.mark.parametrize("blank", [0, 1, 2])
def test_every_hypothesis_is_the_sum_over_its_alignments(blank):
    logits, frames, labels, lengths, owners = hypotheses(blank)
    weights = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.0], dtype=torch.float64)

    def expected(log_p):
        losses = []
        for y, u, n in zip(labels, lengths, owners):
            paths = itertools.product(range(3), repeat=int(frames[n]))
            mass = [
                sum(log_p[n, t, k] for t, k in enumerate(path))
                for path in paths
                if collapse(path, blank) == y[:u].tolist()
            ]
            losses.append(torch.stack(mass).logsumexp(0) if mass else log_p.new_zeros(()))
        return torch.stack(losses)

    both = []
    for function in (
        lambda x: log_probability(x, frames, labels, lengths, owners, blank),
        expected,
    ):
        value = function(logits.log_softmax(-1))
        both.append((value, *torch.autograd.grad((value * weights).sum(), logits)))
    torch.testing.assert_close(*both, rtol=0, atol=1e-12)
    assert both[0][0][4] == 0  # three equal labels need five frames
    possible = [True, True, True, True, False]
    assert feasible(frames[owners], labels, lengths).tolist() == possible


def test_gradient_of_hypotheses_is_the_numerical_one():
    log_p, *rest = hypotheses()
    assert torch.autograd.gradcheck(lambda x: log_probability(x, *rest), (log_p,))


def test_hypotheses_agree_with_torch():
    g = torch.Generator().manual_seed(0)
    log_p = torch.randn(3, 40, 20, generator=g, dtype=torch.float64).log_softmax(-1)
    labels = torch.randint(1, 20, (3, 9), generator=g)
    frames, lengths = torch.tensor([40, 22, 31]), torch.tensor([9, 4, 0])
    ours = log_probability(log_p, frames, labels, lengths, torch.arange(3))
    torch.testing.assert_close(ours, -ctc(log_p, frames, labels, lengths))


@pytest.mark.parametrize("blank", [0, 1, 2])
def test_occupancies_are_counted_over_all_alignments(blank):
    logits, frames, labels, lengths, owners = hypotheses(blank)
    log_p = logits.detach().log_softmax(-1)
    weights = torch.tensor([0.3, 0.7, 0.25, 0.75, 0.0], dtype=torch.float64)
    expected = torch.zeros_like(log_p)
    for y, u, n, w in zip(labels, lengths, owners, weights):
        aligned = [
            (path, math.exp(sum(log_p[n, t, k] for t, k in enumerate(path))))
            for path in itertools.product(range(3), repeat=int(frames[n]))
            if collapse(path, blank) == y[:u].tolist()
        ]
        for path, mass in aligned:
            for t, k in enumerate(path):
                expected[n, t, k] += w * mass / sum(m for _, m in aligned)
    with torch.no_grad():
        found = occupancies(log_p, frames, labels, lengths, owners, weights, blank)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    sums = torch.arange(4) < frames[:, None]
    torch.testing.assert_close(found.sum(-1), sums.double())


def test_occupancies_of_an_impossible_hypothesis_are_none():
    logits, frames, labels, lengths, owners = hypotheses()
    nothing = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])
    found = occupancies(logits, frames, labels, lengths, owners, nothing)
    assert not found.any() and not found.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hypotheses_in_short_types_are_summed_in_float64(dtype):
    log_p = torch.randn(1, 300, 30, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    log_p = log_p.to(dtype).requires_grad_()
    labels = torch.arange(60)[None] % 29 + 1
    call = torch.tensor([300]), labels, torch.tensor([60]), torch.tensor([0])
    value = log_probability(log_p, *call)
    torch.testing.assert_close(value, log_probability(log_p.double(), *call), rtol=0, atol=0)
    gradient = torch.autograd.grad(value.sum(), log_p)[0]
    assert gradient.dtype == dtype and gradient.isfinite().all()


def test_hypotheses_that_nothing_can_say():
    log_p = torch.full((2, 3, 4), -torch.inf, dtype=torch.float64)
    log_p[0, :, 0] = 0.0
    log_p.requires_grad_()
    labels, lengths = torch.tensor([[1, 2], [3, 3]]), torch.tensor([2, 2])
    frames = torch.tensor([3, 0])
    value = log_probability(log_p, frames, labels, lengths, torch.tensor([0, 1]))
    # The first has alignments, none of them with any probability; the second has none.
    assert value[0].isneginf() and value[1] == 0
    assert not torch.autograd.grad(value.sum(), log_p)[0].any()
    none = torch.zeros(0, dtype=torch.long)
    assert log_probability(log_p, frames, none.view(0, 2), none, none).shape == (0,)


@pytest.mark.parametrize("blank", [0, 1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_the_best_alignment_is_the_likeliest_of_all(blank, seed):
    logits, frames, labels, lengths = example(blank, seed=seed)
    log_p = (3 * logits).log_softmax(-1).detach()
    found = best_alignment(log_p, frames, labels, lengths, blank)
    for lp, t, y, u, path in zip(log_p.tolist(), frames.tolist(), labels, lengths, found.tolist()):
        paths = itertools.product(range(3), repeat=t)
        fits = [p for p in paths if collapse(p, blank) == y[:u].tolist()]
        best = max(fits, key=lambda p: sum(lp[i][k] for i, k in enumerate(p)), default=[-1] * t)
        assert path == [*best, *[-1] * (4 - t)]
    assert (found[4] == -1).all()  # three equal labels take five frames


def test_the_best_alignment_of_the_best_path_s_labels_is_that_path():
    g = torch.Generator().manual_seed(0)
    log_p = (2 * torch.randn(6, 30, 5, generator=g)).log_softmax(-1)
    frames = torch.tensor([30, 17, 1, 0, 29, 8])
    paths = [row[:t].tolist() for row, t in zip(log_p.argmax(2), frames.tolist())]
    said = [collapse(path, 0) for path in paths]
    labels = torch.full((6, 30), 77)  # padding may be anything
    for row, y in zip(labels, said):
        row[: len(y)] = torch.tensor(y)
    lengths = torch.tensor([len(y) for y in said])
    found = best_alignment(log_p, frames, labels, lengths)
    assert [row[:t].tolist() for row, t in zip(found, frames.tolist())] == paths
    assert all((row[t:] == -1).all() for row, t in zip(found, frames.tolist()))
    half = best_alignment(log_p.half(), frames, labels, lengths)
    assert [collapse(row[:t].tolist(), 0) for row, t in zip(half, frames.tolist())] == said


def test_a_best_alignment_of_nothing():
    nothing = torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    log_p = torch.randn(2, 3, 4).log_softmax(-1)
    path = best_alignment(log_p, torch.tensor([3, 2]), *nothing, blank=1)
    assert path.tolist() == [[1, 1, 1], [1, 1, -1]]
    assert best_alignment(log_p[:, :0], torch.zeros(2).long(), *nothing).shape == (2, 0)
    never = torch.full((1, 2, 3), -torch.inf)
    one = torch.tensor([1])
    assert (best_alignment(never, torch.tensor([2]), one[None], one) == -1).all()
