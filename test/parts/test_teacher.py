"""parts/teacher: closed form of the average, buffers, precision, modes."""

import pytest
import torch
from torch import nn

from espnet_pl.parts.teacher import Teacher, weak_view


class Net(nn.Module):
    def __init__(self, value=0.0, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), value, dtype=dtype))
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("constant", torch.zeros(1, dtype=dtype))


def set_to(net, value):
    with torch.no_grad():
        net.weight.fill_(value)
        net.norm.running_mean.fill_(value)
        net.norm.num_batches_tracked.fill_(int(value))
        net.constant.fill_(value)


def test_equals_the_closed_form():
    net, decay = Net(), 0.9
    teacher = Teacher(net, decay)
    teacher.copy(net)
    expected = 0.0
    for value in (1.0, 2.0, 5.0):
        set_to(net, value)
        teacher.follow(net)
        expected = decay * expected + (1 - decay) * value
        torch.testing.assert_close(teacher.network.weight.data, torch.full((2,), expected))
        torch.testing.assert_close(teacher.network.norm.running_mean, torch.full((2,), expected))
        assert teacher.network.norm.num_batches_tracked == int(value)


def test_warmup_follows_fast_at_first():
    net = Net()
    teacher = Teacher(net, decay=0.99, warmup=10)
    teacher.copy(net)
    expected = 0.0
    for k in range(1, 2000):
        set_to(net, 1.0)
        teacher.follow(net)
        d = min(0.99, (1 + k) / (10 + k))
        expected = d * expected + (1 - d)
        if k in (1, 5, 100):
            torch.testing.assert_close(teacher.network.weight.data, torch.full((2,), expected))
    assert (1 + 5) / (10 + 5) < 0.99


def test_decay_0_is_a_snapshot_and_decay_1_is_frozen():
    net = Net()
    snapshot, frozen = Teacher(net, 0.0), Teacher(net, 1.0)
    for teacher in (snapshot, frozen):
        teacher.copy(net)
    set_to(net, 3.0)
    for teacher in (snapshot, frozen):
        teacher.follow(net)
    assert (snapshot.network.weight == 3).all() and (frozen.network.weight == 0).all()


def test_copy_starts_anew():
    net = Net()
    teacher = Teacher(net, 0.5)
    set_to(net, 4.0)
    teacher.copy(net)
    assert (teacher.network.weight == 4).all() and (teacher.network.constant == 4).all()
    set_to(net, 6.0)
    teacher.follow(net)
    assert (teacher.network.weight == 5).all()


def test_half_precision_students_have_a_single_precision_average():
    net = Net(1.0, torch.bfloat16)
    teacher = Teacher(net, 0.999)
    teacher.copy(net)
    set_to(net, 2.0)
    for _ in range(100):
        teacher.follow(net)
    assert teacher.network.weight.dtype == torch.float32
    # In bfloat16, 1 + 0.001 is 1: the average would never have moved.
    torch.testing.assert_close(teacher.network.weight.data, torch.full((2,), 2 - 0.999**100))


def test_always_in_eval_mode_and_never_with_a_gradient():
    teacher = nn.ModuleList([Teacher(Net())]).train()[0]
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())


def test_the_copy_is_a_copy():
    net = Net()
    teacher = Teacher(net)
    set_to(net, 1.0)
    assert (teacher.network.weight == 0).all() and net.weight.requires_grad


def test_the_count_of_updates_survives_a_restart():
    net = Net()
    teacher = Teacher(net, 0.99, warmup=10)
    teacher.copy(net)
    set_to(net, 1.0)
    for _ in range(3):
        teacher.follow(net)
    restored = Teacher(Net(), 0.99, warmup=10)
    restored.load_state_dict(teacher.state_dict())
    teacher.follow(net)
    restored.follow(net)
    assert torch.equal(teacher.network.weight, restored.network.weight)


@pytest.mark.parametrize("bad", [dict(decay=-0.1), dict(decay=1.1), dict(warmup=-1)])
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Teacher(Net(), **bad)


def test_weak_view_restores_every_mode_and_has_no_gradient():
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Sequential(nn.Dropout()))
    net.train()
    net[1].eval()
    with pytest.raises(RuntimeError, match="stop"), weak_view(net):
        assert not any(m.training for m in net.modules())
        assert not net[0](torch.ones(1, 2)).requires_grad
        raise RuntimeError("stop")
    assert net.training and not net[1].training and net[2][0].training
