"""What methods share in which labelled speech is learnt under a condition on another loss.

    F_γ = L_sup + γ · L_un;  with m = max(1, γ_k) and weights a, b, a joint update k goes along
    (a ∇L_sup + γ_k b ∇L_un) / m,   γ_k = min(γ_max, γ_0 + k · growth)
    and an update of exploration along b ∇L_un.

Sources and what differs from them: methods/bljust.py.
"""

from dataclasses import dataclass

import torch

from espnet_pl.methods import base
from espnet_pl.parts.schedule import ramp


@dataclass(frozen=True)
class BilevelConfig:
    """Names of the authors' code beside the fields that have one."""

    # Updates (with accum_grad, batches), in turn: so many of exploration, so many joint ones (0:
    # all that follow).
    explore: int = 4  # in passes                                pre_ep
    joint: int = 1
    gamma: float = 0.0  # γ_0                                    gamma_init
    growth: float = 0.002  # of γ, in a joint update; an epoch   step_gam
    gamma_max: float = 1.0  #                                    gamma_max
    upper_weight: float = 1.0  # a, of the supervised loss
    lower_weight: float = 1.0  # b, of the other one

    def __post_init__(self) -> None:
        for name in ("gamma", "growth", "gamma_max"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}, it must not be negative")
        if self.gamma > self.gamma_max:
            raise ValueError(f"gamma is {self.gamma}, more than gamma_max: {self.gamma_max}")
        for name in ("upper_weight", "lower_weight"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}, it must be positive")


class Bilevel(base.Method):
    """γ, and what it makes of the supervised loss.  Its ``Config`` is a ``BilevelConfig``."""

    def __init__(self, config, student, resources):
        super().__init__(config, student, resources)
        self.register_buffer("joint", torch.zeros((), dtype=torch.long))  # k, joint updates made
        self.both = False  # whether the present update is joint

    @property
    def gamma(self) -> float:
        """γ of the present update."""
        config = self.config
        return ramp(config.gamma, config.growth, config.gamma_max, int(self.joint))

    @property
    def penalty(self) -> float:
        """What the gradient of the other loss is multiplied with: γ/m, in exploration 1."""
        return self.gamma / max(1.0, self.gamma) if self.both else 1.0

    def forward(self, student, batch):
        self.both = batch.labelled is not None and batch.unlabelled is not None
        terms = super().forward(student, batch)
        if self.both:
            terms |= base.diagnostics({"gamma": self.gamma}, len(batch.unlabelled))
        return terms

    def labelled(self, student, x):
        terms = super().labelled(student, x)
        loss, weight = terms["supervised"], self.config.upper_weight / max(1.0, self.gamma)
        return terms | {"supervised": base.Term(loss.value, weight, loss.count)}

    def after_step(self, student):
        super().after_step(student)
        self.joint += self.both
