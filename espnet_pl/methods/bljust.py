r"""BL-JUST: labelled speech is learnt among encoders that are good at a self-supervised task.

Source: Saif, Cui, Shen, Lu, Kingsbury, Chen, "Joint Unsupervised and Supervised Training for
    Automatic Speech Recognition via Bilevel Optimization", arXiv:2401.06980, and its longer form
    arXiv:2412.08548 (abstracts, and descriptions by others); the algorithm as in the authors' code,
    afmsaif/BL-JUST (model/main.py, model/model.py); the penalty: Shen and Chen, arXiv:2302.05185
    (recalled).
Equation: with the encoder θ, the layers for tokens φ, and those of the self-supervised task ψ,
    min_{θ,φ} L_sup(θ, φ)   such that   (θ, ψ) ∈ argmin L_un;
    F_γ = L_sup(θ, φ) + γ · (L_un(θ, ψ) − v),   v = min L_un.
    v has no θ in it: as a constant it has no gradient, and is left out.  Of F_γ and an inner
    problem in ψ, joint update k makes, with m = max(1, γ_k) and weights a, b:
    θ: (a ∇L_sup + γ_k b ∇L_un) / m      φ: a ∇L_sup / m      ψ: b ∇L_un
    γ_k = min(γ_max, γ_0 + k · growth);  an update of exploration: θ and ψ: b ∇L_un.
    As γ weighs gradients, what is logged as ``loss`` is a/m · L_sup + b · L_un.
    L_un(x) = − Σ_{p=1..P} log( exp(s(W_p h_c, U x_{c+p})/τ) / Σ_a exp(s(W_p h_c, U x_a)/τ) )
    where the encoder hears x up to a random frame c, and is h_c there (losses/prediction.py).
    Both losses are means over utterances of nats: of minus the log-probability of what is to be
    known of an utterance, its transcript or its hidden frames.  So L_sup is ESPnet's own criterion,
    γ = 0 is the method ``supervised``, but for statistics of batch normalisation and for clipping
    (``grad_clip``), whose norm is of all gradients, those of ψ among them; and γ is a rate of
    exchange.
Differs from the paper: its code takes nats per token and per frame, so that its γ is another one,
    raised in each epoch (by 1/500) and not in each update; it explores in 4 passes before each
    joint one, we in as many updates as is said; m, here for γ > 1, is not used there.  Its targets
    are not x but what the encoder makes of the second that follows, heard alone; W_p is one layer,
    applied p times; a piece of speech is 2 + 1 s, where we draw c, in whole utterances; candidates
    are what is predicted in the batch, here all frames of the utterance or of the batch.
    hide: spans and predict: codes, as in BEST-RQ, are ours.  With Adam a constant weight changes
    no step: a, b and m matter for other optimisers, beside the other loss, and where gradients
    are clipped.  The final fine-tuning is a training of its own, method supervised, of a smaller
    step size; exploration is none, for ψ is in no exported model and would begin anew.
Unverified: γ's schedule, all step sizes, what is predicted, and the order of updates in the papers.
Cost: a joint update is one training pass on labelled and one on unlabelled speech; exploration the
    latter alone.  Every ``norms_every`` joint updates two more backward passes measure gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from espnet_pl.data.pairing import Pairing
from espnet_pl.losses.prediction import (
    Predicted,
    code_of,
    info_nce,
    of_codes,
    per_utterance,
    standardised,
)
from espnet_pl.methods import base
from espnet_pl.methods.bilevel import Bilevel, BilevelConfig
from espnet_pl.parts.gradients import compare, gradients, weighed
from espnet_pl.parts.hiding import Bins, hide_future, hide_spans
from espnet_pl.parts.ranks import before, gather, mean_gradients, together


@dataclass(frozen=True)
class Config(BilevelConfig):
    """Fields that are not set keep these values."""

    labelled: int = 1  # 0: exploration only, which is pre-training
    # What the encoder does not hear: all from a frame on, or spans.
    hide: Literal["future", "spans"] = "future"
    least_heard: float = 0.667  # share of an utterance before the future: 2 of 3 s
    steps: int = 25  # P, frames of the encoder's output: 1 s
    span: int = 20  # frames of its input, as a rule of 10 ms
    share_hidden: float = 0.4  # in spans
    # What of it is to be known: which frames they are among others, or their codes.
    predict: Literal["frames", "codes"] = "frames"
    negatives: Literal["utterance", "batch"] = "utterance"
    temperature: float = 0.1  # τ
    out: int = 128  # dimensions in which frames are compared
    codes: int = 256  # C
    norms_every: int = 50  # joint updates from one measurement of gradients to the next; 0: none

    def __post_init__(self) -> None:
        if self.labelled not in (0, 1):
            raise ValueError(f"labelled is {self.labelled}, it must be 0 or 1")
        if self.norms_every < 0:
            raise ValueError(f"norms_every is {self.norms_every}, it must not be negative")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}, it must be positive")
        for name in ("steps", "span", "out", "codes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be at least 1")
        if not 0.0 <= self.least_heard < 1.0:
            raise ValueError(f"least_heard is {self.least_heard}, it must lie in [0, 1)")
        if not 0.0 < self.share_hidden < 1.0:
            raise ValueError(f"share_hidden is {self.share_hidden}, it must lie in (0, 1)")
        super().__post_init__()
        Method.pairing(self)

    @property
    def hiding(self) -> Callable[[Int[Tensor, " n"], int], Bool[Tensor, "n s"]]:
        """Which frames of the encoder's input it does not hear."""
        if self.hide == "future":
            return lambda frames, width: hide_future(frames, width, self.least_heard)
        return lambda frames, width: hide_spans(frames, width, self.share_hidden, self.span)


