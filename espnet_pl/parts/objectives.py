r"""What is learnt from a teacher: its label, its frames, its hypotheses, or a sum of these.

A teacher hears the weak view and leaves a record of each utterance; later the student hears the
strong view and is compared with the record.  With p_t the teacher's distribution in frame t and q_t
the student's, ŷ the label, y_k hypotheses with the teacher's opinion w_k of them, and γ_t their
occupancies in the teacher's lattice,

    L = hard · −log q(ŷ|x)  +  soft · Σ_t c_t KL(p_t ‖ q_t)  +  lattice · Σ_t c_t KL(γ_t ‖ q_t)
      + sequences · −Σ_k w_k log q(y_k|x)  +  ranking · KL(w ‖ v)
      + full_sum · D(log p(ŷ|x), log q(ŷ|x))  +  discriminative · Σ_k |log w_k − log v_k|
      + frame_entropy · Σ_t H(q_t)  −  token_entropy · T H(mean_t q_t)

    p_t ∝ (teacher's probability)^{1/temperature};  temperature 0: its likeliest token
    w_k ∝ P(y_k|x)^scale over the hypotheses,  v_k the same of the student
    D: how far apart two full sums are, in nats, or in nats per label (losses/distillation.py)
    direction reversed: KL(v ‖ w) in place of what follows ``sequences``
    c_t = blank_weight where the teacher's likeliest token is the blank, else 1

each of them a mean over utterances, in nats per utterance.  A label that cannot be learnt is
dropped and counted, never clipped: an empty one (its loss −Σ_t log q_t(blank) teaches silence), one
longer than a limit (a looping teacher), one that no alignment of the student can produce.  An
utterance may count for less, or not at all, by the teacher's confidence
exp((1/T) Σ_t log max_v p_t(v)).

Source: hard labels arXiv:2010.11524; sampled ones arXiv:2210.08711 (abstract); soft labels of
frames arXiv:2211.06007 (abstract) and, as a mean over frames times 20, the code of flashlight's
slimIPL recipe.  What regularises them is not listed there: blend (hard and soft together),
sharpening, several sequences, entropies, blanks and confidence are what was conceivable.
Full sums, and those of several hypotheses against each other, are those of arXiv:2303.05958
(abstract).  Hypotheses weighted by their posterior, occupancies as targets of frames, and the
ranking are ours: soft labels that are consistent as sequences.  Where several views or teachers are
asked, w is the mean of their opinions (parts/pseudo_labels.mixed), and ŷ their consensus.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from espnet_pl.losses.ctc import occupancies
from espnet_pl.losses.distillation import (
    cross_entropy,
    discriminative,
    distance,
    posterior,
    ranking,
    reversed_ranking,
)
from espnet_pl.losses.entropy import frame_entropy, token_entropy
from espnet_pl.losses.soft_labels import SoftLabels, kl, soft_labels
from espnet_pl.parts.cache import Record
from espnet_pl.parts.decoding import greedy, pad
from espnet_pl.parts.hypotheses import draw, draw_several, possible, shuffled, usable
from espnet_pl.parts.ranks import of_all_ranks, together

TINY = 1e-30  # an occupancy that is none


@dataclass(frozen=True)
class Objectives:
    """Settings; the weights are of the summands above."""

    hard: float = 1.0
    soft: float = 0.0
    lattice: float = 0.0
    sequences: float = 0.0
    ranking: float = 0.0
    full_sum: float = 0.0
    discriminative: float = 0.0
    frame_entropy: float = 0.0
    token_entropy: float = 0.0
    # ŷ: that of the frames' best path, of a path drawn at random, or the likeliest hypothesis.
    label: Literal["greedy", "sampled", "best"] = "greedy"
    distance: Literal["l1", "squared", "huber"] = "l1"  # D; the paper's is not known
    delta: float = 1.0  # nats, where Huber's distance becomes linear
    by_length: bool = False  # D of log-probabilities per label
    sampling: float = 1.0  # temperature of paths that are drawn
    temperature: float = 1.0  # of soft labels; below 1 sharpens
    keep: int = 16  # tokens of a frame that are kept; of the others their sum
    beam: int = 8  # hypotheses
    hypotheses: Literal["search", "sampled"] = "search"
    opinion: Literal["posterior", "shuffled"] = "posterior"  # w; shuffled among the hypotheses
    scale: float = 1.0  # κ; 0 weighs all hypotheses alike
    direction: Literal["forward", "reversed"] = "forward"  # of ``sequences``
    # Per edit: of what sequences and ranking learn, w becomes ∝ exp(−risk · Σ_j w_j d(y_k, y_j)),
    # which prefers what is like the others; large, the least Bayes risk.  0: w stays.
    risk: float = 0.0
    blank_weight: float = 1.0  # 0 leaves frames out in which the teacher says nothing
    confidence: Literal["none", "weight", "shuffled"] = "none"  # shuffled among the utterances
    least_confidence: float = 0.0  # utterances below it are dropped

    def __post_init__(self) -> None:
        for name in (*SUMMANDS, "temperature", "scale", "risk", "delta"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}, it must not be negative")
        if not self.learns:
            raise ValueError(f"one of {', '.join(SUMMANDS)} must be positive: nothing is learnt")
        backward = self.sequences and self.direction == "reversed"
        compared = self.ranking or self.discriminative or backward
        for name, least in (("keep", 1), ("beam", 2 if compared else 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be at least {least}")
        if self.full_sum and (self.label != "best" or self.hypotheses != "search"):
            raise ValueError(
                "full_sum compares with what the teacher thinks of its likeliest hypothesis: "
                "label must be best, hypotheses search"
            )
        if not self.sampling > 0:
            raise ValueError(f"sampling is {self.sampling}, it must be positive")
        for name in ("blank_weight", "least_confidence"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must lie in [0, 1]")

    @property
    def learns(self) -> bool:
        """Whether anything is learnt of a teacher."""
        return any(getattr(self, name) for name in SUMMANDS)

    @property
    def by_frames(self) -> bool:
        """Whether the student's frames must be those of the teacher."""
        return self.soft > 0 or self.lattice > 0

    @property
    def by_hypotheses(self) -> bool:
        """Whether several sequences are needed."""
        return self.label == "best" or self.compares or self.lattice > 0

    @property
    def compares(self) -> bool:
        """Whether the student's scores of several sequences are needed."""
        return self.sequences > 0 or self.ranking > 0 or self.discriminative > 0

    @property
    def of_frames(self) -> bool:
        """Whether a teacher must have frames, or scores of sequences will do."""
        sure = self.confidence != "none" or self.least_confidence > 0
        return self.by_frames or self.label != "best" or self.hypotheses == "sampled" or sure


