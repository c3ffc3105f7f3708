"""parts/objectives: what is learnt from a teacher, what is dropped, what each setting changes."""

import dataclasses
import math

import pytest
import torch

from espnet_pl.losses.ctc import ctc, feasible, log_probability, occupancies
from espnet_pl.losses.entropy import frame_entropy, token_entropy
from espnet_pl.losses.soft_labels import kl, soft_labels
from espnet_pl.parts.decoding import greedy, pad
from espnet_pl.parts.hypotheses import possible
from espnet_pl.parts.objectives import Objectives, label, objective, record
from espnet_pl.parts.search import Proposal
from test.toys import VOCABULARY, ToyHeard, speaking_student, utterances

HARD = Objectives()
NOTHING = [{}, {}, {}]


@pytest.fixture
def student():
    return speaking_student().eval()


def hard(student, x, labels, max_labels, how=HARD, records=None):
    records = [{}] * len(labels) if records is None else records
    summands, dropped = objective(how, student.hear(x), labels, records, max_labels)
    return summands["pseudo"], dropped


# --- hard labels ---------------------------------------------------------------------------------


def test_the_loss_is_the_mean_over_kept_utterances(student):
    x = utterances(n=4)
    labels = [[1, 2], [], [3], [1] * 9]
    loss, dropped = hard(student, x, labels, max_labels=8)
    log_p, frames = student.hear(x).frame_log_probs()
    text, lengths = pad([labels[0], labels[2]])
    expected = ctc(log_p[[0, 2]], frames[[0, 2]], text, lengths).mean()
    torch.testing.assert_close(loss.value, expected)
    assert loss.count == 2 and loss.weight == 1
    assert dropped == {
        "labels_empty": 0.25,
        "labels_too_long": 0.25,
        "labels_infeasible": 0.0,
    }


def test_more_labels_than_frames_are_dropped_and_counted(student):
    loss, dropped = hard(student, utterances(), [[1, 2] * 20, [1], [1] * 12], max_labels=100)
    assert loss.count == 1 and dropped["labels_infeasible"] == pytest.approx(2 / 3)
    loss.value.backward()
    assert all(p.grad.isfinite().all() for p in student.parameters())


def test_nothing_kept_costs_nothing_and_stays_on_the_graph(student):
    loss, _ = hard(student, utterances(), [[], [], []], max_labels=5)
    loss.value.backward()
    assert loss.value == 0 and loss.count == 0
    assert all((p.grad == 0).all() for p in student.parameters())


def test_a_dropped_utterance_has_no_say(student):
    x = utterances()
    grads = []
    for other in ([], [2] * 50):
        student.zero_grad()
        hard(student, x, [[1, 2], other, [3]], max_labels=40)[0].value.backward()
        grads.append(student.out.weight.grad.clone())
    assert torch.equal(*grads) and grads[0].abs().sum() > 0


def test_a_student_gone_nan_is_not_hidden(student):
    with torch.no_grad():
        student.out.weight.fill_(torch.nan)
    assert hard(student, utterances(), [[1], [2], [3]], 5)[0].value.isnan()


def test_as_many_labels_as_utterances(student):
    with pytest.raises(ValueError, match="2 labels and 2 records for 3 utterances"):
        hard(student, utterances(), [[1], [2]], 5)


# --- a teacher and a student who differ ----------------------------------------------------------


def frames_of(seed, n=3, t=9):
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, t, VOCABULARY, generator=g)
    logits[..., 0] += 1.5  # blanks between labels
    return logits.log_softmax(2)


FRAMES = torch.tensor([9, 6, 8])
TEACHER, STUDENT = frames_of(1), frames_of(2)


def learnt(log_p=STUDENT, teacher=TEACHER, frames=FRAMES, **how):
    """The summands of a student with these frames, and the records of a teacher."""
    how = Objectives(**{"hard": 0.0, **how})
    records = record(how, ToyHeard(teacher, frames), 0)
    labels = label(how, teacher, frames, 0)
    return objective(how, ToyHeard(log_p, frames), labels, records, 99)[0], records


