"""methods/transducer_kd: whom it asks, what it keeps of the answer, what each distance learns."""

import dataclasses

import pytest
import torch

from espnet_pl.losses.distillation import posterior
from espnet_pl.losses.lattice_distillation import (
    best_alignment,
    classes,
    collapsed,
    full_lattice,
    one_best,
    path_targets,
)
from espnet_pl.methods.base import ConfigError
from espnet_pl.methods.registry import build, config_of
from espnet_pl.methods.transducer_kd import DROPPED, Method
from espnet_pl.parts.decoding import pad
from test.toys import ToyStudent, ToyTransducer, batch, speaking_student, utterances

NODES = {"teacher_answers": ToyTransducer.answers}


def pair(student=ToyTransducer, teacher=ToyTransducer, resources=(), **conf):
    """A student, its method, and the teacher."""
    knows = speaking_student(seed=5, kind=teacher).eval()
    learns = speaking_student(seed=1, kind=student).eval()
    given = {"teacher": knows, "teacher_answers": teacher.answers, **dict(resources)}
    return learns, build("transducer_kd", {"full_sum": 0.0, **conf}, learns, given), knows


def value(method, student, name, x=None):
    x = batch(labelled=False).unlabelled if x is None else x
    return method.unlabelled(student, x)[name].value


def opinions(teacher, beam=8):
    """Hypotheses that say something, of each utterance."""
    with torch.no_grad():
        found = teacher.hear(batch().unlabelled).propose(beam)
    return [[p for p in own if p.labels] for own in found]


def test_hard_labels_are_the_teacher_s_likeliest_hypotheses():
    student, method, teacher = pair(hard=1.0)
    best = [own[0].labels for own in opinions(teacher)]
    expected = -student.hear(batch().unlabelled).score(best).mean()
    torch.testing.assert_close(value(method, student, "pseudo"), expected)


@pytest.mark.parametrize("student", [ToyTransducer, ToyStudent])
@pytest.mark.parametrize("teacher", [ToyTransducer, ToyStudent])
def test_full_sums_are_compared_whoever_made_them(student, teacher):
    learns, method, knows = pair(student, teacher, full_sum=1.0)
    best = [own[0] for own in opinions(knows)]
    mine = learns.hear(batch().unlabelled).score([p.labels for p in best])
    theirs = torch.tensor([p.log_p for p in best])
    terms = method.unlabelled(learns, batch().unlabelled)
    torch.testing.assert_close(terms["pseudo_full_sum"].value, (mine - theirs).abs().mean())
    surer = float((mine > theirs).float().mean())
    assert terms["student_surer"].value == pytest.approx(surer)


def test_distances_of_full_sums():
    student, _, teacher = pair(hard=1.0)
    best = [own[0] for own in opinions(teacher)]
    mine = student.hear(batch().unlabelled).score([p.labels for p in best])
    gap = mine - torch.tensor([p.log_p for p in best])
    lengths = torch.tensor([len(p.labels) for p in best])
    huber = torch.nn.functional.huber_loss(gap, torch.zeros(3), delta=0.5)
    for conf, expected in (
        ({"distance": "squared"}, gap.square().mean()),
        ({"distance": "huber", "delta": 0.5}, huber),
        ({"by_length": True}, (gap / lengths).abs().mean()),
    ):
        method = build("transducer_kd", conf, student, {"teacher": teacher})
        torch.testing.assert_close(value(method, student, "pseudo_full_sum"), expected)


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_hypotheses_are_compared_with_each_other(scale):
    student, method, teacher = pair(discriminative=1.0, ranking=1.0, beam=4, scale=scale)
    of_l1, of_kl = [], []
    for i, own in enumerate(opinions(teacher, beam=4)):
        mine = student.hear(batch().unlabelled).score([p.labels for p in own], [i] * len(own))
        zeros = torch.zeros(len(own), dtype=torch.long)
        log_w = posterior(torch.tensor([p.log_p for p in own]), zeros, 1, scale)
        log_v = posterior(mine, zeros, 1, scale)
        of_l1.append((log_w - log_v).abs().sum())
        of_kl.append((log_w.exp() * (log_w - log_v)).sum())
    terms = method.unlabelled(student, batch().unlabelled)
    for name, of in (("discriminative", of_l1), ("ranking", of_kl)):
        found = terms[f"pseudo_{name}"].value
        torch.testing.assert_close(found, torch.stack(of).mean(), rtol=1e-4, atol=1e-5)


