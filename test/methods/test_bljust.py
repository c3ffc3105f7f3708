"""methods/bljust: the joint gradient, the penalty, its schedule, exploration, hostile input."""

import copy
import math

import pytest
import torch
from torch import nn

from espnet_pl.losses.prediction import code_of, standardised
from espnet_pl.methods.base import Batch, ConfigError, Inputs, Utterances
from espnet_pl.methods.bljust import Method
from espnet_pl.methods.registry import build, config_of
from test.toys import ToyTransducer, batch, speaking_student, utterances

KINDS = [{"hide": h, "predict": p} for h in ("future", "spans") for p in ("frames", "codes")]
SPANS = {"span": 2, "share_hidden": 0.5}


def pair(student=None, seed=0, **conf):
    student = student or speaking_student(seed=1).eval()
    torch.manual_seed(seed)
    return student, build("bljust", {"out": 6, "codes": 7, "steps": 4, **conf}, student)


def total(terms):
    return sum(t.weight * t.value for t in terms.values())


def gradient_of(loss, parameters):
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found)]


class TwoNumbers(nn.Module):
    """An encoder θ·x with one layer φ: small enough for pencil and paper.

    L_sup = ½ (φ θ − 1)²; what it hears is x, and its output θ x.
    """

    answers = frozenset({"supervised", "features", "inputs"})
    blank, feature_size, input_size = 0, 1, 1

    def __init__(self, theta=0.8, phi=0.5):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))
        self.phi = nn.Parameter(torch.tensor(phi, dtype=torch.float64))

    def supervised(self, x):
        return (self.phi * self.theta - 1) ** 2 / 2, {}

    def hear(self, x, hide=None):
        hidden = hide(x.speech_lengths, x.speech.shape[1])
        heard = x.speech.masked_fill(hidden[..., None], 0.0)
        given = Inputs(x.speech, x.speech_lengths, hidden)

        class Heard:
            def features(_):
                return self.theta * heard, x.speech_lengths

            def inputs(_):
                return given

        return Heard()


def one_prediction():
    """Speech of which frame 2 of 2 is hidden, whatever is drawn: it is one of two classes."""
    speech = torch.tensor([[[2.0], [5.0]]], dtype=torch.float64)
    x = Utterances(["a"], speech, torch.tensor([2]))
    conf = {"predict": "codes", "codes": 2, "steps": 1, "least_heard": 0.5}
    return Batch(x, x), Batch(None, x), conf


@pytest.mark.parametrize("gamma, upper, lower", [(0.0, 1, 1), (0.3, 1, 1), (0.7, 2, 3), (4, 2, 3)])
def test_the_joint_gradient_has_its_closed_form(gamma, upper, lower):
    both, alone, conf = one_prediction()
    student = TwoNumbers()
    weights = {"upper_weight": float(upper), "lower_weight": float(lower)}
    fixed = {"gamma": float(gamma), "gamma_max": 4.0, "growth": 0.0}
    method = build("bljust", conf | weights | fixed, student).double()
    with torch.no_grad():
        method.predictor.weight.copy_(torch.tensor([[1.0], [-0.5]]))
        method.predictor.bias.zero_()
    theta, phi = student.theta.item(), student.phi.item()
    # The predictor hears θ·2 of the first frame; the logits are 2θ and −θ; y is the code.
    targets = standardised(both.unlabelled.speech, both.unlabelled.speech_lengths)
    y = int(code_of(targets, method.directions, method.book)[0, 1])
    p = [1 / (1 + math.exp(-3 * theta)), 1 / (1 + math.exp(3 * theta))]
    of_logits = [p[c] - (c == y) for c in range(2)]
    lower_theta = 2 * of_logits[0] - of_logits[1]
    upper_theta, upper_phi = (phi * theta - 1) * phi, (phi * theta - 1) * theta

    terms = method(student, both)
    assert terms["unsupervised"].value.item() == pytest.approx(-math.log(p[y]))
    assert terms["supervised"].value.item() == pytest.approx((phi * theta - 1) ** 2 / 2)
    total(terms).backward()
    c = max(1.0, gamma)
    joint = (upper * upper_theta + gamma * lower * lower_theta) / c
    assert student.theta.grad.item() == pytest.approx(joint)
    assert student.phi.grad.item() == pytest.approx(upper * upper_phi / c)
    heads = [[lower * g * 2 * theta] for g in of_logits]  # no γ: they follow the encoder
    assert method.predictor.weight.grad.tolist() == [pytest.approx(h) for h in heads]

    student.zero_grad(), method.zero_grad()
    total(method(student, alone)).backward()
    assert student.theta.grad.item() == pytest.approx(lower * lower_theta)
    assert student.phi.grad is None
    assert method.predictor.weight.grad.tolist() == [pytest.approx(h) for h in heads]