def proposals(beam, scale=1.0):
    """The hypotheses that are not empty, whose, and their weights; by hand."""
    labels, of, log_w = [], [], []
    for i, own in enumerate(ToyHeard(TEACHER, FRAMES).propose(beam)):
        own = [p for p in own if p.labels]
        labels += [p.labels for p in own]
        of += [i] * len(own)
        log_w.append((scale * torch.tensor([p.log_p for p in own])).log_softmax(0))
    return labels, torch.tensor(of), torch.cat(log_w)


@pytest.mark.parametrize("keep", [2, 5, 50])
def test_soft_labels_are_the_divergence_of_frames(keep):
    target = soft_labels(TEACHER, FRAMES, min(keep, VOCABULARY))
    summands, _ = learnt(soft=0.7, keep=keep)
    assert summands.keys() == {"pseudo_soft"}
    value, weight, count = summands["pseudo_soft"]
    assert weight == 0.7 and count == 3
    torch.testing.assert_close(value, kl(STUDENT, FRAMES, target).mean())


def test_sharpened_labels_and_in_the_limit_the_likeliest_token():
    target = soft_labels(TEACHER, FRAMES, VOCABULARY, 0.5)
    value = learnt(soft=1.0, temperature=0.5)[0]["pseudo_soft"].value
    torch.testing.assert_close(value, kl(STUDENT, FRAMES, target).mean())
    best = TEACHER.argmax(2)
    picked = -STUDENT.gather(2, best[:, :, None])[..., 0]
    expected = sum(row[:t].sum() for row, t in zip(picked, FRAMES.tolist())) / 3
    value = learnt(soft=1.0, temperature=0.0)[0]["pseudo_soft"].value
    torch.testing.assert_close(value, expected)
    assert value > learnt(soft=1.0)[0]["pseudo_soft"].value


def test_blanks_may_count_for_less():
    target = soft_labels(TEACHER, FRAMES, VOCABULARY)
    said = TEACHER.argmax(2) != 0
    for blank_weight in (0.0, 0.25):
        weights = torch.where(said, 1.0, blank_weight)
        value = learnt(soft=1.0, blank_weight=blank_weight)[0]["pseudo_soft"].value
        torch.testing.assert_close(value, kl(STUDENT, FRAMES, target, weights=weights).mean())
    other = STUDENT.clone()
    other[:, :, 3] -= 3.0 * ~said
    assert learnt(other.log_softmax(2), soft=1.0, blank_weight=0.0)[0]["pseudo_soft"].value == (
        learnt(soft=1.0, blank_weight=0.0)[0]["pseudo_soft"].value
    )


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_sequences_are_weighted_by_the_teacher(scale):
    labels, of, log_w = proposals(4, scale)
    text, lengths = pad(labels)
    score = log_probability(STUDENT, FRAMES, text, lengths, of).float()
    expected = -(log_w.exp() * score).sum() / 3
    summands, _ = learnt(sequences=1.0, ranking=2.0, beam=4, scale=scale)
    torch.testing.assert_close(summands["pseudo_sequences"].value, expected)
    v = torch.cat([(scale * score[of == i]).log_softmax(0) for i in range(3)])
    expected = (log_w.exp() * (log_w - v)).sum() / 3
    torch.testing.assert_close(summands["pseudo_ranking"].value, expected, rtol=1e-4, atol=1e-5)
    assert summands["pseudo_ranking"].weight == 2.0


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_sequences_the_other_way_round_avoid_what_the_teacher_does(scale):
    labels, of, log_w = proposals(4, scale)
    score = log_probability(STUDENT, FRAMES, *pad(labels), of).float()
    v = torch.cat([(scale * score[of == i]).log_softmax(0) for i in range(3)])
    expected = (v.exp() * (v - log_w)).sum() / 3
    how = dict(sequences=2.0, beam=4, scale=scale, direction="reversed")
    value, weight, count = learnt(**how)[0]["pseudo_sequences"]
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    assert (weight, count) == (2.0, 3)


def test_one_hypothesis_is_a_hard_label():
    summands, records = learnt(sequences=1.0, beam=1)
    labels = [own["labels"][0, : own["lengths"][0]].tolist() for own in records]
    assert all(labels)
    hard_one = objective(HARD, ToyHeard(STUDENT, FRAMES), labels, records, 99)[0]["pseudo"]
    torch.testing.assert_close(summands["pseudo_sequences"].value, hard_one.value)


