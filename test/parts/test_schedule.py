"""parts/schedule: dropout changes everywhere, and really drops; a penalty grows."""

import pytest
import torch
from torch import nn

from espnet_pl.parts.schedule import ramp, set_dropout


def test_every_dropout_layer_changes():
    net = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout1d(0.3)), nn.Linear(2, 2))
    set_dropout(net, 0.0)
    assert torch.equal(net[0](torch.ones(100)), torch.ones(100))
    assert net[1][0].p == 0.0
    set_dropout(net, 0.9)
    assert (net[0](torch.ones(1000)) == 0).float().mean() > 0.8


def test_a_penalty_grows_by_as_much_in_each_update_and_not_beyond_its_maximum():
    by_hand = [0.1, 0.35, 0.6, 0.85, 1.0, 1.0]
    assert [ramp(0.1, 0.25, 1.0, k) for k in range(6)] == pytest.approx(by_hand)
    assert ramp(0.1, 0.25, 1.0, 5) == 1.0
    assert [ramp(0.3, 0.0, 0.5, k) for k in (0, 1, 10**6)] == [0.3] * 3
