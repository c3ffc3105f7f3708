r"""Momentum pseudo-labelling (MPL): an online model and its momentum-averaged offline teacher.

Source: Higuchi, Moritz, Le Roux, Hori, "Momentum Pseudo-Labeling for Semi-Supervised Speech
    Recognition", arXiv:2106.08922 (abstract); the choice of the momentum by a half-life from
    public code (Mu-Y/mpl-mdd) and recollection, not from the paper's text.
Equation: L = L_sup on N_L and λ · L_u on N_U of N_L + N_U updates,
    L_u = − log p_ξ(ŷ|strong(x)),  ŷ = greedy(φ, weak(x)),
    φ ← α φ + (1 − α) ξ after each update,  α = w^(1/K).
Differs from the paper: labelled and unlabelled batches come in turn at a fixed ratio, not mixed
    by chance; unusable labels are dropped.  Unverified: what K counts; here it is ``horizon``,
    the number of updates after which a share w of the starting weights is left.
Cost: per unlabelled update one training pass and one forward pass of the teacher.
"""

from dataclasses import dataclass

from espnet_pl.methods.pseudo_labelling import OwnTeacher, PseudoLabellingConfig
from espnet_pl.parts.teacher import Teacher


@dataclass(frozen=True)
class Config(PseudoLabellingConfig):
    """Fields that are not set keep these values."""

    labelled: int = 1  # N_L
    unlabelled: int = 1  # N_U
    remaining: float = 0.5  # w, share of the starting weights left after ``horizon`` updates
    horizon: int = 1000  # K, updates

    def __post_init__(self) -> None:
        if not 0.0 < self.remaining < 1.0:
            raise ValueError(f"remaining is {self.remaining}, it must lie in (0, 1)")
        if self.horizon < 1:
            raise ValueError("horizon must be at least 1")
        super().__post_init__()


class Method(OwnTeacher):
    """Every unlabelled batch is labelled by the moving average, in the update that uses it."""

    def __init__(self, config, student, resources):
        super().__init__(config, student, resources)
        self.teacher = Teacher(student, config.remaining ** (1 / config.horizon))
