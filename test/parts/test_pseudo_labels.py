"""parts/pseudo_labels: what is trained on, what is dropped, and how it is counted."""

import pytest
import torch

from espnet_pl.parts.cache import PseudoLabelCache
from espnet_pl.parts.decoding import greedy, pad
from espnet_pl.parts.pseudo_labels import (
    by_risk,
    label_error_rate,
    label_statistics,
    loops,
    mixed,
    propose,
    student_statistics,
)
from test.toys import speaking_student, utterances


@pytest.fixture
def student():
    return speaking_student().eval()


def test_labels_are_the_greedy_ones_of_the_weak_view(student):
    x = utterances()
    log_p, frames = student.hear(x).frame_log_probs()
    student.train()
    made = propose(student, x)
    assert made.labels == greedy(log_p, frames)
    assert student.training
    assert made.labels != [[]] * 3


def test_error_rate_by_hand():
    assert label_error_rate([[1, 2, 3], [4]], [[1, 3], [4, 4]]) == 2 / 4
    assert label_error_rate([[1]], [[]]) == 1
    assert label_error_rate([], []) == 0


def opinion(**w):
    """The record of hypotheses that are written as digits."""
    labels, lengths = pad([[int(token) for token in y[1:]] for y in w])
    return {"labels": labels, "lengths": lengths, "log_w": torch.tensor([*w.values()]).log()}


def test_several_opinions_are_averaged():
    views = [opinion(y12=0.75, y1=0.25), opinion(y12=0.5, y3=0.5)]
    found = mixed(views, [[3], [4, 4, 4]])
    rows = zip(found["labels"].tolist(), found["lengths"].tolist(), found["log_w"].exp().tolist())
    w = {tuple(y[:n]): w for y, n, w in rows}
    expected = {(1, 2): 1.25 / 4, (3,): 1.5 / 4, (1,): 0.25 / 4, (4, 4, 4): 1 / 4}
    assert w == pytest.approx(expected)
    assert [*found["log_w"]] == sorted(found["log_w"], reverse=True)


def test_who_has_no_opinion_does_not_count():
    one = opinion(y12=0.75, y1=0.25)
    for found in (mixed([one]), mixed([one, opinion()], [[]]), mixed([one, one])):
        torch.testing.assert_close(found["log_w"].exp(), torch.tensor([0.75, 0.25]))
        assert found["labels"].tolist() == [[1, 2], [1, -1]]
    nothing = mixed([opinion()], [[], []])
    assert nothing["labels"].shape == (0, 0) and not len(nothing["log_w"])


def test_least_risk_is_what_all_are_like():
    record = opinion(y12=0.3, y13=0.3, y14=0.4) | {"soft_log_p": torch.ones(3)}
    more = opinion(y123=0.3, y13=0.3, y1=0.4)  # the likeliest is not the one in the middle
    by_hand = torch.tensor([0.3 + 2 * 0.4, 0.3 + 0.4, 2 * 0.3 + 0.3])
    found = by_risk(more, 2.0)
    torch.testing.assert_close(found["log_w"], (-2.0 * by_hand).log_softmax(0))
    assert by_risk(more, 50.0)["log_w"].exp()[1] > 0.99
    alike = by_risk(record, 0.0)
    torch.testing.assert_close(alike["log_w"].exp(), torch.full((3,), 1 / 3))
    assert torch.equal(alike["soft_log_p"], record["soft_log_p"])
    assert torch.equal(alike["labels"], record["labels"])
    torch.testing.assert_close(by_risk(opinion(y1=1.0), 9.0)["log_w"], torch.zeros(1))
    assert len(by_risk(opinion(), 1.0)["log_w"]) == 0


def test_loops_are_what_is_said_again():
    assert loops([[1, 2, 3, 4], [], [7]]) == 0
    assert loops([[1, 2, 1]]) == 0  # to come back once is none
    assert loops([[1, 2, 1, 2, 1]]) == 2 / 5
    assert loops([[3, 3, 3, 3], [5, 5]]) == 2 / 6  # twice is a word that is said twice


def test_a_student_is_described_in_the_view_it_learns_in(student):
    x = utterances()
    heard = student.hear(x)
    said = greedy(*heard.frame_log_probs())
    values = student_statistics(heard, 0, 100, 0.0)
    assert "student_length_ratio" not in values
    told = propose(student, x).statistics
    for name, value in told._asdict().items():
        assert values[f"student_{name}"] == pytest.approx(value.item())
    ratio = student_statistics(heard, 0, 100, 0.03)["student_length_ratio"]
    assert ratio == pytest.approx(sum(map(len, said)) / 100 / 0.03)


def test_statistics_compare_with_the_past_and_with_the_truth(student):
    x = utterances()
    made = propose(student, x)
    cache = PseudoLabelCache()
    values = label_statistics(x, made, cache, {})
    assert "label_churn" not in values and "label_error_rate" not in values
    cache.put(x.utt_id[0], [*made.labels[0], 1, 1], 0)
    truth = {x.utt_id[1]: made.labels[1], "another": [1]}
    values = label_statistics(x, made, cache, truth)
    assert values["label_churn"] == 2 / (len(made.labels[0]) + 2)
    assert values["label_error_rate"] == 0
    assert {"blank_share", "frame_entropy", "token_entropy"} <= values.keys()
