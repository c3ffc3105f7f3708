"""parts/pseudo_labels: what is trained on, what is dropped, and how it is counted."""

import pytest
import torch

from espnet_pl.losses.ctc import ctc
from espnet_pl.parts.cache import PseudoLabelCache
from espnet_pl.parts.decoding import greedy, pad
from espnet_pl.parts.pseudo_labels import label_error_rate, label_statistics, propose, pseudo_loss
from test.toys import speaking_student, utterances


@pytest.fixture
def student():
    return speaking_student().eval()


def test_labels_are_the_greedy_ones_of_the_weak_view(student):
    x = utterances()
    log_p, frames = student.frame_log_probs(x)
    student.train()
    made = propose(student, x)
    assert made.labels == greedy(log_p, frames)
    assert student.training
    assert made.labels != [[]] * 3


def test_the_loss_is_the_mean_over_kept_utterances(student):
    x = utterances(n=4)
    labels = [[1, 2], [], [3], [1] * 9]
    loss = pseudo_loss(student, x, labels, max_labels=8)
    log_p, frames = student.frame_log_probs(x)
    text, lengths = pad([labels[0], labels[2]])
    expected = ctc(log_p[[0, 2]], frames[[0, 2]], text, lengths).mean()
    torch.testing.assert_close(loss.loss, expected)
    assert loss.kept == 2
    assert loss.dropped == {
        "labels_empty": 0.25,
        "labels_too_long": 0.25,
        "labels_infeasible": 0.0,
    }


def test_more_labels_than_frames_are_dropped_and_counted(student):
    x = utterances()
    loss = pseudo_loss(student, x, [[1, 2] * 20, [1], [1] * 12], max_labels=100)
    assert loss.kept == 1 and loss.dropped["labels_infeasible"] == pytest.approx(2 / 3)
    loss.loss.backward()
    assert all(p.grad.isfinite().all() for p in student.parameters())


def test_nothing_kept_costs_nothing_and_stays_on_the_graph(student):
    loss = pseudo_loss(student, utterances(), [[], [], []], max_labels=5)
    loss.loss.backward()
    assert loss.loss == 0 and loss.kept == 0
    assert all((p.grad == 0).all() for p in student.parameters())


def test_a_dropped_utterance_has_no_say(student):
    x = utterances()
    grads = []
    for other in ([], [2] * 50):
        student.zero_grad()
        pseudo_loss(student, x, [[1, 2], other, [3]], max_labels=40).loss.backward()
        grads.append(student.out.weight.grad.clone())
    assert torch.equal(*grads) and grads[0].abs().sum() > 0


def test_a_student_gone_nan_is_not_hidden(student):
    with torch.no_grad():
        student.out.weight.fill_(torch.nan)
    assert pseudo_loss(student, utterances(), [[1], [2], [3]], 5).loss.isnan()


def test_as_many_labels_as_utterances(student):
    with pytest.raises(ValueError, match="2 labels for 3 utterances"):
        pseudo_loss(student, utterances(), [[1], [2]], 5)


def test_error_rate_by_hand():
    assert label_error_rate([[1, 2, 3], [4]], [[1, 3], [4, 4]]) == 2 / 4
    assert label_error_rate([[1]], [[]]) == 1
    assert label_error_rate([], []) == 0


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