def test_nodes_are_compared():
    student, method, teacher = pair(collapsed=1.0, one_best=2.0, full_lattice=3.0, shift=1, keep=99)
    best = [own[0].labels for own in opinions(teacher)]
    with torch.no_grad():
        theirs = teacher.hear(batch().unlabelled).lattices(best)
        planes = classes(theirs)
        t, u, arcs = best_alignment(planes, theirs.frames, theirs.hyps.lengths)
        target = path_targets(theirs, t, u, arcs, 5)
    mine = student.hear(batch().unlabelled).lattices(best)
    expected = {
        "collapsed": collapsed(classes(mine), planes, mine.frames, mine.hyps.lengths),
        "one_best": one_best(mine, t, u, target, 1),
        "full_lattice": full_lattice(mine, theirs),
    }
    terms = method.unlabelled(student, batch().unlabelled)
    for weight, (name, of) in enumerate(expected.items(), 1):
        term = terms[f"pseudo_{name}"]
        torch.testing.assert_close(
            term.value.double(),
            of.mean().double(),
            rtol=2e-3,
            atol=2e-3,  # kept in half precision
        )
        assert term.weight == weight and term.value.requires_grad


def test_a_student_like_its_teacher_has_nothing_to_learn_but_from_hard_labels():
    conf = dict.fromkeys(("hard", "full_sum", "discriminative", "collapsed", "full_lattice"), 1.0)
    _, method, teacher = pair(**conf)
    terms = method.unlabelled(teacher, batch().unlabelled)
    for name in conf:
        found = terms["pseudo" if name == "hard" else f"pseudo_{name}"].value
        assert (found.item() > 1e-3) == (name == "hard"), name


def test_what_is_stored_teaches_as_the_teacher_does():
    student, online, teacher = pair(full_sum=1.0, ranking=1.0, collapsed=1.0, one_best=1.0)
    x = batch().unlabelled

    class Records(dict):
        get = dict.__getitem__

    kept = Records(zip(x.utt_id, Method.ask(online.config, teacher, x)))
    stored = build(
        "transducer_kd", dataclasses.asdict(online.config), student, {"records": kept, **NODES}
    )
    first, second = (method.unlabelled(student, x) for method in (online, stored))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name].value, second[name].value)


def test_a_teacher_s_opinion_is_of_this_scale_whatever_was_stored():
    _, one, teacher = pair(ranking=1.0, scale=1.0)
    _, other, _ = pair(ranking=1.0, scale=0.25)
    assert Method.asked(one.config) == Method.asked(other.config)
    own = Method.ask(one.config, teacher, batch().unlabelled)[0]
    log_w = other._understood(own)["log_w"]
    torch.testing.assert_close(log_w, (0.25 * own["log_p"]).log_softmax(0))


def test_other_tokens_are_translated_and_what_becomes_the_same_is_one():
    # The teacher tells 3 from 4; the student has one token for both, and none for 2.
    def translate(y):
        return None if 2 in y else [min(c, 3) for c in y]

    _, method, _ = pair(ranking=1.0, full_sum=1.0, resources={"translate": translate})
    text, lengths = pad([[1, 4], [2], [1, 3], [1]])
    log_p = torch.tensor([-2.0, -0.1, -3.0, -4.0])
    dropped = torch.tensor([3, 2])  # when the teacher was asked
    own = method._understood(
        {"labels": text, "lengths": lengths, "log_p": log_p, "dropped": dropped}
    )
    assert own["labels"].tolist() == [[1, 3], [1, -1]] and own["lengths"].tolist() == [2, 1]
    expected = torch.tensor([torch.tensor([-2.0, -3.0]).logsumexp(0), -4.0])
    torch.testing.assert_close(own["log_p"], expected)
    torch.testing.assert_close(own["log_w"], expected.log_softmax(0))
    assert dict(zip(DROPPED, own["dropped"].tolist())) == {
        "empty": 4, "without_score": 2, "same": 1, "too_long": 0,
    }  # fmt: skip


