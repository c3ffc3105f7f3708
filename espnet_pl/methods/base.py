"""What every method is made of: a batch, terms, a student, and the method itself.

A method sees a ``Batch`` and a ``Student`` and returns named ``Term``s; the
bridge adds up weight · value and hands the sum to ESPnet's trainer.  A method
does not know ESPnet, and a diagnostic is a term with weight 0.
"""

import dataclasses
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from espnet_pl.data.pairing import Pairing
from espnet_pl.losses.transducer import Lattices
from espnet_pl.parts.search import Proposal


class ConfigError(ValueError):
    """A setting that cannot be: says which, and what would be valid."""


NOTHING: Mapping[str, Tensor] = types.MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Utterances:
    """Padded speech of n utterances, with labels if they have any."""

    utt_id: list[str]
    speech: Float[Tensor, "n samples ..."]
    speech_lengths: Int[Tensor, " n"]
    text: Int[Tensor, "n u"] | None = None  # padded with −1
    text_lengths: Int[Tensor, " n"] | None = None

    def __len__(self) -> int:
        return len(self.utt_id)

    def pieces(self, samples: float) -> Iterator["Utterances"]:
        """The speech, in pieces of as many padded samples at most, or of a single utterance."""
        lengths, begin = self.speech_lengths.tolist(), 0
        for end in range(1, len(self) + 1):
            with_next = lengths[begin : end + 1]
            if end < len(self) and len(with_next) * max(with_next) <= samples:
                continue
            own = slice(begin, end)
            speech = self.speech[own, : max(lengths[own])]
            yield Utterances(self.utt_id[own], speech, self.speech_lengths[own])
            begin = end


@dataclasses.dataclass(frozen=True)
class Batch:
    """What one update sees; any part may be missing."""

    labelled: Utterances | None = None
    unlabelled: Utterances | None = None
    fresh: Utterances | None = None  # enter the pseudo-label cache before the update
    gone: Sequence[str] = ()  # are not in the cache any more after the update


@dataclasses.dataclass(frozen=True)
class Term:
    """One summand of the objective, a mean over ``count`` utterances, or frames.

    Ranks of a distributed job average a term by its own count: rank r with mean v_r
    over c_r utterances contributes c_r · v_r / Σ_r c_r.  Of a weighted mean, the count is the sum
    of the weights.  Weight 0 is a diagnostic.
    """

    value: Float[Tensor, ""]
    weight: float = 1.0
    count: float = 1


def diagnostics(values: Mapping[str, float], count: int) -> dict[str, Term]:
    """Numbers to be logged, as terms of weight 0."""
    return {name: Term(torch.tensor(value), 0.0, count) for name, value in values.items()}


class Inputs(NamedTuple):
    """What an encoder was to be given, and what of it was hidden."""

    features: Float[Tensor, "n s f"]  # before anything was hidden; without gradient
    frames: Int[Tensor, " n"]  # valid ones
    hidden: Bool[Tensor, "n s"]


# From the valid frames of each utterance and s, that are given, to the frames to be hidden.
Hide = Callable[[Int[Tensor, " n"], int], Bool[Tensor, "n s"]]


class Student(Protocol):
    """The questions a method may ask; a method asks them, never the architecture.

    A student is a torch module: in training mode it sees the strong view of the speech
    (SpecAugment, dropout), in eval mode the weak one.
    """

    blank: int  # index of the blank among the tokens
    answers: frozenset[str]  # "supervised", and which of those of ``Heard`` it has
    feature_size: int  # d of ``features``
    input_size: int | None  # f of ``inputs``; None where it is not among the answers

    def supervised(self, x: Utterances) -> tuple[Tensor, dict[str, Tensor]]:
        """The stock training criterion on x.text: mean loss, and its parts to be logged."""

    def hear(self, x: Utterances, hide: Hide | None = None) -> "Heard":
        """What the other questions are asked about: the same view, encoded once.

        Args:
            hide: the frames of the encoder's input that are zeros to it; then there is no
                SpecAugment, which would hide others.
        """


class Heard(Protocol):
    """Utterances as a student has heard them once."""

    def __len__(self) -> int:
        """How many."""

    def frame_log_probs(self) -> tuple[Float[Tensor, "n t v"], Int[Tensor, " n"]]:
        """Log-probabilities of tokens and blank in each frame, and the valid frames."""

    def features(self) -> tuple[Float[Tensor, "n t d"], Int[Tensor, " n"]]:
        """The encoder's output in each frame, before any layer for tokens, and the valid frames."""

    def inputs(self) -> Inputs:
        """What of the speech the encoder heard; of ``hear`` with ``hide`` only."""

    def score(self, labels: list[list[int]], of: list[int] | None = None) -> Float[Tensor, " k"]:
        """log p(label|x) under the training criterion, in nats; −inf if it cannot be aligned.

        Args:
            of: the utterance that each label is a hypothesis of; None: the k-th of the k-th.
        """

    def lattices(self, labels: list[list[int]]) -> Lattices:
        """The transducer's lattice of a label sequence of each utterance; see losses/transducer."""

    def propose(self, beam: int) -> list[list[Proposal]]:
        """Different label sequences of each utterance with the scores of ``score``, best first."""


