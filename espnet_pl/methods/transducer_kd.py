r"""Distillation of a fixed teacher into a transducer, from speech without transcripts.

Source: full sums, and full sums of several hypotheses against each other: Zeineldeen et al.,
    "Robust Knowledge Distillation from RNN-T Models with Noisy Training Labels Using Full-Sum
    Loss", arXiv:2303.05958 (abstract).  What they are compared with: three classes at each node,
    Panchapagesan et al., arXiv:2011.06110; the teacher's best path, Yang et al., arXiv:2110.03334.
Equation: L = L_sup on N_L and λ · L_u on N_U of N_L + N_U updates, with the teacher's hypotheses
    y_1 … y_n of x in the order of their full sums P_T, and ŷ = y_1,
    L_u = hard · −log P_S(ŷ|x)  +  full_sum · D(log P_T(ŷ|x), log P_S(ŷ|x))
        + discriminative · Σ_k |log w_k − log v_k|  +  ranking · Σ_k w_k log(w_k / v_k)
        + collapsed, one_best, full_lattice: divergences at the nodes of ŷ's lattice
    w_k ∝ P_T(y_k|x)^κ, v_k ∝ P_S(y_k|x)^κ,  κ = scale;  D = |·| (l1), squared or Huber's.
    The teacher hears the weak view, the student the strong one.
Differs from the paper: unverified, for its text was not at hand, are D, whether the loss on hard
    labels is added, κ, the number of hypotheses and the form of the discriminative loss.  Full sums
    are of the best of some hypotheses by their full sums, not of a beam search's first; those of a
    transducer are its best path and what its CTC layer proposes.  Hypotheses that say nothing, have
    no score or are too long are dropped and counted; those that become the same in the student's
    tokens are one, with the sum of their probabilities.
    The student may be any other that has a score: full sums of CTC are distilled alike.
Cost: per unlabelled update one training pass, and a full sum for each hypothesis; the teacher is
    asked once (teacher_mode: stored), or in each update (online).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from espnet_pl.losses.distillation import posterior
from espnet_pl.methods import base
from espnet_pl.methods.pseudo_labelling import PseudoLabelling, PseudoLabellingConfig
from espnet_pl.parts.cache import Record
from espnet_pl.parts.decoding import pad
from espnet_pl.parts.hypotheses import likeliest
from espnet_pl.parts.nodes import OF_NODES, NodeObjectives, node_objective, nodes_of
from espnet_pl.parts.objectives import Objectives, objective, record
from espnet_pl.parts.pseudo_labels import Labels
from espnet_pl.parts.teacher import weak_view

DROPPED = ("empty", "without_score", "same", "too_long")  # hypotheses, and why


@dataclass(frozen=True)
class Config(NodeObjectives, PseudoLabellingConfig):
    """Fields that are not set keep these values; none of them is a paper's."""

    labelled: int = 1  # N_L; 0: pseudo-labels only
    unlabelled: int = 1  # N_U
    hard: float = 0.0
    full_sum: float = 1.0
    label: Literal["best"] = "best"

    def __post_init__(self) -> None:
        for name in ("soft", "lattice"):
            if getattr(self, name):
                raise ValueError(f"{name} is of the frames of CTC models: see slimipl")
        for name in ("weak_speeds", "strong_speeds"):
            if getattr(self, name) != (1.0,) and (name == "weak_speeds" or self.by_nodes):
                raise ValueError(f"{name}: the teacher hears speech as it is, once")
        super().__post_init__()