@pytest.mark.parametrize("conf", KINDS)
def test_the_joint_gradient_is_the_sum_that_autograd_makes_of_both_losses(conf):
    student, method = pair(**conf, **SPANS, gamma=0.3, growth=0.0, norms_every=0)
    of = [*student.parameters()]
    torch.manual_seed(5)
    terms = method(student, batch())
    upper, lower = (terms[name].value for name in ("supervised", "unsupervised"))
    assert (terms["supervised"].weight, terms["unsupervised"].weight) == (1.0, 1.0)
    joint = torch.autograd.grad(total(terms), of, allow_unused=True)
    torch.manual_seed(5)
    penalty = method(student, batch(labelled=False))["unsupervised"].value  # the whole of it
    assert penalty == lower
    for g, a, b in zip(
        joint, gradient_of(student.supervised(batch().labelled)[0], of), gradient_of(penalty, of)
    ):
        torch.testing.assert_close(torch.zeros_like(a) if g is None else g, a + 0.3 * b)
    assert upper.item() != lower.item()


@pytest.mark.parametrize("conf", KINDS)
def test_the_penalty_reaches_the_encoder_and_at_0_only_the_layers_of_its_own(conf):
    for gamma in (0.0, 0.5):
        student, method = pair(**conf, **SPANS, gamma=gamma, growth=0.0)
        term = method(student, batch(seed=1))["unsupervised"]
        term.value.backward()
        # Of a frame that is hidden the toy hears its bias.
        assert bool(student.hidden.bias.grad.any()) == (gamma > 0)
        assert all(p.grad.any() for p in method.learns())
        assert student.out.weight.grad is None


def by_loops(method, features, frames, given):
    """L_un of the docstring, for one context an utterance; equal rates of input and output."""
    config, loss = method.config, []
    embedded = method.embedding(given.features)
    for n, t in enumerate(frames.tolist()):
        loss.append(torch.zeros(()))
        hidden = given.hidden[n].tolist()
        if True not in hidden[:t]:
            continue
        cut = hidden.index(True)
        for p in range(config.steps):
            if cut + p >= t:
                break
            w = method.predictor.weight.view(config.steps, config.out, -1)[p]
            b = method.predictor.bias.view(config.steps, config.out)[p]
            z = w @ features[n, cut - 1] + b
            s = torch.stack([torch.cosine_similarity(z, embedded[n, a], 0) for a in range(t)])
            s = s / config.temperature
            loss[-1] = loss[-1] + s.logsumexp(0) - s[cut + p]
    return torch.stack(loss)


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_written_equation(seed):
    student, method = pair(temperature=0.3, least_heard=0.3, steps=3)
    x = utterances(n=5, seed=seed, text=False)
    torch.manual_seed(seed)
    heard = student.hear(x, method.config.hiding)
    expected = by_loops(method, *heard.features(), heard.inputs()).mean()
    torch.manual_seed(seed)
    terms = method.unlabelled(student, x)
    torch.testing.assert_close(terms["unsupervised"].value, expected)
    assert terms["unsupervised"].count == 5
    candidates = terms["frame_chance"].value.exp()
    assert 5 <= candidates <= 12  # those of the utterance


