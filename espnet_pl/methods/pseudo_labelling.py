"""What the methods with pseudo-labels have in common; who labels, and when, is their own."""

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from espnet_pl.data.pairing import Pairing
from espnet_pl.data.views import at_speed, draw
from espnet_pl.methods import base
from espnet_pl.parts.cache import PseudoLabelCache, Record
from espnet_pl.parts.evolution import Evolution
from espnet_pl.parts.monitor import LIMITS, Monitor
from espnet_pl.parts.objectives import Objectives, Summand, objective
from espnet_pl.parts.pseudo_labels import (
    Labels,
    agree,
    by_risk,
    label_statistics,
    mean,
    propose,
    student_statistics,
)
from espnet_pl.parts.ranks import gather
from espnet_pl.parts.teacher import Teacher


@dataclasses.dataclass(frozen=True)
class PseudoLabellingConfig(Objectives):
    """Settings of every method that learns pseudo-labels; none of them is a paper's."""

    weight: float = 1.0  # λ, of an unlabelled update; times those of the objectives
    max_labels: int = 1000  # tokens; longer pseudo-labels are dropped
    # Speeds of the weak views (data/views.py): each is labelled, their consensus is the label.
    weak_speeds: tuple[float, ...] = (1.0,)
    # Speeds of the strong view: the student hears a batch at one of them, drawn in each update.
    strong_speeds: tuple[float, ...] = (1.0,)
    # When the student collapses (parts/monitor.py): say so, also go back to when it was well and
    # halve the weight of what is learnt without labels, or end the training.
    on_collapse: Literal["warn", "rollback", "stop"] = "warn"
    monitor_learn: int = 50  # unlabelled updates that say what is usual
    monitor_patience: int = 25  # unlabelled updates in a row outside of it
    rollback_every: int = 200  # updates from one copy of the student to the next

    def __post_init__(self) -> None:
        if self.max_labels < 1:
            raise ValueError("max_labels must be at least 1")
        for name in ("monitor_learn", "monitor_patience", "rollback_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
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


@dataclasses.dataclass(frozen=True)
class OwnTeacherConfig(PseudoLabellingConfig):
    """Of a method whose teacher may be the student's moving average."""

    decay: float = 0.999  # of the moving average; in slimIPL's code, slimIPL_ema_decay
    decay_warmup: float = 0.0  # w of parts/teacher.py, in updates; in no paper

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay is {self.decay}, it must lie in [0, 1]")
        if self.decay_warmup < 0:
            raise ValueError(f"decay_warmup is {self.decay_warmup}, it must not be negative")
        super().__post_init__()


class Collapse(RuntimeError):
    """The student has collapsed, and the training was to end then."""


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
        self.monitor = Monitor(config.monitor_learn, config.monitor_patience)
        # The student as it was when it was well, and as it was later: the monitor needs time to see
        # that something is wrong, so a copy counts only if all was well until the next one.
        self.well = Teacher(student, 0.0) if config.on_collapse == "rollback" else None
        self.later = Teacher(student, 0.0) if self.well else None
        self.register_buffer("alarms", torch.zeros((), dtype=torch.long))
        self.register_buffer("put_back", torch.zeros((), dtype=torch.long))  # alarms answered
        self.register_buffer("taken_at", torch.zeros(2, dtype=torch.long))  # of both copies
        # Labels made between these updates come from students that were put back.
        self.register_buffer("doubtful", torch.zeros(2, dtype=torch.long))
        self.room = math.inf  # padded samples of what the present update trains on
        pairing = self.pairing(config)
        self.cached = pairing.capacity > 0
        self.evolution = None
        if pairing.replace_when != "random":
            self.evolution = Evolution(pairing.replace, pairing.replace_when == "settled")
        # Labels and samples of the labelled speech seen.
        self.register_buffer("said_in", torch.zeros(2, dtype=torch.float64))

    @classmethod
    def pairing(cls, config: Any) -> Pairing:
        """The fields of ``Pairing`` that the settings have by the same name."""
        names = [f.name for f in dataclasses.fields(Pairing)]
        return Pairing(**{n: getattr(config, n) for n in names if hasattr(config, n)})

    def forward(self, student: nn.Module, batch: base.Batch) -> dict[str, base.Term]:
        """As any method; the monitor looks on, and what has left the cache is forgotten."""
        beside = batch.labelled or batch.unlabelled
        self.room = beside.speech.shape[:2].numel() if beside else math.inf
        terms = super().forward(student, batch)
        if batch.unlabelled is not None:
            self._watch({name: float(terms[name].value) for name in LIMITS if name in terms})
        if batch.gone:
            for gone in gather(batch.gone):
                self.cache.forget(gone)
        return terms

    def labelled(self, student: nn.Module, x: base.Utterances) -> dict[str, base.Term]:
        """As any method; how much is said in labelled speech is remembered."""
        self.said_in += torch.stack([x.text_lengths.sum(), x.speech_lengths.sum()]).to(self.said_in)
        return super().labelled(student, x)

    def proposer(self, student: nn.Module) -> nn.Module:
        """The network that labels."""
        raise NotImplementedError(f"{type(self).__module__} does not say who labels")

    def unlabelled(self, student: nn.Module, x: base.Utterances) -> dict[str, base.Term]:
        """The student's loss on cached labels, or on labels made on the spot."""
        terms = self.label(student, x) if not self.cached or self._stale(x) else {}
        labels = [self.cache.get(i) for i in x.utt_id]
        records = [self.cache.record(i) for i in x.utt_id]
        strong = at_speed(x, draw(self.config.strong_speeds))
        heard = student.hear(strong)
        summands, numbers = self.objective(heard, labels, records)
        ages = [int(self.step) - self.cache.made_at(i) for i in x.utt_id]
        numbers["label_age"] = sum(ages) / len(ages)
        if self.evolution:
            how = Objectives(label=self.config.label, sampling=self.config.sampling)
            now = self._said(student, x, how).labels
            numbers["label_change"] = self.evolution.see(labels, now)
        if not self.cached:
            self.cache.forget(x.utt_id)
        if "frame_log_probs" in student.answers:
            said, of_samples = self.said_in.tolist()
            samples, usual = int(strong.speech_lengths.sum()), said / max(of_samples, 1.0)
            numbers |= student_statistics(heard, student.blank, samples, usual)
        share = self.config.weight * 0.5 ** int(self.put_back)
        for name, (value, weight, count) in summands.items():
            terms[name] = base.Term(value, share * weight, count)
        return terms | base.diagnostics(numbers, len(x))

    def objective(
        self, heard: Any, labels: list[list[int]], records: list[Record]
    ) -> tuple[dict[str, Summand], dict[str, float]]:
        """What the student learns of labels and records, and numbers to be logged."""
        return objective(self.config, heard, labels, records, self.config.max_labels)

    def label(self, student: nn.Module, x: base.Utterances) -> dict[str, base.Term]:
        """Label x now, and keep it by utterance id."""
        # What fills the cache comes at once, and may be more than memory holds.
        pieces = [self._said(student, piece, self.config) for piece in x.pieces(self.room)]
        made = Labels(
            [label for piece in pieces for label in piece.labels],
            mean([piece.statistics for piece in pieces]),
            [record for piece in pieces for record in piece.records],
        )
        values = label_statistics(x, made, self.cache, self.resources.get("truth", {}))
        entries = list(zip(x.utt_id, made.labels, made.records))
        # One rank writes the checkpoint: it has to know what is in the cache of all.
        for several in gather(entries) if self.cached else [entries]:
            for utt_id, label, record in several:
                self.cache.put(utt_id, label, int(self.step), record)
        return base.diagnostics(values, len(x))

    def _said(self, student: nn.Module, x: base.Utterances, how: Objectives) -> Labels:
        """The consensus of all teachers in all weak views."""
        views = [at_speed(x, speed) for speed in self.config.weak_speeds]
        teacher = self.proposer(student)
        made = agree([propose(teacher, view, how) for view in views], self._others(x, views))
        if how.by_hypotheses and how.risk:
            made = made._replace(records=[by_risk(record, how.risk) for record in made.records])
        return made

    def chance(self, turn: int) -> float:
        """By how much the labels had changed."""
        return self.evolution.chance(turn)

    def went_back(self, student: nn.Module) -> None:
        """Called when the student was put back: a teacher that follows it is, too."""

    def start(self, student: nn.Module) -> None:
        """The first copy to go back to is the seed."""
        if self.well:
            self.well.copy(student)
            self.later.copy(student)

    def after_step(self, student: nn.Module) -> None:
        """Keep a copy of a student that is well; put one that has collapsed back."""
        super().after_step(student)
        if not self.well:
            return
        if self.alarms > self.put_back:
            student.load_state_dict(self.well.network.state_dict())
            self.later.copy(student)
            self.put_back.copy_(self.alarms)
            if not self.doubtful[1]:
                self.doubtful[0] = self.taken_at[0]
            self.doubtful[1] = self.taken_at[1] = self.step
            self.monitor.forgive()
            self.went_back(student)
            logging.warning(
                "the student is as it was when it was well; what it learns without labels now "
                "weighs %g times as much as at first",
                0.5 ** int(self.put_back),
            )
        elif self.step % self.config.rollback_every == 0 and self.monitor.healthy:
            self.well.copy(self.later.network)
            self.later.copy(student)
            self.taken_at[0] = self.taken_at[1]
            self.taken_at[1] = self.step

    def _stale(self, x: base.Utterances) -> bool:
        """Whether labels of x come from a student that was put back."""
        begin, end = self.doubtful.tolist()
        if not end:
            return False
        return any(gather(any(begin < self.cache.made_at(i) < end for i in x.utt_id)))

    def _watch(self, numbers: Mapping[str, float]) -> None:
        alarm = self.monitor.see(numbers)
        if not alarm:
            return
        self.alarms += 1
        words = f"collapse at update {int(self.step)}: {alarm}"
        if self.config.on_collapse == "stop":
            raise Collapse(
                f"{words}. The checkpoint of the last epoch is kept. A slower teacher (teacher: "
                "ema, a cache), fewer unlabelled updates or on_collapse: rollback may help"
            )
        logging.warning(words)

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


class OwnTeacher(PseudoLabelling):
    """Its ``teacher`` is a copy of the student, or None: then the student labels.

    The copy is taken when training starts; where it ``follows``, it is averaged with the student
    after each update, and taken anew from a student that was put back.
    """

    follows: bool = True

    def proposer(self, student):
        """The teacher, if there is one."""
        return self.teacher.network if self.teacher else student

    def start(self, student):
        """The copy is taken after ESPnet has loaded the weights that training starts from."""
        super().start(student)
        if self.teacher:
            self.teacher.copy(student)

    def went_back(self, student):
        """What was averaged since then is left behind."""
        if self.teacher and self.follows:
            self.teacher.copy(student)

    def after_step(self, student):
        """As any method; the teacher goes along."""
        super().after_step(student)
        if self.teacher and self.follows:
            self.teacher.follow(student)
