"""methods/base.PseudoLabelling: the views in which speech is labelled and learnt."""

import dataclasses

import pytest
import torch

from espnet_pl.data.views import at_speed
from espnet_pl.methods.base import Batch, ConfigError, Utterances
from espnet_pl.methods.pseudo_labelling import Collapse
from espnet_pl.methods.registry import build, config_of
from espnet_pl.parts.decoding import consensus
from espnet_pl.parts.pseudo_labels import agree, by_risk, mixed, propose
from test.toys import VOCABULARY, ToyStudent, batch, speaking_student, utterances

METHODS = ("slimipl", "mpl", "iterative")
SPEEDS = [1.0, 0.8, 1.25]


class Listener(ToyStudent):
    """The toy for waveforms: a frame is as many samples as there are tokens."""

    def __init__(self):
        super().__init__()
        self.heard = []  # (training mode, samples) of each encoding

    def hear(self, x):
        self.heard.append((self.training, x.speech.shape[1]))
        frames = x.speech.unfold(1, VOCABULARY, VOCABULARY)
        lengths = (x.speech_lengths // VOCABULARY).clamp(max=frames.shape[1])
        return super().hear(dataclasses.replace(x, speech=frames, speech_lengths=lengths))


def waveforms(n=3, samples=200):
    torch.manual_seed(7)
    lengths = torch.tensor([samples - 30 * i for i in range(n)])
    return Utterances([f"u{i}" for i in range(n)], torch.randn(n, samples), lengths)


def listener():
    torch.manual_seed(3)
    student = Listener()
    with torch.no_grad():
        student.out.weight.mul_(4)  # opinions
    return student.train()


@pytest.mark.parametrize("name", METHODS)
def test_the_label_is_the_consensus_of_the_weak_views(name):
    student, x = listener(), waveforms()
    method = build(name, {"unlabelled": 1, "weak_speeds": SPEEDS}, student)
    method.start(student)
    method.label(student, x)
    views = [propose(student, at_speed(x, speed)).labels for speed in SPEEDS]
    assert views[0] != views[1] or views[0] != views[2]
    for i, utt_id in enumerate(x.utt_id):
        assert method.cache.get(utt_id) == consensus([view[i] for view in views])


@pytest.mark.parametrize("name", METHODS)
def test_what_is_thought_of_hypotheses_is_the_mean_over_views_and_teachers(name):
    student, x = listener(), waveforms()
    conf = {"unlabelled": 1, "weak_speeds": SPEEDS, "hard": 0.0, "sequences": 1.0, "beam": 3}
    method = build(name, conf, student, {"teachers": [speaker(1)]})
    method.start(student)
    method.label(student, x)
    weak = [at_speed(x, speed) for speed in SPEEDS]
    views = [propose(student, view, method.config).records for view in weak]
    others = [propose(speaker(1), view).labels for view in weak]
    for i, utt_id in enumerate(x.utt_id):
        expected = mixed([view[i] for view in views], [said[i] for said in others])
        found = method.cache.record(utt_id)
        assert found["labels"].tolist() == expected["labels"].tolist()
        torch.testing.assert_close(found["log_w"], expected["log_w"])
        assert found["log_w"].exp().sum() == pytest.approx(1.0)
    terms = method.unlabelled(student, x)
    assert terms["pseudo_sequences"].value > 0


@pytest.mark.parametrize("name", METHODS)
def test_hypotheses_may_be_weighed_by_their_risk(name):
    student, x = listener(), waveforms()
    conf = {"unlabelled": 1, "hard": 0.0, "sequences": 1.0, "beam": 5}
    records = []
    for risk in (0.0, 3.0):
        method = build(name, {**conf, "risk": risk}, student)
        method.start(student)
        method.label(student, x)
        records.append([method.cache.record(i) for i in x.utt_id])
    for plain, risky in zip(*records):
        torch.testing.assert_close(risky["log_w"], by_risk(plain, 3.0)["log_w"])
    assert any(not torch.equal(a["log_w"], b["log_w"]) for a, b in zip(*records))


@pytest.mark.parametrize("name", METHODS)
def test_the_student_hears_every_strong_view_and_the_teacher_every_weak_one(name):
    conf = {"unlabelled": 1, "weak_speeds": [1.0, 0.5], "strong_speeds": [0.8, 1.0, 1.25]}
    if name == "slimipl":
        conf["capacity"] = 0
    student, x = listener(), waveforms()
    method = build(name, conf, student)
    teacher = method.teacher.network if method.teacher else student
    method(student, Batch(unlabelled=x))
    strong = set()
    for _ in range(40):
        student.heard.clear()
        teacher.heard.clear()
        method(student, Batch(unlabelled=x))
        weak = [samples for training, samples in teacher.heard if not training]
        assert weak == [200, 400]
        strong |= {samples for training, samples in student.heard if training}
    assert strong == {250, 200, 160}


@pytest.mark.parametrize("name", METHODS)
def test_other_teachers_have_their_say_and_never_change(name):
    student, x = listener(), waveforms()
    others = [speaker(1), speaker(2)]
    before = [p.clone() for other in others for p in other.parameters()]
    method = build(name, {"unlabelled": 1}, student, {"teachers": others})
    method.start(student)
    method.label(student, x)
    said = [propose(who, x).labels for who in (student, *others)]
    assert said[0] != said[1] == said[2]  # the method's own teacher is outvoted
    assert [method.cache.get(i) for i in x.utt_id] == said[1]
    method(student, Batch(unlabelled=x))["pseudo"].value.backward()
    method.after_step(student)
    after = [p for other in others for p in other.parameters()]
    assert all(p.grad is None for p in after)
    assert all(torch.equal(p, q) for p, q in zip(before, after, strict=True))
    for other in others:
        other.heard.clear()
    method.label(student, x)
    assert not any(other.heard for other in others)  # known already
    again = build(name, {"unlabelled": 1}, listener(), {"teachers": others})
    again.load_state_dict(method.state_dict())
    again.label(student, x)
    assert not any(other.heard for other in others)  # and after a restart
    assert [again.cache.get(i) for i in x.utt_id] == said[1]


def speaker(seed):
    """One that always says token 1, whatever its weights."""
    torch.manual_seed(seed)
    other = Listener()
    with torch.no_grad():
        other.out.bias[1] = 100
    return other.requires_grad_(False)


def test_other_teachers_of_a_method_without_labels_are_refused():
    with pytest.raises(ConfigError, match="supervised makes no pseudo-labels"):
        build("supervised", {}, listener(), {"teachers": [speaker(1)]})


@pytest.mark.parametrize("name", METHODS)
def test_how_much_the_student_says_is_compared_with_labelled_speech(name):
    student = speaking_student()
    method = build(name, {"unlabelled": 1}, student)
    seen = batch(fresh=True)
    terms = method(student, seen)
    reference = float(seen.labelled.text_lengths.sum() / seen.labelled.speech_lengths.sum())
    ratio = float(terms["student_length_ratio"].value)
    said = ratio * reference * float(seen.unlabelled.speech_lengths.sum())
    assert said == pytest.approx(round(said), abs=1e-4) and round(said) > 0
    assert terms["student_length_ratio"].weight == 0
    again = build(name, {"unlabelled": 1}, speaking_student())
    again.load_state_dict(method.state_dict())
    assert again.said_in.tolist() == method.said_in.tolist()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "how",
    [dict(soft=1.0), dict(lattice=1.0), dict(sequences=1.0, ranking=1.0), dict(label="sampled")],
)
def test_every_method_learns_every_objective(name, how):
    """From a cache that went through a checkpoint, too."""
    how = {"unlabelled": 1, "hard": float("label" in how), **how}
    student = speaking_student()
    method = build(name, how, student)
    method(student, batch(fresh=True))
    again = build(name, how, student)
    again.load_state_dict(method.state_dict())
    for made in (method, again):
        student.zero_grad()
        terms = made(student, batch(labelled=False))
        wanted = {k for k in terms if k.startswith("pseudo")}
        assert wanted == {f"pseudo_{k}" if k != "label" else "pseudo" for k in how} - {
            "pseudo_unlabelled", "pseudo_hard",
        }  # fmt: skip
        sum(t.weight * t.value for t in terms.values()).backward()
        assert student.out.weight.grad.abs().sum() > 0


