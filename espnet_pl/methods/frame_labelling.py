"""What the methods share that learn from a teacher's frame labels; what they learn is their own."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from espnet_pl.data.pairing import Pairing
from espnet_pl.methods import base
from espnet_pl.parts.cache import Record
from espnet_pl.parts.clusters import learn_centres
from espnet_pl.parts.frame_labels import FrameLabels, frame_labels, record
from espnet_pl.parts.teacher import weak_view


@dataclass(frozen=True)
class FrameLabellingConfig(FrameLabels):
    """Settings of every method that learns frame labels; without labelled speech unless asked."""

    labelled: int = 0  # N_L
    unlabelled: int = 1  # N_U
    weight: float = 1.0  # λ, of an unlabelled update

    def __post_init__(self) -> None:
        super().__post_init__()
        FrameLabelling.pairing(self)
        if not self.weight > 0:
            raise ValueError(f"weight is {self.weight}, it must be positive")


class FrameLabelling(base.Method):
    """A method that learns the frame labels of a trained teacher, in layers of its own.

    The teacher hears the weak view, once, and the student the strong one.  Labels are of the
    teacher's tokens, whatever the student's are.  Without labelled speech nothing of the student
    but its encoder has a gradient.
    """

    requires = frozenset({"features"})
    taught = True
    records = "frame_labels"

    def __init__(self, config: Any, student: nn.Module, resources: Mapping[str, Any]) -> None:
        super().__init__(config, student, resources)
        clusters = config.units == "clusters"
        answers = resources.get("teacher_answers", ("frame_log_probs",))
        if not clusters and "frame_log_probs" not in answers:
            raise base.ConfigError(NO_FRAMES)
        if clusters and resources.get("teacher") is not None:
            raise base.ConfigError(
                "units: clusters are learnt from all of the speech, before it is labelled: "
                "they need teacher_mode: stored"
            )
        self.tokens: int = resources["teacher_tokens"]

    @classmethod
    def pairing(cls, config: Any) -> Pairing:
        """In turn; no cache, for the labels never change."""
        return Pairing(config.labelled, config.unlabelled)

    @classmethod
    def asked(cls, config: Any) -> dict[str, Any]:
        """The teacher's path; what units are made of it is decided when it is learnt."""
        return config.asked

    @classmethod
    def survey(
        cls, config: Any, teacher: nn.Module, speech: Iterable[base.Utterances]
    ) -> dict[str, Tensor]:
        """The centres of the clusters, if they are the units."""
        if config.units != "clusters":
            return {}
        try:
            with weak_view(teacher):
                centres = learn_centres(_vectors(teacher, speech), config.clusters)
        except ValueError as error:
            raise base.ConfigError(f"units: clusters: {error}; ask for fewer") from None
        return {"centres": centres}

    @classmethod
    def ask(
        cls, config: Any, teacher: nn.Module, x: base.Utterances, known: Record = base.NOTHING
    ) -> list[Record]:
        """The runs of the teacher's path (parts/frame_labels.py)."""
        if config.units != "clusters" and "frame_log_probs" not in teacher.answers:
            raise base.ConfigError(NO_FRAMES)
        with weak_view(teacher):
            return record(config, teacher.hear(x), teacher.blank, known.get("centres"))

    @classmethod
    def labels_of(cls, config: Any, record: Record) -> list[int]:
        """The tokens on the teacher's path, or the clusters."""
        path = record["labels"]
        return path[path >= 0].tolist()

    def learn(
        self, features: Float[Tensor, "n t d"], labels: Int[Tensor, "n u"]
    ) -> tuple[dict[str, base.Term], dict[str, float]]:
        """What is learnt of frame labels, and numbers to be logged.

        Args:
            labels: of as many frames as are valid in the longest utterance; −1 is none.
        """
        raise NotImplementedError(f"{type(self).__module__} does not say what it learns")

    def unlabelled(self, student: nn.Module, x: base.Utterances) -> dict[str, base.Term]:
        """The loss on the labels of the student's frames."""
        features, frames = student.hear(x).features()
        labels = frame_labels(self.config, self.records_of(x), self.tokens, frames.cpu())
        terms, numbers = self.learn(features, labels)
        numbers["frames_labelled"] = int((labels >= 0).sum()) / max(int(frames.sum()), 1)
        return terms | base.diagnostics(numbers, len(x))

    def classify(
        self, layer: nn.Module, features: Float[Tensor, "n t d"], labels: Int[Tensor, "n u"]
    ) -> tuple[dict[str, base.Term], dict[str, float]]:
        """Cross-entropy of all frames that have a label, nats per frame, and how many are wrong."""
        rows, places = (labels >= 0).nonzero(as_tuple=True)
        target = labels[rows, places].to(features.device)
        logits = layer(features[rows.to(features.device), places.to(features.device)])
        total = nn.functional.cross_entropy(logits.float(), target, reduction="sum")
        count = max(len(target), 1)  # without any, it is 0 and on the graph
        wrong = int((logits.argmax(1) != target).sum()) / count
        term = base.Term(total / count, self.config.weight, len(target))
        return {"cross_entropy": term}, {"frames_wrong": wrong}


def _vectors(teacher: nn.Module, speech: Iterable[base.Utterances]) -> Iterator[Tensor]:
    """The features of all frames of each batch."""
    for x in speech:
        features, frames = teacher.hear(x).features()
        yield torch.cat([own[:t] for own, t in zip(features, frames.tolist())])


NO_FRAMES = (
    "the teacher has no CTC layer, which says what it hears in a frame: give another one "
    "(model_conf: ctc_weight > 0; of a transducer auxiliary_ctc_weight > 0)"
)
