"""Numbers that depend on the step."""

from torch import nn


def ramp(start: float, growth: float, most: float, k: int) -> float:
    """γ_k = min(γ_max, γ_0 + k · growth): a penalty that grows by as much in each update.

    A function of the count alone, and no sum of its own: after a restart it is the same to the last
    bit, also where ESPnet keeps a model's numbers in half precision.
    """
    return min(most, start + k * growth)


def set_dropout(network: nn.Module, rate: float) -> None:
    """Give every dropout layer of the network this rate.

    'Dynamic dropout' of slimIPL: high while only the few labelled utterances are
    seen, low once pseudo-labels come in (arXiv:2010.11524; the released
    configurations go from 0.5 or 0.3 to 0.1).
    """
    for module in network.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = rate
