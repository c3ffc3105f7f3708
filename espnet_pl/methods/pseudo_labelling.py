"""What the methods with pseudo-labels have in common; who labels, and when, is their own."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from espnet_pl.data.pairing import Pairing
from espnet_pl.data.views import at_speed, draw
from espnet_pl.methods import base
from espnet_pl.parts.cache import PseudoLabelCache
from espnet_pl.parts.objectives import Objectives, objective
from espnet_pl.parts.pseudo_labels import agree, label_statistics, propose, student_statistics


@dataclasses.dataclass(frozen=True)
class PseudoLabellingConfig(Objectives):
    """Settings of every method that learns pseudo-labels; none of them is a paper's."""

    weight: float = 1.0  # λ, of an unlabelled update; times those of the objectives
    max_labels: int = 1000  # tokens; longer pseudo-labels are dropped
    # Speeds of the weak views (data/views.py): each is labelled, their consensus is the label.
    weak_speeds: tuple[float, ...] = (1.0,)
    # Speeds of the strong view: the student hears a batch at one of them, drawn in each update.
    strong_speeds: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if self.max_labels < 1:
            raise ValueError("max_labels must be at least 1")
        for name in ("weak_speeds", "strong_speeds"):
            speeds = getattr(self, name)
            if not speeds or not all(0.5 <= speed <= 2.0 for speed in speeds):
                raise ValueError(f"{name} is {list(speeds)}: give speeds between 0.5 and 2")
        if self.by_frames and (self.weak_speeds[0], *self.strong_speeds) != (1.0, 1.0):
            raise ValueError(
                "soft and lattice compare the teacher's frames with the student's: "
                "the first of weak_speeds and all strong_speeds must be 1"
            )
        super().__post_init__()
        PseudoLabelling.pairing(self)


class PseudoLabelling(base.Method):
    """A method that learns pseudo-labels: who makes them, and when, is all that is left open.

    Beside its own teacher there may be others (``resources``), which never change: where models
    err differently, most of them are right.  Source: ensembles of teachers are in Kahn, Lee,
    Hannun, "Self-Training for End-to-End Speech Recognition", arXiv:1909.09116, for the diversity
    of their labels (abstract); taking their consensus is our choice.

    Its ``Config`` is a ``PseudoLabellingConfig`` with the fields of ``Pairing`` that it sets.
    """

    requires = frozenset({"frame_log_probs", "score"})
    uses = frozenset({"truth", "teachers"})

    def __init__(self, config: Any, student: nn.Module, resources: Mapping[str, Any]) -> None:
        super().__init__(config, student, resources)
        self.cache = PseudoLabelCache()
        self.said = PseudoLabelCache()  # by the other teachers, per view
        # Labels and samples of the labelled speech seen.
        self.register_buffer("said_in", torch.zeros(2, dtype=torch.float64))

    @classmethod
    def pairing(cls, config: Any) -> Pairing:
        """The fields of ``Pairing`` that the settings have by the same name."""
        names = [f.name for f in dataclasses.fields(Pairing)]
        return Pairing(**{n: getattr(config, n) for n in names if hasattr(config, n)})

    def labelled(self, student: nn.Module, x: base.Utterances) -> dict[str, base.Term]:
        """As any method; how much is said in labelled speech is remembered."""
        self.said_in += torch.stack([x.text_lengths.sum(), x.speech_lengths.sum()]).to(self.said_in)
        return super().labelled(student, x)

    def proposer(self, student: nn.Module) -> nn.Module:
        """The network that labels."""
        raise NotImplementedError(f"{type(self).__module__} does not say who labels")

    def unlabelled(self, student: nn.Module, x: base.Utterances) -> dict[str, base.Term]:
        """The student's loss on cached labels, or on labels made on the spot."""
        cached = self.pairing(self.config).capacity > 0
        terms = {} if cached else self.label(student, x)
        labels = [self.cache.get(i) for i in x.utt_id]
        records = [self.cache.record(i) for i in x.utt_id]
        strong = at_speed(x, draw(self.config.strong_speeds))
        heard = student.hear(strong)
        summands, numbers = objective(self.config, heard, labels, records, self.config.max_labels)
        ages = [int(self.step) - self.cache.made_at(i) for i in x.utt_id]
        numbers["label_age"] = sum(ages) / len(ages)
        said, of_samples = self.said_in.tolist()
        samples = int(strong.speech_lengths.sum())
        numbers |= student_statistics(heard, student.blank, samples, said / max(of_samples, 1.0))
        for name, (value, weight, count) in summands.items():
            terms[name] = base.Term(value, self.config.weight * weight, count)
        return terms | base.diagnostics(numbers, len(x))

    def label(self, student: nn.Module, x: base.Utterances) -> dict[str, base.Term]:
        """Label x now: the consensus of all teachers in all weak views, kept by utterance id."""
        views = [at_speed(x, speed) for speed in self.config.weak_speeds]
        teacher = self.proposer(student)
        said = [propose(teacher, view, self.config) for view in views]
        made = agree(said, self._others(x, views))
        values = label_statistics(x, made, self.cache, self.resources.get("truth", {}))
        for utt_id, label, record in zip(x.utt_id, made.labels, made.records):
            self.cache.put(utt_id, label, int(self.step), record)
        return base.diagnostics(values, len(x))

    def _others(self, x: base.Utterances, views: list[base.Utterances]) -> list[list[list[int]]]:
        """The labels of the other teachers in each view; asked once, for they never change."""
        said = []
        for number, teacher in enumerate(self.resources.get("teachers", ())):
            for speed, view in zip(self.config.weak_speeds, views):
                keys = [f"{number} {speed} {utt_id}" for utt_id in x.utt_id]
                if not all(key in self.said for key in keys):
                    labels = propose(teacher.to(x.speech.device), view).labels
                    for key, label in zip(keys, labels):
                        self.said.put(key, label, int(self.step))
                said.append([self.said.get(key) for key in keys])
        return said
