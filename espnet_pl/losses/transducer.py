r"""log P(y|x) of a transducer, summed over all alignments, for any number of hypotheses.

    P(y|x) = Σ_{alignments a of y} Π_{arcs (s,t,k) of a} p(k|s,t)

where s is the predictor's state after a prefix of y, t a frame, and k the blank or the next label.
Two hypotheses of an utterance share the states of their common prefixes, or, with a predictor that
remembers c labels only, of prefixes with the same last c labels: a pair (s,t) is computed once for
all of them (`joint.planes`).  The sum is `lattice.full_sum`.

The RNN-T loss is −log P(y|x); other losses of the same numbers need gradients of any sign.  Where
somebody else has computed the logits of all nodes, `log_probability_of_logits` takes those.

Source: Graves, "Sequence Transduction with Recurrent Neural Networks", arXiv:1211.3711.  Sharing
the joint network's nodes between hypotheses is ours.
Axes: n utterances, k hypotheses, t frames, u labels, u1 = u + 1, s predictor states of
all utterances, m tokens read in a state, j joint dimensions.  Unit: nats per hypothesis.
"""

import functools
import itertools
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from espnet_pl.losses.band import band
from espnet_pl.losses.joint import Joint, Tile, ask, planes, product_type
from espnet_pl.losses.lattice import full_sum
from espnet_pl.losses.logits import planes_of_logits

SKIP = 5e-7  # of the backward pass; see `joint.planes`
TOLERANCE = 1e-5  # of log P, in nats; see `band.band`
LARGE = 2e7  # multiplications in a frame; they take twice as long as the search for a band


@dataclass(frozen=True)
class Hypotheses:
    """Label sequences and the predictor states of their lattices; made by ``hypotheses``.

    Args:
        lengths: labels of each hypothesis.
        utterance: whose hypothesis it is.
        states: the state after each prefix, (k, u+1); 0 behind the end.
        columns: where the next label is among the tokens of that state.
        tokens: what is read in each state, the blank first; padded with −1.
        owner: the utterance of each state.
        rows: a prefix that leads to each state, as a row of (k · (u+1)).
    """

    lengths: Int[Tensor, " k"]
    utterance: Int[Tensor, " k"]
    states: Int[Tensor, "k u1"]
    columns: Int[Tensor, "k u"]
    tokens: Int[Tensor, "s m"]
    owner: Int[Tensor, " s"]
    rows: Int[Tensor, " s"]

    def of_states(self, predicted: Float[Tensor, "k u1 j"]) -> Float[Tensor, "s j"]:
        """One row for each state of the predictor's output for all prefixes."""
        return predicted.flatten(0, 1)[self.rows]


def hypotheses(
    labels: Int[Tensor, "k u"],
    lengths: Int[Tensor, " k"],
    utterance: Int[Tensor, " k"] | None = None,
    *,
    blank: int = 0,
    context: int | None = None,
) -> Hypotheses:
    """Label sequences as lattices with shared states.

    Args:
        labels: padded at the end with anything.
        utterance: whose hypothesis each one is; without, the k-th is of the k-th utterance, and
            nothing is shared.
        context: labels that the predictor remembers; None: all.

    Raises:
        ValueError: a blank among the labels, or lengths that do not fit.
    """
    k, u = labels.shape
    if len(lengths) != k or (k and not 0 <= int(lengths.min()) <= int(lengths.max()) <= u):
        raise ValueError(f"lengths {lengths.tolist()} for labels of shape {tuple(labels.shape)}")
    inside = torch.arange(u, device=labels.device) < lengths[:, None]
    if bool(((labels == blank) & inside).any()):
        raise ValueError(f"the blank, {blank}, is among the labels")
    labels = labels.masked_fill(~inside, -1)
    if utterance is None:
        return _one_each(labels, lengths, blank)
    return _shared(labels, lengths, utterance, blank, context)


@dataclass(frozen=True)
class Lattices:
    """What ``log_probability`` is computed of, in one object: for losses that see the nodes.

    Args:
        joint: the joint network; its weight and bias may have a gradient, as the two below may.
        encoded: projected encoder output.
        frames: valid frames of each utterance.
        predicted: projected predictor output in each state of ``hyps``.
        hyps: whose lattices these are.
    """

    joint: Joint
    encoded: Float[Tensor, "n t j"]
    frames: Int[Tensor, " n"]
    predicted: Float[Tensor, "s j"]
    hyps: Hypotheses


