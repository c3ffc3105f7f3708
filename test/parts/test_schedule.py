"""parts/schedule: dropout changes everywhere, and really drops."""

import torch
from torch import nn

from espnet_pl.parts.schedule import set_dropout


def test_every_dropout_layer_changes():
    net = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout1d(0.3)), nn.Linear(2, 2))
    set_dropout(net, 0.0)
    assert torch.equal(net[0](torch.ones(100)), torch.ones(100))
    assert net[1][0].p == 0.0
    set_dropout(net, 0.9)
    assert (net[0](torch.ones(1000)) == 0).float().mean() > 0.8
