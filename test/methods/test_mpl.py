"""methods/mpl: the momentum teacher labels, and only it."""

import pytest
import torch

from espnet_pl.methods.base import ConfigError
from espnet_pl.methods.registry import build, config_of
from espnet_pl.parts.pseudo_labels import propose
from test.toys import batch, speaking_student, utterances


def test_a_share_of_the_starting_weights_is_left_after_the_horizon():
    student = speaking_student()
    method = build("mpl", {"remaining": 0.25, "horizon": 8}, student)
    method(student, batch())
    start = student.out.bias.detach().clone()
    with torch.no_grad():
        student.out.bias.zero_()
    for _ in range(8):
        method.after_step(student)
    torch.testing.assert_close(method.teacher.network.out.bias.data, 0.25 * start)


def test_labels_come_from_the_teacher_not_from_the_student():
    student = speaking_student()
    method = build("mpl", {}, student)
    x = utterances(text=False, prefix="u", seed=100)
    said = propose(student, x).labels
    method(student, batch(labelled=False))
    method.after_step(student)
    with torch.no_grad():
        student.out.bias[0] += 100
    method(student, batch(labelled=False))
    assert [method.cache.get(i) for i in x.utt_id] == said
    assert propose(student, x).labels == [[], [], []]


@pytest.mark.parametrize("bad", [dict(remaining=1.0), dict(horizon=0), dict(unlabelled=-1)])
def test_impossible_settings_are_refused_by_name(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        config_of("mpl", bad)