@pytest.mark.parametrize("conf", KINDS)
def test_nothing_hidden_is_heard(conf):
    student, method = pair(**conf, **SPANS)
    x = utterances(n=4, text=False)
    torch.manual_seed(2)
    hidden = student.hear(x, method.config.hiding).inputs().hidden
    noise = 10 * torch.randn(x.speech.shape)
    other = Utterances(x.utt_id, torch.where(hidden[..., None], noise, x.speech), x.speech_lengths)
    features = []
    for speech in (x, other):
        torch.manual_seed(2)
        features.append(student.hear(speech, method.config.hiding).features()[0])
    assert torch.equal(*features)
    rows, places, _ = method._predictions(features[0], hidden)
    assert len(rows) and hidden[rows, places].all()


def test_codes_do_not_change_and_are_kept():
    student, method = pair(predict="codes")
    before = {k: v.clone() for k, v in method.state_dict().items() if k in ("directions", "book")}
    assert len(before) == 2 and method.embedding is None
    assert len(method.learns()) == 2 and len(pair()[1].learns()) == 3
    optimizer = torch.optim.SGD([*student.parameters(), *method.learns()], lr=0.1)
    total(method(student, batch())).backward()
    optimizer.step()
    assert all(torch.equal(method.state_dict()[k], v) for k, v in before.items())
    other = pair(predict="codes", seed=3)[1]
    assert not torch.equal(other.book, method.book)  # of another seed
    other.load_state_dict(method.state_dict())
    assert torch.equal(other.book, method.book)


def steps_of(student, method, kinds, start=0):
    """Train as the bridge does: u is an update of exploration, b a joint one, l is supervised."""
    optimizer = torch.optim.Adam([*student.parameters(), *method.learns()], lr=0.01)
    optimizer.register_step_post_hook(lambda *_: method.after_step(student))
    seen = []
    for step, kind in enumerate(kinds, start):
        torch.manual_seed(step)
        optimizer.zero_grad()
        terms = method(student, batch(kind != "u", kind != "l", seed=step % 3))
        seen.append(terms["gamma"].value.item() if "gamma" in terms else None)
        total(terms).backward()
        optimizer.step()
    return seen


def test_gamma_grows_in_joint_updates_and_goes_on_after_a_restart():
    how = {"gamma": 0.1, "growth": 0.2, "gamma_max": 0.6}
    student, method = pair(**how)
    seen = steps_of(student, method, "uublbbbb")
    by_hand = [None, None, 0.1, None, 0.3, 0.5, 0.6, 0.6]
    assert seen == [g if g is None else pytest.approx(g) for g in by_hand]
    assert method.state_dict()["joint"] == 5 and method.step == 8

    student, method = pair(**how)
    steps_of(student, method, "uub")
    kept = copy.deepcopy((student.state_dict(), method.state_dict()))
    rest = steps_of(student, method, "lbub", start=3)
    assert rest == [None, pytest.approx(0.3), None, pytest.approx(0.5)]
    again, restored = pair(speaking_student(seed=4).eval(), seed=9, **how)
    again.load_state_dict(kept[0])
    restored.load_state_dict(kept[1])
    optimised = [[*m.parameters()] for m in (student, again)]
    assert steps_of(again, restored, "lbub", start=3) == rest
    assert len(optimised[0]) == len(optimised[1])
    assert restored.joint == method.joint and restored.gamma == method.gamma


def test_a_gamma_above_1_takes_from_the_supervised_loss():
    student, method = pair(gamma=4.0, gamma_max=4.0, upper_weight=2.0)
    terms = method(student, batch())
    assert terms["supervised"].weight == 0.5
    assert pair(gamma=0.9, upper_weight=2.0)[1](student, batch())["supervised"].weight == 2.0


def test_a_penalty_of_0_is_supervised_training():
    student, method = pair(gamma=0.0, growth=0.0)
    other, supervised = speaking_student(seed=1).eval(), None
    supervised = build("supervised", {}, other)
    for own, m, b in ((student, method, batch()), (other, supervised, batch(unlabelled=False))):
        total(m(own, b)).backward()
    for p, q in zip(student.parameters(), other.parameters()):
        assert p.grad is None or torch.equal(p.grad, q.grad)