def collapsing(on_collapse, **conf):
    """A student that says one token everywhere after a few updates, and its method."""
    student = speaking_student()
    conf = {"capacity": 0, "unlabelled": 1, "monitor_learn": 3, "monitor_patience": 4, **conf}
    method = build("slimipl", {**conf, "on_collapse": on_collapse, "rollback_every": 30}, student)
    for update in range(58):  # the second copy is taken two updates after the collapse began
        method(student, batch(fresh=update == 0))
        method.after_step(student)
    good = {k: v.clone() for k, v in student.state_dict().items()}
    with torch.no_grad():
        student.out.bias[1] += 50
    return student, method, good


def until_alarm(student, method, most=60):
    for _ in range(most):
        terms = method(student, batch())
        if method.alarms:
            return terms
        method.after_step(student)
    raise AssertionError("no alarm")


def test_a_collapse_is_told_and_training_goes_on(caplog):
    student, method, _ = collapsing("warn")
    weight = until_alarm(student, method)["pseudo"].weight
    assert "collapse at update" in caplog.text and "student_token_entropy is" in caplog.text
    method.after_step(student)
    assert student.out.bias[1] > 40 and weight == 1.0


def test_a_student_that_collapsed_is_put_back_and_learns_less(caplog):
    student, method, good = collapsing("rollback")
    until_alarm(student, method)
    method.after_step(student)
    for name, value in student.state_dict().items():
        if "norm" not in name:  # its statistics follow the speech
            torch.testing.assert_close(value, good[name])
    assert "as it was when it was well" in caplog.text and method.monitor.healthy
    assert method(student, batch())["pseudo"].weight == 0.5
    again = build("slimipl", dataclasses.asdict(method.config), speaking_student())
    again.load_state_dict(method.state_dict())
    assert again(student, batch())["pseudo"].weight == 0.5


