"""A recogniser, speech and truth small enough to look at.

The toy speaks in one-dimensional frames: the value of a sample is a token number plus
noise, and ``frame_log_probs`` is a linear layer over a window of samples.
"""

import torch
from torch import nn

from espnet_pl.losses.ctc import feasible, log_probability
from espnet_pl.losses.joint import Joint
from espnet_pl.losses.transducer import Lattices, hypotheses
from espnet_pl.losses.transducer import log_probability as log_probability_of_transducer
from espnet_pl.methods.base import Batch, Inputs, Utterances
from espnet_pl.parts.decoding import pad
from espnet_pl.parts.search import flat, prefix_search, rank

VOCABULARY = 5  # blank and four tokens


class ToyStudent(nn.Module):
    """Dropout (the strong view), batch normalisation (buffers), and a CTC layer."""

    blank = 0
    answers = frozenset({"supervised", "features", "inputs", "frame_log_probs", "score", "propose"})
    feature_size, input_size = 16, VOCABULARY

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(VOCABULARY, 16)
        self.norm = nn.BatchNorm1d(16)
        self.dropout = nn.Dropout(0.2)
        self.out = nn.Linear(16, VOCABULARY)
        self.views = []  # training mode at each encoding, for the tests

    def supervised(self, x):
        labels = [t[: int(n)].tolist() for t, n in zip(x.text, x.text_lengths)]
        loss = -self.hear(x).score(labels).mean()
        return loss, {"loss_ctc": loss}

    def hear(self, x, hide=None):
        self.views.append(self.training)
        given, speech = hiding(x, hide)
        hidden = torch.tanh(self.hidden(speech))
        hidden = self.norm(hidden.transpose(1, 2)).transpose(1, 2)
        hidden = self.dropout(hidden)
        return ToyHeard(self.out(hidden).log_softmax(dim=-1), x.speech_lengths, hidden, given)


def hiding(x, hide):
    """What the toy was to hear, and what it hears."""
    if hide is None:
        return None, x.speech
    hidden = hide(x.speech_lengths, x.speech.shape[1])
    given = Inputs(x.speech, x.speech_lengths, hidden)
    return given, x.speech.masked_fill(hidden[..., None], 0.0)


class ToyHeard:
    def __init__(self, log_p, frames, hidden=None, given=None):
        self.log_p, self.frames, self.hidden, self.given = log_p, frames, hidden, given

    def __len__(self):
        return len(self.frames)

    def frame_log_probs(self):
        return self.log_p, self.frames

    def features(self):
        return self.hidden, self.frames

    def inputs(self):
        return self.given

    def score(self, labels, of=None):
        text, lengths = pad(labels)
        rows = torch.arange(len(labels)) if of is None else torch.tensor(of, dtype=torch.long)
        log_p = log_probability(self.log_p, self.frames, text, lengths, rows)
        never = torch.full_like(log_p, -torch.inf)
        return torch.where(feasible(self.frames[rows], text, lengths), log_p, never).float()

    def propose(self, beam):
        found = prefix_search(self.log_p, self.frames, beam)
        text, lengths, of = flat(found)
        return rank(found, log_probability(self.log_p, self.frames, text, lengths, of))


class ToyTransducer(ToyStudent):
    """The toy with a predictor that knows the last label, and a joint network; no frames to ask."""

    answers = frozenset({"supervised", "features", "inputs", "score", "propose", "lattices"})

    def __init__(self, size=8):
        super().__init__()
        self.encoder = nn.Linear(16, size)
        self.predictor = nn.Embedding(VOCABULARY, size)
        self.output = nn.Linear(size, VOCABULARY)

    @property
    def joint(self):
        return Joint(self.output.weight, self.output.bias)

    def supervised(self, x):
        labels = [t[: int(n)].tolist() for t, n in zip(x.text, x.text_lengths)]
        heard = self.hear(x)
        loss = -(heard.score(labels) + ToyHeard.score(heard, labels)).mean()  # both layers
        return loss, {"loss_both": loss}

    def hear(self, x, hide=None):
        self.views.append(self.training)
        given, speech = hiding(x, hide)
        hidden = torch.tanh(self.hidden(speech))
        hidden = self.dropout(self.norm(hidden.transpose(1, 2)).transpose(1, 2))
        log_p = self.out(hidden).log_softmax(dim=-1)
        return ToyHeardByTransducer(self, hidden, log_p, x.speech_lengths, given)


class ToyHeardByTransducer(ToyHeard):
    def __init__(self, net, hidden, log_p, frames, given=None):
        super().__init__(log_p, frames, hidden, given)
        self.net, self.encoded = net, net.encoder(hidden)

    def score(self, labels, of=None):
        rows = torch.arange(len(labels)) if of is None else torch.tensor(of, dtype=torch.long)
        lattices = self.lattices(labels, rows)
        parts = lattices.joint, lattices.encoded, lattices.frames, lattices.predicted
        return log_probability_of_transducer(*parts, lattices.hyps, exact=True).float()

    def lattices(self, labels, rows=None):
        text, lengths = pad(labels)
        hyps = hypotheses(text, lengths, rows)
        prefixes = torch.cat([torch.zeros(len(text), 1, dtype=torch.long), text.clamp(min=0)], 1)
        predicted = hyps.of_states(self.net.predictor(prefixes))
        return Lattices(self.net.joint, self.encoded, self.frames, predicted, hyps)

    def propose(self, beam):
        found = prefix_search(self.log_p, self.frames, beam)
        labels = [p.labels for own in found for p in own]
        return rank(found, self.score(labels, flat(found)[2].tolist()))


class ToyLanguageModel:
    """Likes some tokens more than others, and few of them; says what it was asked."""

    def __init__(self, log_p=(-0.0, -1.0, -2.5, -0.5, -3.0), shift=0.0):
        self.own, self.shift, self.asked = log_p, shift, []

    def log_p(self, sequences):
        self.asked += [list(y) for y in sequences]
        scores = [sum(self.own[c] for c in y) - 0.7 + self.shift for y in sequences]
        return torch.tensor(scores, dtype=torch.float64)


def utterances(n=3, seed=0, text=True, prefix="utt"):
    """n utterances of 5 to 12 frames; frame t holds a noisy one-hot vector of its token."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 13, (n,), generator=g)
    tokens = torch.randint(1, VOCABULARY, (n, 2), generator=g)
    speech = 0.3 * torch.randn(n, int(lengths.max()), VOCABULARY, generator=g)
    for i in range(n):
        half = int(lengths[i]) // 2
        speech[i, :half, tokens[i, 0]] += 1.0
        speech[i, half:, tokens[i, 1]] += 1.0
    extra = dict(text=tokens, text_lengths=torch.full((n,), 2)) if text else {}
    return Utterances([f"{prefix}{i}" for i in range(n)], speech, lengths, **extra)


def batch(labelled=True, unlabelled=True, fresh=False, seed=0):
    """One batch; the fresh utterances are the unlabelled ones, so that they can be used at once."""
    speech = utterances(seed=seed + 100, text=False, prefix="u")
    return Batch(
        labelled=utterances(seed=seed, prefix="l") if labelled else None,
        unlabelled=speech if unlabelled else None,
        fresh=speech if fresh else None,
    )


def speaking_student(seed=0, kind=ToyStudent):
    """A student whose greedy labels are neither empty nor infeasible: trained for a moment."""
    torch.manual_seed(seed)
    student = kind()
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    for step in range(30):
        optimizer.zero_grad()
        student.supervised(utterances(n=8, seed=step))[0].backward()
        optimizer.step()
    student.zero_grad()
    student.views.clear()
    return student