def test_gradients_are_measured_on_what_both_losses_share_and_only_now_and_then():
    student, method = pair(gamma=0.25, growth=0.1, norms_every=3)
    names = {"gradient_upper", "gradient_lower", "gradient_cosine"}
    torch.manual_seed(5)
    terms = method(student, batch())
    of = [p for n, p in student.named_parameters() if not n.startswith("out")]
    upper = gradient_of(student.supervised(batch().labelled)[0], of)
    torch.manual_seed(5)
    lower = gradient_of(method(student, batch(labelled=False))["unsupervised"].value, of)
    a, b = (torch.cat([g.flatten() for g in grads]) for grads in (upper, lower))
    torch.testing.assert_close(terms["gradient_upper"].value, a.norm())
    torch.testing.assert_close(terms["gradient_lower"].value, b.norm())  # without γ
    cosine = torch.cosine_similarity(a, b, 0)
    torch.testing.assert_close(terms["gradient_cosine"].value, cosine)
    assert not names & {*method(student, batch(labelled=False))}
    measured = []
    for _ in range(7):
        measured.append(names <= {*method(student, batch())})
        method.after_step(student)
    assert measured == [True, False, False] * 2 + [True]
    assert not names & {*pair(norms_every=0)[1](student, batch())}
    assert method.supervised is None


def test_a_frozen_encoder_has_no_gradient_to_be_measured():
    student, method = pair(gamma=0.5)
    student.requires_grad_(False)
    student.out.requires_grad_(True)
    terms = method(student, batch())
    assert terms["gradient_lower"].value == 0
    total(terms).backward()
    assert student.hidden.weight.grad is None and method.predictor.weight.grad.any()


def test_measuring_within_ddp(tmp_path):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.method = pair(gamma=0.5, norms_every=1)

        def forward(self):
            torch.manual_seed(0)
            return total(self.method(self.student, batch()))

    alone, shared = Both(), Both()
    alone().backward()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", world_size=1, rank=0
    )
    try:
        nn.parallel.DistributedDataParallel(shared)().backward()
    finally:
        torch.distributed.destroy_process_group()
    for p, q in zip(alone.parameters(), shared.parameters()):
        torch.testing.assert_close(p.grad, q.grad)


def test_measuring_changes_nothing():
    trained = []
    for every in (0, 1):
        student, method = pair(norms_every=every, gamma=0.1, least_heard=0.3)
        steps_of(student.train(), method, "bub")
        trained.append([*student.parameters(), *method.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*trained))


def test_it_learns_what_follows():
    student, method = pair(least_heard=0.3, steps=2, temperature=0.2)
    optimizer = torch.optim.Adam([*student.parameters(), *method.learns()], lr=0.02)
    values = []
    for step in range(150):
        torch.manual_seed(step)
        optimizer.zero_grad()
        terms = method.unlabelled(student, utterances(n=12, seed=step % 4, text=False))
        terms["unsupervised"].value.backward()
        optimizer.step()
        values.append(float(terms["frame_loss"].value - terms["frame_chance"].value))
    assert sum(values[-20:]) / 20 < sum(values[:20]) / 20 - 0.3


@pytest.mark.parametrize("conf", KINDS)
def test_speech_too_short_for_any_prediction_is_zero_and_on_the_graph(conf):
    student, method = pair(**conf, **SPANS)
    x = Utterances(["a", "b"], torch.randn(2, 3, 5), torch.tensor([1, 1]))
    hear = student.hear
    for hears in (hear, lambda x, _: hear(x, lambda t, s: torch.zeros(len(t), s).bool())):
        student.hear = hears
        terms = method.unlabelled(student, x)
        if hears is not hear or conf["hide"] == "future":
            assert terms["unsupervised"].value == 0 and terms["frames_predicted"].value == 0
            assert "frame_loss" not in terms and "frame_chance" not in terms
        terms["unsupervised"].value.backward()
        assert student.hidden.weight.grad.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in method.learns())


def test_all_of_the_input_hidden():
    student, method = pair(hide="future")
    features, x = torch.randn(2, 6, 16).requires_grad_(), torch.randn(2, 12, 5)
    hidden = torch.ones(2, 12).bool()
    given = Inputs(x, torch.tensor([12, 12]), hidden)
    found, rows, _ = method.predict(features, torch.tensor([6, 6]), given)
    assert not len(rows) and found.loss.requires_grad  # there is no context
    _, method = pair(hide="spans", predict="codes")
    found, rows, _ = method.predict(features, torch.tensor([6, 6]), given)
    assert len(rows) == 12 and found.loss.isfinite().all()