def test_hypotheses_that_cannot_be_used_are_dropped_and_counted():
    student, method, teacher = pair(
        hard=1.0, full_sum=1.0, discriminative=1.0, collapsed=1.0, full_lattice=1.0, max_labels=2
    )
    x = batch().unlabelled
    silent = teacher.hear(x)
    records = Method.ask(method.config, teacher, x)
    # One utterance with nothing in it, one whose hypotheses are all too long, one as it is.
    text, lengths = pad([[1, 2, 1], [2, 1, 2]])
    with torch.no_grad():
        classes_of = classes(silent.lattices([[], [1, 2, 1], [1]]))
    for i, (u, labels) in enumerate([(0, pad([])), (3, (text, lengths))]):
        t = int(x.speech_lengths[i])
        records[i] |= {
            "labels": labels[0], "lengths": labels[1], "log_p": -torch.ones(len(labels[0])),
            "classes": classes_of[:, i, : u + 1, :t].half(),
            "predicted": torch.zeros(u + 1, 8),
        }  # fmt: skip
    method.ask = lambda *_: records
    terms = method.unlabelled(student, x)
    assert terms["labels_empty"].value == pytest.approx(1 / 3)
    assert terms["labels_too_long"].value == pytest.approx(1 / 3)
    too_long = sum(int((own["lengths"] > 2).sum()) for own in records)
    assert terms["hypotheses_too_long"].value == pytest.approx(too_long / 3) and too_long >= 2
    learnt = [name for name in terms if name.startswith("pseudo")]
    assert len(learnt) == 5
    sum(terms[name].value for name in learnt).backward()
    for name in learnt:
        assert terms[name].count == 1 and terms[name].value.isfinite(), name
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())


def test_nothing_to_learn_stays_on_the_graph():
    student, method, _ = pair(full_sum=1.0, discriminative=1.0, collapsed=1.0, max_labels=1)
    x = utterances(text=False, prefix="u")
    for own in (records := Method.ask(method.config, method.teacher, x)):
        own["lengths"] += 1  # a label longer than allowed
        own["labels"] = torch.nn.functional.pad(own["labels"], (0, 1), value=1)
        own["classes"] = torch.nn.functional.pad(own["classes"], (0, 0, 0, 1))
    method.ask = lambda *_: records
    terms = method.unlabelled(student, x)
    loss = sum(t.weight * t.value for t in terms.values() if t.weight)
    loss.backward()
    assert loss == 0 and student.output.weight.grad.abs().sum() == 0


def test_a_teacher_with_other_frames_is_refused_by_what_compares_frames():
    student, method, teacher = pair(collapsed=1.0)
    x = batch().unlabelled
    shorter = dataclasses.replace(x, speech_lengths=x.speech_lengths - 4)
    records = Method.ask(method.config, teacher, shorter)
    method.ask = lambda *_: records
    with pytest.raises(ValueError, match="hard, full_sum, discriminative"):
        method.unlabelled(student, x)


@pytest.mark.parametrize(
    "conf, resources, student, match",
    [
        ({"collapsed": 1.0}, {}, ToyStudent, "takes a transducer as student"),
        ({"one_best": 1.0}, {"teacher_answers": ToyStudent.answers}, ToyTransducer, "as teacher"),
        ({"collapsed": 1.0}, {"same_tokens": False}, ToyTransducer, "same tokens"),
        ({"full_lattice": 1.0}, {"same_frames": False}, ToyTransducer, "as many frames"),
        ({"full_lattice": 1.0}, {"teacher": None}, ToyTransducer, "teacher_mode: online"),
    ],
)
def test_what_cannot_be_compared_is_refused_at_start(conf, resources, student, match):
    with pytest.raises(ConfigError, match=match):
        pair(student, resources=resources, **conf)


@pytest.mark.parametrize(
    "conf, match",
    [
        ({"soft": 1.0}, "slimipl"),
        ({"weak_speeds": [0.9]}, "weak_speeds"),
        ({"full_sum": 0.0}, "nothing is learnt"),
        ({"shift": -1}, "shift is -1"),
        ({"label": "greedy"}, "label"),
        ({"distance": "l3"}, "distance"),
        ({"discriminative": 1.0, "beam": 1}, "beam is 1"),
    ],
)
def test_impossible_settings_are_refused(conf, match):
    with pytest.raises(ConfigError, match=match):
        config_of("transducer_kd", conf)


def test_what_is_asked_depends_on_what_is_learnt():
    asked = [
        Method.asked(config_of("transducer_kd", conf))
        for conf in ({}, {"hard": 1.0}, {"collapsed": 1.0}, {"one_best": 1.0}, {"beam": 4})
    ]
    assert asked[0] == asked[1]
    assert len({str(own) for own in asked}) == 4
