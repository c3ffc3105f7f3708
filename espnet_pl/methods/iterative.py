r"""Pseudo-labelling by rounds: label everything, train, let the student become the teacher, repeat.

Source: the classic self-training loop, e.g. Xu et al., "Iterative Pseudo-Labeling for Speech
    Recognition", arXiv:2005.09267 (abstract), and Park et al., "Improved Noisy Student Training",
    arXiv:2005.09629 (abstract).
Equation: in round r = 0, 1, …:  L = L_sup on N_L and λ · L_u on N_U of N_L + N_U updates,
    L_u = − log p_θ(ŷ|strong(x)),  ŷ = greedy(θ_r, weak(x)),  θ_r = θ at the start of round r.
Differs from the paper: no language model; labels are not written to disk but made anew from θ_r
    when a batch is used (the same labels: θ_r does not move within a round); the student goes on
    from where it is, it is not trained from scratch in each round.
Cost: per unlabelled update one training pass and one forward pass of the teacher.
"""

from dataclasses import dataclass

from espnet_pl.methods.pseudo_labelling import OwnTeacher, PseudoLabellingConfig
from espnet_pl.parts.teacher import Teacher


@dataclass(frozen=True)
class Config(PseudoLabellingConfig):
    """Fields that are not set keep these values; none of them is a paper's."""

    labelled: int = 1  # N_L
    unlabelled: int = 1  # N_U
    round_steps: int = 1000  # updates of a round

    def __post_init__(self) -> None:
        if self.round_steps < 1:
            raise ValueError("round_steps must be at least 1")
        super().__post_init__()


class Method(OwnTeacher):
    """The teacher is a snapshot that changes only between rounds."""

    follows = False

    def __init__(self, config, student, resources):
        super().__init__(config, student, resources)
        self.teacher = Teacher(student, decay=0.0)

    def after_step(self, student):
        super().after_step(student)
        if self.step % self.config.round_steps == 0:
            self.teacher.copy(student)
