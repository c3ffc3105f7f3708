"""methods/iterative: the teacher changes between rounds and only there."""

import pytest
import torch

from espnet_pl.methods.base import ConfigError
from espnet_pl.methods.registry import build, config_of
from test.toys import batch, speaking_student


def test_the_teacher_is_the_student_at_the_start_of_its_round():
    student = speaking_student()
    method = build("iterative", {"round_steps": 3}, student)
    method(student, batch())
    seen = []
    for _ in range(6):
        with torch.no_grad():
            student.out.bias += 1
        method.after_step(student)
        seen.append(float(student.out.bias.detach()[0] - method.teacher.network.out.bias[0]))
    assert seen == pytest.approx([1, 2, 0, 1, 2, 0], abs=1e-5)


def test_a_round_needs_updates():
    with pytest.raises(ConfigError, match="round_steps"):
        config_of("iterative", {"round_steps": 0})
