"""parts/search: every sequence by brute force · against the full sum · company · hostile input."""

import itertools
import math

import pytest
import torch

from espnet_pl.losses.ctc import feasible, log_probability
from espnet_pl.parts.decoding import greedy, pad
from espnet_pl.parts.search import Proposal, flat, prefix_search, rank


def example(n=3, t=4, v=3, seed=0, sharp=1.0):
    g = torch.Generator().manual_seed(seed)
    return (sharp * torch.randn(n, t, v, generator=g, dtype=torch.float64)).log_softmax(-1)


def all_sequences(log_p, frames, blank):
    """The probability of every label sequence, from every alignment."""
    found = {}
    for path in itertools.product(range(log_p.shape[1]), repeat=frames):
        y = tuple(k for k, _ in itertools.groupby(path) if k != blank)
        found[y] = found.get(y, 0.0) + math.exp(sum(log_p[t, k] for t, k in enumerate(path)))
    return sorted(((p, y) for y, p in found.items()), reverse=True)


@pytest.mark.parametrize("blank", [0, 1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_a_wide_beam_finds_all_sequences_with_their_probabilities(blank, seed):
    log_p, frames = example(seed=seed), [4, 2, 1]
    found = prefix_search(log_p, torch.tensor(frames), 64, 3, blank)
    for n, own in enumerate(found):
        expected = all_sequences(log_p[n], frames[n], blank)
        assert [tuple(y) for y, _ in own] == [y for _, y in expected]
        for (_, value), (p, _) in zip(own, expected):
            assert value == pytest.approx(math.log(p), abs=1e-12)
        assert sum(math.exp(value) for _, value in own) == pytest.approx(1)


def test_a_narrow_beam_finds_most_of_it():
    log_p, frames = example(2, 60, 30, sharp=3.0), torch.tensor([60, 41])
    found = prefix_search(log_p, frames, 8, 10)
    for n, own in enumerate(found):
        labels = [y for y, _ in own]
        assert len({tuple(y) for y in labels}) == len(labels) == 8
        text, lengths = pad(labels)
        owner = torch.full((8,), n)
        exact = log_probability(log_p, frames, text, lengths, owner)
        assert feasible(frames[owner], text, lengths).all()
        said = torch.tensor([value for _, value in own], dtype=torch.float64)
        assert (said <= exact + 1e-9).all() and (exact - said < 1.5).all()
        best_path = greedy(log_p[n : n + 1], frames[n : n + 1])
        text, lengths = pad(best_path)
        floor = log_probability(log_p, frames, text, lengths, owner[:1])
        assert exact.max() >= floor - 1e-9


def test_one_utterance_or_several_is_the_same():
    log_p, frames = example(3, 12, 6, sharp=2.0), torch.tensor([12, 5, 9])
    together = prefix_search(log_p, frames, 5, 4)
    for n in range(3):
        alone = prefix_search(log_p[n : n + 1, : frames[n]], frames[n : n + 1], 5, 4)[0]
        assert [y for y, _ in alone] == [y for y, _ in together[n]]


def test_equal_labels_need_a_blank_between_them():
    log_p = torch.full((1, 3, 2), -torch.inf, dtype=torch.float64)
    log_p[0, 0, 1] = log_p[0, 2, 1] = 0.0
    log_p[0, 1] = math.log(0.5)
    found = prefix_search(log_p, torch.tensor([3]), 4)
    assert [(y, round(value, 9)) for y, value in found[0]] == [
        ([1, 1], round(math.log(0.5), 9)), ([1], round(math.log(0.5), 9)),
    ] or sorted(y for y, _ in found[0]) == [[1], [1, 1]]  # fmt: skip


def test_no_frames_and_nothing_but_blanks():
    log_p = torch.full((2, 3, 4), -torch.inf)
    log_p[1, :, 0] = 0.0
    found = prefix_search(log_p, torch.tensor([0, 3]), 4)
    assert found == [[Proposal([], 0.0)], [Proposal([], 0.0)]]
    assert prefix_search(torch.zeros(1, 0, 4), torch.tensor([0]), 2) == [[([], 0.0)]]
    assert prefix_search(torch.zeros(0, 3, 4), torch.zeros(0, dtype=torch.long), 2) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_types(dtype):
    log_p = example(1, 8, 5).to(dtype)
    found = prefix_search(log_p, torch.tensor([8]), 4, 5)
    exact = prefix_search(log_p.double(), torch.tensor([8]), 4, 5)
    assert found == exact


@pytest.mark.parametrize(
    ("how", "message"), [({"beam": 0}, "beam is 0"), ({"beam": 1, "blank": 3}, "blank is 3")]
)
def test_what_cannot_be(how, message):
    with pytest.raises(ValueError, match=message):
        prefix_search(example(), torch.tensor([4, 4, 4]), **how)


def test_proposals_are_flattened_and_ranked_by_other_scores():
    proposals = [[Proposal([1, 2], -1.0), Proposal([3], -2.0)], [], [Proposal([], 0.0)]]
    text, lengths, owner = flat(proposals)
    assert text.tolist() == [[1, 2], [3, -1], [-1, -1]]
    assert lengths.tolist() == [2, 1, 0] and owner.tolist() == [0, 0, 2]
    ranked = rank(proposals, torch.tensor([-3.0, -0.5, -4.0]))
    assert ranked == [
        [Proposal([3], -0.5), Proposal([1, 2], -3.0)], [], [Proposal([], -4.0)]
    ]  # fmt: skip
