"""methods/slimipl: which labels, made by whom and when."""

import dataclasses

import pytest
import torch

from espnet_pl.methods.base import ConfigError
from espnet_pl.methods.registry import build, config_of
from espnet_pl.parts.pseudo_labels import propose
from test.toys import batch, speaking_student, utterances


def ready(**conf):
    student = speaking_student()
    return student, build("slimipl", {"unlabelled": 1, **conf}, student)


def test_the_cache_answers_with_the_label_made_at_that_time():
    student, method = ready(capacity=3)
    seen = batch(unlabelled=False, fresh=True)
    before = propose(student, seen.fresh).labels
    method(student, seen)
    with torch.no_grad():
        student.out.bias[0] += 100  # the student says nothing any more
    method.step += 5
    terms = method(student, batch(labelled=False))
    assert [method.cache.get(i) for i in seen.fresh.utt_id] == before
    assert terms["label_age"].value == 5 and terms["labels_empty"].value == 0
    assert propose(student, seen.fresh).labels == [[], [], []]


def test_a_refreshed_label_is_the_present_one_and_its_churn_is_measured():
    student, method = ready(capacity=3)
    method(student, batch(unlabelled=False, fresh=True))
    with torch.no_grad():
        student.out.bias[0] += 100
    terms = method(student, batch(labelled=False, unlabelled=False, fresh=True))
    assert all(method.cache.get(f"u{i}") == [] for i in range(3))
    assert terms["label_churn"].value == 1 and terms["blank_share"].value == 1


def test_speech_that_enters_and_is_used_in_the_same_update_is_labelled_first():
    student, method = ready(capacity=3)
    terms = method(student, batch(labelled=False, fresh=True))
    assert terms["label_age"].value == 0 and terms["pseudo"].value > 0


def soft(**conf):
    return ready(soft=1.0, hard=0.0, **conf)


def test_what_is_known_of_speech_that_leaves_the_cache_is_forgotten_after_its_update():
    student, method = soft(capacity=3)
    method(student, batch(unlabelled=False, fresh=True))
    assert len(method.cache.record("u1")) == 3
    terms = method(student, dataclasses.replace(batch(labelled=False), gone=["u1", "u2"]))
    assert terms["pseudo_soft"].value.isfinite()
    assert not method.cache.record("u1") and not method.cache.record("u2")
    assert len(method.cache.record("u0")) == 3 and len(method.cache) == 3


def test_without_a_cache_nothing_is_known_of_speech_after_its_update():
    student, method = soft(capacity=0)
    terms = method(student, batch(labelled=False))
    assert terms["pseudo_soft"].value.isfinite()
    assert len(method.cache) == 3 and not any(method.cache.record(f"u{i}") for i in range(3))


@pytest.mark.parametrize("when", ["changed", "settled"])
def test_labels_leave_by_how_much_they_have_changed(when):
    student, method = ready(capacity=3, replace=0.5, replace_when=when)
    method(student, batch(unlabelled=False, fresh=True))
    seen = batch(labelled=False)
    assert method(student, seen)["label_change"].value == 0.0
    with torch.no_grad():
        student.out.bias[0] += 100  # the student says nothing any more
    assert method(student, seen)["label_change"].value == 1.0
    assert [method.chance(turn) for turn in (0, 1)] == ([0, 0.5] if when == "changed" else [0.5, 0])
    assert all(method.cache.get(i) for i in seen.unlabelled.utt_id)  # the labels that stay are old
    again = ready(capacity=3, replace=0.5, replace_when=when)[1]
    again.load_state_dict(method.state_dict())
    assert again.chance(1) == method.chance(1)


def test_whether_labels_change_is_not_asked_where_they_leave_at_random():
    student, method = ready(capacity=3)
    method(student, batch(unlabelled=False, fresh=True))
    student.views.clear()
    assert "label_change" not in method(student, batch(labelled=False))
    assert student.views == [True]  # the training pass alone


def test_without_a_cache_labels_are_made_on_the_spot():
    student, method = ready(capacity=0)
    terms = method(student, batch(labelled=False))
    assert terms["label_age"].value == 0 and terms["pseudo"].value > 0


@pytest.mark.parametrize("kind, follows", [("live", True), ("ema", True), ("frozen", False)])
def test_who_labels(kind, follows):
    student, method = ready(capacity=0, teacher=kind, decay=0.0)
    x = utterances(text=False, prefix="u", seed=100)
    method(student, batch(labelled=False))
    first = [method.cache.get(i) for i in x.utt_id]
    with torch.no_grad():
        student.out.bias[0] += 100
    method.after_step(student)
    method(student, batch(labelled=False))
    now = [method.cache.get(i) for i in x.utt_id]
    assert (now == [[], [], []]) == follows
    assert follows or now == first


def test_the_weight_scales_the_unlabelled_gradient_only():
    grads = []
    for weight in (1.0, 0.25):
        student, method = ready(capacity=0, weight=weight)
        student.eval()
        terms = method(student, batch())
        assert terms["supervised"].weight == 1
        (terms["pseudo"].weight * terms["pseudo"].value).backward()
        grads.append(student.out.weight.grad)
    torch.testing.assert_close(grads[0] * 0.25, grads[1])


def test_dropout_changes_once_when_pseudo_labels_begin():
    student, method = ready(warmup=2, dropout=0.5, dropout_after=0.1, capacity=0)
    rates = []
    for _ in range(4):
        method(student, batch(unlabelled=False))
        rates.append(student.dropout.p)
        method.after_step(student)
    assert rates == [0.5, 0.5, 0.1, 0.1]


def test_truth_is_measured_and_not_trained_on():
    student = speaking_student()
    x = utterances(text=False, prefix="u", seed=100)
    said = propose(student, x).labels
    truth = {"u0": said[0], "u1": [*said[1], 1]}
    results = []
    for resources in ({}, {"truth": truth}):
        method = build("slimipl", {"capacity": 0}, student, resources)
        student.eval()
        results.append(method(student, batch(labelled=False)))
    expected = 1 / (len(said[0]) + len(said[1]) + 1)
    assert results[1]["label_error_rate"].value == pytest.approx(expected)
    assert "label_error_rate" not in results[0]
    assert torch.equal(results[0]["pseudo"].value, results[1]["pseudo"].value)


def test_the_plan_is_the_configured_one():
    config = config_of("slimipl", {"labelled": 2, "unlabelled": 3, "warmup": 7, "replace": 0.5})
    _, method = ready()
    pairing = method.pairing(config)
    assert (pairing.labelled, pairing.unlabelled, pairing.warmup) == (2, 3, 7)
    assert (pairing.capacity, pairing.replace, pairing.together) == (100, 0.5, False)


@pytest.mark.parametrize(
    "bad",
    [
        dict(replace_when="never"),
        dict(replace_when="changed", capacity=0),
        dict(teacher="self"),
        dict(replace=2.0),
        dict(dropout=1.0),
        dict(max_labels=0),
    ],
)
def test_impossible_settings_are_refused_by_name(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        config_of("slimipl", bad)