SUMMANDS = (
    "hard", "soft", "lattice", "sequences", "ranking", "full_sum", "discriminative",
)  # fmt: skip


class Summand(NamedTuple):
    """A mean over ``count`` utterances, and how much of it is in the objective.

    Of a weighted mean, ``count`` is the sum of the weights.
    """

    value: Float[Tensor, ""]
    weight: float
    count: float


def label(
    how: Objectives, log_p: Float[Tensor, "n t v"], frames: Int[Tensor, " n"], blank: int
) -> list[list[int]]:
    """ŷ of each utterance."""
    if how.label == "greedy":
        return greedy(log_p, frames, blank)
    return draw(log_p, frames, how.sampling, blank)


@torch.no_grad()
def record(how: Objectives, heard: Any, blank: int) -> list[Record]:
    """What must be known of a teacher's opinion to learn from it later, beside the label.

    Args:
        heard: the utterances, as the teacher hears them (``methods.base.Heard``).
    """
    found = None
    if how.by_hypotheses and how.hypotheses == "search":
        found = heard.propose(how.beam)
    log_p, frames = heard.frame_log_probs() if how.of_frames else (None, None)
    records: list[Record] = [{} for _ in range(len(heard))]
    if how.soft:
        sharp = how.temperature == 0
        keep = 1 if sharp else min(how.keep, log_p.shape[2])
        target = soft_labels(log_p, frames, keep, how.temperature or 1.0)
        if sharp:
            nothing = torch.full_like(target.log_rest, -torch.inf)
            target = SoftLabels(torch.zeros_like(target.log_p), target.tokens, nothing, frames)
        _put(records, "soft", target)
    if how.by_hypotheses:
        if found is None:
            found = draw_several(log_p, frames, how.sampling, blank, how.beam)
        found, dropped = possible(found)
        labels = [p.labels for own in found for p in own]
        of = torch.tensor([i for i, own in enumerate(found) for _ in own], dtype=torch.long)
        score = torch.tensor([p.log_p for own in found for p in own])
        # Of those that were drawn, how often that was is their weight.
        log_w = posterior(score, of, len(found), how.scale if how.hypotheses == "search" else 1.0)
        if how.opinion == "shuffled":
            log_w = shuffled(log_w, of)
        text, lengths = pad(labels)
        for i, own in enumerate(records):
            mine = (of == i).nonzero()[:, 0]
            own["labels"], own["lengths"], own["log_w"] = text[mine], lengths[mine], log_w[mine]
            own["dropped"] = dropped[i]
            if how.full_sum:
                own["log_p"] = score[mine]
        if how.lattice:
            at = log_p.device
            gamma = occupancies(
                log_p, frames, text.to(at), lengths.to(at), of.to(at), log_w.exp().to(at), blank
            )
            # Where nobody is said to say anything there is no target; `objective` leaves it out.
            target = soft_labels(gamma.clamp(min=TINY).log(), frames, min(how.keep, gamma.shape[2]))
            _put(records, "lattice", target)
    if how.by_frames and how.blank_weight < 1:
        for own, path, t in zip(records, log_p.argmax(2).cpu(), frames.tolist()):
            own["blank"] = path[:t] == blank
    if how.confidence != "none" or how.least_confidence:
        for own, best, t in zip(records, log_p.amax(2).cpu(), frames.tolist()):
            own["confidence"] = best[:t].mean().exp().reshape(1) if t else torch.zeros(1)
    return records