def log_probability(
    joint: Joint,
    encoded: Float[Tensor, "n t j"],
    frames: Int[Tensor, " n"],
    predicted: Float[Tensor, "s j"],
    hyps: Hypotheses,
    *,
    exact: bool = False,
    fast_emit: float = 0.0,
) -> Float[Tensor, " k"]:
    """log P of each hypothesis, in float64; −inf if its utterance has no frame.

    Args:
        encoded: projected encoder output.
        frames: valid frames of each utterance.
        predicted: projected predictor output in each state.
        exact: compute every node, forward and backward.  Otherwise log P may be less than it is by
            at most 1e-5, which is certified (`band.band`), and nodes are left out of the backward
            pass whose gradient is less than 5e-7 of their utterance's greatest.
        fast_emit: λ of Yu et al., "FastEmit", arXiv:2010.11148: the gradient of label arcs is taken
            1 + λ times; the value stays as it is.
    """
    known = nodes = None
    if not exact and _is_large(joint, hyps):
        known, nodes, _ = _band(joint, encoded, frames, predicted, hyps)
    log_p = planes(
        joint, encoded, frames, predicted, hyps.owner, hyps.tokens,
        nodes=nodes, known=known, skip=0.0 if exact else SKIP,
    )  # fmt: skip
    blank = log_p[0, hyps.states]
    label = _emitting(log_p[hyps.columns, hyps.states[:, :-1]], fast_emit)
    return full_sum(blank, label, frames[hyps.utterance], hyps.lengths)


def log_probability_of_logits(
    logits: Float[Tensor, "n t u1 v"],
    frames: Int[Tensor, " n"],
    labels: Int[Tensor, "n u"],
    lengths: Int[Tensor, " n"],
    *,
    blank: int = 0,
    fast_emit: float = 0.0,
    in_place: bool = False,
) -> Float[Tensor, " n"]:
    """log P of one hypothesis for each utterance, in float64; −inf if it has no frame.

    Args:
        logits: of the joint network at each frame and after each prefix of the labels.
        frames: valid frames of each utterance.
        labels: padded at the end with anything.
        lengths: valid labels of each utterance.
        fast_emit: see ``log_probability``.
        in_place: the gradient overwrites the logits; see ``logits.planes_of_logits``.

    Raises:
        ValueError: shapes that do not fit together, a token outside of the vocabulary, or a blank
            among the labels.
    """
    log_p = planes_of_logits(logits, frames, labels, lengths, blank=blank, in_place=in_place)
    return full_sum(log_p[0], _emitting(log_p[1, :, :-1], fast_emit), frames.long(), lengths.long())


@functools.cache
def self_test() -> None:
    """Compare the losses and their gradients with a sum written out; once in a process.

    It takes milliseconds.  A loss that is a little wrong trains for days before anyone notices.

    Raises:
        RuntimeError: they differ.
    """
    with torch.inference_mode(False), torch.enable_grad():
        inputs = encoded, predicted, weight, bias = [
            torch.linspace(-9, 9, m * k * j, dtype=torch.float64, device="cpu")
            .sin()
            .view(m, k, j)
            .requires_grad_()
            for m, k, j in ((2, 3, 2), (2, 3, 2), (1, 4, 2), (1, 1, 4))
        ]
        joint = Joint(weight[0], bias[0, 0])
        logits = torch.tanh(encoded[:, :, None] + predicted[:, None]) @ joint.weight.t() + bias
        frames, lengths, labels = (
            torch.tensor(x, device="cpu") for x in ([3, 2], [2, 1], [[0, 2], [1, 3]])
        )
        hyps = hypotheses(labels, lengths, blank=3)
        states = hyps.of_states(predicted)
        expected = _written_out(logits.log_softmax(-1), frames, labels, lengths, blank=3)
        for name, log_p in (
            ("log_probability", log_probability(joint, encoded, frames, states, hyps, exact=True)),
            (
                "log_probability_of_logits",
                log_probability_of_logits(logits, frames, labels, lengths, blank=3),
            ),
        ):
            of = [
                [x, *torch.autograd.grad(x[0] - 0.5 * x[1], inputs, retain_graph=True)]
                for x in (log_p, expected)
            ]
            if not all(torch.allclose(x, y, rtol=0, atol=1e-9) for x, y in zip(*of)):
                raise RuntimeError(
                    f"the transducer loss computes something else here: {name} or its gradient is "
                    "not the sum over all alignments, and nothing should be trained with it. "
                    f"Reinstall espnet_pl and torch ({torch.__version__}); tools/test.sh "
                    "test/losses shows more"
                )


