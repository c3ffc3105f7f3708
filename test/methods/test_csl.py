"""methods/csl: the written equation by loops, what is drawn and skipped, hostile input."""

import math

import pytest
import torch

from espnet_pl.methods.base import ConfigError
from espnet_pl.methods.csl import Method
from espnet_pl.methods.registry import build, config_of
from test.toys import VOCABULARY, ToyTransducer, batch, speaking_student, utterances


def pair(**conf):
    student = speaking_student(seed=1).eval()
    given = {"teacher": speaking_student(seed=7), "teacher_tokens": VOCABULARY}
    return student, build("csl", {"hidden": 12, "out": 6, **conf}, student, given)


def example(n=3, t=9, d=16, seed=0, labels=3):
    """Features, and labels of which some are none."""
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(n, t, d, generator=g).requires_grad_()
    each = torch.randint(-1, labels, (n, t // 2 + 1), generator=g)
    return features, each.repeat_interleave(2, dim=1)[:, :t]


def drawn(features, labels):
    """What the method draws with the same seed: (z before the projection, label, utterance)."""
    from espnet_pl.parts.frame_labels import draw_of_segments

    torch.manual_seed(3)
    rows, places = draw_of_segments(labels)
    return features[rows, places], labels[rows, places].tolist(), rows.tolist()


def by_loops(z, y, utterance, tau, negatives, denominator):
    """The equation of the docstring."""
    z = [v / v.norm() for v in z.detach()]
    losses = []
    for i in range(len(z)):
        positives = [p for p in range(len(z)) if p != i and y[p] == y[i]]
        others = [n for n in range(len(z)) if y[n] != y[i]]
        if negatives == "utterance":
            others = [n for n in others if utterance[n] == utterance[i]]
        if not positives or not others:
            continue
        terms = []
        for p in positives:
            against = [*(positives if denominator == "all" else [p]), *others]
            mass = sum(math.exp(float(z[i] @ z[a]) / tau) for a in against)
            terms.append(float(z[i] @ z[p]) / tau - math.log(mass))
        losses.append(-sum(terms) / len(terms))
    return sum(losses) / len(losses), len(losses)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("negatives", ["utterance", "batch"])
@pytest.mark.parametrize("denominator", ["all", "one"])
def test_equals_the_written_equation(denominator, negatives, seed):
    how = {"denominator": denominator, "negatives": negatives, "temperature": 0.2}
    _, method = pair(**how, weight=0.5)
    features, labels = example(seed=seed)
    h, y, utterance = drawn(features, labels)
    expected, count = by_loops(method.projection(h), y, utterance, 0.2, negatives, denominator)
    torch.manual_seed(3)
    terms, numbers = method.learn(features, labels)
    term = terms["contrastive"]
    assert float(term.value.detach()) == pytest.approx(expected, rel=1e-5)
    assert (term.count, term.weight) == (count, 0.5)
    assert numbers["segments"] == pytest.approx(len(y) / 3)
    assert numbers["segments_skipped"] == pytest.approx(1 - count / len(y))


def test_the_labels_are_the_teacher_s():
    student, method = pair()
    x = batch(labelled=False, seed=1).unlabelled
    features, _ = student.hear(x).features()
    said = method.records_of(x)
    path = [own["labels"].repeat_interleave(own["lengths"].long()) for own in said]
    assert [len(own) for own in path] == x.speech_lengths.tolist()
    labels = torch.full(features.shape[:2], -1)
    for row, own in zip(labels, path):  # a blank is what was said before it
        last = -1
        for place, token in enumerate(own.tolist()):
            last = token + 1 if token >= 0 else last
            row[place] = last
    torch.manual_seed(3)
    expected = method.learn(features, labels)[0]["contrastive"].value
    torch.manual_seed(3)
    terms = method.unlabelled(student, x)
    assert terms["contrastive"].value == expected > 0
    share = float((labels >= 0).sum() / x.speech_lengths.sum())
    assert terms["frames_labelled"].value == pytest.approx(share)


def test_another_frame_is_drawn_in_each_update():
    student, method = pair()
    values = {float(method.learn(*example())[0]["contrastive"].value) for _ in range(5)}
    assert len(values) == 5
    features, labels = example()
    method.learn(features, labels)[0]["contrastive"].value.backward()
    heard = features.grad.abs().sum(2) > 0
    for row, own in zip(heard.tolist(), labels.tolist()):
        before, in_segment = None, 0
        for used, label in zip(row, own):
            in_segment = 0 if label != before else in_segment
            in_segment += used
            assert in_segment <= 1 and not (used and label < 0)
            before = label


SKIPPED = {
    "no utterance": torch.zeros(0, 4, dtype=torch.long),
    "no frame": torch.zeros(2, 0, dtype=torch.long),
    "no label": torch.full((2, 4), -1),
    "one segment": torch.tensor([[2, 2, 2, 2]]),
    "no positives": torch.tensor([[0, 1, 2, 3]]),
    "no negatives": torch.tensor([[1, 1, -1, 1], [1, 1, 1, 1]]),
    "no negatives in the utterance": torch.tensor([[1, 1, 1, 1], [1, -1, 1, 1], [2, 2, 2, 2]]),
}


@pytest.mark.parametrize("denominator", ["all", "one"])
@pytest.mark.parametrize("why", SKIPPED)
def test_nothing_to_compare_is_zero_and_on_the_graph(why, denominator):
    _, method = pair(denominator=denominator)
    labels = SKIPPED[why]
    features = torch.randn(*labels.shape, 16).requires_grad_()
    term = method.learn(features, labels)[0]["contrastive"]
    assert term.value == 0 and term.count == 0
    term.value.backward()
    assert not features.grad.any()
    assert all(p.grad is not None and not p.grad.any() for p in method.learns())


def test_anchors_without_positive_or_negative_are_left_out_of_the_mean():
    _, method = pair()
    # 1 is in both utterances; 2 and 3 have nobody.  In the third, 1 has no negative.
    labels = torch.tensor([[1, 1, 2, 2], [3, 3, 1, 1], [1, 1, 1, -1]])
    terms, numbers = method.learn(torch.randn(3, 4, 16), labels)
    assert terms["contrastive"].count == 2 and numbers["segments_skipped"] == pytest.approx(3 / 5)
    assert (numbers["positives"], numbers["negatives"]) == (2, 1)


def test_an_utterance_in_which_nothing_is_said():
    student, method = pair()
    silent = {"labels": torch.tensor([-1], dtype=torch.int32), "lengths": torch.tensor([7])}
    none = {"labels": torch.zeros(0), "lengths": torch.zeros(0)}
    method.records_of = lambda x: [silent, none, silent]
    terms = method.unlabelled(student, utterances(text=False))
    assert terms["contrastive"].value == 0 and terms["frames_labelled"].value == 0
    terms["contrastive"].value.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    _, method = pair(temperature=0.05)
    features, labels = example(n=4, t=20)
    method.projection.to(dtype)
    half = (100 * features.detach()).to(dtype).requires_grad_()
    torch.manual_seed(3)
    value = method.learn(half, labels)[0]["contrastive"].value
    value.backward()
    assert value.dtype == torch.float32 and half.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in method.learns())
    method.projection.float()
    torch.manual_seed(3)
    single = method.learn(half.detach().float(), labels)[0]["contrastive"].value
    torch.testing.assert_close(value, single, rtol=0.1, atol=0.05)


def test_it_brings_segments_of_one_label_together():
    _, method = pair(negatives="batch")
    features, labels = example(n=4, t=20)
    optimizer = torch.optim.Adam(method.learns(), lr=0.01)
    values = []
    for _ in range(60):
        optimizer.zero_grad()
        value = method.learn(features.detach(), labels)[0]["contrastive"].value
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert sum(values[-5:]) < 0.7 * sum(values[:5])


def test_cross_entropy_in_turn():
    student, method = pair(alternate=True)
    x = batch(labelled=False, seed=1).unlabelled
    names = [next(iter(method.unlabelled(student, x))) for _ in range(4)]
    assert names == ["contrastive", "cross_entropy"] * 2
    assert method.prediction.out_features == VOCABULARY + 1
    assert len(method.learns()) == 6
    assert "turn" in method.state_dict()  # goes on from there
    assert len(pair()[1].learns()) == 4


def test_labelled_speech_may_be_mixed_in():
    pairing = Method.pairing(config_of("csl", {}))
    assert (pairing.labelled, pairing.unlabelled, pairing.capacity) == (0, 1, 0)
    assert Method.pairing(config_of("csl", {"labelled": 1, "unlabelled": 3})).labelled == 1
    student, method = pair(labelled=1)
    terms = method(student, batch())
    assert terms["supervised"].weight == 1 and terms["contrastive"].weight == 1


def test_whom_it_can_be_taught_by():
    student = speaking_student(kind=ToyTransducer)
    given = {"teacher_answers": frozenset({"score"}), "teacher_tokens": 5}
    with pytest.raises(ConfigError, match="the teacher has no CTC layer"):
        build("csl", {}, student, given)
    with pytest.raises(ConfigError, match="the teacher has no CTC layer"):
        Method.ask(config_of("csl", {}), student, utterances())
    build("csl", {}, student, given | {"teacher_answers": frozenset({"frame_log_probs"})})


def test_clusters_of_the_teacher_s_features():
    teacher = speaking_student(kind=ToyTransducer).eval()  # any encoder has features
    config = config_of("csl", {"units": "clusters", "clusters": 3})
    speech = [utterances(n=4, seed=seed) for seed in range(3)]
    with torch.no_grad():
        known = Method.survey(config, teacher, iter(speech))
        vectors = [teacher.hear(x).features() for x in speech]
    assert known["centres"].shape == (3, teacher.feature_size)
    for x, (features, frames) in zip(speech, vectors):
        for own, row, t in zip(Method.ask(config, teacher, x, known), features, frames.tolist()):
            path = own["labels"].repeat_interleave(own["lengths"].long()).tolist()
            assert path == torch.cdist(row[:t], known["centres"]).argmin(1).tolist()
    given = {"teacher_answers": frozenset({"score"}), "teacher_tokens": 5}
    method = build("csl", {"units": "clusters", "clusters": 3}, speaking_student(), given)
    assert method.config.number_of_units(5) == 4
    assert Method.survey(config_of("csl", {}), teacher, iter(speech)) == {}
    with pytest.raises(ConfigError, match="clusters cannot be learnt from .* ask for fewer"):
        Method.survey(config_of("csl", {"units": "clusters"}), teacher, iter(speech[:1]))
    with pytest.raises(ConfigError, match="they need teacher_mode: stored"):
        build("csl", {"units": "clusters"}, speaking_student(), given | {"teacher": teacher})


def test_what_is_asked_is_what_the_path_depends_on():
    def asked(**conf):
        return Method.asked(config_of("csl", conf))

    assert asked() == asked(order=2, blank="keep", temperature=1.0, negatives="batch")
    assert len({str(asked(**c)) for c in ({}, {"units": "argmax"}, {"beam": 2})}) == 3
    clusters = {"units": "clusters"}
    assert asked(**clusters) == asked(**clusters, beam=2) != asked(**clusters, clusters=9)


@pytest.mark.parametrize(
    "conf, match",
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"hidden": 0}, "hidden is 0"),
        ({"out": 0}, "out is 0"),
        ({"weight": 0.0}, "weight is 0.0"),
        ({"unlabelled": 0}, "both 0"),
        ({"order": 3}, "order is 3, it must be one of 1, 2"),
        ({"units": "chenones"}, "one of alignment, argmax, clusters"),
        ({"clusters": 0}, "clusters is 0"),
        ({"negatives": "all"}, "one of utterance, batch"),
        ({"beam": 0}, "beam is 0"),
    ],
)
def test_impossible_settings_are_refused(conf, match):
    with pytest.raises(ConfigError, match=match):
        config_of("csl", conf)


def test_label_aware_batches_are_of_the_teacher_s_tokens():
    _, method = pair(units="argmax")
    teacher, x = method.resources["teacher"].eval(), batch().unlabelled
    records = Method.ask(method.config, teacher, x)
    with torch.no_grad():
        paths = teacher.hear(x).frame_log_probs()[0].argmax(2).tolist()
    for own, path, t in zip(records, paths, x.speech_lengths.tolist()):
        said = [y for y, before in zip(path[:t], [None, *path]) if y != before]
        assert Method.labels_of(method.config, own) == [y for y in said if y != teacher.blank]
