"""methods/ce_pl: cross-entropy of each labelled frame, by loops; hostile input."""

import math

import pytest
import torch

from espnet_pl.methods.base import ConfigError
from espnet_pl.methods.ce_pl import Method
from espnet_pl.methods.csl import Method as Contrastive
from espnet_pl.methods.registry import build, config_of
from test.toys import VOCABULARY, batch, speaking_student


def pair(**conf):
    student = speaking_student(seed=1).eval()
    given = {"teacher": speaking_student(seed=7), "teacher_tokens": VOCABULARY}
    return student, build("ce_pl", conf, student, given)


def example(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    features = torch.randn(3, 7, 16, generator=g).to(dtype).requires_grad_()
    return features, torch.randint(-1, VOCABULARY + 1, (3, 6), generator=g)


def test_equals_the_written_equation():
    _, method = pair(weight=2.0)
    features, labels = example()
    layer, losses, wrong = method.prediction, [], 0
    for own, said in zip(features.detach(), labels.tolist()):
        for f, y in zip(own, said):
            if y < 0:
                continue
            scores = [float(w @ f + b) for w, b in zip(layer.weight.data, layer.bias.data)]
            losses.append(math.log(sum(map(math.exp, scores))) - scores[y])
            wrong += max(range(len(scores)), key=scores.__getitem__) != y
    terms, numbers = method.learn(features, labels)
    term = terms["cross_entropy"]
    assert term.value.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert (term.weight, term.count) == (2.0, len(losses)) and 0 < len(losses) < 18
    assert numbers["frames_wrong"] == pytest.approx(wrong / len(losses))
    term.value.backward()
    assert not features.grad[:, 6:].any() and not features.grad[:, :6][labels < 0].any()


@pytest.mark.parametrize("order, units", [(1, VOCABULARY + 1), (2, (VOCABULARY + 1) ** 2)])
def test_there_is_a_score_for_each_unit(order, units):
    student, method = pair(order=order, blank="keep")
    assert method.prediction.out_features == units
    terms = method.unlabelled(student, batch(labelled=False, seed=1).unlabelled)
    assert terms["cross_entropy"].value > 0 and terms["frames_labelled"].value == 1


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (2, 4)])
def test_nothing_labelled_is_zero_and_on_the_graph(shape):
    _, method = pair()
    features = torch.randn(*shape, 16).requires_grad_()
    terms, numbers = method.learn(features, torch.full(shape, -1))
    term = terms["cross_entropy"]
    assert term.value == 0 and term.count == 0 and numbers["frames_wrong"] == 0
    term.value.backward()
    assert not features.grad.any() and not method.prediction.weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_single(dtype):
    _, method = pair()
    method.prediction.to(dtype)
    features, labels = example(dtype)
    value = method.learn(features, labels)[0]["cross_entropy"].value
    value.backward()
    assert value.dtype == torch.float32 and features.grad.isfinite().all()
    method.prediction.float()
    single = method.learn(features.float(), labels)[0]["cross_entropy"].value
    torch.testing.assert_close(value, single, rtol=0.02, atol=0.02)


def test_it_learns_what_the_teacher_says():
    student, method = pair()
    optimizer = torch.optim.Adam([*student.parameters(), *method.learns()], lr=0.02)
    wrong = []
    for step in range(40):
        optimizer.zero_grad()
        terms = method.unlabelled(student, batch(seed=step % 4).unlabelled)
        terms["cross_entropy"].value.backward()
        optimizer.step()
        wrong.append(float(terms["frames_wrong"].value))
    assert sum(wrong[-4:]) < 0.5 * sum(wrong[:4])


def test_what_was_said_for_one_of_the_methods_is_for_the_other_too():
    assert Method.records == Contrastive.records
    for conf in ({}, {"units": "argmax"}, {"beam": 3}):
        mine, theirs = config_of("ce_pl", conf), config_of("csl", conf)
        assert Method.asked(mine) == Contrastive.asked(theirs)


def test_contrastive_settings_are_none_of_it():
    with pytest.raises(ConfigError, match="unknown 'temperature'"):
        config_of("ce_pl", {"temperature": 0.1})
