"""parts/decoding: merge first, then drop blanks."""

import torch

from espnet_pl.parts.decoding import collapse, consensus, greedy, pad


def frames_of(path, vocabulary=4):
    return torch.nn.functional.one_hot(torch.tensor([path]), vocabulary).float().log_softmax(-1)


def test_a_blank_keeps_two_equal_labels_apart():
    assert collapse(torch.tensor([1, 1, 0, 1, 2, 2])) == [1, 1, 2]
    assert collapse(torch.tensor([2, 2, 3, 2, 1]), blank=2) == [3, 1]


def test_only_blanks_say_nothing():
    assert greedy(frames_of([0, 0, 0]), torch.tensor([3])) == [[]]


def test_frames_behind_the_end_are_not_decoded():
    assert greedy(frames_of([1, 0, 2, 3]), torch.tensor([2])) == [[1]]


def test_pad_is_undone_by_its_lengths():
    labels = [[1, 2, 3], [], [4]]
    padded, lengths = pad(labels)
    assert padded.shape == (3, 3) and (padded[1] == -1).all()
    assert [row[:n].tolist() for row, n in zip(padded, lengths)] == labels


def test_pad_of_nothing_but_silence():
    padded, lengths = pad([[], []])
    assert padded.shape == (2, 0) and lengths.tolist() == [0, 0]


def test_the_consensus_is_the_sequence_nearest_to_all():
    assert consensus([[1, 2, 3], [1, 2], [1, 2, 3, 4], [1, 2, 3]]) == [1, 2, 3]
    # The second is as near to the others as the third, and before it.
    assert consensus([[9, 9, 9], [1, 2], [1, 2, 3]]) == [1, 2]
    assert consensus([[], [1], [1]]) == [1]


def test_the_consensus_of_two_is_the_first():
    assert consensus([[1], [2]]) == [1] and consensus([[], [2]]) == []


def test_an_outlier_does_not_drag_the_consensus_along():
    agreed = [[1, 2, 3]] * 3
    assert consensus([*agreed, [4] * 50]) == [1, 2, 3]
    assert consensus([[4] * 50, *agreed]) == [1, 2, 3]
