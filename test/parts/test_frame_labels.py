"""parts/frame_labels: paths, runs, units and segments, by loops over frames; other frame rates."""

import itertools
import random

import pytest
import torch

from espnet_pl.parts.decoding import collapse
from espnet_pl.parts.frame_labels import (
    FrameLabels,
    draw_of_segments,
    frame_labels,
    record,
    unit_of_each_run,
)
from espnet_pl.parts.search import Proposal
from test.toys import speaking_student, utterances

TOKENS = 5  # blank and four more


class Says:
    """A teacher with given frames and hypotheses."""

    def __init__(self, log_p, frames, found=None):
        self.log_p, self.frames, self.found = log_p, frames, found

    def frame_log_probs(self):
        return self.log_p, self.frames

    def propose(self, beam):
        return [[Proposal(y, 0.0) for y in own[:beam]] for own in self.found]


def as_record(path):
    """Of frames; −1 is the blank."""
    runs = [(label, len([*own])) for label, own in itertools.groupby(path)]
    labels, lengths = zip(*runs) if runs else ((), ())
    return {
        "labels": torch.tensor(labels, dtype=torch.int32),
        "lengths": torch.tensor(lengths, dtype=torch.int32),
    }


def path_of(own):
    return own["labels"].repeat_interleave(own["lengths"].long()).tolist()


def by_frames(path, how):
    """The words of the docstring, one frame after the other."""
    out, token, left = [], None, -1
    for before, now in zip([-1, *path], path):
        if now >= 0 and now != before:
            token, left = now, -1 if token is None else token
        unit = None if token is None else token + 1
        if unit is not None and how.order == 2:
            unit += (left + 1) * (TOKENS + 1)
        if now >= 0:
            out.append(unit)
        elif how.blank == "keep":
            out.append(0)
        else:
            out.append(-1 if unit is None or how.blank == "drop" else unit)
    return out


def random_path(seed, t):
    draw = random.Random(seed)
    path = []
    while len(path) < t:
        path += [draw.choice([-1, -1, 1, 2, 4])] * draw.randint(1, 4)
    return path[:t]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("blank", ["spread", "drop", "keep"])
def test_units_are_those_of_each_frame(order, blank):
    how = FrameLabels(order=order, blank=blank)
    paths = [random_path(seed, t) for seed, t in enumerate([0, 1, 2, 9, 30, 30, 30])]
    paths += [[-1] * 4, [3] * 4, [-1, -1, 2, -1, 2, 2, -1]]
    frames = torch.tensor([len(path) for path in paths])
    found = frame_labels(how, [as_record(path) for path in paths], TOKENS, frames)
    assert found.shape == (len(paths), 30)
    for row, path in zip(found, paths):
        assert row.tolist() == [*by_frames(path, how), *[-1] * (30 - len(path))]
    assert found.max() < how.number_of_units(TOKENS)


def test_a_token_is_another_unit_behind_another_one():
    how = FrameLabels(order=2)
    units = [unit_of_each_run(how, as_record(p), TOKENS).unique() for p in ([1, 3], [2, 3], [3, 3])]
    assert len({int(own[-1]) for own in units}) == 3
    # And with itself, if something is between them.
    assert len(unit_of_each_run(how, as_record([3, -1, 3]), TOKENS).unique()) == 2


@pytest.mark.parametrize("blank", [0, 3])
def test_the_argmax_of_each_frame(blank):
    log_p = torch.randn(3, 7, TOKENS, generator=torch.Generator().manual_seed(1)).log_softmax(2)
    frames = torch.tensor([7, 0, 4])
    records = record(FrameLabels(units="argmax"), Says(log_p, frames), blank)
    for own, lp, t in zip(records, log_p, frames.tolist()):
        best = lp[:t].argmax(1)
        assert path_of(own) == best.masked_fill(best == blank, -1).tolist()
        assert own["labels"].dtype == own["lengths"].dtype == torch.int32


