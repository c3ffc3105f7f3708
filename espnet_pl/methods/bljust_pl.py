r"""BL-JUST with pseudo-labels: labelled speech is learnt among models that agree with a teacher.

Source: our extension of methods/bljust.py (arXiv:2401.06980), where the condition is a
    self-supervised loss; it is that of momentum pseudo-labelling here (methods/mpl.py,
    arXiv:2106.08922).
Equation: with the student θ, and the moving average φ of it,
    min_θ L_sup(θ)   such that   θ ∈ argmin L_un(θ; φ),   L_un = − log p_θ(ŷ|strong(x)),
    ŷ = greedy(φ, weak(x)),   φ ← α φ + (1 − α) θ after each update;
    a joint update goes along (a ∇L_sup + γ_k b λ ∇L_un) / max(1, γ_k) with a growing γ_k, one of
    exploration along b λ ∇L_un (methods/bilevel.py).  λ and what is learnt of ŷ, hard labels unless
    it is said otherwise, are those of all pseudo-labelling (methods/pseudo_labelling.py).
    Both losses are nats of a transcript, so γ = 1 is as much of each.  γ weighs gradients; what is
    logged as ``loss`` is a/m · L_sup + b λ · L_un.
Differs from the paper: the condition is on the whole model, not on its encoder, and moves with φ,
    which is a constant in each update: that L_un has a minimum which is one is not known here.
Unverified: whether a growing weight is better than a constant one (growth: 0); see
    docs/studies/bljust.md.
Cost: a joint update is two training passes and one forward pass of the teacher; exploration one of
    each.
"""

from dataclasses import dataclass
from typing import ClassVar

from espnet_pl.methods import base
from espnet_pl.methods.bilevel import Bilevel, BilevelConfig
from espnet_pl.methods.pseudo_labelling import OwnTeacher, OwnTeacherConfig
from espnet_pl.parts.gradients import weighed
from espnet_pl.parts.teacher import Teacher


@dataclass(frozen=True)
class Config(BilevelConfig, OwnTeacherConfig):
    """Fields that are not set keep these values."""

    together: ClassVar[bool] = True  # what every pairing of this method is
    unlabelled: ClassVar[int] = 1
    decay: float = 0.99  # α

    def __post_init__(self) -> None:
        BilevelConfig.__post_init__(self)
        OwnTeacherConfig.__post_init__(self)


class Method(Bilevel, OwnTeacher):
    """Every unlabelled batch is labelled by the moving average, in the update that uses it."""

    def __init__(self, config, student, resources):
        super().__init__(config, student, resources)
        self.teacher = Teacher(student, config.decay, config.decay_warmup)

    def unlabelled(self, student, x):
        terms = super().unlabelled(student, x)
        for name, term in terms.items():
            if term.weight:
                value = weighed(term.value, self.penalty)
                terms[name] = base.Term(value, self.config.lower_weight * term.weight, term.count)
        return terms