def test_predictions_are_of_frames_of_output_that_are_wholly_hidden():
    student, method = pair(hide="future", steps=3)
    features = torch.randn(2, 6, 16)
    hidden = torch.zeros(2, 24).bool()
    hidden[0, 9:] = True  # frame 2 of 6 heard a part
    hidden[1, 4:20] = True  # 20 frames of input are 5 of output
    given = Inputs(torch.randn(2, 24, 5), torch.tensor([24, 20]), hidden)
    bins_of = [(0, 3), (0, 4), (0, 5), (1, 1), (1, 2), (1, 3)]
    rows, places, made = method._predictions(features, _whole(given, torch.tensor([6, 5]), 6))
    assert [*zip(rows.tolist(), places.tolist())] == bins_of
    w = method.predictor.weight.view(3, 6, 16), method.predictor.bias.view(3, 6)
    for k, (row, step) in enumerate(zip((0, 0, 0, 1, 1, 1), (0, 1, 2) * 2)):
        context = features[row, 2 if row == 0 else 0]
        torch.testing.assert_close(made[k], w[0][step] @ context + w[1][step])


def _whole(given, frames, t):
    from espnet_pl.parts.hiding import Bins

    return Bins(given.frames, given.features.shape[1], frames, t).all(given.hidden)


@pytest.mark.parametrize("conf", KINDS)
def test_half_precision(conf):
    student, method = pair(**conf, **SPANS, gamma=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = method(student, batch(seed=1))
    total(terms).backward()
    assert terms["unsupervised"].value.dtype == torch.float32
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())
    assert all(p.grad.isfinite().all() for p in method.learns())


def test_which_batches_meet():
    def pairing(**conf):
        return Method.pairing(config_of("bljust", conf))

    found = pairing()
    assert found.together and (found.explore, found.joint) == (4, 1)
    assert pairing(explore=0, joint=0).explores(0) is False
    alone = pairing(labelled=0)
    assert (alone.labelled, alone.unlabelled, alone.together) == (0, 1, False)


def test_a_transducer_learns_so_too():
    student, method = pair(speaking_student(kind=ToyTransducer).eval(), gamma=0.5)
    terms = method(student, batch(seed=1))
    total(terms).backward()
    assert terms["gradient_upper"].value > 0 and student.predictor.weight.grad.any()


def test_a_student_without_a_front_end_is_told_what_it_lacks():
    student = speaking_student()
    student.answers = student.answers - {"inputs"}
    with pytest.raises(ConfigError, match="for inputs, .* a front end"):
        build("bljust", {}, student)


@pytest.mark.parametrize(
    "conf, match",
    [
        ({"labelled": 2}, "labelled is 2, it must be 0 or 1"),
        ({"explore": -1}, "negative count"),
        ({"gamma": -0.1}, "gamma is -0.1, it must not be negative"),
        ({"gamma": 2.0}, "gamma is 2.0, more than gamma_max: 1.0"),
        ({"growth": float("nan")}, "growth is nan"),
        ({"gamma_max": float("inf")}, "gamma_max is inf"),
        ({"norms_every": -1}, "norms_every is -1"),
        ({"upper_weight": 0.0}, "upper_weight is 0.0, it must be positive"),
        ({"lower_weight": 0.0}, "lower_weight is 0.0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"steps": 0}, "steps is 0"),
        ({"span": 0}, "span is 0"),
        ({"out": 0}, "out is 0"),
        ({"codes": 0}, "codes is 0"),
        ({"least_heard": 1.0}, "least_heard is 1.0"),
        ({"share_hidden": 0.0}, "share_hidden is 0.0"),
        ({"hide": "past"}, "one of future, spans"),
        ({"predict": "text"}, "one of frames, codes"),
        ({"negatives": "all"}, "one of utterance, batch"),
    ],
)
def test_impossible_settings_are_refused(conf, match):
    with pytest.raises(ConfigError, match=match):
        config_of("bljust", conf)