def test_the_lattice_is_soft_in_time_and_consistent_as_a_sequence():
    labels, of, log_w = proposals(4)
    text, lengths = pad(labels)
    gamma = occupancies(TEACHER, FRAMES, text, lengths, of, log_w.exp())
    inside = torch.arange(9) < FRAMES[:, None]
    entropy = torch.special.entr(gamma).sum(2)
    cross = -(gamma * STUDENT).sum(2)
    expected = ((cross - entropy) * inside).sum() / 3
    summands, records = learnt(lattice=1.0, beam=4)
    torch.testing.assert_close(summands["pseudo_lattice"].value, expected, rtol=1e-4, atol=1e-4)
    # Every label of the only hypothesis is said somewhere, also where frames prefer the blank.
    for own in learnt(lattice=1.0, beam=1)[1]:
        p = torch.zeros(len(own["lattice_log_rest"]), VOCABULARY)
        p.scatter_(1, own["lattice_tokens"].long(), own["lattice_log_p"].exp())
        for token in own["labels"][0].tolist():
            assert p[:, token].sum() > 0.99


def test_sampled_labels_are_drawn_from_the_frames():
    torch.manual_seed(0)
    how = Objectives(label="sampled")
    drawn = [label(how, TEACHER, FRAMES, 0) for _ in range(300)]
    assert len({str(y) for y in drawn}) > 50
    cold = Objectives(label="sampled", sampling=1e-3)
    assert (
        label(cold, TEACHER, FRAMES, 0)
        == greedy(TEACHER, FRAMES)
        == label(HARD, TEACHER, FRAMES, 0)
    )
    # How often a sequence is drawn is its probability.
    text, lengths = pad([drawn[0][0]])
    share = sum(y[0] == text[0].tolist() for y in drawn) / 300
    p = log_probability(TEACHER, FRAMES, text, lengths, torch.tensor([0])).exp().item()
    assert share == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 300) + 1e-3)


def test_sampled_hypotheses_weigh_as_often_as_they_are_drawn():
    torch.manual_seed(0)
    _, records = learnt(sequences=1.0, hypotheses="sampled", beam=16)
    for own in records:
        shares = 16 * own["log_w"].exp()
        assert own["log_w"].exp().sum().item() == pytest.approx(1)
        assert (shares > 0.9).all() and len({str(y) for y in own["labels"].tolist()}) == len(shares)


def test_shuffled_opinions_are_the_same_numbers_of_other_hypotheses():
    torch.manual_seed(1)
    told, mixed = (
        learnt(sequences=1.0, opinion=opinion)[1] for opinion in ("posterior", "shuffled")
    )
    moved = 0
    for own, other in zip(told, mixed):
        assert own["labels"].tolist() == other["labels"].tolist()
        torch.testing.assert_close(own["log_w"].sort().values, other["log_w"].sort().values)
        moved += int(own["log_w"].tolist() != other["log_w"].tolist())
    assert moved


def test_entropies_are_in_the_objective_with_their_signs():
    summands, _ = learnt(soft=1.0, frame_entropy=0.3, token_entropy=0.2)
    value, weight, _ = summands["pseudo_frame_entropy"]
    torch.testing.assert_close(value, frame_entropy(STUDENT, FRAMES).mean())
    assert weight == 0.3
    value, weight, _ = summands["pseudo_token_entropy"]
    torch.testing.assert_close(value, FRAMES.float().mean() * token_entropy(STUDENT, FRAMES))
    assert weight == -0.2


def test_confidence_weighs_or_drops_utterances():
    sure = TEACHER.clone()
    sure[1] = (5 * sure[1]).log_softmax(1)
    target = soft_labels(sure, FRAMES, VOCABULARY)
    each = kl(STUDENT, FRAMES, target)
    c = torch.stack([p[:t].amax(1).mean().exp() for p, t in zip(sure, FRAMES.tolist())])
    value = learnt(teacher=sure, soft=1.0, confidence="weight")[0]["pseudo_soft"].value
    torch.testing.assert_close(value, (c * each).sum() / c.sum())
    least = float(c.sort().values[1:].mean())
    summands, _ = learnt(teacher=sure, soft=1.0, least_confidence=least)
    assert summands["pseudo_soft"].count == 1
    torch.testing.assert_close(summands["pseudo_soft"].value, each[1])
    torch.manual_seed(0)
    shuffled = {
        float(learnt(teacher=sure, soft=1.0, confidence="shuffled")[0]["pseudo_soft"].value)
        for _ in range(20)
    }
    assert len(shuffled) > 2