class Method(PseudoLabelling):
    """The teacher is somebody else, whose opinion never changes."""

    requires = frozenset({"score"})
    uses = frozenset({"truth"})
    taught = True

    def __init__(self, config, student, resources):
        super().__init__(config, student, resources)
        self.translate = resources.get("translate") or (lambda y: y)
        for name in OF_NODES:
            if getattr(config, name):
                _check_nodes(name, student, resources)

    @property
    def teacher(self) -> torch.nn.Module | None:
        """No part of this module, nor of its checkpoints: it never changes."""
        return self.resources.get("teacher")

    @classmethod
    def asked(cls, config: Any) -> dict[str, Any]:
        """What the teacher is asked depends on this; opinions of more or less are others."""
        nodes = {name: True for name in OF_NODES if getattr(config, name)}
        return {"beam": config.beam, **nodes, **({"keep": config.keep} if config.one_best else {})}

    @classmethod
    def ask(
        cls, config: Any, teacher: torch.nn.Module, x: base.Utterances, known: Record = base.NOTHING
    ) -> list[Record]:
        """Hypotheses with their full sums, best first, and what is wanted of ŷ's lattice."""
        how = Objectives(beam=config.beam, label="best", full_sum=1.0)
        with weak_view(teacher):
            heard = teacher.hear(x)
            records = record(how, heard, teacher.blank)
            nodes = nodes_of(config, heard, likeliest(records))
        for own in records:
            del own["log_w"]  # of a κ, which is chosen when it is learnt
        return [own | more for own, more in zip(records, nodes)]

    @classmethod
    def labels_of(cls, config: Any, record: Record) -> list[int]:
        """The likeliest hypothesis, in the teacher's tokens."""
        return likeliest([record])[0]

    def _said(self, student, x, how):
        records = [self._understood(own) for own in self.records_of(x)]
        return Labels(likeliest(records), None, records)

    def _understood(self, own: Mapping[str, torch.Tensor]) -> Record:
        """A record in the student's tokens, with the teacher's opinion at this κ."""
        rows = zip(own["labels"].tolist(), own["lengths"].tolist(), own["log_p"].tolist())
        scores: dict[tuple[int, ...], list[float]] = {}
        for row, length, log_p in rows:
            if y := self.translate(row[:length]):
                scores.setdefault(tuple(y), []).append(log_p)
        total = {y: float(torch.tensor(s).logsumexp(0)) for y, s in scores.items()}
        best = sorted(total, key=total.get, reverse=True)
        text, lengths = pad([list(y) for y in best])
        log_p = torch.tensor([total[y] for y in best])
        of = torch.zeros_like(lengths)
        log_w = posterior(log_p, of, 1, self.config.scale)
        understood = sum(len(same) for same in scores.values())
        empty, no_score = own["dropped"].tolist()
        empty += len(own["labels"]) - understood
        too_long = int((lengths > self.config.max_labels).sum())
        dropped = torch.tensor([empty, no_score, understood - len(best), too_long])
        said = {"labels": text, "lengths": lengths, "log_p": log_p, "log_w": log_w}
        return {**own, **said, "dropped": dropped}

    def objective(self, heard, labels, records):
        summands, numbers = objective(self.config, heard, labels, records, self.config.max_labels)
        if self.config.by_nodes:
            summands |= node_objective(
                self.config, heard, labels, records, self.config.max_labels,
                self.teacher and self.teacher.joint,
            )  # fmt: skip
        dropped = torch.stack([own["dropped"] for own in records]).float().mean(0).tolist()
        numbers |= {f"hypotheses_{why}": number for why, number in zip(DROPPED, dropped)}
        there = sum(len(own["lengths"]) for own in records) / len(records)
        numbers["hypotheses"] = there - numbers["hypotheses_too_long"]
        return summands, numbers


def _check_nodes(name, student, resources) -> None:
    """Whether teacher and student can be compared node by node.

    Raises:
        ConfigError: they cannot; it says what can.
    """
    others = "hard, full_sum, discriminative and ranking do without"
    if "lattices" not in student.answers:
        raise base.ConfigError(f"method_conf: {name} takes a transducer as student; {others}")
    if "lattices" not in resources.get("teacher_answers", ()):
        raise base.ConfigError(f"method_conf: {name} takes a transducer as teacher; {others}")
    if not resources.get("same_tokens", True):
        raise base.ConfigError(
            f"method_conf: {name} takes a teacher with the same tokens; {others}"
        )
    if resources.get("same_frames") is False:
        raise base.ConfigError(
            f"method_conf: {name} takes a teacher with as many frames a second; {others}"
        )
    if name == "full_lattice" and resources.get("teacher") is None:
        raise base.ConfigError(
            "method_conf: full_lattice needs the teacher in every update: teacher_mode: online"
        )