class Method(nn.Module):
    """A way to learn; the base learns from labelled speech only.

    Subclasses override ``unlabelled`` and, as they need, ``label``, ``start`` and
    ``after_step``.  What a method keeps between steps is in its ``state_dict``.
    """

    requires: ClassVar[frozenset[str]] = frozenset()  # questions the student must answer
    uses: ClassVar[frozenset[str]] = frozenset({"truth"})  # resources it has a use for
    validates: bool = False  # asks for the results of validation
    taught: ClassVar[bool] = False  # learns from one trained teacher, and has none of its own
    records: ClassVar[str | None] = None  # methods with the same word here ask, and share, the same

    def __init__(self, config: Any, student: nn.Module, resources: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.resources = resources
        self.register_buffer("step", torch.zeros((), dtype=torch.long))  # updates made

    @classmethod
    def pairing(cls, config: Any) -> Pairing:
        """Which batches meet in an update."""
        return Pairing()

    @classmethod
    def needs(cls, config: Any) -> frozenset[str]:
        """The resources without which it cannot work, of those that it has a use for."""
        return frozenset()

    def learns(self) -> list[nn.Parameter]:
        """Parameters of its own that are trained with the student's; never those of a copy.

        They are in the method's ``state_dict``, and in no exported model.
        """
        return []

    @classmethod
    def survey(
        cls, config: Any, teacher: nn.Module, speech: Iterable[Utterances]
    ) -> dict[str, Tensor]:
        """What has to be known of the speech as a whole before a teacher is asked: mostly nothing.

        Args:
            speech: batches in random order, read as they are asked for: a sample may do.
        """
        return {}

    @classmethod
    def ask(
        cls, config: Any, teacher: nn.Module, x: Utterances, known: Mapping[str, Tensor] = NOTHING
    ) -> list[dict[str, Tensor]]:
        """What a teacher has to say of each utterance, to be kept; of a method that is taught.

        Args:
            teacher: answers as a ``Student`` does; in eval mode, without gradients.
            known: what ``survey`` found.
        """
        raise NotImplementedError(f"{cls.__module__} does not say what it asks its teacher")

    @classmethod
    def asked(cls, config: Any) -> dict[str, Any]:
        """The settings that ``ask`` depends on, in JSON: records of others are refused."""
        raise NotImplementedError(f"{cls.__module__} does not say what its records depend on")

    def records_of(self, x: Utterances) -> list[Mapping[str, Tensor]]:
        """What the teacher of a method that is taught says of utterances: read, or asked now."""
        stored = self.resources.get("records")
        if stored is not None:
            return [stored.get(utt_id) for utt_id in x.utt_id]
        return self.ask(self.config, self.resources["teacher"].to(x.speech.device), x)

    @classmethod
    def labels_of(cls, config: Any, record: Mapping[str, Tensor]) -> Sequence[int] | None:
        """What is in an utterance, of a record that ``ask`` made of it, for label-aware batches
        (``data.label_aware``): numbers of tokens, in order; None: records do not say.
        """
        return None

    def forward(self, student: nn.Module, batch: Batch) -> dict[str, Term]:
        """The objective of one update, as named terms."""
        if self.step == 0:
            self.start(student)
        terms: dict[str, Term] = {}
        if batch.fresh is not None:  # first: this very update may train on them
            terms |= self.label(student, batch.fresh)
        if batch.labelled is not None:
            terms |= self.labelled(student, batch.labelled)
        if batch.unlabelled is not None:
            terms |= self.unlabelled(student, batch.unlabelled)
        return terms

    def labelled(self, student: nn.Module, x: Utterances) -> dict[str, Term]:
        """The student's own training criterion, and its parts as diagnostics."""
        loss, parts = student.supervised(x)
        terms = {name: Term(value.detach(), 0.0, len(x)) for name, value in parts.items()}
        return {"supervised": Term(loss, 1.0, len(x)), **terms}

    def unlabelled(self, student: nn.Module, x: Utterances) -> dict[str, Term]:
        """What unlabelled speech adds."""
        raise NotImplementedError(
            f"{type(self).__module__} asks for unlabelled speech, but has no use for it"
        )

    def label(self, student: nn.Module, x: Utterances) -> dict[str, Term]:
        """Give speech that enters the cache its pseudo-labels."""
        raise NotImplementedError(f"{type(self).__module__} asks for a cache, but has none")

    def chance(self, turn: int) -> float:
        """That what the turn-th unlabelled update used of the cache is replaced, where
        ``Pairing.replace_when`` says that it depends on labels.
        """
        raise NotImplementedError(f"{type(self).__module__} does not know how labels change")

    def start(self, student: nn.Module) -> None:
        """Called before each forward pass until the first update has been made.

        ESPnet loads ``init_param`` after a model is built: a copy taken in
        ``__init__`` would be a copy of random weights.
        """

    def after_step(self, student: nn.Module) -> None:
        """Called once after each real update of the student."""
        self.step += 1

    def rival(self) -> nn.Module | None:
        """A network of its own that is to be validated beside the student; of a method that
        ``validates``, asked in each batch of a validation.  None: there is none, or it was before.
        """
        return None

    def validated(self, student: nn.Module, mine: float, rivals: float | None) -> None:
        """Called after each validation, before the checkpoint; of a method that ``validates``.

        Args:
            mine: the student's mean of what the best epoch is chosen by; the smaller, the better.
            rivals: the same of the rival, if there was one.
        """
