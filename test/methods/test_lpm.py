"""methods/lpm: the written equation by loops, its limits, what is dropped, who proposes."""

import dataclasses
import itertools
import math

import pytest
import torch

from espnet_pl.methods.base import ConfigError
from espnet_pl.methods.lpm import DROPPED, Config, Method
from espnet_pl.methods.registry import build, config_of
from espnet_pl.parts.cache import Record
from espnet_pl.parts.decoding import greedy, pad
from test.toys import (
    ToyLanguageModel,
    ToyStudent,
    ToyTransducer,
    batch,
    speaking_student,
    utterances,
)

ANY = {"length_band": None}
KINDS = [ToyStudent, ToyTransducer]


def pair(kind=ToyStudent, model=None, seed=1, **conf):
    """A student in eval mode, and its method, which has begun."""
    student = speaking_student(seed=seed, kind=kind).eval()
    given = {"language_model": model or ToyLanguageModel()}
    method = build("lpm", {**ANY, **conf}, student, given)
    method.start(student)
    return student, method


def beams(student, k, x=None):
    """What the proposal model says, with its scores."""
    with torch.no_grad():
        found = student.hear(x or batch().unlabelled).propose(k)
    return [[(tuple(p.labels), p.log_p) for p in own if p.labels] for own in found]


def by_loops(student, x, own_beams, kappa, weights, scale=1.0, direction="forward"):
    """The equation of the docstring, one utterance and one hypothesis at a time, in probabilities.

    Returns: the loss of each utterance.
    """
    model, losses = ToyLanguageModel(), []
    for i, beam in enumerate(own_beams):
        mass = []
        for y, log_p in beam:
            p = math.exp(sum(model.own[c] for c in y) - 0.7) ** kappa
            if weights == "uniform":
                p = 1.0
            if weights == "teacher_and_lm":
                p *= math.exp(log_p) ** scale
            mass.append(p)
        prior = [p / sum(mass) for p in mass]
        score = [float(student.hear(x).score([list(y)], [i])) for y, _ in beam]
        if direction == "forward":
            losses.append(-sum(p * s for p, s in zip(prior, score)))
        else:
            v = [math.exp(s) ** scale for s in score]
            v = [own / sum(v) for own in v]
            losses.append(sum(a * math.log(a / p) for a, p in zip(v, prior)))
    return losses


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", ["forward", "reversed"])
@pytest.mark.parametrize("kappa", [0.5, 1.0])
@pytest.mark.parametrize("weights", ["lm", "uniform", "teacher_and_lm"])
def test_equals_the_written_equation(weights, kappa, direction, kind):
    conf = dict(weights=weights, kappa=kappa, direction=direction, beam=5, scale=0.8)
    student, method = pair(kind, **conf)
    own = beams(student, 5)
    with torch.no_grad():  # it has moved since it proposed
        student.out.bias += 0.3
        student.hidden.weight *= 1.1
    x = batch().unlabelled
    term = method.unlabelled(student, x)["pseudo_sequences"]
    expected = by_loops(student, x, own, kappa, weights, 0.8, direction)
    assert float(term.value) == pytest.approx(sum(expected) / 3, rel=1e-4, abs=1e-5)
    assert (term.weight, term.count) == (0.2, 3)


def test_the_weights_of_each_utterance_sum_to_one_and_are_the_language_model_s():
    for weights in ("lm", "uniform", "shuffled", "teacher_and_lm"):
        student, method = pair(weights=weights, beam=6)
        x = batch().unlabelled
        records = method._said(student, x, method.config).records
        for own in records:
            assert own["log_w"].exp().sum().item() == pytest.approx(1)
        if weights == "lm":
            model = ToyLanguageModel()
            for own in records:
                rows = zip(own["labels"].tolist(), own["lengths"].tolist())
                log_p = model.log_p([y[:length] for y, length in rows])
                torch.testing.assert_close(own["log_w"].double(), log_p.log_softmax(0))
                assert log_p.tolist() == sorted(log_p.tolist(), reverse=True)