@pytest.mark.parametrize("blank", [0, 3])
def test_the_best_alignment_of_the_best_hypothesis_that_fits(blank):
    log_p = torch.randn(3, 4, TOKENS, generator=torch.Generator().manual_seed(1)).log_softmax(2)
    frames = torch.tensor([4, 3, 2])
    said = [[[1, 1, 2, 2], [1, 2], [2]], [[4, 4]], [[1, 2, 1], [4, 4]]]
    records = record(FrameLabels(), Says(log_p, frames, said), blank)
    for own, lp, t, y in zip(records, log_p, frames.tolist(), ([1, 2], [4, 4], [])):
        fits = [
            p
            for p in itertools.product(range(TOKENS), repeat=t)
            if collapse(torch.tensor(p), blank) == y
        ]
        best = max(fits, key=lambda p: sum(float(lp[i, k]) for i, k in enumerate(p)))
        assert path_of(own) == [-1 if k == blank else k for k in best]
    (first, *_) = record(FrameLabels(beam=1), Says(log_p, frames, said), blank)
    assert path_of(first) == [-1] * 4  # the only one does not fit


def test_a_greedy_hypothesis_is_aligned_by_the_argmax():
    teacher = speaking_student().eval()
    heard = teacher.hear(utterances(n=6))
    greedy = record(FrameLabels(units="argmax"), heard, 0)
    said = [[collapse(torch.tensor(path_of(own)), -1)] for own in greedy]
    aligned = record(FrameLabels(), Says(heard.log_p, heard.frames, said), 0)
    assert [path_of(own) for own in aligned] == [path_of(own) for own in greedy]
    assert any(len(own["labels"]) > 2 for own in greedy)


@pytest.mark.parametrize("order", [1, 2])
def test_clusters_are_units_as_tokens_are(order):
    how = FrameLabels(units="clusters", clusters=3, order=order)
    own = as_record([2, 2, 0, 1, 1, 2])
    units = unit_of_each_run(how, own, TOKENS).tolist()
    assert units == ([3, 1, 2, 3] if order == 1 else [3, 1 + 3 * 4, 2 + 1 * 4, 3 + 2 * 4])
    assert how.number_of_units(TOKENS) == 4**order


def test_other_frames_have_the_label_of_their_time():
    how = FrameLabels(blank="drop")
    path = [0, 0, 1, 1, 1, 3]
    for t, expected in (
        (6, [1, 1, 2, 2, 2, 4]),
        (12, [1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 4, 4]),
        (3, [1, 2, 4]),  # the middles are at the teacher's 1, 3 and 5
        (5, [1, 1, 2, 2, 4]),
        (1, [2]),
        (0, []),
    ):
        (row,) = frame_labels(how, [as_record(path)], TOKENS, torch.tensor([t]))
        assert row.tolist() == expected
        middles = [(i + 0.5) / t * len(path) for i in range(t)]
        assert expected == [path[int(m)] + 1 for m in middles]
    assert frame_labels(how, [as_record([])], TOKENS, torch.tensor([2])).tolist() == [[-1, -1]]


def segments(labels):
    """Places of each segment, by utterance."""
    for i, row in enumerate(labels.tolist()):
        places = iter(range(len(row)))
        for label, own in itertools.groupby(row):
            mine = [next(places) for _ in own]
            if label >= 0:
                yield i, mine


def test_one_frame_of_each_segment_and_any():
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, 2, (5, 20), generator=g)
    labels[1] = -1
    labels[2] = 1  # one segment, which does not go on in the next utterance
    labels[3] = 1
    expected = [*segments(labels)]
    torch.manual_seed(0)
    seen = [set() for _ in expected]
    for _ in range(200):
        rows, places = draw_of_segments(labels)
        assert rows.tolist() == [i for i, _ in expected]
        for mine, place, (_, own) in zip(seen, places.tolist(), expected):
            assert place in own
            mine.add(place)
    assert all(mine == set(own) for mine, (_, own) in zip(seen, expected))


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0), (2, 3)])
def test_no_segments(shape):
    rows, places = draw_of_segments(torch.full(shape, -1))
    assert rows.shape == places.shape == (0,)


def test_a_beam_of_none_is_refused():
    with pytest.raises(ValueError, match="beam is 0"):
        FrameLabels(beam=0)
    assert FrameLabels(units="argmax", beam=3).asked == FrameLabels(units="argmax").asked
    assert FrameLabels(order=2, blank="keep").asked == FrameLabels().asked
    assert FrameLabels(beam=2).asked != FrameLabels().asked