class Method(Bilevel):
    """Two losses of one encoder."""

    requires = frozenset({"features", "inputs"})

    def __init__(self, config, student, resources):
        super().__init__(config, student, resources)
        ahead = config.steps if config.hide == "future" else 1
        self.embedding, size = None, config.codes
        if config.predict == "frames":
            size = config.out
            self.embedding = nn.Linear(student.input_size, size, bias=False)
        else:  # drawn once, kept in the checkpoint, and never learnt
            few = min(16, student.input_size)
            self.register_buffer("directions", torch.randn(student.input_size, few))
            self.register_buffer("book", torch.randn(size, few))
        self.predictor = nn.Linear(student.feature_size, ahead * size)
        self.size = size
        self.supervised: base.Term | None = None  # its labelled half

    @classmethod
    def pairing(cls, config):
        if not config.labelled:
            return Pairing(labelled=0, unlabelled=1)
        return Pairing(unlabelled=1, together=True, explore=config.explore, joint=config.joint)

    @property
    def measured(self) -> bool:
        """Whether gradients are measured in the present update."""
        every = self.config.norms_every
        return self.both and every > 0 and int(self.joint) % every == 0

    def learns(self):
        embedding = [] if self.embedding is None else [*self.embedding.parameters()]
        return [*self.predictor.parameters(), *embedding]

    def forward(self, student, batch):
        terms = super().forward(student, batch)
        self.supervised = None  # or its graph stays in memory
        return terms

    def labelled(self, student, x):
        terms = super().labelled(student, x)
        self.supervised = terms["supervised"]
        return terms

    def unlabelled(self, student, x):
        heard = student.hear(x, self.config.hiding)
        encoded, frames = heard.features()
        # What goes back to the encoder is weighed; what the layers of the task learn is not.
        features = weighed(encoded, self.penalty)
        found, rows, frames = self.predict(features, frames, heard.inputs())
        loss = per_utterance(found.loss, rows, len(frames)).mean()
        terms = {"unsupervised": base.Term(loss, self.config.lower_weight, len(frames))}
        numbers = {"frames_predicted": len(rows) / max(int(frames.sum()), 1)}
        if len(rows):
            numbers["frame_loss"] = float(found.loss.detach().mean())
            numbers["frame_chance"] = float(found.candidates.double().log().mean())
        if self.measured:
            of = [p for p in student.parameters() if p.requires_grad]
            upper = gradients(self.supervised.value, of)
            lower = gradients(loss, of, through=(features, encoded))
            upper = mean_gradients(upper, of, self.supervised.count)
            lower = mean_gradients(lower, of, len(frames))
            numbers |= compare(upper, lower)._asdict()
        return terms | base.diagnostics(numbers, len(x))

    def predict(
        self, features: Float[Tensor, "n t d"], frames: Int[Tensor, " n"], given: base.Inputs
    ) -> tuple[Predicted, Int[Tensor, " k"], Int[Tensor, " m"]]:
        """The loss of each frame that is predicted, the utterance it is of, and the valid frames of
        each utterance; where those of the batch are told apart, the batch is that of all ranks.

        Args:
            features: of the encoder, which has heard what was not hidden.
            frames: valid ones.
        """
        bins = Bins(given.frames, given.features.shape[1], frames, features.shape[1])
        rows, places, made = self._predictions(features, bins.all(given.hidden))
        targets = bins.mean(given.features)
        if self.embedding is None:
            codes = code_of(standardised(targets, frames), self.directions, self.book)
            return of_codes(made, codes[rows, places]), rows, frames
        embedded = self.embedding(targets.to(self.embedding.weight.dtype))
        how = {"negatives": self.config.negatives, "temperature": self.config.temperature}
        if self.config.negatives == "batch":
            rows = rows + before(len(frames))
            most = max(gather(embedded.shape[1]))
            embedded = nn.functional.pad(embedded, (0, 0, 0, most - embedded.shape[1]))
            several = (made, rows, places, embedded, frames)
            made, rows, places, embedded, frames = map(together, several)
        return info_nce(made, rows, places, embedded, frames, **how), rows, frames

    def _predictions(
        self, features: Float[Tensor, "n t d"], hidden: Bool[Tensor, "n t"]
    ) -> tuple[Int[Tensor, " k"], Int[Tensor, " k"], Float[Tensor, "k out"]]:
        """Of which utterances and frames there are some, and they themselves."""
        if self.config.hide == "spans":
            rows, places = hidden.nonzero(as_tuple=True)
            return rows, places, self.predictor(features[rows, places])
        n, t = hidden.shape
        first = hidden.long().argmax(1) if t else hidden.new_zeros(n, dtype=torch.long)
        ahead = torch.arange(t, device=hidden.device) - first[:, None]
        # Of an encoder that heard less than one of its own frames nothing is asked.
        asked = hidden & (ahead >= 0) & (ahead < self.config.steps) & (first > 0)[:, None]
        rows, places = asked.nonzero(as_tuple=True)
        context = features[rows, first[rows] - 1]
        every = self.predictor(context).view(len(rows), self.config.steps, self.size)
        number = torch.arange(len(rows), device=rows.device)
        return rows, places, every[number, ahead[rows, places]]
