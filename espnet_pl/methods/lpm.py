r"""Local prior matching (LPM): a language model teaches, inside each utterance's own beam.

Source: Hsu, Lee, Synnaeve, Hannun, "Semi-Supervised Speech Recognition via Local Prior Matching",
    arXiv:2002.10336 (abstract, and descriptions of the paper by others); details from the authors'
    code, flashlight/wav2letter recipes/local_prior_match (Train_lpm.cpp, Utils.cpp, *.cfg), and the
    ablations from experimental/localPriorMatch there, both as described by others.
Equation: L = L_sup on N_L and λ · L_u on N_U of N_L + N_U updates.  With the hypotheses B(x) of a
    proposal model φ that hears weak(x), and y of whole sentences, with their ends,
    L_u = − Σ_{y∈B(x)} p̄(y|x) log q_θ(y|strong(x)),   p̄(y|x) ∝ p_LM(y)^κ over B(x)
    B(x) is without what is empty, what is much longer or shorter than the greedy hypothesis ŷ of φ,
        ⌊(1 − b)(|ŷ| + 1)⌋ ≤ |y| + 1 ≤ ⌈(1 + b)(|ŷ| + 1)⌉,
    and what φ or the language model cannot score.  φ is frozen, the moving average of θ, or θ as
    it was when validation last found it better than the φ before.
    weights: uniform, p̄ = 1/|B|; shuffled, the same numbers of other hypotheses; teacher_and_lm,
    p̄ ∝ p_φ(y|x)^s p_LM(y)^κ.  direction: reversed, KL(v ‖ p̄) with v ∝ q_θ(y|x)^s over B(x).
Differs from the paper: the student may be of any kind that scores sequences: log q is its training
    criterion's, CTC's or a transducer's full sum or a sum with the attention decoder's.  The
    beam is that of the student's ``propose``; the lengths of the greedy hypotheses are those of the
    present φ, not of the first one.  φ starts as the student, where the paper's student starts from
    a model that is trained more lightly.  The criterion that chooses the best epoch decides who is
    better, after each epoch, where the code counts token errors each 1000 updates.  L_u is a mean
    over the utterances that have a hypothesis left, where the code divides by all.  There, KL
    reversed is −Σ q(y) A(y) with A = log p_LM less its minimum over the beam, plus a margin.
    Hypotheses that differ only in how a text is cut into pieces are different ones, as there.
    Several models and speeds may propose (teachers, weak_speeds): then B(x) is of all of them, so
    larger than ``beam``, p_φ is their mean opinion, and ŷ their consensus, which with a beam of one
    is all of B(x), or hypotheses would be chosen there, too.
    Unverified, for the paper's text was not at hand: everything that is from the code.
Cost: per unlabelled update one training pass, a beam search of φ without gradient, and a score of
    each hypothesis by the student and, where it is new, by the language model; with proposal:
    better, one more validation in the first epoch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from espnet_pl.losses.distillation import posterior
from espnet_pl.methods import base
from espnet_pl.methods.pseudo_labelling import OwnTeacher, OwnTeacherConfig
from espnet_pl.parts.cache import Record
from espnet_pl.parts.decoding import pad
from espnet_pl.parts.hypotheses import likeliest, shuffled
from espnet_pl.parts.objectives import Objectives
from espnet_pl.parts.pseudo_labels import Labels, mixed
from espnet_pl.parts.teacher import Teacher

# Hypotheses, and why they are no part of B(x).
DROPPED = ("empty", "without_score", "same", "length", "no_text", "too_long")


@dataclass(frozen=True)
class Config(OwnTeacherConfig):
    """Fields that are not set keep these values; names of the released flags beside them."""

    labelled: int = 1  # N_L
    unlabelled: int = 4  # N_U; the released configuration draws 6400 to 1600
    weight: float = 0.2  # λ                                    lmweight
    hard: float = 0.0  # also −log q of the likeliest of p̄
    sequences: float = 1.0
    beam: int = 4  # |B| at most, of one proposal model         lpmBeamsz
    kappa: float = 1.0  # κ; not in the paper, where it is 1
    length_band: float | None = 0.05  # b; None: any length     hyplenratiolb, hyplenratioub
    weights: Literal["lm", "uniform", "shuffled", "teacher_and_lm"] = "lm"
    proposal: Literal["better", "frozen", "ema"] = "better"  #  propupdate
    label: Literal["best"] = "best"

    def __post_init__(self) -> None:
        for name in ("soft", "lattice", "ranking", "full_sum", "discriminative", "risk"):
            if getattr(self, name):
                raise ValueError(f"{name} is of the teacher's own opinion: see slimipl")
        if self.opinion != "posterior":
            raise ValueError("opinion is of the teacher; here, weights: shuffled")
        if self.confidence != "none" or self.least_confidence:
            raise ValueError("confidence is of the teacher's frames: see slimipl")
        if not self.sequences > 0:
            raise ValueError(f"sequences is {self.sequences}, it must be positive")
        if not 0 <= self.kappa < math.inf:
            raise ValueError(f"kappa is {self.kappa}, it must not be negative")
        if self.length_band is not None and not 0 <= self.length_band < 1:
            raise ValueError(f"length_band is {self.length_band}, it must lie in [0, 1)")
        super().__post_init__()

    def band(self, greedy: int) -> tuple[float, float]:
        """The fewest and the most tokens of a hypothesis.

        Args:
            greedy: tokens of the greedy hypothesis; if it is empty, no hypothesis is left.
        """
        if self.length_band is None:
            return 1, math.inf
        if not greedy:
            return 1, 0
        # Less a little: 1.1 times 10 is more than 11 to a computer.
        whole, more = greedy + 1, self.length_band * (greedy + 1)
        return math.floor(whole - more + 1e-9) - 1, math.ceil(whole + more - 1e-9) - 1


class Method(OwnTeacher):
    """The proposal model is ``teacher``: it may be exported."""

    requires = frozenset({"score", "propose"})
    uses = frozenset({"truth", "teachers", "language_model"})

    def __init__(self, config, student, resources):
        super().__init__(config, student, resources)
        if "frame_log_probs" not in student.answers:
            if config.hypotheses == "sampled":
                raise base.ConfigError(
                    "hypotheses: sampled are drawn from the frames of a CTC layer, which the "
                    "student does not have; hypotheses: search"
                )
            if config.frame_entropy or config.token_entropy:
                raise base.ConfigError(
                    "frame_entropy and token_entropy are of the frames of a CTC layer, which the "
                    "student does not have: leave them out"
                )
        decay = config.decay if config.proposal == "ema" else 1.0
        self.teacher = Teacher(student, decay, config.decay_warmup)
        self.follows = config.proposal == "ema"
        # Of the proposal model in validation; infinite as long as it is not known.
        self.register_buffer("best", torch.full((), math.inf, dtype=torch.float64))
        self.register_buffer("replaced", torch.zeros((), dtype=torch.long))

    @classmethod
    def needs(cls, config):
        return frozenset() if config.weights == "uniform" else frozenset({"language_model"})

    @property
    def validates(self) -> bool:
        """Whether validation decides who proposes."""
        return self.config.proposal == "better"

    def rival(self):
        return self.teacher.network if self.validates and self.best.isinf() else None

    def validated(self, student, mine, rivals):
        if rivals is not None and math.isfinite(rivals):
            self.best.fill_(rivals)
        if mine < self.best:
            self.teacher.copy(student)
            self.best.fill_(mine)
            self.replaced += 1

    def _said(self, student, x, how):
        """The proposals of all teachers, with the local prior in place of their opinions."""
        greedy = "frame_log_probs" in self.proposer(student).answers
        ask = Objectives(
            hard=0.0, sequences=1.0, beam=how.beam, label="greedy" if greedy else "best",
            hypotheses=how.hypotheses, sampling=how.sampling, scale=how.scale,
        )  # fmt: skip
        made = super()._said(student, x, ask)
        records = made.records
        several = len(self.config.weak_speeds) > 1 or self.resources.get("teachers")
        if how.beam == 1 and several:
            records = [own | mixed([], [y]) for own, y in zip(records, made.labels)]
        records = self._with_prior(made.labels, records)
        return Labels(likeliest(records), made.statistics, records)

    def _with_prior(self, greedy: Sequence[list[int]], records: Sequence[Record]) -> list[Record]:
        """The hypotheses of each utterance that are left, with log p̄, the likeliest first.

        Args:
            greedy: the hypothesis that says how long the others are, of each utterance.
        """
        flat: list[list[int]] = []
        opinion, of, dropped = [], [], []
        for i, (reference, own) in enumerate(zip(greedy, records)):
            least, most = self.config.band(len(reference))
            rows = zip(own["labels"].tolist(), own["lengths"].tolist(), own["log_w"].tolist())
            same: dict[tuple[int, ...], list[float]] = {}
            for row, length, log_w in rows:
                same.setdefault(tuple(row[:length]), []).append(log_w)
            good = [y for y in same if y and least <= len(y) <= most]
            flat += [list(y) for y in good]
            opinion += [float(torch.tensor(same[y]).logsumexp(0)) for y in good]
            of += [i] * len(good)
            empty, no_score = own["dropped"].tolist()
            repeated = len(own["labels"]) - len(same)
            dropped.append([empty, no_score, repeated, len(same) - len(good), 0, 0])
        log_lm, log_teacher = self._log_lm(flat), torch.tensor(opinion, dtype=torch.float64)
        of, dropped = torch.tensor(of, dtype=torch.long), torch.tensor(dropped).view(-1, 6)
        log_w = self._prior(log_lm, log_teacher, of, len(records))
        dropped[:, DROPPED.index("no_text")] = torch.bincount(
            of[log_w.isneginf()], minlength=len(records)
        )
        made = []
        for i in range(len(records)):
            mine = ((of == i) & ~log_w.isneginf()).nonzero()[:, 0]
            mine = mine[log_w[mine].argsort(descending=True, stable=True)]
            text, lengths = pad([flat[k] for k in mine.tolist()])
            reference = torch.tensor([len(greedy[i])])
            known = {"log_w": log_w[mine].float(), "dropped": dropped[i], "greedy": reference}
            made.append({"labels": text, "lengths": lengths, **known})
        return made

    def _log_lm(self, sequences: list[list[int]]) -> torch.Tensor:
        """log p_LM, in nats; −inf also where it is not a number."""
        if self.config.weights == "uniform":
            return torch.zeros(len(sequences), dtype=torch.float64)
        log_p = self.resources["language_model"].log_p(sequences)
        return log_p.where(log_p < math.inf, -torch.inf)

    def _prior(self, log_lm, log_teacher, of, n: int) -> torch.Tensor:
        """log p̄ of each hypothesis; −inf of those that are no text."""
        text = ~log_lm.isneginf()
        log_prior = self.config.kappa * log_lm.where(text, 0.0)
        if self.config.weights == "teacher_and_lm":
            log_prior = log_prior + log_teacher
        log_w = posterior(log_prior.where(text, -torch.inf), of, n)
        if self.config.weights == "shuffled":
            log_w[text] = shuffled(log_w[text], of[text])
        return log_w

    def objective(self, heard: Any, labels: list[list[int]], records: list[Record]):
        summands, numbers = super().objective(heard, labels, records)
        n, dropped = len(records), torch.stack([own["dropped"] for own in records]).double()
        too_long = sum(int((own["lengths"] > self.config.max_labels).sum()) for own in records)
        dropped[:, DROPPED.index("too_long")] = too_long / n
        means = dropped.mean(0).tolist()
        numbers |= {f"hypotheses_{why}": mean for why, mean in zip(DROPPED, means)}
        numbers["hypotheses"] = (sum(len(own["lengths"]) for own in records) - too_long) / n
        left = [own for own in records if len(own["lengths"])]
        numbers["utterances_left_out"] = 1 - len(left) / n
        if left:
            weights = [own["log_w"].exp() for own in left]
            entropies = [torch.special.entr(w).sum() for w in weights]
            lengths = [(w * own["lengths"]).sum() for w, own in zip(weights, left)]
            greedy = sum(int(own["greedy"]) for own in left)
            numbers["prior_entropy"] = float(torch.stack(entropies).mean())
            numbers["prior_length"] = float(torch.stack(lengths).sum()) / max(greedy, 1)
        numbers["proposals_replaced"] = float(self.replaced)
        return summands, numbers
