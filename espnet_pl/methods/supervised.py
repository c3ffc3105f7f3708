r"""Supervised training: the baseline, the seed and the oracle.

Source: ESPnet's own training criterion, unchanged.
Equation: L = L_sup, for instance w · L_ctc + (1 − w) · L_att.
Differs from the paper: there is none; the numbers equal those of stock ESPnet.
Cost: one training pass per labelled utterance.
"""

from dataclasses import dataclass

from espnet_pl.methods import base


@dataclass(frozen=True)
class Config:
    """Nothing to set."""


class Method(base.Method):
    """Learns from labelled speech only."""
