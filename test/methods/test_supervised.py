"""methods/supervised: the student's own criterion, and nothing else."""

import torch

from espnet_pl.methods.registry import build
from test.toys import batch, speaking_student


def test_the_objective_is_the_students_own_criterion():
    student = speaking_student().eval()
    x = batch(unlabelled=False)
    terms = build("supervised", {}, student)(student, x)
    torch.testing.assert_close(terms["supervised"].value, student.supervised(x.labelled)[0])
    assert [t.weight for t in terms.values()] == [1.0, 0.0]
    assert terms["supervised"].count == 3