def test_a_common_shift_of_the_language_model_s_scores_changes_nothing():
    values = []
    for shift in (0.0, -300.0, 41.5):
        student, method = pair(model=ToyLanguageModel(shift=shift))
        values.append(
            method.unlabelled(student, batch().unlabelled)["pseudo_sequences"].value.item()
        )
    assert values == pytest.approx([values[0]] * 3, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_one_hypothesis_is_hard_pseudo_labelling_by_the_same_proposal(kind):
    student, method = pair(kind, beam=1, weight=1.0)
    other = build(
        "slimipl",
        dict(teacher="frozen", capacity=0, label="best", beam=1),
        student if kind is ToyStudent else with_frames(student),
    )
    other.start(student)
    x = batch().unlabelled
    first = method.unlabelled(student, x)["pseudo_sequences"]
    second = other.unlabelled(student, x)["pseudo"]
    torch.testing.assert_close(first.value, second.value)
    assert (first.weight, first.count) == (second.weight, second.count)


def test_one_hypothesis_of_several_proposal_models_is_their_consensus():
    student, x = speaking_student(seed=1).eval(), batch().unlabelled
    others = [speaking_student(seed=seed).eval() for seed in (7, 8)]
    given = {"language_model": ToyLanguageModel(), "teachers": others}
    conf = {**ANY, "beam": 1, "weight": 1.0}
    method = build("lpm", conf, student, given)
    other = build(
        "slimipl", dict(teacher="frozen", capacity=0), with_frames(student), {"teachers": others}
    )
    for one in (method, other):
        one.start(student)
    labels = other._said(student, x, other.config).labels
    three = [greedy(*each.hear(x).frame_log_probs(), 0) for each in (student, *others)]
    assert any(len({*map(tuple, said)}) > 1 for said in zip(*three))  # there was a choice
    records = method._said(student, x, method.config).records
    assert [[*said(own)] for own in records] == [[y] if y else [] for y in map(tuple, labels)]
    first = method.unlabelled(student, x)["pseudo_sequences"]
    second = other.unlabelled(student, x)["pseudo"]
    torch.testing.assert_close(first.value, second.value)
    assert (first.weight, first.count) == (second.weight, second.count)


def with_frames(student):
    student.answers = student.answers | {"frame_log_probs"}
    return student


def test_uniform_weights_are_the_mean_over_the_beam_and_need_no_language_model():
    student = speaking_student(seed=1).eval()
    method = build("lpm", {**ANY, "weights": "uniform"}, student)
    method.start(student)
    x, heard = batch().unlabelled, student.hear(batch().unlabelled)
    each = [
        -heard.score([list(y) for y, _ in own], [i] * len(own)).mean()
        for i, own in enumerate(beams(student, 4))
    ]
    value = method.unlabelled(student, x)["pseudo_sequences"].value
    torch.testing.assert_close(value, torch.stack(each).mean())
    nothing = pair(kappa=0.0)[1].unlabelled(student, x)["pseudo_sequences"].value
    torch.testing.assert_close(value, nothing)
    numbers = method.unlabelled(student, x)
    sizes = [len(own) for own in beams(student, 4)]
    entropy = sum(math.log(size) for size in sizes) / 3
    assert numbers["prior_entropy"].value == pytest.approx(entropy, rel=1e-5)
    assert numbers["hypotheses"].value == pytest.approx(sum(sizes) / 3)


def test_shuffled_weights_are_the_same_numbers_of_other_hypotheses():
    student, plain = pair(beam=6)
    _, method = pair(beam=6, weights="shuffled")
    x, moved = batch().unlabelled, 0
    torch.manual_seed(0)
    for a, b in zip(*(m._said(student, x, m.config).records for m in (plain, method))):
        torch.testing.assert_close(a["log_w"], b["log_w"])  # both in order
        assert {*map(tuple, a["labels"].tolist())} == {*map(tuple, b["labels"].tolist())}
        moved += a["labels"].tolist() != b["labels"].tolist()
    assert moved
    # In the mean over all orders, every hypothesis has the same weight.
    values = [method.unlabelled(student, x)["pseudo_sequences"].value.item() for _ in range(400)]
    even = pair(beam=6, weights="uniform")[1].unlabelled(student, x)["pseudo_sequences"].value
    spread = float(torch.tensor(values).std()) / 20
    assert sum(values) / 400 == pytest.approx(even.item(), abs=4 * spread)


def test_a_sure_language_model_is_a_hard_label():
    student, method = pair(kappa=500.0, hard=0.5)
    model, x = ToyLanguageModel(), batch().unlabelled
    best = [
        max((list(y) for y, _ in own), key=lambda y: float(model.log_p([y])))
        for own in beams(student, 4)
    ]
    assert method._said(student, x, method.config).labels == best
    terms = method.unlabelled(student, x)
    expected = -student.hear(x).score(best).mean()
    torch.testing.assert_close(terms["pseudo_sequences"].value, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(terms["pseudo"].value, expected)
    assert terms["pseudo"].weight == 0.2 * 0.5


def test_gradient_is_the_prior_s_and_reaches_the_student_only():
    student, method = pair()
    x = batch().unlabelled
    records = method._said(student, x, method.config).records
    scores = []

    class Heard:
        def __len__(self):
            return 3

        def score(self, labels, of=None):
            scores.append(torch.zeros(len(labels), requires_grad=True))
            return scores[-1]

    summands, _ = method.objective(Heard(), [[]] * 3, records)
    summands["pseudo_sequences"].value.backward()
    torch.testing.assert_close(
        scores[0].grad, -torch.cat([own["log_w"].exp() for own in records]) / 3
    )
    method.unlabelled(student, x)["pseudo_sequences"].value.backward()
    assert student.out.weight.grad.any() and all(p.grad is None for p in method.parameters())


# --- what is no part of the beam -----------------------------------------------------------------


def record(*hypotheses, dropped=(0, 0)) -> Record:
    text, lengths = pad([list(y) for y, _ in hypotheses])
    log_w = torch.tensor([w for _, w in hypotheses])
    return {"labels": text, "lengths": lengths, "log_w": log_w, "dropped": torch.tensor(dropped)}


def said(own: Record):
    rows = zip(own["labels"].tolist(), own["lengths"].tolist(), own["log_w"].exp().tolist())
    return {tuple(y[:length]): w for y, length, w in rows}


def why(own: Record):
    return {name: n for name, n in zip(DROPPED, own["dropped"].tolist()) if n}


@pytest.mark.parametrize("percent", [0, 5, 10, 30])
def test_the_band_is_the_written_one(percent):
    """In whole numbers, where nothing is rounded; both lengths are with the sentence's end."""
    for greedy_length in range(1, 200):
        whole = greedy_length + 1
        least, most = ((100 - percent) * whole) // 100, -((-(100 + percent) * whole) // 100)
        band = Config(length_band=percent / 100).band(greedy_length)
        assert band == (least - 1, most - 1)


def test_hypotheses_of_other_lengths_are_no_part_of_the_beam():
    _, method = pair(length_band=0.3)
    several = [((1,) * n, 0.0) for n in range(1, 7)]
    (own,) = method._with_prior([[1] * 4], [record(*several)])
    assert sorted(map(len, said(own))) == [2, 3, 4, 5, 6]  # ⌊3.5⌋ − 1 to ⌈6.5⌉ − 1
    assert why(own) == {"length": 1} and int(own["greedy"]) == 4
    assert sum(said(own).values()) == pytest.approx(1)
    (own,) = method._with_prior([[]], [record(*several)])
    assert said(own) == {} and why(own) == {"length": 6}
    (own,) = pair()[1]._with_prior([[]], [record(*several)])
    assert len(said(own)) == 6


def test_the_reference_is_the_greedy_hypothesis():
    student, method = pair(length_band=0.0, beam=8)
    x = batch().unlabelled
    with torch.no_grad():
        best = greedy(*student.hear(x).frame_log_probs(), student.blank)
    for own, y in zip(method._said(student, x, method.config).records, best):
        assert {len(h) for h in said(own)} <= {len(y)} and int(own["greedy"]) == len(y)
        assert own["dropped"][DROPPED.index("length")] > 0
    student, method = pair(ToyTransducer, length_band=0.0, beam=8)  # has no frames to ask
    for own, beam in zip(method._said(student, x, method.config).records, beams(student, 8)):
        assert {len(h) for h in said(own)} == {len(beam[0][0])}


def test_what_is_said_twice_is_one_hypothesis():
    _, method = pair(weights="teacher_and_lm", kappa=0.0)
    twice = record(((1, 3), math.log(0.2)), ((3,), math.log(0.5)), ((1, 3), math.log(0.3)))
    (own,) = method._with_prior([[1, 3]], [twice])
    assert said(own) == pytest.approx({(1, 3): 0.5, (3,): 0.5}) and why(own) == {"same": 1}
    _, method = pair(weights="uniform")
    (own,) = method._with_prior([[1, 3]], [twice])
    assert said(own) == pytest.approx({(1, 3): 0.5, (3,): 0.5})


@pytest.mark.parametrize("bad", [-math.inf, math.nan, math.inf])
@pytest.mark.parametrize("weights", ["lm", "shuffled", "teacher_and_lm"])
def test_what_the_language_model_cannot_score_is_dropped_before_the_softmax(weights, bad):
    _, method = pair(model=ToyLanguageModel((0, -1.0, bad, -0.5, -3.0)), weights=weights)
    beam = record(((1,), -1.0), ((1, 2), -1.0), ((3,), -1.0), dropped=(2, 1))
    nobody = record(((2,), 0.0))
    own, none = method._with_prior([[1], [2]], [beam, nobody])
    assert {*said(own)} == {(1,), (3,)} and sum(said(own).values()) == pytest.approx(1)
    if weights != "shuffled":
        assert said(own)[1,] == pytest.approx(1 / (1 + math.exp(0.5)))
    assert why(own) == {"empty": 2, "without_score": 1, "no_text": 1}
    assert said(none) == {} and why(none) == {"no_text": 1}


@pytest.mark.parametrize("direction", ["forward", "reversed"])
@pytest.mark.parametrize("hard", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_without_any_hypothesis_the_loss_is_zero_and_on_the_graph(kind, hard, direction):
    nothing = ToyLanguageModel((-math.inf,) * 5)
    student, method = pair(kind, nothing, direction=direction, hard=hard)
    terms = method.unlabelled(student, batch().unlabelled)
    loss = sum(t.weight * t.value for t in terms.values() if t.weight)
    loss.backward()
    assert loss == 0 and terms["pseudo_sequences"].count == 0
    last = student.out if kind is ToyStudent else student.output
    for layer in (student.hidden, last):
        assert layer.weight.grad is not None and not layer.weight.grad.any()
    assert terms["utterances_left_out"].value == 1 and terms["hypotheses"].value == 0
    assert terms["hypotheses_no_text"].value > 1 and "prior_entropy" not in terms


def test_an_utterance_without_hypotheses_has_no_say():
    student, method = pair()
    x, said_of = batch().unlabelled, method._said
    records = said_of(student, x, method.config).records
    heard, labels = student.hear(x), [[1]] * 3
    alone = method.objective(heard, labels, records)[0]["pseudo_sequences"]
    one = [record(dropped=(0,) * 6) | {"greedy": torch.tensor([0])}, *records[1:]]
    left = method.objective(heard, labels, one)[0]["pseudo_sequences"]
    assert (alone.count, left.count) == (3, 2)
    first = method.objective(heard, labels, [records[0], one[0], one[0]])[0]["pseudo_sequences"]
    torch.testing.assert_close(alone.value * 3, left.value * 2 + first.value)


def test_too_long_ones_and_those_that_do_not_fit_are_counted():
    student, method = pair(max_labels=2)
    x = batch().unlabelled
    long, fits = ((1, 3, 1), -1.0), ((1, 3), -1.0)
    records = method._with_prior([[1, 3]] * 3, [record(long, fits), record(fits), record(long)])
    summands, numbers = method.objective(student.hear(x), [[1]] * 3, records)
    assert numbers["hypotheses_too_long"] == pytest.approx(2 / 3)
    assert numbers["hypotheses"] == pytest.approx(2 / 3)
    expected = -student.hear(x).score([[1, 3]] * 2, [0, 1]).mean()
    torch.testing.assert_close(summands["pseudo_sequences"].value, expected)
    short = dataclasses.replace(x, speech_lengths=torch.tensor([1, 5, 5]))
    summands, numbers = method.objective(student.hear(short), [[1]] * 3, [records[1]] * 3)
    assert numbers["hypotheses_infeasible"] == pytest.approx(1 / 3)
    assert summands["pseudo_sequences"].count == 2


def test_hostile_speech():
    """One frame, in which nothing or little can be said; a student that is silent."""
    student, method = pair(beam=3, length_band=0.5)
    x = dataclasses.replace(utterances(text=False), speech_lengths=torch.tensor([1, 1, 8]))
    value = method.unlabelled(student, x)["pseudo_sequences"].value
    value.backward()
    assert value.isfinite() and student.hidden.weight.grad.isfinite().all()
    with torch.no_grad():
        method.teacher.network.out.bias[0] += 1e4
    terms = method.unlabelled(student, x)
    assert terms["pseudo_sequences"].value == 0 and terms["utterances_left_out"].value == 1
    assert terms["hypotheses_empty"].value == 1


def test_large_differences_in_half_precision_stay_numbers():
    student, method = pair(model=ToyLanguageModel((0.0, -900.0, -2000.0, -1.0, -3000.0)))
    x = batch().unlabelled
    own = method._said(student, x, method.config).records
    assert all(said(r) and not torch.stack([r["log_w"]]).isnan().any() for r in own)
    heard = student.hear(x)
    plain = heard.score
    heard.score = lambda labels, of=None: plain(labels, of).half()
    value = method.objective(heard, [[1]] * 3, own)[0]["pseudo_sequences"].value
    assert value.isfinite()
    value.backward()
    assert student.hidden.weight.grad.isfinite().all()


# --- who proposes --------------------------------------------------------------------------------


def weight_of(method):
    return method.teacher.network.out.weight


def stepped(student, method, change=1.0):
    with torch.no_grad():
        student.out.weight += change
    method.after_step(student)


def test_a_frozen_proposal_stays_and_an_average_follows():
    student, method = pair(proposal="frozen")
    before = student.out.weight.detach().clone()
    stepped(student, method)
    assert torch.equal(weight_of(method), before) and not method.validates
    assert method.rival() is None
    student, method = pair(proposal="ema", decay=0.75)
    stepped(student, method)
    torch.testing.assert_close(weight_of(method), before + 0.25)
    method.went_back(student)
    assert torch.equal(weight_of(method), student.out.weight) and not method.validates


def test_the_student_replaces_the_proposal_when_it_is_better_and_only_then():
    student, method = pair()
    seed = student.out.weight.detach().clone()
    assert method.validates and method.rival() is method.teacher.network
    stepped(student, method)
    assert torch.equal(weight_of(method), seed)
    method.validated(student, 5.0, 4.0)  # worse than the seed, which was validated beside it
    assert torch.equal(weight_of(method), seed) and method.rival() is None
    method.validated(student, 4.0, None)  # no better
    assert torch.equal(weight_of(method), seed) and method.replaced == 0
    method.validated(student, 3.0, None)
    now = student.out.weight.detach().clone()
    assert torch.equal(weight_of(method), now) and method.replaced == 1
    stepped(student, method)
    for mine in (3.5, math.nan, math.inf, 3.0):
        method.validated(student, mine, None)
    assert torch.equal(weight_of(method), now) and method.best == 3.0
    terms = method.unlabelled(student, batch().unlabelled)
    assert terms["proposals_replaced"].value == 1


@pytest.mark.parametrize("rivals", [math.nan, math.inf, None])
def test_a_proposal_that_has_no_number_is_replaced_by_one_that_has(rivals):
    student, method = pair()
    stepped(student, method)
    method.validated(student, math.nan, rivals)
    assert method.rival() is not None and method.replaced == 0
    method.validated(student, 2.0, rivals)
    assert torch.equal(weight_of(method), student.out.weight) and method.best == 2.0


def test_other_teachers_propose_too():
    student = speaking_student(seed=1).eval()
    other = speaking_student(seed=9).eval()
    x = batch().unlabelled
    given = {"language_model": ToyLanguageModel(), "teachers": [other]}
    method = build("lpm", {**ANY, "beam": 2}, student, given)
    method.start(student)
    with torch.no_grad():
        theirs = greedy(*other.hear(x).frame_log_probs(), 0)
    found = method._said(student, x, method.config).records
    for own, beam, y in zip(found, beams(student, 2), theirs):
        assert {*said(own)} == {y for y, _ in beam} | {tuple(y)}
        log_p = torch.tensor([float(ToyLanguageModel().log_p([h])) for h in said(own)])
        torch.testing.assert_close(own["log_w"], log_p.log_softmax(0))


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "conf, match",
    [
        ({"kappa": -1.0}, "kappa is -1.0"),
        ({"kappa": math.inf}, "kappa is inf"),
        ({"length_band": 1.0}, "length_band is 1.0"),
        ({"length_band": -0.1}, "length_band is -0.1"),
        ({"decay": 1.1}, "decay is 1.1"),
        ({"decay_warmup": -1.0}, "decay_warmup is -1.0"),
        ({"sequences": 0.0}, "sequences is 0.0"),
        ({"soft": 1.0}, "soft is of the teacher"),
        ({"full_sum": 1.0}, "full_sum is of the teacher"),
        ({"risk": 1.0}, "risk is of the teacher"),
        ({"opinion": "shuffled"}, "weights: shuffled"),
        ({"confidence": "weight"}, "confidence is of"),
        ({"weights": "language"}, "weights is 'language'"),
        ({"proposal": "always"}, "proposal is 'always'"),
        ({"direction": "reversed", "beam": 1}, "beam is 1"),
        ({"label": "greedy"}, "label is 'greedy'"),
        ({"max_labels": 0}, "max_labels"),
    ],
)
def test_impossible_settings_are_refused(conf, match):
    with pytest.raises(ConfigError, match=match):
        config_of("lpm", conf)


def test_a_language_model_that_is_missing_or_of_no_use_is_told_at_start():
    student = speaking_student()
    for weights in ("lm", "shuffled", "teacher_and_lm"):
        with pytest.raises(ConfigError, match="lpm needs a language model .*--language_model"):
            build("lpm", {"weights": weights}, student)
    with pytest.raises(ConfigError, match="slimipl has no use for a language model"):
        build("slimipl", {}, student, {"language_model": ToyLanguageModel()})
    drawn = {"hypotheses": "sampled", "weights": "uniform"}
    with pytest.raises(ConfigError, match="hypotheses: search"):
        build("lpm", drawn, speaking_student(kind=ToyTransducer))
    assert build("lpm", drawn, student)(student, batch())["pseudo_sequences"].value > 0
    for name in ("frame_entropy", "token_entropy"):
        with pytest.raises(ConfigError, match="of the frames of a CTC layer"):
            build("lpm", {"weights": "uniform", name: 0.1}, speaking_student(kind=ToyTransducer))


def test_batches_come_in_turn_and_nothing_is_cached():
    pairing = Method.pairing(config_of("lpm", {}))
    assert (pairing.labelled, pairing.unlabelled, pairing.capacity) == (1, 4, 0)


def test_the_language_model_is_asked_about_what_is_in_the_beam_only():
    model = ToyLanguageModel()
    student, method = pair(model=model, beam=3)
    method.unlabelled(student, batch().unlabelled)
    beam = [list(y) for own in beams(student, 3) for y, _ in own]
    assert sorted(model.asked) == sorted(beam)
    assert not [key for key in method.state_dict() if "language" in key]
    assert all(itertools.chain([len(method.cache) == 3], (not method.cache.record("u0"),)))