@pytest.mark.parametrize("conf", [{"teacher": "ema", "decay": 0.5}, {"teacher": "frozen"}])
def test_a_teacher_that_follows_is_put_back_with_its_student(conf):
    student, method, _ = collapsing("rollback", **conf)
    with torch.no_grad():  # a frozen teacher does not follow into a collapse: it is led there
        method.teacher.network.out.bias[1] += 50
    until_alarm(student, method)
    method.after_step(student)
    bias = method.teacher.network.out.bias
    if conf["teacher"] == "ema":
        torch.testing.assert_close(bias, student.out.bias)
    else:
        assert bias[1] > 40


def test_labels_of_a_student_that_was_put_back_are_made_anew():
    student, method, _ = collapsing("rollback", capacity=3)
    method(student, batch(labelled=False, fresh=True))  # by the student that has collapsed
    bad = [method.cache.get(f"u{i}") for i in range(3)]
    assert bad == [[1], [1], [1]]
    until_alarm(student, method)
    method.after_step(student)
    again = build("slimipl", dataclasses.asdict(method.config), speaking_student())
    again.load_state_dict(method.state_dict())
    for made in (method, again):
        assert made(student, batch(labelled=False))["label_age"].value == 0
        now = [made.cache.get(f"u{i}") for i in range(3)]
        assert now == propose(student, batch().unlabelled).labels != bad
        made.after_step(student)
        assert made(student, batch(labelled=False))["label_age"].value == 1  # once


def test_a_collapse_may_end_the_training():
    student, method, _ = collapsing("stop")
    with pytest.raises(Collapse, match="collapse at update .* on_collapse: rollback may help"):
        until_alarm(student, method)


def test_what_fills_the_cache_is_labelled_in_pieces_no_larger_than_a_batch(monkeypatch):
    student, method = speaking_student(), build("slimipl", {"unlabelled": 1}, speaking_student())
    many = utterances(n=40, text=False, prefix="f")
    said = propose(student, many).labels
    sizes, hear = [], type(student).hear

    def heard(self, x):
        sizes.append(x.speech.shape[:2].numel())
        return hear(self, x)

    monkeypatch.setattr(type(student), "hear", heard)
    seen = dataclasses.replace(batch(unlabelled=False), fresh=many)
    method(student, seen)
    *pieces, supervised = sizes
    assert supervised >= max(pieces) and len(pieces) > 10
    assert [method.cache.get(i) for i in many.utt_id] == said


def test_pieces_are_whole():
    x = utterances(n=7, text=False)
    for samples in (0, 40, 100, 10**6):
        pieces = list(x.pieces(samples))
        assert [i for piece in pieces for i in piece.utt_id] == x.utt_id
        for piece in pieces:
            assert len(piece) == 1 or piece.speech.shape[0] * piece.speech.shape[1] <= samples
            assert piece.speech.shape[1] == piece.speech_lengths.max()
        assert {0: 7, 10**6: 1}.get(samples, len(pieces)) == len(pieces)


def test_frames_can_be_compared_at_the_same_speed_only():
    for speeds in (dict(weak_speeds=[1.1, 1.0]), dict(strong_speeds=[1.0, 0.9])):
        with pytest.raises(ConfigError, match="the first of weak_speeds"):
            config_of("slimipl", {"soft": 1.0, **speeds})
    assert config_of("slimipl", {"soft": 1.0, "weak_speeds": [1.0, 0.9]}).soft == 1.0


@pytest.mark.parametrize("name", METHODS)
def test_without_speeds_nothing_is_changed(name):
    student, x = listener(), waveforms()
    method = build(name, {"unlabelled": 1}, student)
    method.start(student)
    method.label(student, x)
    assert [method.cache.get(i) for i in x.utt_id] == propose(student, x).labels
    method.unlabelled(student, x)
    assert {samples for _, samples in student.heard} == {200}


def test_statistics_of_several_views_are_averaged():
    student, x = listener(), waveforms()
    views = [propose(student, at_speed(x, speed)) for speed in SPEEDS]
    for i, mean in enumerate(agree(views).statistics):
        assert mean == pytest.approx(sum(v.statistics[i].item() for v in views) / 3)
    assert agree(views[:1]) is views[0]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "bad",
    [
        dict(weak_speeds=[]),
        dict(strong_speeds=[]),
        dict(weak_speeds=[1.0, 0.0]),
        dict(strong_speeds=[3.0]),
        dict(strong_speeds=1.0),
        dict(weak_speeds=["fast"]),
        dict(max_labels=0),
    ],
)
def test_bad_settings_are_refused_by_name(name, bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        config_of(name, bad)


def test_settings_of_the_same_numbers_are_the_same():
    assert config_of("mpl", {"weak_speeds": [1, 0.9]}) == config_of(
        "mpl", {"weak_speeds": (1, 0.9)}
    )
    hash(config_of("mpl", {"weak_speeds": [1, 0.9]}))
