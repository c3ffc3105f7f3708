"""methods/bljust_pl: momentum pseudo-labelling as a condition, its penalty and its schedule."""

import copy

import pytest
import torch

from espnet_pl.methods.base import ConfigError
from espnet_pl.methods.bljust_pl import Method
from espnet_pl.methods.registry import build, config_of
from espnet_pl.parts.pseudo_labels import propose
from test.toys import batch, speaking_student, utterances


def pair(name="bljust_pl", **conf):
    student = speaking_student(seed=1).eval()
    return student, build(name, conf, student)


def gradient(student, method, b):
    of = [*student.parameters()]
    terms = method(student, b)
    loss = sum(t.weight * t.value for t in terms.values())
    found = torch.autograd.grad(loss, of, allow_unused=True)
    return terms, [torch.zeros_like(p) if g is None else g for p, g in zip(of, found)]


@pytest.mark.parametrize("gamma, upper, lower", [(0.0, 1, 1), (0.3, 1, 1), (0.7, 2, 3), (4, 2, 3)])
def test_the_joint_gradient_is_the_sum_of_supervised_training_and_momentum_pseudo_labelling(
    gamma, upper, lower
):
    student, method = pair(
        gamma=float(gamma), gamma_max=4.0, growth=0.0,
        upper_weight=float(upper), lower_weight=float(lower), weight=0.5,
    )  # fmt: skip
    _, of_words = gradient(*pair("supervised"), batch(unlabelled=False))
    _, of_labels = gradient(*pair("mpl", weight=0.5), batch(labelled=False))
    _, joint = gradient(student, method, batch())
    assert any(g.abs().max() > 0 for g in of_labels)
    for g, a, b in zip(joint, of_words, of_labels):
        torch.testing.assert_close(g, (upper * a + gamma * lower * b) / max(1.0, gamma))

    explored, found = gradient(student, method, batch(labelled=False))
    assert "gamma" not in explored and "supervised" not in explored
    for g, b in zip(found, of_labels):
        torch.testing.assert_close(g, lower * b)


def test_a_penalty_of_0_is_supervised_training():
    terms, found = gradient(*pair(gamma=0.0, growth=0.0), batch())
    _, supervised = gradient(*pair("supervised"), batch(unlabelled=False))
    assert all(torch.equal(g, a) for g, a in zip(found, supervised))
    assert terms["gamma"].value == 0 and terms["gamma"].weight == 0


def test_gamma_grows_in_joint_updates_and_goes_on_after_a_restart():
    how = {"gamma": 0.1, "growth": 0.2, "gamma_max": 0.4}
    student, method = pair(**how)

    def seen(method, student, turns):
        found = []
        for joint in turns:
            terms, _ = gradient(student, method, batch(labelled=joint))
            found.append(terms["gamma"].value.item() if joint else None)
            method.after_step(student)
        return found

    assert seen(method, student, [False, True, False, True]) == [
        None, pytest.approx(0.1), None, pytest.approx(0.3),
    ]  # fmt: skip
    again, restored = pair(**how)
    again.load_state_dict(copy.deepcopy(student.state_dict()))
    restored.load_state_dict(copy.deepcopy(method.state_dict()))
    rest = [seen(m, s, [True, True]) for m, s in ((method, student), (restored, again))]
    assert rest[0] == rest[1] == [pytest.approx(0.4)] * 2
    assert restored.joint == 4


def test_the_moving_average_labels_and_follows_in_both_kinds_of_updates():
    student, method = pair(decay=0.5)
    x = utterances(text=False, prefix="u", seed=100)
    said = propose(student, x).labels
    assert said != [[], [], []]
    start = student.out.bias[0].item()
    method(student, batch(labelled=False))  # the teacher is taken now
    method.after_step(student)
    with torch.no_grad():
        student.out.bias[0] += 100  # of the blank
    for b, labels, moved in ((batch(), said, 50), (batch(labelled=False), [[], [], []], 75)):
        method(student, b)
        assert [method.cache.get(i) for i in x.utt_id] == labels
        method.after_step(student)
        assert method.teacher.network.out.bias[0].item() == pytest.approx(start + moved)


def test_labelled_speech_comes_in_joint_updates_only():
    pairing = Method.pairing(config_of("bljust_pl", {"explore": 3, "joint": 2}))
    assert [pairing.explores(turn) for turn in range(6)] == [True] * 3 + [False] * 2 + [True]
    assert pairing.together and (pairing.labelled, pairing.unlabelled) == (1, 1)


@pytest.mark.parametrize(
    "bad",
    [
        {"gamma": -0.1},
        {"gamma": 2.0},
        {"lower_weight": 0.0},
        {"decay": 1.5},
        {"decay_warmup": -1.0},
        {"explore": -1},
        {"unlabelled": 2},
        {"max_labels": 0},
    ],
)
def test_impossible_settings_are_refused_by_name(bad):
    with pytest.raises(
        ConfigError, match="negative count" if "explore" in bad else next(iter(bad))
    ):
        config_of("bljust_pl", bad)