def _written_out(log_p, frames, labels, lengths, blank):
    """Every order of T − 1 blanks and U labels, and the last blank."""
    sums = []
    for p, t_end, y, u_end in zip(log_p, frames.tolist(), labels.tolist(), lengths.tolist()):
        alignments = []
        for labels_at in itertools.combinations(range(t_end - 1 + u_end), u_end):
            t, u, total = 0, 0, p[t_end - 1, u_end, blank]
            for step in range(t_end - 1 + u_end):
                said = step in labels_at
                total = total + p[t, u, y[u] if said else blank]
                t, u = t + (not said), u + said
            alignments.append(total)
        sums.append(torch.stack(alignments).logsumexp(0))
    return torch.stack(sums)


def _emitting(label: Tensor, fast_emit: float) -> Tensor:
    if fast_emit and label.requires_grad:
        label.register_hook(lambda grad: grad * (1 + fast_emit))
    return label


@torch.no_grad()
def _band(joint, encoded, frames, predicted, hyps: Hypotheses):
    """The nodes of the lattices that matter, and their planes: `band.band`."""
    asked = ask(joint, encoded, frames, predicted, hyps.owner, hyps.tokens)
    tile = Tile(encoded, predicted, joint.weight, joint.bias, asked, product_type(encoded))
    of_each = frames[hyps.utterance], hyps.lengths
    return band(tile, hyps.states, hyps.columns, *of_each, TOLERANCE)


def _is_large(joint: Joint, hyps: Hypotheses) -> bool:
    """Whether a frame's products take much longer than looking for the band in it."""
    return len(hyps.rows) * joint.weight.numel() > LARGE


def _one_each(labels, lengths, blank) -> Hypotheses:
    """Every prefix is a state of its own."""
    k, u = labels.shape
    ends = torch.nn.functional.pad(labels, (0, 1), value=-1)
    real = torch.arange(u + 1, device=labels.device) <= lengths[:, None]
    rows = real.flatten().nonzero()[:, 0]
    states = torch.zeros_like(real, dtype=torch.long)
    states[real] = torch.arange(len(rows), device=labels.device)
    return Hypotheses(
        lengths=lengths,
        utterance=torch.arange(k, device=labels.device),
        states=states,
        columns=torch.ones_like(labels),
        tokens=torch.stack([torch.full_like(ends, blank), ends], -1)[real],
        owner=rows // (u + 1),
        rows=rows,
    )


def _shared(labels, lengths, utterance, blank, context) -> Hypotheses:
    """Prefixes of the same utterance that the predictor cannot tell apart are one state."""
    width = labels.shape[1]
    names: dict[tuple, int] = {}
    tokens: list[list[int]] = []
    owner, rows, states, columns = [], [], [], []
    for i, (y, length, n) in enumerate(
        zip(labels.tolist(), lengths.tolist(), utterance.tolist(), strict=True)
    ):
        path, places = [0] * (width + 1), [0] * width
        for end in range(length + 1):
            seen = y[:end] if context is None else y[max(0, end - context) : end]
            state = path[end] = names.setdefault((n, *seen), len(names))
            if state == len(tokens):
                tokens.append([blank])
                owner.append(n)
                rows.append(i * (width + 1) + end)
            if end < length:
                if y[end] not in tokens[state]:
                    tokens[state].append(y[end])
                places[end] = tokens[state].index(y[end])
        states.append(path)
        columns.append(places)
    most = max(map(len, tokens), default=1)

    def tensor(numbers, *shape):
        return torch.tensor(numbers, dtype=torch.long, device=labels.device).view(*shape)

    return Hypotheses(
        lengths=lengths,
        utterance=utterance,
        states=tensor(states, -1, width + 1),
        columns=tensor(columns, len(labels), width),
        tokens=tensor([row + [-1] * (most - len(row)) for row in tokens], -1, most),
        owner=tensor(owner, -1),
        rows=tensor(rows, -1),
    )
