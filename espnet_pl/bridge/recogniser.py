"""A stock ESPnet model as a student: it answers a method's questions.

Student and teacher are both one, so a method cannot tell them apart.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch
from espnet2.asr.espnet_model import ESPnetASRModel
from torch import Tensor, nn

from espnet_pl.losses.ctc import ctc, feasible, log_probability
from espnet_pl.methods.base import Hide, Inputs, Utterances
from espnet_pl.parts.decoding import pad
from espnet_pl.parts.search import Proposal, flat, prefix_search, rank


class Recogniser(nn.Module):
    """CTC and attention/CTC models of ESPnet's ``asr`` task.

    Transducers (ESPnet's ``asr_transducer`` task) are another student; a method sees no difference.
    Those of the ``asr`` task have no score here: they are trained, and give CTC's frames.
    """

    def __init__(self, net: ESPnetASRModel) -> None:
        super().__init__()
        self.net = net
        self.blank = net.blank_id
        self.feature_size = (net.postencoder or net.encoder).output_size()
        self.input_size = input_size(net)
        answers = {"supervised", "features"} | ({"inputs"} if self.input_size else set())
        if net.ctc is not None:
            answers.add("frame_log_probs")
            if not net.use_transducer_decoder:
                answers |= {"score", "propose"}
        self.answers = frozenset(answers)

    def supervised(self, x: Utterances) -> tuple[Tensor, dict[str, Tensor]]:
        """ESPnet's own forward pass, untouched."""
        loss, parts, _ = self.net(
            speech=x.speech,
            speech_lengths=x.speech_lengths,
            text=x.text,
            text_lengths=x.text_lengths,
        )
        parts = {k: v for k, v in parts.items() if v is not None and k != "loss"}
        return loss.squeeze(), {k: v.squeeze() for k, v in parts.items()}

    def hear(self, x: Utterances, hide: Hide | None = None) -> "Encoded":
        """The speech, encoded once."""
        return Encoded(self.net, x, self.training, hide)


class Encoded:
    """What a stock model has made of utterances: ``methods.base.Heard``."""

    def __init__(
        self, net: ESPnetASRModel, x: Utterances, training: bool, hide: Hide | None = None
    ) -> None:
        self.given: list[Inputs] = []
        with hiding(net, hide, self.given):
            encoded, frames = net.encode(x.speech, x.speech_lengths)
        if isinstance(encoded, tuple):  # with the outputs of intermediate layers
            encoded = encoded[0]
        # In 202511 the frames of a short utterance can exceed the padded axis by one or two.
        self.frames = frames.clamp(max=encoded.shape[1])
        self.net, self.encoded, self.training = net, encoded, training

    def __len__(self) -> int:
        return len(self.frames)

    def frame_log_probs(self) -> tuple[Tensor, Tensor]:
        """Log-softmax of the CTC layer, (n, t, v), and the valid frames, (n,)."""
        return self._log_p, self.frames

    def features(self) -> tuple[Tensor, Tensor]:
        """The encoder's output, (n, t, d), and the valid frames, (n,)."""
        return self.encoded, self.frames

    def inputs(self) -> Inputs:
        """What the encoder was to be given, and what of it was hidden."""
        return self.given[0]

    def score(self, labels: list[list[int]], of: list[int] | None = None) -> Tensor:
        """w · log p_ctc + (1 − w) · log p_att with ESPnet's ``ctc_weight`` w, (k,) nats."""
        text, lengths = pad(labels, self.encoded.device)
        if of is None:
            frames = self.frames
            log_p = -ctc(self._log_p, frames, text, lengths, self.net.blank_id)
            log_p = self._with_attention(log_p, self.encoded, frames, text, lengths)
        else:
            rows = torch.tensor(of, dtype=torch.long, device=self.encoded.device)
            log_p, frames = self._of_hypotheses(text, lengths, rows), self.frames[rows]
        never = torch.full_like(log_p, -torch.inf)
        return torch.where(feasible(frames, text, lengths), log_p, never)

    def propose(self, beam: int) -> list[list[Proposal]]:
        """The likeliest sequences of the CTC layer, with the scores of ``score`` in float64."""
        found = prefix_search(self._log_p, self.frames, beam, blank=self.net.blank_id)
        return rank(found, self._of_hypotheses(*flat(found, self.encoded.device)))

    @functools.cached_property
    def _log_p(self) -> Tensor:
        head = self.net.ctc
        hidden = nn.functional.dropout(self.encoded, head.dropout_rate, self.training)
        return head.ctc_lo(hidden).log_softmax(dim=-1)

    def _of_hypotheses(self, text, lengths, rows) -> Tensor:
        log_p = log_probability(self._log_p, self.frames, text, lengths, rows, self.net.blank_id)
        return self._with_attention(log_p, self.encoded[rows], self.frames[rows], text, lengths)

    def _with_attention(self, log_p_ctc, encoded, frames, text, lengths) -> Tensor:
        weight = self.net.ctc_weight
        if weight == 1.0 or not len(log_p_ctc):  # the stock model takes no empty batch
            return log_p_ctc
        return weight * log_p_ctc - (1 - weight) * self.net.nll(encoded, frames, text, lengths)


def input_size(net: nn.Module) -> int | None:
    """Dimensions of what the encoder is given; None if the speech comes as features."""
    return None if net.frontend is None else net.frontend.output_size()


@contextlib.contextmanager
def hiding(net: nn.Module, hide: Hide | None, given: list[Inputs]) -> Iterator[None]:
    """Inside: a stock model's encoder does not hear what is hidden, and its input is kept.

    From outside, for all that happens in ``encode`` besides is ESPnet's.
    """
    if hide is None:
        yield
        return

    def before(_, args):
        features, frames, *more = args
        hidden = hide(frames, features.shape[1])
        given.append(Inputs(features.detach(), frames, hidden))
        return (features.masked_fill(hidden[:, :, None], 0.0), frames, *more)

    first = getattr(net, "preencoder", None)
    hook = (net.encoder if first is None else first).register_forward_pre_hook(before)
    specaug, net.specaug = net.specaug, None
    try:
        yield
    finally:
        net.specaug = specaug
        hook.remove()
