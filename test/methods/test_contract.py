"""The promises every method keeps; a new file in ``methods/`` is tested without registration."""

import copy

import pytest
import torch

from espnet_pl.methods.base import ConfigError, Method
from espnet_pl.methods.registry import build, config_of, methods, module_of
from test.toys import VOCABULARY, ToyLanguageModel, batch, speaking_student


@pytest.fixture(params=methods())
def name(request):
    return request.param


def resources(name):
    """What a method of that name cannot do without."""
    given, method = {}, module_of(name).Method
    if "language_model" in method.needs(config_of(name, {})):
        given["language_model"] = ToyLanguageModel()
    if method.taught:
        given |= {"teacher": speaking_student(seed=7), "teacher_tokens": VOCABULARY}
    return given


@pytest.fixture
def pair(name):
    student = speaking_student()
    return student, build(name, {}, student, resources(name))


def learns_from_unlabelled(method):
    return method.pairing(method.config).unlabelled > 0


def first_batch(method, **kwargs):
    """A batch the method can use: its unlabelled speech has entered the cache."""
    if method.pairing(method.config).capacity:
        method(speaking_student(), batch(labelled=False, unlabelled=False, fresh=True))
    return batch(unlabelled=learns_from_unlabelled(method), **kwargs)


def total(terms):
    return sum(t.weight * t.value for t in terms.values())


def updated(student, method, steps, start=0):
    """Train for some steps, as the bridge does; the same steps give the same result."""
    optimizer = torch.optim.Adam([*student.parameters(), *method.learns()], lr=0.01)
    optimizer.register_step_post_hook(lambda *_: method.after_step(student))
    for step in range(start, start + steps):
        torch.manual_seed(step)
        student.train()
        method.train()
        optimizer.zero_grad()
        total(method(student, first_batch(method, seed=step % 2))).backward()
        optimizer.step()


def test_unlabelled_speech_moves_the_student(pair):
    student, method = pair
    if not learns_from_unlabelled(method):
        assert method.pairing(method.config).unlabelled == 0
        return
    first_batch(method)
    # Of this speech, a token is said in two utterances, one of which says another one, too.
    total(method(student, batch(labelled=False, seed=1))).backward()
    assert student.hidden.weight.grad.abs().sum() > 0


def test_no_gradient_reaches_the_method_s_own_copies(pair):
    student, method = pair
    total(method(student, first_batch(method))).backward()
    learnt = {id(p) for p in method.learns()}
    assert all((p.grad is not None) == (id(p) in learnt) for p in method.parameters())


def test_nothing_the_method_keeps_hides_what_methods_do(pair):
    _, method = pair
    promised = [key for key, value in vars(Method).items() if callable(value)]
    assert all(callable(getattr(method, key)) for key in promised)


def test_what_the_method_learns_is_trained_and_kept(pair):
    student, method = pair
    updated(student, method, 1)  # past the start
    own = method.learns()
    assert {id(p) for p in own} <= {id(p) for p in method.parameters()}
    assert not {id(p) for p in own} & {id(p) for p in student.parameters()}
    before = [p.detach().clone() for p in own]
    updated(student, method, 3, start=1)
    assert all(not torch.equal(p, old) for p, old in zip(own, before))


def test_labels_are_made_in_the_weak_view_and_learnt_in_the_strong_one(pair):
    student, method = pair
    student.train()
    student.views.clear()
    method(student, first_batch(method))
    trained = [view for view in student.views if view]
    assert len(trained) == 1 + learns_from_unlabelled(method)
    assert student.training and student.dropout.training


def test_the_method_s_own_copies_follow_in_after_step_and_only_there(pair):
    student, method = pair
    method(student, first_batch(method))
    before = {name: p.clone() for name, p in method.named_parameters()}
    with torch.no_grad():
        student.out.weight += 1
    method.step += 1  # past the start
    method(student, first_batch(method))
    assert all(torch.equal(p, before[n]) for n, p in method.named_parameters())


def test_a_seed_loaded_after_building_is_what_copies_start_from(pair):
    student, method = pair
    with torch.no_grad():
        student.out.weight += 1
        student.norm.running_mean += 1
    method(student, first_batch(method))
    state = method.state_dict()
    for key, value in state.items():
        if key.endswith("out.weight"):
            assert torch.equal(value, student.out.weight)


def test_either_half_may_be_missing(pair):
    student, method = pair
    assert "supervised" in method(student, batch(unlabelled=False))
    if learns_from_unlabelled(method):
        first_batch(method)
        assert "supervised" not in method(student, batch(labelled=False))


def test_the_whole_is_the_sum_of_the_halves(pair):
    student, method = pair
    student.eval()
    both = first_batch(method)
    torch.manual_seed(0)  # what is drawn is the same
    whole = total(method(student, both))
    halves = total(method(student, batch(unlabelled=False)))
    if learns_from_unlabelled(method):
        torch.manual_seed(0)
        halves = halves + total(method(student, batch(labelled=False)))
    torch.testing.assert_close(whole, halves)


def test_a_restored_run_continues_exactly(name, pair):
    student, method = pair
    updated(student, method, 3)
    kept = copy.deepcopy((student.state_dict(), method.state_dict()))
    updated(student, method, 3, start=3)

    restored_student = speaking_student(seed=1)
    restored = build(name, {}, restored_student, resources(name))
    restored_student.load_state_dict(kept[0])
    restored.load_state_dict(kept[1])
    updated(restored_student, restored, 3, start=3)
    expected, found = flat(method.state_dict()), flat(restored.state_dict())
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[k], found[k]) for k in expected)
    for key, value in student.state_dict().items():
        assert torch.equal(value, restored_student.state_dict()[key])


def test_everything_in_a_checkpoint_is_a_tensor(pair):
    student, method = pair
    updated(student, method, 2)
    assert all(isinstance(v, torch.Tensor) for v in flat(method.state_dict()).values())


def test_steps_are_counted(pair):
    student, method = pair
    updated(student, method, 2)
    assert method.step == 2


def test_every_term_is_a_scalar_with_a_count_and_diagnostics_have_no_gradient(pair):
    student, method = pair
    for term in method(student, first_batch(method)).values():
        assert term.value.shape == () and term.count >= 0
        assert term.weight or not term.value.requires_grad


def test_an_unknown_option_is_refused_and_the_nearest_named(name):
    fields = config_of(name, {}).__dataclass_fields__
    if not fields:
        with pytest.raises(ConfigError, match="known: none"):
            config_of(name, {"weight": 1})
        return
    field = next(iter(fields))
    with pytest.raises(ConfigError, match=f"did you mean '{field}'"):
        config_of(name, {field + "x": 1})


def test_a_wrong_type_is_refused_by_name(name):
    for field in config_of(name, {}).__dataclass_fields__:
        with pytest.raises(ConfigError, match=field):
            config_of(name, {field: ["no", "list"]})


def test_a_student_that_cannot_answer_is_refused_at_start(name):
    student = speaking_student()
    student.answers = frozenset()
    if module_of(name).Method.requires:
        with pytest.raises(ConfigError, match="asks the student for"):
            build(name, {}, student)


def flat(state, prefix=""):
    """A state dictionary without nesting."""
    out = {}
    for key, value in state.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out