def test_a_sum_of_objectives_hears_the_speech_once(student):
    x = utterances()
    how = Objectives(hard=0.5, soft=0.5, lattice=0.1, sequences=0.1, ranking=0.1)
    student.eval()
    records = record(how, student.hear(x), 0)
    student.views.clear()
    summands, _ = objective(how, student.hear(x), [[1], [2], [3]], records, 99)
    assert len(student.views) == 1
    assert summands.keys() == {
        "pseudo", "pseudo_soft", "pseudo_lattice", "pseudo_sequences", "pseudo_ranking",
    }  # fmt: skip


def test_a_teacher_who_says_nothing_teaches_no_sequence():
    silent = TEACHER.clone()
    silent[1] = -torch.inf
    silent[1, :, 0] = 0.0
    log_p = STUDENT.clone().requires_grad_()
    how = dict(lattice=1.0, sequences=1.0, ranking=1.0, beam=2)
    summands, _ = learnt(log_p, teacher=silent, **how)
    speaking = [0, 2]
    expected, _ = learnt(STUDENT[speaking], TEACHER[speaking], FRAMES[speaking], **how)
    for name, (value, _, count) in summands.items():
        assert count == 2, name
        torch.testing.assert_close(value, expected[name].value)
    sum(s.value for s in summands.values()).backward()
    assert log_p.grad.isfinite().all() and not log_p.grad[1].any() and log_p.grad[0].any()


def test_hypotheses_that_cannot_be_learnt_give_their_weight_to_the_others():
    how = Objectives(hard=0.0, sequences=1.0, ranking=1.0)
    frames = torch.tensor([3, 6, 8])  # the student's: fewer than some hypotheses need
    records = record(how, ToyHeard(TEACHER, FRAMES), 0)
    summands, _ = objective(how, ToyHeard(STUDENT, frames), [[1]] * 3, records, 4)
    expected = []
    for i, own in enumerate(records):
        short = own["lengths"] <= 4
        text, lengths, log_w = own["labels"][short], own["lengths"][short], own["log_w"][short]
        of = torch.full_like(lengths, i)
        can = feasible(frames[of], text, lengths)
        if can.any():
            w = log_w[can].softmax(0)
            score = log_probability(STUDENT, frames, text[can], lengths[can], of[can])
            expected.append(-(w * score).sum())
    value, _, count = summands["pseudo_sequences"]
    assert count == len(expected)
    torch.testing.assert_close(value.double(), torch.stack(expected).mean())
    assert summands["pseudo_ranking"].value.isfinite()


@pytest.mark.parametrize(
    "bad, match",
    [
        (dict(soft=-1.0), "soft is -1"),
        (dict(hard=0.0), "nothing is learnt"),
        (dict(keep=0), "keep is 0"),
        (dict(ranking=1.0, beam=1), "beam is 1, it must be at least 2"),
        (dict(sequences=1.0, direction="reversed", beam=1), "beam is 1"),
        (dict(sampling=0.0), "sampling"),
        (dict(blank_weight=1.5), "blank_weight"),
        (dict(least_confidence=-0.1), "least_confidence"),
        (dict(temperature=math.nan), "temperature"),
    ],
)
def test_impossible_settings_are_refused(bad, match):
    with pytest.raises(ValueError, match=match):
        Objectives(**bad)


def test_a_hard_label_needs_no_record():
    assert record(HARD, ToyHeard(TEACHER, FRAMES), 0) == NOTHING
    assert [f.name for f in dataclasses.fields(Objectives)][:3] == ["hard", "soft", "lattice"]


def test_what_a_teacher_is_not_asked_to_teach_is_counted():
    found = [Proposal([1, 2], -1.0), Proposal([], -0.5), Proposal([3], -math.inf)]
    found += [Proposal([2], math.nan), Proposal([], -math.inf)]
    good, dropped = possible([found, found[:1], []])
    assert good == [found[:1], found[:1], []]
    assert dropped.tolist() == [[2, 2], [0, 0], [0, 0]]