def objective(
    how: Objectives,
    heard: Any,
    labels: list[list[int]],
    records: Sequence[Mapping[str, Tensor]],
    max_labels: int,
) -> tuple[dict[str, Summand], dict[str, float]]:
    """The student's loss on labels and records, by name, and shares of what was dropped.

    Args:
        heard: the utterances, as the student hears them.
        max_labels: longer label sequences are dropped.

    Raises:
        ValueError: as many labels and records as utterances are needed.
    """
    n = len(records)
    needed = how.by_frames or how.frame_entropy or how.token_entropy
    if not len(labels) == n == len(heard):
        raise ValueError(f"{len(labels)} labels and {n} records for {len(heard)} utterances")
    log_p, frames = heard.frame_log_probs() if needed else (None, None)
    each = _weights(how, records)
    out: dict[str, Summand] = {}
    numbers = {}
    if how.least_confidence:
        numbers["labels_doubtful"] = float((each == 0).float().mean())
    if how.hard or how.full_sum:
        more, told = _of_labels(how, heard, labels, records, each, max_labels)
        out |= more
        numbers |= told
    for name in ("soft", "lattice"):
        if weight := getattr(how, name):
            target, of_frames = _get(records, name, how.blank_weight, log_p.device)
            loss = kl(log_p, frames, target, weights=of_frames)
            there = frames > 0
            if name == "lattice":
                there &= torch.tensor([len(own["lengths"]) > 0 for own in records]).to(there)
            out[f"pseudo_{name}"] = average(loss, weight, each, there)
    if how.compares:
        flat, log_w, of = usable(records, max_labels)
        # Of nothing there is no score; but every layer stays on the graph, for all ranks of a job.
        score = heard.score(flat, of.tolist()) if flat else heard.score([[]], [0])[:0]
        log_w, of = log_w.to(score), of.to(score.device)
        can = ~score.isneginf()  # by the student's frames; the others share their weight
        numbers["hypotheses_infeasible"] = int((~can).sum()) / max(n, 1)
        log_w = posterior(log_w.where(can, -torch.inf), of, n)
        there = torch.zeros(n, dtype=torch.bool, device=of.device).index_fill(0, of[can], True)
        if how.sequences:
            if how.direction == "forward":
                loss = cross_entropy(log_w, score, of, n)
            else:
                loss = reversed_ranking(log_w, score, of, n, how.scale)
            out["pseudo_sequences"] = average(loss, how.sequences, each, there)
        if how.ranking:
            loss = ranking(log_w, score, of, n, how.scale)
            out["pseudo_ranking"] = average(loss, how.ranking, each, there)
        if how.discriminative:
            loss = discriminative(log_w, score, of, n, how.scale)
            out["pseudo_discriminative"] = average(loss, how.discriminative, each, there)
    if how.frame_entropy:
        loss = frame_entropy(log_p, frames)
        out["pseudo_frame_entropy"] = average(loss, how.frame_entropy, torch.ones(n))
    if how.token_entropy:
        every = together(frames)  # what is said in the mean, is said by all ranks
        per_utterance = every.float().mean() * token_entropy(log_p, frames, of_all_ranks)
        out["pseudo_token_entropy"] = Summand(per_utterance, -how.token_entropy, len(every))
    return out, numbers


