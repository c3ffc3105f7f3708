"""parts/hiding: what is hidden, how much of it, and whose frames they are."""

import math

import pytest
import torch

from espnet_pl.parts.hiding import Bins, hide_future, hide_spans

FRAMES = torch.tensor([40, 1, 17, 0])


@pytest.mark.parametrize("least", [0.0, 0.5, 0.667, 0.99])
def test_all_is_hidden_from_a_frame_on_and_enough_is_heard(least):
    torch.manual_seed(0)
    cuts = []
    for _ in range(300):
        hidden = hide_future(FRAMES, 42, least)
        assert hidden.shape == (4, 42) and hidden.dtype == torch.bool
        for row, t in zip(hidden.tolist(), FRAMES.tolist()):
            heard = row.index(True) if any(row) else t
            assert row == [heard <= i < t for i in range(42)]
            assert heard >= min(t, max(1, math.ceil(least * t - 1e-4)))
            cuts.append((t, heard))
    first = [heard for t, heard in cuts if t == 40]
    lowest = max(1, math.ceil(least * 40))
    assert {*first} == {*range(lowest, 40)} if lowest < 40 else {*first} == {40}
    assert all(heard == t for t, heard in cuts if t < 2)


def test_spans_have_their_length_and_their_share():
    torch.manual_seed(0)
    frames = torch.tensor([2000, 1500, 0, 3])
    hidden = hide_spans(frames, 2000, share=0.4, span=7)
    for row, t in zip(hidden.tolist(), frames.tolist()):
        assert not any(row[t:])
        runs = "".join("x" if h else "." for h in row[:t]).split(".")
        assert all(len(run) >= 7 for run in runs[:-1] if run)  # the last one may be cut
    assert float(hidden[0].float().mean()) == pytest.approx(0.4, abs=0.06)
    assert float(hidden[1, :1500].float().mean()) == pytest.approx(0.4, abs=0.06)
    other = hide_spans(frames, 2000, share=0.1, span=1)
    assert float(other[0].float().mean()) == pytest.approx(0.1, abs=0.03)
    assert hide_spans(frames, 2000, share=0.4, span=5000).shape == (4, 2000)
    assert hide_spans(frames[:0], 0, share=0.4, span=3).shape == (0, 0)


@pytest.mark.parametrize("ratio", [1, 2, 3, 4.17, 6.5])
def test_every_frame_of_input_belongs_to_one_of_output(ratio):
    inputs = torch.tensor([50, 23, 7, 0, 5])
    outputs = (inputs / ratio).long()
    bins = Bins(inputs, 52, outputs, int(outputs.max()) + 1)
    for own, s, t in zip(bins.of.tolist(), inputs.tolist(), outputs.tolist()):
        for i, j in enumerate(own):
            if i < s and t:
                assert j * s // t <= i < (j + 1) * s // t
            else:
                assert j == bins.t
    assert bins.sizes.sum() == sum(s for s, t in zip(inputs.tolist(), outputs.tolist()) if t)


def test_the_mean_and_what_is_wholly_hidden():
    features = torch.arange(12.0).view(1, 6, 2).repeat(2, 1, 1)
    bins = Bins(torch.tensor([6, 4]), 6, torch.tensor([3, 2]), 3)
    mean = bins.mean(features)
    assert mean.tolist() == [[[1, 2], [5, 6], [9, 10]], [[1, 2], [5, 6], [0, 0]]]
    hidden = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]]).bool()
    assert bins.all(hidden).tolist() == [[False, True, False], [False, True, False]]
    half = bins.mean(features.half())
    assert half.dtype == torch.float32 and torch.equal(half, mean)
    more = Bins(torch.tensor([2]), 2, torch.tensor([4]), 4)  # more frames than it was given
    assert more.of.tolist() == [[1, 3]]
    assert more.all(torch.ones(1, 2).bool()).tolist() == [[False, True, False, True]]
