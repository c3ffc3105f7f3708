"""Pseudo-labels: what a teacher says, whether several agree, and what can be told of it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from rapidfuzz.distance import Levenshtein
from torch import nn

from espnet_pl.losses.diagnostics import FrameStatistics, frame_statistics
from espnet_pl.parts.cache import PseudoLabelCache, Record
from espnet_pl.parts.decoding import consensus, greedy, pad
from espnet_pl.parts.hypotheses import likeliest
from espnet_pl.parts.objectives import Objectives, label, record
from espnet_pl.parts.teacher import weak_view

HARD = Objectives()


class Labels(NamedTuple):
    """A label sequence per utterance, what the teacher's frames looked like, what else it said."""

    labels: list[list[int]]
    statistics: FrameStatistics | None  # of a teacher that has frames
    records: list[Record]


def propose(teacher: nn.Module, x: Any, how: Objectives = HARD) -> Labels:
    """What the teacher says of x in the weak view; leaves the teacher's modes as they are."""
    with weak_view(teacher):
        heard, blank = teacher.hear(x), teacher.blank
        records = record(how, heard, blank)
        if "frame_log_probs" not in teacher.answers:
            return Labels(likeliest(records), None, records)
        log_p, frames = heard.frame_log_probs()
        best = how.label == "best"
        return Labels(
            likeliest(records) if best else label(how, log_p, frames, blank),
            frame_statistics(log_p, frames, blank),
            records,
        )


def agree(views: Sequence[Labels], others: Sequence[list[list[int]]] = ()) -> Labels:
    """The consensus, utterance by utterance.

    Args:
        views: a teacher's labels in each view; the statistics are their mean, the records those of
            the first; what they say of hypotheses is ``mixed``, unless occupancies go with them.
        others: labels of the same utterances by other teachers.
    """
    if len(views) == 1 and not others:
        return views[0]
    several = [*zip(*(view.labels for view in views), *others)]
    records = views[0].records
    if records and "log_w" in records[0] and "lattice_tokens" not in records[0]:
        of_views = zip(*(view.records for view in views))
        said = zip(*others) if others else [()] * len(records)
        records = [own | mixed(of, by) for own, of, by in zip(records, of_views, said)]
    return Labels(
        [consensus(labels) for labels in several],
        mean([view.statistics for view in views]),
        records,
    )


def mean(statistics: Sequence[FrameStatistics | None]) -> FrameStatistics | None:
    """Of several teachers or batches; None if one of them has none."""
    if None in statistics:
        return None
    return FrameStatistics(*(torch.stack(values).mean() for values in zip(*statistics)))


def mixed(views: Sequence[Record], others: Sequence[list[int]] = ()) -> Record:
    r"""The mean of several opinions about the hypotheses of one utterance,

        w(y) = (1/M) Σ_m w_m(y),  w_m(y) = 0 if m did not think of y,

    where a label without an opinion is the whole opinion of whoever said it.  Opinions that are
    empty do not count.
    """
    opinions = []
    for view in views:
        rows = zip(view["labels"].tolist(), view["lengths"].tolist(), view["log_w"].exp().tolist())
        opinions.append({tuple(y[:length]): w for y, length, w in rows})
    opinions = [of for of in [*opinions, *({tuple(y): 1.0} for y in others if y)] if of]
    w: dict[tuple[int, ...], float] = {}
    for opinion in opinions:
        for y, own in opinion.items():
            w[y] = w.get(y, 0.0) + own / len(opinions)
    best = sorted(w, key=w.get, reverse=True)
    text, lengths = pad([list(y) for y in best])
    return {"labels": text, "lengths": lengths, "log_w": torch.tensor([w[y] for y in best]).log()}


def by_risk(record: Record, scale: float) -> Record:
    r"""The hypotheses of one utterance, weighed by how much they differ from all in the mean,

        w'(y_k) ∝ exp(−scale · Σ_j w_j d(y_k, y_j)),   d: edits.

    Source: minimum Bayes risk decoding, Goel and Byrne, "Minimum Bayes-risk automatic speech
    recognition", Computer Speech and Language 14, 2000, is its limit of a large scale; as a soft
    label it is ours.
    """
    rows = zip(record["labels"].tolist(), record["lengths"].tolist())
    said = [y[:length] for y, length in rows]
    if not said:
        return record
    edits = torch.tensor([[Levenshtein.distance(a, b) for b in said] for a in said])
    risk = edits.float() @ record["log_w"].exp()
    return record | {"log_w": (-scale * risk).log_softmax(0)}


def label_statistics(
    x: Any,
    made: Labels,
    before: PseudoLabelCache,
    truth: Mapping[str, list[int]],
) -> dict[str, float]:
    """What new labels of x look like.

    Args:
        before: labels made earlier; those of the same utterances give the churn,
            edits between old and new label per old token.
        truth: held-back labels by utterance id; where there are some they give the label
            error rate.

    Returns:
        Shares and entropies by name; churn and error rate only where they are defined.
    """
    told = made.statistics._asdict() if made.statistics else {}
    values = {name: value.item() for name, value in told.items()}
    values["label_loops"] = loops(made.labels)
    new = dict(zip(x.utt_id, made.labels))
    again = [i for i in new if i in before]
    if again:
        old = [before.get(i) for i in again]
        values["label_churn"] = label_error_rate([new[i] for i in again], old)
    known = [i for i in new if i in truth]
    if known:
        values["label_error_rate"] = label_error_rate(
            [new[i] for i in known], [truth[i] for i in known]
        )
    return values


def student_statistics(heard: Any, blank: int, samples: int, reference: float) -> dict[str, float]:
    """What a student's frames look like in the view it learns in, and how much it says there.

    Args:
        heard: the utterances, as the student hears them.
        samples: of their speech.
        reference: labels per sample of labelled speech; 0: not known yet.

    Returns:
        The same shares and entropies as of a teacher, by names that begin with ``student``; the
        length ratio only where there is a reference.
    """
    log_p, frames = heard.frame_log_probs()
    statistics = frame_statistics(log_p, frames, blank)
    values = {f"student_{name}": value.item() for name, value in statistics._asdict().items()}
    said = greedy(log_p.detach(), frames, blank)
    values["student_loops"] = loops(said)
    if reference > 0:
        values["student_length_ratio"] = sum(map(len, said)) / max(samples, 1) / reference
    return values


def loops(labels: list[list[int]]) -> float:
    """The share of labels that say again what the two before them said, or the last twice more."""
    again = sum(
        y[i - 2] == y[i] and (y[i - 1] == y[i] or (i > 2 and y[i - 3] == y[i - 1]))
        for y in labels
        for i in range(2, len(y))
    )
    return again / max(sum(map(len, labels)), 1)


def label_error_rate(labels: list[list[int]], truth: list[list[int]]) -> float:
    """Edits per true token, summed over the utterances before dividing; 0 without any token."""
    edits = sum(Levenshtein.distance(y, t) for y, t in zip(labels, truth))
    return edits / max(sum(map(len, truth)), 1)