def _of_labels(how, heard, labels, records, each, max_labels):
    """What is learnt of ŷ, where that can be learnt, and shares of what cannot."""
    too_long = [len(y) > max_labels for y in labels]
    # A dropped utterance is scored with an empty label, which costs no memory, and then
    # masked: the loss stays on the graph even if nothing is kept.
    usable = [[] if long else y for y, long in zip(labels, too_long)]
    score = heard.score(usable)
    said = torch.tensor([bool(y) for y in usable], device=score.device)
    keep = said & ~score.isneginf()  # a NaN is not hidden: the trainer skips such a step
    dropped = {
        "empty": sum(not y for y in labels),
        "too_long": sum(too_long),
        "infeasible": int(said.sum()) - int(keep.sum()),
    }
    numbers = {f"labels_{why}": count / len(labels) for why, count in dropped.items()}
    out = {}
    if how.hard:
        loss = -torch.where(keep, score, 0.0)
        out["pseudo"] = average(loss, how.hard, each, keep)
    if how.full_sum:
        best = [own["log_p"][:1] if len(own["log_p"]) else torch.zeros(1) for own in records]
        teacher = torch.cat(best).to(score)
        lengths = torch.tensor([max(len(y), 1) for y in usable], device=score.device)
        loss = distance(
            score.where(keep, teacher), teacher, how.distance,
            delta=how.delta, lengths=lengths if how.by_length else None,
        )  # fmt: skip
        out["pseudo_full_sum"] = average(loss, how.full_sum, each, keep)
        numbers["student_surer"] = (
            float((score > teacher)[keep].float().mean()) if keep.any() else 0.0
        )
    return out, numbers


def average(loss, weight, each, keep=None) -> Summand:
    """The mean over the utterances that are kept, by their weights ``each``.

    Without any it is 0, and on the graph: every rank of a job has a gradient.
    """
    each = each.to(loss) if keep is None else torch.where(keep, each.to(loss), 0.0)
    total = torch.where(each == 0, 0.0, each * loss).sum() / each.sum().clamp(min=1e-6)
    return Summand(total, weight, float(each.sum()))


def _weights(how, records) -> Tensor:
    """Of the utterances, (n,)."""
    if how.confidence == "none" and not how.least_confidence:
        return torch.ones(len(records))
    confidence = torch.cat([own["confidence"] for own in records])
    each = confidence if how.confidence != "none" else torch.ones_like(confidence)
    each = each.where(confidence >= how.least_confidence, 0.0)
    return each[torch.randperm(len(each))] if how.confidence == "shuffled" else each


def _put(records: list[Record], name: str, target: SoftLabels) -> None:
    parts = target.log_p, target.tokens.to(torch.int32), target.log_rest
    for own, t, *mine in zip(records, target.frames.tolist(), *(x.cpu() for x in parts)):
        for part, x in zip(("log_p", "tokens", "log_rest"), mine):
            own[f"{name}_{part}"] = x[:t].clone()


def _get(records, name, blank_weight, device) -> tuple[SoftLabels, Tensor | None]:
    """The soft labels of all utterances, padded, and the weights of their frames."""

    def several(part, value=0.0):
        rows = [own[part] for own in records]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    frames = torch.tensor([len(own[f"{name}_log_rest"]) for own in records])
    parts = [several(f"{name}_{part}") for part in ("log_p", "tokens", "log_rest")]
    parts[1] = parts[1].long()
    weights = None
    if blank_weight < 1:
        weights = torch.where(several("blank", False), blank_weight, 1.0).to(device)
    return SoftLabels(*(x.to(device) for x in parts), frames.to(device)), weights
