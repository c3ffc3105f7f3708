"""parts/monitor: what is a collapse, what is not, and since when."""

import pytest
import torch

from espnet_pl.parts.monitor import LIMITS, Monitor

WELL = {
    "student_blank_share": 0.9,
    "student_frame_entropy": 0.06,
    "student_token_entropy": 0.45,
    "student_length_ratio": 1.1,
    "student_loops": 0.02,
    "label_churn": 0.2,
}


def watch(monitor, updates, noise=0.0, seed=0, **changes):
    """The alarms, by the unlabelled update that raised them."""
    g = torch.Generator().manual_seed(seed)
    alarms = {}
    for update in range(updates):
        values = {
            name: value * (1 + noise * float(torch.randn((), generator=g)))
            for name, value in {**WELL, **changes}.items()
            if value is not None
        }
        if alarm := monitor.see(values):
            alarms[update] = alarm
    return alarms


def test_what_is_usual_raises_no_alarm_however_it_varies():
    for seed in range(20):
        monitor = Monitor()
        assert watch(monitor, 3000, noise=0.03, seed=seed) == {}
        assert monitor.healthy


@pytest.mark.parametrize(
    "name, value",
    [
        ("student_blank_share", 1.0), ("student_blank_share", 0.0), ("student_frame_entropy", 0.8),
        ("student_token_entropy", 0.1), ("student_length_ratio", 0.4),
        ("student_length_ratio", 1.9), ("student_loops", 0.4), ("label_churn", 1.5),
    ],
)  # fmt: skip
def test_each_quantity_alone_raises_an_alarm_and_says_why(name, value):
    monitor = Monitor()
    watch(monitor, 60, noise=0.02)
    alarms = watch(monitor, 200, **{name: value})
    assert len(alarms) == 1  # once, not in every update from then on
    update, words = next(iter(alarms.items()))
    assert 24 <= update < 100
    was = float(words.partition("it was ")[2].partition(",")[0])
    assert words.startswith(name) and was == pytest.approx(WELL[name], abs=0.02)
    assert not monitor.healthy


@pytest.mark.parametrize("name", ["student_frame_entropy", "student_loops", "label_churn"])
def test_less_of_what_may_grow_is_no_harm(name):
    monitor = Monitor()
    watch(monitor, 60)
    assert watch(monitor, 300, **{name: 0.0}) == {}


def test_a_moment_is_no_collapse():
    monitor = Monitor()
    watch(monitor, 60)
    for _ in range(20):
        assert watch(monitor, 3, student_blank_share=0.2) == {}
        assert watch(monitor, 60) == {}


def test_it_rises_again_after_it_was_put_back():
    monitor = Monitor()
    watch(monitor, 60)
    assert len(watch(monitor, 100, student_loops=0.9)) == 1
    monitor.forgive()
    assert monitor.healthy
    assert watch(monitor, 100) == {}
    assert len(watch(monitor, 100, student_loops=0.9)) == 1


def test_a_quantity_that_is_not_there_is_as_usual():
    monitor = Monitor()
    assert watch(monitor, 300, student_length_ratio=None) == {}
    assert monitor.healthy


def test_a_student_that_says_nothing_yet_is_not_taken_for_usual():
    monitor = Monitor()
    nothing = {"student_length_ratio": 0.0, "student_blank_share": 1.0, "label_churn": 0.0}
    babble = {"student_blank_share": 0.1, "student_loops": 0.5, "student_token_entropy": 3.0}
    assert watch(monitor, 40, **babble) == watch(monitor, 500, **nothing) == {}
    assert not monitor.healthy
    assert watch(monitor, 500) == {}  # it has begun to speak
    assert monitor.healthy
    assert watch(monitor, 100, **nothing)  # and stops: it was well before


def test_labels_that_are_drawn_at_random_change_each_time():
    monitor = Monitor()
    assert watch(monitor, 60, label_churn=0.8) == watch(monitor, 100, label_churn=0.9) == {}
    assert len(watch(monitor, 100, label_churn=1.5)) == 1


def test_what_is_seldom_told_is_learnt_and_judged_by_what_was_told():
    monitor = Monitor()
    seldom = {"label_churn": None}
    for churn in [0.2] * 60 + [0.3] * 20:
        assert watch(monitor, 1, label_churn=churn) == watch(monitor, 9, **seldom) == {}
    told = []
    for number in range(80):
        told += [number] * len(watch(monitor, 1, label_churn=1.5))
        assert watch(monitor, 9, **seldom) == {}  # nothing new is no more of it
    assert len(told) == 1 and 25 <= told[0] < 60


def test_a_checkpoint_knows_what_is_usual():
    monitor, again = Monitor(), Monitor()
    watch(monitor, 60)
    watch(monitor, 10, student_blank_share=0.0)
    again.load_state_dict(monitor.state_dict())
    one, two = (watch(m, 60, student_blank_share=0.0) for m in (monitor, again))
    assert one == two and len(one) == 1
    assert all(isinstance(x, torch.Tensor) for x in monitor.state_dict().values())


def test_impossible_settings():
    with pytest.raises(ValueError, match="patience is 0"):
        Monitor(patience=0)
    assert all(len(limit) == 4 for limit in LIMITS.values())
